"""A tiny decoder, documents and pairs, laid out as batches in many ways that must all train alike."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from laif_jax.config.schema import DpoSpec, LoraSpec, MeshSpec, OptimizerSpec, ScratchSpec, SftSpec
from laif_jax.models.config import ModelConfig, scratch
from laif_jax.models.decoder import init_params
from laif_jax.models.specs import param_specs
from laif_jax.parallel import batch_shardings, make_mesh, param_shardings
from laif_jax.training.feed import to_device
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.state import TrainState, create_state, state_shardings
from laif_jax.training.step import make_train_step

VOCAB = 41
# RMSprop with decay 1 and eps 1 divides by 1, and its momentum buffer after one step is the clipped gradient itself.
PLAIN = OptimizerSpec(name="rmsprop", decay=1.0, eps=1.0, momentum=0.5, learning_rate=0.1)


class Document(NamedTuple):
    tokens: np.ndarray
    prompt: int  # tokens that are not supervised


def config(lora: LoraSpec | None = None) -> ModelConfig:
    sizes = ScratchSpec(
        hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_position=64
    )
    return scratch(sizes, VOCAB, lora=lora)


def params(cfg: ModelConfig | None = None, seed: int = 0) -> dict:
    return _params(cfg or config(), seed)


@functools.cache
def _params(cfg: ModelConfig, seed: int) -> dict:
    return init_params(cfg, jax.random.key(seed))


def documents(count: int = 8, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(5, 15, size=count), rng.integers(1, 4, size=count)
    return [Document(rng.integers(2, VOCAB, size=n).astype(np.int32), p) for n, p in zip(lengths, prompts)]


def rows_of(docs: list[Document], capacity: int) -> list[list[int]]:
    """First-fit of documents into rows of `capacity` tokens."""
    rows: list[list[int]] = []
    for i, doc in enumerate(docs):
        for row in rows:
            if sum(len(docs[j].tokens) for j in row) + len(doc.tokens) <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def lay_out(
    docs: list[Document], rows: list[list[int]], length: int, *, micro: int = 1, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """[A, R, T] arrays of documents in the given rows; rows are filled up with empty ones."""
    rows = rows + [[]] * (-len(rows) % micro)
    batch = {
        "tokens": np.full((len(rows), length), pad_id, np.int32),
        "segment_ids": np.zeros((len(rows), length), np.int32),
        "positions": np.zeros((len(rows), length), np.int32),
        "loss_mask": np.zeros((len(rows), length), np.float32),
    }
    for r, row in enumerate(rows):
        start = 0
        for s, i in enumerate(row, 1):
            stop = start + len(docs[i].tokens)
            batch["tokens"][r, start:stop] = docs[i].tokens
            batch["segment_ids"][r, start:stop] = s
            batch["positions"][r, start:stop] = np.arange(stop - start)
            batch["loss_mask"][r, start + docs[i].prompt : stop] = 1.0
            start = stop
    return {k: v.reshape(micro, -1, length) for k, v in batch.items()}


def sft_batch(
    *, length: int = 16, micro: int = 1, packed: bool = False, pad_id: int = 0
) -> dict[str, np.ndarray]:
    docs = documents()
    rows = rows_of(docs, length) if packed else [[i] for i in range(len(docs))]
    return lay_out(docs, rows, length, micro=micro, pad_id=pad_id)


def pair_batch(
    *, length: int = 16, micro: int = 1, packed: bool = False, pad_id: int = 0, seed: int = 0, first: int = 0
) -> dict[str, np.ndarray]:
    """Four pairs; document 2 i is chosen, 2 i + 1 rejected. `first`: index of the first pair in its data set."""
    docs = documents(8, seed)
    parts, segments = [], 4 if packed else 1
    for group in np.split(np.arange(4), micro):
        own = [docs[2 * i + side] for i in group for side in (0, 1)]
        rows = rows_of(own, length) if packed else [[i] for i in range(len(own))]
        place = {i: r * segments + s for r, row in enumerate(rows) for s, i in enumerate(row)}
        part = lay_out(own, rows, length, pad_id=pad_id)
        tables = {
            "chosen": np.asarray([[place[2 * i] for i in range(len(group))]], np.int32),
            "rejected": np.asarray([[place[2 * i + 1] for i in range(len(group))]], np.int32),
            "p_chosen": np.asarray([[(1.0, 0.8, 0.6, 1.0)[i] for i in group]], np.float32),
            "weight": np.ones((1, len(group)), np.float32),
            "ref_chosen": np.asarray([[(-20.0, -31.0, -25.0, -40.0)[i] for i in group]], np.float32),
            "ref_rejected": np.asarray([[(-22.0, -30.0, -28.0, -33.0)[i] for i in group]], np.float32),
            "pair_index": np.asarray([first + group], np.int32),
        }
        parts.append(part | tables)
    widest = max(
        p["tokens"].shape[1] for p in parts
    )  # packing gives micro-batches of different sizes: empty rows
    grown = [
        {
            k: np.pad(v, [(0, 0), (0, widest - v.shape[1]), (0, 0)]) if v.ndim == 3 else v
            for k, v in part.items()
        }
        for part in parts
    ]
    return {k: np.concatenate([part[k] for part in grown]) for k in grown[0]}


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, axis_type: Any = "auto") -> Mesh:
    spec = MeshSpec(data=data, fsdp=fsdp, tensor=tensor, expert=expert, axis_type=axis_type)
    return make_mesh(spec, jax.devices()[: data * fsdp * tensor * expert])


def fresh_state(task, on: Mesh, optimizer: OptimizerSpec = PLAIN, **options) -> TrainState:
    shardings = param_shardings(param_specs(task.cfg), on)
    weights = options.pop("params", None) or params(task.cfg)
    return create_state(weights, make_optimizer(optimizer), mesh=on, shardings=shardings, **options)


def make_step(task, state: TrainState, batch: dict, on: Mesh, optimizer: OptimizerSpec = PLAIN):
    return make_train_step(
        task,
        make_optimizer(optimizer),
        mesh=on,
        state_shardings=state_shardings(state),
        batch_shardings=batch_shardings(to_device(batch, on), on),
    )


def update(
    task, batch: dict, on: Mesh | None = None, params: dict | None = None, **numbers: float
) -> tuple[TrainState, dict]:
    """One plain update from the fixed weights, or from `params`: (state, metrics)."""
    on = on or mesh()
    state = fresh_state(task, on, params=params)
    hyper = (
        optimizer_hyper(PLAIN) | {"clip_norm": np.inf, "learning_rate": 0.1} | dict(task.numbers) | numbers
    )
    hyper = {k: np.float32(v) for k, v in hyper.items()}
    state, metrics = make_step(task, state, batch, on)(state, to_device(batch, on), hyper)
    return state, {k: v for k, v in metrics.items() if k != "outputs"}


def assert_same_update(a: tuple[TrainState, dict], b: tuple[TrainState, dict], rtol: float = 1e-5) -> None:
    """Gradients (the momentum buffers) leaf by leaf, new parameters and metrics, relative to each leaf's size."""

    def close(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-12)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: relative difference {error:.2e}"

    jax.tree_util.tree_map_with_path(close, a[0].opt_state[1], b[0].opt_state[1])
    jax.tree_util.tree_map_with_path(close, a[0].params, b[0].params)
    for name, value in a[1].items():
        np.testing.assert_allclose(value, b[1][name], rtol=rtol, atol=1e-5, err_msg=name)


SFT = SftSpec(steps=1)
DPO = DpoSpec(steps=1, sft_weight=0.1)
F32 = {"dtype": "float32", "remat": "none", "chunk": 32}

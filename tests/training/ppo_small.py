"""A tiny policy with its value and reward models, and made-up rollouts, for the tests of PPO."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from laif_jax.config.rl import PpoSpec
from laif_jax.config.schema import LoraSpec, MeshSpec, OptimizerSpec, SamplingSpec, ScratchSpec
from laif_jax.models.config import ModelConfig, scratch
from laif_jax.models.decoder import init_params
from laif_jax.models.lora import add_lora
from laif_jax.parallel import make_mesh
from laif_jax.records import Completion, Prompt
from laif_jax.rollout.placement import using
from laif_jax.rollout.ppo import Rollout, ScorerConfig, join
from laif_jax.training.optim import make_optimizer
from laif_jax.training.ppo import make_update
from laif_jax.training.ppo_loop import PpoTask
from laif_jax.training.ppo_models import PpoModels, Scorer, build_models
from laif_jax.training.ppo_plan import Numbers, make_layout, update_config, update_order
from laif_jax.training.ppo_roll import PpoPrompt
from laif_jax.training.state import TrainState, state_shardings

VOCAB, EOS, WIDTH, PLACES, ROWS = 19, 1, 8, 5, 8
LORA = LoraSpec(rank=2, alpha=4.0, targets=("q", "v", "down"))
# RMSprop with decay 1 and eps 1 divides by 1, so that an update is the clipped gradient times the rate.
PLAIN = OptimizerSpec(name="rmsprop", decay=1.0, eps=1.0, learning_rate=0.1, clip_norm=None)


def spec(**changes) -> PpoSpec:
    """PPO on 8 sequences in 2 minibatches, one epoch, by plain gradient descent."""
    tree = {
        "optimizer": PLAIN.model_dump(exclude_unset=True),
        "batch_size": ROWS,
        "epochs": 1,
        "minibatches": 2,
        "sampling": SamplingSpec(max_new_tokens=PLACES).model_dump(exclude_unset=True),
        "value_init": "policy",
        "whiten_advantages": True,
        "entropy_coef": 0.01,
    } | changes
    unused = PpoSpec.model_construct(**PpoSpec.model_construct().model_copy(update=tree).__dict__).unused()
    return PpoSpec.model_validate({name: value for name, value in tree.items() if name not in unused})


def config(lora: LoraSpec | None = None) -> ModelConfig:
    sizes = ScratchSpec(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_position=32, tie_embeddings=False
    )
    return scratch(sizes, VOCAB, eos_ids=(EOS,), pad_id=0, lora=lora)


@functools.cache
def params(lora: LoraSpec | None = None, seed: int = 0) -> dict:
    made = init_params(config(), jax.random.key(seed))
    made = {**made, "lm_head": {"kernel": made["lm_head"]["kernel"] * 0.5}}
    if lora is not None:
        made = add_lora(made, config(lora), jax.random.key(seed))
    return made


@functools.cache
def scorer(seed: int = 7, **options) -> Scorer:
    cfg = dataclasses.replace(config(), head="score")
    return Scorer(ScorerConfig(cfg, **options), init_params(cfg, jax.random.key(seed)))


def mesh(devices: int = 1) -> Mesh:
    return make_mesh(MeshSpec(), jax.devices()[:devices])


def models(options: PpoSpec, *, devices: int = 1, lora: LoraSpec | None = None, **more) -> PpoModels:
    return build_models(
        options, config(lora), params(lora), mesh=mesh(devices), key=jax.random.key(1), **more
    )


# ---- the update alone ------------------------------------------------------------------------------------------


def rollout(rows: int = ROWS, *, padded: int = ROWS, places: int = PLACES, states: bool = False) -> Rollout:
    """Made-up experience of `rows` responses of 1 .. 5 tokens; rows of padding and more places change nothing."""
    rng = np.random.default_rng(0)
    lengths, counts = rng.integers(2, WIDTH + 1, rows), rng.integers(1, PLACES + 1, rows)
    prompts, drawn = rng.integers(2, VOCAB, (rows, WIDTH)), rng.integers(2, VOCAB, (rows, PLACES))
    numbers = rng.normal(size=(4, rows, PLACES))
    ended = rng.integers(0, 2, rows).astype(bool)
    hidden = rng.normal(size=(rows, PLACES, 16))

    def tokens(x: np.ndarray, fill=0) -> np.ndarray:
        mask = np.arange(PLACES) < counts[:, None]
        x = np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, fill)
        return np.pad(x, [(0, padded - rows), (0, places - PLACES), *[(0, 0)] * (x.ndim - 2)])

    def whole(x: np.ndarray, fill=0) -> np.ndarray:
        return np.pad(x, [(0, padded - rows)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)

    responses, counts_, lengths_ = tokens(drawn), whole(counts), whole(lengths, 1)
    asked = whole(np.where(np.arange(WIDTH) < lengths[:, None], prompts, 0))
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    return Rollout(
        tokens=join(i32(asked), i32(lengths_), i32(responses), i32(counts_)),
        lengths=i32(lengths_),
        responses=i32(responses),
        counts=i32(counts_),
        ended=jnp.asarray(whole(ended)),
        sampled_logps=f32(tokens(numbers[0] * 0.1 - 2.9)),
        logps=f32(tokens(numbers[0] * 0.1 - 2.9)),
        ref_logps=f32(tokens(numbers[1] * 0.1 - 2.9)),
        values=f32(tokens(numbers[2] * 0.3)),
        full_kl=f32(tokens(np.abs(numbers[3]) * 0.1)),
        ref_states=f32(tokens(hidden)) if states else None,
        scores={},
    )


SCORES = np.asarray([0.7, -0.4, 1.3, 0.2, -1.1, 0.9, 0.05, -0.6], np.float32)


def update(
    options: PpoSpec,
    *,
    devices: int = 1,
    lora: LoraSpec | None = None,
    experience: Rollout | None = None,
    scores: np.ndarray = SCORES,
    weight: np.ndarray | None = None,
    made: PpoModels | None = None,
) -> tuple[TrainState, dict]:
    """One update call from fixed weights: (state, metrics on the host)."""
    made = made or models(options, devices=devices, lora=lora)
    layout = make_layout(options, made.mesh, WIDTH, PLACES)
    full = options.kl.estimator == "full" and options.kl.place == "loss"
    experience = experience or rollout(padded=layout.padded, states=full)
    run = make_update(
        update_config(options, made, dtype="float32", remat="none", chunk=32),
        make_optimizer(options.optimizer),
        made.mesh,
        state_shardings(made.state),
    )
    padding = experience.counts.shape[0] - ROWS
    weight = np.ones(ROWS, np.float32) if weight is None else weight
    weight = np.pad(weight, (0, padding))
    order = update_order(options, layout, 0, 0)
    hyper = Numbers(options, {"score": 1.0}).hyper(0, options.kl.coef)
    with using(made.mesh):
        state, metrics = run(
            made.state,
            made.reference_head() if full else None,
            experience,
            {"score": np.pad(scores, (0, padding))},
            weight,
            order,
            hyper,
        )
    return state, jax.device_get(metrics)


def assert_same(a: tuple[TrainState, dict], b: tuple[TrainState, dict], rtol: float = 2e-5) -> None:
    """The trained parameters' changes, leaf by leaf relative to the leaf's change, and the metrics."""

    def close(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-9)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: relative difference {error:.2e}"

    jax.tree_util.tree_map_with_path(close, a[0].trainable, b[0].trainable)
    for name, value in a[1].items():
        if np.ndim(value) == 0:
            np.testing.assert_allclose(value, b[1][name], rtol=1e-4, atol=2e-5, err_msg=name)


# ---- the loop --------------------------------------------------------------------------------------------------


def count_of(token: int):
    """A host reward: the share of `token` (as decoded, "t7 ") in a response."""

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]):
        del prompts
        words = [c.text.split() for c in completions]
        scores = [sum(w == f"t{token}" for w in row) / PLACES for row in words]
        return np.asarray(scores, np.float32), np.ones(len(words), bool)

    return reward


def decode(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def prompts(count: int, seed: int = 0) -> list[PpoPrompt]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(2, VOCAB, rng.integers(2, WIDTH + 1)).tolist() for _ in range(count)]
    return [PpoPrompt(Prompt.from_text(decode(row)), row) for row in rows]


def task(**changes) -> PpoTask:
    made = PpoTask(
        prompts=prompts(20),
        held_out=prompts(6, seed=1),
        eos_ids=(EOS,),
        decode=decode,
        weights={"sevens": 1.0},
        rewards={"sevens": count_of(7)},
        new_tokens=PLACES,
        chunk=32,
    )
    return dataclasses.replace(made, **changes)

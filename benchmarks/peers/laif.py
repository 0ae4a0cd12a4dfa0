"""This package as a contender: its own steps, batches and engine, at the settings that suit the work."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from serve import Block, serve

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import DpoSpec, MeshSpec, OptimizerSpec, SamplingSpec, SftSpec
from laif_jax.data.chat import Encoded, EncodedPair
from laif_jax.data.pipeline import preference_batches, sft_batches
from laif_jax.models.arch import ModelConfig
from laif_jax.models.config import from_hf
from laif_jax.models.decoder import init_params
from laif_jax.models.specs import param_specs
from laif_jax.parallel import batch_shardings, make_mesh
from laif_jax.parallel.rules import param_shardings
from laif_jax.rollout.engine import Engine, Row
from laif_jax.rollout.slots import generate_rows
from laif_jax.training.feed import to_device
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.reward_task import reward_task
from laif_jax.training.state import create_state, state_shardings
from laif_jax.training.step import enable_compilation_cache, make_train_step
from laif_jax.training.tasks import preference_task, sft_task

CACHED = 2**24  # bytes of logits
OPTIMIZER = OptimizerSpec(name="adamw", learning_rate=1e-6, clip_norm=1.0)


def build(job: dict[str, Any]) -> Block:
    enable_compilation_cache(job["cache"])
    mesh = make_mesh(MeshSpec())
    cfg = config(job["shape"], job["sequence"])
    if job["task"] == "reward":
        cfg = ModelConfig(**{**vars(cfg), "head": "score"})
    with open(job["work"]) as file:
        rows = json.load(file)
    if job["task"] == "generate":
        params = init_params(
            cfg, jax.random.key(0), jnp.dtype(job["dtype"]), param_shardings(param_specs(cfg), mesh)
        )
        return generation(cfg, params, rows, job)
    return training(cfg, rows, job, mesh)


def config(shape: dict[str, Any], length: int) -> ModelConfig:
    """The shape as a Llama."""
    return from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape["vocab"],
            "hidden_size": shape["hidden"],
            "intermediate_size": shape["mlp"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv_heads"],
            "head_dim": shape["head_dim"],
            "max_position_embeddings": max(2048, length),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": shape["tied"],
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )


# ---- training --------------------------------------------------------------------------------------------------


def encoded(prompt: list[int], answer: list[int], whole: bool) -> Encoded:
    """`whole`: the prompt is trained on as well, as by a peer's plain language-model loss."""
    mask = [int(whole)] * len(prompt) + [1] * len(answer)
    return Encoded(prompt + answer, [0, *mask[1:]], len(prompt))


def make_batches(rows: Any, job: dict[str, Any]) -> Any:
    """One pass over the work, again and again. Rows of real lengths are packed: batches of the peers' shape, of which
    there are fewer."""
    packed = job["lengths"] == "real"
    options = {
        "max_length": job["sequence"],
        "pad_id": 0,
        "packing": packed,
        "epochs": 1,
        "shuffle": False,
    }
    if job["task"] == "sft":
        dialogues = [encoded(row["prompt"], row["completion"], True) for row in rows]
        return sft_batches(dialogues, batch_size=job["batch"], **options)
    pairs = [
        EncodedPair(
            encoded(row["prompt"], row["chosen"], False), encoded(row["prompt"], row["rejected"], False)
        )
        for row in rows
    ]
    size = job["batch"] * (2 if packed else 1)  # rows, of which a pair has two, or pairs
    return preference_batches(pairs, batch_size=size, share_prompts=packed, **options)


def model_options(job: dict[str, Any]) -> dict[str, Any]:
    """What suits the device. Fastest on a CPU is to keep only the products with weights, since what the others make is
    read again from memory, and to take as many tokens at a time as have logits that fit into its cache."""
    if jax.default_backend() != "cpu":
        return {"dtype": job["dtype"], "remat": job["remat"]}
    remat = "dots" if job["remat"] == "none" else job["remat"]
    return {"dtype": job["dtype"], "remat": remat, "chunk": CACHED // (4 * job["shape"]["vocab"])}


def training(cfg: ModelConfig, rows: Any, job: dict[str, Any], mesh: Any) -> Block:
    batches = make_batches(rows, job)
    options = model_options(job)
    segments = batches.layout.max_segments
    if job["task"] == "sft":
        task = sft_task(cfg, SftSpec(epochs=1, optimizer=OPTIMIZER), **options)
    elif job["task"] == "dpo":
        task = preference_task(cfg, DpoSpec(epochs=1, optimizer=OPTIMIZER), max_segments=segments, **options)
    else:
        task = reward_task(cfg, RewardSpec(epochs=1, optimizer=OPTIMIZER), max_segments=segments, **options)
    optimizer = make_optimizer(OPTIMIZER)
    shardings = param_shardings(param_specs(cfg), mesh)
    state = create_state(
        init_params(cfg, jax.random.key(0), jnp.float32, shardings),
        optimizer,
        mesh=mesh,
        shardings=shardings,
        donate=True,
    )
    numbers = optimizer_hyper(OPTIMIZER) | dict(task.numbers)
    numbers["learning_rate"] = OPTIMIZER.learning_rate
    hyper = {name: np.float32(value) for name, value in numbers.items()}
    first = to_device(batches.at(0), mesh)
    step = make_train_step(
        task,
        optimizer,
        mesh=mesh,
        state_shardings=state_shardings(state),
        batch_shardings=batch_shardings(first, mesh),
    )

    def block(passes: int) -> None:
        nonlocal state
        count = batches.total_steps * passes if passes else 1
        metrics: dict[str, Any] = {}
        for index in range(count):
            batch = to_device(batches.at(index % batches.total_steps), mesh)
            state, metrics = step(state, batch, hyper)
        jax.block_until_ready(state)
        if not (math.isfinite(float(metrics["loss"])) and float(metrics["healthy"])):
            raise RuntimeError(f"the step went wrong: {metrics}")

    return block


# ---- generation ------------------------------------------------------------------------------------------------


def generation(cfg: ModelConfig, params: Any, rows: Any, job: dict[str, Any]) -> Block:
    engine = Engine(params, cfg, dtype=jnp.dtype(job["dtype"]), eos_ids=())
    del params
    spec = SamplingSpec(temperature=0.7, top_p=1.0, max_new_tokens=job["new"], batch_size=job["batch"])

    def request(index: int, row: Any) -> Row:
        key = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(0), index)))
        return Row(row["prompt"], key, row["new"], temperature=spec.temperature)

    requests = [request(index, row) for index, row in enumerate(rows)]

    def block(passes: int) -> None:
        for _ in range(max(1, passes)):
            some = requests if passes > 0 else requests[: job["batch"]]
            outputs = generate_rows(engine, some, slots=job["batch"], capacity=job["new"])
            drawn = [len(output.drawn or output.tokens) for output in outputs]
            if drawn != [row.limit for row in some]:
                raise RuntimeError(f"drew {drawn}")

    return block


def peak_bytes() -> Callable[[], int] | None:
    """An accelerator's peak; a CPU has none of its own."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    return (lambda: int(device.memory_stats()["peak_bytes_in_use"])) if stats else None


if __name__ == "__main__":
    serve(build, peak_bytes())

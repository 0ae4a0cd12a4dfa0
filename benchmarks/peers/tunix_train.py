"""google-tunix as a contender: its own trainers (SFT, DPO) and sampler, on the same tokens, padded to one length."""

import json
import os
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from serve import Block, Inverted, serve
from tunix.models.llama3 import model as llama

ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def make_model(job: dict[str, Any]) -> Any:
    """Random weights; its Llama computes in the dtype of its weights, so bfloat16 is that of the weights too."""
    shape = job["shape"]
    config = llama.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab"],
        embed_dim=shape["hidden"],
        hidden_dim=shape["mlp"],
        num_heads=shape["heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["kv_heads"],
        norm_eps=1e-5,
        rope_theta=10000,
        weight_tying=shape["tied"],
        remat_config=llama.RematConfig.NONE if job["remat"] == "none" else llama.RematConfig.BLOCK,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    dtype = jnp.dtype(job["dtype"])
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model


def build(job: dict[str, Any]) -> Block:
    jax.config.update("jax_compilation_cache_dir", job["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with open(job["work"]) as file:
        rows = json.load(file)
    if job["task"] == "generate":
        return generation(rows, job)
    steps = len(rows) // job["batch"]
    run = Inverted(lambda gate: train(rows, job, gate))
    return lambda passes: run(passes * steps or 1)


def mesh() -> Any:
    return jax.make_mesh(
        (jax.device_count(), 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def padded(lists: Any, width: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both int32 [rows, width]."""
    ids, mask = (np.zeros((len(lists), width), np.int32) for _ in range(2))
    for row, tokens in enumerate(lists):
        part = slice(width - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, part], mask[row, part] = tokens, 1
    return ids, mask


def train(rows: Any, job: dict[str, Any], gate: Any) -> None:
    from tunix.sft import peft_trainer
    from tunix.sft.dpo import dpo_trainer

    settings = {"eval_every_n_steps": 10**9, "max_steps": 10**6}
    with mesh():
        model = make_model(job)
        if job["task"] == "sft":
            trainer = peft_trainer.PeftTrainer(model, ADAM, peft_trainer.TrainingConfig(**settings))

            def inputs(x: Any) -> dict[str, Any]:
                batch, length = x.input_tokens.shape
                causal = jnp.tril(jnp.ones((length, length), bool))
                return {
                    "input_tokens": x.input_tokens,
                    "input_mask": x.input_mask,
                    "positions": jnp.broadcast_to(jnp.arange(length), (batch, length)),
                    "attention_mask": jnp.broadcast_to(causal, (batch, length, length)),
                }

            trainer = trainer.with_gen_model_input_fn(inputs)
        else:
            copy = make_model(job)
            trainer = dpo_trainer.DPOTrainer(
                model, copy, ADAM, dpo_trainer.DPOTrainingConfig(beta=0.1, **settings)
            )

        def batch(some: Any) -> Any:
            if job["task"] == "sft":
                ids, mask = padded([row["prompt"] + row["completion"] for row in some], job["sequence"])
                return peft_trainer.TrainingInput(input_tokens=ids, input_mask=mask.astype(bool))
            prompts = max(len(row["prompt"]) for row in rows)
            answers = max(len(row[side]) for row in rows for side in ("chosen", "rejected"))
            parts = [padded([row["prompt"] for row in some], prompts, left=True)]
            parts += [padded([row[side] for row in some], answers) for side in ("chosen", "rejected")]
            names = ("prompt", "chosen", "rejected")
            arrays = {f"{n}_{k}": a for n, part in zip(names, parts) for k, a in zip(("ids", "mask"), part)}
            return dpo_trainer.TrainingInput(**arrays)

        def feed() -> Any:
            index = 0
            while True:
                some = rows[index : index + job["batch"]]
                jax.block_until_ready(nnx.state(model))
                gate()
                yield batch(some)
                index = (index + job["batch"]) % len(rows)

        trainer.train(feed())


class _Words:
    """The sampler wants a tokenizer: a word is the number of a token."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0


def generation(rows: Any, job: dict[str, Any]) -> Block:
    from tunix.generate import sampler

    shape = job["shape"]
    prompt = len(rows[0]["prompt"])
    with mesh():
        model = make_model(job)
        cache = sampler.CacheConfig(
            cache_size=prompt + job["new"] + 8,
            num_layers=shape["layers"],
            num_kv_heads=shape["kv_heads"],
            head_dim=shape["head_dim"],
        )
        draw = sampler.Sampler(model, _Words(), cache)

    def some(start: int) -> None:
        batch = rows[start : start + job["batch"]]
        with mesh():
            draw(
                [" ".join(map(str, row["prompt"][1:])) for row in batch],  # it puts a token in front itself
                max_generation_steps=max(row["new"] for row in batch),
                max_prompt_length=prompt,
                temperature=0.7,
                top_p=1.0,
                eos_tokens=[shape["vocab"] - 1],
                seed=start,
            )

    def block(passes: int) -> None:
        for _ in range(max(1, passes)):
            for start in range(0, len(rows) if passes else job["batch"], job["batch"]):
                some(start)

    return block


def peak_bytes() -> Any:
    device = jax.devices()[0]
    return (lambda: int(device.memory_stats()["peak_bytes_in_use"])) if device.memory_stats() else None


if __name__ == "__main__":
    serve(build, peak_bytes())

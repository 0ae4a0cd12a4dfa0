"""A regression that needs no model: enough to test steps, loops and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.objectives import LossOut

WIDTH = 6


def mesh(devices: int = 1) -> Mesh:
    """`devices` devices along fsdp."""
    grid = np.asarray(jax.devices()[:devices]).reshape(1, devices, 1)
    return Mesh(grid, ("data", "fsdp", "tensor"))


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, 8)), jnp.float32)},
        "b": {
            "kernel": jnp.asarray(rng.normal(size=(8, 1)), jnp.float32),
            "bias": jnp.zeros((1,), jnp.float32),
        },
    }


def batch(seed: int = 0, rows: int = 8, micro: int = 1, padding: int = 0) -> dict[str, np.ndarray]:
    """[A, R, ...] with `padding` rows of weight 0 at the end."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    y = x.sum(-1).astype(np.float32)
    weight = rng.integers(1, 4, size=rows).astype(np.float32)
    x = np.concatenate([x, np.full((padding, WIDTH), 7.0, np.float32)])
    y = np.concatenate([y, np.full(padding, 9.0, np.float32)])
    weight = np.concatenate([weight, np.zeros(padding, np.float32)])
    return {k: v.reshape(micro, -1, *v.shape[1:]) for k, v in {"x": x, "y": y, "weight": weight}.items()}


def loss_fn(p: dict, b: dict, hyper: dict) -> LossOut:
    """Weighted squared error; the error of prediction is also a metric with its own weight."""
    hidden = jnp.tanh(b["x"] @ p["a"]["kernel"].astype(jnp.float32))
    error = (hidden @ p["b"]["kernel"] + p["b"]["bias"])[:, 0] - b["y"]
    scale = hyper.get("loss_scale", 1.0)
    total = scale * jnp.sum(b["weight"] * error**2)
    used = (b["weight"] > 0).astype(jnp.float32)
    absolute = jax.lax.stop_gradient((jnp.sum(used * jnp.abs(error)), jnp.sum(used)))
    return LossOut(total, jnp.sum(b["weight"]), {"absolute_error": absolute})


def batch_shardings(b: dict, m: Mesh) -> dict[str, NamedSharding]:
    return {name: NamedSharding(m, PartitionSpec(None, ("data", "fsdp"))) for name in b}


HYPER = {"learning_rate": np.float32(0.01), "weight_decay": np.float32(0.0), "clip_norm": np.float32(1.0)}


class Batches:
    """A checkpointable iterator over `total` batches, each a function of its step; `spoil` maps a step to a change."""

    def __init__(self, total: int, rows: int = 8, spoil: dict | None = None):
        self.next_step = 0
        self.total_steps = total
        self.rows = rows
        self.spoil = spoil or {}

    def __iter__(self):
        return self

    def __next__(self):
        if self.next_step == self.total_steps:
            raise StopIteration
        self.next_step += 1
        made = batch(self.next_step, self.rows)
        made["example_index"] = np.arange(self.rows)[None] + 100 * self.next_step
        if self.next_step in self.spoil:
            self.spoil[self.next_step](made)
        return made

    def get_state(self):
        return {"next": self.next_step}

    def set_state(self, state):
        self.next_step = state["next"]

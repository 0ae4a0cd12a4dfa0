"""Optimisers and schedules. What a sweep changes (learning rate, weight decay, clipping) is traced."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laif_jax.config.schema import OptimizerSpec


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a spec; equal specs (apart from traced numbers) give the very same object, so steps are reused.

    Its `update` takes the keyword arguments `learning_rate` and `weight_decay` (traced scalars) and returns what is to
    be added to the parameters.

      adamw      decoupled weight decay (Loshchilov & Hutter 2019), as torch: p -= lr (m / (sqrt(v) + eps) + wd p)
      rmsprop    as torch, which the DPO and LAIF papers used:
                 v = decay v + (1 - decay) g^2; p -= lr g / (sqrt(v) + eps)
      adafactor  factored second moments, update clipping and relative step size (Shazeer & Stern 2018); the layers of a
                 stacked leaf share the block statistics
      lion       sign of interpolated momentum (Chen et al. 2023)

    Weight decay acts on matrices, not on biases and norm scales.
    """
    return _optimizer(spec.name, spec.b1, spec.b2, spec.eps, spec.decay, spec.momentum)


def optimizer_hyper(spec: OptimizerSpec) -> dict[str, float]:
    """The traced numbers of an optimiser but the learning rate: `weight_decay`, `clip_norm` (inf: no clipping)."""
    return {
        "weight_decay": spec.weight_decay,
        "clip_norm": math.inf if spec.clip_norm is None else spec.clip_norm,
    }


@functools.lru_cache(maxsize=64)
def _optimizer(
    name: str, b1: float, b2: float, eps: float, decay: float, momentum: float
) -> optax.GradientTransformationExtraArgs:
    parts: list[optax.GradientTransformation]
    if name == "adamw":
        parts = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    elif name == "rmsprop":
        parts = [optax.scale_by_rms(decay=decay, eps=eps, initial_scale=0.0, eps_in_sqrt=False)]
        if momentum > 0:
            parts.append(optax.trace(decay=momentum))
    elif name == "adafactor":
        parts = [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ]
    elif name == "lion":
        parts = [optax.scale_by_lion(b1=b1, b2=b2)]
    else:
        raise ValueError(f"unknown optimiser `{name}`; use adamw, rmsprop, adafactor or lion")
    return optax.with_extra_args_support(optax.chain(*parts, _descend()))


def _descend() -> optax.GradientTransformationExtraArgs:
    """u -> -learning_rate (u + weight_decay p), with both numbers passed to `update`."""

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **hyper: Any) -> tuple[Any, Any]:
        learning_rate, weight_decay = hyper["learning_rate"], hyper.get("weight_decay", 0.0)

        def one(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            return -learning_rate * (u + weight_decay * p if is_decayed(path) else u)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_decayed(path: tuple[Any, ...]) -> bool:
    """Whether weight decay acts on the leaf at a tree path: not on norm scales and biases."""
    return not path or getattr(path[-1], "key", None) not in ("scale", "bias")


def schedule(spec: OptimizerSpec, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate before update `step` (counted from 0), the formulas of `transformers.get_scheduler`.

    Warm-up rises linearly from 0 over `spec.warmup` steps; "linear" and "cosine" then fall to 0 at `total_steps`.
    The function takes a Python or NumPy integer (and computes on the host) or a traced integer.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {total_steps}")
    if spec.warmup >= total_steps and spec.warmup > 0:
        raise ValueError(
            f"`optimizer.warmup` {spec.warmup} leaves no steps: the run has {total_steps}. Shorten the warm-up."
        )

    def learning_rate(step: Any) -> Any:
        xp = np if isinstance(step, int | np.integer) else jnp
        warm = step / max(1, spec.warmup)
        progress = xp.clip((step - spec.warmup) / max(1, total_steps - spec.warmup), 0.0, 1.0)
        if spec.schedule == "linear":
            after = 1.0 - progress
        elif spec.schedule == "cosine":
            after = 0.5 * (1.0 + xp.cos(math.pi * progress))
        else:
            after = xp.ones_like(progress)
        return spec.learning_rate * xp.where(step < spec.warmup, warm, after)

    return learning_rate


def hyper_arrays(hyper: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Float32 scalars of a dict of numbers, ready to be arguments of a jitted step."""
    return {name: np.asarray(value, np.float32) for name, value in hyper.items()}

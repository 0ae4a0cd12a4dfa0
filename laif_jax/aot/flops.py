"""Work of a traced function, with the trips of its loops, and the work that the model itself needs.

XLA's cost analysis counts a loop's body once, and cannot look into kernels; a jaxpr has the length of every scan.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from laif_jax.models.arch import ModelConfig


def flops_per_chip(jaxpr: Any, chips: int, *, unknown_trips: int = 1) -> float:
    """FLOPs of the matrix products of a jaxpr on each of `chips` chips that share them evenly, recomputation included.

    Args:
      jaxpr: `jitted.trace(...).jaxpr`. unknown_trips: of loops that end on data (a decode loop: tokens drawn).
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr), float(chips), unknown_trips)


def _count(jaxpr: Any, share: float, trips: int) -> float:
    """`share`: over how many chips arrays of this jaxpr are spread; 1 where shapes are those of one chip."""
    return sum(_equation(equation, share, trips) for equation in jaxpr.eqns)


def _equation(equation: Any, share: float, trips: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted) / share
    if name.startswith("ragged_dot"):
        rows, depth = equation.invars[0].aval.shape[-2:]
        return 2.0 * rows * depth * equation.outvars[0].aval.shape[-1] / share
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, share, trips)
    if name == "while":
        return trips * _count(params["body_jaxpr"].jaxpr, share, trips)
    if name == "cond":
        return max(_count(branch.jaxpr, share, trips) for branch in params["branches"])
    if name == "pallas_call":
        return _kernel(params, share, trips)
    if name == "shard_map":
        # Shapes inside are those of one chip along the manual axes.
        manual_axes = params.get("newly_manual_axes", params.get("manual_axes", ()))  # by version of JAX
        manual = math.prod(params["mesh"].shape[axis] for axis in manual_axes)
        return _count(_open(params["jaxpr"]), max(share / manual, 1.0), trips)
    inner = [value for value in params.values() if hasattr(_open(value), "eqns")]
    return sum(_count(_open(value), share, trips) for value in inner[:1])


def _open(value: Any) -> Any:
    return getattr(value, "jaxpr", value)


def _kernel(params: Mapping[str, Any], share: float, trips: int) -> float:
    """A kernel's program at every point of its grid. Of causal attention, blocks above the diagonal are skipped."""
    grid = params["grid_mapping"].grid
    inner = _count(_open(params["jaxpr"]), 1.0, trips) * math.prod(int(n) for n in grid)
    blocks = max(int(grid[-1]), 1)
    causal = "splash" in str(params.get("name_and_src_info", params.get("name", "")))
    return inner * ((blocks + 1) / (2 * blocks) if causal else 1.0) / share


# ---- the model's own ---------------------------------------------------------------------------------------------


def model_flops(
    trainable: Any, frozen: Any, cfg: ModelConfig, tokens: float, length: float, *, forward_only: bool = False
) -> float:
    """What `tokens` tokens in rows of `length` need, over all chips: 6 FLOPs per trained parameter that multiplies a
    token, 4 per frozen one, 2 forward alone; and 12 (or 4) H N T / 2 per layer for causal attention (Chowdhery et al.
    2022, appendix B). Recomputation is not in it. Of experts, those that a token meets count.
    """
    per_token = 0.0
    for tree, factor in ((trainable, 6.0), (frozen, 4.0)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names = [str(getattr(entry, "key", entry)) for entry in path]
            if "embedding" in names and not cfg.tie_embeddings:
                continue
            size = math.prod(leaf.shape)
            if getattr(cfg, "num_experts", 0) and "mlp" in names and "router" not in names:
                size *= cfg.experts_per_token / cfg.num_experts
            per_token += (2.0 if forward_only else factor) * size
    seen = sum(min(window or length, length) for window in cfg.windows)
    attention = (2.0 if forward_only else 6.0) * cfg.num_heads * cfg.head_dim * seen
    return tokens * (per_token + attention)

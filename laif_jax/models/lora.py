"""Low-rank adapters (Hu et al. 2021): W + (alpha / rank) A B on the linear layers that the spec names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from laif_jax.models.arch import ModelConfig
from laif_jax.models.decoder import Params, init_tree
from laif_jax.models.specs import param_specs

Array = jax.Array


def _map_linears(
    tree: Params, change: Callable[[dict[str, Any], tuple[str, ...]], dict[str, Any]]
) -> dict[str, Any]:
    """Applies `change(linear, path)` to every dict that holds a kernel."""

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, dict):
            return node
        if "kernel" in node:
            return change(dict(node), path)
        return {name: walk(child, path + (name,)) for name, child in node.items()}

    return walk(dict(tree), ())


def add_lora(params: Params, cfg: ModelConfig, key: Array, shardings: Any | None = None) -> dict[str, Any]:
    """Adds the adapters that `cfg.lora` asks for. B starts at zero, so the model computes what it did before.

    Args:
      params: of the model without adapters; not copied. shardings: tree for the model with adapters, or None.

    Raises:
      ValueError: `cfg.lora` is None.
    """
    if cfg.lora is None:
        raise ValueError(
            "add_lora: the model's configuration has no `lora`; give it one (dataclasses.replace)"
        )
    new = init_tree(_adapters(param_specs(cfg)), key, shardings=_adapters(shardings) if shardings else None)

    def change(linear: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        adapter: Any = new
        for name in path:
            adapter = adapter.get(name, {})
        return linear | adapter

    return _map_linears(params, change)


def _adapters(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tree that belongs to adapters."""
    part = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            if inner := _adapters(child):
                part[name] = inner
        elif name.startswith("lora_"):
            part[name] = child
    return part


def merge_lora(params: Params, cfg: ModelConfig, *, dtype: Any = None) -> dict[str, Any]:
    """Folds the adapters into the kernels, in float32: parameters of the same model without adapters.

    `dtype`: of the merged kernels; None: that of the kernels, which may be too coarse for small updates.
    """

    def change(linear: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        if "lora_a" not in linear:
            return linear
        assert cfg.lora is not None
        a, b = linear.pop("lora_a"), linear.pop("lora_b")
        # [L, in.., r] x [L, r, out..] -> [L, in.., out..]: axes of A and B meet at the rank. Experts are as layers.
        layers = a.shape[0] * (cfg.num_experts if cfg.num_experts and path[-2] == "mlp" else 1)
        rank = a.shape[-1]
        product = jnp.einsum(
            "lir,lro->lio",
            a.reshape(layers, -1, rank).astype(jnp.float32),
            b.reshape(layers, rank, -1).astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        kernel = linear["kernel"]
        update = (cfg.lora.alpha / cfg.lora.rank) * product.reshape(kernel.shape)
        linear["kernel"] = (kernel.astype(jnp.float32) + update).astype(dtype or kernel.dtype)
        return linear

    return _map_linears(params, change)


def trainable_mask(params: Params, cfg: ModelConfig) -> Any:
    """The tree of `params` with True where the optimiser may write: the adapters and the scalar head alone if there are
    adapters, else all."""

    def trainable(path: tuple[Any, ...], _: Any) -> bool:
        return cfg.lora is None or path[0].key == "score" or str(path[-1].key).startswith("lora_")

    return jax.tree_util.tree_map_with_path(trainable, params)

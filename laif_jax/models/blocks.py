"""The layers of the decoder as Linen modules. Their parameters are rows of the one table (`laif_jax.models.specs`)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from laif_jax.models import moe
from laif_jax.models.arch import ModelConfig
from laif_jax.models.attention import Visibility, attention, decode_attention
from laif_jax.models.cache import LayerCache, with_token
from laif_jax.models.dtypes import Master, in_use
from laif_jax.models.rope import rotate
from laif_jax.models.sharding import gathered
from laif_jax.models.specs import ParamSpec, block_specs
from laif_jax.parallel.rules import constrain

Array = jax.Array
Remat = Literal["none", "full", "dots"]
Kept = tuple[Array, Array] | LayerCache

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class Shared(NamedTuple):
    """What all layers of one forward pass read: cosines and sines [ropes, R, T, half], and who sees whom.

    `index` int32 [B] is the position of the new token in decoding, else None.
    """

    cosines: Array
    sines: Array
    vis: Visibility | None
    index: Array | None


def stream(x: Array) -> Array:
    """Keeps the residual stream [R, T, D] sharded by rows and, over `tensor`, by length, whatever the weights'
    shardings suggest: what is between blocks, and what remat keeps of them, is on no device twice."""
    return constrain(x, "batch", "length", "embed")


def whole_rows(x: Array, *width: str | None) -> Array:
    """Brings rows [R, T, ...] together over their length, for what mixes time or splits its width over `tensor`."""
    return constrain(x, "batch", None, *(width or [None] * (x.ndim - 2)))


# ---- modules -----------------------------------------------------------------------------------------------------


def initializer(spec: ParamSpec) -> Callable[..., Array]:
    """What a parameter of this specification starts from: `(key, shape, dtype) -> array`."""
    if spec.init == "normal":
        return nn.initializers.normal(spec.stddev)
    return nn.initializers.zeros if spec.init == "zeros" else nn.initializers.ones


class _Table(nn.Module):
    """A module whose parameters are rows of the spec table."""

    cfg: ModelConfig
    specs: Any  # nn.Module attributes are frozen, so the dict of ParamSpecs arrives as a FrozenDict
    dtype: Any

    def get(self, name: str) -> Array:
        spec = self.specs[name]
        return self.param(name, initializer(spec), spec.shape)


class Norm(_Table):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        scale = self.get("scale").astype(jnp.float32)
        if self.cfg.norm == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.cfg.norm_eps)
        x = x * (1.0 + scale if self.cfg.unit_offset else scale)
        if self.cfg.norm == "layer":
            x = x + self.get("bias").astype(jnp.float32)
        return x.astype(self.dtype)


def matmul(x: Array, kernel: Array, contract: int = 1) -> Array:
    """x [..., in...] times kernel [in..., out...], contracting `contract` axes, as one matrix product.

    The axes are merged first: XLA's CPU backend differentiates a product over several axes two to three times slower
    than the same product of two matrices.
    """
    rows, out = x.shape[: x.ndim - contract], kernel.shape[contract:]
    width = math.prod(kernel.shape[:contract])
    flat = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return flat.reshape(*rows, *out)


class Linear(_Table):
    """y = x W (+ b) (+ (alpha / rank) (x A) B), contracting the last `contract` axes of x."""

    contract: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dot(left: Array, right: Array, contract: int) -> Array:
            return matmul(left, right.astype(self.dtype), contract)

        y = dot(x, self.get("kernel"), self.contract)
        if "lora_a" in self.specs:
            assert self.cfg.lora is not None
            low = dot(x, self.get("lora_a"), self.contract)
            update = dot(low, self.get("lora_b"), 1)
            y = y + update * (self.cfg.lora.alpha / self.cfg.lora.rank)
        return y + self.get("bias").astype(self.dtype) if "bias" in self.specs else y


class Attention(_Table):
    """Self-attention with rotary positions. Returns the output and what is kept: keys and values [R, T, K, H], or, of
    one token per row, the cache with them."""

    @nn.compact
    def __call__(
        self, x: Array, window: int | Array, rope: int | Array, shared: Shared, cache: LayerCache | None
    ) -> tuple[Array, Kept]:
        cfg = self.cfg

        def part(module: type[_Table], name: str, **options: Any) -> _Table:
            return module(cfg, self.specs[name], self.dtype, name=name, **options)

        x = whole_rows(x)
        q, k, v = (part(Linear, name)(x) for name in ("q", "k", "v"))  # [R, T, N or K, H]
        q = whole_rows(q, "heads", None)
        k, v = whole_rows(k, "kv_heads", None), whole_rows(v, "kv_heads", None)
        if cfg.qk_norm:
            q, k = part(Norm, "q_norm")(q), part(Norm, "k_norm")(k)
        cosines, sines = shared.cosines[rope], shared.sines[rope]
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        options: dict[str, Any] = {"window": window, "softcap": cfg.attn_softcap, "scale": cfg.attn_scale}
        if cache is None:
            assert shared.vis is not None
            kept: Kept = k, v
            out = attention(q, k, v, shared.vis, **options)
        else:
            assert shared.index is not None
            kept = with_token(cache, k, v, shared.index)
            out = decode_attention(q, kept, shared.index, **options)
        out = whole_rows(out, "heads", None)
        return stream(part(Linear, "o", contract=2)(out)), kept


class Mlp(_Table):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def linear(name: str) -> Linear:
            return Linear(self.cfg, self.specs[name], self.dtype, name=name)

        act, x = _ACTIVATIONS[self.cfg.activation], whole_rows(x)
        up = linear("up")(x)
        hidden = act(linear("gate")(x)) * up if self.cfg.gated_mlp else act(up)
        return stream(linear("down")(whole_rows(hidden, "mlp")))


class Leaves(_Table):
    """The arrays of a linear map that is computed elsewhere, in the compute dtype."""

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return {name: self.get(name).astype(self.dtype) for name in self.specs}


class Mixture(_Table):
    """`moe.mixture`: a router, and experts that are each an `Mlp`. Returns the output and the experts' load over the
    real tokens (None in decoding, where nobody reads it)."""

    @nn.compact
    def __call__(self, x: Array, real: Array | None) -> tuple[Array, moe.RouterLoad | None]:
        leaves = {name: Leaves(self.cfg, self.specs[name], self.dtype, name=name)() for name in self.specs}
        axes = {
            name: {leaf: spec.logical_axes for leaf, spec in linear.items()}
            for name, linear in self.specs.items()
        }
        return moe.mixture(x, real, leaves, axes, self.cfg, _ACTIVATIONS[self.cfg.activation])


class Block(_Table):
    """One layer. Returns the residual stream and what it leaves behind: keys and values with `keep` (decoding), else
    None (training: nothing to stack), and the load of its experts if it has some."""

    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Array, layer: tuple[Any, Any], shared: Shared, cache: LayerCache | None = None
    ) -> tuple[Array, tuple[Kept | None, moe.RouterLoad | None]]:
        cfg = self.cfg

        def part(module: type[_Table], name: str) -> Any:
            return module(cfg, self.specs[name], self.dtype, name=name)

        window, rope = layer
        if cfg.uniform_window is not None:
            window = cfg.uniform_window
        rope = 0 if len(cfg.ropes) == 1 else rope
        attended, kept = part(Attention, "attn")(part(Norm, "attn_norm")(x), window, rope, shared, cache)
        if cfg.post_norms:
            attended = part(Norm, "post_attn_norm")(attended)
        source = x if cfg.parallel_residual else x + attended
        normed, load = part(Norm, "mlp_norm")(source), None
        if cfg.num_experts:
            out, load = part(Mixture, "mlp")(normed, None if shared.vis is None else shared.vis.segment_ids)
        else:
            out = part(Mlp, "mlp")(normed)
        if cfg.post_norms:
            out = part(Norm, "post_mlp_norm")(out)
        x = x + attended + out if cfg.parallel_residual else source + out
        return stream(x), (kept if self.keep else None, load)


def _whole_weights(specs: Any, cfg: ModelConfig, variables: Any) -> Any:
    """A layer's weights brought together over their width; experts, who have their own rule, are left as they are."""

    def one(path: Any, spec: ParamSpec, x: Any) -> Array:
        if isinstance(x, Master):  # cast where it lies, so that it travels in the compute dtype
            x = constrain(in_use(*x), *spec.logical_axes)
        own = cfg.num_experts and path[0].key == "mlp"
        return x if own else gathered(spec.logical_axes, x)

    is_spec = lambda leaf: isinstance(leaf, ParamSpec)  # noqa: E731
    return {"params": jax.tree_util.tree_map_with_path(one, specs, variables["params"], is_leaf=is_spec)}


class Layers(nn.Module):
    """All blocks: one scan over stacked weights, each layer's window and rope scanned with them. Returns the residual
    stream and the load of each layer's experts, stacked, if there are some."""

    cfg: ModelConfig
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(self, x: Array, shared: Shared) -> tuple[Array, moe.RouterLoad | None]:
        cfg = self.cfg
        # Inside what is recomputed: the whole weights of a layer are kept for no other.
        block: Any = nn.map_variables(
            Block, "params", trans_in_fn=partial(_whole_weights, block_specs(cfg), cfg)
        )
        if self.remat != "none":
            policy = None
            if self.remat == "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            # A scan's body is compiled once: there is no common subexpression to guard against.
            block = nn.remat(block, prevent_cse=False, policy=policy)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.num_layers,
        )
        per_layer = jnp.asarray(cfg.windows, jnp.int32), jnp.asarray(cfg.rope_index, jnp.int32)
        x, (_, load) = scanned(cfg, block_specs(cfg), self.dtype, name="layers")(x, per_layer, shared)
        return x, load

"""The decoder: one network by configuration, as pure functions over a plain nested dict of parameters.

Training runs `nn.scan` over a rematerialised block with stacked weights. Decoding runs the same block once per layer
with weights that were unstacked once (scanning stacked weights inside a decode loop would copy them every token), and
with an explicit cache. Weights are kept in their own dtype and cast to the compute dtype where they are used.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from laif_jax.models.arch import ModelConfig
from laif_jax.models.attention import Visibility, attention, decode_attention, fused_applies, visibility
from laif_jax.models.rope import rope_tables, rotate
from laif_jax.models.sharding import compiler_partitioned, spec_of
from laif_jax.models.specs import ParamSpec, Specs, block_specs, param_specs
from laif_jax.parallel.rules import constrain

Array = jax.Array
Params = Mapping[str, Any]
Remat = Literal["none", "full", "dots"]
KV = tuple[Array, Array]

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


def _rows(x: Array) -> Array:
    """Keeps the residual stream [R, T, D] sharded by rows, whatever the weights' shardings suggest."""
    return constrain(x, "batch", "length", "embed")


# ---- modules -----------------------------------------------------------------------------------------------------


def _initializer(spec: ParamSpec) -> Callable[..., Array]:
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
        return self.param(name, _initializer(spec), spec.shape)


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


def _write(slots: Array, new: Array, index: Array) -> Array:
    """Writes one token per row: slots [B, K, S, H], new [B, 1, K, H], index int32 [B]."""
    return slots.at[jnp.arange(slots.shape[0]), :, index].set(new[:, 0].astype(slots.dtype))


class Attention(_Table):
    """Self-attention with rotary positions. Returns the output and the keys and values to keep."""

    @nn.compact
    def __call__(
        self, x: Array, window: int | Array, rope: int | Array, shared: Shared, cache: KV | None
    ) -> tuple[Array, KV]:
        cfg = self.cfg

        def part(module: type[_Table], name: str, **options: Any) -> _Table:
            return module(cfg, self.specs[name], self.dtype, name=name, **options)

        q, k, v = (part(Linear, name)(x) for name in ("q", "k", "v"))  # [R, T, N or K, H]
        if cfg.qk_norm:
            q, k = part(Norm, "q_norm")(q), part(Norm, "k_norm")(k)
        cosines, sines = shared.cosines[rope], shared.sines[rope]
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        options: dict[str, Any] = {"window": window, "softcap": cfg.attn_softcap, "scale": cfg.attn_scale}
        if cache is None:
            assert shared.vis is not None
            kept = k, v
            out = attention(q, k, v, shared.vis, **options)
        else:
            assert shared.index is not None
            kept = _write(cache[0], k, shared.index), _write(cache[1], v, shared.index)
            out = decode_attention(q, *kept, shared.index, **options)
        return part(Linear, "o", contract=2)(out), kept


class Mlp(_Table):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def linear(name: str) -> Linear:
            return Linear(self.cfg, self.specs[name], self.dtype, name=name)

        act = _ACTIVATIONS[self.cfg.activation]
        up = linear("up")(x)
        return linear("down")(act(linear("gate")(x)) * up if self.cfg.gated_mlp else act(up))


class Block(_Table):
    """One layer. `keep`: return keys and values (decoding), else None (training: nothing to stack)."""

    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Array, layer: tuple[Any, Any], shared: Shared, cache: KV | None = None
    ) -> tuple[Array, KV | None]:
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
        mlp_norm, mlp = part(Norm, "mlp_norm"), part(Mlp, "mlp")
        if cfg.parallel_residual:
            return _rows(x + attended + mlp(mlp_norm(x))), kept if self.keep else None
        x = x + attended
        out = mlp(mlp_norm(x))
        if cfg.post_norms:
            out = part(Norm, "post_mlp_norm")(out)
        return _rows(x + out), kept if self.keep else None


class Layers(nn.Module):
    """All blocks: one scan over stacked weights, each layer's window and rope scanned with them."""

    cfg: ModelConfig
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(self, x: Array, shared: Shared) -> Array:
        cfg = self.cfg
        block: Any = Block
        if self.remat != "none":
            policy = None
            if self.remat == "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            # A scan's body is compiled once: there is no common subexpression to guard against.
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.num_layers,
        )
        per_layer = jnp.asarray(cfg.windows, jnp.int32), jnp.asarray(cfg.rope_index, jnp.int32)
        x, _ = scanned(cfg, block_specs(cfg), self.dtype, name="layers")(x, per_layer, shared)
        return x


# ---- pure functions ----------------------------------------------------------------------------------------------


def init_params(
    cfg: ModelConfig, key: Array, dtype: Any = jnp.float32, shardings: Any | None = None
) -> dict[str, Any]:
    """New parameters, the same for any sharding. Born sharded when a tree of shardings is given.

    Each array's key is folded from its path, so that adding a parameter changes no other.
    """
    return init_tree(param_specs(cfg), key, dtype, shardings)


def init_tree(
    specs: Specs, key: Array, dtype: Any = jnp.float32, shardings: Any | None = None
) -> dict[str, Any]:
    """New arrays for any part of a tree of specs, with the paths that they have in the whole tree."""

    def leaf(key: Array, path: tuple[Any, ...], spec: ParamSpec) -> Array:
        name = "/".join(entry.key for entry in path)
        return _initializer(spec)(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)

    def make(key: Array) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(partial(leaf, key), specs)

    return jax.jit(make, out_shardings=shardings)(key)


def _embed(params: Params, cfg: ModelConfig, tokens: Array, dtype: Any) -> Array:
    # Gathered over its width first, as every other weight is: rows then come out sharded as the tokens are.
    x = constrain(params["embed"]["embedding"], "vocab", None)[tokens].astype(dtype)
    return _rows(x * jnp.asarray(math.sqrt(cfg.hidden_size), dtype) if cfg.embed_scale else x)


def _final_norm(params: Params, cfg: ModelConfig, x: Array, dtype: Any) -> Array:
    norm = Norm(cfg, param_specs(cfg)["final_norm"], dtype)
    return norm.apply({"params": params["final_norm"]}, x)  # ty: ignore[invalid-explicit-return]


def _who_sees_whom(cfg: ModelConfig, segment_ids: Array, dtype: Any) -> Visibility:
    fused = fused_applies(segment_ids.shape[1], cfg.head_dim, cfg.attn_softcap, dtype)
    return visibility(segment_ids, cfg.uniform_window or 0, fused=fused)


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> Array:
    """The hidden states after the final norm.

    Args:
      params: the tree of `param_specs(cfg)`.
      tokens, positions, segment_ids: int32 [R, T]; segment 0 is padding, whose outputs mean nothing.
      dtype: of compute. remat: what the backward pass recomputes: "none", "full" (whole blocks), "dots" (all but
        products with weights).

    Returns:
      [R, T, D] in `dtype`.
    """

    def run(params: Params, tokens: Array, positions: Array, segment_ids: Array) -> Array:
        cosines, sines = rope_tables(cfg, positions, segment_ids)
        shared = Shared(cosines, sines, _who_sees_whom(cfg, segment_ids, dtype), None)
        x = _embed(params, cfg, tokens, dtype)
        layers = Layers(cfg, dtype, remat)
        x = layers.apply({"params": {"layers": params["layers"]}}, x, shared)
        return _final_norm(params, cfg, x, dtype)  # ty: ignore[invalid-argument-type]

    args = (params, tokens, positions, segment_ids)
    return compiler_partitioned(run, args, lambda: PartitionSpec(*spec_of(tokens), None))


def logits(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """Vocabulary logits float32 [..., V] of hidden states [..., D], multiplied in the dtype of `hidden`."""

    def run(params: Params, hidden: Array) -> Array:
        return vocab_logits(params, cfg, hidden)

    return compiler_partitioned(run, (params, hidden), lambda: PartitionSpec(*spec_of(hidden)[:-1], None))


def vocab_logits(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """`logits` for callers that already are inside a region of automatic partitioning."""
    if cfg.tie_embeddings:
        table, axis = params["embed"]["embedding"], 1
    else:
        table, axis = params["lm_head"]["kernel"], 0
    flat = hidden.reshape(-1, hidden.shape[-1])  # one matrix product, as in `matmul`
    dims = (((1,), (axis,)), ((), ()))
    out = jax.lax.dot_general(flat, table.astype(hidden.dtype), dims, preferred_element_type=jnp.float32)
    out = out.reshape(*hidden.shape[:-1], -1)
    return out if cfg.final_softcap is None else jnp.tanh(out / cfg.final_softcap) * cfg.final_softcap


# ---- decoding ----------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values per layer, each [B, K, S, H]; slot s holds position s. A pytree: the loop's carry."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]


def unstack_layers(params: Params, cfg: ModelConfig, dtype: Any | None = None) -> dict[str, Any]:
    """Parameters for decoding: "layers" becomes a tuple with one tree per layer.

    `dtype`: also cast the weights, once, to the compute dtype (norms and adapters included), so that no step does.
    """
    out = {name: tree for name, tree in params.items() if name != "layers"}
    out["layers"] = tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(cfg.num_layers)
    )
    if dtype is not None:
        out = jax.tree.map(lambda leaf: leaf.astype(dtype), out)
    return out


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    shape = (batch, cfg.num_kv_heads, length, cfg.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers)) for _ in range(2))
    return Cache(keys, values)


def _layer(
    params: Params, cfg: ModelConfig, i: int, x: Array, shared: Shared, cache: KV | None, dtype: Any
) -> tuple[Array, KV]:
    window = cfg.windows[i] if cache is not None else jnp.int32(cfg.windows[i])
    block = Block(cfg, block_specs(cfg), dtype, keep=True)
    inputs = ((window, cfg.rope_index[i]), shared, cache)
    return block.apply({"params": params["layers"][i]}, x, *inputs)  # ty: ignore[invalid-explicit-return]


def prefill(
    decode_params: Params,
    cfg: ModelConfig,
    tokens: Array,
    lengths: Array,
    cache: Cache,
    *,
    dtype: Any = jnp.float32,
    return_all: bool = False,
) -> tuple[Array, ...]:
    """Runs right-padded prompts and fills the cache.

    Args:
      decode_params: from `unstack_layers`. tokens: int32 [B, T]. lengths: int32 [B]. cache: of length >= T.

    Returns:
      (hidden [B, D] at the last real token, cache), and with `return_all` the hidden states [B, T, D] as a third.

    Raises:
      ValueError: the prompts are longer than the cache.
    """
    if tokens.shape[1] > cache.length:
        raise ValueError(
            f"prompts of {tokens.shape[1]} tokens do not fit a cache of {cache.length}; make it longer"
        )

    def run(params: Params, tokens: Array, lengths: Array, cache: Cache) -> tuple[Array, Cache, Array]:
        return _prefill(params, cfg, tokens, lengths, cache, dtype)

    def specs() -> Any:
        row = spec_of(tokens)[0]
        return PartitionSpec(row, None), jax.tree.map(spec_of, cache), PartitionSpec(row, None, None)

    last, cache, x = compiler_partitioned(run, (decode_params, tokens, lengths, cache), specs)
    return (last, cache, x) if return_all else (last, cache)


def _prefill(
    decode_params: Params, cfg: ModelConfig, tokens: Array, lengths: Array, cache: Cache, dtype: Any
) -> tuple[Array, Cache, Array]:
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    cosines, sines = rope_tables(cfg, positions, segment_ids)
    shared = Shared(cosines, sines, _who_sees_whom(cfg, segment_ids, dtype), None)
    x = _embed(decode_params, cfg, tokens, dtype)
    keys, values = [], []
    for i in range(cfg.num_layers):
        x, kept = _layer(decode_params, cfg, i, x, shared, None, dtype)
        for new, old, out in zip(kept, (cache.keys[i], cache.values[i]), (keys, values)):
            out.append(old.at[:, :, :length].set(jnp.swapaxes(new, 1, 2).astype(old.dtype)))
    x = _final_norm(decode_params, cfg, x, dtype)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return last, Cache(tuple(keys), tuple(values)), x


def decode_step(
    decode_params: Params,
    cfg: ModelConfig,
    token: Array,
    index: Array,
    cache: Cache,
    *,
    dtype: Any = jnp.float32,
) -> tuple[Array, Cache]:
    """Runs one token per row and writes its keys and values at its position.

    Args:
      token: int32 [B]. index: int32 [B], each token's position, below the cache's length.

    Returns:
      (hidden [B, D], cache).
    """

    def run(params: Params, token: Array, index: Array, cache: Cache) -> tuple[Array, Cache]:
        return _decode_step(params, cfg, token, index, cache, dtype)

    def specs() -> Any:
        return PartitionSpec(spec_of(token)[0], None), jax.tree.map(spec_of, cache)

    return compiler_partitioned(run, (decode_params, token, index, cache), specs)


def _decode_step(
    decode_params: Params, cfg: ModelConfig, token: Array, index: Array, cache: Cache, dtype: Any
) -> tuple[Array, Cache]:
    cosines, sines = rope_tables(cfg, index[:, None], None)
    shared = Shared(cosines, sines, None, index)
    x = _embed(decode_params, cfg, token[:, None], dtype)
    keys, values = [], []
    for i in range(cfg.num_layers):
        x, kept = _layer(decode_params, cfg, i, x, shared, (cache.keys[i], cache.values[i]), dtype)
        keys.append(kept[0])
        values.append(kept[1])
    return _final_norm(decode_params, cfg, x, dtype)[:, 0], Cache(tuple(keys), tuple(values))

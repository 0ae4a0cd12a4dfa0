"""The decoder: one network by configuration, as pure functions over a plain nested dict of parameters.

Training runs `nn.scan` over a rematerialised block with stacked weights. Decoding runs the same block once per layer
with weights that were unstacked once (scanning stacked weights inside a decode loop would copy them every token), and
with an explicit cache. Weights are kept in their own dtype and cast to the compute dtype where they are used.
"""

import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from laif_jax.models import moe
from laif_jax.models.arch import ModelConfig
from laif_jax.models.attention import Continued, Visibility, fused_applies, kernel_applies, visibility
from laif_jax.models.blocks import Block, Layers, Norm, Remat, Shared, initializer, stream
from laif_jax.models.cache import Cache, LayerCache, with_prompts
from laif_jax.models.embedding import look_up
from laif_jax.models.rope import rope_tables
from laif_jax.models.sharding import compiler_partitioned, spec_of
from laif_jax.models.specs import ParamSpec, Specs, block_specs, param_specs
from laif_jax.models.splash import target_platform

Array = jax.Array
Params = Mapping[str, Any]

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
        return initializer(spec)(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)

    def make(key: Array) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(partial(leaf, key), specs)

    return jax.jit(make, out_shardings=shardings)(key)


def _embed(params: Params, cfg: ModelConfig, tokens: Array, dtype: Any) -> Array:
    table = params["embed"]["embedding"]
    if tokens.shape[1] > 1:  # not in decoding: the gradients of a token are summed in float32
        table = table.astype(jnp.float32)
    x = look_up(table, tokens, dtype)
    return stream(x * jnp.asarray(math.sqrt(cfg.hidden_size), dtype) if cfg.embed_scale else x)


def _final_norm(params: Params, cfg: ModelConfig, x: Array, dtype: Any) -> Array:
    norm = Norm(cfg, param_specs(cfg)["final_norm"], dtype)
    return norm.apply({"params": params["final_norm"]}, x)  # ty: ignore[invalid-explicit-return]


def _who_sees_whom(
    cfg: ModelConfig, segment_ids: Array, dtype: Any, continued: Continued | None = None
) -> Visibility:
    fused = fused_applies(segment_ids.shape[1], cfg.head_dim, cfg.attn_softcap, dtype)
    kernel = kernel_applies(segment_ids.shape[1], cfg.head_dim, cfg.uniform_window)
    window = cfg.uniform_window or 0
    return visibility(segment_ids, window, fused=fused, kernel=kernel, continued=continued)


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
    return hidden_and_load(params, cfg, tokens, positions, segment_ids, dtype=dtype, remat=remat)[0]


def hidden_and_load(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    *,
    prefix: Array | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> tuple[Array, moe.RouterLoad | None]:
    """`hidden_states`, and the load of the experts over all layers and real tokens (None without experts), which
    `moe.balance_loss` reads.

    `prefix`: int32 [R, T], how many tokens of the segment before it a token's segment continues (0: none), see
    `preference_batches`; positions go on there. None: no segment continues another.
    """

    def run(
        params: Params, tokens: Array, positions: Array, segment_ids: Array, prefix: Array | None
    ) -> tuple[Array, moe.RouterLoad | None]:
        cosines, sines = rope_tables(cfg, positions, segment_ids)
        continued = None if prefix is None else Continued(positions, prefix)
        shared = Shared(cosines, sines, _who_sees_whom(cfg, segment_ids, dtype, continued), None)
        x = _embed(params, cfg, tokens, dtype)
        layers = Layers(cfg, dtype, remat)
        out: Any = layers.apply({"params": {"layers": params["layers"]}}, x, shared)
        load = jax.tree.map(lambda each: each.sum(axis=0), out[1])
        return _final_norm(params, cfg, out[0], dtype), load

    def specs() -> Any:
        load = moe.RouterLoad(*cast(Any, [PartitionSpec()] * 3)) if cfg.num_experts else None
        return PartitionSpec(*spec_of(tokens), None), load

    return compiler_partitioned(run, (params, tokens, positions, segment_ids, prefix), specs)


def logits(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """Vocabulary logits float32 [..., V] of hidden states [..., D], multiplied in the dtype of `hidden`."""

    def run(params: Params, hidden: Array) -> Array:
        return vocab_logits(params, cfg, hidden)

    return compiler_partitioned(run, (params, hidden), lambda: PartitionSpec(*spec_of(hidden)[:-1], None))


def vocab_logits(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """`logits` for callers that already are inside a region of automatic partitioning."""
    if "lm_head" in params:  # of untied embeddings, or a copy of tied ones for decoding (`unstack_layers`)
        table, axis = params["lm_head"]["kernel"], 0
    else:
        table, axis = params["embed"]["embedding"], 1
    flat = hidden.reshape(-1, hidden.shape[-1])  # one matrix product, as in `matmul`
    dims = (((1,), (axis,)), ((), ()))
    out = jax.lax.dot_general(flat, table.astype(hidden.dtype), dims, preferred_element_type=jnp.float32)
    out = out.reshape(*hidden.shape[:-1], -1)
    return out if cfg.final_softcap is None else jnp.tanh(out / cfg.final_softcap) * cfg.final_softcap


# ---- decoding ----------------------------------------------------------------------------------------------------


def unstack_layers(params: Params, cfg: ModelConfig, dtype: Any | None = None) -> dict[str, Any]:
    """Parameters for decoding: "layers" becomes a tuple with one tree per layer.

    On a CPU a tied embedding also becomes an `lm_head` of its own, with the vocabulary innermost: read the other way
    round, the product of few rows takes 2.5 times as long (8 rows, 49k tokens).

    `dtype`: also cast the weights, once, to the compute dtype (norms and adapters included), so that no step does.
    """
    out = {name: tree for name, tree in params.items() if name != "layers"}
    out["layers"] = tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(cfg.num_layers)
    )
    if cfg.tie_embeddings and target_platform() == "cpu":
        out["lm_head"] = {"kernel": params["embed"]["embedding"].T}
    if dtype is not None:
        out = jax.tree.map(lambda leaf: leaf.astype(dtype), out)
    return out


def _layer(
    params: Params, cfg: ModelConfig, i: int, x: Array, shared: Shared, cache: LayerCache | None, dtype: Any
) -> tuple[Array, Any]:
    """A layer's output, and its keys and values of the prompts (without a cache) or the cache with one more token."""
    window = cfg.windows[i] if cache is not None else jnp.int32(cfg.windows[i])
    block = Block(cfg, block_specs(cfg), dtype, keep=True)
    inputs = ((window, cfg.rope_index[i]), shared, cache)
    out: Any = block.apply({"params": params["layers"][i]}, x, *inputs)
    return out[0], out[1][0]


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
    layers = []
    for i in range(cfg.num_layers):
        x, kept = _layer(decode_params, cfg, i, x, shared, None, dtype)
        layers.append(with_prompts(cache.layers[i], *kept))
    x = _final_norm(decode_params, cfg, x, dtype)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return last, Cache(tuple(layers)), x


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
    layers = []
    for i in range(cfg.num_layers):
        x, kept = _layer(decode_params, cfg, i, x, shared, cache.layers[i], dtype)
        layers.append(kept)
    return _final_norm(decode_params, cfg, x, dtype)[:, 0], Cache(tuple(layers))

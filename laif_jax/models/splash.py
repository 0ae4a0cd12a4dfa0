"""Causal attention within segments on TPUs: JAX's splash attention kernel, laid over the mesh.

The kernel keeps scores in the chip's vector memory, skips blocks that no query sees, and saves for the backward pass
one number per query beside its inputs. It runs on one chip's rows and heads, so it sits in a `shard_map`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from laif_jax.parallel.rules import partition_spec

Array = jax.Array
LANES = 128  # rows are padded to a multiple of it
BLOCKS = (512, 256, 128)  # of queries and keys, the largest that divides the padded row
SMALLEST_HEAD = 64


def target_platform() -> str:
    """What the program that is being traced will run on: the devices of the mesh in force, else JAX's default.

    A program compiled ahead of time for a TPU has a mesh of TPUs, whatever this machine is.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def splash_applies(length: int, head_dim: int, window: Any) -> bool:
    """Whether the kernel runs here: on a TPU, for rows of at least one block, heads that fill half a lane register or
    more, and a window that all layers share."""
    fits = length >= LANES and head_dim % SMALLEST_HEAD == 0 and isinstance(window, int)
    return fits and target_platform() == "tpu"


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    interpret: bool = False,
) -> Array:
    """`attention` by the kernel.

    Args:
      q: [R, T, N, H]. k, v: [R, T, K, H]. segment_ids: int32 [R, T]. window: 0 or None: all earlier tokens.
      interpret: run the kernel's own definition on any machine, slowly (tests).

    Returns:
      [R, T, N, H] in q's dtype.
    """
    length = q.shape[1]
    padding = -length % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q * scale, k, v))
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(_local, window=window or 0, softcap=softcap, interpret=interpret)
    auto = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto)
    if auto:
        rows, _, heads, _ = spec = partition_spec(("batch", None, "heads", None), q.shape, mesh)
        k, v = (_spread_over(x, _size(mesh, heads)) for x in (k, v))
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec, spec, spec, jax.P(rows, None)),
            out_specs=spec,
            axis_names=set(auto),
            check_vma=False,
        )
    return run(q, k, v, segments)[:, :length]


def _size(mesh: Any, axes: Any) -> int:
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def _spread_over(x: Array, parts: int) -> Array:
    """Keys or values [R, T, K, H] with heads repeated until `parts` devices can share them."""
    times = parts // math.gcd(x.shape[2], parts)
    return x if times == 1 else jnp.repeat(x, times, axis=2)


def _local(
    q: Array, k: Array, v: Array, segments: Array, *, window: int, softcap: float | None, interpret: bool
) -> Array:
    """One device's rows and heads; the kernel wants [heads, T, H] of one row."""
    kernel = _kernel(q.shape[1], q.shape[2], window, softcap, interpret)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, segment_ids=_module().SegmentIds(segments, segments))

    return jnp.swapaxes(jax.vmap(row)(*heads_first, segments), 1, 2).astype(q.dtype)


def _kernel(length: int, heads: int, window: int, softcap: float | None, interpret: bool) -> Any:
    splash = _module()
    size = next(block for block in BLOCKS if length % block == 0)
    one = splash.CausalMask((length, length))
    if 0 < window < length:
        one = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv"), size),
        **dict.fromkeys(("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), size),
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _module() -> Any:
    """Imported where it is used: it takes a second, and only TPUs have a use for it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash

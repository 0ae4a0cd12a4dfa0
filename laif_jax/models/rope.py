"""Rotary position embeddings: inverse frequencies of every scaling, tables of cosines, and the rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.models.arch import ModelConfig, RopeConfig

Array = jax.Array

# ---- frequencies -------------------------------------------------------------------------------------------------


def _plain(rope: RopeConfig, dim: int) -> np.ndarray:
    """theta ** (-2i / dim), i < dim / 2 (Su et al. 2021, section 3.2.2), float32 [dim / 2]."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)


def _llama3(rope: RopeConfig, dim: int) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth blend between."""
    assert rope.factor is not None
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    assert rope.original_max_position is not None
    inverse = _plain(rope, dim)
    wavelength = 2 * math.pi / inverse
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((rope.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
    return (((1 - smooth) / rope.factor + smooth) * inverse).astype(np.float32)


def _yarn(rope: RopeConfig, dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): NTK-by-parts frequencies (section 3.2) and the attention factor (section 3.4)."""
    original = rope.original_max_position or max_position
    factor = rope.factor if rope.factor is not None else max_position / original

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    attention = rope.attention_factor
    if attention is None:
        if rope.mscale and rope.mscale_all_dim:
            attention = mscale(factor, rope.mscale) / mscale(factor, rope.mscale_all_dim)
        else:
            attention = mscale(factor)
    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    plain = _plain(rope, dim)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32), float(attention)


def inverse_frequencies(rope: RopeConfig, dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [dim / 2] and the factor of cosines and sines.

    For "dynamic" these are the ones up to `max_position`; see `rope_tables` for what happens beyond it.
    """
    if rope.kind == "linear":
        assert rope.factor
        return _plain(rope, dim) / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, dim), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, dim, max_position)
    return _plain(rope, dim), 1.0


def _dynamic_angles(rope: RopeConfig, dim: int, max_position: int, positions: Array, lengths: Array) -> Array:
    """Angles float32 [R, T, dim / 2] with the base stretched for each token's `lengths` (NTK-aware scaling)."""
    assert rope.factor
    length = jnp.maximum(lengths, max_position).astype(jnp.float32)
    stretch = (rope.factor * length / max_position - (rope.factor - 1)) ** (dim / (dim - 2))
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    inverse = (rope.theta * stretch)[..., None] ** -exponents
    return positions.astype(jnp.float32)[..., None] * inverse


def _segment_lengths(positions: Array, segment_ids: Array) -> Array:
    """Tokens of the segment that each token belongs to, int32 [R, T]."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1


# ---- tables and rotation -----------------------------------------------------------------------------------------


def rope_tables(cfg: ModelConfig, positions: Array, segment_ids: Array | None) -> tuple[Array, Array]:
    """Cosines and sines for every rope of the model, made once per forward pass.

    "dynamic" depends on the length at hand. As in `transformers`, nothing changes up to `max_position`; beyond it the
    base grows with the length of the sequence. The length is that of the token's own segment, so that a sequence means
    the same alone, padded or packed (`transformers` takes the longest row of the batch, padding included). In decoding
    (`segment_ids` None) it is the number of tokens so far, and cached keys keep the frequencies of their own time, as
    in `transformers`: beyond `max_position`, and only there, decoding differs from one full forward pass.

    Args:
      positions: int32 [R, T]. segment_ids: int32 [R, T], or None when every token stands at the end of its sequence.

    Returns:
      Two float32 arrays [ropes, R, T, rotary_dim / 2].
    """
    cosines, sines = [], []
    for rope in cfg.ropes:
        dim = cfg.rotary_dim(rope)
        if rope.kind == "dynamic":
            lengths = positions + 1 if segment_ids is None else _segment_lengths(positions, segment_ids)
            angles, factor = _dynamic_angles(rope, dim, cfg.max_position, positions, lengths), 1.0
        else:
            inverse, factor = inverse_frequencies(rope, dim, cfg.max_position)
            angles = positions.astype(jnp.float32)[..., None] * inverse
        cosines.append(jnp.cos(angles) * factor)
        sines.append(jnp.sin(angles) * factor)
    return jnp.stack(cosines), jnp.stack(sines)


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotates pairs (i, i + rotary_dim / 2) of the first dimensions of each head, in float32.

    Args:
      x: [R, T, heads, H]. cosines, sines: float32 [R, T, rotary_dim / 2].
    """
    half = cosines.shape[-1]
    cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    parts = [first * cosines - second * sines, second * cosines + first * sines]
    turned = jnp.concatenate(parts, axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)

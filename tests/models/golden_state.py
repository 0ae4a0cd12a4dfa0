"""Weights of the golden models, drawn from their names, so that only logits need to be kept. NumPy alone.

`RandomState` is used because NumPy promises that its streams never change.
"""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], unit_offset: bool) -> np.ndarray:
    """The tensor `name` of a golden model, float32. Norms are far from 1 and biases far from 0, so that errors show.

    `unit_offset`: the model adds 1 to the scales of its norms (Gemma).
    """
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        values = 0.3 * values + (0.0 if unit_offset else 1.0)
    elif name.endswith("bias"):
        values = 0.3 * values
    elif "embed" in name:
        values = 0.5 * values
    else:
        values = values * 1.2 / np.sqrt(shape[1])
    return values.astype(np.float32)


def draw_tokens(lengths: tuple[int, ...], vocab_size: int) -> list[np.ndarray]:
    """Random token ids, one int32 row per length."""
    random = np.random.RandomState(7)
    return [random.randint(0, vocab_size, size=length).astype(np.int32) for length in lengths]

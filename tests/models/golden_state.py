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


def stored(family: str, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """{name in a file: shape} of a tensor of `transformers` 5 in memory, where GPT-NeoX's head has another name and the
    weights of a mixture's experts are fused."""
    if family == "gpt_neox":
        return {name.replace("lm_head", "embed_out"): shape}
    if family != "mixtral" or ".mlp." not in name:
        return {name: shape}
    block = name.split(".mlp.")[0] + ".block_sparse_moe."
    if name.endswith("gate.weight"):
        return {block + "gate.weight": shape}
    experts, rows, columns = shape
    parts, rows = (("w1", "w3"), rows // 2) if "gate_up" in name else (("w2",), rows)
    return {f"{block}experts.{e}.{part}.weight": (rows, columns) for e in range(experts) for part in parts}


def drawn(family: str, name: str, shape: tuple[int, ...], unit_offset: bool) -> np.ndarray:
    """The tensor in memory, from the tensors of a file."""
    parts = [draw(kept, size, unit_offset) for kept, size in stored(family, name, shape).items()]
    return parts[0] if len(parts) == 1 else np.concatenate(parts).reshape(shape)


def draw_tokens(lengths: tuple[int, ...], vocab_size: int) -> list[np.ndarray]:
    """Random token ids, one int32 row per length."""
    random = np.random.RandomState(7)
    return [random.randint(0, vocab_size, size=length).astype(np.int32) for length in lengths]

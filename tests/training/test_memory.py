"""No [batch, time, vocab] array exists in a train step, neither in the program as traced nor as compiled."""

import math
import re

import jax
import numpy as np
import pytest

from laif_jax.training.tasks import preference_task, sft_task
from tests.training import small

LENGTH = 48


def program(kind: str, chunk: int):
    """(jaxpr, compiled HLO text of DPO, elements of a [batch, time, vocab] array)"""
    options = {"dtype": "float32", "remat": "full", "chunk": chunk}
    if kind == "sft":
        task, batch = sft_task(small.config(), small.SFT, **options), small.sft_batch(length=LENGTH)
    else:
        task, batch = preference_task(small.config(), small.DPO, **options), small.pair_batch(length=LENGTH)
    on = small.mesh()
    state = small.fresh_state(task, on)
    batch.pop("pair_index", None)
    hyper = {k: np.float32(v) for k, v in (task.numbers | {"learning_rate": 0.1}).items()}
    traced = small.make_step(task, state, batch, on).trace(state, batch, hyper)
    hlo = traced.lower().compile().as_text() if kind == "dpo" else None  # it has all that SFT has
    return traced.jaxpr, hlo, batch["tokens"].size * small.VOCAB


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values in a jaxpr and the jaxprs within."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape")}
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                found |= shapes_of(getattr(inner, "jaxpr", inner))
    return found


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")


def hlo_shapes(text: str) -> set[tuple[int, ...]]:
    return {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    }


def too_large(shapes: set[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if small.VOCAB in shape and math.prod(shape) >= limit]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_no_array_over_batch_time_and_vocabulary(kind):
    jaxpr, hlo, limit = program(kind, chunk=64)
    assert too_large(shapes_of(jaxpr.jaxpr), limit) == []
    assert too_large(
        shapes_of(jaxpr.jaxpr), limit // 8
    )  # the chunks themselves are seen, so the search works
    if hlo is None:
        return
    assert too_large(hlo_shapes(hlo), limit) == []
    assert too_large(hlo_shapes(hlo), limit // 8)

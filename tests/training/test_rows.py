"""What `check_rows` refuses is what the batches' layouts would fill up with padding, no more and no less."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from laif_jax.config.rl import PpoSpec
from laif_jax.config.training import DpoSpec, SftSpec
from laif_jax.data.plan import make_layout
from laif_jax.parallel.mesh import AXES, MeshError
from laif_jax.training import ppo_plan
from laif_jax.training.rows import check_rows, undivided

PARTS = st.sampled_from([1, 2, 3, 4, 8, 16])
COUNTS = st.integers(1, 24)


def mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def refused(section, parts):
    """The problem, or None; following its advice removes it."""
    (found, *_) = [*undivided({"it": section}, parts), None]
    if found is not None:
        key = re.match(r"`it\.(\w+)`", found[0])[1]
        multiple = int(found[1].rsplit(" ", 1)[1])
        fields = section.model_dump(exclude_unset=True) | (
            {"batch_size": multiple} if key == "batch_size" else {}
        )
        if key == "micro_batch":
            fields |= {"micro_batch": multiple, "batch_size": multiple * getattr(section, "minibatches", 1)}
        assert not [*undivided({"it": type(section).model_validate(fields)}, parts)]
    return found


@given(parts=PARTS, size=COUNTS, micro=st.booleans(), times=st.integers(1, 3), packing=st.booleans())
@pytest.mark.parametrize("pairs", [False, True])
def test_it_is_what_the_layout_of_training_pads(pairs, parts, size, micro, times, packing):
    if pairs and packing:
        size *= 2
    spec = (DpoSpec if pairs else SftSpec)(
        batch_size=size * times if micro else size,
        micro_batch=size if micro else None,
        packing=packing,
        max_length=64,
        max_prompt_length=32,
        steps=1,
    )
    layout = make_layout(
        batch_size=spec.batch_size,
        micro_batch=spec.micro_batch,
        max_length=64,
        max_segments=None,
        packing=packing,
        row_multiple=parts,
        process_count=1,
        of_pairs=pairs,
    )
    assert (refused(spec, parts) is not None) == (layout.used_rows != layout.rows)


@given(
    parts=PARTS,
    prompts=COUNTS,
    samples=st.integers(1, 4),
    minibatches=st.sampled_from([1, 2, 4]),
    micro=st.integers(0, 6),
)
def test_it_is_what_the_layout_of_ppo_pads(parts, prompts, samples, minibatches, micro):
    prompts *= minibatches
    rows = prompts * samples // minibatches
    spec = PpoSpec(
        batch_size=prompts,
        sampling={"samples": samples},
        minibatches=minibatches,
        micro_batch=None if not micro or rows % micro else micro,
    )
    layout = ppo_plan.make_layout(spec, mesh(fsdp=parts), 8, 8)
    assert (refused(spec, parts) is not None) == (layout.micro != (spec.micro_batch or rows))


def test_all_is_said_at_once_with_the_numbers():
    sections = {
        "name": "study",
        "sft": SftSpec(steps=1, batch_size=6),
        "dpo": DpoSpec(steps=1, batch_size=12, packing=True),
    }
    with pytest.raises(MeshError) as error:
        check_rows(sections, mesh(data=2, fsdp=2, tensor=2))
    assert str(error.value) == (
        "mesh data=2 x fsdp=2 x tensor=2: `sft.batch_size` 6 gives 6 rows over 4 parts of the mesh, 2 of 8 padding: "
        "make it a multiple of 4; `dpo.batch_size` 12 gives 6 pairs of rows over 4 parts of the mesh, 2 of 8 padding: "
        "make it a multiple of 8; or give `mesh.tensor` more of the devices: it splits within rows"
    )
    check_rows(sections, mesh(fsdp=2, tensor=4))

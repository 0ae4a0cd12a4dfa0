"""The same update, float32 to 1e-5, however a batch is split, packed, padded or spread over devices."""

import dataclasses

import jax
import numpy as np
import pytest

from laif_jax.training.tasks import preference_task, sft_task
from tests.training import small


@pytest.fixture(scope="module")
def sft():
    task = sft_task(small.config(), small.SFT, **small.F32)
    return task, small.update(task, small.sft_batch())


@pytest.fixture(scope="module")
def dpo():
    task = preference_task(small.config(), small.DPO, **small.F32)
    return task, small.update(task, small.pair_batch())


LAYOUTS = {
    "2 micro-batches on fsdp=2": (2, {"fsdp": 2}),
    "4 micro-batches on fsdp=2, tensor=2": (4, {"fsdp": 2, "tensor": 2}),
    "2 micro-batches on data=2, fsdp=2, tensor=2": (2, {"data": 2, "fsdp": 2, "tensor": 2}),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_sft_update_is_the_same_for_every_split_and_mesh(sft, layout):
    task, one = sft
    micro, axes = LAYOUTS[layout]
    small.assert_same_update(one, small.update(task, small.sft_batch(micro=micro), small.mesh(**axes)))


def test_sft_update_is_the_same_on_an_explicit_mesh(sft):
    task, one = sft
    mesh = small.mesh(fsdp=2, tensor=2, axis_type="explicit")
    small.assert_same_update(one, small.update(task, small.sft_batch(), mesh))


def test_dpo_update_is_the_same_split_and_on_a_mesh(dpo):
    task, one = dpo
    micro, axes = LAYOUTS["2 micro-batches on data=2, fsdp=2, tensor=2"]
    small.assert_same_update(one, small.update(task, small.pair_batch(micro=micro), small.mesh(**axes)))


def test_sft_update_is_the_same_packed(sft):
    task, one = sft
    batch = small.sft_batch(length=32, packed=True)
    assert batch["segment_ids"].max() > 1
    small.assert_same_update(one, small.update(task, batch))


def test_dpo_update_is_the_same_packed(dpo):
    task, one = dpo
    batch = small.pair_batch(length=32, packed=True)
    assert batch["segment_ids"].max() > 1
    small.assert_same_update(one, small.update(dataclasses.replace(task, max_segments=4), batch))


@pytest.mark.parametrize("pad_id", [7, small.VOCAB - 1])
def test_pad_id_changes_nothing(sft, dpo, pad_id):
    """Not even where it is a token that occurs in the text, such as EOS: masks come from lengths. Bitwise."""
    for (task, one), make in ((sft, small.sft_batch), (dpo, small.pair_batch)):
        batch = make(pad_id=pad_id)
        other = small.update(task, batch)
        jax.tree.map(np.testing.assert_array_equal, one[0].params, other[0].params)
        assert one[1] == other[1]


def test_pad_equal_to_the_last_token_of_every_document_keeps_it_supervised(sft):
    task, _ = sft
    docs = [d._replace(tokens=np.append(d.tokens[:-1], 1).astype(np.int32)) for d in small.documents()]
    rows = [[i] for i in range(len(docs))]
    same, other = (small.lay_out(docs, rows, 16, pad_id=pad) for pad in (1, 0))
    assert same["loss_mask"].sum() == sum(len(d.tokens) - d.prompt for d in docs)
    small.assert_same_update(small.update(task, other), small.update(task, same))


def test_more_padding_and_pairs_of_weight_0_change_nothing(dpo):
    task, one = dpo
    batch = small.pair_batch(length=24)
    tables = {k: v for k, v in batch.items() if v.ndim == 2}
    grown = batch | {k: np.concatenate([v, v[:, :1]], axis=1) for k, v in tables.items()}
    grown["weight"][:, -1] = 0.0
    grown["ref_chosen"][:, -1] = np.nan
    small.assert_same_update(one, small.update(task, grown))


def test_a_sweep_of_loss_numbers_does_not_compile_again(dpo):
    task, one = dpo
    other = preference_task(small.config(), small.DPO.model_copy(update={"beta": 0.5}), **small.F32)
    assert other == task
    assert other.numbers != task.numbers
    on, batch = small.mesh(), small.pair_batch()
    state = small.fresh_state(task, on)
    step = small.make_step(task, state, batch, on)
    assert step is small.make_step(other, state, batch, on)
    compiled = step._cache_size()
    changed = small.update(other, batch, learning_rate=0.3)
    assert step._cache_size() == compiled
    assert not np.isclose(changed[1]["loss"], one[1]["loss"])

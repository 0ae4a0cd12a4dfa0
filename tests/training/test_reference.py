"""Reference log-probs: exact at the first step, cached, and never silently missing or wrong."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import DpoSpec, LoraSpec, OptimizerSpec
from laif_jax.models.lora import trainable_mask
from laif_jax.objectives import PREFERENCE_LOSSES, preference_loss
from laif_jax.training import reference as reference_module
from laif_jax.training.loop import train
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.reference import MissingReferenceError, ReferenceLogps, reference_logps
from laif_jax.training.tasks import FirstStepError, preference_task
from tests.training import small

PAIRS = 12


class Pairs:
    """Three batches of four pairs, over and over, each epoch in another order."""

    steps_per_epoch = 3

    def __init__(self, micro: int = 1):
        self.step = 0
        self.micro = micro

    def __iter__(self):
        return self

    def __next__(self):
        epoch, within = divmod(self.step, 3)
        self.step += 1
        number = (within + epoch) % 3
        return small.pair_batch(micro=self.micro, seed=number, first=4 * number)

    def get_state(self):
        return self.step

    def set_state(self, state):
        self.step = state


def spec(**options) -> DpoSpec:
    defaults = {"steps": 5, "optimizer": OptimizerSpec(name="rmsprop", learning_rate=1e-3)}
    return DpoSpec(**(defaults | options))


def reference_of(task, settings, out, state=None, batches=None, mesh=None):
    mesh = mesh or small.mesh()
    state = state or small.fresh_state(task, mesh, settings.optimizer)
    hyper = dict(task.numbers) | optimizer_hyper(settings.optimizer)
    return reference_logps(
        task,
        state,
        make_optimizer(settings.optimizer),
        batches or Pairs(),
        PAIRS,
        mesh=mesh,
        hyper=hyper,
        cache_dir=out,
    )


def go(settings, out, *, mesh=None, micro=1, dtype="float32", remat="none", wrong=None):
    mesh = mesh or small.mesh()
    task = preference_task(small.config(), settings, dtype=dtype, remat=remat, chunk=32)
    batches = Pairs(micro)
    reference, state = reference_of(task, settings, out, batches=batches, mesh=mesh)
    if wrong:
        reference = wrong(reference)
    return train(task, batches, state, settings, out, mesh=mesh, reference=reference, progress=False)


@pytest.mark.parametrize(
    ("dtype", "remat", "micro", "axes"),
    [
        ("float32", "none", 1, {}),
        ("bfloat16", "full", 2, {"fsdp": 2, "tensor": 2}),
    ],
)
def test_first_margins_are_exactly_0_and_the_loss_is_log_2(tmp_path, dtype, remat, micro, axes):
    result = go(spec(), tmp_path, dtype=dtype, remat=remat, micro=micro, mesh=small.mesh(**axes))
    first, last = result.history[0], result.history[-1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == 0.0
    assert first["rewards/accuracies"] == 0.5
    np.testing.assert_allclose(first["loss"], math.log(2), rtol=1e-6)
    assert last["rewards/margins"] != 0.0
    # Every pair has its own reference: the second epoch reads the same values in another order.
    assert {row["step"]: row["logps/ref_chosen"] for row in result.history}[4] != first["logps/ref_chosen"]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_the_value_that_the_first_loss_is_checked_against_is_that_of_the_loss(loss):
    smoothing = {"label_smoothing": 0.1} if loss in ("conservative", "robust") else {}
    task = preference_task(small.config(), spec(loss=loss, beta=0.3, **smoothing), **small.F32)
    if not task.has_reference:
        return
    same = jnp.full((3,), -7.0)
    ones, p = jnp.ones(3), jnp.asarray([1.0, 0.7, 0.2])
    out = preference_loss(loss, same, same, same, same, 4 * ones, 5 * ones, p, ones, task.numbers)
    row = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    task.check_first_step(row)
    with pytest.raises(FirstStepError, match="at margin 0 it must be"):
        task.check_first_step(row | {"preference_loss": row["preference_loss"] + 1e-4})


def shifted(reference: ReferenceLogps) -> ReferenceLogps:
    return ReferenceLogps(reference.chosen + np.float32(1e-4), reference.rejected)


def reordered(reference: ReferenceLogps) -> ReferenceLogps:
    return ReferenceLogps(np.roll(reference.chosen, 1), np.roll(reference.rejected, 1))


def swapped(reference: ReferenceLogps) -> ReferenceLogps:
    return ReferenceLogps(reference.rejected, reference.chosen)


@pytest.mark.parametrize("wrong", [shifted, reordered, swapped])
def test_a_wrong_reference_stops_at_the_first_step(tmp_path, wrong):
    with pytest.raises(FirstStepError, match=r"before the first update `rewards/.*must be exactly 0"):
        go(spec(), tmp_path, wrong=wrong)


def test_a_missing_pair_is_an_error_that_names_it(tmp_path):
    def without(reference):
        chosen = reference.chosen.copy()
        chosen[2] = np.nan
        return ReferenceLogps(chosen, reference.rejected)

    with pytest.raises(MissingReferenceError, match=r"for the pairs \[2\] of 12"):
        go(spec(), tmp_path, wrong=without)
    with pytest.raises(MissingReferenceError, match=r"for the pairs \[8, 9\] of 8"):
        ReferenceLogps(np.zeros(8, np.float32), np.zeros(8, np.float32)).fill(np.asarray([[1, 9, 8, -1]]))


def test_padding_is_filled_with_0():
    filled = ReferenceLogps(np.asarray([-1.0, -2.0]), np.asarray([-3.0, -4.0])).fill(np.asarray([[1, -1, 0]]))
    np.testing.assert_array_equal(filled["ref_chosen"], [[-2.0, 0.0, -1.0]])
    np.testing.assert_array_equal(filled["ref_rejected"], [[-4.0, 0.0, -3.0]])


def test_cache_is_used_and_its_key_covers_weights_and_data(tmp_path, monkeypatch):
    settings = spec()
    task = preference_task(small.config(), settings, **small.F32)
    calls = []
    compute = reference_module._compute
    monkeypatch.setattr(reference_module, "_compute", lambda *a: calls.append(1) or compute(*a))

    def again(state=None, batches=None):
        return reference_of(task, settings, tmp_path, state, batches)[0]

    first = again()
    np.testing.assert_array_equal(again().chosen, first.chosen)
    assert len(calls) == 1
    other = small.fresh_state(task, small.mesh(), settings.optimizer, params=small.params(seed=1))
    assert not np.array_equal(again(other).chosen, first.chosen)
    assert len(calls) == 2
    original = Pairs.__next__

    class Changed(Pairs):
        def __next__(self):
            batch = original(self)
            batch["tokens"][0, 0, 0] += 1
            return batch

    changed = Changed()
    again(batches=changed)
    assert len(calls) == 3
    assert changed.get_state() == 0  # set back to where training begins


def test_a_damaged_cache_is_computed_again_with_a_warning(tmp_path, caplog):
    settings = spec()
    task = preference_task(small.config(), settings, **small.F32)
    first, _ = reference_of(task, settings, tmp_path)
    (path,) = tmp_path.glob("reference-*.npz")
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        again, _ = reference_of(task, settings, tmp_path)
    assert any(path.name in message for message in caplog.messages)
    np.testing.assert_array_equal(again.chosen, first.chosen)


def test_where_the_forward_pass_rounds_otherwise_the_step_itself_is_the_reference(
    tmp_path, monkeypatch, caplog
):
    make = reference_module.make_forward

    def rounds_otherwise(*args):
        forward = make(*args)
        return lambda *a: jax.tree.map(lambda x: jnp.nextafter(x, jnp.float32(0)), forward(*a))

    settings = spec()
    task = preference_task(small.config(), settings, **small.F32)
    expected, _ = reference_of(task, settings, tmp_path / "a")
    monkeypatch.setattr(reference_module, "make_forward", rounds_otherwise)
    with caplog.at_level(logging.INFO):
        found, state = reference_of(task, settings, tmp_path / "b")
    assert any("train step computes them" in message for message in caplog.messages)
    np.testing.assert_allclose(found.chosen, expected.chosen, rtol=1e-6)
    assert go(settings, tmp_path / "b").history[0]["rewards/margins"] == 0.0
    assert int(state.step) == 0  # nothing was trained meanwhile
    jax.tree.map(np.testing.assert_array_equal, state.params, small.params())


def test_lora_starts_at_the_reference_and_trains_the_adapters_alone(tmp_path):
    cfg = small.config(LoraSpec(rank=2, targets=("q", "v", "down")))
    settings = spec(steps=3)
    task = preference_task(cfg, settings, dtype="bfloat16", remat="full", chunk=32)
    params = small.params(cfg)
    mask = trainable_mask(params, cfg)
    state = small.fresh_state(
        task, small.mesh(), settings.optimizer, trainable=mask, frozen_dtype=jnp.bfloat16
    )
    frozen = jax.tree.map(np.asarray, state.frozen)
    trained = {x.shape for x in jax.tree.leaves(state.trainable)}
    assert {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim} <= trained
    batches = Pairs()
    reference, state = reference_of(task, settings, tmp_path, state, batches)
    result = train(
        task, batches, state, settings, tmp_path, mesh=small.mesh(), reference=reference, progress=False
    )
    assert result.history[0]["rewards/margins"] == 0.0
    assert result.history[-1]["rewards/margins"] != 0.0
    jax.tree.map(np.testing.assert_array_equal, frozen, result.state.frozen)
    b = result.state.params["layers"]["attn"]["q"]["lora_b"]
    assert b.dtype == jnp.float32
    assert np.abs(b).max() > 0


def test_losses_without_a_reference_are_not_checked():
    task = preference_task(small.config(), spec(loss="simpo"), **small.F32)
    assert not task.has_reference
    free = preference_task(small.config(), spec(reference_free=True), **small.F32)
    assert not free.has_reference

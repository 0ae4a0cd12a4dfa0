"""The loop: logging, stopping for a stated reason, resuming to the same bits."""

import json
import logging

import jax
import numpy as np
import pytest

from laif_jax.config.schema import OptimizerSpec, TrainSpec
from laif_jax.config.training import BestSpec
from laif_jax.training.checkpoint import Checkpointer
from laif_jax.training.feed import EmptyBatchError
from laif_jax.training.loop import train
from laif_jax.training.metrics import MetricsError, MetricsWriter, peak_flops, read_metrics
from laif_jax.training.optim import make_optimizer
from laif_jax.training.recorder import NonFiniteError
from laif_jax.training.state import create_state
from laif_jax.training.step import enable_compilation_cache
from tests.training import toys


class Stop(Exception):
    """Stands for a crash between two steps."""


def spec(**options) -> TrainSpec:
    optimizer = OptimizerSpec(name="adamw", learning_rate=0.01, schedule="cosine", warmup=2)
    defaults = {"steps": 12, "save_every": 4, "log_every": 5, "optimizer": optimizer}
    return TrainSpec(**(defaults | options))


def run(out, batches=None, *, crash_at=None, **options):
    settings = spec(**options)
    state = create_state(toys.params(), make_optimizer(settings.optimizer), mesh=toys.mesh())

    def crash(step, state):
        if step == crash_at:
            raise Stop

    return train(
        toys.loss_fn,
        batches or toys.Batches(settings.steps),
        state,
        settings,
        out,
        mesh=toys.mesh(),
        callback=crash if crash_at else None,
        callback_every=1,
        progress=True,
    )


def assert_bits(a, b):
    for x, y in zip(
        jax.tree.leaves((a.step, a.params, a.opt_state)), jax.tree.leaves((b.step, b.params, b.opt_state))
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def without_perf(rows):
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_history_has_every_step_and_the_files_hold_it(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="laif_jax"):
        result = run(tmp_path)
    assert [row["step"] for row in result.history] == list(range(1, 13))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.history[0]["learning_rate"] == 0.0  # warm-up from 0
    assert {"loss", "grad_norm", "learning_rate", "absolute_error"} <= set(result.history[0])
    assert read_metrics(tmp_path / "metrics.jsonl") == result.history
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert any(
        "step 12/12, loss" in message for message in caplog.messages
    )  # plain lines: this is no terminal


def test_no_checkpoint_but_the_last_when_saving_is_off(tmp_path):
    run(tmp_path, save_every=0)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["12"]


def test_only_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, save_every=2, keep=3)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [8, 10, 12]


def test_the_best_checkpoint_by_a_metric_stays(tmp_path):
    result = run(tmp_path, save_every=2, keep=1, keep_best=BestSpec(metric="learning_rate"))
    rates = [row["learning_rate"] for row in result.history]
    best = 2 * (1 + int(np.argmax(np.reshape(rates, (-1, 2)).mean(-1))))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [best, 12]


@pytest.mark.parametrize("crash_at", [2, 4, 7, 11])
def test_resuming_gives_the_same_bits_and_no_step_twice(tmp_path, crash_at):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "broken", crash_at=crash_at)
    again = run(tmp_path / "broken")
    assert again.resumed_from == crash_at // 4 * 4
    assert_bits(whole.state, again.state)
    assert without_perf(whole.history) == without_perf(again.history)
    assert without_perf(read_metrics(tmp_path / "broken" / "metrics.jsonl")) == without_perf(whole.history)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.resumed_from == 12
    assert_bits(first.state, again.state)
    assert again.history == first.history


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_saved(tmp_path, value):
    def spoil(batch):
        batch["y"][0, 3] = value

    good = run(tmp_path / "good", steps=7, optimizer=OptimizerSpec(learning_rate=0.01))
    options = {"optimizer": OptimizerSpec(learning_rate=0.01), "log_every": 10, "save_every": 0}
    message = r"step 8 has loss (nan|inf).*examples \[800, 801, .*lower `optimizer.learning_rate`"
    for _ in range(2):  # the same command meets the same batch again
        with pytest.raises(NonFiniteError, match=message):
            run(tmp_path / "bad", toys.Batches(12, spoil={8: spoil}), **options)
    assert [row["step"] for row in read_metrics(tmp_path / "bad" / "metrics.jsonl")] == list(range(1, 8))
    state = create_state(toys.params(), make_optimizer(OptimizerSpec()), mesh=toys.mesh())
    saved, extra = Checkpointer(tmp_path / "bad" / "checkpoints").restore(state)
    assert_bits(saved, good.state)
    assert extra["data"] == {"next": 7}
    mended = run(tmp_path / "bad", **options)  # the data was mended: goes on to the end
    assert mended.resumed_from == 7
    assert_bits(mended.state, run(tmp_path / "never bad", **options).state)


def test_a_batch_without_weight_is_an_error_that_names_the_step(tmp_path):
    def spoil(batch):
        batch["weight"][:] = 0.0

    with pytest.raises(EmptyBatchError, match="batch of step 3 has no supervised token"):
        run(tmp_path, toys.Batches(12, spoil={3: spoil}))


def test_data_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="data ended before step 6 of 12"):
        run(tmp_path, toys.Batches(5))


def test_rows_are_padded_to_the_mesh(tmp_path):
    def go(out, devices):
        mesh = toys.mesh(devices)
        state = create_state(toys.params(), make_optimizer(spec().optimizer), mesh=mesh)
        return train(toys.loss_fn, toys.Batches(12, rows=6), state, spec(), out, mesh=mesh, progress=False)

    one, four = go(tmp_path / "1", 1), go(tmp_path / "4", 4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-6),
        one.state.params,
        four.state.params,
    )


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + json.dumps({"step": 2, "loss": 1.0})[:9])
    writer = MetricsWriter(tmp_path)
    assert writer.resume(5) == [{"step": 1, "loss": 1.0}]
    writer.close()
    assert len(path.read_text().splitlines()) == 1


def test_wandb_is_asked_for_but_not_installed(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'laif_jax\[wandb\]'"):
            MetricsWriter(tmp_path, {"project": "x"}).resume(0)
    else:
        pytest.skip("wandb is installed here")


def test_peak_flops_takes_the_longest_name_and_knows_when_it_does_not_know():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v55") is None
    assert peak_flops("cpu") is None


def test_the_callback_sees_the_last_step_and_its_text_goes_to_tensorboard(tmp_path):
    seen = []
    settings = spec()
    state = create_state(toys.params(), make_optimizer(settings.optimizer), mesh=toys.mesh())

    def samples(step, state):
        seen.append((step, int(state.step)))
        return f"a table of step {step}"

    train(
        toys.loss_fn,
        toys.Batches(12),
        state,
        settings,
        tmp_path,
        mesh=toys.mesh(),
        callback=samples,
        callback_every=5,
        progress=False,
    )
    assert seen == [(5, 5), (10, 10), (12, 12)]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"a table of step 10" in events.read_bytes()


def test_compilation_cache_goes_where_it_is_told_or_warns(tmp_path, monkeypatch, caplog):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        monkeypatch.setenv("LAIF_CACHE", str(tmp_path / "cache"))
        assert enable_compilation_cache() == tmp_path / "cache" / "xla"
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "cache" / "xla")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LAIF_CACHE", str(tmp_path / "file"))
        assert enable_compilation_cache() is None
        assert any("set LAIF_CACHE to another folder" in message for message in caplog.messages)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_metrics_that_cannot_be_written_stop_the_run_with_advice(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.resume(0)
    writer.path.unlink()
    writer.path.mkdir()  # stands for any refusal of the file system
    with pytest.raises(MetricsError, match=r"cannot write .*metrics.jsonl.*resumes from its last checkpoint"):
        writer.write([{"step": 1}])
    writer.close()

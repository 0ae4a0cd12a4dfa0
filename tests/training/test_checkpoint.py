"""Checkpoints: atomic under SIGKILL, whole or set aside, and clear when the disk is full."""

import collections
import dataclasses
import gc
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from laif_jax.config.schema import OptimizerSpec
from laif_jax.config.training import BestSpec
from laif_jax.training.checkpoint import Checkpointer, CheckpointError, Keep
from laif_jax.training.optim import make_optimizer
from laif_jax.training.state import TrainState, create_state
from tests.bucket import bucket
from tests.training import toys

# As soon as one read of a damaged checkpoint fails, Orbax 0.12 raises its error and closes its event loop. Reads of
# other arrays, still on their way in TensorStore's threads, find it closed; coroutines that wait are thrown away.
_ABANDONED = "(Event loop is closed|orbax/checkpoint/)"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:(?s).*{_ABANDONED}:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _what_was_abandoned_is_collected_here():
    yield
    gc.collect()


def make_state(
    step: int = 0, seed: int = 0, name: str = "adamw", devices: int = 1, params=None
) -> TrainState:
    mesh = toys.mesh(devices)
    params = params or toys.params(seed)
    shardings = jax.tree.map(
        lambda x: NamedSharding(
            mesh, PartitionSpec("fsdp") if x.shape[0] % devices == 0 else PartitionSpec()
        ),
        params,
    )
    state = create_state(params, make_optimizer(OptimizerSpec(name=name)), mesh=mesh, shardings=shardings)
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), state.step.sharding))


def save_steps(folder, *steps: int) -> None:
    checkpoints = Checkpointer(folder, keep=5)
    for step in steps:
        checkpoints.save(make_state(step, seed=step), {"data": {"next": step}})
    checkpoints.close()


def restore(folder, like=None):
    checkpoints = Checkpointer(folder, keep=5)
    try:
        return checkpoints.restore(like or make_state())
    finally:
        checkpoints.close()


def assert_is_step(restored, step: int) -> None:
    state, extra = restored
    assert int(state.step) == step
    assert extra == {"data": {"next": step}}
    jax.tree.map(np.testing.assert_array_equal, state.params, toys.params(step))
    assert bool(state.healthy)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_restores_the_newest_into_the_shardings_of_this_mesh(tmp_path):
    save_steps(tmp_path, 1, 2)
    assert_is_step(restore(tmp_path), 2)
    like = make_state(devices=2)
    state, _ = restore(tmp_path, like)
    jax.tree.map(np.testing.assert_array_equal, state.params, toys.params(2))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like)):
        assert x.sharding == y.sharding


REWARDS = {1: 0.3, 2: 0.9, 3: 0.1, 4: 0.5, 5: 0.7, 6: None, 7: math.nan, 8: 0.2, 9: 0.4}


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(last=2), {8, 9}),
        (Keep(last=1, every=4), {4, 8, 9}),
        (Keep(last=1, best=BestSpec(metric="reward")), {2, 9}),
        (Keep(last=1, best=BestSpec(metric="reward", count=2, mode="min")), {3, 8, 9}),
        (Keep(last=1, every=5, best=BestSpec(metric="reward", count=2)), {2, 5, 9}),
    ],
)
def test_the_last_every_nth_and_the_best_stay(tmp_path, keep, left):
    for steps in (range(1, 4), range(4, 10)):  # the second run knows what the first one measured
        checkpoints = Checkpointer(tmp_path, keep)
        for step in steps:
            rows = [{"loss": 1.0}, {"reward": REWARDS[step]}]
            checkpoints.save(make_state(step, seed=step), {"data": {"next": step}}, rows=rows)
        checkpoints.close()
    assert {int(p.name) for p in tmp_path.iterdir()} == left
    assert_is_step(restore(tmp_path), 9)


def test_a_checkpoint_is_ranked_by_the_mean_since_the_one_before():
    keep = Keep(best=BestSpec(metric="reward"))
    assert keep.metrics([{"reward": 1.0}, {"loss": 5.0}, {"reward": 2.0}]) == {"reward": 1.5}
    assert keep.metrics([{"loss": 5.0}]) is None
    assert Keep().metrics([{"reward": 1.0}]) is None


def test_saving_copies_before_the_next_step_may_donate(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    state = make_state(3, seed=3)
    checkpoints.save(state, {"data": {"next": 3}})
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    double(dataclasses.replace(state, healthy=jnp.float32(1)))
    checkpoints.close()
    assert_is_step(restore(tmp_path), 3)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.integers(0, 10**6), damage=st.sampled_from(["cut", "flip", "remove"]), at=st.floats(0, 0.999))
def test_a_damaged_checkpoint_never_gives_wrong_values(tmp_path, pick, damage, at):
    """Whatever file of the newest checkpoint is damaged: either it did not matter, or the one before it is taken."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    save_steps(tmp_path, 1, 2)
    files = sorted(p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size)
    victim = files[pick % len(files)]
    data = bytearray(victim.read_bytes())
    position = int(at * len(data))
    if damage == "flip":
        data[position] ^= 0x10
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[:position])
    else:
        victim.unlink()
    restored = restore(tmp_path)
    assert_is_step(restored, int(restored[0].step))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"item_handlers": []}', '{"tree_metadata": {"a": {}}}', "\xff"]
)
def test_altered_metadata_of_any_kind_is_no_crash(tmp_path, content):
    """Orbax then fails in many ways, AttributeError among them."""
    names = sorted({p.name for p in _saved_files(tmp_path / "one") if p.name.startswith("_")})
    assert names
    for name in names:
        root = tmp_path / name
        for victim in [p for p in _saved_files(root) if p.name == name and "2" in p.relative_to(root).parts]:
            victim.write_text(content)
        restored = restore(root)
        assert_is_step(restored, int(restored[0].step))


def _saved_files(root):
    if not root.exists():
        save_steps(root, 1, 2)
    return [p for p in root.rglob("*") if p.is_file()]


def test_a_truncated_latest_checkpoint_is_set_aside_and_named(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    victim = max((tmp_path / "2" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        restored = restore(tmp_path)
    assert_is_step(restored, 1)
    assert any(str(tmp_path / "2") in m and "corrupt-2" in m for m in caplog.messages)
    save_steps(tmp_path, 2)  # the step can be written again
    assert_is_step(restore(tmp_path), 2)


def test_no_readable_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "state")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read .*train from the beginning"):
        restore(tmp_path)


def test_a_save_that_a_kill_left_uncommitted_in_a_bucket_is_nothing_restored(tmp_path, monkeypatch):
    """There its folder has the step's own name until orbax, which knows better, opens and cleans the checkpoints."""
    monkeypatch.setattr(Checkpointer, "_committed", lambda self: [3])
    assert restore(tmp_path) is None


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_and_kept(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another model or optimiser"):
        restore(tmp_path, make_state(name="rmsprop"))
    wider = toys.params() | {"a": {"kernel": jnp.ones((toys.WIDTH, 9))}}
    with pytest.raises(CheckpointError, match=r"\[6, 8\].* there, .*\[6, 9\].* here"):
        restore(tmp_path, make_state(params=wider))
    assert_is_step(restore(tmp_path), 1)


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"could not be written: it needs .* GB .*last good one, step 1, is intact"
    ):
        checkpoints.save(make_state(2), {})
    checkpoints.close()
    assert_is_step(restore(tmp_path), 1)


def _fails_in_the_write(folder: Path, started: int) -> None:
    """In a fork: the system refuses to write more than a few hundred bytes into a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = make_state(2, seed=2)
    checkpoints = Checkpointer(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    try:
        checkpoints.save(state, {"data": {"next": 2}})
        checkpoints.wait()
    except CheckpointError as error:
        os.write(started, str(error).encode())


def test_a_write_that_the_system_refuses_is_a_clear_error_and_the_last_good_one_is_intact(tmp_path):
    save_steps(tmp_path, 1)
    code = "import sys; from pathlib import Path; from tests.training.test_checkpoint import _fails_in_the_write as f; "
    code += "f(Path(sys.argv[1]), 1)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "could not be written" in done.stdout, done.stderr
    assert "last good one, step 1, is intact" in done.stdout
    assert_is_step(restore(tmp_path), 1)
    save_steps(tmp_path, 2)  # there is room again
    assert_is_step(restore(tmp_path), 2)


def _assert_kills_change_nothing(out: Path, kills: int, seed: int, *what: str, module="killed_run") -> None:
    command = [sys.executable, "-m", f"tests.training.{module}", str(out), str(kills), str(seed), *what]
    env = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(out / "cache")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    with np.load(out / "calm" / "params.npz") as calm, np.load(out / "killed" / "params.npz") as killed:
        assert calm.files == killed.files
        assert all(calm[name].tobytes() == killed[name].tobytes() for name in calm.files)
    assert int((out / "killed" / "resumed_from").read_text()) > 0  # the kills did fall into training
    lines = [(out / run / "metrics.jsonl").read_text().splitlines() for run in ("calm", "killed")]
    assert len(lines[0]) == len(lines[1]) == 20


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    _assert_kills_change_nothing(tmp_path, kills=10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_run_killed_many_times_ends_in_the_same_bits(tmp_path, seed):
    _assert_kills_change_nothing(tmp_path, kills=20, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_tuning_from_the_data_pipeline_killed_ten_times_ends_in_the_same_bits(tmp_path, kind):
    _assert_kills_change_nothing(tmp_path, 10, 7, kind, module="killed_tuned")


# ---- in a bucket -----------------------------------------------------------------------------------------------


def test_checkpoints_in_a_bucket(tmp_path):
    """The same, where there are no renames: what a kill left half-written has the step's name, but not the mark."""
    with bucket() as objects:
        folder = "gs://box/run/checkpoints"
        save_steps(folder, 1, 2, 3)
        assert_is_step(restore(folder), 3)
        objects.held.pop("box/run/checkpoints/3/commit_success.txt")
        assert Checkpointer(folder).latest_step() == 2
        assert_is_step(restore(folder), 2)
        (victim,) = objects.names("box/run/checkpoints/2/state/d/")
        objects.put(victim, objects.get(victim)[:100])
        assert_is_step(restore(folder), 1)
        assert objects.names("box/run/checkpoints/corrupt-2/")
        save_steps(folder, 2)
        assert_is_step(restore(folder), 2)

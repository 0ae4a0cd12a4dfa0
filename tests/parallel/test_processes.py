"""Real processes: two of four CPU devices each, joined by gloo; and the settings that cannot join."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from laif_jax import parallel
from laif_jax.models.weights import load_params
from laif_jax.parallel.distributed import _explicit_settings, _in_cluster
from tests.parallel import stages
from tests.parallel.worker import completions, preference_metrics
from tests.training import small

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count: int, index: int, port: int, code: list[str]) -> subprocess.Popen:
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    return subprocess.Popen(
        [sys.executable, *code], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """As the worker does: many small programs whose numbers are compared to a tolerance."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ppo")


@pytest.fixture(scope="module")
def seen(folder):
    port, out = free_port(), str(folder)
    processes = [start(2, index, port, ["-m", "tests.parallel.worker", out]) for index in range(2)]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err[-3000:]
            line = next(line for line in out.splitlines() if line.startswith("RESULT "))
            results.append(json.loads(line.removeprefix("RESULT ")))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def test_the_processes_find_each_other(seen):
    assert [result["process"] for result in seen] == [[0, 2, True], [1, 2, False]]
    for result in seen:
        assert result["several"]
        assert result["again"]
        assert result["devices"] == [4, 8]


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_a_sharded_array_is_made_from_both_processes_parts(seen, axis_type):
    part = sum(range(2 * 4 * 3))
    first_column = [0.0, 3, 6, 9]
    for index, result in enumerate(seen):
        here = result[axis_type]
        assert here["row_shard"] == [index, 2]
        assert here["sum"] == 2 * (2 * part + 1000 * 24)
        assert here["rows"] == first_column + [1000 + x for x in first_column]


def test_pairs_of_all_processes_are_looked_up_in_their_own_rows(seen):
    """The same preference update as in one process: an index into the rows means the same on every host."""
    alone = preference_metrics(0, 1)
    assert alone["weight"] == 12
    for result in seen:
        assert result["preference"] == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_samples_are_the_same_as_in_one_process(seen):
    alone = completions(1)
    assert len(alone) == 4
    for result in seen:
        for here, there in zip(result["completions"], alone, strict=True):
            assert here[0] == there[0]
            for logps, expected in zip(here[1:], there[1:], strict=True):
                assert logps == pytest.approx(expected, abs=1e-5)


def test_updates_of_a_mixture_and_of_a_reward_model_are_those_of_one_device(seen):
    alone = {"mixtral_sft": stages.mixtral_sft(small.mesh()), "reward": stages.reward(small.mesh())}
    assert alone["mixtral_sft"]["router_loss"] > 1
    for result in seen:
        for name, metrics in alone.items():
            assert result["stages"][name] == pytest.approx(metrics, rel=1e-5, abs=1e-5)


def test_ppo_draws_scores_and_learns_as_on_one_device(seen, tmp_path):
    alone = stages.ppo(small.mesh(), tmp_path)
    assert [row["step"] for row in alone] == [0, 1, 2]
    for result in seen:
        for here, there in zip(result["stages"]["ppo"], alone, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=2e-5)


def test_processes_export_one_model_and_each_reads_its_part_again(seen, folder):
    for result in seen:
        assert result["weights"]["same"]
        assert 0.5 <= result["weights"]["read"] < 0.6  # norms are whole on every device
    cfg = stages.mixtral()
    alone, written = stages.born(cfg, small.mesh()), load_params(folder / "exported", cfg)
    for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_json_goes_from_process_0_to_all(seen):
    for result in seen:
        assert result["auto"]["said"] == result["explicit"]["said"] == {"from": 0}
        assert result["long"] == 100_000
        assert result["after"] == [None, 1.5, "ü"]


def test_a_failure_in_process_0_reaches_all_and_leaves_nobody_waiting(seen):
    assert seen[0]["failed"] == "OSError: disk full"
    assert seen[1]["failed"] == "DistributedError: process 0 failed: OSError: disk full"
    assert seen[0]["not_json"].startswith("TypeError")
    assert "not JSON serializable" in seen[1]["not_json"]


def test_different_barriers_are_an_error(seen):
    for index, result in enumerate(seen):
        assert f"this one at barrier `place {index}`" in result["apart"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (0, "not all processes of the run have come"),
        (1, "nobody answered at 127.0.0.1"),
    ],
)
def test_a_missing_process_ends_in_a_message(index, message):
    """Process 0 waits `timeout` seconds for the others, and the others for it; then they say what was missing."""
    code = "from laif_jax import parallel; parallel.initialize(timeout=1)"
    process = start(2, index, free_port(), ["-c", code])
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert message in err
    assert "Check that every process was started" in err or "check that process 0 was started" in err


def test_joining_after_using_jax_is_an_error():
    code = "import jax; from laif_jax import parallel; jax.devices(); parallel.initialize(timeout=1)"
    process = start(1, 0, free_port(), ["-c", code])
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "DistributedError: this process could not join the others" in err
    assert "before any other use of JAX" in err


def test_alone_there_is_nothing_to_join():
    assert parallel.initialize(environ={}) is False
    assert parallel.is_main()
    assert (parallel.process_index(), parallel.process_count()) == (0, 1)
    parallel.barrier("alone")


def test_alone_values_travel_as_json_too():
    assert parallel.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]}
    assert parallel.from_main(lambda: 3) == 3
    with pytest.raises(TypeError):
        parallel.broadcast_json({1, 2})
    with pytest.raises(ZeroDivisionError):
        parallel.from_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS=host is not host:port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES=two is not an integer",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 must be from 0 to JAX_NUM_PROCESSES - 1 = 1",
        ),
    ],
)
def test_wrong_settings_are_named(environ, message):
    with pytest.raises(parallel.DistributedError, match=message):
        parallel.initialize(environ=environ)


def test_settings_and_clusters_are_read_from_the_environment():
    environ = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert _explicit_settings(environ) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
    }
    assert not _in_cluster({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert _in_cluster({"SLURM_STEP_NUM_TASKS": "2"})
    assert _in_cluster({"OMPI_COMM_WORLD_SIZE": "8"})
    assert _in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})

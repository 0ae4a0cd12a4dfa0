"""The harness of side-by-side runs: it runs, and counts as the models do. Its figures are read by hand, never here."""

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import pytest

from benchmarks.run import bound_seconds, interval
from benchmarks.workload import SHAPES, generation_work, real_tokens, training_work, work_flops
from laif_jax.models.specs import param_specs

ROOT = Path(__file__).parent.parent.parent
SMALL = dataclasses.replace(SHAPES["smollm2-135m"], layers=2, vocab=512)


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameters_of_a_shape_are_counted(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    import laif as ours  # a script, which finds its neighbour as scripts do

    shape = SHAPES[name]
    specs = jax.tree.leaves(
        param_specs(ours.config(dataclasses.asdict(shape), 256)), is_leaf=lambda x: hasattr(x, "shape")
    )
    assert shape.parameters == sum(math.prod(spec.shape) for spec in specs)


@pytest.mark.parametrize("task", ["sft", "dpo", "reward"])
def test_full_rows_have_the_same_length(task):
    rows = training_work(task, "full", 6, 32, SMALL, None)
    sequences = 6 if task == "sft" else 12
    assert real_tokens(task, rows) == sequences * 32
    assert work_flops(task, rows, SMALL) == pytest.approx(3 * sequences * SMALL.forward_flops(32))


def test_limits_of_generation_are_drawn_by_a_seed():
    mixed = generation_work("real", 50, 4, 40, SMALL)
    assert mixed == generation_work("real", 50, 4, 40, SMALL)
    assert all(8 <= row["new"] <= 40 for row in mixed)
    assert len({row["new"] for row in mixed}) > 10
    assert real_tokens("generate", generation_work("full", 5, 4, 40, SMALL)) == 200


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_agreement():
    low, high = interval([math.log(2.0), math.log(2.1), math.log(1.9)])
    assert low < 2.0 < high
    narrow = interval([math.log(2.0)] * 3)
    assert narrow == [2.0, 2.0]
    assert interval([0.0]) is None


def test_decoding_is_bound_by_reading_the_weights_where_that_takes_longer():
    rows = generation_work("full", 4, 8, 16, SMALL)
    options = Namespace(shape=SMALL, dtype="float32", batch=4)
    slow_memory = bound_seconds("generate", rows, options, {"flops": 1e15, "bytes_per_second": 1e9})
    weights = SMALL.matrix_parameters * 4
    assert slow_memory > 16 * weights / 1e9
    fast_memory = bound_seconds("generate", rows, options, {"flops": 1e9, "bytes_per_second": 1e15})
    assert fast_memory == pytest.approx(work_flops("generate", rows, SMALL) / 1e9)


def test_the_harness_runs(tmp_path):
    command = (
        f"{sys.executable} -m benchmarks.run --json --layers 1 --vocab 512 --sequence 32 --new 8 --batch 2"
    )
    command += " --steps 1 --repeats 2 --task sft,dpo,reward,generate"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for task in ("sft", "dpo", "reward", "generate"):
        figures = result[task]["ours"]
        assert figures["seconds"] > 0
        assert figures["peak_bytes"] > 0
        assert figures["tokens_per_second"] > 0
        assert result[task]["peers"] == {}


def test_what_is_not_there_is_named():
    command = [sys.executable, "-m", "benchmarks.run", "--task", "sft,dop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown task `dop`; known: sft, dpo, reward, generate" in done.stderr

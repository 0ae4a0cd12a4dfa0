"""The harness of side-by-side runs: it runs, and counts as the models do. Its figures are read by hand, never here."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import pytest

from benchmarks import contenders, run
from benchmarks.contenders import Contender
from benchmarks.figures import bound_seconds, interval
from benchmarks.roofline import best_rates, describe_machine, measure_machine
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
    one = SMALL.forward_flops(32, words=task != "reward")  # a reward model has no output over the vocabulary
    assert work_flops(task, rows, SMALL) == pytest.approx(3 * sequences * one)


def test_lengths_of_a_file_are_cut_to_the_row(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text("[[10, 3, 5], [60, 90, 8]]")
    rows = training_work("dpo", "real", 4, 64, SMALL, path)
    sizes = {tuple(len(row[name]) for name in ("prompt", "chosen", "rejected")) for row in rows}
    assert sizes == {(10, 3, 5), (32, 32, 8)}


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
    unread = 4 * 8 * 2 * SMALL.vocab * SMALL.hidden  # nobody asks for the words after a prompt's tokens
    assert fast_memory == pytest.approx((work_flops("generate", rows, SMALL) - unread) / 1e9)


def test_an_iteration_of_ppo_is_bound_by_drawing_scoring_and_updates():
    rows = generation_work("full", 4, 8, 16, SMALL)
    options = Namespace(shape=SMALL, dtype="float32", batch=4, epochs=2)
    machine = {"flops": 1e9, "bytes_per_second": 1e15}
    rest = bound_seconds("ppo", rows, options, machine) - bound_seconds("generate", rows, options, machine)
    words, scalars = (4 * SMALL.forward_flops(24, words=words) for words in (True, False))
    assert words - scalars == pytest.approx(4 * 24 * 2 * SMALL.vocab * SMALL.hidden)
    # The reference's, the value and the reward model's forward pass; then policy and value model, twice.
    assert rest == pytest.approx((words + 2 * scalars + 3 * 2 * (words + scalars)) / 1e9)


def test_the_harness_runs(tmp_path, monkeypatch, capsys):
    sizes = (
        "--layers 1 --vocab 512 --sequence 32 --new 8 --batch 2 --steps 1 --repeats 2 --epochs 2 --starts 1"
    )
    tasks = ("dpo", "reward", "ppo", "generate", "compile")  # the last is a step of SFT
    arguments = f"run --json --save one {sizes} --task {','.join(tasks)}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(run, "SAVED", tmp_path)
    monkeypatch.setattr(run, "machine_apart", lambda dtype: {"flops": 1e11, "bytes_per_second": 1e10})
    assert run.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "one.json").read_text()) == result
    for task in tasks:
        figures = result[task]["ours"]
        assert figures["seconds"] > 0
        assert figures["peak_bytes"] > 0
        assert figures["tokens_per_second"] > 0
        assert len(figures["turns"]) == 2
        assert result[task]["peers"] == {}
    assert result["ppo"]["ours"]["update_seconds"] > 0
    assert result["compile"]["compile_seconds_warm"] is not None


def test_the_machine_is_measured():
    first, second = (measure_machine(side=64, copied=2**16) for _ in range(2))
    best = best_rates(first, second)
    for name in ("flops", "bytes_per_second"):
        assert best[name] == max(first[name], second[name]) > 0
    assert describe_machine()["cores"] >= 1


FAKE = """
import sys, time
from serve import Inverted, serve

now = [0.0]
time.perf_counter = lambda: now[0]
SLOW = sys.argv[0].endswith("slow.py")

def build(job):
    steps = []

    def train(gate):
        while True:
            gate()
            now[0] += (2.0 if SLOW else 0.5) + (3.0 if len(steps) < 2 else 0.0)  # it compiles at its first two steps
            steps.append(1)

    run = Inverted(train)

    def block(passes):
        run(passes * int(job["batch"]) or 1)
        return {"rollout_seconds": 0.25}

    return block

serve(build, lambda: 300 if SLOW else 200)
"""


def test_contenders_take_turns(tmp_path, monkeypatch, capsys):
    """With contenders that only move a clock of their own; they take as many steps a pass as a batch has rows."""
    paths = {name: tmp_path / f"{name}.py" for name in ("quick", "slow")}
    for path in paths.values():
        path.write_text(FAKE)
    found = {"laif_jax": (Path(sys.executable), paths["quick"]), "trl": (Path(sys.executable), paths["slow"])}
    variables = dict(os.environ) | {"PYTHONPATH": str(ROOT / "benchmarks" / "peers")}
    monkeypatch.setattr(contenders, "_variables", lambda: variables)
    monkeypatch.setattr(run, "scripts", lambda task, against, envs: found)
    monkeypatch.setattr(run, "machine_apart", lambda dtype: {"flops": 1e15, "bytes_per_second": 1e15})
    sizes = "--layers 1 --vocab 512 --sequence 32 --new 8 --batch 1 --steps 1 --repeats 3 --epochs 2"
    monkeypatch.setattr(sys, "argv", f"run --json {sizes} --against trl --task ppo,compile".split())
    assert run.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for task in ("ppo", "compile"):
        one = result[task]
        assert one["better_peer"] == "trl"
        assert one["ratio_to_better_peer"] == 4.0
        assert one["ratio_ci95"] == [4.0, 4.0]
        assert one["peak_memory_ratio"] == 0.667
        assert one["ours"]["turns"] == [0.5] * 3
        assert one["ours"]["rollout_seconds"] == 0.25
        # Both slow steps are counted, in both starts.
        assert one["ours"]["compile_seconds"] == one["compile_seconds_warm"] == 6.0
        assert one["ours"]["first_step_seconds"] == 3.5
    assert result["compile"]["compile_ratio"] == 1.0


def test_a_contender_that_fails_is_told_with_its_words(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('nothing to run here')")
    with pytest.raises(RuntimeError, match="other failed:\nnothing to run here"):
        Contender("other", Path(sys.executable), script, tmp_path / "job.json", tmp_path)


def test_what_is_not_there_is_named():
    command = [sys.executable, "-m", "benchmarks.run", "--task", "sft,dop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown task `dop`; known: sft, dpo, reward, ppo, generate, compile" in done.stderr

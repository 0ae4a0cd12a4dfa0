"""The measurements of docs/results/performance.md and its page: they run, and tell of results what is in them."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import growth, growth_page, performance, performance_page, run
from benchmarks.performance import TASKS, Task

PARSER = run._parser()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results, notes and figures in a temporary folder."""
    monkeypatch.setattr(performance, "SAVED", tmp_path / "speed")
    monkeypatch.setattr(growth, "RESULTS", tmp_path / "growth")
    monkeypatch.setattr(growth_page, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(performance_page, "NOTES", tmp_path / "notes.md")
    return tmp_path


def result_of(task: Task, ratio: float) -> dict:
    """What the harness would write."""
    figures = {"seconds": 2.0, "cpu_seconds": 3.0, "tokens_per_second": 100.0, "mfu": 0.5, "peak_bytes": 4e9}
    figures |= {
        "turns": [2.0, 2.1],
        "ready_seconds": 9.0,
        "compile_seconds": 3.0,
        "compile_seconds_warm": 1.5,
    }
    one = {"ours": figures, "peers": {"trl": figures | {"seconds": 2.0 * ratio}}, "compile_ratio": 0.4}
    one |= {"ratio_to_better_peer": ratio, "ratio_ci95": [ratio - 0.1, ratio + 0.1], "peak_memory_ratio": 0.9}
    one |= {"roofline_fraction": 0.7, "bound_seconds": 1.4, "compile_seconds_warm": 1.5}
    one["limits"] = {"flops": 2e11, "bytes_per_second": 8e9}
    machine = {"cpu": "some", "cores": 2, "memory_bytes": 8e9, "python": "3.11", "jax": "0.10"}
    machine |= {"load": 0.1, "load_after": 2.0, "date": "2026-01-01"}
    return {"command": f"python -m {task.command}", "machine": machine, task.key: one}


def write(task: Task, result: dict) -> None:
    task.path.parent.mkdir(exist_ok=True)
    task.path.write_text(json.dumps(result))


def test_every_task_is_a_command_of_the_harness_and_every_target_a_task():
    for task in TASKS:
        module, *arguments = task.command.split()
        if module == "benchmarks.run":
            options = PARSER.parse_args(arguments)
            assert options.task == [task.key]
            assert set(options.against) <= {"trl", "tunix"}
    assert {target.task for target in performance_page.TARGETS} <= {task.name for task in TASKS}
    assert sum(task.minutes for task in TASKS) <= 45


def test_a_page_without_results_says_so(folders):
    text = performance_page.page()
    assert text.count("not measured") >= len(performance_page.TARGETS)
    assert "Not measured yet: `python -m benchmarks.run" in text


def test_targets_that_are_and_are_not_reached(folders):
    tasks = {task.name: task for task in TASKS}
    write(tasks["sft"], result_of(tasks["sft"], 1.3))
    write(tasks["ppo"], result_of(tasks["ppo"], 1.9))
    write(tasks["compile"], result_of(tasks["compile"], 1.0))
    (folders / "notes.md").write_text("What stands in the way.\n")
    text = performance_page.page()
    assert "| SFT, full rows | >= 1.20x | 1.30x | 1.20 to 1.40 | yes |" in text
    assert "| an iteration of PPO | >= 2.00x | 1.90x | 1.80 to 2.00 | **no** |" in text
    assert "| peak memory, SFT, full rows | <= 0.70x | 0.90x |  | **no** |" in text
    assert "| compiling 32 layers, full cache | <= 2.00 s | 1.50 s |  | yes |" in text
    assert "What stands in the way." in text
    assert "200 to 200 GFLOP/s" in text


def test_a_measurement_is_kept_and_not_repeated(folders, monkeypatch, capsys):
    monkeypatch.setattr(performance, "ROOT", folders)
    script = "import json; print('for people'); print(json.dumps({'ratio_to_one_command_each': 4.5, 'data': 'DATA'}))"
    (folders / "quick.py").write_text(script)
    options = Namespace(again=False, data=Path("lengths"), envs=Path("envs"))
    task = Task("sweep", "quick", 1)
    performance.measure(dataclasses.replace(task, command="no_such_module"), options)
    assert "failed" in capsys.readouterr().err
    assert not task.path.exists()
    performance.measure(task, options)
    result = performance.read(task)
    assert result is not None
    assert result["ratio_to_one_command_each"] == 4.5
    assert result["machine"]["cores"] >= 1
    (folders / "quick.py").unlink()
    performance.measure(task, options)
    assert "sweep: there" in capsys.readouterr().out
    assert (
        "| a sweep of 16 seeds, beside a command for each | >= 4.00x | 4.50x |  | yes |"
        in performance_page.page()
    )


# ---- how cost grows --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0.0, 2.5), st.floats(1.0, 1e9))
def test_exponents_of_powers_are_found(power, factor):
    points = [{"size": n, "memory_bytes": factor * n**power} for n in (64, 1, 8, 512)]
    points.sort(key=lambda point: point["size"])
    assert growth_page.exponent(points, "memory_bytes") == pytest.approx(power, abs=1e-6)
    assert growth_page.exponent(points[:1], "memory_bytes") is None


def test_what_grows_faster_than_it_has_to_is_named():
    curve = growth.CURVES["sequence"]
    points = [
        {
            "size": n,
            "needed_flops": n**1.5,
            "step_flops": n**1.5,
            "memory_bytes": n**2.0,
            "step_bytes": n**1.5,
        }
        for n in curve.sizes
    ]
    told, worse = growth_page.judge(curve, points)
    assert told == ["operations n^1.50", "memory traffic n^1.50", "memory n^2.00"]
    assert worse == ["memory (n^2.00, 1.00 would do)"]
    weak = [{"size": n, "needed_flops": 5.0, "step_flops": 5.0 * n**0.3} for n in (1, 2, 4, 8)]
    assert growth_page.judge(growth.CURVES["devices"], weak)[1] == ["operations (n^0.30, 0.00 would do)"]


def test_a_point_is_measured_kept_and_drawn(folders, monkeypatch):
    small = growth.Job(shape=dataclasses.replace(growth.BASE, vocab=64, hidden=8, mlp=8, layers=1), length=72)
    curve = dataclasses.replace(
        growth.CURVES["batch"], sizes=(1,), job=lambda n: dataclasses.replace(small, rows=n)
    )
    monkeypatch.setattr(growth, "CURVES", {"batch": curve})
    monkeypatch.setattr(growth_page, "CURVES", {"batch": curve})
    counted = dataclasses.replace(small, rows=jax.device_count(), devices=jax.device_count())
    monkeypatch.setattr(growth, "_count_apart", lambda name, size, devices: growth.count(counted))
    growth.measure_all(["batch"], 5.0, False)
    (point,) = growth.read("batch")
    assert point["step_flops"] >= point["needed_flops"] > 0
    assert point["tokens_per_second"] == pytest.approx(72 / point["seconds"])
    text = "\n".join(growth_page.section())
    assert "| 1 |" in text
    assert "Too few points" in text
    figure = (folders / "figures" / "batch.svg").read_text()
    assert figure.startswith("<?xml")
    assert "mathdefault" not in figure  # labels are plain numbers

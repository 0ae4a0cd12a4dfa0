"""The benchmark of sweeps: its turns, its ratios, and that it refuses ways that did not make the same."""

import json
from pathlib import Path

import pytest

from benchmarks import sweep
from laif_jax.studies.sweep_axes import make_points, read_axes


def test_the_world_is_a_study():
    points = make_points(
        str(sweep.CONFIG), *read_axes(str(sweep.CONFIG), [*sweep.world(32, 2, 400), "seed=[0,1]"])
    )
    assert [point.config.seed for point in points] == [0, 1]
    assert {arm.optimize for arm in points[0].config.arms} == {"none", "dpo"}
    assert points[0].config.model.scratch.hidden_size == 32


def commands(loss):
    """Stands for `laif`: writes a stage per seed; a lone command takes 4 seconds, a sweep 2, one by one 6."""

    def laif(verb, _, out, *arguments, cache):
        del cache
        (seeds,) = [a.removeprefix("seed=") for a in arguments if a.startswith("seed=")]
        seeds = json.loads(seeds) if verb == "sweep" else [int(seeds)]
        one_by_one = "--one-by-one" in arguments
        for seed in seeds:
            folder = Path(out.removeprefix("out=")) / "quickstart" / f"sft-{seed}" / "train"
            folder.mkdir(parents=True)
            row = {"step": 1, "loss": loss(verb, one_by_one, seed)}
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return (4.0 if verb == "run" else 6.0 if one_by_one else 2.0), 1.0

    return laif


def test_it_tells_ratios(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "laif", commands(lambda verb, _, seed: 2.0 + seed + (verb == "run") * 1e-6))
    monkeypatch.setattr("sys.argv", ["sweep", "--seeds", "3", "--repeats", "2", "--json"])
    sweep.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] == {
        "together": [2.0, 2.0],
        "one_by_one": [6.0, 6.0],
        "one_command_each": [12.0, 12.0],
    }
    assert found["ratio_to_one_by_one"] == 3.0
    assert found["ratio_to_one_command_each"] == 6.0
    assert found["cpu_ratio_to_one_command_each"] == 3.0
    assert 0 < found["largest_relative_difference_of_losses"] < 1e-6


def test_ways_that_made_other_stages_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="did not make the same stages"):
        sweep.difference({"a": [1.0]}, {"b": [1.0]})
    assert sweep.losses(tmp_path) == {}

"""`laif sweep`: which points there are, what runs once, what trains together; and it is what runs alone give."""

import json
import os
import time
from pathlib import Path

import pytest
from etils import epath

from laif_jax.cli.main import main
from laif_jax.config.load import ConfigError
from laif_jax.stages.artifact import run_stage
from laif_jax.studies import sweep_run
from laif_jax.studies.graph import Node
from laif_jax.studies.sweep_axes import Axis, label_of, make_points, read_axes
from laif_jax.studies.sweep_report import interval, page, summarise, table_text
from laif_jax.training import together
from tests.studies import tiny

SMALL = {
    "pretrain": ...,  # the base is left untrained
    "arms": [
        {"name": "SFT weak", "teacher": "weak", "share": 0.25},
        {"name": "LAIF weak", "teacher": "weak", "share": 0.25, "optimize": "dpo", "critic": "strong"},
    ],
    "questions": [],
}
AXES = ("seed=[0,1]", "dpo.beta=[0.1,0.5]")


@pytest.fixture
def study(tmp_path) -> str:
    return str(tiny.write(tmp_path, **SMALL))


def points(study, *arguments, paired=False):
    return make_points(study, *read_axes(study, arguments), paired=paired)


# ---- points ------------------------------------------------------------------------------------------------------


def test_points_are_all_combinations_in_order(study):
    found = points(study, "dpo.beta=[0.1,0.5]", "seed=[3,4]", "sft.steps=7")
    assert [point.label for point in found] == [
        "dpo.beta=0.1, seed=3",
        "dpo.beta=0.1, seed=4",
        "dpo.beta=0.5, seed=3",
        "dpo.beta=0.5, seed=4",
    ]
    assert [(point.config.dpo.beta, point.config.seed) for point in found] == [
        (0.1, 3),
        (0.1, 4),
        (0.5, 3),
        (0.5, 4),
    ]
    assert {point.config.sft.steps for point in found} == {7}
    assert {label_of(point.setting) for point in found} == {"dpo.beta=0.1", "dpo.beta=0.5"}


def test_zip_pairs_values(study):
    rates = "dpo.optimizer.learning_rate=[1e-3,1e-4]"
    found = points(study, "dpo.beta=[0.1,0.5]", rates, paired=True)
    assert [(p.config.dpo.beta, p.config.dpo.optimizer.learning_rate) for p in found] == [
        (0.1, 1e-3),
        (0.5, 1e-4),
    ]
    with pytest.raises(ConfigError, match=r"equally many: dpo\.beta has 2, seed has 3"):
        points(study, "dpo.beta=[0.1,0.5]", "seed=[0,1,2]", paired=True)


def test_a_list_for_a_key_that_takes_a_list_is_a_value(study):
    """`arms` is a list; of lists it is an axis."""
    one = '[{"name": "A", "teacher": "weak", "share": 0.5}]'
    other = '[{"name": "B", "teacher": "strong", "share": 0.5}]'
    fixed = ("dpo=null", "questions=[]")
    (found,) = points(study, f"arms={one}", *fixed, "seed=[5]")
    assert [arm.name for arm in found.config.arms] == ["A"]
    found = points(study, f"arms=[{one},{other}]", *fixed)
    assert [point.config.arms[0].name for point in found] == ["A", "B"]


def test_equal_values_are_one_point(study):
    assert len(points(study, "seed=[1,1,2]")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dpo.betta=[0.1]",), r"dpo\.betta: unknown key; did you mean `beta`"),
        (("dpo.beta=[0.1,high]",), r"point `dpo\.beta=high`: .*dpo\.beta: .*valid number"),
        (("dpo.beta=[]",), "has no values"),
        (("dpo.beta=0.1",), "at least one axis"),
        (("seed=[0]", "seed=[1]"), "given twice"),
        (("name=[a,b]",), "the whole sweep shares it"),
        (("seeds=[1,2]",), "give the values of `seed`"),
        (("labeling.poll=[1,2]",), "the whole sweep shares it"),
        (("dpo.label_smoothing=[0.1]",), "has no effect with `loss: sigmoid`"),
    ],
)
def test_mistakes_are_told_before_anything_runs(study, arguments, message):
    with pytest.raises(ConfigError, match=message):
        points(study, *arguments)


def test_other_files_are_told_apart(tmp_path):
    file = tmp_path / "reward.yaml"
    file.write_text("name: r\npairs: {}\n")
    with pytest.raises(ConfigError, match=r"runs the points of a study .* this file is a RewardConfig"):
        read_axes(str(file), ["seed=[0]"])


@pytest.mark.parametrize(
    "key", ["sft.batch_size", "model.scratch.num_layers", "dpo.optimizer.name", "dpo.loss"]
)
def test_what_is_compiled_in(key):
    assert Axis(key, (1,)).recompiles


@pytest.mark.parametrize(
    "key", ["seed", "dpo.beta", "sft.optimizer.learning_rate", "sampling.temperature", "sft.epochs", "name"]
)
def test_what_is_a_number_of_the_program(key):
    assert not Axis(key, (1,)).recompiles


def test_a_point_s_folder_is_a_plain_name(study):
    (found,) = points(study, "critics.strong.order=[both]")
    assert found.folder == "critics.strong.order=both"
    (found,) = points(study, 'arms=[[{"name": "A/../B", "teacher": "weak", "share": 0.5}]]', "dpo=null")
    assert "/" not in found.folder
    assert len(found.folder) <= 80


# ---- how many at once --------------------------------------------------------------------------------------------


def test_small_models_train_together_and_large_ones_do_not(study, monkeypatch):
    configs = [point.config for point in points(study, "seed=[0,1]")]
    assert sweep_run.members_at_once(configs, None)[0] == sweep_run.MOST
    weights = sweep_run.weights_of(configs[0])
    assert 1000 < weights < 10_000
    monkeypatch.setattr(sweep_run, "memory_bytes", lambda: int(5.5 * weights * 32 / 0.25))
    assert sweep_run.members_at_once(configs, None)[0] == 5
    monkeypatch.setattr(sweep_run, "SMALL", 1000)
    assert sweep_run.members_at_once(configs, None)[0] == 1
    assert sweep_run.members_at_once(configs, 7)[0] == 7
    assert sweep_run.members_at_once(configs, 1)[0] == 1


def test_wandb_is_one_by_one(study):
    configs = [point.config for point in points(study, "seed=[0,1]", "wandb=project")]
    assert sweep_run.members_at_once(configs, None) == (1, "`wandb` follows one run at a time")
    with pytest.raises(sweep_run.SweepError, match="--together 4: `wandb` follows one run"):
        sweep_run.members_at_once(configs, 4)


# ---- what runs beside what ---------------------------------------------------------------------------------------


def running(kind, number, root, seen):
    """A node of a stage that is under way until another one is, or for 0.3 s."""

    def work(folder):
        seen.append(number)
        end = time.monotonic() + 0.3
        while len(seen) < 2 and time.monotonic() < end:
            together.pause(0.001)
        seen.append(-number)
        return {}

    name = f"{kind}-{number}"
    return Node(name, lambda _: run_stage(kind, {"number": number}, {}, epath.Path(root), work))


@pytest.mark.parametrize(
    ("kind", "most", "order"),
    [
        ("label", 2, [1, 2, -1, -2]),
        ("evaluate", 2, [1, 2, -1, -2]),
        ("ppo", 2, [1, -1, 2, -2]),  # it holds its models while it waits
        ("label", 1, [1, -1, 2, -2]),
    ],
)
def test_stages_that_ask_wait_side_by_side(kind, most, order, tmp_path):
    """And a stage of two points is run once."""
    seen: list[int] = []
    nodes = [running(kind, number, tmp_path, seen) for number in (1, 2, 1)]
    found = sweep_run.execute_points([("", [node]) for node in nodes], most=most)
    assert sorted(seen) == sorted(order)
    assert seen[:2] == order[:2]
    assert [found[node].artifact.manifest["settings"]["number"] for node in nodes] == [1, 2, 1]


# ---- the table ---------------------------------------------------------------------------------------------------


def test_intervals_are_student_s():
    assert interval([2.0]) == {"mean": 2.0, "ci95": None, "n": 1}
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([2 - 4.302652730 / 3**0.5, 2 + 4.302652730 / 3**0.5])


def test_rows_are_settings_over_their_seeds(study):
    found = points(study, "dpo.beta=[0.1,0.5]", "seed=[0,1]")
    made = [
        (
            point,
            {
                "arms": {
                    "A": {"per_seed": [{"seed": point.config.seed, "win_rate": 10.0 * i, "mean_length": 5}]}
                }
            },
        )
        for i, point in enumerate(found)
    ]
    rows = summarise(made)
    assert [(row["label"], row["seeds"], row["win_rate"]["mean"]) for row in rows] == [
        ("dpo.beta=0.1", [0, 1], 5.0),
        ("dpo.beta=0.5", [0, 1], 25.0),
    ]
    assert "true_quality" not in rows[0]
    listed = [
        {"label": "<b>", "values": {}, "folder": "a b", "status": "done"},
    ]
    results = {
        "name": "n",
        "axes": ["dpo.beta", "seed"],
        "rows": rows,
        "points": listed,
        "notes": [],
        "verdicts": ["1 of 1"],
        "warnings": [],
        "settings": {},
    }
    assert "25.0 [" in table_text(results, 110)
    assert "quality" not in table_text(results, 110)
    html = page(results)
    assert "&lt;b&gt;" in html
    assert 'href="../a%20b/report/index.html"' in html


# ---- a whole sweep -----------------------------------------------------------------------------------------------


def laif(verb: str, folder: Path, *arguments: str) -> int:
    before = os.environ.get("LAIF_CACHE")
    os.environ["LAIF_CACHE"] = str(tiny.cache())
    try:
        return main([verb, str(tiny.write(folder, **SMALL)), *arguments])
    finally:
        if before is None:
            del os.environ["LAIF_CACHE"]
        else:
            os.environ["LAIF_CACHE"] = before


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert laif("sweep", folder, *AXES) == 0
    return folder


def sweep_json(folder: Path) -> dict:
    (file,) = folder.glob("runs/tiny/sweep-*/sweep.json")
    return json.loads(file.read_text())


def training(folder: Path) -> dict[str, list[dict]]:
    """Rows of metrics of every training stage, without speeds."""
    return {
        file.parent.parent.name: [
            {k: v for k, v in row.items() if not k.startswith("perf/")} for row in tiny.rows(file)
        ]
        for file in folder.glob("runs/tiny/*/train/metrics.jsonl")
    }


def test_a_sweep_trains_together_and_shares_stages(swept):
    results = sweep_json(swept)
    assert results["together"]["groups"] == [2, 4]  # SFT of two seeds; DPO of two betas each
    assert [point["status"] for point in results["points"]] == ["done"] * 4
    assert [(row["label"], row["arm"], row["seeds"]) for row in results["rows"]] == [
        (f"dpo.beta={beta}", arm, [0, 1]) for beta in (0.1, 0.5) for arm in ("SFT weak", "LAIF weak")
    ]
    kinds = [name.split("-")[0] for name in tiny.manifests(swept)]
    # Two seeds: what comes before DPO does not know beta.
    assert {kind: kinds.count(kind) for kind in ("prompts", "sft", "label", "dpo")} == {
        "prompts": 2,
        "sft": 2,
        "label": 2,
        "dpo": 4,
    }
    (folder,) = swept.glob("runs/tiny/sweep-*")
    assert (folder / "report" / "index.html").exists()
    for point in results["points"]:
        assert (folder / point["folder"] / "report" / "index.html").exists()
        assert json.loads((folder / point["folder"] / "results.json").read_text())["arms"]


def test_a_point_is_what_laif_run_makes(swept, tmp_path):
    """The same stages under the same keys, the same losses and the same results."""
    assert laif("run", tmp_path, "seed=1", "dpo.beta=0.5") == 0
    alone, together = training(tmp_path), training(swept)
    assert len(alone) == 2
    for name, rows in alone.items():
        assert [row.keys() for row in rows] == [row.keys() for row in together[name]]
        for row, other in zip(rows, together[name]):
            assert other == pytest.approx(row, rel=2e-5, abs=1e-6, nan_ok=True)
    (folder,) = swept.glob("runs/tiny/sweep-*")
    point = json.loads((folder / "seed=1,dpo.beta=0.5" / "results.json").read_text())
    for name, arm in tiny.results(tmp_path)["arms"].items():
        assert point["arms"][name]["per_seed"] == arm["per_seed"]


def test_what_is_finished_is_not_run_again(swept, capsys):
    before = {name: manifest["attempts"] for name, manifest in tiny.manifests(swept).items()}
    assert laif("sweep", swept, *AXES, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["together"]["groups"] == []
    assert [point["status"] for point in found["points"]] == ["done"] * 4
    assert {name: manifest["attempts"] for name, manifest in tiny.manifests(swept).items()} == before

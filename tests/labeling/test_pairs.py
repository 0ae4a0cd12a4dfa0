"""`laif label run`: the plan before it, the labels, what was spent, two tiers, and the quality of the labels."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from laif_jax.cli.main import main
from laif_jax.config import ConfigError
from laif_jax.config.load import load_label_config
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.pairs_example import write_example
from laif_jax.labeling.pairs_plan import VERDICT, plan_pairs
from laif_jax.records import read_jsonl, write_jsonl

SMALL = {"prompt_price": 0.1, "completion_price": 0.4}
LARGE = {"prompt_price": 2.0, "completion_price": 8.0}


def simulated(model: str, prices: dict[str, float] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "provider": "simulated",
        "model": model,
        "simulated": {"world": "symbols", **spec},
        **(prices or {}),
    }


def write(folder: Path, **changes: Any) -> str:
    """A configuration over the example's pairs."""
    if not (folder / "pairs.jsonl").exists():
        write_example(folder, 40)
    tree = {
        "pairs": {"path": str(folder / "pairs.jsonl"), "label": "truth"},
        "endpoint": simulated("small", SMALL, accuracy=0.9),
        "critic": "ab_logprob",
        "labels": str(folder / "labels.jsonl"),
        "labeling": {"store": str(folder / "labels"), "poll": 0.02},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def planned(path: str, *overrides: str) -> dict[str, Any]:
    return {f"{row.role} {row.name}": row for row in plan_pairs(load_label_config(path, overrides)).rows}


def kept(folder: Path, name: str = "results") -> dict[str, Any]:
    return json.loads((folder / "labels-report" / f"{name}.json").read_text())


def test_the_plan_comes_first_and_what_was_spent_last_and_both_are_kept(tmp_path, capsys) -> None:
    path = write(tmp_path)
    assert main(["label", "plan", path, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert (before["pairs"], before["total"]["calls"]) == (40, 80)
    assert main(["label", "run", path]) == 0
    said = capsys.readouterr().out
    assert said.index("planned, before anything is sent") < said.index("dashboard while it runs")
    assert said.index("dashboard while it runs") < said.index("planned, spent")
    assert "80 calls made, 0 answers from the store" in said

    found = kept(tmp_path)
    (row,) = found["spending"]["rows"]
    assert (row["planned"]["calls"], row["spent"]["calls"]) == (80, 80)
    assert 0 < row["spent"]["nanos"] < row["planned"]["nanos"] == before["nanos"]
    assert kept(tmp_path, "plan") == before
    page = (tmp_path / "labels-report" / "quality.html").read_text()
    assert "Planned against spent" in page
    assert "All runs" not in page
    labels = list(read_jsonl(tmp_path / "labels.jsonl"))
    assert len(labels) == 40
    assert {"truth", "p_b", "status", "critic_hash", "model"} <= set(labels[0])

    assert main(["label", "run", path]) == 0  # nothing is asked again, and what was spent is not forgotten
    found = kept(tmp_path)
    assert found["spending"]["spent"]["calls"] == found["spending"]["planned"]["calls"] == 0
    assert [run["spent"]["calls"] for run in found["runs"]] == [80, 0]
    assert "All runs" in (tmp_path / "labels-report" / "quality.html").read_text()
    assert planned(path)["critic ab_logprob"].stored == 80
    assert planned(path, "critic=laif_basic")["critic laif_basic"].calls == 80


def test_quality_recovers_what_is_known_of_the_pairs_and_of_their_writers(tmp_path, capsys) -> None:
    rows = [
        {
            "prompt": f"Q{i}", "a": f"left {i}", "b": f"right {i}", "quality_a": 0.9 - 0.8 * (i % 2),
            "quality_b": 0.1 + 0.8 * (i % 2), "generator_a": "me", "generator_b": "you", "human": [1 + i % 2],
        }
        for i in range(120)
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    path = write(
        tmp_path,
        pairs={"path": str(tmp_path / "pairs.jsonl")},
        endpoint=simulated("me", world="planted", accuracy=0.8, position_bias=0.5, sharpness=2.0),
    )
    assert main(["label", "run", path]) == 0
    (critic,) = kept(tmp_path, "quality")["critics"]
    low, high = critic["people"]["accuracy"]["ci95"]
    assert low - 1e-6 <= 0.8 <= high + 1e-6
    low, high = critic["position"]["logit"]["ci95"]
    assert low - 1e-4 <= 0.5 <= high + 1e-4
    assert critic["own"]["n"] == 120  # one side of each pair is by the critic's own model
    assert "agrees with your labels on" in capsys.readouterr().out
    assert main(["label", "quality", "--store", str(tmp_path / "labels"), "--pairs", path, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["critics"][0]
    assert again["people"]["accuracy"] == critic["people"]["accuracy"]


def test_two_tiers_tell_what_they_saved_with_planned_and_spent_of_each(tmp_path, capsys) -> None:
    path = write(
        tmp_path,
        endpoint=simulated("small", SMALL, accuracy=0.8, tie_rate=0.3, seed=3),
        strong={"endpoint": simulated("large", LARGE, seed=4), "critic": "rlaif_cot", "below": 0.2},
    )
    plan = planned(path)
    assert plan["critic ab_logprob"].calls == 80
    assert not plan["critic ab_logprob"].at_most
    strong = plan["critic ab_logprob > rlaif_cot"]
    assert strong.calls == 160  # two orders, a rationale and a verdict each
    assert len(strong.at_most) == 2
    assert main(["label", "run", path]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"two tiers: the strong critic was asked about \d+ of 40 pairs; .*saved about \d+ calls and \$", said
    )
    found = kept(tmp_path)
    tiers = found["tiers"]
    assert 0 < tiers["strong"]["comparisons"] < 40
    assert tiers["saved"]["cost"] > 0
    first, second = found["spending"]["rows"]
    assert (first["model"], second["model"]) == ("small", "large")
    assert first["spent"]["calls"] == tiers["first"]["calls"] == 80
    assert second["spent"]["calls"] == tiers["strong"]["calls"] == 4 * tiers["strong"]["comparisons"]
    assert second["spent"]["calls"] < second["planned"]["calls"]
    dollars = (first["spent"]["nanos"] + second["spent"]["nanos"]) / 1e9
    assert dollars == pytest.approx(tiers["first"]["cost"] + tiers["strong"]["cost"])
    labels = list(read_jsonl(tmp_path / "labels.jsonl"))
    assert {row["tier"] for row in labels} == {1, 2}
    assert {row["model"] for row in labels if row["tier"] == 2} == {"large"}
    report = kept(tmp_path, "quality")
    assert [critic["critic"] for critic in report["critics"]] == [
        "ab_logprob",
        "rlaif_cot",
        "two tiers: ab_logprob > rlaif_cot",
    ]
    assert [(row["one"], row["other"]) for row in report["between"]] == [("ab_logprob", "rlaif_cot")]
    page = (tmp_path / "labels-report" / "quality.html").read_text()
    assert "Two tiers" in page
    assert "saved (estimate)" in page
    again = planned(path)["critic ab_logprob > rlaif_cot"]
    assert (again.calls, again.stored) == (160 - second["spent"]["calls"], second["spent"]["calls"])


def test_a_critic_that_thinks_is_planned_exactly_once_its_rationales_are_stored(tmp_path) -> None:
    path = write(tmp_path, critic="rlaif_cot")
    assert main(["label", "run", path, "pairs.limit=10"]) == 0
    row = planned(path, "pairs.limit=10")["critic rlaif_cot"]
    assert (row.calls, row.stored, row.at_most) == (0, 40, [])
    row = planned(path)["critic rlaif_cot"]
    assert (row.calls, row.stored, row.at_most) == (120, 40, [VERDICT])


def test_equal_pairs_are_planned_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("laif_jax.labeling.pairs_plan.WINDOW", 7)  # also where they are far apart
    rows = list(read_jsonl(write_example(tmp_path, 20)[0]))
    same = [{**rows[0], "b": rows[0]["a"]}]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, *rows, *same])
    for critic, calls in (("ab_logprob", 40), ("rlaif_cot", 80)):
        (row,) = planned(write(tmp_path, critic=critic)).values()
        assert row.calls == calls


def test_a_drift_probe_is_planned_and_booked_by_itself(tmp_path) -> None:
    write_jsonl(tmp_path / "probe.jsonl", list(read_jsonl(write_example(tmp_path / "other", 5, seed=9)[0])))
    labeling = {"store": str(tmp_path / "labels"), "probe": str(tmp_path / "probe.jsonl"), "poll": 0.02}
    path = write(tmp_path, labeling=labeling)
    assert planned(path)["probe ab_logprob"].calls == 10
    assert main(["label", "run", path]) == 0
    rows = {row["roles"][0]: row for row in kept(tmp_path)["spending"]["rows"]}
    assert rows["probe ab_logprob"]["spent"]["calls"] == 10
    assert rows["critic ab_logprob"]["spent"]["calls"] == 80
    (drift,) = kept(tmp_path, "quality")["drift"]
    assert list(drift["rounds"].values()) == [5]
    assert planned(path)["probe ab_logprob"].calls == 0  # once a day


def test_a_run_that_meets_its_budget_tells_what_it_spent(tmp_path, capsys) -> None:
    path = write(tmp_path, budget="0.00015USD", labeling={"store": str(tmp_path / "labels"), "poll": 0.02})
    assert main(["label", "run", path]) == 2
    said = capsys.readouterr()
    assert "out of budget" in said.err
    assert "planned, spent" in said.out
    found = kept(tmp_path)
    assert "out of budget" in found["error"]
    assert 0 < found["spending"]["spent"]["calls"] < 80
    assert found["spending"]["spent"]["nanos"] <= 150_000
    assert main(["label", "run", path, "budget=1USD"]) == 0
    runs = kept(tmp_path)["runs"]
    assert sum(run["spent"]["calls"] for run in runs) == 80
    assert runs[1]["planned"]["calls"] == runs[1]["spent"]["calls"]


def test_what_cannot_work_is_told_before_anything_is_sent(tmp_path, capsys) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        load_label_config(path, ["labels=labels.csv"])
    with pytest.raises(ConfigError, match="25USD"):
        load_label_config(path, ["budget=lots"])
    assert main(["label", "run", path, "critic=rating_1_10"]) == 2
    assert "take one that compares" in capsys.readouterr().err
    unknown = {
        "provider": "openai",
        "base_url": "http://127.0.0.1:9/v1",
        "model": "gpt-99",
        "client": "plain",
    }
    with pytest.raises(EndpointError, match="no price"):
        plan_pairs(load_label_config(write(tmp_path, endpoint=unknown, budget="1USD")))
    assert plan_pairs(load_label_config(write(tmp_path, endpoint=unknown))).nanos is None
    elsewhere = write(tmp_path, labeling={"store": "postgresql://me:secret@host:5432/labels"})
    assert main(["label", "run", elsewhere]) == 2
    told = capsys.readouterr().err
    assert "labeling.url" in told
    assert "secret" not in told
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("trouble", ["garbage_rate", "failure_rate"])
def test_a_run_without_one_label_ends_with_a_report(tmp_path, capsys, trouble: str) -> None:
    endpoint = {**simulated("small", SMALL, **{trouble: 1.0}), "max_attempts": 1}
    path = write(tmp_path, endpoint=endpoint, pairs={"path": str(tmp_path / "pairs.jsonl"), "limit": 3})
    assert main(["label", "run", path]) == 0
    assert "3 pairs have no label" in capsys.readouterr().out
    (critic,) = kept(tmp_path, "quality")["critics"]
    assert critic["coverage"]["value"] == 0.0
    assert "gave a label to only 0.0%" in (tmp_path / "labels-report" / "quality.html").read_text()


def test_with_another_service_what_was_spent_is_its_to_tell(tmp_path, capsys) -> None:
    from laif_jax.labeling import start_service

    with start_service(tmp_path / "labels") as service:
        path = write(tmp_path, labeling={"url": service.url, "poll": 0.02})
        assert main(["label", "run", path, "pairs.limit=5"]) == 0
        assert main(["label", "run", path, "pairs.limit=5"]) == 0
    said = capsys.readouterr().out
    assert "10 calls made, 0 answers from the store" in said
    found = kept(tmp_path)
    assert found["spending"]["spent"] is None
    assert found["spending"]["planned"]["calls"] == 10  # it cannot be known what that store holds
    assert any("labeling.url" in note for note in found["spending"]["notes"])
    assert [run["spent"] for run in found["runs"]] == [None, None]
    assert "Planned against spent" in (tmp_path / "labels-report" / "quality.html").read_text()

"""Money of a study: what is planned and spent, and a budget that stops it and lets it go on."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from laif_jax.cli.main import main
from laif_jax.labeling.budget import show_money
from tests.studies import tiny

PRICES = {"prompt_price": 1.0, "completion_price": 2.0}
ENDPOINTS = {name: {**endpoint, **PRICES} for name, endpoint in tiny.TREE["endpoints"].items()}


# Only SFT, so that little is trained.
ARMS = {
    "arms": [{"name": "SFT weak", "teacher": "weak", "share": 0.25}],
    "questions": [],
    "critics": ...,
    "dpo": ...,
    "sampling": ...,
}


def test_a_study_out_of_budget_keeps_what_it_has_and_goes_on_when_it_is_raised(tmp_path, capsys) -> None:
    study: dict[str, Any] = {"endpoints": ENDPOINTS, **ARMS}
    assert tiny.run(tmp_path, "labeling.budget=0.004USD", **study) == 1
    said = " ".join(tiny.results(tmp_path)["warnings"])
    assert "is out of budget" in said
    assert "`labeling.budget`" in said
    before = booked(tmp_path)
    assert 0 < before["nanos"] <= 4_000_000
    assert before["answered"] > 0

    capsys.readouterr()
    assert tiny.run(tmp_path, "labeling.budget=1USD", **study) == 0
    found = tiny.results(tmp_path)
    assert not any("budget" in warning for warning in found["warnings"])
    assert {row["status"] for row in found["stages"]} == {"done"}
    after = booked(tmp_path)
    assert after["answered"] == after["requests"] == after["calls"]  # nothing was paid twice

    spending = found["spending"]
    assert spending["spent"]["calls"] == after["calls"]
    assert spending["spent"]["nanos"] == after["nanos"]
    # The plan counts identical answers too, which nobody is asked about, and takes texts at their longest.
    assert spending["planned"]["calls"] >= after["calls"]
    assert spending["planned"]["nanos"] > after["nanos"]
    asked = {role: row for row in spending["rows"] for role in row["roles"]}
    assert set(asked) == {"teacher weak", "teacher strong", "judge strong"}
    assert asked["teacher weak"]["planned"]["calls"] == asked["teacher weak"]["spent"]["calls"] == 10
    assert asked["teacher strong"]["planned"]["calls"] == asked["teacher strong"]["spent"]["calls"] == 16
    assert json.loads((tmp_path / "runs" / "tiny" / "plan.json").read_text())["nanos"] > 0

    terminal = capsys.readouterr().out
    assert terminal.index("planned, before anything is sent") < terminal.index("planned, spent")
    page = (tmp_path / "runs" / "tiny" / "report" / "index.html").read_text()
    assert "Planned against spent" in page
    assert show_money(after["nanos"]) in page
    assert show_money(after["nanos"]) in terminal


def booked(folder: Path) -> dict[str, int]:
    """What the study's store holds: nano-dollars, and counts."""
    queries = {
        "nanos": "select spent + presumed from budgets where scope = 'service'",
        "answered": "select count(*) from responses",
        "requests": "select count(*) from requests",
        "calls": "select count(*) from usage",
    }
    with contextlib.closing(sqlite3.connect(folder / "runs" / "tiny" / "labels" / "labels.sqlite")) as store:
        return {name: store.execute(query).fetchone()[0] for name, query in queries.items()}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["labeling.budget=lots"], "25USD"),
        (["labeling.job_budget=none"], "25USD"),
        (["labeling.url=http://127.0.0.1:9", "labeling.budget=1USD"], "laif label budget"),
    ],
)
def test_a_budget_that_means_nothing_is_told_before_anything_runs(tmp_path, capsys, settings, says) -> None:
    assert main(["run", str(tiny.write(tmp_path)), *settings]) != 0
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or json.dumps(tiny.manifests(tmp_path)) == "{}"

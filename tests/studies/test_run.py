"""A whole study, from `laif run` to its report: what it leaves, and what running it again does."""

import html.parser
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from laif_jax.cli.main import main
from laif_jax.config import load_config
from laif_jax.models.model import load_model
from laif_jax.records import Judgement, Preference, Prompt, read_jsonl
from tests.studies import tiny


@pytest.fixture(scope="module")
def study() -> Path:
    """`runs/tiny` of the finished study."""
    return tiny.finished() / "runs" / "tiny"


@pytest.fixture(scope="module")
def results(study):
    return json.loads((study / "results.json").read_text())


def stage(study: Path, kind: str) -> Path:
    (found,) = study.glob(f"{kind}-*")
    return found


# ---- what it leaves --------------------------------------------------------------------------------------------


def test_results(results, study):
    assert list(results["arms"]) == ["SFT weak", "SFT strong", "LAIF weak"]
    for arm in results["arms"].values():
        assert 0 <= arm["win_rate"] <= 100
        assert arm["standard_error"] >= 0
        assert arm["n"] == 16
        assert arm["mean_length"] > 0
        assert arm["wins"] + arm["ties"] + arm["losses"] == 16
    assert len(results["comparisons"]) == 3
    for row in results["comparisons"]:
        assert row["delta"] == pytest.approx(
            results["arms"][row["a"]]["win_rate"] - results["arms"][row["b"]]["win_rate"]
        )
        assert row["ci95"][0] <= row["delta"] <= row["ci95"][1]
        assert 0 < row["p_value"] <= 1
    assert "LAIF weak" in results["answer"]
    assert {row["status"] for row in results["stages"]} == {"done"}
    # Three arms, two of which start from one SFT: it was trained once.
    assert len(list(study.glob("sft-*"))) == 2
    assert len(list(study.glob("dpo-*"))) == 1
    json.loads(
        (study / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


class _Resources(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        loaded = {"src", "srcset", "data", "poster", "xlink:href"} | ({"href"} if tag != "a" else set())
        self.found += [value or "" for name, value in attributes if name in loaded]


def test_the_report_needs_no_other_file(study):
    page = (study / "report" / "index.html").read_text()
    resources = _Resources()
    resources.feed(page)
    assert [name for name in resources.found if not name.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)
    for name in ("SFT weak", "SFT strong", "LAIF weak"):
        assert name in page


def test_the_resolved_configuration_is_the_same_study(study):
    saved = load_config(study / "config.yaml")
    assert saved == load_config(tiny.finished() / "tiny.yaml")


def test_every_preference_leads_back_to_what_the_critic_said(study):
    folder = stage(study, "label")
    preferences = [Preference.from_row(row) for row in read_jsonl(folder / "preferences.jsonl.gz")]
    merged = {j.id: j for row in read_jsonl(folder / "judgements.jsonl.gz") if (j := Judgement.from_row(row))}
    rows = read_jsonl(folder / "single_order_judgements.jsonl.gz")
    single = {j.id: j for row in rows if (j := Judgement.from_row(row))}
    metrics = tiny.manifests(tiny.finished())[folder.name]["metrics"]
    assert len(preferences) == metrics["preferences"] > 0
    assert metrics["comparisons"] == len(merged) == metrics["ok"] + metrics["tie"]
    trained = {row["prompt"]["id"] for row in read_jsonl(stage(study, "prompts") / "train.jsonl.gz")}
    for preference in preferences:
        first, *parts = (preference.judgement_ids[0], *preference.judgement_ids[1:])
        judgement = merged[first]
        assert judgement.parts == tuple(parts)
        orders = {single[part].order: single[part].p_b for part in parts}
        assert set(orders) == {"ab", "ba"}
        assert judgement.p_b == pytest.approx(np.mean(list(orders.values())))
        assert preference.p_chosen == pytest.approx(max(judgement.p_b, 1 - judgement.p_b))
        assert preference.prompt.id in trained
        assert preference.chosen.text != preference.rejected.text


def test_nothing_evaluated_was_trained_on_and_sft_and_preferences_use_different_prompts(study):
    folder = stage(study, "prompts")
    train = [Prompt.from_row(row["prompt"]).id for row in read_jsonl(folder / "train.jsonl.gz")]
    evaluated = {row["prompt"]["id"] for row in read_jsonl(folder / "eval.jsonl.gz")}
    assert evaluated.isdisjoint(train)
    asked = {row["prompt"]["id"] for row in read_jsonl(stage(study, "label") / "preferences.jsonl.gz")}
    assert asked <= set(train[10:])  # the first quarter was for SFT


def test_trained_models_load_and_differ_from_what_they_started_from(study):
    (base,) = study.glob("pretrain-*")
    loaded = [
        load_model(str(folder / "model")) for folder in (base, *study.glob("sft-*"), *study.glob("dpo-*"))
    ]
    weights = [np.asarray(model.params["layers"]["mlp"]["up"]["kernel"]) for model in loaded]
    assert len({array.tobytes() for array in weights}) == 4
    assert all(model.tokenizer.decode(model.tokenizer("rev:ab").input_ids) == "rev:ab" for model in loaded)


def test_outputs_are_in_alpaca_evals_form(study):
    files = sorted(study.glob("evaluate-*/model_outputs.json"))
    instructions = [
        Prompt.from_row(row["prompt"]).instruction
        for row in read_jsonl(stage(study, "prompts") / "eval.jsonl.gz")
    ]
    generators = set()
    for file in files:
        rows = json.loads(file.read_text())
        assert [set(row) for row in rows] == [{"instruction", "output", "generator", "dataset"}] * 16
        assert [row["instruction"] for row in rows] == instructions
        generators |= {row["generator"] for row in rows}
    assert generators == {"SFT weak", "SFT strong", "LAIF weak"}


# ---- again -----------------------------------------------------------------------------------------------------


def test_a_second_run_runs_no_stage_and_asks_nobody(tmp_path, results):
    folder = tiny.copy_of_finished(tmp_path)
    before, paid = tiny.manifests(tmp_path), tiny.calls(tmp_path)
    log = (folder / "labels" / "service.log").stat().st_mtime_ns
    assert tiny.run(tmp_path) == 0
    assert tiny.manifests(tmp_path) == before
    assert tiny.calls(tmp_path) == paid
    assert (folder / "labels" / "service.log").stat().st_mtime_ns == log  # the service was not even started
    assert tiny.numbers(tiny.results(tmp_path)) == tiny.numbers(results)


def test_a_changed_setting_runs_again_what_depends_on_it_and_nothing_else(tmp_path):
    tiny.copy_of_finished(tmp_path)
    before, paid = tiny.manifests(tmp_path), tiny.calls(tmp_path)
    assert tiny.run(tmp_path, "evaluation.judge.critic=ab_logprob", "evaluation.bootstrap=100") == 0
    after = tiny.manifests(tmp_path)
    assert {name: manifest for name, manifest in after.items() if name in before} == before
    assert (
        sorted(manifest["kind"] for name, manifest in after.items() if name not in before) == ["evaluate"] * 3
    )
    assert tiny.calls(tmp_path) > paid


def test_answers_are_not_paid_for_twice_when_a_stage_is_lost(tmp_path, results):
    tiny.copy_of_finished(tmp_path, without=["teach", "label", "evaluate"])
    paid = tiny.calls(tmp_path)
    assert tiny.run(tmp_path) == 0
    assert tiny.calls(tmp_path) == paid
    assert tiny.numbers(tiny.results(tmp_path)) == tiny.numbers(results)


def _killed(folder: Path, after_stages: int, delay: float) -> None:
    """Starts the study and sends SIGKILL `delay` seconds after that many stages are done."""
    environment = {**os.environ, "LAIF_CACHE": str(tiny.cache())}
    command = [sys.executable, "-m", "laif_jax.cli", "run", str(tiny.write(folder))]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            limit = time.monotonic() + 120
            while sum(m["status"] == "done" for m in tiny.manifests(folder).values()) < after_stages:
                assert process.poll() in (None, 0), (folder / "log").read_text()
                assert time.monotonic() < limit, (folder / "log").read_text()
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _killed_and_run_again(tmp_path, results, kills: int) -> None:
    tiny.finished()
    chance = random.Random()
    moments = sorted((chance.randrange(0, 14), chance.uniform(0, 1.0)) for _ in range(kills))
    for stages, delay in moments:
        _killed(tmp_path, stages, delay)
    # At once: what the killed run started may still be ending.
    assert tiny.run(tmp_path) == 0, moments
    assert tiny.numbers(tiny.results(tmp_path)) == tiny.numbers(results), moments


def test_killed_at_a_random_moment_and_run_again_gives_the_same_numbers(tmp_path, results):
    _killed_and_run_again(tmp_path, results, 1)


@pytest.mark.slow
def test_killed_many_times_gives_the_same_numbers(tmp_path, results):
    _killed_and_run_again(tmp_path, results, 8)


def test_the_table_and_the_reports_path_go_to_standard_output(tmp_path, capsys):
    folder = tiny.copy_of_finished(tmp_path)
    capsys.readouterr()
    assert tiny.run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "LAIF weak" in out
    assert out.splitlines()[-1] == f"report: {folder / 'report' / 'index.html'}"


def test_the_report_is_made_again_from_what_is_there(tmp_path, study, capsys):
    folder = tiny.copy_of_finished(tmp_path)
    (folder / "report" / "index.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report" / "index.html")
    again = (folder / "report" / "index.html").read_text()
    assert len(again) == len((study / "report" / "index.html").read_text())

"""`laif reward` from its YAML file to its page; and its model as the critic of a study's stage."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from laif_jax.cli.main import main
from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling import EndpointError, running
from laif_jax.records import Comparison, Completion, Prompt, Status, read_jsonl, write_jsonl
from laif_jax.stages import label
from laif_jax.stages.context import Context, Services
from laif_jax.studies.reward import REWARD
from laif_jax.studies.reward_report import data_rows, render, reward_table, verdicts, warnings
from laif_jax.studies.single import run_folder
from tests.studies import tiny_reward

HOSTILE = "<script>alert(1)</script> & \x1b[31m"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("laif-reward")
    config = tiny_reward.write(folder)
    rows = list(read_jsonl(folder / "short.jsonl"))
    write_jsonl(folder / "short.jsonl", [{**row, "length": HOSTILE} for row in rows])
    assert main(["reward", str(config)]) == 0
    return folder / "runs" / "tiny"


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_a_run_leaves_results_a_page_and_a_model(finished) -> None:
    found = results(finished)
    assert found["kind"] == "reward"
    assert list(found["sets"]) == ["held_out", "short", "human"]
    for row in found["sets"].values():
        assert row["accuracy"] is not None
        assert row["longest_wins"] is not None
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert [point["step"] for point in found["rates"][0]["curve"]] == [0, 12, 24]
    assert (Path(found["model"]["folder"]) / "reward.json").exists()
    assert len(found["verdicts"]) == 2, "of the test sets; held-out pairs chose the rate"
    json.dumps(found, allow_nan=False)


def test_the_page_is_whole_safe_and_can_be_made_again(finished, capsys) -> None:
    page = (finished / "report" / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 6
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    (finished / "report" / "index.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report" / "index.html").read_text() == page
    assert "index.html" in capsys.readouterr().out


def test_the_same_command_again_trains_nothing(finished, capsys) -> None:
    (stage,) = finished.glob("reward-*")
    before = (stage / "manifest.json").read_bytes()
    assert main(["reward", str(finished.parents[1] / "tiny.yaml")]) == 0
    assert (stage / "manifest.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert "accuracy of the reward model" in printed
    assert "Taking the longer one is right in" in " ".join(printed.split())


def test_mistakes_are_told_before_anything_runs(tmp_path, capsys) -> None:
    config = str(tiny_reward.write(tmp_path))
    for override, words in (
        ("reward.held_out=0", "`eval_every` needs held-out pairs"),
        ("reward.los=x", "did you mean `loss`"),
        ("pairs.train.prompt=question", "no column `question`"),
        ("pairs.train.path=nothing.jsonl", "no such file"),
    ):
        assert main(["reward", config, override]) == 2
        assert words in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/reward-*/train"))


# ---- in words --------------------------------------------------------------------------------------------------


def report(accuracy: float, gain: float, **changes) -> dict:
    return {
        "n": 100,
        "ties": 3,
        "prompts": 50,
        "accuracy": accuracy,
        "ci95": [accuracy - 0.05, accuracy + 0.05],
        "longest_wins": accuracy - gain,
        "longest_ci95": [accuracy - gain - 0.05, accuracy - gain + 0.05],
        "gain": gain,
        "gain_ci95": [gain - 0.04, gain + 0.04],
        "by_length": [],
        "groups": {},
        "calibration": {"bins": [], "ece": None, "log_loss": None, "overconfidence": None},
        "distribution": {},
        "members": None,
        "unused": 0,
        "response_truncated": 0,
        **changes,
    }


def test_what_the_page_says_of_the_baseline() -> None:
    sets = {
        "held_out": report(0.9, 0.2),
        "x_y": report(0.6, -0.2),
        "z": report(0.7, 0.01),
        "w": report(0.8, 0.3),
    }
    worse, same, better = verdicts(sets)
    assert worse.startswith("x y: the preferred response scores higher in 60.0% of 100 pairs")
    assert "worse than that (-20.0 points, -24.0 to -16.0)" in worse
    assert "not told apart from that" in same
    assert "better than that (+30.0 points" in better
    assert len(verdicts({"held_out": report(0.9, 0.2)})) == 1


def test_warnings() -> None:
    rates: list[dict[str, Any]] = [{"learning_rate": rate} for rate in (1e-5, 1e-4, 1e-3)]
    metrics = {
        "sets": {"x": report(0.52, 0.0, unused=2, response_truncated=40)},
        "rates": rates,
        "learning_rate": 1e-3,
    }
    coin, cut, unused, edge = warnings(metrics)
    assert "coin" in coin
    assert "40 of 103 pairs" in cut
    assert "2 pairs of x" in unused
    assert "highest tried" in edge
    rates[0]["failed"] = "nan"
    metrics |= {"learning_rate": 1e-4, "sets": {}}
    assert warnings(metrics) == ["Training was not finite at learning rate 1e-05."]


def test_a_run_without_any_measure_still_has_a_page(finished) -> None:
    found = results(finished) | {"sets": {}, "verdicts": [], "rates": [{"learning_rate": 1.0, "curve": []}]}
    page = render(found, {"curves": {}})
    assert "nothing is known of this model" in page
    assert "<svg" not in page
    assert "accuracy of the reward model" in reward_table(found)


def test_what_was_left_out_is_told() -> None:
    counts = {"read": 9, "kept": 5, "ties": 1, "prompts": 4, "identical": 3, "empty": 1}
    data = {"train": counts, "tests": {"t": counts}, "dropped_because_in_test": 2, "ties_dropped": 1}
    rows = data_rows({**data, "held_out": 1, "used": 1})
    assert rows[0]["left_out"] == (
        "1 with an empty response, 3 of two identical responses, 2 of prompts in a test set, 1 tied, 1 held out"
    )
    assert rows[1]["left_out"] == "1 with an empty response, 3 of two identical responses"


# ---- as a critic -----------------------------------------------------------------------------------------------


def test_a_reward_model_is_a_studys_critic(finished, tmp_path) -> None:
    folder = results(finished)["model"]["folder"]
    wrong = EndpointSpec(provider="checkpoint", checkpoint=folder)
    with pytest.raises(EndpointError, match="reward: true"), running(wrong):
        pass
    rows = list(read_jsonl(finished.parents[1] / "human.jsonl"))
    items = []
    for row in rows:
        prompt = Prompt.from_text(row["prompt"])
        a, b = (Completion(prompt_id=prompt.id, generator=side, text=row[side]) for side in "ab")
        items.append(Comparison(prompt=prompt, a=a, b=b))
    (stage,) = finished.glob("reward-*")
    scores = {
        (row["prompt_id"], row["length_a"], row["length_b"]): row["score_b"] - row["score_a"]
        for row in read_jsonl(stage / "scores-human.jsonl.gz")
    }
    config = tiny_reward.config(
        tmp_path,
        endpoints={"rm": {"provider": "checkpoint", "checkpoint": folder, "reward": True}},
        critics={
            "soft": {"endpoint": "rm", "critic": "ab_logprob", "order": "both"},
            "hard": {"endpoint": "rm", "critic": "pairwise_json", "order": "seeded"},
        },
    )
    with Services(config, epath.Path(tmp_path)) as services:
        ctx = Context(config, epath.Path(tmp_path), 0, services)
        soft, hard = (label.judge(ctx, config.critics[name], items) for name in ("soft", "hard"))
    for item, one, other in zip(items, soft, hard, strict=True):
        difference = scores[item.prompt.id, len(item.a.text), len(item.b.text)]
        assert one.status in (Status.OK, Status.TIE)
        assert one.p_b == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-4)
        assert other.p_b == float(difference > 0)


def test_the_run_folder_holds_the_scale(tmp_path) -> None:
    config = tiny_reward.config(tmp_path)
    assert run_folder(config).name == "tiny"
    assert run_folder(config.model_copy(update={"scale": "cpu"})).name == "tiny-cpu"
    assert not REWARD.wrote(tmp_path)

"""The quality report recovers what was planted in a simulated critic, from the store alone; and sees drift."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from laif_jax.cli.main import main
from laif_jax.config.schema import SimulatedSpec
from laif_jax.evaluation.drift import drift
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.judged import Judged, read_files, read_store
from laif_jax.labeling.pair_files import LabelledPair
from laif_jax.labeling.probe import SHIPPED, probe_set
from laif_jax.labeling.store import Store
from laif_jax.labeling.transfer import export_store
from laif_jax.records import Comparison, Completion, DataError, Prompt, write_jsonl
from laif_jax.studies.quality import quality
from tests.labeling.helpers import run_job, simulated

PLANTED: dict[str, Any] = {"accuracy": 0.8, "position_bias": 0.6, "length_bias": 1.5, "sharpness": 2.0}


def pairs(count: int, seed: int) -> list[LabelledPair]:
    """Pairs of two per prompt, of lengths that say nothing about their quality."""
    rng, found = random.Random(seed), []
    for i in range(count):
        prompt = Prompt.from_text(f"Question {seed}-{i // 2}")
        better = rng.randint(1, 2)
        sides = [
            Completion(
                prompt_id=prompt.id,
                generator=name,
                text=f"{name}{i} " + "." * rng.randrange(10, 200),
                meta={"quality": 0.9 if better == number else 0.2},
            )
            for number, name in ((1, "left"), (2, "right"))
        ]
        found.append(LabelledPair(Comparison(prompt=prompt, a=sides[0], b=sides[1]), (better,), "planted"))
    return found


def judged(
    folder: Path, items: list[LabelledPair], endpoint: Endpoint, critic="ab_logprob", **rest
) -> Judged:
    job = JudgeJob(
        endpoint=endpoint, critic=critic, comparisons=tuple(item.comparison for item in items), **rest
    )
    status, _, _ = run_job(folder, job)
    assert status.state == "done", status.reason
    store = Store(folder)
    try:
        found = read_store(store)
    finally:
        store.close()
    found.label(items)
    return found


def holds(block, value: float) -> bool:
    low, high = block["ci95"]
    return low - 1e-4 <= value <= high + 1e-4


def test_what_was_planted_is_recovered_within_the_intervals(tmp_path) -> None:
    held: dict[str, list[bool]] = {}
    for seed in range(6):
        items = pairs(150, seed)
        endpoint = simulated(seed=seed, **PLANTED)
        report = quality(judged(tmp_path / str(seed), items, endpoint), samples=300)
        (critic,) = report["critics"]
        assert critic["length"]["method"] == "logits"
        # Averaged over both orders position cancels, and length turns the weaker verdicts: the sharpness outweighs it.
        checks = {
            "accuracy": holds(critic["people"]["accuracy"], 0.8),
            "position": holds(critic["position"]["logit"], 0.6),
            "length": holds(critic["length"]["slope"], 1.5),
            "length beyond people": holds(critic["length"]["slope_beyond_people"], 1.5),
        }
        for name, there in checks.items():
            held.setdefault(name, []).append(there)
        assert critic["length"]["slope"]["ci95"][0] > 0.3  # and the bias is seen, not only not excluded
    # Each interval misses one time in twenty: three or more misses of six have a chance of 0.2%.
    assert all(sum(found) >= 4 for found in held.values()), held


def test_a_critic_without_biases_is_not_accused(tmp_path) -> None:
    report = quality(judged(tmp_path, pairs(200, 3), simulated(accuracy=0.8, seed=1)), samples=300)
    (critic,) = report["critics"]
    assert holds(critic["position"]["first_wins"], 0.5)
    assert holds(critic["length"]["slope"], 0.0)
    assert critic["swap"]["consistency"]["value"] == 1.0
    assert critic["own"] is None
    assert not [text for text in report["warnings"] if "favours" in text or "longer" in text]


def test_a_text_critics_position_bias_is_seen_as_a_share(tmp_path) -> None:
    endpoint = simulated(position_bias=100.0)
    (critic,) = quality(judged(tmp_path, pairs(30, 0), endpoint, "laif_basic"), samples=100)["critics"]
    assert critic["position"]["first_wins"]["value"] == 1.0
    assert critic["swap"]["consistency"]["value"] == 0.0
    assert critic["length"]["method"] == "verdicts"


def test_samples_give_test_retest_and_own_generators_self_preference(tmp_path) -> None:
    critic = load_critic("ab_logprob").adapted(samples=3, temperature=1.0)
    endpoint = simulated(sharpness=1.0, noise=1.0).model_copy(update={"model": "Left"})
    items = pairs(60, 1)
    (found,) = quality(judged(tmp_path, items, endpoint, critic), samples=100)["critics"]
    assert found["repeats"]["n"] == 120
    assert found["repeats"]["same"]["ci95"][0] > found["repeats"]["random"]["same"]
    assert 0.5 < found["repeats"]["same"]["value"] < 1.0
    assert found["own"]["n"] == 60  # the generator "left" is the model "Left"
    assert holds(found["own"]["beyond_people"], 0.0)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_store_its_export_and_a_file_of_judgements_say_the_same(tmp_path) -> None:
    items = pairs(20, 5)
    found = judged(tmp_path / "store", items, simulated(**PLANTED))
    expected = quality(found, samples=50)
    store = Store(tmp_path / "store")
    export_store(store, tmp_path / "export.jsonl.gz")
    rows = [json.loads(line) for job in store.job_list() for part in (False, True)
            for line in store.job_results(job["id"], parts=part)]  # fmt: skip
    store.close()
    write_jsonl(tmp_path / "judgements.jsonl", rows)
    for name in ("export.jsonl.gz", "judgements.jsonl"):
        again = read_files([tmp_path / name])
        assert again.label(items) == 20
        assert quality(again, samples=50)["critics"][0]["people"] == expected["critics"][0]["people"]
        assert quality(again, samples=50)["critics"][0]["length"] == expected["critics"][0]["length"]


def test_labels_of_a_pair_that_was_judged_the_other_way_round_are_turned(tmp_path) -> None:
    items = pairs(20, 6)
    turned = [
        LabelledPair(
            Comparison(prompt=i.comparison.prompt, a=i.comparison.b, b=i.comparison.a), (3 - i.human[0],)
        )
        for i in items
    ]
    found = judged(tmp_path, items, simulated())
    assert found.label(turned) == 20
    assert quality(found, samples=50)["critics"][0]["people"]["accuracy"]["value"] == 1.0


def test_files_that_hold_nothing_are_told(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no judgement"):
        read_files([tmp_path / "empty.jsonl"])
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"row 1: no judgement"):
        read_files([tmp_path / "other.jsonl"])


# ---- drift --------------------------------------------------------------------------------------------------------


def probe(folder: Path, number: str, **spec) -> tuple[int, Judged]:
    endpoint = Endpoint(
        provider="simulated", simulated=SimulatedSpec(world="planted", accuracy=0.7, drift=0.9, **spec)
    )
    job = JudgeJob(endpoint=endpoint, critic="ab_logprob", comparisons=probe_set(SHIPPED), probe=number)
    status, _, _ = run_job(folder, job)
    store = Store(folder)
    try:
        return status.calls, read_store(store)
    finally:
        store.close()


def test_a_probe_is_asked_anew_in_each_round_and_tells_of_a_model_that_changed(tmp_path) -> None:
    count = len(probe_set(SHIPPED))
    assert probe(tmp_path, "2026-01-01")[0] == 2 * count
    assert probe(tmp_path, "2026-01-01")[0] == 0  # not paid for twice in one round
    calls, calm = probe(tmp_path, "2026-01-02")
    assert calls == 2 * count
    report = quality(calm, samples=100)
    assert report["drift"][0]["against_first"][0]["same"]["value"] == 1.0
    assert not [text for text in report["warnings"] if "Drift" in text]
    assert report["critics"] == []  # a probe's answers are no labels
    _, changed = probe(tmp_path, "2026-01-03", version=1)
    report = quality(changed, samples=100)
    late = report["drift"][0]["against_first"][-1]
    assert late["round"] == "2026-01-03"
    assert late["changed"] > 0
    assert any("changed" in text and "2026-01-03" in text for text in report["warnings"])
    assert any("calls itself" in text for text in report["warnings"])  # the fingerprint, too


def test_drift_by_hand() -> None:
    rounds = {"1": {"x": 0.9, "y": 0.51, "z": None}, "2": {"x": 0.2, "y": 0.495, "z": 0.7}}
    (row,) = drift(rounds, samples=50)
    # y moved by less than what counts; z has no label in the first round.
    assert (row["n"], row["changed"], row["lost"], row["gained"]) == (2, 1, 0, 1)
    assert drift({"1": {"x": 0.9}}) == []


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_json_and_a_page_and_asks_nobody(tmp_path, capsys) -> None:
    items = pairs(40, 7)
    judged(tmp_path / "store", items, simulated(**PLANTED))
    before = {path: path.stat().st_size for path in (tmp_path / "store").glob("*.sqlite")}
    rows = [
        {
            "prompt": i.comparison.prompt.instruction,
            "a": i.comparison.a.text,
            "b": i.comparison.b.text,
            "human": list(i.human),
        }
        for i in items
    ]
    write_jsonl(tmp_path / "people.jsonl", rows)
    arguments = [
        "label",
        "quality",
        "--store",
        str(tmp_path / "store"),
        "--pairs",
        str(tmp_path / "people.jsonl"),
    ]
    assert main([*arguments, "--samples", "50", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "accuracy against people" in text
    assert "position bias, logit" in text
    page = (tmp_path / "out" / "quality.html").read_text()
    assert "Taking the longer text is right" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert main([*arguments, "--samples", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert before == {path: path.stat().st_size for path in (tmp_path / "store").glob("*.sqlite")}
    assert main(["label", "quality", "--store", str(tmp_path / "nowhere")]) == 2
    assert "no store" in capsys.readouterr().err
    (tmp_path / "others.jsonl").write_text('{"prompt": "?", "a": "1", "b": "2", "human": 1}\n')
    assert main([*arguments[:4], "--pairs", str(tmp_path / "others.jsonl")]) == 2
    assert "not one of its 1 pairs" in capsys.readouterr().err
    assert main([*arguments, "--critic", "nobody"]) == 2

"""The quality of critics: hand-made verdicts whose answers are known, and intervals that hold planted truths."""

import json
from collections import Counter

import numpy as np
import pytest

from laif_jax.evaluation import verdict_model
from laif_jax.evaluation.calibration import calibration
from laif_jax.evaluation.consistency import repeats, transitivity
from laif_jax.evaluation.quality import Critic, Pair, critic_quality, quality_report
from laif_jax.evaluation.resample import estimate, mean, ratio, share

OPTIONS = {"samples": 200, "seed": 0}


def critic(p: dict[str, float | None], single=None, **rest) -> Critic:
    made = Critic("c", final=p, states=Counter(ok=len(p)), **rest)
    for name, orders in (single or {}).items():
        made.single[name] = orders
    return made


def values(block) -> float:
    return block["value"]


# ---- intervals --------------------------------------------------------------------------------------------------


def test_shares_by_cluster_are_those_of_their_rows() -> None:
    hits = [1, 1, 0, 0, 1, 0]
    found = share(hits, list("aabbcc"), samples=500, seed=1)
    assert found.value == 0.5
    assert found.n == 6
    # Clusters a, b and c have means 1, 0 and 1/2: a third of the rows would not span all of [0, 1].
    assert found.ci95 == (0.0, 1.0)
    alone = mean(hits, samples=500, seed=1)
    assert alone.ci95[0] > 0


def test_a_share_of_all_has_an_exact_bound() -> None:
    assert share(np.ones(200)).ci95 == (pytest.approx(0.9817, abs=1e-4), 1.0)
    assert share(np.zeros(10)).ci95 == (0.0, pytest.approx(1 - 0.025**0.1))
    assert share(np.ones(6), list("aaabbb")).ci95[0] == pytest.approx(0.025**0.5)


def test_no_rows_have_no_estimate() -> None:
    assert share([]).to_dict() == {"value": None, "ci95": [None, None], "n": 0}
    assert estimate(np.zeros((2, 2)), ratio).to_dict()["value"] is None


# ---- what moves a verdict -----------------------------------------------------------------------------------------


def _verdicts(rng, count, *, length, position, merit, soft):
    x = rng.uniform(-0.8, 0.8, count)
    truth = np.where(rng.random(count) < 0.5, 1.0, -1.0)
    rows = {"p": [], "x": [], "first": [], "human": [], "clusters": []}
    for i in range(count):
        noise = rng.normal(0, 1.0)
        for first in (1.0, -1.0):
            logit = length * x[i] - position * first + merit * truth[i] + soft * noise
            p = 1 / (1 + np.exp(-logit))
            rows["p"].append(p if soft else float(rng.random() < p))
            rows["x"].append(x[i])
            rows["first"].append(first)
            rows["human"].append(truth[i])
            rows["clusters"].append(i // 2)
    clusters = rows.pop("clusters")
    return {name: np.array(value) for name, value in rows.items()} | {"clusters": clusters}


@pytest.mark.parametrize("soft", [True, False])
def test_the_verdict_models_intervals_hold_the_truth_about_95_times_in_100(soft) -> None:
    truth = {"length": 1.0, "position": 0.4, "merit": 0.8}
    held = dict.fromkeys(truth, 0)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = verdict_model.fit(**_verdicts(rng, 200, **truth, soft=soft), samples=200, seed=seed)
        assert found.method == ("logits" if soft else "verdicts")
        for name, value in truth.items():
            low, high = getattr(found, name).ci95
            held[name] += low - 1e-9 <= value <= high + 1e-9
    # 38 expected of each; fewer than 33, or not one outside in all 120, would be a broken interval.
    assert all(count >= 33 for count in held.values()), held
    assert sum(held.values()) < 120


def test_a_critic_that_takes_the_longer_one_has_a_finite_slope() -> None:
    x = np.linspace(-1, 1, 80)
    found = verdict_model.fit((x > 0).astype(float), x, np.tile([1.0, -1.0], 40), samples=100)
    assert 3 < found.length.ci95[0] <= found.length.value < 50


def test_coefficients_that_cannot_be_told_are_undefined() -> None:
    found = verdict_model.fit([0.0, 1.0] * 20, np.zeros(40), np.ones(40), samples=50)
    assert np.isnan(found.length.value)
    assert np.isnan(found.position.value)
    assert np.isnan(verdict_model.fit([], [], []).length.value)


def test_relative_difference_is_that_of_the_simulated_critic() -> None:
    found = verdict_model.relative_difference([[10, 20], [20, 10], [0, 0], [5, 5]])
    assert found.tolist() == [0.5, -0.5, 0.0, 0.0]


# ---- consistency -----------------------------------------------------------------------------------------------


def _pair(prompt: str, a: str, b: str) -> Pair:
    return Pair(prompt, texts=(a, b), lengths=(len(a), len(b)))


def test_cycles_are_counted_by_hand() -> None:
    pairs = [_pair("p", "x", "y"), _pair("p", "y", "z"), _pair("p", "z", "x")]
    cycle = transitivity(np.array([1.0, 1.0, 1.0]), pairs, **OPTIONS)  # y > x, z > y, x > z
    assert (cycle["triples"], cycle["cycles"]["value"]) == (1, 1.0)
    order = transitivity(np.array([1.0, 1.0, 0.0]), pairs, **OPTIONS)
    assert order["cycles"]["value"] == 0.0
    assert order["cycles"]["ci95"][1] > 0.9  # one prompt says next to nothing
    # A tie, a missing comparison, or another prompt make no triple.
    assert transitivity(np.array([1.0, 0.5, 1.0]), pairs, **OPTIONS) is None
    assert transitivity(np.array([1.0, 1.0, np.nan]), pairs, **OPTIONS) is None
    assert transitivity(np.array([1.0, 1.0, 1.0]), [*pairs[:2], _pair("q", "z", "x")], **OPTIONS) is None


def test_coins_make_cycles_of_a_quarter_of_the_triples() -> None:
    rng = np.random.default_rng(2)
    names = "abcdefgh"
    pairs = [_pair(f"p{k}", x, y) for k in range(60) for x in names for y in names if x < y]
    found = transitivity(rng.integers(0, 2, len(pairs)).astype(float), pairs, **OPTIONS)
    assert found["triples"] == 60 * 56
    assert found["cycles"]["ci95"][0] < 0.25 < found["cycles"]["ci95"][1]


def test_repeats_by_hand() -> None:
    asked = {"one": {"ab": [0.9, 0.8, 0.2]}, "two": {"ab": [0.1, 0.1]}, "once": {"ab": [0.4]}}
    found = repeats(asked, {}, **OPTIONS)
    assert (found["n"], found["answers"]) == (2, 5)
    assert found["same"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["random"]["same"] == pytest.approx(0.4**2 + 0.6**2)
    assert repeats({"once": {"ab": [0.4]}}, {}, **OPTIONS) is None


# ---- calibration -----------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    found = calibration([0.9, 0.9, 0.1, 0.6, 0.5], [2, 1, 1, 0, 2], list("abcde"), samples=50)
    assert found["n"] == 4  # people's tie is left out
    # Bins: 0.5 (a tie, half right) and 0.9 (two of three right).
    assert [row["n"] for row in found["bins"]] == [1, 3]
    assert found["ece"]["value"] == pytest.approx(3 / 4 * (0.9 - 2 / 3))
    assert found["overconfidence"]["value"] == pytest.approx((3 * 0.9 + 0.5) / 4 - 2.5 / 4)
    assert found["brier"]["value"] == pytest.approx((0.01 + 0.81 + 0.01 + 0.25) / 4)
    assert calibration([0.9], [0], ["a"]) is None


def test_a_calibrated_critic_is_within_what_chance_gives() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0, 1, 400)
    human = np.where(rng.random(400) < p, 2, 1)
    found = calibration(p, human, list(range(400)), samples=200)
    assert found["ece"]["value"] < found["ece_if_calibrated"]["p95"]
    sure = calibration(np.round(p), human, list(range(400)), samples=200)
    assert sure["ece"]["value"] > 5 * sure["ece_if_calibrated"]["p95"] + 0.1
    assert sure["overconfidence"]["ci95"][0] > 0.1


# ---- the report -------------------------------------------------------------------------------------------------


def _planted(count: int = 240, accuracy: float = 0.8, seed: int = 0):
    rng = np.random.default_rng(seed)
    pairs, p, single = {}, {}, {}
    for i in range(count):
        name, truth = f"c{i}", int(rng.integers(1, 3))
        lengths = tuple(int(n) for n in rng.integers(20, 200, 2))
        generators = ("mine", "theirs") if rng.random() < 0.5 else ("theirs", "mine")
        pairs[name] = Pair(
            f"p{i // 2}", (f"{i}a", f"{i}b"), lengths, generators, (truth,), "s" if i % 3 else "t"
        )
        said = truth if rng.random() < accuracy else 3 - truth
        p[name] = float(said == 2)
        single[name] = {"ab": p[name], "ba": p[name]}
    return pairs, p, single


def test_a_report_says_what_was_planted_and_is_json() -> None:
    pairs, p, single = _planted()
    p["unread"] = None
    found = critic_quality(critic(p, single, own=["Mine"]), pairs, samples=300)
    json.dumps(found, allow_nan=False)
    people = found["people"]
    assert people["accuracy"]["ci95"][0] < 0.8 < people["accuracy"]["ci95"][1]
    assert people["kappa"]["ci95"][0] < 0.6 < people["kappa"]["ci95"][1]
    assert set(people["by_source"]) == {"s", "t"}
    assert people["longest_wins"]["accuracy"]["ci95"][0] < 0.5 < people["longest_wins"]["accuracy"]["ci95"][1]
    assert found["coverage"]["value"] == pytest.approx(240 / 241)
    assert found["swap"]["consistency"]["value"] == 1.0
    assert found["position"]["first_wins"]["value"] == 0.5
    assert found["own"]["n"] == 240
    assert found["own"]["wins"]["ci95"][0] < 0.5 < found["own"]["wins"]["ci95"][1]
    assert found["repeats"] is None
    assert found["transitivity"] is None
    assert found["outside"] is None


def test_a_critic_that_takes_its_own_is_seen_although_it_is_half_right() -> None:
    pairs, p, _ = _planted()
    for name, pair in pairs.items():
        p[name] = float(pair.generators[1] == "mine")
    found = critic_quality(critic(p, own=["mine"]), pairs, samples=300)["own"]
    assert found["wins"]["value"] == 1.0
    assert found["beyond_people"]["ci95"][0] > 0.3


def test_a_critic_that_takes_the_first_is_seen() -> None:
    pairs, p, _ = _planted(60)
    single = {name: {"ab": 0.0, "ba": 1.0} for name in p}
    found = critic_quality(critic(dict.fromkeys(p, 0.5), single), pairs, samples=100)
    assert found["swap"]["always_first"]["value"] == 1.0
    assert found["swap"]["consistency"]["value"] == 0.0
    assert found["position"]["first_wins"]["value"] == 1.0
    assert found["position"]["logit"]["value"] > 3
    assert found["ties"]["value"] == 1.0


def test_between_critics_and_all_of_them() -> None:
    pairs, p, _ = _planted(100)
    noisy = {name: value if i % 4 else 1 - value for i, (name, value) in enumerate(p.items())}
    few = {name: noisy[name] for name in list(p)[:10]}
    critics = [critic(p), Critic("d", final=noisy), Critic("e", final=few), Critic("f", final={"else": 1.0})]
    found = quality_report(critics, pairs, samples=100)
    rows = {(row["one"], row["other"]): row for row in found["between"]}
    assert rows["c", "d"]["raw"]["value"] == 0.75
    assert rows["d", "e"]["kappa"]["value"] == 1.0
    assert rows["c", "f"]["n"] == 0
    assert rows["c", "f"]["alpha"]["value"] is None
    assert found["all"]["critics"] == 4
    assert found["people"] is None  # one label per pair


def test_people_among_themselves() -> None:
    pairs = {"x": Pair("p", human=(1, 1, 2)), "y": Pair("q", human=(2, 2, 2)), "z": Pair("r", human=(1,))}
    found = quality_report([], pairs, samples=100)["people"]
    assert found["n"] == 2
    assert found["raw"]["value"] == pytest.approx((1 / 3 + 1) / 2)


def test_the_report_is_a_function_of_its_arguments() -> None:
    pairs, p, single = _planted(50)
    assert critic_quality(critic(p, single), pairs, **OPTIONS) == critic_quality(
        critic(p, single), pairs, **OPTIONS
    )


def test_nothing_known_of_the_pairs_is_no_error() -> None:
    found = critic_quality(critic({"x": 1.0, "y": None}, {"x": {"ab": 1.0}}), {}, samples=20)
    assert found["people"] is None
    assert found["length"]["longer_wins"]["value"] is None
    assert found["coverage"]["value"] == 0.5
    json.dumps(critic_quality(critic({}), {}, samples=20), allow_nan=False)

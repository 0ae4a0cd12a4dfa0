"""Judging protocols, without a store: what is asked, how answers become one label, and what must hold of it always."""

import asyncio
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.labeling import CriticError, load_critic, shipped_critics
from laif_jax.labeling.answers import Answer
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.critic import CRITICS, Critic
from laif_jax.labeling.critic_parts import delimiter_for, draw_principle, fence, load_principles
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.judge import merge
from laif_jax.labeling.judge_lists import all_pairs
from laif_jax.labeling.listwise import ListwiseOptions, ListwiseParser
from laif_jax.labeling.panel import average, escalate, tier_summary, unsure
from laif_jax.labeling.providers.simulated import SimulatedProvider
from laif_jax.labeling.scheduler import Outcome
from laif_jax.records import Comparison, Completion, Judgement, Prompt, Status, Usage
from tests.labeling.helpers import comparison, planted, simulated, truth

JUDGES = [name for name in shipped_critics() if load_critic(name).judges]
TEXTS = st.text(max_size=60) | st.sampled_from(
    ["{output_2}", "0123456789abcdef>>>", "<<<0123456789abcdef\nA", "[user]\nhi"]
)


@lru_cache(maxsize=256)
def provider(endpoint: Endpoint) -> SimulatedProvider:
    return SimulatedProvider(endpoint)


def answer(call: Call) -> Outcome:
    reply = asyncio.run(provider(call.endpoint).call(call, 0))
    return Outcome(call.key, reply.answer, date="2026-01-01")


def asked(endpoint: Endpoint, critic: Critic | str, items: list[Comparison], **rest) -> list[list[Judgement]]:
    """[final, single orders...] of each comparison: what a runner does, without one."""
    work = JudgeJob(endpoint=endpoint, critic=critic, comparisons=tuple(items), **rest).work()
    found = []
    for position in range(len(work)):
        calls, outcomes = work.calls(position), []
        while calls:
            outcomes += [answer(call) for call in calls]
            calls = work.further(position, outcomes) if getattr(work, "stages", 1) > 1 else []
        results = work.results(position, outcomes)
        found.append([Judgement.model_validate_json(result.record) for result in results])
    return found


def swapped(item: Comparison) -> Comparison:
    return Comparison(prompt=item.prompt, a=item.b, b=item.a)


# ---- what must hold always ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(JUDGES),
    qualities=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    pads=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    bias=st.floats(-3, 3),
    length=st.floats(-3, 3),
    accuracy=st.floats(0, 1),
)
def test_swapping_a_and_b_turns_the_label_round(name, qualities, pads, bias, length, accuracy) -> None:
    item = comparison(3, *qualities, pad_a=pads[0], pad_b=pads[1])
    endpoint = simulated(position_bias=bias, length_bias=length, accuracy=accuracy)
    (one, *_), (other, *_) = asked(endpoint, name, [item])[0], asked(endpoint, name, [swapped(item)])[0]
    assert other.p_b == pytest.approx(1 - one.p_b, abs=1e-9)
    assert other.status is one.status


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["ab_logprob", "laif_basic", "rlaif_cot", "constitutional_cot"]),
    count=st.integers(2, 5),
    accuracy=st.floats(0, 1),
    bias=st.floats(-2, 2),
)
def test_samples_of_a_deterministic_critic_equal_one(name, count, accuracy, bias) -> None:
    critic, endpoint, item = (
        load_critic(name),
        simulated(accuracy=accuracy, position_bias=bias),
        planted(3)[2],
    )
    one = asked(endpoint, critic, [item])[0]
    many = asked(endpoint, critic.adapted(samples=count, temperature=1.0), [item])[0]
    assert [j.p_b for j in many] == pytest.approx([j.p_b for j in one])
    assert all(len(part.meta["samples"]) == count for part in many[1:])
    assert many[0].meta["calls"] >= one[0].meta["calls"]


def labels(p: float | None) -> Judgement:
    status = Status.UNPARSABLE if p is None else Status.TIE if p == 0.5 else Status.OK
    return Judgement(comparison_id="c", critic="x", order="ab", status=status, p_b=p, reason="no")


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=6), st.randoms())
def test_averages_are_symmetric_and_need_a_majority(ps, random) -> None:
    members = [labels(p) for p in ps]
    (one,) = average([[member] for member in members])
    random.shuffle(members)
    (other,) = average([[member] for member in members])
    known = [p for p in ps if p is not None]
    assert one.status is other.status
    if 2 * len(known) > len(ps):
        assert one.p_b == pytest.approx(sum(known) / len(known), abs=1e-9)
        assert other.p_b == pytest.approx(one.p_b, abs=1e-9)
    else:
        assert one.status is Status.UNPARSABLE
        assert one.p_b is None


@given(st.floats(0, 1), st.floats(0, 1))
def test_merging_two_orders_is_symmetric(p: float, q: float) -> None:
    critic, item = load_critic("ab_logprob"), planted(1)[0]
    parts = [labels(p), labels(q).model_copy(update={"order": "ba"})]
    one, other = merge(item, critic, parts), merge(item, critic, parts[::-1])
    assert one.p_b == other.p_b == pytest.approx((p + q) / 2, abs=1e-12)


@given(TEXTS, TEXTS, TEXTS)
def test_nothing_between_delimiters_looks_like_a_delimiter(instruction, one, two) -> None:
    critic = load_critic("constitutional")
    (_, user) = critic.messages(instruction, one, two)
    mark = delimiter_for(instruction, one, two)
    text = user["content"]
    assert text.count(f"<<<{mark}") == text.count(f"{mark}>>>") == 3
    assert len(re.findall(r"<<<[0-9a-f]{16}", text)) == len(re.findall(r"[0-9a-f]{16}>>>", text)) == 3
    assert text.count(mark) == 6  # the system message names it too
    (_, other) = critic.messages(instruction, two, one)
    assert f"<<<{mark}" in other["content"]


@given(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.data())
def test_a_fence_survives_a_text_that_knows_it(mark: str, data) -> None:
    text = data.draw(st.text(alphabet="<>\n" + mark, max_size=80)) + data.draw(st.sampled_from([mark, ""]))
    fenced = fence(text, mark)
    inside = fenced[len(f"<<<{mark}\n") : -len(f"\n{mark}>>>")]
    assert mark not in inside
    assert not re.search(r"<<<[0-9a-f]{16}|[0-9a-f]{16}>>>", inside)


@given(st.text(alphabet="[]0123456789>= ab.\n", max_size=60), st.integers(2, 6))
def test_a_ranking_is_read_from_a_ranking_only(text: str, count: int) -> None:
    parser = ListwiseParser(ListwiseOptions())
    found = parser.parse(Answer(text, "stop", "", (), None, "", ""), count)
    assert (found.ranks is None) == (found.status is Status.UNPARSABLE)
    if found.ranks is not None:
        assert len(found.ranks) == count
        assert sorted(set(found.ranks)) == list(range(max(found.ranks) + 1))
        assert all(str(number) in text for number in range(1, count + 1))
    else:
        assert found.reason


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_rankings_are_read_as_they_are_written(scores: list[int]) -> None:
    parser = ListwiseParser(ListwiseOptions())
    text = parser.render(scores).text
    ranks = parser.parse(Answer(f"Ranking: {text}.", "stop", "", (), None, "", ""), len(scores)).ranks
    order = sorted(set(scores), reverse=True)
    assert ranks == tuple(order.index(score) for score in scores)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "1 > 2",
        "[1] > [2] > [2]",
        "[1] > [2] > [4]",
        "[1] > [2] > [3] or [3] > [2] > [1]",
        "3, 1, 2",
    ],
)
def test_a_partial_or_contradictory_ranking_is_none(text: str) -> None:
    found = ListwiseParser(ListwiseOptions()).parse(Answer(text, "stop", "", (), None, "", ""), 3)
    assert found.status is Status.UNPARSABLE


# ---- protocols ------------------------------------------------------------------------------------------------------


def test_the_verdict_is_asked_for_on_the_rationale_that_was_given() -> None:
    endpoint, item = simulated(), planted(1)[0]
    work = JudgeJob(endpoint=endpoint, critic="rlaif_cot", comparisons=(item,)).work()
    first = work.calls(0)
    assert len(first) == 2
    assert all("top_logprobs" not in call.params and call.params["max_tokens"] == 512 for call in first)
    rationales = [answer(call) for call in first]
    second = work.further(0, rationales)
    for call, rationale in zip(second, rationales, strict=True):
        assert [m["role"] for m in call.messages] == ["system", "user", "assistant", "user"]
        assert call.messages[2]["content"] == rationale.answer.text
        assert call.params["top_logprobs"] == 20
    assert work.further(0, rationales + [answer(call) for call in second]) == []


def test_the_label_follows_the_rationale() -> None:
    # The simulated judge reads its own leaning out of the messages: without the rationale there would be none.
    (only, *_) = asked(simulated(sharpness=1.5), "rlaif_cot", [comparison(1, 0.1, 0.9)])[0]
    assert only.p_b == pytest.approx(1 / (1 + 2.718281828**-1.5), abs=1e-6)
    assert only.rationale.count("leaning") == 2


def test_a_failed_rationale_fails_the_order_and_asks_no_verdict_on_it() -> None:
    work = JudgeJob(endpoint=simulated(), critic="rlaif_cot", comparisons=(planted(1)[0],)).work()
    first, second = work.calls(0)
    outcomes = [answer(first), Outcome(second.key, None, "down", passing=True)]
    more = work.further(0, outcomes)
    assert len(more) == 1
    results = [Judgement.model_validate_json(r.record) for r in work.results(0, outcomes + [answer(more[0])])]
    assert [r.status for r in results] == [Status.FAILED, Status.OK, Status.FAILED]
    assert results[0].meta["passing"]


def test_a_refused_rationale_is_a_refusal() -> None:
    endpoint = simulated(refusal_rate=1.0)
    final, *parts = asked(endpoint, "rlaif_cot", [planted(1)[0]])[0]
    assert {j.status for j in (final, *parts)} == {Status.REFUSED}


def test_samples_without_a_label_are_left_out_while_most_have_one() -> None:
    critic = load_critic("laif_basic").adapted(samples=3, temperature=1.0)
    work = JudgeJob(endpoint=simulated(), critic=critic, comparisons=(planted(1)[0],), order="seeded").work()
    outcomes = [answer(call) for call in work.calls(0)]
    garbage = Answer("zxq", "stop", "", (), None, "", "")

    def read(bad: int) -> Judgement:
        mixed = [Outcome(o.key, garbage if i < bad else o.answer) for i, o in enumerate(outcomes)]
        return Judgement.model_validate_json(work.results(0, mixed)[0].record)

    assert read(0).p_b == read(1).p_b
    assert read(1).meta["samples"].count(None) == 1
    assert read(2).status is Status.UNPARSABLE
    assert read(2).p_b is None


def test_inverted_questions_are_turned_round_and_clamps_hold() -> None:
    items = planted(20)
    for name in ("rlaif_harmless", "constitutional"):
        found = asked(simulated(), name, items, seed=4)
        assert all((final.p_b > 0.5) == (truth(item) == 1.0) for item, (final, *_) in zip(items, found))
    assert {final.principle for final, *_ in found} > {"worse"}  # whose question is inverted
    clamped = asked(simulated(), "constitutional_cot", items)
    assert {round(part.p_b, 9) for _, *parts in clamped for part in parts} == {0.4, 0.6}
    mild = asked(simulated(sharpness=0.1), "constitutional_cot", items)
    assert all(0.4 < final.p_b < 0.6 and final.p_b != 0.5 for final, *_ in mild)


def test_one_principle_is_drawn_per_comparison_by_the_seed() -> None:
    items = planted(40)
    one, again, other = (asked(simulated(), "constitutional", items, seed=seed) for seed in (1, 1, 2))
    assert [j.principle for j, *_ in one] == [j.principle for j, *_ in again]
    assert [j.principle for j, *_ in one] != [j.principle for j, *_ in other]
    assert all(len({j.principle for j in group}) == 1 for group in one)  # both orders, one principle
    principles = load_critic("constitutional").principles
    counts = {p.id: 0 for p in principles}
    for number in range(1200):
        counts[draw_principle(principles, 0, str(number)).id] += 1
    assert 60 < min(counts.values()) <= max(counts.values()) < 145


def test_the_principle_is_in_the_prompt_and_in_the_jobs_id() -> None:
    critic, item = load_critic("constitutional"), planted(1)[0]
    jobs = [JudgeJob(endpoint=simulated(), critic=critic, comparisons=(item,), seed=s).work() for s in (1, 2)]
    assert jobs[0].id != jobs[1].id
    ids = {p.text: p.id for p in critic.principles}
    final = asked(simulated(), critic, [item], seed=1)[0][0]
    text = jobs[0].calls(0)[0].messages[1]["content"]
    assert [ids[t] for t in ids if t in text] == [final.principle]


def test_shots_are_shown_and_change_the_hash() -> None:
    critic = load_critic("rlaif_cot")
    shown = [critic.adapted(shots=n).rationale_messages("I", "X", "Y")[1]["content"] for n in (0, 1, 2)]
    assert [text.count("»»»» Example »»»»") for text in shown] == [0, 1, 2]
    assert [text.count("Follow the instructions and the example(s)") for text in shown] == [0, 1, 1]
    assert len({critic.adapted(shots=n).hash for n in (0, 1, 2)}) == 3
    with pytest.raises(CriticError, match="more than the examples"):
        critic.adapted(shots=3)


def test_the_probability_outside_the_options_is_told() -> None:
    final, *parts = asked(simulated(), "ab_logprob", [planted(1)[0]])[0]
    assert final.meta["outside"] == pytest.approx(0.01)
    assert all(part.meta["outside"] == pytest.approx(0.01) for part in parts)
    from laif_jax.evaluation.labels import label_summary

    assert label_summary([final], parts)["mean_outside"] == pytest.approx(0.01)


def test_lists_of_several_responses_become_all_their_pairs() -> None:
    prompt = Prompt.from_text("Name a colour.")
    some = [
        Completion(prompt_id=prompt.id, generator="g", text=f"{i}", sample_index=i, meta={"quality": q})
        for i, q in enumerate((0.2, 0.9, 0.5, 0.5))
    ]
    items = all_pairs(prompt, some)
    work = JudgeJob(endpoint=simulated(), critic="listwise", comparisons=tuple(items)).work()
    assert len({call.key for position in range(len(work)) for call in work.calls(position)}) == 2
    found = asked(simulated(), "listwise", items)
    assert [final.p_b for final, *_ in found] == [truth(item) for item in items]
    assert [part.order for part in found[0][1:]] == ["ab", "ba"]
    assert sum(final.meta["calls"] for final, *_ in found) == 2
    assert sum(final.usage is not None for final, *_ in found) == 1
    biased = asked(simulated(position_bias=100.0), "listwise", items)
    assert {final.status for final, *_ in biased} == {Status.TIE}
    many = [some[0].model_copy(update={"text": f"t{i}", "id": f"i{i}"}) for i in range(11)]
    job = JudgeJob(endpoint=simulated(), critic="listwise", comparisons=tuple(all_pairs(prompt, many)))
    with pytest.raises(CriticError, match="at most"):
        job.work()


def test_noise_of_samples_is_averaged_away() -> None:
    items, endpoint = planted(120), simulated(sharpness=1.0, noise=3.0)
    critic = load_critic("ab_logprob")

    def right(samples: int) -> float:
        found = asked(endpoint, critic.adapted(samples=samples, temperature=1.0), items)
        return sum((f[0].p_b > 0.5) == (truth(i) == 1.0) for f, i in zip(found, items)) / len(items)

    assert right(9) > right(1) + 0.08


# ---- two tiers ------------------------------------------------------------------------------------------------------


def used(p: float, cost: float, calls: int = 2) -> Judgement:
    usage = Usage(prompt_tokens=100, completion_tokens=10)
    return labels(p).model_copy(update={"usage": usage, "cost": cost, "meta": {"calls": calls}})


def test_the_strong_critic_is_asked_where_the_first_is_unsure_and_the_saving_is_told() -> None:
    first = [used(0.9, 0.01), used(0.6, 0.01), used(0.5, 0.01), labels(None), used(0.1, 0.01)]
    assert unsure(first, 0.2) == [1, 2, 3]
    strong = [used(0.0, 1.0), used(1.0, 1.0), used(1.0, 1.0)]
    final = escalate(first, dict(zip([1, 2, 3], strong)))
    assert [j.p_b for j in final] == [0.9, 0.0, 1.0, 1.0, 0.1]
    assert [j.meta["tier"] for j in final] == [1, 2, 2, 2, 1]
    assert final[1].usage.prompt_tokens == 200
    summary = tier_summary(first, strong)
    assert summary["share_strong"] == 0.6
    assert summary["strong_alone"]["cost"] == pytest.approx(5.0)
    assert summary["saved"]["cost"] == pytest.approx(5.0 - 3.0 - 0.04)
    assert summary["saved"]["calls"] == pytest.approx(10 - 6 - 8)
    assert tier_summary(first, [])["saved"] is None


# ---- files ----------------------------------------------------------------------------------------------------------


def copy(tmp_path: Path, name: str, **changes: object) -> Path:
    for file in (CRITICS / name).iterdir():
        (tmp_path / file.name).write_text(file.read_text("utf-8"), "utf-8")
    values = yaml.safe_load((tmp_path / "critic.yaml").read_text("utf-8")) | changes
    (tmp_path / "critic.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("ab_logprob", {"samples": 3}, "temperature"),
        ("rlaif_cot", {"samples": 3}, r"rationale\.temperature"),
        ("ab_logprob", {"clamp": [0.3, 0.6]}, "symmetric"),
        ("ab_logprob", {"shots": 1}, r"examples\.yaml"),
        ("ab_logprob", {"delimiters": True}, "delimiter"),
        ("ab_logprob", {"rationale": {"max_tokens": 9}}, r"rationale\.txt"),
        ("rating_1_10", {"invert": True}, "critics that compare"),
        ("listwise", {"samples": 2, "temperature": 1.0}, "critics that compare"),
        ("constitutional", {"delimiters": False}, "delimiter"),
    ],
)
def test_a_protocol_that_cannot_be_is_explained(tmp_path: Path, name: str, changes: dict, says: str) -> None:
    with pytest.raises(CriticError, match=says):
        load_critic(copy(tmp_path, name, **changes))


def test_missing_files_of_a_protocol_are_named(tmp_path: Path) -> None:
    folder = copy(tmp_path, "constitutional")
    (folder / "principles.yaml").unlink()
    with pytest.raises(CriticError, match="principles"):
        load_critic(folder)
    folder = copy(tmp_path, "rlaif_cot")
    (folder / "rationale.txt").write_text("[user]\n{instruction} {output_1} {delimiter}")
    with pytest.raises(CriticError, match=r"rationale\.txt lacks"):
        load_critic(folder)


def test_principles_come_in_three_forms(tmp_path: Path) -> None:
    texts = tmp_path / "madison.json"
    texts.write_text(json.dumps(["\nChoose the kinder one. Options:", "\nChoose the truer one. Options:"]))
    assert [(p.id, p.text) for p in load_principles(texts)] == [
        ("madison-0", "Choose the kinder one."),
        ("madison-1", "Choose the truer one."),
    ]
    pairs = tmp_path / "revisions.json"
    entry = {
        "prompt": ["\n\nCritiqueRequest: Say what is wrong.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Mend it.\n\nRevision:",
    }
    pairs.write_text(json.dumps({"harmful0": entry}))
    (only,) = load_principles(pairs)
    assert (only.id, only.text, only.revision) == ("harmful0", "Say what is wrong.", "Mend it.")
    critic = load_critic("constitutional").adapted(principles=texts)
    assert critic.hash != load_critic("constitutional").hash
    for text in ("{}", "[]", "3", '[{"id": "x"}]', '[{"id": "x", "text": "y"}, {"id": "x", "text": "z"}]'):
        texts.write_text(text)
        with pytest.raises(CriticError, match="principles"):
            load_principles(texts)
    with pytest.raises(CriticError, match="cannot be read"):
        load_principles(tmp_path / "none.yaml")


def test_the_published_critics_are_what_they_were() -> None:
    # Labels are stored under these: a new option of critics must not change them.
    assert load_critic("laif_basic").hash.startswith("14d257da5f085d13")

"""Reading ratings: exact where the log-probs tell everything, bounded and recorded where they do not."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.labeling.answers import Answer, Token
from laif_jax.labeling.critic import load_critic, shipped_critics
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.parsers import make_parser
from laif_jax.labeling.rating import SCORES
from laif_jax.records import Completion, Prompt, Rating, Status

SOFT = make_parser("rating", {"read": "logprobs"})
TEXT = make_parser("rating", {"read": "text"})


def token(sampled: str, top: dict[str, float] | list[tuple[str, float]]) -> Token:
    pairs = [(t, math.log(p)) for t, p in (top.items() if isinstance(top, dict) else top)]
    return Token(sampled, dict(pairs).get(sampled, -20.0), tuple(pairs))


def answer(*tokens: Token, text: str | None = None, finish: str = "stop") -> Answer:
    return Answer(
        "".join(t.token for t in tokens) if text is None else text, finish, "", tokens, None, "", ""
    )


# ---- one position ------------------------------------------------------------------------------------------------


def test_the_expected_score_over_the_ten_normalised_and_rescaled() -> None:
    found = SOFT.parse(answer(token("8", {"8": 0.5, "7": 0.2, "10": 0.1, "The": 0.2})))
    assert found.status is Status.OK
    assert found.score == pytest.approx((8 * 0.5 + 7 * 0.2 + 10 * 0.1) / 0.8)
    assert found.p == pytest.approx([0, 0, 0, 0, 0, 0, 0.25, 0.625, 0, 0.125])
    assert found.mass == pytest.approx(0.8)
    assert found.ambiguous == 0.0
    assert found.meta == {"unlisted": 0.0}


@pytest.mark.parametrize(("score", "reward"), [(1.0, -1.0), (5.5, 0.0), (10.0, 1.0), (7.75, 0.5)])
def test_the_reward_is_the_score_on_minus_one_to_one(score: float, reward: float) -> None:
    common: dict[str, Any] = {"completion_id": "c", "prompt_id": "p", "critic": "x"}
    rating = Rating(status=Status.OK, score=score, **common)
    assert rating.reward == pytest.approx(reward)
    assert Rating.from_row(rating.to_row()) == rating
    assert Rating(status=Status.FAILED, **common).reward is None
    wrong: list[dict[str, Any]] = [{"status": "ok"}, {"status": "failed", "score": 3.0}, {"status": "tie"}]
    for bad in wrong:
        with pytest.raises(ValueError, match="rating"):
            Rating(**common, **bad)


@pytest.mark.parametrize(
    "spelling", ["8", " 8", "\n8", "**8", "8.", '"8"', "\u25818", "\u01208", "(8)", "\uff18"]
)
def test_spellings_of_one_number_are_added(spelling: str) -> None:
    found = SOFT.parse(answer(token("8", [("8", 0.4), ("3", 0.3), (spelling, 0.2), ("eh", 0.1)])))
    assert found.p[7] == pytest.approx(0.6 / 0.9)
    assert found.p[2] == pytest.approx(0.3 / 0.9)


def test_tokens_that_read_alike_count_each_and_the_sampled_one_once() -> None:
    twice = SOFT.parse(answer(token("8", [("8", 0.4), ("8", 0.2), ("2", 0.4)])))
    assert twice.p[7] == pytest.approx(0.6)
    beside = Token("9", math.log(0.2), (("8", math.log(0.5)), ("7", math.log(0.3))))
    assert SOFT.parse(answer(beside)).p[8] == pytest.approx(0.2)


@pytest.mark.parametrize("other", ["-8", "08", "8th", "80", "eight", "\u2467", "\u2088", "11", "0", "+8"])
def test_what_only_looks_like_one_of_the_ten_is_none(other: str) -> None:
    found = SOFT.parse(answer(token("5", {"5": 0.5, other: 0.5})))
    assert (found.score, found.mass) == (pytest.approx(5.0), pytest.approx(0.5))


# ---- "10" --------------------------------------------------------------------------------------------------------


def test_a_sampled_one_is_divided_by_what_may_follow_it() -> None:
    first = token("1", {"1": 0.6, "9": 0.4})
    found = SOFT.parse(answer(first, token("0", {"0": 0.75, ".": 0.2, "5": 0.05})))
    assert found.p[0] == pytest.approx(0.6 * 0.2 / 0.97)
    assert found.p[9] == pytest.approx(0.6 * 0.75 / 0.97)
    assert found.mass == pytest.approx(0.97)  # 15 is none of the ten
    assert found.ambiguous == 0.0
    # The same distribution, with the other branch sampled.
    assert SOFT.parse(answer(first, token(".", {"0": 0.75, ".": 0.2, "5": 0.05}))).p == pytest.approx(found.p)


def test_a_one_that_was_not_sampled_is_one_where_ten_is_a_token_of_its_own() -> None:
    found = SOFT.parse(answer(token("9", {"9": 0.5, "1": 0.3, "10": 0.2})))
    assert found.p[0] == pytest.approx(0.3)
    assert found.ambiguous == 0.0


@pytest.mark.parametrize(("two", "nine", "high"), [(0.0, 0.4, 1.0), (0.4, 0.0, 0.0), (0.1, 0.3, 0.75)])
def test_a_one_that_may_begin_ten_is_divided_as_its_neighbours_and_recorded(two, nine, high) -> None:
    top = {"8": 0.45, "1": 0.15} | {t: p for t, p in (("2", two), ("9", nine)) if p}
    found = SOFT.parse(answer(token("8", top)))
    assert found.p[9] == pytest.approx(0.15 * high)
    assert found.p[0] == pytest.approx(0.15 * (1 - high))
    assert found.ambiguous == pytest.approx(0.15)
    assert found.mass == pytest.approx(1.0)


def test_a_one_without_neighbours_is_left_out() -> None:
    found = SOFT.parse(answer(token("6", {"6": 0.5, "1": 0.5})))
    assert found.score == pytest.approx(6.0)
    assert found.ambiguous == pytest.approx(0.5)


def test_an_answer_that_ends_after_a_one_is_one_and_an_answer_cut_there_is_not() -> None:
    first = token("1", {"1": 0.9, "9": 0.1})
    ended = SOFT.parse(answer(first))
    assert ended.p[0] == pytest.approx(0.9)
    assert ended.ambiguous == pytest.approx(0.9)
    cut = SOFT.parse(answer(first, finish="length"))
    assert cut.p[9] == pytest.approx(0.9)  # 9 is likely and 2 is not
    assert SOFT.parse(answer(token("1", {"1": 1.0}), finish="length")).status is Status.UNPARSABLE


@pytest.mark.parametrize(
    ("tokens", "number"),
    [(["0"], "0"), (["8", "5"], "85"), (["1", "0", "0"], "100"), (["1", "5"], "15"), (["100"], "100")],
)
def test_an_answer_off_the_scale_is_no_rating_however_likely_the_ten_were(tokens, number) -> None:
    parts = [token(t, {t: 0.4, "9": 0.3, "7": 0.3} if n == 0 else {t: 1.0}) for n, t in enumerate(tokens)]
    found = SOFT.parse(answer(*parts))
    assert found.status is Status.UNPARSABLE
    assert number in found.reason
    assert found.score is None


# ---- the answer as a tree ----------------------------------------------------------------------------------------


def spelled(model: dict) -> dict[int, float]:
    """The exact probabilities of 1 to 10 under a little model of what an answer may be: by going through all paths."""
    exact: dict[int, float] = {}

    def go(node: dict, text: str, p: float) -> None:
        for piece, (q, rest) in node.items():
            if rest:
                go(rest, text + piece, p * q)
            else:
                number = (text + piece).strip(" .")
                if number in map(str, SCORES):
                    exact[int(number)] = exact.get(int(number), 0.0) + p * q

    go(model, "", 1.0)
    return exact


def branch(draw, names: list[str], nodes: dict[str, dict]) -> dict:
    weights = [draw(st.floats(0.01, 1.0)) for _ in names]
    return {name: (w / sum(weights), nodes.get(name, {})) for name, w in zip(names, weights)}


@st.composite
def models(draw) -> dict:
    """A tree of tokens: numbers with and without a space of its own before them, "10" in one token or in two."""
    end = {".": (1.0, {})}
    digits = draw(st.lists(st.sampled_from("23456789"), unique=True, max_size=8))
    whole = draw(st.booleans())

    def numbers(extra: list[str], nodes: dict) -> dict:
        names = [*digits, "1", *(["10"] if whole else []), "The", *extra]
        after = {} if whole else {"1": branch(draw, ["0", ".", "5"], {"0": end})}
        return branch(draw, names, {name: end for name in names if name not in ("The", "1")} | after | nodes)

    return numbers([" "], {" ": numbers([], {})}) if draw(st.booleans()) else numbers([], {})


def said(model: dict, rng: random.Random, listed: int) -> Answer:
    """An answer that the model may give, with the `listed` most probable tokens at each position."""
    tokens, node = [], model
    while node:
        sampled = rng.choices(list(node), [q for q, _ in node.values()])[0]
        top = sorted(((name, q) for name, (q, _) in node.items()), key=lambda pair: -pair[1])[:listed]
        tokens.append(
            Token(sampled, math.log(node[sampled][0]), tuple((name, math.log(q)) for name, q in top))
        )
        node = node[sampled][1]
    return answer(*tokens)


@settings(max_examples=300, deadline=None)
@given(model=models(), seed=st.integers(0, 10**6), listed=st.sampled_from([3, 6, 20]))
def test_the_score_is_exact_within_what_is_recorded_as_not_told(model: dict, seed: int, listed: int) -> None:
    given_answer = said(model, random.Random(seed), listed)
    found = SOFT.parse(given_answer)
    exact = spelled(model)
    if found.status is not Status.OK:
        assert "15" in found.reason or "have probability" in found.reason
        return
    truth = sum(i * p for i, p in exact.items()) / sum(exact.values())
    untold = found.ambiguous + found.meta["unlisted"]
    known = found.mass - found.ambiguous
    assert abs(found.score - truth) <= 9 * untold / max(known, 1e-12) + 1e-4
    assert math.fsum(found.p) == pytest.approx(1.0)
    assert found.score == pytest.approx(sum(i * p for i, p in zip(SCORES, found.p)))
    assert found.mass <= sum(exact.values()) + found.ambiguous + 1e-9


def test_without_anything_untold_it_is_the_truth() -> None:
    """Not only bounded: every path told, with a space of its own, and "10" in two tokens."""
    after_one = token("0", {"0": 0.9, ".": 0.1})
    found = SOFT.parse(answer(token(" ", {" ": 0.7, "4": 0.3}), token("1", {"1": 0.5, "6": 0.5}), after_one))
    exact = 0.3 * 4 + 0.7 * (0.5 * 6 + 0.5 * (0.9 * 10 + 0.1))
    assert found.score == pytest.approx(exact)
    assert (found.ambiguous, found.meta["unlisted"]) == (0.0, 0.0)


def test_words_before_the_number_are_searched_only_as_far_as_asked() -> None:
    words = [token("Score", {"Score": 0.9, "9": 0.04}), token(":", {":": 1.0}), token(" ", {" ": 1.0})]
    tokens = [*words, token("3", {"3": 0.8, "4": 0.2}), token(".", {".": 1.0})]
    near = make_parser("rating", {"search": 1, "min_mass": 0.05}).parse(answer(*tokens))
    assert near.status is Status.UNPARSABLE
    assert "0.04" in near.reason
    assert make_parser("rating", {"search": 3}).parse(answer(*tokens)).score == pytest.approx(3.2)


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8", 8),
        (" 8.\n", 8),
        ("SCORE: 10", 10),
        ("**7**", 7),
        ("8/10", 8),
        ("8 out of 10", 8),
        ("I give it 7.5 of 10.", 7.5),
        ("Score: 8/10. So: 8", 8),
        ("10/10", 10),
        ("0", None),
        ("11", None),
        ("-3", None),
        ("85/100", None),
        ("80%", None),
        ("8 or 9", None),
        ("between 1 and 10: 6", None),
        ("1.2.3", None),
        ("eight", None),
        ("8th", None),
        ("\uff18", 8),
        ("nan", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_the_number_in_the_text(text: str, score: float | None) -> None:
    found = TEXT.parse(answer(text=text))
    assert found.score == score
    assert (found.status is Status.OK) == (score is not None)
    assert bool(found.reason) == (score is None)
    assert found.p is found.mass is None


def test_a_pattern_finds_the_number_among_others() -> None:
    parser = make_parser("rating", {"read": "text", "pattern": r"(?i)score\W*(\w+)"})
    assert parser.parse(answer(text="3 reasons, 2 doubts. Score: 6")).score == 6
    assert parser.parse(answer(text="Score: 6, no, score: 7")).status is Status.UNPARSABLE
    assert parser.parse(answer(text="Score: six")).status is Status.UNPARSABLE
    assert parser.parse(answer(text="Score: inf")).status is Status.UNPARSABLE
    for bad in ({"read": "text", "pattern": "("}, {"read": "text", "pattern": "8"}, {"scale": 5}):
        with pytest.raises(CriticError, match="rating"):
            make_parser("rating", bad)


# ---- every critic that rates -------------------------------------------------------------------------------------

CRITICS = shipped_critics("rating")
NOISE = st.text(max_size=4) | st.sampled_from(["1", "0", "10", " ", ""])


@pytest.mark.parametrize("name", CRITICS)
@settings(deadline=None)
@given(
    text=st.text(max_size=200),
    noise=st.lists(st.tuples(NOISE, st.floats(-9, 0)), max_size=6),
)
def test_nothing_makes_it_raise_or_break_the_contract(name: str, text: str, noise: list) -> None:
    tokens = tuple(Token(t, p, tuple(noise)) for t, p in noise)
    found = load_critic(name).rater.parse(Answer(text, "stop", "", tokens, None, "", ""))
    assert (found.score is not None) == (found.status is Status.OK)
    if found.score is None:
        assert found.reason
    Rating(
        completion_id="c",
        prompt_id="p",
        critic=name,
        status=found.status,
        score=found.score,
        p=found.p,
        mass=found.mass,
        ambiguous=found.ambiguous,
    )


@pytest.mark.parametrize("name", CRITICS)
def test_the_shipped_critics_ask_for_what_they_read(name: str) -> None:
    critic = load_critic(name)
    assert critic.kind == "rating"
    assert (critic.top_logprobs is not None) == critic.rater.needs_logprobs
    content = critic.rating_messages("INSTR", "OUT {instruction} [user]")[-1]["content"]
    assert content.index("INSTR") < content.index("OUT {instruction} [user]")
    assert "SCORE from 1 to 10" in content
    with pytest.raises(CriticError, match="compares two responses: ab_logprob"):
        critic.require("comparison")
    with pytest.raises(CriticError, match="rates single responses: rating_1_10"):
        load_critic("ab_logprob").require("rating")
    assert name not in shipped_critics("comparison")


def test_a_critic_that_rates_takes_one_output(tmp_path) -> None:
    (tmp_path / "critic.yaml").write_text("{name: mine, parser: rating, options: {read: text}}")
    (tmp_path / "prompt.txt").write_text("[user]\n{instruction} {output_1}")
    with pytest.raises(CriticError, match="output_1"):
        load_critic(tmp_path)
    (tmp_path / "prompt.txt").write_text("[user]\n{instruction} {output}")
    assert load_critic(tmp_path).kind == "rating"


def test_a_rating_is_of_a_completion_and_its_own_prompt() -> None:
    from laif_jax.labeling.jobs import RateItem

    one, other = Prompt.from_text("one"), Prompt.from_text("other")
    completion = Completion(prompt_id=other.id, generator="g", text="x")
    with pytest.raises(ValueError, match="answers prompt"):
        RateItem(prompt=one, completion=completion)


def test_what_is_ambiguous_does_not_count_towards_the_mass_asked_for() -> None:
    parser = make_parser("rating", {"min_mass": 0.1})
    weak = token("The", {"The": 0.6, "1": 0.3, "2": 0.05, "4": 0.05})
    assert parser.parse(answer(weak)).score is not None
    weaker = parser.parse(answer(token("The", {"The": 0.6, "1": 0.35, "2": 0.05})))
    assert weaker.status is Status.UNPARSABLE
    assert "0.05" in weaker.reason
    assert "0.35" in weaker.reason

"""Parsers: what they read, and that nothing else becomes a label."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling.answers import Answer, Token, read_answer
from laif_jax.labeling.critic import load_critic, shipped_critics
from laif_jax.labeling.errors import CallError, CriticError
from laif_jax.labeling.parsers import make_parser
from laif_jax.records import Status

CRITICS = shipped_critics("comparison")
PARSERS = {name: load_critic(name).reader for name in CRITICS}
TEXT_CRITICS = [name for name in CRITICS if not PARSERS[name].needs_logprobs]


def answer(text: str, tokens: tuple[Token, ...] = ()) -> Answer:
    return Answer(text, "stop", "", tokens, None, "", "")


def token(top: dict[str, float]) -> Token:
    pairs = tuple((name, math.log(p)) for name, p in top.items())
    return Token(pairs[0][0], pairs[0][1], pairs)


@pytest.mark.parametrize("name", CRITICS)
@given(logit=st.floats(-30, 30), coin=st.booleans())
def test_what_a_parser_renders_it_reads_back(name: str, logit: float, coin: bool) -> None:
    parser = PARSERS[name]
    rendered = parser.render(logit, coin)
    tokens = (Token(*rendered.top[0], rendered.top),) if rendered.top else ()
    verdict = parser.parse(answer(rendered.text, tokens))
    assert verdict.p_second is not None
    if parser.needs_logprobs:
        assert verdict.p_second == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-9)
    elif logit != 0:
        assert verdict.p_second == float(logit > 0)


@pytest.mark.parametrize("name", CRITICS)
@given(
    text=st.text(max_size=300), noise=st.lists(st.tuples(st.text(max_size=6), st.floats(-50, 0)), max_size=6)
)
def test_no_text_makes_a_parser_raise_or_break_the_contract(name, text, noise) -> None:
    tokens = tuple(Token(t, p, tuple(noise)) for t, p in noise)
    verdict = PARSERS[name].parse(answer(text, tokens))
    assert (verdict.p_second is None) == (verdict.status not in (Status.OK, Status.TIE))
    if verdict.p_second is not None:
        assert 0.0 <= verdict.p_second <= 1.0
        assert (verdict.p_second == 0.5) == (verdict.status is Status.TIE)


# Letters without a, b, m, w, the words of the formats, and no bracket: whatever it is, it answers nothing.
_GARBAGE = st.text(alphabet="cdefghijklnopqrstuvxyz 0123456789.,:;!?\n#*-", max_size=200)


@pytest.mark.parametrize("name", CRITICS)
@given(text=_GARBAGE)
def test_garbage_is_never_a_label(name: str, text: str) -> None:
    if {"1", "2"} <= set(PARSERS[name].options.tokens if PARSERS[name].needs_logprobs else ()):
        text = text.translate({ord("1"): "3", ord("2"): "3"})  # there they are answers
    tokens = tuple(Token(word, -0.5, ((word, -0.5), ("zz", -3.0))) for word in text.split()) or (
        Token("zz", -0.1, (("zz", -0.1),)),
    )
    verdict = PARSERS[name].parse(answer(text, tokens))
    assert verdict.status is Status.UNPARSABLE
    assert verdict.p_second is None
    assert verdict.reason


@pytest.mark.parametrize(
    ("text", "p_second"),
    [
        ("Output (a)", 0.0),
        ("Output (b)", 1.0),
        ("\nOutput (b)", 1.0),
        ("My verdict:\n Output (a)", 0.0),
        ("I prefer Output (a)", None),  # not at the start of a line: the protocol's pattern does not take it
        ("Output (a)\nOutput (b)", None),
        ("output (a)", None),
        ("Both are fine", None),
    ],
)
def test_laif_basic(text: str, p_second: float | None) -> None:
    assert PARSERS["laif_basic"].parse(answer(text)).p_second == p_second


@pytest.mark.parametrize(
    ("text", "p_second"),
    [
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]", 0.0),
        ("[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", 1.0),
        ("```python\n[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]\n```", 1.0),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 1}]", 0.5),
        ("[{'model': 'model_1', 'rank': 1}]", None),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", None),
        ("[{'model': 'model_1', 'rank': True}, {'model': 'model_2', 'rank': 2}]", None),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 3}]", None),
        (
            "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}, {'model': 'x', 'rank': 2}]",
            None,
        ),
        ("[__import__('os').system('true')]", None),
        ("[" * 5000 + "]" * 5000, None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_ranking(text: str, p_second: float | None) -> None:
    assert PARSERS["alpaca_eval_gpt4"].parse(answer(text)).p_second == p_second


@pytest.mark.parametrize(
    ("text", "p_second"),
    [
        ('{"reason": "clear", "winner": "b"}', 1.0),
        ('Here you are: {"reason": "clear {or not}", "winner": " A "} .', 0.0),
        ('{"winner": "tie"}', 0.5),
        ('{"winner": "a"} {"winner": "b"}', None),
        ('{"winner": "a"} and again {"winner": "a"}', 0.0),
        ('{"winner": ["a"]}', None),
        ('{"winner": "both"}', None),
        ('{"winner": "b', None),
        ("{" * 20000, None),
        ('{"a":' * 5000, None),
    ],
)
def test_json(text: str, p_second: float | None) -> None:
    verdict = PARSERS["pairwise_json"].parse(answer(text))
    assert verdict.p_second == p_second
    if "clear" in text:
        assert verdict.rationale.startswith("clear")


def test_logprobs_are_normalised_over_the_two_options() -> None:
    parser = PARSERS["ab_logprob"]
    verdict = parser.parse(answer("A", (token({"A": 0.5, " B": 0.2, "B": 0.1, "The": 0.1}),)))
    assert verdict.p_second == pytest.approx(0.3 / 0.8)
    assert verdict.meta["mass"] == pytest.approx(0.8)
    # An option that is not among the top tokens counts as 0; too little mass on both is no label.
    assert parser.parse(answer("B", (token({"B": 0.9, "x": 0.1}),))).p_second == 1.0
    assert parser.parse(answer("The", (token({"The": 0.9, "A": 0.004, "B": 0.003}),))).p_second is None
    # The token that was sampled counts, even if the endpoint leaves it out of the list.
    sampled = Token("B", math.log(0.6), (("A", math.log(0.2)),))
    assert parser.parse(answer("B", (sampled,))).p_second == pytest.approx(0.75)


def test_alpaca_eval_identifiers_are_told_apart_by_case_only() -> None:
    parser = PARSERS["alpaca_eval_clf"]
    assert parser.parse(answer("m", (token({"m": 0.6, "M": 0.2, " M": 0.2}),))).p_second == pytest.approx(
        0.25
    )
    assert parser.parse(answer("x", (token({"x": 0.6, "n": 0.4}),))).p_second is None


def test_search_looks_past_the_first_token() -> None:
    parser = make_parser("ab_logprob", {"tokens": ["A", "B"], "search": 3})
    tokens = (token({"Answer": 0.99, "A": 0.01}), token({":": 1.0}), token({"B": 0.7, "A": 0.3}))
    assert parser.parse(answer("Answer: B", tokens)).p_second == pytest.approx(0.7)


@pytest.mark.parametrize("logprob", [float("nan"), 0.7, "-0.1", None, True])
def test_numbers_that_are_no_log_probabilities_are_not_read(logprob: object) -> None:
    entries = [{"token": "A", "logprob": logprob}, {"token": "B", "logprob": logprob}]
    body = {
        "choices": [
            {
                "message": {"content": "A"},
                "logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": entries}]},
            }
        ]
    }
    (only,) = read_answer(body, needs_logprobs=True).tokens
    assert only.top == ()
    body["choices"][0]["logprobs"]["content"][0]["logprob"] = logprob
    with pytest.raises(CallError, match="log-probs"):
        read_answer(body, needs_logprobs=True)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "logprobs", "usage", "refusal", "top_logprobs", "token"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(body=_JSON, needs_logprobs=st.booleans())
def test_any_json_is_an_answer_or_a_clear_call_error(body: object, needs_logprobs: bool) -> None:
    check_answer_or_call_error(body, needs_logprobs)


def check_answer_or_call_error(body: object, needs_logprobs: bool) -> None:
    try:
        result = read_answer(body, needs_logprobs=needs_logprobs)
    except CallError as error:
        usable = bool(error.reason)
    else:
        usable = bool(result.text.strip() or result.refusal or result.tokens)
    assert usable


@given(inner=_JSON)
def test_any_choice_is_an_answer_or_a_clear_call_error(inner: object) -> None:
    check_answer_or_call_error({"choices": [inner]}, True)
    check_answer_or_call_error(
        {"choices": [{"message": {"content": inner}, "logprobs": {"content": inner}}], "usage": inner}, True
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ab_logprobs", {}),
        ("ab_logprob", {"tokens": ["A", "A"]}),
        ("regex", {"first": "(", "second": "b", "answer_first": "a", "answer_second": "b"}),
        ("json", {"keys": "x"}),
    ],
)
def test_wrong_parser_or_options_are_named(name: str, options: dict) -> None:
    with pytest.raises(CriticError) as error:
        make_parser(name, options)
    assert name in str(error.value)


def test_wire_text_may_come_in_parts() -> None:
    body = json.loads('{"choices": [{"message": {"content": [{"type": "text", "text": "Output (a)"}]}}]}')
    assert read_answer(body).text == "Output (a)"

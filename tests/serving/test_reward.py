"""A reward model as a critic: questions are read back exactly or refused, and answered from two scores."""

import asyncio
import dataclasses
import math
import re
from contextlib import asynccontextmanager

import httpx
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.rl import RewardSpec
from laif_jax.labeling.answers import read_answer
from laif_jax.labeling.critic import Critic, instruction_text, load_critic, shipped_critics
from laif_jax.labeling.errors import CriticError
from laif_jax.models.reward import load_reward_model, save_reward_model, start_reward_model
from laif_jax.records import Message, Prompt, Status
from laif_jax.rollout.rewards import RewardScorer, encode_response
from laif_jax.serving.questions import (
    FIELDS,
    MAX_QUESTION,
    Question,
    QuestionError,
    QuestionReader,
    conversation,
    readable_critics,
)
from laif_jax.serving.reward import answer, create_reward_app
from laif_jax.serving.server import ServingError, serve_model
from tests.serving.conftest import client_of, make_model

CRITICS = readable_critics()
READER = QuestionReader()


def literals(critic: Critic) -> list[str]:
    """The pieces of a critic's own text between the fields."""
    text = "\x01".join(m["content"] for m in critic.messages(*(f"\x00{name}\x00" for name in FIELDS)))
    return [piece for piece in text.replace("\x01", "\x00").split("\x00") if piece and piece not in FIELDS]


def nasty(critic: Critic) -> st.SearchStrategy[str]:
    """Texts made of the critic's own headings, parts of them, placeholders, and what confuses expressions."""
    own = [
        piece
        for literal in literals(critic)
        for piece in (literal, literal[:-1], literal[-40:], literal.strip())
    ]
    odd = [
        "{output_1}",
        "{instruction}",
        "\\",
        "(?P<x>",
        "\n\n",
        "",
        "$",
        "Human: x",
        "\u2028",
        "答え",
        '"""',
        "\x00",
    ]
    return st.lists(st.one_of(st.sampled_from(own + odd), st.text(max_size=8)), max_size=4).map("".join)


# ---- questions -------------------------------------------------------------------------------------------------


def test_critics_that_ask_for_more_than_two_scores_say_are_refused() -> None:
    more = sorted(set(shipped_critics("comparison")) - set(CRITICS))
    assert {"rlaif_cot", "rlaif_harmless", "constitutional"} <= set(more)
    assert {"ab_logprob", "laif_basic", "pairwise_json"} <= set(CRITICS)
    for name in more:
        with pytest.raises(CriticError, match="a reward model cannot answer"):
            QuestionReader([name])


@pytest.mark.parametrize("name", CRITICS)
def test_every_shipped_critics_question_is_read_back(name) -> None:
    critic = load_critic(name)
    texts = ("Say {output_1}.\n\nNow!", "  An answer (a).\nResponse B: no\n", '```json\n{"winner": "b"}\n```')
    found = READER.read(critic.messages(*texts))
    assert found.critic.name == name
    assert (found.instruction, found.first, found.second) == texts


@pytest.mark.parametrize("name", CRITICS)
@given(data=st.data())
def test_a_question_is_read_back_exactly_or_refused_but_never_wrongly(name, data) -> None:
    critic = load_critic(name)
    texts = tuple(data.draw(nasty(critic)) for _ in FIELDS)
    found, code = read_or_code(critic.messages(*texts))
    if found is not None:
        assert (found.instruction, found.first, found.second) == texts
        assert found.critic.name == name
        assert ways(critic, critic.messages(*texts)[-1]["content"]) == [texts]
        return
    assert code == "ambiguous_question"
    assert len(ways(critic, critic.messages(*texts)[-1]["content"])) > 1


def ways(critic: Critic, text: str) -> list[tuple[str, str, str]]:
    """All ways to read the last message, which holds the three fields in their order, by trying every place."""
    before, first, second, after = re.split(
        "\x00[a-z0-9_]+\x00", critic.messages(*(f"\x00{name}\x00" for name in FIELDS))[-1]["content"]
    )
    body, found = text[len(before) : len(text) - len(after)], []
    for i in (m.start() for m in re.finditer(f"(?={re.escape(first)})", body)):
        for j in (m.start() for m in re.finditer(f"(?={re.escape(second)})", body)):
            if j >= i + len(first):
                found.append((body[:i], body[i + len(first) : j], body[j + len(second) :]))
    return found


def read_or_code(messages) -> tuple[Question | None, str]:
    try:
        return READER.read(messages), ""
    except QuestionError as error:
        return None, error.code


def test_headings_in_a_text_are_refused_and_not_guessed() -> None:
    critic = load_critic("ab_logprob")
    with pytest.raises(QuestionError, match="more than one way") as error:
        READER.read(critic.messages("x", "one\n\nResponse B:\ntwo", "three"))
    assert error.value.code == "ambiguous_question"
    # The same heading where it leaves no second way to read the question.
    assert (
        READER.read(critic.messages("x\n\nResponse B:\ny", "one", "two")).instruction == "x\n\nResponse B:\ny"
    )


def test_what_no_critic_asked_is_refused() -> None:
    for messages in (
        [{"role": "user", "content": "Which is better, A or B?"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    ):
        with pytest.raises(QuestionError, match="none of their questions") as error:
            READER.read(messages)
        assert error.value.code == "unknown_question"
    long = load_critic("ab_logprob").messages("x" * MAX_QUESTION, "a", "b")
    with pytest.raises(QuestionError, match="shorten it"):
        READER.read(long)
    with pytest.raises(QuestionError, match="ab_logprob"):
        QuestionReader(["ab_logprob"]).read(load_critic("laif_basic").messages("x", "a", "b"))


def test_a_critic_of_your_own(tmp_path) -> None:
    (tmp_path / "critic.yaml").write_text(
        "name: mine\nparser: regex\noptions: {first: ONE, second: TWO, answer_first: ONE, answer_second: TWO}\n"
    )
    (tmp_path / "prompt.txt").write_text(
        "[system]\nFor: {instruction}\n[user]\n1. {output_1}\n2. {output_2}\nAgain, for {instruction}: ONE or TWO?\n"
    )
    reader = QuestionReader([str(tmp_path)])
    critic = load_critic(str(tmp_path))
    found = reader.read(critic.messages("an a.c", "x", "y"))
    assert (found.instruction, found.first, found.second) == ("an a.c", "x", "y")
    messages = [dict(message) for message in critic.messages("an a.c", "x", "y")]
    messages[0]["content"] = "For: another"  # the two places of the instruction must say the same
    with pytest.raises(QuestionError):
        reader.read(messages)


def test_conversations_are_read_back() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello.\n\nYes?"), ("user", "Go on: now")]
    messages = tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns)
    assert tuple(conversation(instruction_text(Prompt(messages=messages)))) == messages
    system = (Message(role="system", content="Be brief."), messages[0])
    assert tuple(conversation(instruction_text(Prompt(messages=system)))) == system
    for text in (
        "Human: alone",
        "One.\n\nHuman: two",
        "Human: a\n\nAssistant: b",
        "Human: a\n\nHuman: b",
        "",
    ):
        assert conversation(text) == [Message(role="user", content=text)]


# ---- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("logit", [-40.0, -1.3, -1e-4, 1e-4, 2.0, 700.0])
def test_the_critics_own_parser_reads_the_answer(name, logit) -> None:
    critic = load_critic(name)
    text, ranked = answer(critic, logit)
    assert math.exp(ranked[0][1]) + math.exp(ranked[1][1]) == pytest.approx(1.0)
    verdict = critic.reader.parse(read_answer(_body(text, ranked)))
    assert verdict.status in (Status.OK, Status.TIE)
    p = 1 / (1 + math.exp(-logit))
    expected = p if critic.parser == "ab_logprob" else float(logit > 0)
    assert verdict.p_second == pytest.approx(expected, abs=1e-9)


def _body(text: str, ranked) -> dict:
    entry = {"token": text, "logprob": ranked[0][1]}
    entry["top_logprobs"] = [{"token": token, "logprob": logp} for token, logp in ranked]
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "logprobs": {"content": [entry]}, "finish_reason": "stop"}]}


# ---- the server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    spec = RewardSpec(steps=1, max_length=48, max_prompt_length=24, end_of_context="<end>", members=2)
    model = start_reward_model(make_model(), spec, jax.random.key(5))
    params = dict(model.params) | {"score": {"kernel": 9.0 * model.params["score"]["kernel"]}}
    model = dataclasses.replace(model, params=params)
    return save_reward_model(tmp_path_factory.mktemp("rewards") / "tiny", model)


@asynccontextmanager
async def serving(folder, **options):
    app = create_reward_app(str(folder), **options)
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield app, client


def question(critic: str, *texts: str, **changes) -> dict:
    params = dict(load_critic(critic).params)
    if "top_logprobs" in params:
        params["logprobs"] = True
    return {"model": "default", "messages": list(load_critic(critic).messages(*texts)), **params, **changes}


async def ask(client: httpx.AsyncClient, request: dict) -> dict:
    response = await client.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    return response.json()


async def test_answers_follow_the_scores_of_the_model(reward_folder) -> None:
    model = load_reward_model(reward_folder)
    texts = ("rev:abc", "cba", "abc abc")
    rows = [encode_response(model, [{"role": "user", "content": texts[0]}], text) for text in texts[1:]]
    first, second = RewardScorer(model).score(rows).mean(axis=0).tolist()
    assert abs(first - second) > 0.05
    async with serving(reward_folder, name="rm") as (_, client):
        here, there = [
            await ask(client, question("ab_logprob", *order)) for order in (texts, (texts[0], *texts[:0:-1]))
        ]
        for body, difference in ((here, first - second), (there, second - first)):
            verdict = load_critic("ab_logprob").reader.parse(read_answer(body, needs_logprobs=True))
            assert verdict.p_second is not None
            assert 1 - verdict.p_second == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-5)
        assert here["reward"]["scores"] == pytest.approx([first, second], abs=1e-5)
        for name in CRITICS:
            body = await ask(client, question(name, *texts))
            verdict = load_critic(name).reader.parse(read_answer(body))
            assert verdict.p_second is not None
            assert (verdict.p_second > 0.5) == (second > first)
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "rm"
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_many_questions_at_once_are_scored_together(reward_folder) -> None:
    async with serving(reward_folder, window=0.2) as (app, client):
        texts = [("copy:abc", "abc", "a" * (1 + i)) for i in range(3)]
        bodies = await asyncio.gather(*(ask(client, question("laif_basic", *row)) for row in texts))
        assert app.state.service.batches == 1
        alone = [await ask(client, question("laif_basic", *row)) for row in texts]
        for one, other in zip(bodies, alone, strict=True):
            np.testing.assert_allclose(one["reward"]["scores"], other["reward"]["scores"], atol=1e-5)


async def test_bad_questions_get_a_clear_400(reward_folder) -> None:
    async with serving(reward_folder) as (_, client):
        cases = [
            (question("ab_logprob", "x", "a\n\nResponse B:\nb", "c"), "more than one way"),
            ({"messages": [{"role": "user", "content": "Hello"}]}, "none of their questions"),
            (question("ab_logprob", "x", "a", "b", stream=True), "stream"),
        ]
        for request, words in cases:
            response = await client.post("/v1/chat/completions", json=request)
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
        response = await client.post(
            "/v1/chat/completions", json=question("ab_logprob", "x", "a", "b", model="gpt")
        )
        assert response.status_code == 404


def test_the_wrong_kind_of_model_is_told_before_serving(checkpoint, reward_folder, tmp_path) -> None:
    with pytest.raises(ServingError, match="--template"):
        serve_model(str(reward_folder), reward=True, template="model")
    with pytest.raises(ServingError, match="add `--reward`"):
        serve_model(str(reward_folder))
    with pytest.raises(ServingError, match="no such folder"):
        serve_model(str(tmp_path / "none"), reward=True)
    with pytest.raises(ValueError, match=r"reward model|ForSequenceClassification"):
        serve_model(str(checkpoint), reward=True)

"""The OpenAI protocol over a checkpoint."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import SamplingSpec
from laif_jax.data.chat import encode_prompt
from laif_jax.models.model import load_model
from laif_jax.rollout.generate import generate
from laif_jax.rollout.score import score
from laif_jax.serving import create_app
from tests.serving.conftest import ask, body, client_of, serving

TEXTS = ("copy abc", "reverse hgfa", "sort c", "repeat ab", "abc", "x")


def offline(checkpoint, texts):
    """Greedy answers by `generate`, the way the sampling stage writes them."""
    model = load_model(str(checkpoint))
    prompts = [
        encode_prompt(model.tokenizer, [{"role": "user", "content": text}], "model", None) for text in texts
    ]
    spec = SamplingSpec(temperature=0.0, max_new_tokens=16, batch_size=1)
    samples = generate(model.params, model.cfg, prompts, spec, jax.random.key(0))
    return model, prompts, samples


async def test_answers_equal_generation_and_carry_usage_and_finish_reason(checkpoint):
    model, prompts, samples = offline(checkpoint, TEXTS)
    async with serving(checkpoint) as (_, client):
        answers = [await ask(client, body(text, temperature=0)) for text in TEXTS]
    for prompt, sample, answer in zip(prompts, samples, answers, strict=True):
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == model.tokenizer.decode(sample.tokens, skip_special_tokens=True)
        assert choice["finish_reason"] == sample.finish_reason
        assert choice["logprobs"] is None
        drawn = len(sample.tokens) + (sample.eos is not None)
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": drawn,
            "total_tokens": len(prompt) + drawn,
        }
        assert (answer["object"], answer["model"]) == ("chat.completion", "tiny-symbols")
    assert len({answer["id"] for answer in answers}) == len(TEXTS)


async def test_logprobs_are_the_full_forward_passes_whatever_the_temperature(checkpoint):
    model, prompts, _ = offline(checkpoint, TEXTS[:1])
    request = body(TEXTS[0], temperature=0.3, top_p=0.5, logprobs=True, top_logprobs=5, seed=4)
    async with serving(checkpoint) as (_, client):
        answer = await ask(client, request)
        plain = await ask(client, {**request, "top_logprobs": 0})
    content = answer["choices"][0]["logprobs"]["content"]
    tokens = [model.tokenizer.convert_tokens_to_ids(entry["token"]) for entry in content]
    (expected,) = score(model.params, model.cfg, prompts, [tokens])
    np.testing.assert_allclose([entry["logprob"] for entry in content], expected, atol=1e-4)
    for entry in content:
        values = [best["logprob"] for best in entry["top_logprobs"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        twin = [best["logprob"] for best in entry["top_logprobs"] if best["token"] == entry["token"]]
        assert twin == [] or twin[0] == pytest.approx(entry["logprob"], abs=1e-6)
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert [e["token"] for e in plain["choices"][0]["logprobs"]["content"]] == [e["token"] for e in content]
    assert all(e["top_logprobs"] == [] for e in plain["choices"][0]["logprobs"]["content"])


async def test_seed_and_n(checkpoint):
    request = body(n=3, seed=11, temperature=1.0)
    async with serving(checkpoint, endless=True) as (_, client):
        first, again = await ask(client, request), await ask(client, request)
        other = await ask(client, body(n=3, seed=12))
        free = [await ask(client, body()) for _ in range(2)]

    def texts(answer):
        return [choice["message"]["content"] for choice in answer["choices"]]

    assert texts(first) == texts(again) != texts(other)
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts(first))) > 1
    assert len({texts(answer)[0] for answer in free}) > 1


async def test_stop_strings_cut_text_tokens_and_logprobs(checkpoint):
    request = body(max_tokens=40, seed=1, logprobs=True)
    async with serving(checkpoint, endless=True) as (_, client):
        whole = (await ask(client, request))["choices"][0]
        text = whole["message"]["content"]
        assert whole["finish_reason"] == "length"
        stop = text[len(text) // 2 :][:3]
        cut = await ask(client, {**request, "stop": ["never\n", stop]})
    (choice,) = cut["choices"]
    assert choice["message"]["content"] == text[: text.find(stop)]
    assert choice["finish_reason"] == "stop"
    entries = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert entries == [entry["token"] for entry in whole["logprobs"]["content"]][: len(entries)]
    written = "".join(token for token in entries if not token.startswith("<"))  # role markers leave no text
    assert written == choice["message"]["content"] + stop
    assert entries[-1] == stop[-1]
    assert cut["usage"]["completion_tokens"] == len(entries)


async def test_max_tokens_is_cut_to_the_context(checkpoint):
    async with serving(checkpoint, endless=True) as (_, client):
        for limit in (None, 10000):
            answer = await ask(client, body(max_tokens=limit, temperature=0, logprobs=True))
            assert answer["usage"]["total_tokens"] == 64
            assert answer["choices"][0]["finish_reason"] == "length"


async def test_content_parts_and_max_completion_tokens(checkpoint):
    parts = [{"type": "text", "text": "copy "}, {"type": "text", "text": "abc"}]
    async with serving(checkpoint) as (_, client):
        one = await ask(client, body(parts, temperature=0, max_tokens=None, max_completion_tokens=3))
        two = await ask(client, body("copy abc", temperature=0, max_tokens=3, user="me", stream=False))
    assert one["choices"] == two["choices"]


BAD = {
    "not a number": (body(temperature="hot"), "temperature", 400),
    "too hot": (body(temperature=3), "temperature", 400),
    "top_p": (body(top_p=1.5), "top_p", 400),
    "no tokens": (body(max_tokens=0), "max_tokens", 400),
    "n": (body(n=0), "n", 400),
    "n beyond the queue": (body(n=100), "n", 400),
    "no messages": ({"model": "default"}, "messages", 400),
    "empty messages": (body() | {"messages": []}, "messages", 400),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", 400),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        400,
    ),
    "stream": (body(stream=True), "stream", 400),
    "tools": (body(tools=[{"type": "function"}]), "tools", 400),
    "penalty": (body(presence_penalty=0.5), "presence_penalty", 400),
    "unknown": (body(beam_width=4), "beam_width", 400),
    "top_logprobs alone": (body(top_logprobs=3), "top_logprobs", 400),
    "too many top_logprobs": (body(logprobs=True, top_logprobs=21), "top_logprobs", 400),
    "empty stop": (body(stop=["a", ""]), "stop", 400),
    "too long": (body("a" * 70), "messages", 400),
    "another model": (body(model="gpt-4"), "model", 404),
}


async def test_bad_requests_are_refused_by_name_in_openais_shape(checkpoint):
    async with serving(checkpoint, max_queue=64) as (app, client):
        for name, (request, param, status) in BAD.items():
            response = await client.post("/v1/chat/completions", json=request)
            assert response.status_code == status, (name, response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, name
            assert error["type"] == "invalid_request_error", name
            assert error["param"].startswith(param), (name, error)
            assert error["message"], name
        for headers in ({"content-type": "application/json"}, {}):
            raw = await client.post("/v1/chat/completions", content=b"{nope", headers=headers)
            assert raw.status_code == 400
            assert "JSON" in raw.json()["error"]["message"]
        assert (
            (await client.get("/v1/embeddings")).json()["error"]["message"].startswith("GET /v1/embeddings")
        )
        assert (await client.get("/v1/chat/completions")).status_code == 405
        assert app.state.service.batcher.batches == 0
        await ask(client, body())  # and the server still works


async def test_models_and_health(checkpoint):
    async with serving(checkpoint, name="mine", max_length=60) as (_, client):
        models = (await client.get("/v1/models")).json()
        health = (await client.get("/health")).json()
        answer = await ask(client, body(model="mine", max_tokens=1))
    assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [("mine", 60)]
    assert (health["status"], health["model"], health["queued"]) == ("ok", "mine", 0)
    assert answer["system_fingerprint"] == health["fingerprint"]


async def test_concurrent_requests_share_batches_and_get_what_they_would_alone(checkpoint):
    requests = [body(text, seed=i, temperature=0.8) for i, text in enumerate(TEXTS)]
    async with serving(checkpoint, window=0.5) as (app, client):
        together = await asyncio.gather(*(ask(client, request) for request in requests))
        assert app.state.service.batcher.batches == 1
    async with serving(checkpoint, window=0.0, max_batch=1) as (app, client):
        alone = [await ask(client, request) for request in requests]
        assert app.state.service.batcher.batches == len(TEXTS)
    assert [a["choices"] for a in together] == [a["choices"] for a in alone]


async def test_a_full_queue_is_429_and_loses_nothing_that_waits(checkpoint):
    app = create_app(str(checkpoint), max_queue=5)
    async with client_of(app) as client:  # the worker is not running yet
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=body(n=3)))
        while app.state.service.batcher.queued < 3:
            await asyncio.sleep(0.01)
        full = await client.post("/v1/chat/completions", json=body(n=3))
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert full.json()["error"]["type"] == "rate_limit_error"
        async with app.router.lifespan_context(app):
            answer = await waiting
            assert answer.status_code == 200
            assert len(answer.json()["choices"]) == 3


async def test_shutdown_answers_what_waits_and_refuses_what_comes(checkpoint):
    app = create_app(str(checkpoint), max_batch=1)
    async with client_of(app) as client:
        async with app.router.lifespan_context(app):
            tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=body())) for _ in range(4)]
            while app.state.service.batcher.queued < 2:
                await asyncio.sleep(0.001)
        assert [(await task).status_code for task in tasks] == [200] * 4
        late = await client.post("/v1/chat/completions", json=body())
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "shutting_down"


async def test_broken_weights_are_a_clear_server_error_and_the_worker_lives_on(checkpoint):
    async with serving(checkpoint) as (app, client):
        engine = app.state.service.engine
        good = engine.params
        engine.params = jax.tree.map(lambda x: x * jnp.nan, good)
        broken = await client.post("/v1/chat/completions", json=body())
        assert broken.status_code == 500
        assert "not finite" in broken.json()["error"]["message"]
        engine.params = good
        await ask(client, body())

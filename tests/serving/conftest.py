"""A tiny checkpoint on disk and clients of the application over it."""

from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import jax
import pytest

from laif_jax.config.schema import ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.models.model import Model, save_model
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.serving import create_app

SPEC = ScratchSpec(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position=64,
    tie_embeddings=False,  # with tied ones, a model of random weights repeats its last token
)


def make_model(tokenizer=None, spec: ScratchSpec = SPEC) -> Model:
    """A model with peaked predictions."""
    tokenizer = tokenizer or load_tokenizer("symbols")
    cfg = scratch(spec, len(tokenizer), eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id)
    params = init_params(cfg, jax.random.key(3))
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] * 2.0
    return Model(cfg, params, tokenizer)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-symbols"
    save_model(folder, make_model())
    return folder


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120)


@asynccontextmanager
async def serving(checkpoint, *, endless: bool = False, **options):
    """(app, client) with the worker running. `endless`: no token ends an answer."""
    app = create_app(str(checkpoint), **options)
    if endless:
        app.state.service.engine.eos_ids[:] = -1
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield app, client


def body(text: str = "copy abc", **changes) -> dict:
    return {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 16,
        **changes,
    }


async def ask(client: httpx.AsyncClient, request: dict) -> dict:
    response = await client.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    return response.json()

"""Prices: dated tables, exact integers, and no guesses."""

import datetime
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.schema import EndpointSpec, SimulatedSpec
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.prices import (
    TABLES,
    Price,
    cost,
    dollars,
    most,
    need_price,
    paid,
    price_of,
    read_table,
)
from laif_jax.records import Usage

DAY = datetime.date(2026, 11, 1)
OPENAI = "https://api.openai.com/v1"
tokens = st.integers(0, 10**7)
rates = st.decimals(0, 1000, places=4)
prices = st.builds(
    Price,
    prompt=rates,
    cached_prompt=rates,
    completion=rates,
    batch_discount=st.decimals(0, 1, places=2),
    discount_cached=st.booleans(),
)


def openai(model: str, base_url: str = OPENAI, **rest: object) -> Endpoint:
    return Endpoint.model_validate({"provider": "openai", "model": model, "base_url": base_url, **rest})


@pytest.mark.parametrize(
    ("provider", "model", "prompt", "cached", "completion"),
    [
        ("openai", "gpt-4o", "2.5", "1.25", "10"),
        ("openai", "gpt-4o-2024-08-06", "2.5", "1.25", "10"),
        ("openai", "gpt-4o-2024-05-13", "5", "5", "15"),
        ("openai", "gpt-4.1-mini-2025-04-14", "0.4", "0.1", "1.6"),
        ("anthropic", "claude-sonnet-4-5-20250929", "3", "0.3", "15"),
        ("anthropic", "claude-opus-4-1-20250805", "15", "1.5", "75"),
        ("anthropic", "claude-opus-4-5", "5", "0.5", "25"),
        ("google", "models/gemini-2.5-flash", "0.3", "0.03", "2.5"),
    ],
)
def test_models_are_found_by_name(provider, model, prompt, cached, completion) -> None:
    base_url = OPENAI if provider == "openai" else None
    price = price_of(Endpoint(provider=provider, model=model, base_url=base_url), DAY)
    assert price is not None
    assert (price.prompt, price.cached_prompt, price.completion) == tuple(
        map(Decimal, (prompt, cached, completion))
    )
    assert price.batch_discount == Decimal("0.5")
    assert price.source.startswith("https://")


def test_many_calls_together_have_no_long_price() -> None:
    gemini = Endpoint(provider="google", model="gemini-2.5-pro")
    price = price_of(gemini, DAY)
    assert price is not None
    assert price.long_above is not None
    assert price.long is not None
    used = Usage(prompt_tokens=price.long_above + 1)
    assert cost(price, used) > cost(price, used, calls=2) > 0
    assert paid(gemini, used, calls=2, on=DAY) == cost(price, used, calls=2) / 1e9
    assert paid(gemini, None, on=DAY) == 0.0
    assert paid(openai("gpt-99"), used, on=DAY) is None


@pytest.mark.parametrize(
    "model", ["gpt-4o-audio-preview", "gpt-4", "xgpt-4o", "gpt-4o ", "gpt-9", "gptx4.1", "gpt-4x1"]
)
def test_similar_names_are_other_models(model: str) -> None:
    price = price_of(openai(model), DAY)
    assert (price is None) == (model != "gpt-4")


def test_the_same_name_elsewhere_is_another_model() -> None:
    for url in (
        "http://127.0.0.1:8000/v1",
        "https://api.together.xyz/v1",
        "https://api.openai.com.evil.example/v1",
    ):
        assert price_of(openai("gpt-4o", url), DAY) is None
    proxy = Endpoint(provider="anthropic", model="claude-opus-4-5", base_url="https://proxy.example")
    assert price_of(proxy, DAY) is None


def test_a_price_has_its_day() -> None:
    at = openai("o3")
    before, after = (price_of(at, datetime.date(2025, *day)) for day in ((5, 1), (7, 1)))
    assert before is not None
    assert after is not None
    assert (before.prompt, after.prompt) == (Decimal("10.0"), Decimal("2.0"))
    oldest = price_of(at, datetime.date(2020, 1, 1))
    assert oldest == before  # the dearest guess for a day before all
    assert after.as_of is not None
    assert after.warning(after.as_of) == ""
    assert "check it" in after.warning(after.as_of + datetime.timedelta(days=200))


def test_own_prices_win_and_local_models_are_free() -> None:
    spec = EndpointSpec(
        provider="openai",
        base_url=OPENAI,
        model="gpt-4o",
        prompt_price=0.1,
        completion_price=0.2,
        cached_prompt_price=0.05,
        batch_discount=0.25,
    )
    for at in (spec, Endpoint.from_spec(spec)):
        price = price_of(at, DAY)
        assert price is not None
        assert (price.prompt, price.cached_prompt, price.completion) == (
            Decimal("0.1"),
            Decimal("0.05"),
            Decimal("0.2"),
        )
        assert price.batch_discount == Decimal("0.25")
        assert price.warning(DAY) == ""
    free = [
        EndpointSpec(provider="simulated", simulated=SimulatedSpec()),
        EndpointSpec(provider="llama_cpp", gguf="x.gguf"),
        openai("x", "http://127.0.0.1:1/v1", identity="gguf:abc"),
        openai("x", "http://h/v1", cassette="tape.jsonl"),
    ]
    for at in free:
        price = price_of(at, DAY)
        assert price is not None
        assert price.free
    paid = EndpointSpec(
        provider="simulated", simulated=SimulatedSpec(), prompt_price=1.0, completion_price=2.0
    )
    assert not need_price(paid, DAY).free
    with pytest.raises(ValueError, match="cached_prompt_price"):
        EndpointSpec(provider="openai", base_url=OPENAI, cached_prompt_price=1.0)


def test_no_price_is_explained() -> None:
    with pytest.raises(EndpointError, match=r"no price is known for 'my-model'.*`prompt_price`"):
        need_price(openai("my-model", "http://127.0.0.1:1/v1"), DAY)


def test_costs_by_hand() -> None:
    price = price_of(openai("gpt-4o-mini"), DAY)
    assert price is not None
    used = Usage(prompt_tokens=1_000_000, completion_tokens=1_000_000, cached_tokens=400_000)
    # 0.6 * 0.15 + 0.4 * 0.075 + 0.60 dollars
    assert cost(price, used) == 720_000_000
    assert cost(price, used, batch=True) == 360_000_000
    assert dollars(cost(price, used)) == "0.7200 USD"
    google = price_of(Endpoint(provider="google", model="gemini-2.5-pro"), DAY)
    assert google is not None
    assert cost(google, Usage(prompt_tokens=200_000)) == 250_000_000
    assert cost(google, Usage(prompt_tokens=200_001)) == 200_001 * 2500  # the longer kind, as a whole
    # Cached tokens have no discount in a batch: 0.125 instead of 1.25 / 2.
    assert cost(google, Usage(prompt_tokens=100_000, cached_tokens=100_000), batch=True) == 12_500_000


@given(prices, tokens, tokens, tokens, st.booleans())
def test_costs_are_exact_monotonic_and_within_what_was_reserved(
    price, prompt, cached, completion, batch
) -> None:
    used = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
    spent = cost(price, used, batch=batch)
    assert isinstance(spent, int)
    assert spent >= 0
    cached = min(cached, prompt)
    factor = 1 - price.batch_discount if batch else Decimal(1)
    exact = (
        price.prompt * (prompt - cached) * factor
        + price.cached_prompt * cached * (factor if price.discount_cached else 1)
        + price.completion * completion * factor
    ) * 1000
    assert 0 <= spent - exact < 1
    more = Usage(prompt_tokens=prompt, completion_tokens=completion + 1, cached_tokens=cached)
    assert cost(price, more, batch=batch) >= spent
    if price.cached_prompt <= price.prompt and price.discount_cached:
        assert spent <= most(price, prompt, completion, batch=batch)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_are_sound(path) -> None:
    assert "CHECK THESE" in path.read_text()
    table = read_table(path)
    assert table.rows
    for pattern, _, price in table.rows:
        assert price.as_of is not None
        assert price.as_of > datetime.date(2025, 1, 1)
        assert 0 < price.cached_prompt <= price.prompt < price.completion < 1000
        if price.long is not None:
            assert price.long.prompt > price.prompt
        # No model's plain name is claimed by two rows of different patterns.
        name = re.sub(r"\\", "", pattern.pattern.partition("(")[0]).rstrip("-")
        claims = {other.pattern for other, _, _ in table.rows if other.fullmatch(name)}
        dated = re.search(
            r"\d{4}-\d{2}-\d{2}$", name
        )  # a snapshot with a price of its own stands before the others
        assert len(claims) <= (2 if dated else 1), (name, claims)


def test_the_limit_of_a_call_is_what_is_really_sent() -> None:
    messages = ({"role": "user", "content": "x"},)
    call = Call(openai("m"), messages, {"max_tokens": 50, "n": 3})
    assert call.max_tokens == 150
    assert Call(openai("m", options={"max_tokens": 4000}), messages, {"max_tokens": 50}).max_tokens == 4000
    assert Call(openai("m"), messages, {}).max_tokens is None

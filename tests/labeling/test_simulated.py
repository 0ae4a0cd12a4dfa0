"""Simulated misbehaviour and drift: planted rates come out, and draws depend on the content alone."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from laif_jax.labeling.calls import Call
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.errors import CallError
from laif_jax.labeling.judge import make_call
from laif_jax.labeling.providers import make_provider
from tests.labeling.helpers import planted, simulated


def outcomes(items: int = 400, attempt: int = 0, critic: str = "laif_basic", **spec: Any) -> list[str]:
    """What each comparison's first order gives: the answer's text, or the error's kind."""
    endpoint = simulated(**spec)
    loaded = load_critic(critic)
    calls = [make_call(item, "ab", loaded, endpoint) for item in planted(items)]

    async def run() -> list[str]:
        provider = make_provider(endpoint)

        async def one(call: Call) -> str:
            try:
                return (await provider.call(call, attempt)).text
            except CallError as error:
                return error.kind

        return await asyncio.gather(*map(one, calls))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("rate", "kind"),
    [
        ("timeout_rate", "timeout"),
        ("truncated_rate", "non_json"),
        ("malformed_rate", "malformed"),
        ("empty_rate", "empty_choices"),
        ("failure_rate", "server_error"),
        ("rate_limit_rate", "rate_limited"),
    ],
)
def test_each_misbehaviour_has_its_rate_and_is_drawn_afresh(rate: str, kind: str) -> None:
    first = outcomes(**{rate: 0.3})
    counts = Counter(first)
    assert 80 <= counts[kind] <= 160  # 0.3 of 400, five standard deviations
    assert set(counts) == {kind, "Output (a)", "Output (b)"}
    again = outcomes(attempt=1, **{rate: 0.3})
    both = sum(a == b == kind for a, b in zip(first, again, strict=True))
    assert 10 <= both <= 70  # 0.09 of 400


def test_misbehaviour_leaves_the_other_answers_alone() -> None:
    calm, rough = outcomes(), outcomes(timeout_rate=0.3, truncated_rate=0.2, malformed_rate=0.2)
    kinds = {"timeout", "non_json", "malformed"}
    assert {b for a, b in zip(calm, rough, strict=True) if a != b} == kinds


def test_errors_say_what_they_may_have_cost() -> None:
    endpoint = simulated(timeout_rate=1.0)
    call = make_call(planted(1)[0], "ab", load_critic("laif_basic"), endpoint)
    with pytest.raises(CallError) as error:
        asyncio.run(make_provider(endpoint).call(call, 0))
    assert (error.value.billed, error.value.retryable) == ("unknown", True)


def test_a_rate_limit_can_ask_to_wait() -> None:
    endpoint = simulated(rate_limit_rate=1.0, retry_after=2.5)
    call = make_call(planted(1)[0], "ab", load_critic("laif_basic"), endpoint)
    provider = make_provider(endpoint)
    with pytest.raises(CallError) as error:
        asyncio.run(provider.call(call, 0))
    assert error.value.retry_after == 2.5
    assert not provider.free  # the scheduler keeps the time


def test_drift_changes_the_planted_share_and_nothing_else() -> None:
    base = {"accuracy": 0.75}
    old = outcomes(**base, drift=0.4)
    assert old == outcomes(**base)  # version 0 is where drift is counted from
    new = outcomes(**base, drift=0.4, version=1)
    changed = sum(a != b for a, b in zip(old, new, strict=True)) / len(old)
    # A new draw differs from the old one with probability 2 * 0.75 * 0.25: 0.15 of all.
    assert 0.08 <= changed <= 0.23
    assert outcomes(**base, drift=0.4, version=2) != new
    assert outcomes(**base, drift=0.0, version=3) == old


def test_a_version_is_told_by_the_fingerprint_and_not_by_the_key() -> None:
    endpoints = [simulated(drift=0.5, version=version) for version in (0, 7)]
    calls = [make_call(planted(1)[0], "ab", load_critic("laif_basic"), endpoint) for endpoint in endpoints]
    assert calls[0].key == calls[1].key
    first, second = (
        asyncio.run(make_provider(endpoint).call(call, 0)).provider_fingerprint
        for endpoint, call in zip(endpoints, calls, strict=True)
    )
    assert second == first + "-v7"


def test_settings_of_before_keep_their_keys() -> None:
    """Answers that are stored under the settings of the first release are still found."""
    assert simulated().identity == simulated(timeout_rate=0.0, drift=0.0, version=3, retry_after=1.0).identity
    assert simulated().identity != simulated(drift=0.1).identity

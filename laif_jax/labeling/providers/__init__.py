"""Providers: how one call reaches a model. Retry, concurrency, budget and storage are the scheduler's, not theirs."""

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.keys import read_key
from laif_jax.labeling.providers.anthropic import AnthropicTransport
from laif_jax.labeling.providers.base import Provider, Reply, read_reply
from laif_jax.labeling.providers.cassette import RecordTransport, ReplayTransport
from laif_jax.labeling.providers.google import GoogleTransport
from laif_jax.labeling.providers.openai import OpenAITransport, PlainTransport
from laif_jax.labeling.providers.remote import RemoteProvider, Transport
from laif_jax.labeling.providers.simulated import SimulatedProvider
from laif_jax.labeling.wires import RateLimits, Window

__all__ = [
    "Provider",
    "RateLimits",
    "RemoteProvider",
    "Reply",
    "SimulatedProvider",
    "Window",
    "make_provider",
    "make_transport",
    "read_reply",
]


def make_provider(endpoint: Endpoint) -> Provider:
    """The provider of an endpoint.

    Raises:
      EndpointError: it cannot be used: a key that is not set, a package that is not installed, no such cassette.
    """
    if endpoint.provider == "simulated":
        return SimulatedProvider(endpoint)
    return RemoteProvider(endpoint, make_transport(endpoint))


def make_transport(endpoint: Endpoint) -> Transport:
    """What carries an endpoint's requests. A cassette that is replayed needs neither key nor package."""
    if endpoint.cassette and endpoint.cassette_mode == "replay":
        return ReplayTransport(endpoint)
    key = read_key(endpoint)
    transport: Transport
    if endpoint.provider == "anthropic":
        transport = AnthropicTransport(endpoint, key)
    elif endpoint.provider == "google":
        transport = GoogleTransport(endpoint, key)
    else:
        kind = PlainTransport if endpoint.client == "plain" else OpenAITransport
        transport = kind(endpoint, key)
    return RecordTransport(endpoint.cassette, transport) if endpoint.cassette else transport

"""Providers: how one call reaches a model. Retry, concurrency, budget and storage are the scheduler's, not theirs."""

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.keys import read_key
from laif_jax.labeling.providers.anthropic import AnthropicTransport
from laif_jax.labeling.providers.base import Provider, Reply, read_reply
from laif_jax.labeling.providers.batch import BatchProvider
from laif_jax.labeling.providers.batch_apis import make_batches
from laif_jax.labeling.providers.cassette import RecordTransport, ReplayTransport
from laif_jax.labeling.providers.google import GoogleTransport
from laif_jax.labeling.providers.ledger import Ledger, SqlLedger
from laif_jax.labeling.providers.local import LocalTransport, is_local
from laif_jax.labeling.providers.openai import OpenAITransport, PlainTransport
from laif_jax.labeling.providers.remote import RemoteProvider, Transport
from laif_jax.labeling.providers.simulated import SimulatedProvider
from laif_jax.labeling.wires import RateLimits, Window

__all__ = [
    "BatchProvider",
    "Ledger",
    "Provider",
    "RateLimits",
    "RemoteProvider",
    "Reply",
    "SimulatedProvider",
    "SqlLedger",
    "Window",
    "make_provider",
    "make_transport",
    "read_reply",
]


def make_provider(endpoint: Endpoint, ledger: Ledger | None = None) -> Provider:
    """The provider of an endpoint.

    Args:
      ledger: where batches are noted; needed if the endpoint asks for them.

    Raises:
      EndpointError: it cannot be used: a key that is not set, a package that is not installed, no such cassette.
    """
    if endpoint.provider == "simulated":
        return SimulatedProvider(endpoint)
    reader = RemoteProvider(endpoint, make_transport(endpoint))
    if not endpoint.batch:
        return reader
    if ledger is None:
        raise EndpointError(f"endpoint {endpoint.name}: `batch` needs a store that keeps notes of batches")
    return BatchProvider(endpoint, reader, make_batches(endpoint, read_key(endpoint)), ledger)


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
    elif endpoint.client == "sdk":
        transport = OpenAITransport(endpoint, key)
    else:
        kind = LocalTransport if is_local(endpoint.base_url or "") else PlainTransport
        transport = kind(endpoint, key)
    return RecordTransport(endpoint.cassette, transport) if endpoint.cassette else transport

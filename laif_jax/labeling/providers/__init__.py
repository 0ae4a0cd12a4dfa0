"""Providers: how one call reaches a model. Retry, concurrency and storage are the scheduler's, not theirs."""

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.providers.base import Provider
from laif_jax.labeling.providers.openai import OpenAIProvider
from laif_jax.labeling.providers.simulated import SimulatedProvider

__all__ = ["OpenAIProvider", "Provider", "SimulatedProvider", "make_provider"]


def make_provider(endpoint: Endpoint) -> Provider:
    """The provider of an endpoint; raises `EndpointError` if it cannot be used (for example a key that is not set)."""
    if endpoint.provider == "simulated":
        return SimulatedProvider(endpoint)
    return OpenAIProvider(endpoint)

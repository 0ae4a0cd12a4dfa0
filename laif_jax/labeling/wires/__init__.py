"""Wire formats: what a request looks like for a provider, and what its answers, limits and errors mean. No I/O."""

from laif_jax.labeling.wires import anthropic, google, openai
from laif_jax.labeling.wires.base import RateLimits, Window, Wire

WIRES: dict[str, Wire] = {
    "openai": openai.OpenAIWire(),
    "simulated": openai.OpenAIWire(),  # speaks the OpenAI format
    "anthropic": anthropic.AnthropicWire(),
    "google": google.GoogleWire(),
}

__all__ = ["WIRES", "RateLimits", "Window", "Wire"]

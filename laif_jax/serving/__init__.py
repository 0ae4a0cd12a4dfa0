"""An OpenAI-compatible chat server over a checkpoint."""

from laif_jax.serving.app import create_app
from laif_jax.serving.reward import create_reward_app
from laif_jax.serving.server import serve_model

__all__ = ["create_app", "create_reward_app", "serve_model"]

"""The base model of a study: loaded and written once in Hugging Face layout, or made from scratch and pretrained."""

from typing import Any

import jax.numpy as jnp
from etils import epath

from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import Context


def compute_dtype(ctx: Context) -> Any:
    """The dtype of forward passes."""
    return jnp.dtype(ctx.config.model.dtype)


def model_folder(artifact: Artifact) -> epath.Path:
    """The Hugging Face layout folder of a stage that makes a model."""
    return artifact.path / "model"


def model_settings(ctx: Context) -> dict[str, Any]:
    """Model options that change what a forward pass computes or writes."""
    return ctx.config.model.resolved() | {"source": None}

"""`laif serve model`: a checkpoint behind an OpenAI-compatible endpoint."""

import logging
from pathlib import Path
from typing import Any

import uvicorn

from laif_jax.data.chat import TemplateName
from laif_jax.models.reward import is_reward_model
from laif_jax.records.errors import LaifError
from laif_jax.serving.app import create_app
from laif_jax.serving.reward import create_reward_app

log = logging.getLogger(__name__)


class ServingError(LaifError, ValueError):
    """What was asked to be served cannot be, or not so."""


def serve_model(
    checkpoint: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    template: TemplateName | None = None,
    dtype: str = "float32",
    reward: bool = False,
    shutdown_timeout: int = 60,
    **options: Any,
) -> None:
    """Serves a checkpoint until SIGINT or SIGTERM; requests in flight are then answered first.

    Args:
      checkpoint: a folder in Hugging Face layout, a `.gguf` file, or a name that `laif fetch` knows.
      template: of the prompts; None: "model". A reward model has its own.
      reward: `checkpoint` is a reward model's folder, which answers critics' pairwise questions.
      shutdown_timeout: seconds that answers in flight get after the signal.
      options: further arguments of `create_app` or `create_reward_app`.

    Raises:
      ServingError: a template for a reward model, or a language model as a reward model, or the other way round.
    """
    if reward:
        if template is not None:
            raise ServingError(
                "`--template` has no effect with `--reward`: a reward model reads what it was trained on"
            )
        if not Path(checkpoint).is_dir():
            raise ServingError(f"{checkpoint}: no such folder; `laif reward` writes a reward model's folder")
        app = create_reward_app(checkpoint, dtype=dtype, **options)
    else:
        if is_reward_model(checkpoint):
            raise ServingError(f"{checkpoint} is a reward model, which writes no text: add `--reward`")
        app = create_app(checkpoint, template=template or "model", dtype=dtype, **options)
    log.info("serving %s at http://%s:%d/v1", app.state.service.name, host, port)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=shutdown_timeout)

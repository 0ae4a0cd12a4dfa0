"""`laif serve model`: a checkpoint behind an OpenAI-compatible endpoint."""

import logging
from typing import Any

import uvicorn

from laif_jax.data.chat import TemplateName
from laif_jax.serving.app import create_app

log = logging.getLogger(__name__)


def serve_model(
    checkpoint: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    template: TemplateName = "model",
    dtype: str = "float32",
    shutdown_timeout: int = 60,
    **options: Any,
) -> None:
    """Serves a checkpoint until SIGINT or SIGTERM; requests in flight are then answered first.

    Args:
      checkpoint: a folder in Hugging Face layout, a `.gguf` file, or a name that `laif fetch` knows.
      shutdown_timeout: seconds that answers in flight get after the signal.
      options: further arguments of `create_app`.
    """
    app = create_app(checkpoint, template=template, dtype=dtype, **options)
    log.info("serving %s at http://%s:%d/v1", app.state.service.name, host, port)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=shutdown_timeout)

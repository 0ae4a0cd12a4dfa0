"""The labelling service: teachers' completions and critics' judgements, never asked for twice. No JAX here.

Names are imported when they are first used (PEP 562): who wants one module of this package does not pay for all.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laif_jax.labeling.calls import Endpoint
    from laif_jax.labeling.client import LabelClient
    from laif_jax.labeling.complete import Failure
    from laif_jax.labeling.critic import Critic, load_critic, shipped_critics
    from laif_jax.labeling.errors import CriticError, EndpointError, LabelError, LabelServiceError, StoreError
    from laif_jax.labeling.jobs import JobStatus
    from laif_jax.labeling.local_servers import running, start_checkpoint_server, start_llama_cpp
    from laif_jax.labeling.preferences import to_preferences
    from laif_jax.labeling.service import LabelService, serve_labels, start_service

__all__ = [
    "Critic",
    "CriticError",
    "Endpoint",
    "EndpointError",
    "Failure",
    "JobStatus",
    "LabelClient",
    "LabelError",
    "LabelService",
    "LabelServiceError",
    "StoreError",
    "load_critic",
    "running",
    "serve_labels",
    "shipped_critics",
    "start_checkpoint_server",
    "start_llama_cpp",
    "start_service",
    "to_preferences",
]

_MODULES = {
    "calls": ("Endpoint",),
    "client": ("LabelClient",),
    "complete": ("Failure",),
    "critic": ("Critic", "load_critic", "shipped_critics"),
    "errors": ("CriticError", "EndpointError", "LabelError", "LabelServiceError", "StoreError"),
    "jobs": ("JobStatus",),
    "local_servers": ("running", "start_checkpoint_server", "start_llama_cpp"),
    "preferences": ("to_preferences",),
    "service": ("LabelService", "serve_labels", "start_service"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

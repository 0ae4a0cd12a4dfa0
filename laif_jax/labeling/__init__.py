"""The labelling service: teachers' completions and critics' judgements, never asked for twice. No JAX here."""

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

"""What every stage of one replicate of a study is given: configuration, folder, seed, devices, services."""

import contextlib
import dataclasses
import functools
import logging
from typing import Any

import jax
from etils import epath

from laif_jax.config import EndpointSpec, StudyConfig
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.local_servers import start_checkpoint_server, start_llama_cpp
from laif_jax.labeling.service import start_service
from laif_jax.parallel import distributed, mesh

logger = logging.getLogger(__name__)


class Services(contextlib.AbstractContextManager):
    """The labelling service and local model servers, started when first used and stopped on exit.

    Only process 0 of a multi-host run uses them.
    """

    def __init__(self, config: StudyConfig, root: epath.Path):
        self._config = config
        self._root = root
        self._stack = contextlib.ExitStack()
        self._endpoints: dict[str, EndpointSpec] = {}

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @functools.cached_property
    def client(self) -> LabelClient:
        """A client of the labelling service: the one at `labeling.url`, or one started for this study."""
        spec = self._config.labeling
        url = spec.url
        if url is None:
            store = epath.Path(spec.store) if spec.store else self._root / "labels"
            url = self._stack.enter_context(start_service(store))
        return self._stack.enter_context(LabelClient(url, poll=spec.poll))

    def endpoint(self, name: str) -> EndpointSpec:
        """The endpoint as the labelling service can reach it; starts the local server that it needs, once."""
        if name not in self._endpoints:
            spec = self._config.endpoints[name]
            start = {"llama_cpp": start_llama_cpp, "checkpoint": start_checkpoint_server}.get(spec.provider)
            self._endpoints[name] = spec if start is None else self._stack.enter_context(start(spec))
        return self._endpoints[name]


@dataclasses.dataclass(frozen=True)
class Context:
    """One replicate of a study. `root`: the study's folder, shared by all replicates."""

    config: StudyConfig
    root: epath.Path
    seed: int
    services: Services

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return mesh.make_mesh(self.config.mesh)

    @property
    def is_main(self) -> bool:
        return distributed.is_main()

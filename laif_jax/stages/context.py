"""What every stage of one replicate of a study is given: configuration, folder, seed, devices, services."""

import contextlib
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
from etils import epath

from laif_jax.config import EndpointSpec, RunConfig, StudyConfig
from laif_jax.labeling.access import read_token
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.local_servers import running
from laif_jax.labeling.providers.remote import is_loopback
from laif_jax.labeling.service import start_service
from laif_jax.models import fetch
from laif_jax.parallel import distributed, mesh
from laif_jax.stages.artifact import StageError
from laif_jax.training import together

logger = logging.getLogger(__name__)


def with_weights(spec: EndpointSpec) -> EndpointSpec:
    """The endpoint with the path of its weights, where `gguf` is a name that `laif fetch` knows."""
    if spec.gguf not in fetch.KNOWN:
        return spec
    return spec.model_copy(update={"gguf": str(fetch.fetch_gguf(spec.gguf).path)})


class Services(contextlib.AbstractContextManager):
    """The labelling service and local model servers, started when first used and stopped on exit.

    Only process 0 of a multi-host run uses them.
    """

    def __init__(self, config: RunConfig, root: epath.Path):
        self._config = config
        self._root = root
        self._stack = contextlib.ExitStack()
        self._endpoints: dict[str, Endpoint] = {}

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @functools.cached_property
    def client(self) -> LabelClient:
        """A client of the labelling service: the one at `labeling.url`, or one started for this study.

        Raises:
          StageError: the store would be in a bucket, where SQLite cannot be.
        """
        spec = self._config.labeling
        if spec.url is not None:
            token = read_token(spec.token_env)
            if spec.token_env is not None and token is None:
                raise StageError(
                    f"labeling.token_env: the environment variable {spec.token_env} is not set. Set it to the token of "
                    f"the service at {spec.url}"
                )
            client = LabelClient(
                spec.url, poll=spec.poll, token=token, job_budget=spec.job_budget, sleep=together.pause
            )
            return self._stack.enter_context(client)
        store = spec.store or str(self._root / "labels")
        if "://" in store:
            raise StageError(
                f"the labelling store cannot be at {store}: it needs a disk of this machine. Set `labeling.store` to a "
                "folder that outlives the machine's job, or `labeling.url` to a service that runs elsewhere"
            )
        service = self._stack.enter_context(start_service(store, budget=spec.budget))
        return self._stack.enter_context(service.client(spec.poll, spec.job_budget, sleep=together.pause))

    @property
    def store(self) -> Path | None:
        """The folder of the labelling store; None if the service is another's."""
        if self._config.labeling.url is not None:
            return None
        return Path(self._config.labeling.store or str(self._root / "labels"))

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint as the labelling service can reach it; starts the local server that it needs, once.

        A `gguf` that is a name which `laif fetch` knows is fetched first.

        Raises:
          StageError: its server would run on this machine, and the labelling service runs on another.
        """
        if name not in self._endpoints:
            spec, url = self._config.endpoints[name], self._config.labeling.url
            if spec.provider in ("llama_cpp", "checkpoint") and url is not None and not is_loopback(url):
                raise StageError(
                    f"endpoints.{name}: its server would run on this machine, where the labelling service at {url} "
                    "cannot reach it. Start the server where it can (`laif serve model`) and give its address with "
                    "`provider: openai`; or leave `labeling.url` out, and the run has a service of its own"
                )
            spec = with_weights(spec)
            self._endpoints[name] = self._stack.enter_context(running(spec))
        return self._endpoints[name]


@dataclasses.dataclass(frozen=True)
class Context:
    """One run. `root`: the run's folder, shared by all replicates."""

    config: RunConfig
    root: epath.Path
    seed: int
    services: Services

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return mesh.make_mesh(self.config.mesh)

    @property
    def is_main(self) -> bool:
        return distributed.is_main()


@dataclasses.dataclass(frozen=True)
class StudyContext(Context):
    """One replicate of a study."""

    config: StudyConfig

"""A replicate of the tiny study, with the real labelling service as a process behind it."""

from pathlib import Path
from typing import Any

import pytest
from etils import epath

from laif_jax.stages.context import Services, StudyContext
from tests.studies import tiny


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(**changes) -> StudyContext` of the tiny study with changes; all share one labelling service."""
    store = tmp_path_factory.mktemp("store")
    opened: list[Services] = []

    def context(folder: Path | None = None, seed: int = 0, **changes: Any) -> StudyContext:
        folder = folder or tmp_path_factory.mktemp("study")
        config = tiny.config(folder, **changes)
        services = Services(config, epath.Path(store))
        if opened:  # functools.cached_property keeps the client here
            services.__dict__["client"] = opened[0].client
        opened.append(services)
        return StudyContext(config, epath.Path(folder), seed, services)

    yield context
    for services in reversed(opened):
        services.__exit__(None, None, None)

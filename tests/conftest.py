"""Set before any test imports JAX: the CPU backend, split into eight simulated devices for the sharding tests."""

import logging
import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# A slow machine is no failure.
settings.register_profile("laif", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laif")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """XLA maps the code of every compiled program; some thousands in one process end at the kernel's limit of maps."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def _logs_are_left_as_they_were():
    """A command that sets up the log of its process does so here in the process of all tests."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if handler in before]
    root.setLevel(level)

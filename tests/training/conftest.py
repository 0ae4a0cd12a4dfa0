"""Tests that compile many small programs and compare their numbers to a tolerance need no machine-code optimisation."""

import jax
import pytest

QUICKLY_COMPILED = (
    "test_invariance",
    "test_step",
    "test_optim",
    "test_loop",
    "test_reward_task",
    "test_ppo",
    "test_ppo_loop",
)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    quick = request.module.__name__.rsplit(".", 1)[-1] in QUICKLY_COMPILED
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

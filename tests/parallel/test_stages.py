"""The same numbers on 2, 4 and 8 simulated devices as on one, where no test of the stage itself says so."""

import jax
import pytest

from tests.parallel import stages
from tests.training import small

MESHES = {
    2: {"tensor": 2},
    4: {"fsdp": 2, "tensor": 2},
    8: {"data": 2, "fsdp": 2, "tensor": 2},
}
WITH_EXPERTS = {2: {"expert": 2}, 4: {"expert": 2, "tensor": 2}, 8: {"fsdp": 2, "expert": 2, "tensor": 2}}


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {
        "mixtral_sft": stages.mixtral_sft(small.mesh()),
        "reward": stages.reward(small.mesh()),
        "ppo": stages.ppo(small.mesh(), tmp_path_factory.mktemp("ppo")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_mesh_gives_the_numbers_of_one_device(devices, axis_type, alone, tmp_path):
    mixture = stages.mixtral_sft(small.mesh(**WITH_EXPERTS[devices], axis_type=axis_type))
    assert mixture == pytest.approx(alone["mixtral_sft"], rel=1e-5, abs=1e-5)
    on = small.mesh(**MESHES[devices], axis_type=axis_type)
    assert stages.reward(on) == pytest.approx(alone["reward"], rel=1e-5, abs=1e-5)
    for here, there in zip(stages.ppo(on, tmp_path), alone["ppo"], strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=2e-5)

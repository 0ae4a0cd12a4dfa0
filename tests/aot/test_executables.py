"""Executables kept as files: taken by the very same program, by no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import MeshSpec
from laif_jax.parallel import make_mesh
from laif_jax.training import executables


def step(scale):
    def run(state, x):
        return {"w": state["w"] - scale * x}, x.sum()

    return jax.jit(run, donate_argnums=(0,))


@pytest.fixture
def mesh():
    return make_mesh(MeshSpec(fsdp=1), jax.devices()[:1])


def test_kept_and_taken_by_the_same_program_alone(tmp_path, mesh, monkeypatch):
    devices = mesh.devices.flat
    state = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    lowered = step(2.0).lower(state, jax.ShapeDtypeStruct((8,), jnp.float32))
    path = executables.save(lowered.compile(), executables.key(lowered, devices), tmp_path)
    assert path.exists()

    monkeypatch.setenv(executables.FOLDER, str(tmp_path))
    same = executables.prepared(step(2.0), mesh)
    loads = []
    load = executables.load
    monkeypatch.setattr(executables, "load", lambda *a: loads.append(load(*a)) or loads[-1])
    for _ in range(2):
        new, total = same({"w": jnp.ones(8)}, jnp.arange(8.0))
        np.testing.assert_array_equal(new["w"], 1 - 2 * np.arange(8.0))
        assert float(total) == 28
    assert len(loads) == 1
    assert loads[0] is not None

    other = executables.prepared(step(3.0), mesh)  # another constant
    np.testing.assert_array_equal(other({"w": jnp.ones(8)}, jnp.arange(8.0))[0]["w"], 1 - 3 * np.arange(8.0))
    longer = same({"w": jnp.ones(4)}, jnp.arange(4.0))[0]["w"]  # another shape
    np.testing.assert_array_equal(longer, 1 - 2 * np.arange(4.0))
    assert loads[1:] == [None, None]


def test_without_a_folder_a_function_is_left_as_it_is(mesh, monkeypatch):
    monkeypatch.delenv(executables.FOLDER, raising=False)
    jitted = step(1.0)
    assert executables.prepared(jitted, mesh) is jitted

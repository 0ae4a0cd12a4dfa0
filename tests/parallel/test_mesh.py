"""The mesh over eight simulated devices, over slices, and the meshes that do not fit."""

import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from laif_jax.config.schema import MeshSpec
from laif_jax.parallel import AXES, MeshError, make_mesh, row_shard
from laif_jax.parallel.mesh import device_grid, resolve_sizes, set_libtpu_args


def test_the_default_takes_all_devices_for_fsdp():
    mesh = make_mesh(MeshSpec())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_explicit_axes_and_a_part_of_the_devices():
    mesh = make_mesh(MeshSpec(data=2, fsdp=1, tensor=2, axis_type="explicit"), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Explicit,) * 4
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 3, 1), "mesh data=2 x fsdp=3 x tensor=1 needs 6 devices, 8 are here"),
        ((1, 1, 1), "mesh data=1 x fsdp=1 x tensor=1 needs 1 device, 8 are here"),
        ((3, -1, 1), "mesh data=3 x fsdp=-1 x tensor=1 needs a multiple of 3 devices, 8 are here"),
        ((-1, -1, 1), "only one axis can be -1"),
        ((1, 8, 0), "`mesh.tensor` must be at least 1, or -1"),
        ((-2, 8, 1), "`mesh.data` must be at least 1, or -1"),
        (
            (1, -1, 1, 3),
            "mesh data=1 x fsdp=-1 x expert=3 x tensor=1 needs a multiple of 3 devices, 8 are here",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_says_so_with_the_numbers(sizes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(MeshSpec(**dict(zip(("data", "fsdp", "tensor", "expert"), sizes))))


@given(st.permutations(AXES), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_the_axis_left_open_takes_what_is_left(order, sizes):
    spec = MeshSpec(**{**dict(zip(order, sizes)), order[-1]: -1})
    assert dict(zip(AXES, resolve_sizes(spec, math.prod(sizes)))) == dict(zip(order, sizes))


def fake_devices(slices, per_slice):
    return [
        SimpleNamespace(id=i, platform="cpu", device_kind="cpu", process_index=i, slice_index=i // per_slice)
        for i in range(slices * per_slice)
    ]


def test_data_runs_across_slices_and_the_other_axes_stay_within_one():
    grid = device_grid((4, 2, 1, 2), fake_devices(slices=2, per_slice=8))
    assert grid.shape == (4, 2, 1, 2)
    slice_of = np.vectorize(lambda device: device.slice_index)(grid)
    assert (slice_of == slice_of[:, :1, :1, :1]).all()
    assert sorted(slice_of[:, 0, 0, 0].tolist()) == [0, 0, 1, 1]


def test_too_little_data_parallelism_for_the_slices_is_an_error():
    with pytest.raises(
        MeshError, match=r"over 2 slices: `mesh.data` runs across slices, so make it a multiple of 2"
    ):
        device_grid((1, 8, 1, 2), fake_devices(slices=2, per_slice=8))


def fake_mesh(sizes, process_of):
    data, fsdp, tensor, *expert = sizes
    sizes = (data, fsdp, *(expert or [1]), tensor)
    devices = np.array([SimpleNamespace(process_index=p) for p in process_of]).reshape(sizes)
    return SimpleNamespace(shape=dict(zip(AXES, sizes)), devices=devices)


@pytest.mark.parametrize(
    ("sizes", "process_of", "shards"),
    [
        ((2, 4, 1), [0] * 4 + [1] * 4, [(0, 2), (1, 2)]),  # each process has its own rows
        ((2, 2, 2), [0] * 4 + [1] * 4, [(0, 2), (1, 2)]),
        ((1, 1, 8), [0] * 4 + [1] * 4, [(0, 1), (0, 1)]),  # tensor across processes: both hold all rows
        ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((4, 1, 1), [0, 1, 0, 1], [(0, 2), (1, 2)]),  # interleaved
        ((1, 2, 1, 4), [0] * 4 + [1] * 4, [(0, 2), (1, 2)]),  # experts split rows, too
    ],
)
def test_each_process_knows_its_rows(monkeypatch, sizes, process_of, shards):
    mesh = fake_mesh(sizes, process_of)
    for process, expected in enumerate(shards):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert row_shard(mesh) == expected


def test_rows_that_processes_share_in_part_are_an_error(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(MeshError, match="splits the rows unevenly over 2 processes"):
        row_shard(fake_mesh((1, 2, 3), [0, 0, 0, 0, 1, 1]))
    monkeypatch.setattr(jax, "process_index", lambda: 5)
    with pytest.raises(MeshError, match="process 5 has no device in the mesh"):
        row_shard(fake_mesh((2, 1, 1), [0, 1]))


def test_arguments_of_the_tpu_compiler_join_those_of_the_environment_once(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_one=1")
    spec = MeshSpec(libtpu_args={"xla_tpu_two": True, "xla_tpu_three": 40})
    for _ in range(2):
        set_libtpu_args(spec)
        assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_tpu_one=1 --xla_tpu_two=true --xla_tpu_three=40"
    with pytest.raises(ValueError, match="xla_"):
        MeshSpec(libtpu_args={"scheduler": 40})


def test_without_arguments_the_environment_is_left_alone(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    set_libtpu_args(MeshSpec())
    assert "LIBTPU_INIT_ARGS" not in os.environ

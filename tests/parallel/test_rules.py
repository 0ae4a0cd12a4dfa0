"""Sharding rules, `constrain` and global arrays on eight simulated devices, on Auto and on Explicit axes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from laif_jax.config.schema import MeshSpec
from laif_jax.objectives import segment_sums, sft_loss
from laif_jax.parallel import (
    RULES,
    ShardingError,
    batch_sharding,
    batch_shardings,
    constrain,
    host_to_global,
    make_mesh,
    param_shardings,
    partition_spec,
    replicate,
    sharding_for,
)

BOTH = pytest.mark.parametrize("axis_type", ["auto", "explicit"])


def mesh_of(data, fsdp, tensor, axis_type="auto", expert=1):
    devices = jax.devices()[: data * fsdp * expert * tensor]
    return make_mesh(
        MeshSpec(data=data, fsdp=fsdp, expert=expert, tensor=tensor, axis_type=axis_type), devices
    )


# ---- parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("vocab", "embed"), (64, 32), P("tensor", "fsdp")),
        (("embed", "vocab"), (32, 64), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 32, 4, 8), P(None, "fsdp", "tensor", None)),
        (("layers", "heads", "head_dim", "embed"), (3, 4, 8, 32), P(None, "tensor", None, "fsdp")),
        (("layers", "embed"), (3, 32), P(None, "fsdp")),
        (("layers", None), (3, 32), P(None, None)),
        (("batch", "length", "embed"), (8, 16, 32), P(("data", "fsdp"), "tensor", None)),
        ((), (), P()),
    ],
)
def test_logical_axes_become_mesh_axes(axes, shape, expected):
    assert partition_spec(axes, shape, mesh_of(2, 2, 2)) == expected


def test_mesh_axes_of_size_one_are_left_out():
    assert partition_spec(("vocab", "embed"), (64, 32), mesh_of(1, 8, 1)) == P(None, "fsdp")
    assert partition_spec(("vocab", "embed"), (64, 32), mesh_of(1, 1, 1)) == P(None, None)


def test_a_small_parameter_that_does_not_divide_stays_whole_there():
    assert sharding_for(("embed", "mlp"), (30, 64), mesh_of(1, 4, 2)).spec == P(None, "tensor")


def test_a_large_parameter_that_does_not_divide_is_an_error_with_the_numbers():
    specs = {
        "layers": {
            "mlp": {"up": SimpleNamespace(shape=(8, 1023, 512), logical_axes=("layers", "embed", "mlp"))}
        }
    }
    message = (
        r"parameter layers/mlp/up of shape \(8, 1023, 512\): its `embed` dimension of 1023 does not divide over mesh "
        r"axes fsdp=4; choose sizes whose product divides 1023"
    )
    with pytest.raises(ShardingError, match=message):
        param_shardings(specs, mesh_of(1, 4, 2))


def test_rows_keep_the_part_of_their_axes_that_divides():
    mesh = mesh_of(2, 4, 1)
    assert partition_spec(("batch", "embed"), (4, 32), mesh) == P("data", None)
    assert partition_spec(("batch", "embed"), (3, 32), mesh) == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (
            ("expert", "embed", "mlp"),
            (4, 32, 64),
            P("expert", "fsdp", "tensor"),
        ),  # an expert is on one of them
        (("embed", "mlp"), (32, 64), P(("fsdp", "expert"), "tensor")),  # what all rows need is split by both
        (("embed", "mlp"), (6, 64), P("fsdp", "tensor")),
        (("batch", "length", "embed"), (8, 16, 32), P(("fsdp", "expert"), "tensor", None)),
    ],
)
def test_the_expert_axis_splits_experts_rows_and_other_parameters(axes, shape, expected):
    assert partition_spec(axes, shape, mesh_of(1, 2, 2, expert=2)) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("layers", "embed"), (80, 8192), (1, 1, 8), P(None, "tensor")),  # a norm's scales
        (("layers", "heads", "head_dim", "lora"), (32, 32, 128, 16), (1, 8, 1), P(None, None, "fsdp", None)),
        (("layers", "heads", "head_dim"), (7, 320, 127), (1, 4, 1), P(None, "fsdp", None)),
        (("layers", "heads", "head_dim"), (80, 64, 128), (2, 2, 1), P(None, None, "fsdp")),
        (("layers", "embed"), (8, 512), (1, 1, 8), P(None, None)),  # small
        (("layers", "embed"), (80, 8192), (8, 1, 1), P(None, None)),  # data repeats parameters
    ],
)
def test_a_large_parameter_that_the_rules_leave_whole_is_split_somewhere(axes, shape, sizes, expected):
    assert sharding_for(axes, shape, mesh_of(*sizes)).spec == expected


def test_wrong_axes_are_named():
    with pytest.raises(
        ShardingError, match="unknown logical axis `embd`; the rules have batch, length, embed"
    ):
        partition_spec(("embd",), (8,), mesh_of(1, 8, 1))
    with pytest.raises(ShardingError, match="has 2 dimensions, but 1 logical axes"):
        partition_spec(("embed",), (8, 8), mesh_of(1, 8, 1))


axis_names = st.sampled_from([*RULES, None])


@given(
    st.lists(st.tuples(axis_names, st.integers(1, 24)), max_size=4),
    st.sampled_from([(2, 2, 2), (1, 8, 1), (2, 4, 1)]),
)
@settings(max_examples=100, deadline=None)
def test_every_spec_can_hold_its_array(dimensions, sizes):
    """No mesh axis twice, and every split divides: a device_put goes through and keeps the values."""
    mesh = mesh_of(*sizes)
    axes, shape = [a for a, _ in dimensions], tuple(n for _, n in dimensions)
    value = np.arange(int(np.prod(shape))).reshape(shape)
    placed = jax.device_put(value, NamedSharding(mesh, partition_spec(axes, shape, mesh)))
    np.testing.assert_array_equal(placed, value)


@BOTH
def test_parameters_are_born_sharded(axis_type):
    mesh = mesh_of(1, 4, 2, axis_type)
    specs = {
        "embed": {"embedding": SimpleNamespace(shape=(64, 32), logical_axes=("vocab", "embed"))},
        "final_norm": {"scale": SimpleNamespace(shape=(32,), logical_axes=("embed",))},
    }
    shardings = param_shardings(specs, mesh)
    params = jax.jit(
        lambda: {"embed": {"embedding": jnp.ones((64, 32))}, "final_norm": {"scale": jnp.ones(32)}},
        out_shardings=shardings,
    )()
    assert params["embed"]["embedding"].addressable_shards[0].data.shape == (32, 8)
    assert params["final_norm"]["scale"].addressable_shards[0].data.shape == (8,)


# ---- constrain -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("with_context", [True, False])
def test_constrain_lays_rows_over_the_mesh(axis_type, with_context):
    mesh = mesh_of(2, 2, 2, axis_type)
    x = np.arange(8 * 6 * 4, dtype=np.float32).reshape(8, 6, 4)
    placed = replicate(x, mesh)

    @jax.jit
    def f(x):
        return constrain(x * 2, "batch", None, "heads")

    if with_context:
        with jax.set_mesh(mesh):
            y = f(placed)
    else:
        y = f(placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)
    assert y.addressable_shards[0].data.shape == (2, 6, 2)
    np.testing.assert_array_equal(y, 2 * x)


@BOTH
def test_constrain_moves_rows_back_and_gradients_pass(axis_type):
    mesh = mesh_of(2, 4, 1, axis_type)
    x = host_to_global({"x": np.arange(16, dtype=np.float32).reshape(1, 8, 2)}, mesh)["x"]

    def f(x):
        whole = constrain(x, "layers", "length", "embed")  # rows whole, columns over nothing that divides
        return jnp.sum(constrain(whole, "layers", "batch", None) ** 2)

    with jax.set_mesh(mesh):
        value, grad = jax.jit(jax.value_and_grad(f), out_shardings=(None, x.sharding))(x)
    assert value == float(np.sum(np.arange(16.0) ** 2))
    np.testing.assert_array_equal(grad, 2 * np.asarray(x))
    assert grad.sharding.is_equivalent_to(x.sharding, 3)


def test_constrain_is_nothing_without_a_mesh():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", "embed") is x
    jaxpr = str(jax.make_jaxpr(lambda x: constrain(x, "batch", "embed"))(x))
    assert "sharding_constraint" not in jaxpr
    assert "reshard" not in jaxpr


def test_constrain_is_nothing_inside_shard_map():
    mesh = mesh_of(2, 4, 1)
    rows = P(("data", "fsdp"))
    f = jax.shard_map(lambda x: constrain(x, "batch", "embed") + 1, mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(jax.jit(f)(np.zeros((64, 4))), np.ones((64, 4)))  # 8 rows on each device


@BOTH
def test_constrain_leaves_whole_what_does_not_divide(axis_type):
    mesh = mesh_of(2, 4, 1, axis_type)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", "embed"))(replicate(np.ones((1, 8)), mesh))
    assert y.sharding.is_fully_replicated


@BOTH
def test_losses_run_on_sharded_rows(axis_type):
    """The reductions that every train step uses give the same sums on one device and on eight."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, (8, 10)), axis=1)[:, ::-1].copy()
    ids = np.where(ids > 0, 3 - ids, 0).astype(np.int32)  # 1.. then padding
    logps, mask = -rng.exponential(size=(8, 10)).astype(np.float32), (ids > 0).astype(np.float32)
    mesh = mesh_of(2, 4, 1, axis_type)
    placed = host_to_global((logps, mask, ids), mesh, batch_sharding(mesh))

    def f(logps, mask, ids):
        out = sft_loss(logps, mask, ids, reduction="sequence")
        return out.total, out.weight, segment_sums(logps, mask, ids, 2)

    here = jax.jit(f)(logps, mask, ids)
    with jax.set_mesh(mesh):
        there = jax.jit(f)(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), here, there)
    assert not there[2].sharding.is_fully_replicated


# ---- batches ---------------------------------------------------------------------------------------------------


@BOTH
def test_batches_split_their_rows_after_the_micro_batch_axis(axis_type):
    mesh = mesh_of(2, 2, 2, axis_type)
    batch = {"tokens": np.arange(2 * 8 * 5).reshape(2, 8, 5), "weight": np.arange(2 * 4.0).reshape(2, 4)}
    shardings = batch_shardings(batch, mesh)
    placed = host_to_global(batch, mesh, shardings)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 2, 5)
    assert placed["weight"].addressable_shards[0].data.shape == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    jax.tree.map(np.testing.assert_array_equal, host_to_global(batch, mesh), batch)


def test_rows_that_do_not_divide_are_named_with_the_numbers():
    mesh = mesh_of(2, 4, 1)
    message = r"`tokens` of shape \(1, 6, 5\).* over mesh data=2 x fsdp=4; make `micro_batch` a multiple of 8"
    with pytest.raises(ShardingError, match=message):
        batch_shardings({"tokens": np.zeros((1, 6, 5))}, mesh)
    with pytest.raises(ShardingError, match=r"batch array `tokens`: the local part .* a multiple of 8"):
        host_to_global({"tokens": np.zeros((1, 6, 5))}, mesh)


def test_partition_specs_and_shardings_serve_as_specs():
    mesh = mesh_of(1, 8, 1)
    batch = {"x": np.arange(16.0).reshape(8, 2), "scalar": np.float32(3)}
    placed = host_to_global(batch, mesh, {"x": P("fsdp"), "scalar": NamedSharding(mesh, P())})
    assert placed["x"].addressable_shards[0].data.shape == (1, 2)
    assert placed["scalar"].sharding.is_fully_replicated
    assert placed["scalar"] == 3


@BOTH
def test_replicate_puts_a_tree_everywhere(axis_type):
    mesh = mesh_of(2, 4, 1, axis_type)
    tree = {"step": 3, "x": np.arange(4.0), "key": jax.random.key(0), "y": jnp.ones(2)}
    placed = replicate(tree, mesh)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8
    assert placed["step"] == 3
    assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()

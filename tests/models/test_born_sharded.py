"""No host, and no device, ever holds a whole model: what init makes, import reads and export writes is counted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import LoraSpec, MeshSpec, OptimizerSpec
from laif_jax.models import names, weights
from laif_jax.models.config import ModelConfig, param_specs
from laif_jax.models.decoder import init_params
from laif_jax.models.lora import add_lora
from laif_jax.models.weights import load_params, save_params
from laif_jax.parallel import make_mesh, param_shardings
from laif_jax.training.optim import make_optimizer
from laif_jax.training.state import create_state
from tests.models import states

SIZES = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64, "head_dim": 8}
CFG: ModelConfig = states.tiny_config("mixtral", num_local_experts=4, **SIZES)
SMALL = 1024  # bytes: norms and the like


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def mesh(axis_type="auto"):
    return make_mesh(MeshSpec(fsdp=2, expert=2, tensor=2, axis_type=axis_type))


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def per_device(tree) -> int:
    """The most that one device holds."""
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return max(held.values())


def test_a_device_makes_its_own_part_of_new_parameters():
    """Also in between: the compiled program's temporaries are of its part, not of the whole."""
    shardings = param_shardings(param_specs(CFG), mesh())
    make = jax.jit(lambda key: init_params(CFG, key, shardings=shardings), out_shardings=shardings)
    compiled = make.lower(jax.random.key(0)).compile()
    memory: Any = compiled.memory_analysis()
    whole = sum(4 * int(np.prod(spec.shape)) for spec in names.flatten(param_specs(CFG)).values())
    assert memory.output_size_in_bytes < whole / 8 + SMALL * 2
    assert memory.temp_size_in_bytes < whole / 8 + 16 * SMALL
    params = compiled(jax.random.key(0))
    assert bytes_of(params) == whole
    assert per_device(params) < whole / 8 + SMALL * 2


def test_the_optimisers_state_and_adapters_are_born_in_parts():
    cfg = dataclasses.replace(CFG, lora=LoraSpec(rank=2))
    on = mesh()
    shardings = param_shardings(param_specs(cfg), on)
    base = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape), param_specs(CFG), is_leaf=lambda x: hasattr(x, "shape")
    )
    params = add_lora(base, cfg, jax.random.key(0), shardings)
    lora = params["layers"]["mlp"]["down"]["lora_a"]
    assert lora.addressable_shards[0].data.shape == (
        2,
        2,
        16,
        2,
    )  # experts over `expert`, columns over `tensor`
    state = create_state(params, make_optimizer(OptimizerSpec()), mesh=on, shardings=shardings)
    for leaf, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert per_device(state.opt_state) < bytes_of(state.opt_state) / 8 + 32 * SMALL


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_import_reads_parts_and_export_writes_one_tensor_at_a_time(axis_type, tmp_path, monkeypatch):
    cfg = CFG
    state = {}
    for name, parts in names.tensors(cfg).items():
        state[name] = (
            np.random.default_rng(len(name)).normal(size=parts[0][0].tensor_shape).astype(np.float32)
        )
    save_params(tmp_path / "in", names.from_hf_state(cfg, state), cfg)

    read, hosted = [], []
    plain_read, plain_host = names.LeafPlan.read, weights._host

    def counted_read(plan, reader, index, dtype=None):
        block = plain_read(plan, reader, index, dtype)
        read.append((plan.path, block.nbytes))
        return block

    def counted_host(value):
        out = plain_host(value)
        hosted.append(out.nbytes)
        return out

    monkeypatch.setattr(names.LeafPlan, "read", counted_read)
    monkeypatch.setattr(weights, "_host", counted_host)
    shardings = param_shardings(param_specs(cfg), mesh(axis_type))
    params = load_params(tmp_path / "in", cfg, shardings=shardings)
    shards = {path: leaf.addressable_shards[0].data.nbytes for path, leaf in names.flatten(params).items()}
    assert {path for path, _ in read} == set(shards)
    assert all(size == shards[path] for path, size in read)
    assert shards["layers", "mlp", "up", "kernel"] == params["layers"]["mlp"]["up"]["kernel"].nbytes / 8

    save_params(tmp_path / "out", params, cfg)
    assert len(hosted) == len(state)
    assert max(hosted) == max(value.nbytes for value in state.values())
    again = load_params(tmp_path / "out", cfg)
    states.same_bytes(names.to_hf_state(cfg, again), state)
    assert jnp.asarray(again["final_norm"]["scale"]).dtype == jnp.float32

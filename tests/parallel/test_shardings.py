"""Every parameter of every family on every mesh: as the golden files say, and none above 1 MB whole on every device."""

import math

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from laif_jax.config.schema import OptimizerSpec
from laif_jax.models import names
from laif_jax.parallel import param_shardings
from laif_jax.training.optim import make_optimizer
from laif_jax.training.state import opt_state_shardings
from tests.parallel import shardings
from tests.parallel.published import MESHES, MODELS, abstract_mesh, published, variants

LARGE = 1e6  # bytes


@pytest.mark.parametrize("model", MODELS)
def test_shardings_are_those_of_the_golden_file(model):
    golden = (shardings.FOLDER / f"{model}.txt").read_text()
    assert shardings.text(model) == golden, (
        "a parameter lies elsewhere than before; if it is meant to: python -m tests.parallel.shardings, read the diff"
    )


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_no_parameter_above_a_megabyte_is_whole_on_every_device(model, mesh):
    on = abstract_mesh(mesh)
    for what, specs in variants(model):
        for path, (shape, spec) in shardings.entries(specs, on).items():
            if 4 * math.prod(shape) > LARGE:
                assert shardings.parts(spec, on) > 1, f"{what}: {path} {shape} is whole on {mesh}"


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adafactor"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_optimisers_state_lies_as_its_parameter(name, mesh):
    """Moments exactly; Adafactor's factored ones as what is left of their parameter."""
    on, specs = abstract_mesh(mesh), dict(variants("mixtral_8x7b"))["language model"]
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs, is_leaf=lambda x: hasattr(x, "shape")
    )
    optimizer = make_optimizer(OptimizerSpec(name=name, **({"momentum": 0.9} if name == "rmsprop" else {})))
    shapes = jax.eval_shape(optimizer.init, params)
    laid = param_shardings(specs, on)
    state = opt_state_shardings(optimizer, shapes, params, laid, NamedSharding(on, P()))
    of_shape = {
        leaf.shape: sharding for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(laid))
    }
    large, exact = 0, 0
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        if 4 * math.prod(leaf.shape) > LARGE:
            large += 1
            assert shardings.parts(sharding.spec, on) > 1, f"{leaf.shape} is whole on {mesh}"
        if math.prod(leaf.shape) > 2**20 and leaf.shape in of_shape:
            exact += 1
            assert shardings.parts(sharding.spec, on) == shardings.parts(of_shape[leaf.shape].spec, on)
    assert large >= 3
    assert exact > 3 or name == "adafactor"


def test_the_published_sizes_are_right():
    """Parameters in billions, as the models' authors count them."""
    billions = {
        "llama2_7b": 6.74,
        "llama2_70b": 68.98,
        "mistral_7b": 7.24,
        "mixtral_8x7b": 46.70,
        "gemma2_9b": 9.24,
    }
    for name, expected in billions.items():
        specs = dict(variants(name))["language model"]
        count = sum(math.prod(spec.shape) for spec in names.flatten(specs).values())
        assert count / 1e9 == pytest.approx(expected, abs=0.01)
    assert published("mixtral_8x7b").num_experts == 8

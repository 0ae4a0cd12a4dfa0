"""The TPU attention kernel, run by its interpreter, against the reference; and where it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from laif_jax.config.schema import MeshSpec
from laif_jax.models import splash
from laif_jax.models.attention import kernel_applies, naive_attention, not_fused, visibility
from laif_jax.models.splash import splash_applies, splash_attention, target_platform
from laif_jax.parallel import make_mesh


def draw(rows=2, length=130, heads=4, kv_heads=2, size=64):
    random = np.random.default_rng(0)
    q = random.normal(size=(rows, length, heads, size)).astype(np.float32)
    k, v = random.normal(size=(2, rows, length, kv_heads, size)).astype(np.float32)
    index = np.arange(length)
    segments = np.stack([np.where(index < 60, 1, 2), np.where(index < 100, 1, 0)])[:rows].astype(np.int32)
    return q, k, v, segments


def both(segments, window, softcap):
    """(the kernel's loss, the reference's) as functions of q, k, v; padding queries count nothing."""
    real = jnp.asarray(segments > 0)[..., None, None]

    def kernel(q, k, v):
        options = {"window": window, "softcap": softcap, "scale": 0.125}
        return jnp.where(real, splash_attention(q, k, v, jnp.asarray(segments), interpret=True, **options), 0)

    def reference(q, k, v):
        mask = visibility(jnp.asarray(segments), window).mask
        return jnp.where(real, naive_attention(q, k, v, mask, softcap=softcap, scale=0.125), 0)

    return kernel, reference


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (40, 2.0)])
def test_equals_the_reference_with_its_gradients(window, softcap):
    q, k, v, segments = draw()
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    outs, grads = [], []
    for form in both(segments, window, softcap):
        out, back = jax.vjp(form, q, k, v)
        outs.append(out)
        grads.append(back(jnp.asarray(weights)))
    np.testing.assert_allclose(*outs, atol=2e-5)
    for ours, theirs in zip(*grads):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("spec", [MeshSpec(fsdp=2, tensor=2), MeshSpec(fsdp=1, tensor=4)])
def test_the_same_over_a_mesh_also_where_key_heads_do_not_divide(spec):
    q, k, v, segments = draw()
    kernel, reference = both(segments, 0, None)
    mesh = make_mesh(spec, jax.devices()[:4])

    def laid(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return kernel(*arrays)

    place = jax.sharding.NamedSharding(mesh, jax.P())
    out = jax.jit(laid)(*(jax.device_put(x, place) for x in (q, k, v)))
    np.testing.assert_allclose(out, reference(q, k, v), atol=2e-5)


def test_the_target_decides_and_not_this_machine():
    tpu = AbstractMesh(
        (4,),
        ("fsdp",),
        axis_types=(AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu"),
    )
    assert target_platform() == "cpu"
    assert not splash_applies(2048, 128, 0)
    with jax.sharding.use_abstract_mesh(tpu):
        assert target_platform() == "tpu"
        assert splash_applies(2048, 128, 0)
        assert not splash_applies(64, 128, 0)  # shorter than a block
        assert not splash_applies(2048, 80, 0)  # heads that fill no lanes
        assert not splash_applies(2048, 128, jnp.int32(4))  # layers of different windows
        assert kernel_applies(2048, 128, 4)
        with not_fused():
            assert not kernel_applies(2048, 128, 4)


def test_blocks_divide_every_padded_row():
    for length in range(1, 3000, 7):
        padded = length + -length % splash.LANES
        assert any(padded % block == 0 for block in splash.BLOCKS)

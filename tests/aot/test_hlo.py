"""Reading optimised HLO: recorded lines of a TPU module, and programs compiled here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from laif_jax.aot import hlo

# Lines as the TPU compiler of libtpu 0.0.42 wrote them for a model on v5e-16, cut to what matters.
RECORDED = Path(__file__).with_name("recorded.hlo").read_text()


def test_recorded_collectives_with_the_trips_of_their_loop():
    found = {each.op: each for each in hlo.collectives(hlo.parse(RECORDED))}
    assert set(found) == {"all-gather", "collective-permute", "all-reduce"}  # channel 10 is one, in two parts
    whole = 4096 * 11008 * 2
    assert (found["all-gather"].runs, found["all-gather"].group) == (32, 16)
    assert found["all-gather"].bytes == whole * 15 / 16
    assert found["collective-permute"].bytes == 256 * 11008 * 2
    assert (found["all-reduce"].runs, found["all-reduce"].group) == (1, 4)
    assert found["all-reduce"].bytes == 2 * 3 / 4 * 4096


def test_a_loop_that_was_unrolled_takes_fewer_trips():
    text = RECORDED.replace(
        "  ROOT %tuple.1 = (bf16[2,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%start, %start)",
        """  %counter = u32[]{:T(128)} get-tuple-element(%wide.param), index=1
  %two = u32[]{:T(128)} constant(2)
  %raised = u32[]{:T(128)} add(%counter, %two)
  ROOT %tuple.1 = (bf16[2,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%start, %raised)""",
    )
    assert {each.op: each.runs for each in hlo.collectives(hlo.parse(text))}["all-gather"] == 16


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['a'=4,'b'=8] {'a','b'}", 32),
        ("replica_groups=mesh['a'=4,'b'=8] {'b':(1)2}", 2),
        ("no groups", 1),
    ],
)
def test_group_sizes(text, size):
    assert hlo.group_size(text) == size


def test_sizes_of_types_leave_out_on_chip_memory_when_asked():
    assert hlo.size_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[5]{0}, pred[])") == 12 + 20 + 1
    assert hlo.size_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[5]{0})", memory_only=True) == 20


def test_a_scan_counts_every_trip_and_in_place_updates_only_their_part():
    def run(x, stack):
        def body(carry, row):
            return jnp.tanh(carry * 2 + row), carry

        return jax.lax.scan(body, x, stack)

    size = 1 << 12
    args = (jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((50, size), jnp.float32))
    module = hlo.parse(jax.jit(run).lower(*args).compile().as_text())
    loops = [i for body in module.computations.values() for i in body.values() if i.op == "while"]
    assert [hlo.trips(module, loop) for loop in loops] == [50]
    once, all_trips = (hlo.memory_traffic(module, with_trips=value) for value in (False, True))
    floor = 50 * 3 * size * 4  # the row is read, the carry read and written
    assert floor <= all_trips < 6 * floor
    assert all_trips > 5 * once


def test_a_loop_that_ends_on_data_takes_the_number_that_is_given():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x * 2, x)

    module = hlo.parse(jax.jit(run).lower(jax.ShapeDtypeStruct((4096,), jnp.float32)).compile().as_text())
    few, many = (hlo.memory_traffic(module, unknown=n) for n in (1, 100))
    assert many > 20 * few

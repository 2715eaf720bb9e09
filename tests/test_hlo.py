"""What the text of a compiled program says of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxpref import sharding
from jaxpref.plan import hlo


def compiled(function, *shapes, mesh=None, specs=None):
    shaped = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh is not None:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )
    return hlo.Program(jax.jit(function).lower(*shaped).compile().as_text())


def test_operations_in_loops_count_as_often_as_they_are_done():
    def steps(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x @ w, None, length=3)[0]

    found = compiled(steps, (24, 40), (40, 40))
    assert found.operations() == 2 * 24 * 40 * 40 * (1 + 3 * 5)


def test_a_loop_that_is_told_when_to_end_has_the_trips_that_are_given():
    def steps(x, n):
        return jax.lax.fori_loop(0, n.astype(int), lambda i, x: x @ x, x)

    text = jax.jit(steps).lower(jnp.ones((8, 8)), jnp.ones(())).compile().as_text()
    assert hlo.Program(text, 7).operations() == 7 * 2 * 8**3
    with pytest.raises(ValueError, match="has no bound of its own"):
        hlo.Program(text).operations()
    with pytest.raises(ValueError, match="it has no entry"):
        hlo.Program("module {}")


@pytest.mark.parametrize(
    ("function", "out", "kind", "size", "received"),
    [
        (lambda x: jax.lax.psum(x, "data"), P(), "all-reduce", 64, 2 * 64 * 7 / 8),
        (
            lambda x: jax.lax.all_gather(x, "data", tiled=True),
            P(),
            "all-gather",
            8 * 64,
            8 * 64 * 7 / 8,
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
            P("data"),
            "collective-permute",
            64,
            64,
        ),
        (
            lambda x: jax.lax.psum_scatter(x.reshape(8, 2), "data", tiled=True),
            P("data"),
            "reduce-scatter",
            64,
            64 * 7 / 8,
        ),
    ],
    ids=["psum", "all_gather", "ppermute", "psum_scatter"],
)
def test_what_devices_exchange(function, out, kind, size, received):
    mesh = sharding.make_mesh(8, devices=jax.devices()[:8])

    def steps(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: function(x + y.sum()), function(x))

    found = compiled(steps, (128,), mesh=mesh, specs=(P("data"), out)).collectives()
    mine = [c for c in found if c.kind == kind]
    # Once before the loop, and three times in it.
    assert sum(c.times for c in mine) == 4
    assert {c.size for c in mine} == {size}
    assert {len(c.loops) for c in mine} == {0, 1}
    assert sum(c.received for c in mine) == pytest.approx(4 * received)


# As the compiler for TPUs writes what goes on while others compute, a reduction of which each
# device keeps a part, and groups of devices.
OVERLAPPED = """
%gather.start (p0: bf16[4,32]) -> bf16[16,32] {
  %p0 = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,32]{1,0} all-gather(%p0), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%gather.done (p1: bf16[4,32]) -> bf16[16,32] {
  %p1 = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,32]{1,0} all-gather(%p1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%all-reduce-scatter.5 (p2: f32[16,32]) -> f32[4,32] {
  %p2 = f32[16,32]{1,0} parameter(0)
  %all-reduce.9 = f32[16,32]{1,0} all-reduce(%p2), channel_id=8, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}, to_apply=%add
  ROOT %part = f32[4,32]{1,0} slice(%all-reduce.9), slice={[0:4], [0:32]}
}

ENTRY %main (x: bf16[4,32], y: f32[16,32]) -> f32[4,32] {
  %x = bf16[4,32]{1,0} parameter(0)
  %y = f32[16,32]{1,0} parameter(1)
  %start = bf16[16,32]{1,0} fusion(%x), kind=kCustom, calls=%gather.start
  %done = bf16[16,32]{1,0} fusion(%x), kind=kCustom, calls=%gather.done
  ROOT %out = f32[4,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_what_is_overlapped_counts_once_and_a_part_of_a_sum_is_scattered():
    gathered, scattered = hlo.Program(OVERLAPPED).collectives()
    assert gathered[:4] == ("all-gather", 16 * 32 * 2, 1, 4)
    assert scattered[:4] == ("reduce-scatter", 16 * 32 * 4, 1, 4)


# Two exchanges of one channel, the second of which goes on in a fusion that computes.
SHARED_CHANNEL = """
%start (p0: bf16[4,32]) -> (bf16[16,32], u32[]) {
  %p0 = bf16[4,32]{1,0} parameter(0)
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%p0), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %call = (bf16[16,32]{1,0}, u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%start.2 (p1: bf16[8,32]) -> (bf16[32,32], u32[]) {
  %p1 = bf16[8,32]{1,0} parameter(0)
  %all-gather.2 = bf16[32,32]{1,0} all-gather(%p1), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %call.2 = (bf16[32,32]{1,0}, u32[]) custom-call(%all-gather.2), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p2: bf16[8,32]) -> bf16[32,32] {
  %p2 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[32,32]{1,0} all-gather(%p2), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: bf16[4,32], y: bf16[8,32]) -> bf16[32,32] {
  %x = bf16[4,32]{1,0} parameter(0)
  %y = bf16[8,32]{1,0} parameter(1)
  %a = (bf16[16,32]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%start
  %b = (bf16[32,32]{1,0}, u32[]) fusion(%y), kind=kCustom, calls=%start.2
  ROOT %out = bf16[32,32]{1,0} fusion(%y), kind=kCustom, calls=%beside
}
"""


# The second fusion takes a layer's part in a fusion of its own.
NESTED = """
%part (p0: f32[8,16,32], i0: s32[]) -> f32[16,32] {
  %p0 = f32[8,16,32]{2,1,0} parameter(0)
  %i0 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,16,32]{2,1,0} dynamic-slice(%p0, %i0, %zero, %zero), dynamic_slice_sizes={1,16,32}
  ROOT %out0 = f32[16,32]{1,0} bitcast(%slice)
}

%outer (p1: f32[8,16,32], i1: s32[]) -> f32[16,32] {
  %p1 = f32[8,16,32]{2,1,0} parameter(0)
  %i1 = s32[] parameter(1)
  %inner = f32[16,32]{1,0} fusion(%p1, %i1), kind=kLoop, calls=%part
  ROOT %out1 = f32[16,32]{1,0} negate(%inner)
}

ENTRY %main (x: f32[8,16,32], i: s32[]) -> f32[16,32] {
  %x = f32[8,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[16,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer
}
"""


def test_what_is_sliced_deep_in_a_fusion_moves_in_part():
    of_part = 16 * 32 * 4
    assert of_part * 2 <= hlo.Program(NESTED).moved() < of_part * 2 + 100


def test_what_shares_a_channel_counts_for_itself():
    first, second = hlo.Program(SHARED_CHANNEL).collectives()
    assert (first.size, second.size) == (16 * 32 * 2, 32 * 32 * 2)


def test_products_in_the_form_of_convolutions():
    """The compiler for TPUs has no other; what is padded is no work."""
    text = """
ENTRY %main (x: f32[8,16], w: f32[16,32]) -> f32[8,32] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %a = f32[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %s = f32[1,8,5]{2,1,0} constant(0)
  %k = f32[8,4,3]{2,1,0} constant(0)
  ROOT %b = f32[1,4,5]{2,1,0} convolution(%s, %k), window={size=3 pad=1_1}, dim_labels=bf0_io0->bf0
}
"""
    # Of 15 places of the window 2 lie outside.
    assert hlo.Program(text).operations() == 2 * 8 * 16 * 32 + 2 * 8 * 4 * 13


def test_of_what_is_sliced_the_slice_moves():
    def steps(w):
        return jax.lax.fori_loop(0, 10, lambda i, x: x + w[i], jnp.zeros(w.shape[1]))

    found = compiled(steps, (10, 50_000)).moved()
    row = 4 * 50_000
    # Each trip reads a row and the sum, and writes the sum; copies may come with it.
    assert 30 * row <= found <= 60 * row


def test_of_a_table_what_is_looked_up_moves():
    def steps(table, places):
        return table[places.astype(int)] * 2

    rows, width = 100_000, 64
    found = compiled(steps, (rows, width), (8,)).moved()
    assert 2 * 4 * 8 * width <= found < 4 * rows * width / 100


# As the compiler for TPUs writes attention: a kernel that is called for one row after another.
SLICES = """
ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %a = token[] after-all()
  %s = (f32[64,32]{1,0}, u32[], token[]) send(%x, %a), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[64,32]{1,0}, u32[], token[]) recv(%a), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %p = (f32[8,32]{1,0}, u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="REDUCE_SCATTER"}
  %d = (f32[64,32]{1,0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  ROOT %y = f32[64,32]{1,0} get-tuple-element(%d), index=0
}
"""


def test_what_slices_exchange():
    summed, scattered = hlo.Program(SLICES).collectives()
    assert (summed.kind, summed.devices, summed.slices) == ("all-reduce", 4, True)
    assert summed.received == 2 * 3 / 4 * 4 * 64 * 32
    assert (scattered.kind, scattered.devices) == ("reduce-scatter", 2)
    assert scattered.received == 4 * 8 * 32


GROUPED = """
ENTRY %main (n: s32[1], x: bf16[64,32], w: bf16[8,32,16]) -> bf16[64,16] {
  %n = s32[1]{0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %w = bf16[8,32,16]{2,1,0} parameter(2)
  ROOT %y = bf16[64,16]{1,0} custom-call(%n, /*index=5*/%x, %w), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/ragged_dot_general/ragged-dot-none"}
}
"""


def test_of_a_grouped_product_each_row_meets_one_weight():
    assert hlo.Program(GROUPED).operations() == 2 * 64 * 32 * 16

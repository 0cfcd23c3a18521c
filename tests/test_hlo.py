"""Programs are read as they run: loops counted, devices of collectives found in every notation, slices counted as slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax import hlo, sharding

MESH = {"data": 2, "fsdp": 4}

TEXT = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.7 = f32[64,8]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %place = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = f32[16,8]{1,0} dynamic-slice(%all-reduce.7, %place, %zero), dynamic_slice_sizes={16,8}
}

%begun (shard: bf16[8,8]) -> (bf16[8,8], bf16[32,8]) {
  %shard = bf16[8,8]{1,0} parameter(0)
  %gather.1 = bf16[32,8]{1,0} all-gather(%shard), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="21"}
  ROOT %both = (bf16[8,8]{1,0}, bf16[32,8]{1,0:S(1)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%ended (shard.1: bf16[8,8], whole.1: bf16[32,8]) -> bf16[32,8] {
  %shard.1 = bf16[8,8]{1,0} parameter(0)
  %whole.1 = bf16[32,8]{1,0:S(1)} parameter(1)
  %gather.2 = bf16[32,8]{1,0} all-gather(%shard.1), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="21"}
  ROOT %done = bf16[32,8]{1,0:S(1)} custom-call(%shard.1, %whole.1, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%begun.2 (shard.2: bf16[8,8]) -> (bf16[8,8], bf16[32,8]) {
  %shard.2 = bf16[8,8]{1,0} parameter(0)
  %gather.3 = bf16[32,8]{1,0} all-gather(%shard.2), channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="22"}
  ROOT %both.2 = (bf16[8,8]{1,0}, bf16[32,8]{1,0:S(1)}) custom-call(%gather.3), custom_call_target="AsyncCollectiveStart"
}

%body (state: (s32[], f32[64,8], bf16[8,8])) -> (s32[], f32[64,8], bf16[8,8]) {
  %state = (s32[], f32[64,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %w = bf16[8,8]{1,0} get-tuple-element(%state), index=2
  %first = (bf16[8,8]{1,0}, bf16[32,8]{1,0:S(1)}) fusion(%w), kind=kCustom, calls=%begun
  %other = (bf16[8,8]{1,0}, bf16[32,8]{1,0:S(1)}) fusion(%w), kind=kCustom, calls=%begun.2
  %part.1 = bf16[8,8]{1,0} get-tuple-element(%first), index=0
  %part.2 = bf16[32,8]{1,0:S(1)} get-tuple-element(%first), index=1
  %last = bf16[32,8]{1,0:S(1)} fusion(%part.1, %part.2), kind=kCustom, calls=%ended
  %kernel = f32[64,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "words":"{}"
}}, metadata={op_name="attention"}
  %pallas_call.3 = f32[64,8] custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="mha/pallas_call"}
  %pallas_call.4 = f32[64,8] custom-call(%x), custom_call_target="triton_kernel_call_ffi", metadata={op_name="flash/pallas_call"}
  %part = f32[16,8]{1,0} fusion(%kernel), kind=kCustom, calls=%scattered
  ROOT %next = (s32[], f32[64,8]{1,0}, bf16[8,8]{1,0}) tuple(%i, %kernel, %w)
}

%condition (state.1: (s32[], f32[64,8], bf16[8,8])) -> pred[] {
  %state.1 = (s32[], f32[64,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], f32[64,8], bf16[8,8])) -> f32[64,8] {
  %p = (s32[], f32[64,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %loop = (s32[], f32[64,8]{1,0}, bf16[8,8]{1,0}) while(%p), condition=%condition, body=%body
  %x.2 = f32[64,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %passed = f32[64,8]{1,0} collective-permute(%x.2), channel_id=9, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.Program(TEXT)


def test_collectives_are_counted_as_often_as_they_run(program):
    found = {(each.kind, each.axes): each for each in program.collectives(MESH)}
    assert set(found) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("collective-permute", "data")}
    gathers = [each for each in program.collectives(MESH) if each.kind == "all-gather"]
    # Begun and ended in two fusions it is one, another of the same channel is another; five times round the loop.
    assert [(each.times, each.bytes, each.devices) for each in gathers] == 2 * [(5, 32 * 8 * 2, 4)]
    assert gathers[0].sent == 5 * 32 * 8 * 2 * 3 / 4
    # A sum of which everyone keeps a slice is sent once, not twice.
    assert found["reduce-scatter", "fsdp"].sent == 5 * 64 * 8 * 4 * 3 / 4
    assert found["collective-permute", "data"].sent == 64 * 8 * 4
    assert program.kernels() == {"kernel": 5, "mha": 5, "flash": 5} and not program.unknown_loops


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[2,4]<=[8]", "fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[1,8]<=[8]", "data+fsdp"),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp"),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data"),
        ("mesh['a'=2,'b'=4] {'a','b'}", "data+fsdp"),
        ("{}", "data+fsdp"),
    ],
)
def test_devices_of_a_collective_in_every_notation(written, axes):
    assert (
        hlo._axes(hlo._groups(f"channel_id=1, replica_groups={written}, use_global_device_ids=true", 8), MESH) == axes
    )


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="unknown way"):
        hlo._groups("replica_groups=<new>", 8)


def test_sizes_of_types():
    assert hlo.size_of("(bf16[2,3]{1,0:T(8,128)}, f32[], /*index=2*/s32[4]{0})") == 12 + 4 + 16
    # What the compiler keeps in fast memory moves nothing through the main memory.
    assert hlo.size_of("f32[8]{0:S(1)}") == 0 and hlo.size_of("f32[8]{0:S(1)}", fast=True) == 32
    assert hlo.size_of("f32[8]{0:T(128)S(5)}", fast=True) == 0  # the host's


def test_arrays_of_types():
    told = "(s32[], bf16[4,16]{1,0:T(8,128)(2,1)}, f32[4,16]{1,0:T(8)S(5)}, f32[2]{0:S(1)})"
    assert hlo.arrays(told) == [
        ("s32", ()),
        ("bf16", (4, 16)),
        ("f32", (2,)),
    ]  # what the host keeps is not the device's


HOSTED = """HloModule jit_step, entry_computation_layout={()->f32[]}

%body (state: (s32[], f32[4,16], f32[16])) -> (s32[], f32[4,16], f32[16]) {
  %state = (s32[], f32[4,16]{1,0:S(5)}, f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %s = f32[4,16]{1,0:S(5)} get-tuple-element(%state), index=1
  %x = f32[16]{0} get-tuple-element(%state), index=2
  %r = f32[1,16]{1,0} bitcast(%x)
  %put = ((f32[4,16]{1,0:S(5)}, f32[1,16]{1,0}, s32[]), f32[4,16]{1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%s, %r, %i)
  %kept = f32[4,16]{1,0:S(5)} dynamic-update-slice-done(%put)
  %take = ((f32[4,16]{1,0:S(5)}, s32[]), f32[1,16]{1,0:S(1)}, u32[]{:S(2)}) dynamic-slice-start(%kept, %i)
  %taken = f32[1,16]{1,0:S(1)} dynamic-slice-done(%take)
  ROOT %next = (s32[], f32[4,16]{1,0:S(5)}, f32[16]{0}) tuple(%i, %kept, %x)
}

%condition (state.1: (s32[], f32[4,16], f32[16])) -> pred[] {
  %state.1 = (s32[], f32[4,16]{1,0:S(5)}, f32[16]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], f32[4,16], f32[16])) -> f32[16] {
  %p = (s32[], f32[4,16]{1,0:S(5)}, f32[16]{0}) parameter(0)
  %loop = (s32[], f32[4,16]{1,0:S(5)}, f32[16]{0}) while(%p), condition=%condition, body=%body
  ROOT %x.2 = f32[16]{0} get-tuple-element(%loop), index=2
}
"""


def test_what_goes_to_the_host_and_back_is_counted_as_often_as_it_goes(program):
    assert program.host_traffic() == 0
    row, indices = 16 * 4, 4 + 4  # a slice's own index, and a counter
    assert hlo.Program(HOSTED).host_traffic() == 4 * (row + row + indices)


STARTED = """HloModule jit_step, entry_computation_layout={()->f32[]}

ENTRY %main (p: f32[4,256]) -> f32[256] {
  %p = f32[4,256]{1,0} parameter(0)
  %q = f32[4,256]{1,0:S(1)} parameter(1)
  %i = s32[] parameter(2)
  %u = f32[1,256]{1,0:S(1)} parameter(3)
  %started = WHAT
  ROOT %x = f32[256]{0} parameter(4)
}
"""


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        # Into fast memory it is read, out of it written; the type tells both ends.
        ("(f32[4,256]{1,0:S(1)}, f32[4,256]{1,0}, u32[]{:S(2)}) copy-start(%p)", 4),
        ("(f32[4,256]{1,0}, f32[4,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%q)", 4),
        ("(f32[4,256]{1,0}, f32[4,256]{1,0}, u32[]{:S(2)}) copy-start(%p)", 8),
        # Of what is cut from a stack, what is cut.
        ("((f32[4,256]{1,0}), f32[1,256]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%p)", 1),
        ("((f32[4,256]{1,0}), f32[1,256]{1,0}, u32[]{:S(2)}) slice-start(%p)", 2),
        ("((f32[4,256]{1,0}, s32[]), f32[1,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) dynamic-slice-start(%p, %i)", 1),
        (
            "((f32[4,256]{1,0}, f32[1,256]{1,0:S(1)}, s32[]), f32[4,256]{1,0}, u32[]) dynamic-update-slice-start(%p, %u, %i)",
            1,
        ),
        # A gathered array is as many times larger as there are devices.
        ("(f32[4,256]{1,0}, f32[16,256]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}", 20),
        ("f32[4,256]{1,0} all-reduce-start(%p), replica_groups={{0,1,2,3}}, to_apply=%add", 8),
    ],
)
def test_what_goes_on_beside_other_work_moves_what_it_moves(what, rows):
    program = hlo.Program(STARTED.replace("WHAT", what))
    assert program.memory_traffic() == rows * 256 * 4


def compiled(function, *arguments):
    return hlo.Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_loop_reads_a_slice_of_its_stack_each_time():
    """Not the whole stack: of 64 layers' weights 64 slices are one reading of all."""
    stack, x = jnp.ones((64, 128, 128)), jnp.ones((128, 128))
    program = compiled(lambda stack, x: jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0], stack, x)
    once = stack.nbytes + 64 * 2 * x.nbytes
    assert once < program.memory_traffic() < 4 * once


def test_a_loop_of_unknown_length_is_told():
    def until(x, n):
        return jax.lax.while_loop(lambda state: state[1] < n, lambda state: (state[0] * 2, state[1] + 1), (x, 0))

    program = compiled(until, jnp.ones(8), 5)
    assert program.runs and len(program.unknown_loops) == 1


def test_what_a_real_program_sends():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    whole = NamedSharding(mesh, P())
    program = hlo.Program(jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile().as_text())
    (gather,) = program.collectives(mesh.shape)
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", "fsdp", 64 * 32 * 4)
    assert np.isclose(gather.sent, 64 * 32 * 4 * 3 / 4)


def test_what_devices_send_each_other_by_themselves_is_counted_whole():
    """All collectives of a shard_map have the same channel, and none is another's copy."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, sequence=4))

    def traded(x):
        return jax.lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True)

    def passed(x):
        return jax.lax.ppermute(x, "sequence", [(here, (here + 1) % 4) for here in range(4)])

    def on_each(q, k, v):
        return 2 * traded(q), passed(jnp.sin(traded(k))), passed(jnp.cos(traded(v))), jax.lax.psum(q, "data")

    rows = P("data", "sequence")
    function = jax.shard_map(on_each, mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows,) * 3 + (P(None, "sequence"),))
    # Of different sizes, so that none is merged with another: 16, 32 and 64 numbers for a device.
    inputs = [jax.ShapeDtypeStruct((2, 16, 4, width), jnp.float32) for width in (1, 2, 4)]
    program = compiled(function, *inputs)
    found = sorted(
        (each.kind, each.axes, each.devices, each.times, each.bytes) for each in program.collectives(mesh.shape)
    )
    assert found == [
        ("all-reduce", "data", 2, 1, 4 * 16),
        *(("all-to-all", "sequence", 4, 1, 4 * size) for size in (16, 32, 64)),
        *(("collective-permute", "sequence", 4, 1, 4 * size) for size in (32, 64)),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[8] all-reduce-start(%x), replica_groups={{0,1,2,3}}", 32),
        ("(f32[8], f32[32]) all-gather-start(%x), replica_groups={{0,1,2,3}}", 128),
        ("((f32[8], f32[8]), (f32[8], f32[8])) all-to-all-start(%x, %y), replica_groups={{0,1}}", 64),
        ("((f32[8]), f32[2]) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}", 32),
        ("f32[2] reduce-scatter(%x), replica_groups={{0,1,2,3}}", 32),
    ],
)
def test_bytes_of_a_collective_that_is_begun_are_its_result(line, expected):
    each = hlo._instruction(f"  %each = {line}")
    (group, *_) = hlo._groups(each.rest, 4)
    assert hlo._moved(each, each.kind.removesuffix("-start"), len(group)) == expected


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no program"):
        hlo.Program("nothing")

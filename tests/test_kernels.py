"""Kernels of accelerators, run by the interpreter: what they leave out cannot matter, and what they do is the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from sora_jax.nn import blockwise, kernels
from sora_jax.nn.attention import reference

BLOCK = 128


@pytest.fixture(params=["splash", "triton"])
def kernel(request, monkeypatch):
    """Of blocks that are no larger than BLOCK."""
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", BLOCK)
    return functools.partial(getattr(kernels, request.param), interpret=True)


def packed(*tokens):
    """(1, N): segments 1, 2, .. of so many tokens, those of 0 being padding."""
    return jnp.asarray(np.repeat([0 if n < 0 else i for i, n in enumerate(tokens, 1)], np.abs(tokens))[None], jnp.int32)


def some(rng, *shapes):
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def in_blocks(x_BNKE):
    """(N / BLOCK, BLOCK, K, E) of the only row."""
    return np.asarray(x_BNKE[0]).reshape(-1, BLOCK, *x_BNKE.shape[2:])


def spoiled(x_BNKE, kept):
    """x with NaN in all blocks but those kept."""
    blocks = in_blocks(x_BNKE).copy()
    blocks[[number for number in range(len(blocks)) if number not in kept]] = np.nan
    return jnp.asarray(blocks.reshape(x_BNKE.shape))


# Clips of 200, 56, 150 and 106 tokens and padding, in five blocks: 1 | 1 2 | 3 | 3 4 | padding; and those that each meets.
SEGMENT = packed(200, 56, 150, 106, -128)
MEETS = {0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}}


@pytest.mark.parametrize("block", MEETS)
def test_queries_do_not_touch_keys_and_values_of_other_clips(rng, kernel, block):
    q, k, v, d_out = some(rng, *[(1, SEGMENT.size, 2, 16)] * 4)
    expected, backward = jax.vjp(lambda q: reference(q, k, v, SEGMENT, SEGMENT), q)
    (expected_dq,) = backward(d_out)
    k, v = spoiled(k, MEETS[block]), spoiled(v, MEETS[block])
    found, backward = jax.vjp(lambda q: kernel(q, k, v, SEGMENT, SEGMENT, "float32"), q)
    (found_dq,) = backward(d_out)
    assert np.allclose(in_blocks(found)[block], in_blocks(expected)[block], atol=1e-5)
    assert np.allclose(in_blocks(found_dq)[block], in_blocks(expected_dq)[block], atol=1e-5)


@pytest.mark.parametrize("block", MEETS)
def test_keys_and_values_do_not_touch_queries_of_other_clips(rng, kernel, block):
    q, k, v, d_out = some(rng, *[(1, SEGMENT.size, 2, 16)] * 4)
    expected = jax.vjp(lambda k, v: reference(q, k, v, SEGMENT, SEGMENT), k, v)[1](d_out)
    q, d_out = spoiled(q, MEETS[block]), spoiled(d_out, MEETS[block])
    found = jax.vjp(lambda k, v: kernel(q, k, v, SEGMENT, SEGMENT, "float32"), k, v)[1](d_out)
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(in_blocks(one)[block], in_blocks(other)[block], atol=1e-5)


def test_blocks_that_run_are_those_with_a_pair_to_compute(rng):
    """Of packed rows: clips in order, each with a caption, and padding."""
    for _ in range(50):
        clips = rng.integers(1, 20)
        q, k = (np.zeros((1, blocks * size), np.int32) for blocks, size in ((12, 8), (5, 4)))
        for row in (q, k):
            filled = rng.integers(clips, row.size + 1)
            row[0, :filled] = np.sort(np.append(rng.integers(1, clips + 1, filled - clips), np.arange(1, clips + 1)))
        for one, other, size in ((q, q, (8, 8)), (q, k, (8, 4)), (k, q, (4, 8))):
            pairs = (one[0, :, None] == other[0]) & (one[0, :, None] > 0)
            blocks = rearrange(pairs, "(i n) (j m) -> i j n m", n=size[0], m=size[1]).any((2, 3))
            assert np.array_equal(blockwise.meetings(jnp.asarray(one), jnp.asarray(other), *size)[0], blocks)


def test_a_step_holds_the_next_block_that_runs(rng):
    """Along both axes, of its own row, in the narrowest type that can number the blocks of all rows."""
    for count, dtype in ((64, jnp.int8), (65, jnp.int16)):
        run = rng.random((2, 3, count)) < 0.04
        run[0, 0], run[0, 1, -1] = False, True
        for axis, joined, turned in (
            (2, "b i j -> 1 (b i) j", run),
            (1, "b i j -> 1 j (b i)", run.swapaxes(1, 2)),
        ):
            info = kernels._visits(jnp.asarray(turned), axis)
            assert np.array_equal(info.block_mask, 2 * rearrange(run, joined)) and info.data_next.dtype == dtype
            expected = np.zeros(run.shape, int)
            for row, place in np.ndindex(2, 3):
                running = np.flatnonzero(run[row, place])
                for step in range(count):
                    after = running[running >= step]
                    here = after[0] if after.size else running[-1] if running.size else 0
                    expected[row, place, step] = here + row * count
            assert np.array_equal(info.data_next, rearrange(expected, joined))


def test_queries_without_keys_are_finite(rng, kernel):
    """Blocks of padding, and clips without a caption, of which nothing comes back either."""
    q, k, v, weight = some(rng, (1, 384, 2, 16), *[(1, 256, 2, 16)] * 2, (1, 384, 2, 16))
    segment, text = packed(100, 28, 128, -128), packed(-128, 28, -100)
    seen = (segment == 2)[..., None, None]

    def loss(attend, q, k, v):
        out = attend(q, k, v)
        return jnp.where(seen, out * weight, 0.0).sum(), out

    here = functools.partial(kernel, q_segment_BN=segment, k_segment_BM=text, dtype="float32")
    full = functools.partial(reference, q_segment_BN=segment, k_segment_BM=text)
    (found, expected) = (
        jax.grad(functools.partial(loss, attend), argnums=(0, 1, 2), has_aux=True)(q, k, v) for attend in (here, full)
    )
    assert np.all(np.isfinite(found[1])) and np.allclose(found[1][0, 100:128], expected[1][0, 100:128], atol=1e-5)
    for one, other in zip(found[0], expected[0], strict=True):
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("size", [64, 72, 128])
def test_bfloat16_of_tokens_and_their_captions(rng, kernel, size):
    """Two rows, within 2 % of the largest: bfloat16 has 8 bits, and the softmax's weights are rounded to it."""
    q, k, v, weight = some(rng, (2, 384, 2, size), *[(2, 256, 2, size)] * 2, (2, 384, 2, size))
    segment = jnp.concatenate((packed(200, 56, 128), packed(30, 300, -54)))
    text = jnp.concatenate((packed(20, 140, 10, -86), packed(190, 60, -6)))
    weight = weight * (segment > 0)[..., None, None]
    found, expected = (
        jax.vjp(lambda *x, attend=attend: attend(*x, segment, text), q, k, v) for attend in (kernel, reference)
    )
    some_keys = np.asarray(segment > 0)
    assert close(np.asarray(found[0])[some_keys], np.asarray(expected[0])[some_keys])
    for one, other in zip(found[1](weight), expected[1](weight), strict=True):
        assert close(one, other)


def close(one, other):
    return np.abs(one - other).max() < 0.02 * np.abs(other).max()


# By jax 0.12, where it still works.
@pytest.mark.filterwarnings("ignore:.*Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_of_gpus_is_lowered_where_there_is_none(dtype):
    """One program forward, two backward, as Triton takes them: sizes that are no powers of two, and tokens that fill no block."""
    shapes = [jax.ShapeDtypeStruct((2, tokens, 4, 72), jnp.float32) for tokens in (1000, 200, 200)]
    segments = [jax.ShapeDtypeStruct((2, tokens), jnp.int32) for tokens in (1000, 200)]
    gradient = jax.jit(jax.grad(lambda *x: kernels.triton(*x, dtype).sum(), argnums=(0, 1, 2)))
    chip = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        traced = gradient.trace(*shapes, *segments)
        assert re.findall(r"name=(flash\w*)", str(traced.jaxpr)) == ["flash", "flash_of_queries", "flash_of_keys"]
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_tokens_that_fill_no_block_of_a_gpu(rng):
    q, k, v, weight = some(rng, (1, 100, 2, 24), *[(1, 40, 2, 24)] * 2, (1, 100, 2, 24))
    segment, text = packed(70, 30), packed(15, 25)
    found, expected = (
        jax.vjp(lambda *x, attend=attend: attend(*x, segment, text, "float32"), q, k, v)
        for attend in (functools.partial(kernels.triton, interpret=True), reference)
    )
    assert np.allclose(found[0], expected[0], atol=1e-5)
    for one, other in zip(found[1](weight), expected[1](weight), strict=True):
        assert np.allclose(one, other, atol=1e-5)

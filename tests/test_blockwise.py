"""Attention in blocks: parts are put together, other clips' blocks are skipped, padding costs nothing and stays finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.nn import blockwise
from sora_jax.nn.attention import reference
from sora_jax.nn.blockwise import Blocks

N, K, E = 50, 3, 8


@pytest.fixture
def inputs(rng):
    q, k, v = (jnp.asarray(rng.standard_normal((2, N, K, E)), jnp.float32) for _ in range(3))
    segment = np.stack([np.sort(rng.integers(1, 5, N)), np.repeat([1, 2, 0], [20, 20, 10])])
    return q, k, v, jnp.asarray(segment, jnp.int32)


@pytest.mark.parametrize("block", [7, 16, 64])
def test_blocks_that_do_not_divide_the_row(inputs, block):
    q, k, v, segment = inputs
    out, _ = blockwise.blockwise(q, k, v, segment, segment, block=block)
    real = np.asarray(segment) > 0
    assert np.allclose(out[real], reference(q, k, v, segment, segment)[real], atol=1e-5)
    assert np.all(out[~real] == 0)


def test_captions_have_few_keys_a_block(rng):
    """A clip of 100 tokens meets a caption of 10, so a block of 128 queries needs few keys; values are the same."""
    assert Blocks.of(256, 4096, 4096) == (256, 256)
    assert Blocks.of(256, 4096, 512) == (256, 64) and Blocks.of(256, 4096, 1100) == (256, 128)
    assert Blocks.of(256, 4096, 40) == (256, 40) and Blocks.of(256, 100, 4096) == (100, 256)
    q, k, v = (jnp.asarray(rng.standard_normal((1, tokens, K, E)), jnp.float32) for tokens in (800, 90, 90))
    of_q, of_k = (jnp.repeat(jnp.arange(1, 9), each)[None] for each in (100, 10))
    of_k = jnp.pad(of_k, ((0, 0), (0, 10)))

    def loss(attend, *inputs):
        return jnp.sum(attend(*inputs, of_q, of_k) * jnp.cos(jnp.arange(q.size).reshape(q.shape)))

    def in_blocks(*inputs):
        return blockwise.blockwise(*inputs, block=128)[0]

    (ours, theirs) = (
        jax.value_and_grad(partial(loss, attend), (0, 1, 2))(q, k, v) for attend in (in_blocks, reference)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


def test_segments_in_any_order(inputs, rng):
    q, k, v, segment = inputs
    mixed = jnp.asarray(rng.permuted(np.asarray(segment), axis=1))
    out, _ = blockwise.blockwise(q, k, v, mixed, mixed, block=8)
    real = np.asarray(mixed) > 0
    assert np.allclose(out[real], reference(q, k, v, mixed, mixed)[real], atol=1e-5)


def test_parts_over_some_keys_are_one_attention(inputs):
    """Also through gradients, which reach a part's logarithm of its sum."""
    q, k, v, segment = inputs
    weight = (segment > 0)[..., None, None] * jnp.cos(jnp.arange(q.size).reshape(q.shape))

    def whole(k):
        return (blockwise.blockwise(q, k, v, segment, segment, block=16)[0] * weight).sum()

    def parts(k):
        one, other = (
            blockwise.blockwise(q, k[:, part], v[:, part], segment, segment[:, part], block=16)
            for part in (slice(0, 23), slice(23, N))
        )
        return (blockwise.merge(one, other)[0] * weight).sum()

    assert np.allclose(jax.grad(whole)(k), jax.grad(parts)(k), atol=1e-6)


def test_only_blocks_with_a_clip_in_common_are_computed():
    segment = jnp.asarray([np.repeat([1, 2, 3, 0], 16), np.repeat([1, 2], 32)], jnp.int32)
    zeros = jnp.zeros((2, 64, 1, 8))
    inputs = blockwise.prepared(zeros, zeros, zeros, segment, segment, "float32", Blocks(16, 16))
    (row, i, j), count = blockwise._pairs(inputs, Blocks(16, 16))
    pairs = list(zip(*(np.asarray(part[:count]).tolist() for part in (row, i, j)), strict=True))
    assert pairs[:3] == [(0, 0, 0), (0, 1, 1), (0, 2, 2)]
    assert pairs[3:] == [(1, a, b) for a in range(4) for b in range(4) if a // 2 == b // 2]


def computed(q_segment, k_segment, blocks):
    """Pairs of blocks that are computed, and those of which the dense mask has a pair of tokens, as sets."""
    q, k = (jnp.asarray(segment, jnp.int32)[None] for segment in (q_segment, k_segment))
    heads = [jnp.zeros((1, each.shape[1], 1, 8)) for each in (q, k, k)]
    inputs = blockwise.prepared(*heads, q, k, "float32", blocks)
    (_, i, j), count = blockwise._pairs(inputs, blocks)
    q, k = np.asarray(inputs.q_segment_BN[0]), np.asarray(inputs.k_segment_BM[0])
    dense = (q[:, None] == k) & (q[:, None] > 0)
    some = dense.reshape(len(q) // blocks.q, blocks.q, len(k) // blocks.k, blocks.k).any((1, 3))
    pairs = list(zip(np.asarray(i[:count]).tolist(), np.asarray(j[:count]).tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    return set(pairs), set(zip(*(part.tolist() for part in np.nonzero(some)), strict=True))


@given(st.lists(st.integers(0, 4), min_size=24, max_size=24), st.lists(st.integers(0, 4), min_size=17, max_size=17))
def test_no_block_is_skipped_that_the_dense_mask_needs(q_segment, k_segment):
    found, needed = computed(q_segment, k_segment, Blocks(8, 4))
    assert needed <= found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20))
def test_of_a_packed_row_exactly_the_blocks_of_the_dense_mask_are_computed(lengths, padding):
    segment = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])[:40]
    segment = np.pad(segment, (0, 40 - len(segment)))
    found, needed = computed(segment, segment, Blocks(8, 4))
    assert found == needed


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=24, max_size=24), st.integers(0, 2**32))
def test_any_segments_give_what_the_dense_mask_gives(segment, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 24, 1, 8)), jnp.float32) for _ in range(3))
    segment = jnp.asarray(segment, jnp.int32)[None]
    out, _ = blockwise.blockwise(q, k, v, segment, segment, block=8)
    real = np.asarray(segment) > 0
    assert np.allclose(out[real], reference(q, k, v, segment, segment)[real], atol=1e-5) and np.all(out[~real] == 0)


def test_extreme_logits_stay_finite(inputs):
    q, k, v, segment = inputs
    out, grads = jax.value_and_grad(lambda q: blockwise.blockwise(1e4 * q, k, v, segment, segment, block=16)[0].sum())(
        q
    )
    assert np.isfinite(out) and np.all(np.isfinite(grads))


def test_a_query_without_keys_has_no_value_and_no_gradient(inputs):
    q, k, v, segment = inputs
    (out, log_sum), grads = jax.vjp(
        lambda q: blockwise.blockwise(q, k, v, jnp.full_like(segment, 9), segment, block=16), q
    )
    assert np.all(out == 0) and np.all(log_sum == blockwise.LEAST)
    assert np.all(grads((jnp.ones_like(out), jnp.zeros_like(log_sum)))[0] == 0)


def test_memory_grows_with_tokens_not_with_their_square():
    """By the compiler's own account, forward and backward."""

    def temporaries(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 2, 32), jnp.float32)
        segment = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def loss(q, k, v, segment):
            return blockwise.blockwise(q, k, v, segment, segment, block=128)[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, segment).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)

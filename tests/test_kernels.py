"""The kernel of TPUs, run by the interpreter: what it leaves out cannot matter, and what it does is the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn import kernels
from sora_jax.nn.attention import reference

BLOCK = 128


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", BLOCK)


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


# Clips of 200, 56, 150 and 62 tokens and padding, in five blocks: 1 | 1 2 | 3 | 3 4 | padding; and the blocks that see each.
SEGMENT = packed(200, 56, 150, 106, -128)
SEEN_BY = {0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}}


@pytest.mark.parametrize("block", SEEN_BY)
def test_queries_do_not_touch_keys_and_values_of_other_clips(rng, small_blocks, block):
    q, k, v, d_out = some(rng, *[(1, SEGMENT.size, 2, 16)] * 4)
    expected, backward = jax.vjp(lambda q: reference(q, k, v, SEGMENT, SEGMENT), q)
    (expected_dq,) = backward(d_out)
    k, v = spoiled(k, SEEN_BY[block]), spoiled(v, SEEN_BY[block])
    found, backward = jax.vjp(lambda q: kernels.splash(q, k, v, SEGMENT, SEGMENT, "float32", interpret=True), q)
    (found_dq,) = backward(d_out)
    assert np.allclose(in_blocks(found)[block], in_blocks(expected)[block], atol=1e-5)
    assert np.allclose(in_blocks(found_dq)[block], in_blocks(expected_dq)[block], atol=1e-5)

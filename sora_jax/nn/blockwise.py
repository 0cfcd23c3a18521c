"""Attention in blocks of queries and keys, of which only those are computed that share a segment.

The softmax is carried along from block to block (Rabe & Staats, arXiv:2112.05682; FlashAttention, arXiv:2205.14135), so that
memory grows with the number of tokens and not with its square, and a packed row of clips costs the sum of their squares. Plain
jax: it runs on every platform, and the kernels of accelerators are held against it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from sora_jax.nn.products import product

# Stands for minus infinity, yet differences of it are numbers.
LEAST = -1e30
# The name by which a policy of recomputing keeps what the backward pass needs beside queries, keys and values.
KEPT = "attention"
# Blocks of keys are of so many or a multiple: of fewer there would be many, each of too little work.
KEYS = 64


class Blocks(NamedTuple):
    """How many tokens a block of queries has, and how many one of keys."""

    q: int
    k: int

    @classmethod
    def of(cls, block: int, queries: int, keys: int) -> Blocks:
        """Blocks of at most `block` tokens; one of keys is no larger a part of all than one of queries, as captions have few."""
        part = KEYS * math.ceil(block * keys / queries / KEYS)
        return cls(min(block, queries), min(block, part, keys))


class Inputs(NamedTuple):
    """Queries that are scaled already, keys and values with heads before tokens, and segments; tokens in whole blocks."""

    q_BKNE: Array
    k_BKME: Array
    v_BKME: Array
    q_segment_BN: Array
    k_segment_BM: Array


def blockwise(
    q_BNKE: Float[Array, "B N K E"],
    k_BMKE: Float[Array, "B M K E"],
    v_BMKE: Float[Array, "B M K E"],
    q_segment_BN: Int[Array, "B N"],
    k_segment_BM: Int[Array, "B M"],
    dtype: str = "float32",
    block: int = 256,
) -> tuple[Float[Array, "B N K E"], Float[Array, "B N K"]]:
    """(softmax(q k^T / sqrt(E)) v within segments, logarithm of each query's sum of exponentials), both differentiable.

    With the logarithms parts over different keys are put together (merge). Tokens of segment 0 and queries without keys get
    zeros and a logarithm of LEAST. block is the most tokens of a block; which blocks are skipped follows from the range
    of their segments, so a row's clips must not be interleaved for it to help.
    """
    N, M = q_BNKE.shape[1], k_BMKE.shape[1]
    blocks = Blocks.of(block, N, M)
    inputs = prepared(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, dtype, blocks)
    out_BKNE, log_sum_BKN = _attend(inputs, blocks)
    return out_BKNE.swapaxes(1, 2)[:, :N], log_sum_BKN.swapaxes(1, 2)[:, :N]


def prepared(
    q_BNKE: Array, k_BMKE: Array, v_BMKE: Array, q_segment_BN: Array, k_segment_BM: Array, dtype: str, blocks: Blocks
) -> Inputs:
    scaled = q_BNKE * q_BNKE.shape[-1] ** -0.5
    padded = (in_blocks(scaled, blocks.q), in_blocks(k_BMKE, blocks.k), in_blocks(v_BMKE, blocks.k))
    q, k, v = (x.astype(dtype).swapaxes(1, 2) for x in padded)
    return Inputs(q, k, v, in_blocks(q_segment_BN, blocks.q), in_blocks(k_segment_BM, blocks.k))


def in_blocks(x_BN: Array, block: int) -> Array:
    """x (B, N, ...) with zeros behind its tokens to fill whole blocks."""
    return jnp.pad(x_BN, [(0, 0), (0, -x_BN.shape[1] % block)] + [(0, 0)] * (x_BN.ndim - 2))


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over the keys of both parts, each (out, log sum)."""
    log_sum = jnp.logaddexp(one[1], other[1])
    first, second = (jnp.exp(part[1] - log_sum)[..., None] * part[0] for part in (one, other))
    return first + second, log_sum


def meetings(
    q_segment_BN: Int[Array, "B N"], k_segment_BM: Int[Array, "B M"], q_block: int, k_block: int
) -> Bool[Array, "B I J"]:
    """Which blocks of queries and which of keys have a segment in common, padding apart, by the ranges of their segments.

    For segments in order, all of which have keys, that is exact; for others it can be too many, never too few.
    """

    def ranges(segment: Array, block: int) -> tuple[Array, Array]:
        blocks = segment.reshape(segment.shape[0], -1, block)
        return jnp.where(blocks > 0, blocks, jnp.iinfo(blocks.dtype).max).min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = ranges(q_segment_BN, q_block), ranges(k_segment_BM, k_block)
    return (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])


def _pairs(inputs: Inputs, blocks: Blocks) -> tuple[tuple[Array, Array, Array], Array]:
    """(row, block of queries, block of keys) of all pairs with a segment in common, in order, and how many there are."""
    shared = meetings(inputs.q_segment_BN, inputs.k_segment_BM, blocks.q, blocks.k)
    row, i, j = jnp.nonzero(shared, size=math.prod(shared.shape), fill_value=0)
    return (row, i, j), shared.sum()


def _block(x: Array, row: Array, number: Array, block: int) -> Array:
    """The block (K, block, ...) of x (B, K, N, ...)."""
    start: list[Any] = [row, 0, number * block, *(0 for _ in x.shape[3:])]
    return jax.lax.dynamic_slice(x, start, (1, x.shape[1], block, *x.shape[3:]))[0]


def _put(x: Array, value: Array, row: Array, number: Array, block: int) -> Array:
    return jax.lax.dynamic_update_slice(x, value[None], (row, 0, number * block, *(0 for _ in x.shape[3:])))


def _same(inputs: Inputs, row: Array, i: Array, j: Array, blocks: Blocks) -> Array:
    """(blocks.q, blocks.k): whether a query and a key belong to one clip."""
    q = jax.lax.dynamic_slice(inputs.q_segment_BN, (row, i * blocks.q), (1, blocks.q))[0]
    k = jax.lax.dynamic_slice(inputs.k_segment_BM, (row, j * blocks.k), (1, blocks.k))[0]
    return (q[:, None] == k[None, :]) & (q[:, None] > 0)


Three = tuple[Array, Array, Array]


def forward(inputs: Inputs, blocks: Blocks) -> tuple[Array, Array]:
    """(out_BKNE, log_sum_BKN), float32."""
    (row, i, j), count = _pairs(inputs, blocks)
    shape, dtype = inputs.q_BKNE.shape, inputs.q_BKNE.dtype

    def visit(number: Array, carry: Three) -> Three:
        r, a, b = row[number], i[number], j[number]
        value, sum_, most = (_block(x, r, a, blocks.q) for x in carry)
        same = _same(inputs, r, a, b, blocks)
        logits = product(
            "kne,kme->knm", _block(inputs.q_BKNE, r, a, blocks.q), _block(inputs.k_BKME, r, b, blocks.k), dtype
        )
        above = jnp.maximum(most, jnp.where(same, logits, LEAST).max(-1))
        weights = jnp.where(same, jnp.exp(logits - above[..., None]), 0.0)
        shrink = jnp.exp(most - above)
        value = value * shrink[..., None] + product(
            "knm,kme->kne", weights, _block(inputs.v_BKME, r, b, blocks.k), dtype
        )
        sum_ = sum_ * shrink + weights.sum(-1)
        value, sum_, above = (_put(x, new, r, a, blocks.q) for x, new in zip(carry, (value, sum_, above), strict=True))
        return value, sum_, above

    start = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.float32), jnp.full(shape[:-1], LEAST, jnp.float32)
    value, sum_, most = jax.lax.fori_loop(0, count, visit, start)
    some = sum_ > 0
    out = value / jnp.where(some, sum_, 1.0)[..., None]
    return out, jnp.where(some, most + jnp.log(jnp.where(some, sum_, 1.0)), LEAST)


def backward(inputs: Inputs, log_sum_BKN: Array, mean_BKN: Array, d_out_BKNE: Array, blocks: Blocks) -> Three:
    """Gradients of queries, keys and values, float32, from mean_gradient's means.

    The log sums may be over more keys than these: then it is these keys' part of a larger attention's gradients.
    """
    (row, i, j), count = _pairs(inputs, blocks)
    dtype = inputs.q_BKNE.dtype

    def visit(number: Array, carry: Three) -> Three:
        r, a, b = row[number], i[number], j[number]
        d_q, d_k, d_v = carry
        q, d_out, log_sum, mean = (
            _block(x, r, a, blocks.q) for x in (inputs.q_BKNE, d_out_BKNE, log_sum_BKN[..., None], mean_BKN[..., None])
        )
        k, v = (_block(x, r, b, blocks.k) for x in (inputs.k_BKME, inputs.v_BKME))
        logits = product("kne,kme->knm", q, k, dtype)
        weights = jnp.where(_same(inputs, r, a, b, blocks), jnp.exp(logits - log_sum), 0.0)
        d_logits = weights * (product("kne,kme->knm", d_out, v, dtype) - mean)
        d_q = _put(d_q, _block(d_q, r, a, blocks.q) + product("knm,kme->kne", d_logits, k, dtype), r, a, blocks.q)
        d_k = _put(d_k, _block(d_k, r, b, blocks.k) + product("knm,kne->kme", d_logits, q, dtype), r, b, blocks.k)
        d_v = _put(d_v, _block(d_v, r, b, blocks.k) + product("knm,kne->kme", weights, d_out, dtype), r, b, blocks.k)
        return d_q, d_k, d_v

    d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in inputs[:3])
    return jax.lax.fori_loop(0, count, visit, (d_q, d_k, d_v))


def mean_gradient(out_BKNE: Array, d_out_BKNE: Array, d_log_sum_BKN: Array | float) -> Array:
    """Of every query: a logit's gradient is its weight times (its value's share in the gradient - this mean of the shares)."""
    return jnp.sum(d_out_BKNE * out_BKNE, -1) - d_log_sum_BKN


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs: Inputs, blocks: Blocks) -> tuple[Array, Array]:
    return forward(inputs, blocks)


def _attend_forward(inputs: Inputs, blocks: Blocks) -> tuple[tuple[Array, Array], tuple[Inputs, Array, Array]]:
    out_BKNE, log_sum_BKN = (checkpoint_name(x, KEPT) for x in forward(inputs, blocks))
    return (out_BKNE, log_sum_BKN), (inputs, out_BKNE, log_sum_BKN)


def _attend_backward(blocks: Blocks, kept: tuple[Inputs, Array, Array], grads: tuple[Array, Array]) -> tuple[Inputs]:
    inputs, out_BKNE, log_sum_BKN = kept
    d_out_BKNE, d_log_sum_BKN = grads
    mean_BKN = mean_gradient(out_BKNE, d_out_BKNE, d_log_sum_BKN)
    d_inputs = backward(inputs, log_sum_BKN, mean_BKN, d_out_BKNE, blocks)
    return (as_gradient(inputs, d_inputs),)


def as_gradient(inputs: Inputs, d_inputs: Three) -> Inputs:
    """Gradients of queries, keys and values in the inputs' dtype; segments have none."""
    q, k, v = (gradient.astype(x.dtype) for gradient, x in zip(d_inputs, inputs[:3], strict=True))
    return Inputs(q, k, v, None, None)  # type: ignore[arg-type]


_attend.defvjp(_attend_forward, _attend_backward)

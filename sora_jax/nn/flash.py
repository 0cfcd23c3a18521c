"""Flash attention on GPUs, of which only blocks run that share a segment, in Pallas's Triton (Dao, arXiv:2307.08691).

A program has one block and goes over those that meet it: a block of queries over blocks of keys, forward and for the gradients of
queries, and a block of keys over blocks of queries for the gradients of keys and values. Clips of a packed row lie one after the
other, so what it goes over begins and ends somewhere, and a row costs the sum of its clips' squares.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float, Int

from sora_jax.nn.blockwise import KEPT, LEAST, mean_gradient, meetings

# Tokens of a block of queries and of one of keys.
BLOCK = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash(
    q_BNKE: Float[Array, "B N K E"],
    k_BMKE: Float[Array, "B M K E"],
    v_BMKE: Float[Array, "B M K E"],
    q_segment_BN: Int[Array, "B N"],
    k_segment_BM: Int[Array, "B M"],
    interpret: bool = False,
) -> Float[Array, "B N K E"]:
    """softmax(q k^T) v within segments, in the inputs' dtype; zeros where a query has no keys. N and M are multiples of BLOCK."""
    return _attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, interpret)[0]


def met(shared_BIJ: Bool[Array, "B I J"]) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """The first block of J that each of I meets, and the one behind the last; 0 and 0 if it meets none."""
    some_BI, count = shared_BIJ.any(-1), shared_BIJ.shape[-1]
    first, last = shared_BIJ.argmax(-1), count - 1 - shared_BIJ[..., ::-1].argmax(-1)
    return (some_BI * first).astype(jnp.int32), (some_BI * (last + 1)).astype(jnp.int32)


def _attend(q: Array, k: Array, v: Array, q_segment: Array, k_segment: Array, interpret: bool) -> tuple[Array, Array]:
    """(attention, logarithm of each query's sum of exponentials, float32 (B, K, N))."""
    rows, tokens, heads, size = q.shape
    first, stop = met(meetings(q_segment, k_segment, BLOCK, BLOCK))
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((rows, heads, tokens), jnp.float32)]
    kernel = functools.partial(_forward, size=size)
    out, log_sum = _over_blocks(kernel, "flash", [first, stop, q, q_segment], [k, v, k_segment], shapes, interpret)
    return out, log_sum


def _forward(first, stop, q, q_segment, k, v, k_segment, out, log_sum, *, size):
    """References to a block's and to a row's arrays; size is that of a head, which lies in the next power of two."""
    inside, segment, queries = _inside(q, size), q_segment[...], triton.load(q, mask=_inside(q, size), other=0.0)

    def visit(number, carry):
        value, total, most = carry
        at = pl.ds(number * BLOCK, BLOCK)
        same = _same(segment, k_segment[at])
        logits = jnp.where(same, _dot(queries, triton.load(k.at[at, :], mask=inside, other=0.0).T), LEAST)
        above = jnp.maximum(most, logits.max(-1))
        weights = jnp.where(same, jnp.exp(logits - above[:, None]), 0.0)
        shrink = jnp.exp(most - above)
        values = triton.load(v.at[at, :], mask=inside, other=0.0)
        value = value * shrink[:, None] + _dot(weights.astype(values.dtype), values)
        return value, total * shrink + weights.sum(-1), above

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.zeros(BLOCK, jnp.float32), jnp.full(BLOCK, LEAST, jnp.float32)
    value, total, most = jax.lax.fori_loop(first[...], stop[...], visit, nothing)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    triton.store(out, (value / total[:, None]).astype(out.dtype), mask=inside)
    log_sum[...] = jnp.where(some, most + jnp.log(total), LEAST)


def _of_queries(first, stop, q, q_segment, d_out, log_sum, mean, k, v, k_segment, d_q, *, size):
    inside, segment, lse, average = _inside(q, size), q_segment[...], log_sum[...], mean[...]
    queries, d_values = (triton.load(each, mask=inside, other=0.0) for each in (q, d_out))

    def visit(number, d_queries):
        at = pl.ds(number * BLOCK, BLOCK)
        keys, values = (triton.load(each.at[at, :], mask=inside, other=0.0) for each in (k, v))
        weights = _weights(_dot(queries, keys.T), lse, _same(segment, k_segment[at]))
        d_logits = weights * (_dot(d_values, values.T) - average[:, None])
        return d_queries + _dot(d_logits.astype(keys.dtype), keys)

    found = jax.lax.fori_loop(first[...], stop[...], visit, jnp.zeros(q.shape, jnp.float32))
    triton.store(d_q, found.astype(d_q.dtype), mask=inside)


def _of_keys(first, stop, k, v, k_segment, q, d_out, q_segment, log_sum, mean, d_k, d_v, *, size):
    inside, segment = _inside(k, size), k_segment[...]
    keys, values = (triton.load(each, mask=inside, other=0.0) for each in (k, v))

    def visit(number, carry):
        d_keys, d_values = carry
        at = pl.ds(number * BLOCK, BLOCK)
        queries, d_outs = (triton.load(each.at[at, :], mask=inside, other=0.0) for each in (q, d_out))
        weights = _weights(_dot(queries, keys.T), log_sum[at], _same(q_segment[at], segment))
        d_logits = weights * (_dot(d_outs, values.T) - mean[at][:, None])
        d_values += _dot(weights.astype(d_outs.dtype).T, d_outs)
        return d_keys + _dot(d_logits.astype(queries.dtype).T, queries), d_values

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32)
    found = jax.lax.fori_loop(first[...], stop[...], visit, nothing)
    for each, gradient in zip((d_k, d_v), found, strict=True):
        triton.store(each, gradient.astype(each.dtype), mask=inside)


def padded_head(size: int) -> int:
    """In how many numbers a head lies: Triton's arrays have sides that are powers of two."""
    return pl.next_power_of_2(size)


def _inside(x: Any, size: int) -> Array:
    return (jnp.arange(x.shape[-1]) < size)[None, :]


def _same(q_segment: Array, k_segment: Array) -> Array:
    """Whether a query and a key belong to one clip."""
    return (q_segment[:, None] == k_segment[None, :]) & (q_segment[:, None] > 0)


def _weights(logits: Array, log_sum: Array, same: Array) -> Array:
    return jnp.where(same, jnp.exp(logits - log_sum[:, None]), 0.0)


def _dot(a: Array, b: Array) -> Array:
    """A product in float32. Tensor cores round operands of float32, unless they are told not to."""
    return triton.dot(a, b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _over_blocks(
    kernel: Any, name: str, of_block: Sequence[Array], of_row: Sequence[Array], shapes: Sequence[Any], interpret: bool
) -> tuple[Array, ...]:
    """A program for every block, row and head. It is given its block of what is split, of_block and shapes, and all of of_row.

    Arrays of four axes are (row, token, head, size), of three (row, head, token), and of two (row, token) or, the first two of
    of_block, a number of each (row, block).
    """
    rows, blocks = of_block[0].shape
    heads, size = next((x.shape[2], x.shape[3]) for x in of_row if x.ndim == 4)
    padded = padded_head(size)

    def spec(x: Any, split: bool) -> pl.BlockSpec:
        axis = {2: 1, 3: 2, 4: 1}[len(x.shape)]
        tokens = BLOCK if split else x.shape[axis]
        shape, place = {
            2: ((None, tokens), lambda i, b, k: (b, i)),
            3: ((None, None, tokens), lambda i, b, k: (b, k, i)),
            4: ((None, tokens, None, padded), lambda i, b, k: (b, i, k, 0)),
        }[len(x.shape)]
        return pl.BlockSpec(shape, place if split else lambda i, b, k: place(0, b, k))

    number = pl.BlockSpec((None, None), lambda i, b, k: (b, i))
    split = [number, number, *(spec(x, True) for x in of_block[2:])]
    # What jax's own kernel takes, forward and backward.
    settings = triton.CompilerParams(num_warps=4 if size <= 64 or name != "flash" else 8, num_stages=2)
    call = pl.pallas_call(
        kernel,
        grid=(blocks, rows, heads),
        in_specs=[*split, *(spec(x, False) for x in of_row)],
        out_specs=[spec(x, True) for x in shapes],
        out_shape=shapes,
        compiler_params=settings,
        interpret=interpret,
        name=name,
    )
    return tuple(call(*of_block, *of_row))


def _flash_forward(
    q: Array, k: Array, v: Array, q_segment: Array, k_segment: Array, interpret: bool
) -> tuple[Array, Any]:
    out, log_sum = (checkpoint_name(x, KEPT) for x in _attend(q, k, v, q_segment, k_segment, interpret))
    return out, (q, k, v, q_segment, k_segment, out, log_sum)


def _flash_backward(interpret: bool, kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, q_segment, k_segment, out, log_sum = kept
    size = q.shape[-1]
    mean = mean_gradient(out.astype(jnp.float32), d_out.astype(jnp.float32), 0.0).swapaxes(1, 2)
    shared = meetings(q_segment, k_segment, BLOCK, BLOCK)
    (d_q,) = _over_blocks(
        functools.partial(_of_queries, size=size),
        "flash_of_queries",
        [*met(shared), q, q_segment, d_out, log_sum, mean],
        [k, v, k_segment],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        interpret,
    )
    d_k, d_v = _over_blocks(
        functools.partial(_of_keys, size=size),
        "flash_of_keys",
        [*met(shared.swapaxes(1, 2)), k, v, k_segment],
        [q, d_out, q_segment, log_sum, mean],
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        interpret,
    )
    return d_q, d_k, d_v, None, None


flash.defvjp(_flash_forward, _flash_backward)

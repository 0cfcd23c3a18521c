"""Attention over tokens that are split over devices, inside shard_map.

In a ring keys and values go round (Ring Attention, arXiv:2310.01889): each device keeps its own queries, in n steps sees every
device's keys, one after the other, and carries the softmax along. Backwards the gradients of keys and values travel with them,
so that nothing but a device's own part is ever kept. A kernel that wants a whole row gets it by all_to_all: the devices trade
their tokens of all heads for all tokens of their heads (DeepSpeed-Ulysses, arXiv:2309.14509).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sora_jax.nn import blockwise
from sora_jax.nn.blockwise import Blocks, Inputs, Three


def ring(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    axis: str,
    dtype: str = "float32",
    block: int = 256,
) -> Array:
    """softmax(q k^T / sqrt(E)) v within segments over the tokens of all devices of a mesh axis, inside shard_map.

    Arguments and result are a device's own part, which has the same number of tokens on every device.
    """
    N = q_BNKE.shape[1]
    blocks = Blocks.of(block, N, k_BMKE.shape[1])
    inputs = blockwise.prepared(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, dtype, blocks)
    return _attend(inputs, axis, blocks).swapaxes(1, 2)[:, :N]


def all_to_all(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    kernel: Callable[..., Array],
    axis: str,
) -> Array:
    """kernel over the tokens of all devices of a mesh axis. Raises ValueError for heads that do not divide over them."""
    n, heads = jax.lax.axis_size(axis), q_BNKE.shape[2]
    if heads % n:
        raise ValueError(f"{heads} heads do not divide over {n} devices of mesh axis {axis}; use attention 'blockwise'")
    trade = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    q, k, v = (trade(x, split_axis=2, concat_axis=1) for x in (q_BNKE, k_BMKE, v_BMKE))
    segments = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (q_segment_BN, k_segment_BM))
    return trade(kernel(q, k, v, *segments), split_axis=1, concat_axis=2)


def _onwards(parts: tuple[Array, ...], axis: str) -> tuple[Array, ...]:
    """What the device before sends."""
    n = jax.lax.axis_size(axis)
    return tuple(jax.lax.ppermute(part, axis, [(here, (here + 1) % n) for here in range(n)]) for part in parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: Inputs, axis: str, blocks: Blocks) -> Array:
    return _forward(inputs, axis, blocks)[0]


def _forward(inputs: Inputs, axis: str, blocks: Blocks) -> tuple[Array, tuple[Inputs, Array, Array]]:
    Carry = tuple[Inputs, tuple[Array, Array]]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        seen, found = carry
        k, v, segment = _onwards((seen.k_BKME, seen.v_BKME, seen.k_segment_BM), axis)
        seen = seen._replace(k_BKME=k, v_BKME=v, k_segment_BM=segment)
        return (seen, blockwise.merge(found, blockwise.forward(seen, blocks))), None

    start = inputs, blockwise.forward(inputs, blocks)
    (_, found), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axis) - 1)
    out_BKNE, log_sum_BKN = (checkpoint_name(x, blockwise.KEPT) for x in found)
    return out_BKNE, (inputs, out_BKNE, log_sum_BKN)


def _backward(axis: str, blocks: Blocks, kept: tuple[Inputs, Array, Array], d_out_BKNE: Array) -> tuple[Inputs]:
    inputs, out_BKNE, log_sum_BKN = kept
    mean_BKN = blockwise.mean_gradient(out_BKNE, d_out_BKNE, 0.0)
    Carry = tuple[Inputs, Three]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        seen, (d_q, d_k, d_v) = carry
        more_q, more_k, more_v = blockwise.backward(seen, log_sum_BKN, mean_BKN, d_out_BKNE, blocks)
        k, v, segment, d_k, d_v = _onwards(
            (seen.k_BKME, seen.v_BKME, seen.k_segment_BM, d_k + more_k, d_v + more_v), axis
        )
        return (seen._replace(k_BKME=k, v_BKME=v, k_segment_BM=segment), (d_q + more_q, d_k, d_v)), None

    # After as many steps as there are devices everything is back where it began.
    d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in inputs[:3])
    (_, d_inputs), _ = jax.lax.scan(step, (inputs, (d_q, d_k, d_v)), None, length=jax.lax.axis_size(axis))
    return (blockwise.as_gradient(inputs, d_inputs),)


_attend.defvjp(_forward, _backward)

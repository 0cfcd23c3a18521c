"""Attention kernels of accelerators behind one signature: (B, N, K, E) queries, keys, values, and segments (B, N).

That of TPUs comes with jax (pallas.ops), that of GPUs is flash.py; they are imported when one is used. interpret=True runs them on
any platform, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from sora_jax.nn import blockwise

SPLASH_LANES = 128  # what blocks of a TPU kernel are multiples of
# The most tokens of a block there, twice as many in rows of eight blocks and more. A clip of n tokens computes about (n + block)^2
# pairs, keys are read anew for every block of queries, and a step of the grid takes time even if its block does not run. For the
# rows of dit.py:7b 1024 for 512 is 2 % more FLOPs a step, half of what is read again, and a quarter of the grid's steps, 4.5
# million a chip: at 0.35 us each (an assumption, nothing was timed on a TPU) 1.6 s where 512 takes 6.3. Logits of 1024 x 1024 fit
# into the fast memory of a v4, v5e, v5p and v6e, say their compilers.
SPLASH_BLOCK = 512


def splash(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    dtype: str = "bfloat16",
    interpret: bool = False,
) -> Array:
    """Splash attention on TPU, of which only blocks run that share a segment, so that a row costs the sum of its clips' squares.

    Raises ValueError for numbers of tokens that are no multiples of 128.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas

    N, M, E = q_BNKE.shape[1], k_BMKE.shape[1], q_BNKE.shape[-1]
    if N % SPLASH_LANES or M % SPLASH_LANES:
        raise ValueError(f"splash attention needs multiples of {SPLASH_LANES} tokens, not {N} and {M}")
    bq, bk = splash_blocks(N, M)
    sizes = pallas.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk, block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip

    shared_BIJ = blockwise.meetings(q_segment_BN, k_segment_BM, bq, bk)
    # Queries none of whose blocks runs would be divided by a sum of nothing: forward they get the first block's values.
    alone_BI1 = ~shared_BIJ.any(-1, keepdims=True)
    forward_BIJ = shared_BIJ | (alone_BI1 & (jnp.arange(M // bk) == 0))
    kernel = pallas.SplashAttentionKernel(
        # Forward and for dq a grid goes over keys inside, for dk and dv over queries.
        _visits(forward_BIJ, 2), _visits(shared_BIJ, 2), _visits(shared_BIJ, 1),
        block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=pallas.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None, residual_checkpoint_name=blockwise.KEPT, mask_function=None, interpret=interpret,
    )  # fmt: skip
    # The kernel takes one row: all rows are one after the other in it, and none's blocks visit another's. Under vmap they would be
    # a loop of kernels, whose inputs and outputs are copied once more.
    q, k, v = (rearrange(x.astype(dtype), "b n k e -> k (b n) e") for x in (q_BNKE * E**-0.5, k_BMKE, v_BMKE))
    out: Any = kernel(q, k, v, pallas.SegmentIds(q=q_segment_BN.reshape(-1), kv=k_segment_BM.reshape(-1)))
    return rearrange(out, "k (b n) e -> b n k e", n=N).astype(jnp.float32)


def splash_blocks(queries: int, keys: int) -> tuple[int, int]:
    """Tokens of a block of queries and of keys."""
    return _block(queries), _block(keys)


def _visits(run_BIJ: Array, axis: int) -> Any:
    """The kernel's account of a grid whose steps go along axis: which blocks of a row run, and which block each step has at hand.

    That is the next one which runs, or the last, so a step that does not run copies nothing; its number is that among the blocks
    of all rows. All heads share one account, and a block that runs is masked by its segments alone (2: no other mask).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as pallas

    rows, count = run_BIJ.shape[0], run_BIJ.shape[axis]
    number_BIJ = jax.lax.broadcasted_iota(jnp.int32, run_BIJ.shape, axis)
    next_BIJ = jax.lax.cummin(jnp.where(run_BIJ, number_BIJ, count), axis=axis, reverse=True)
    last = jnp.where(run_BIJ, number_BIJ, 0).max(axis, keepdims=True)
    held_BIJ = jnp.minimum(next_BIJ, last) + count * jnp.arange(rows)[:, None, None]
    # They lie in the scarce memory of scalars.
    small = jnp.int8 if rows * count <= 128 else jnp.int16
    held, run = (
        rearrange(x, "b i j -> 1 (b i) j" if axis == 2 else "b i j -> 1 i (b j)")
        for x in (held_BIJ.astype(small), 2 * run_BIJ.astype(jnp.int8))
    )
    return pallas.MaskInfo(held, None, run, None, None)


def _block(length: int) -> int:
    """The largest multiple of the lanes that divides length and is not too long."""
    most = SPLASH_BLOCK if length < 8 * SPLASH_BLOCK else 2 * SPLASH_BLOCK
    return max(size for size in range(SPLASH_LANES, most + 1, SPLASH_LANES) if length % size == 0)


def triton(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    dtype: str = "bfloat16",
    interpret: bool = False,
) -> Array:
    """Flash attention on GPU, of which only blocks run that share a segment, as of splash."""
    from sora_jax.nn import flash

    of_tokens = q_BNKE * q_BNKE.shape[-1] ** -0.5, k_BMKE, v_BMKE
    q, k, v = (blockwise.in_blocks(x.astype(dtype), flash.BLOCK) for x in of_tokens)
    segments = (blockwise.in_blocks(x, flash.BLOCK) for x in (q_segment_BN, k_segment_BM))
    return flash.flash(q, k, v, *segments, interpret)[:, : q_BNKE.shape[1]].astype(jnp.float32)

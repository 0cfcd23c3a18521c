"""Attention kernels of accelerators behind one signature: (B, N, K, E) queries, keys, values, and segments (B, N).

They come with jax (pallas.ops) and are imported when one is used. interpret=True runs them on any platform, slowly, for tests.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SPLASH_LANES = 128  # what blocks of a TPU kernel are multiples of
SPLASH_BLOCK = 512
TRITON_BLOCK = 64


def splash(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    dtype: str = "bfloat16",
    interpret: bool = False,
) -> Array:
    """Splash attention on TPU. Raises ValueError for numbers of tokens that are no multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    (N, K, E), M = q_BNKE.shape[1:], k_BMKE.shape[1]
    if N % SPLASH_LANES or M % SPLASH_LANES:
        raise ValueError(f"splash attention needs multiples of {SPLASH_LANES} tokens, not {N} and {M}")
    kernel = _splash_kernel(N, M, K, interpret)
    q, k, v = (x.astype(dtype).swapaxes(1, 2) for x in (q_BNKE * E**-0.5, k_BMKE, v_BMKE))
    segments = splash_attention.SegmentIds(q=q_segment_BN, kv=k_segment_BM)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2).astype(jnp.float32)


def _splash_kernel(N: int, M: int, heads: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    q, k = (_divisor(length, SPLASH_BLOCK) for length in (N, M))
    sizes = splash_attention.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((N, M))] * heads)
    return splash_attention.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def _divisor(length: int, most: int) -> int:
    """The largest multiple of the lanes that divides length, at most `most`."""
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
    """Flash attention on GPU, of tokens among themselves. Raises ValueError for numbers of tokens that are no multiples of 64."""
    with warnings.catch_warnings():
        # jax 0.12 points to tokamax instead, which takes no segment ids.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as pallas

    N, M, E = q_BNKE.shape[1], k_BMKE.shape[1], q_BNKE.shape[-1]
    if N != M or N % TRITON_BLOCK:
        raise ValueError(f"the GPU kernel needs as many keys as queries, a multiple of {TRITON_BLOCK}, not {N} and {M}")
    blocks = pallas.BlockSizes(**{name: min(TRITON_BLOCK, N) for name in pallas.BlockSizes.__dataclass_fields__})
    q, k, v = (x.astype(dtype) for x in (q_BNKE, k_BMKE, v_BMKE))
    out = pallas.mha(q, k, v, q_segment_BN, sm_scale=E**-0.5, block_sizes=blocks, interpret=interpret)
    return out.astype(jnp.float32)

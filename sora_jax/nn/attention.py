"""One attention function for all that reads packed tokens: queries and keys attend within their segment.

Which kernel runs is chosen by platform and size, or said by name; whatever runs, the result is that of reference().
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sora_jax import sharding
from sora_jax.nn import kernels, ring
from sora_jax.nn.blockwise import blockwise
from sora_jax.nn.products import product

BACKENDS = ("auto", "reference", "blockwise", "splash", "triton")
KERNELS = {"splash": kernels.splash, "triton": kernels.triton}
GPUS = ("gpu", "cuda", "rocm")
# Far below any logit, yet finite: a fully masked row (padding) gives finite numbers instead of NaN.
MASKED = -1e9
# The most (query, key) pairs of a row that the reference is chosen for: their logits stay in a cache.
SHORT = 512 * 512


def attention(
    q_BNKE: Float[Array, "B N K E"],
    k_BMKE: Float[Array, "B M K E"],
    v_BMKE: Float[Array, "B M K E"],
    q_segment_BN: Int[Array, "B N"],
    k_segment_BM: Int[Array, "B M"],
    dtype: str = "float32",
    backend: str = "auto",
    queries: str = "tokens",
    keys: str = "tokens",
    causal: bool = False,
) -> Float[Array, "B N K E"]:
    """softmax(q k^T / sqrt(E)) v over the keys of the query's own segment.

    Dots take operands in dtype and accumulate in float32; the softmax is float32. Segment 0 is padding: what it returns is
    finite and means nothing, as for a query without keys. queries and keys are the logical axes of their tokens: 'tokens'
    where they are split over devices, 'none' where each device has all, as of texts. causal: a query sees no key that is after
    it in the row, which the reference alone can do. Raises ValueError for an unknown backend, or one that cannot take these
    sizes.
    """
    inputs = q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM
    if causal:
        return reference(*inputs, dtype, causal=True)
    split = sharding.shards("tokens") if keys == "tokens" else 1
    if backend == "auto":
        N, heads = q_BNKE.shape[1] // sharding.shards(queries), q_BNKE.shape[2] // sharding.shards("heads")
        # Keys that every device has are met by its own queries alone, others by those of all.
        backend = chosen(sharding.platform(), N * split, k_BMKE.shape[1], heads, split)
    if backend == "reference":
        return reference(*inputs, dtype)
    function = _on_a_device(backend, dtype, split)
    of_k = ("rows", keys, "heads", "none"), ("rows", keys)
    of_q = ("rows", queries, "heads", "none"), ("rows", queries)
    return sharding.on_each_device(function, (of_q[0], of_k[0], of_k[0], of_q[1], of_k[1]), of_q[0])(*inputs)


def chosen(platform: str, queries: int, keys: int, heads: int, split: int = 1) -> str:
    """The backend for a device's heads, a row having so many queries and keys, its tokens split over `split` devices."""
    if queries * keys <= SHORT:
        return "reference"
    # Kernels see all tokens of some heads where tokens are split, so there must be enough heads.
    fits = heads % split == 0
    if platform == "tpu" and fits and queries % kernels.SPLASH_LANES == 0 == keys % kernels.SPLASH_LANES:
        return "splash"
    return "triton" if platform in GPUS and fits else "blockwise"


def _on_a_device(backend: str, dtype: str, split: int) -> Callable[..., Array]:
    """What a device does with its own part, if keys are split over so many devices."""
    axis = sharding.mesh_axis("tokens")
    if backend == "blockwise":
        if split > 1:
            return functools.partial(ring.ring, axis=axis, dtype=dtype)
        return lambda q, k, v, q_segment, k_segment: blockwise(q, k, v, q_segment, k_segment, dtype)[0]
    if backend not in KERNELS:
        raise ValueError(f"attention {backend!r} is none of {', '.join(BACKENDS)}")
    kernel = functools.partial(KERNELS[backend], dtype=dtype)
    return functools.partial(ring.all_to_all, kernel=kernel, axis=axis) if split > 1 else kernel


def reference(
    q_BNKE: Array,
    k_BMKE: Array,
    v_BMKE: Array,
    q_segment_BN: Array,
    k_segment_BM: Array,
    dtype: str = "float32",
    causal: bool = False,
) -> Array:
    """Attention with all logits of a row at once: the fastest for short rows, and what the others are held against."""
    logits_BKNM = product("bnke,bmke->bknm", q_BNKE * q_BNKE.shape[-1] ** -0.5, k_BMKE, dtype)
    seen_BNM = q_segment_BN[:, :, None] == k_segment_BM[:, None, :]
    if causal:
        seen_BNM &= jnp.tri(seen_BNM.shape[1], seen_BNM.shape[2], dtype=bool)
    weights_BKNM = jax.nn.softmax(jnp.where(seen_BNM[:, None], logits_BKNM, MASKED), axis=-1)
    return product("bknm,bmke->bnke", weights_BKNM, v_BMKE, dtype)

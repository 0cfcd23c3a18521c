"""One attention function for the whole package: queries and keys attend within their segment.

Other kernels belong behind this function; whatever runs, the result is that of the reference here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

# Far below any logit, yet finite: a fully masked row (padding) gives finite numbers instead of NaN.
MASKED = -1e9


def attention(
    q_BNKE: Float[Array, "B N K E"],
    k_BMKE: Float[Array, "B M K E"],
    v_BMKE: Float[Array, "B M K E"],
    q_segment_BN: Int[Array, "B N"],
    k_segment_BM: Int[Array, "B M"],
    dtype: str = "float32",
) -> Float[Array, "B N K E"]:
    """softmax(q k^T / sqrt(E)) v over the keys of the query's own segment.

    Dots take operands in dtype and accumulate in float32; the softmax is float32. Segment 0 is padding: what it returns is
    finite and means nothing.
    """
    compute = jnp.dtype(dtype)
    scale = q_BNKE.shape[-1] ** -0.5
    logits_BKNM = jnp.einsum(
        "bnke,bmke->bknm", (q_BNKE * scale).astype(compute), k_BMKE.astype(compute), preferred_element_type=jnp.float32
    )
    same_B1NM = (q_segment_BN[:, :, None] == k_segment_BM[:, None, :])[:, None]
    weights_BKNM = jax.nn.softmax(jnp.where(same_B1NM, logits_BKNM, MASKED), axis=-1)
    return jnp.einsum(
        "bknm,bmke->bnke", weights_BKNM.astype(compute), v_BMKE.astype(compute), preferred_element_type=jnp.float32
    )

"""Multi-head attention with its projections: within segments, and from segments to their texts."""

from __future__ import annotations

from einops import rearrange
from flax import nnx
from jax import Array

from sora_jax import sharding
from sora_jax.nn import rope
from sora_jax.nn.attention import BACKENDS, attention
from sora_jax.nn.layers import Linear, RMSNorm


def check(
    name: str, width: int, heads: int, wavelengths: tuple[tuple[float, float], ...], dtype: str, backend: str
) -> None:
    """Raises ValueError for a model, the keys of whose config begin with name, whose attention cannot be built."""
    if width % heads:
        raise ValueError(f"{name}.width {width} must be a multiple of {name}.heads {heads}")
    if len(wavelengths) != 3 or min(min(pair) for pair in wavelengths) <= 0:
        raise ValueError(f"{name}.wavelengths {wavelengths} must be a positive pair for each of time, height and width")
    if backend not in BACKENDS:
        raise ValueError(f"{name}.attention {backend!r} is none of {', '.join(BACKENDS)}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{name}.dtype {dtype!r} is neither float32 nor bfloat16")
    rope.frequencies(width // heads, wavelengths)


class SelfAttention(nnx.Module):
    """Self-attention within segments, with QK-norm (arXiv:2302.05442) and, where it is told a turn, rotary positions.

    causal: a token sees those before it alone.
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, dtype: str, backend: str = "auto", causal: bool = False):
        self.qkv = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.heads, self.dtype, self.backend, self.causal = heads, dtype, backend, causal

    def projected(self, x_BND: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values (B, N, K, E), without positions."""
        q, k, v = rearrange(self.qkv(x_BND), "b n (k three e) -> three b n k e", three=3, k=self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def joined(self, attended_BNKE: Array) -> Array:
        """What the heads have found, (B, N, D)."""
        return self.out(rearrange(attended_BNKE, "b n k e -> b n (k e)"))

    def __call__(self, x_BND: Array, turn: tuple[Array, Array] | None, segment_BN: Array) -> Array:
        q, k, v = self.projected(x_BND)
        if turn is not None:
            q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        # Text, of which every device has all, is what goes one way.
        tokens = "none" if self.causal else "tokens"
        q, k, v = (sharding.constrain(a, "rows", tokens, "heads", "none") for a in (q, k, v))
        return self.joined(attention(q, k, v, segment_BN, segment_BN, self.dtype, self.backend, causal=self.causal))


class CrossAttention(nnx.Module):
    """From tokens to the other sequence's tokens of the same segment, of which every device has all. gain as for Linear."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, dtype: str, backend: str = "auto", gain: float = 1.0):
        self.q = Linear(width, width, rngs=rngs, dtype=dtype)
        self.kv = Linear(width, 2 * width, rngs=rngs, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, dtype=dtype, gain=gain)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.heads, self.dtype, self.backend = heads, dtype, backend

    def keys(self, other_BLD: Array) -> tuple[Array, Array]:
        """Keys and values (B, L, K, E) of the other sequence."""
        k, v = rearrange(self.kv(other_BLD), "b l (k two e) -> two b l k e", two=2, k=self.heads)
        return self.k_norm(k), v

    def to(self, keys: tuple[Array, Array], x_BND: Array, segment_BN: Array, other_segment_BL: Array) -> Array:
        """Attention to keys that are there already."""
        q = self.q_norm(rearrange(self.q(x_BND), "b n (k e) -> b n k e", k=self.heads))
        attended = attention(q, *keys, segment_BN, other_segment_BL, self.dtype, self.backend, keys="none")
        return self.out(rearrange(attended, "b n k e -> b n (k e)"))

    def __call__(self, x_BND: Array, other_BLD: Array, segment_BN: Array, other_segment_BL: Array) -> Array:
        return self.to(self.keys(other_BLD), x_BND, segment_BN, other_segment_BL)

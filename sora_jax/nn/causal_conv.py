"""3-D convolution that is causal in time and streams: a chunk with carried state gives what the whole clip gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float


class CausalConv(nnx.Module):
    """'Same' convolution in space, past-only in time.

    The frames of the temporal kernel are concatenated into channels and convolved in two dimensions: exact, and on the CPU
    faster than a 3-D convolution. past holds the last kernel - 1 input frames; zeros stand before the first frame.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], *, rngs: nnx.Rngs, gain: float = 1.0):
        init = (
            nnx.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal") if gain else nnx.initializers.zeros
        )
        frames, height, width = kernel
        self.kernel = nnx.Param(init(rngs.params(), (height, width, frames * inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.frames = frames

    def __call__(self, x: Float[Array, "B t h w i"], past: Array | None) -> tuple[Float[Array, "B t h w o"], Array]:
        """Returns the output and the past for the next chunk."""
        batch, length = x.shape[:2]
        if past is None:
            past = jnp.zeros((batch, self.frames - 1, *x.shape[2:]), x.dtype)
        seen = jnp.concatenate([past, x], axis=1)
        stacked = jnp.concatenate([seen[:, i : i + length] for i in range(self.frames)], axis=-1)
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1):
            # A product of matrices, whose gradients the CPU has twice as fast as those of a convolution.
            return stacked @ kernel[0, 0] + self.bias[...], seen[:, length:]
        y = jax.lax.conv_general_dilated(
            rearrange(stacked, "b t h w i -> (b t) h w i"),
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return rearrange(y, "(b t) h w o -> b t h w o", b=batch) + self.bias[...], seen[:, length:]

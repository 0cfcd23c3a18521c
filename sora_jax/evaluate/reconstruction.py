"""How well a VAE gives back what it was given."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array


def psnr_of_mse(mse: Array) -> Array:
    """Peak signal-to-noise ratio in dB of a mean squared error on values in [-1, 1]."""
    return -10 * jnp.log10(jnp.maximum(mse, 1e-10) / 4)


def psnr(original: Sequence[np.ndarray], decoded: Sequence[np.ndarray]) -> float:
    """Mean over clips of the PSNR in dB of uint8 clips (T, H, W, 3). Raises ValueError for clips of different shapes."""
    values = []
    for before, after in zip(original, decoded, strict=True):
        if before.shape != after.shape:
            raise ValueError(f"cannot compare clips of {before.shape} and {after.shape}")
        mse = float(np.mean(np.square(before.astype(np.float32) - after.astype(np.float32))))
        values.append(-10 * np.log10(max(mse, 1e-3) / 255**2))
    return float(np.mean(values))

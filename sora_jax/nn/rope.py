"""Rotary positions in real units: seconds, and pixels down and across (RoFormer, arXiv:2104.09864, in three dimensions)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def frequencies(head_dim: int, wavelengths: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Angular frequencies (E/2, 3): every rotated pair turns with one axis of (seconds, y, x).

    wavelengths gives the shortest and longest of each axis; pairs are spread geometrically between them. Time gets a
    quarter of the pairs, y and x share the rest. Raises ValueError if a head has too few dimensions.
    """
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 6:
        raise ValueError(
            f"head dim {head_dim}: 3-D rotary positions need an even number of at least 12; use fewer heads"
        )
    time_pairs = pairs // 4
    y_pairs = (pairs - time_pairs) // 2
    counts = (time_pairs, y_pairs, pairs - time_pairs - y_pairs)
    table = np.zeros((pairs, 3), np.float32)
    row = 0
    for axis, (count, (short, long)) in enumerate(zip(counts, wavelengths, strict=True)):
        table[row : row + count, axis] = 2 * np.pi / np.geomspace(short, long, count)
        row += count
    return table


def angles(position_BN3: Float[Array, "B N 3"], frequency_F3: np.ndarray) -> tuple[Array, Array]:
    """(cos, sin), each (B, N, 1, F): computed once a step and used by every block."""
    angle_BNF = jnp.einsum("bna,fa->bnf", position_BN3, frequency_F3)
    return jnp.cos(angle_BNF)[:, :, None], jnp.sin(angle_BNF)[:, :, None]


def rotate(x_BNKE: Float[Array, "B N K E"], turn: tuple[Array, Array]) -> Float[Array, "B N K E"]:
    cos, sin = turn
    first, second = jnp.split(x_BNKE, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""Which steps count. A step that is not finite, or whose gradient is a spike, leaves the parameters as they were.

A spike is a gradient whose norm is more than `factor` times the median of the norms of the last WINDOW steps that counted; for
the first half of the first window none is. The window is part of the state: a resumed run judges as the uninterrupted one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

WINDOW = 128


class Guard(NamedTuple):
    """norms_W are the gradient norms of the last steps that counted, newest first, NaN before there were so many."""

    norms_W: Array  # float32
    skipped: Array  # int32, how many steps in a row, up to the last, did not count


def fresh() -> Guard:
    return Guard(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0))


def judged(guard: Guard, finite: Array, norm: Array, factor: float) -> tuple[Guard, Array, Array]:
    """(guard after a step, whether the step counts, whether it is a spike); factor 0 holds nothing for a spike."""

    def held(spike: Array | bool) -> tuple[Array, Array]:
        return finite & ~jnp.bool_(spike), jnp.bool_(spike)

    # A branch, as every parameter's update asks whether the step counts: without one XLA writes the median, and all that it is
    # of, into each of them anew.
    enough = jnp.isfinite(guard.norms_W).sum() >= WINDOW // 2
    counts, spike = jax.lax.cond(
        finite & enough if factor else jnp.bool_(False),
        lambda: held(norm > factor * jnp.nanmedian(guard.norms_W)),
        lambda: held(False),
    )
    norms_W = jnp.where(counts, jnp.concatenate([norm[None].astype(jnp.float32), guard.norms_W[:-1]]), guard.norms_W)
    return Guard(norms_W, jnp.where(counts, 0, guard.skipped + 1)), counts, spike

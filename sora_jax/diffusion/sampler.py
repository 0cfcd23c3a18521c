"""Samplers for the flow's ODE: schedules, Euler and Heun steps, classifier-free guidance. Pure functions, one scan.

A sampler integrates d noisy / d time = velocity from time 1 to time 0 and carries the latents alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from sora_jax.diffusion import flow

# velocity(noisy_BNP, time) with one time for all tokens that are not known.
Velocity = Callable[[Array, Array], Array]


MOST_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """steps of method 'euler' or 'heun' (two evaluations a step), guidance 1 = none, shift as in flow.shifted."""

    steps: int = 20
    method: str = "heun"
    guidance: float = 4.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"sampler.steps is {self.steps}; it must be at least 1 and at most {MOST_STEPS}")
        if self.method not in STEPPERS:
            raise ValueError(f"sampler.method {self.method!r} is none of {', '.join(STEPPERS)}")
        if self.guidance < 0 or self.shift <= 0:
            raise ValueError(
                f"sampler: guidance {self.guidance} must not be negative and shift {self.shift} must be positive"
            )

    @property
    def evaluations(self) -> int:
        """How often velocities of all tokens are asked for, without a prompt too where there is guidance."""
        return self.steps * {"euler": 1, "heun": 2}[self.method] * (1 if self.guidance == 1 else 2)


def schedule(config: SamplerConfig) -> np.ndarray:
    """Times (steps + 1,) from 1 to 0."""
    return np.asarray(flow.shifted(np.linspace(1.0, 0.0, config.steps + 1, dtype=np.float32), config.shift), np.float32)


def euler(velocity: Velocity, noisy: Array, time: Array, following: Array) -> Array:
    return noisy + (following - time) * velocity(noisy, time)


def heun(velocity: Velocity, noisy: Array, time: Array, following: Array) -> Array:
    """Second order: the mean of the slopes at both ends (Karras et al., arXiv:2206.00364, algorithm 1)."""
    slope = velocity(noisy, time)
    ahead = velocity(noisy + (following - time) * slope, following)
    return noisy + (following - time) * 0.5 * (slope + ahead)


STEPPERS: dict[str, Callable[[Velocity, Array, Array, Array], Array]] = {"euler": euler, "heun": heun}


def guided(conditional: Array, unconditional: Array, guidance: Any) -> Array:
    """Classifier-free guidance (arXiv:2207.12598): 1 is the conditional prediction, more goes beyond it."""
    return unconditional + guidance * (conditional - unconditional)


def sample(
    velocity: Velocity,
    noise_BNP: Float[Array, "B N P"],
    config: SamplerConfig,
    known_BN: Bool[Array, "B N"] | None = None,
    clean_BNP: Float[Array, "B N P"] | None = None,
) -> Float[Array, "B N P"]:
    """Integrate from noise to data. Tokens of known_BN hold the values of clean_BNP at every step."""

    def hold(x_BNP: Array) -> Array:
        return x_BNP if known_BN is None or clean_BNP is None else jnp.where(known_BN[..., None], clean_BNP, x_BNP)

    def step(noisy_BNP: Array, span: tuple[Array, Array]) -> tuple[Array, None]:
        return hold(STEPPERS[config.method](lambda x, t: velocity(hold(x), t), noisy_BNP, *span)), None

    times = jnp.asarray(schedule(config))
    clean, _ = jax.lax.scan(step, hold(noise_BNP), (times[:-1], times[1:]))
    return clean

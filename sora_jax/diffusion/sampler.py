"""Samplers for the flow's ODE: schedules, Euler and Heun steps, classifier-free guidance. Pure functions, one scan.

A sampler integrates d noisy / d time = velocity from each slot's ceiling to time 0 and carries the latents alone. A slot that
is known has the ceiling 0: its tokens start clean, take steps of length 0, and so come back as they were given. A ceiling
between 0 and 1 starts from a clip with some noise on it (SDEdit, arXiv:2108.01073).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sora_jax.diffusion import flow

# velocity(noisy_BNP, time_BS)
Velocity = Callable[[Array, Array], Array]


MOST_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """steps of method 'euler' or 'heun' (two evaluations a step), shift as in flow.shifted, for a clip of base_tokens tokens.

    Larger clips are shifted more (flow.resolution_shift); with base_tokens 0 all are shifted alike. guidance is how much to
    insist on the prompt, 1 = none, at times in guidance_interval (arXiv:2404.07724), and guidance_going_on the most of it for a
    clip of which more than the first frame is given; guidance_rescale in [0, 1] takes back what it adds to the deviation
    (arXiv:2305.08891, equation 16). known_guidance is how much to insist on what is given, 1 = none. restart is the share of
    the steps that clips of which something is given take once more, from what was made with as much new noise as there was
    before them (arXiv:2306.14878).
    """

    steps: int = 20
    method: str = "heun"
    guidance: float = 4.0
    shift: float = 1.0
    base_tokens: int = 0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    known_guidance: float = 1.0
    guidance_going_on: float = 2.0
    restart: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"sampler.steps is {self.steps}; it must be at least 1 and at most {MOST_STEPS}")
        if self.method not in STEPPERS:
            raise ValueError(f"sampler.method {self.method!r} is none of {', '.join(STEPPERS)}")
        for name in ("guidance", "guidance_going_on", "known_guidance", "base_tokens"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"sampler.{name} is {value}; it must be a number from 0 up")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"sampler.shift is {self.shift}; it must be a number above 0")
        if not 0 <= self.restart < 1:
            raise ValueError(f"sampler.restart is {self.restart}; it is a share of the steps in [0, 1)")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1 or not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"sampler: guidance_interval {self.guidance_interval} must rise within [0, 1] and "
                f"guidance_rescale {self.guidance_rescale} be in [0, 1]"
            )

    @property
    def branches(self) -> int:
        """How often a step's evaluation asks for the velocities of all tokens: with the prompt, without, and without known ones."""
        if self.known_guidance != 1:
            return 3
        return 1 if self.guidance == 1 else 2

    @property
    def steps_again(self) -> int:
        """How many of the last steps are taken once more."""
        return math.ceil(self.steps * self.restart)

    @property
    def evaluations(self) -> int:
        """How often velocities of all tokens are asked for."""
        return (self.steps + self.steps_again) * {"euler": 1, "heun": 2}[self.method] * self.branches


def schedule(
    config: SamplerConfig, ceiling_BS: Float[Array, "B S"], tokens_BS: Float[Array, "B S"]
) -> Float[Array, "K B S"]:
    """Times of every slot, steps + 1 from its ceiling to 0. tokens_BS is the number of tokens of the slot's clip."""
    base = jnp.linspace(1.0, 0.0, config.steps + 1, dtype=jnp.float32)[:, None, None]
    larger = flow.resolution_shift(jnp.maximum(tokens_BS, 1), config.base_tokens) if config.base_tokens else 1.0
    return ceiling_BS * flow.shifted(base, config.shift * larger)


def euler(velocity: Velocity, noisy: Array, time: Array, following: Array, slot_BN: Array) -> Array:
    return noisy + flow.spread(following - time, slot_BN)[..., None] * velocity(noisy, time)


def heun(velocity: Velocity, noisy: Array, time: Array, following: Array, slot_BN: Array) -> Array:
    """Second order: the mean of the slopes at both ends (Karras et al., arXiv:2206.00364, algorithm 1)."""
    length = flow.spread(following - time, slot_BN)[..., None]
    slope = velocity(noisy, time)
    ahead = velocity(noisy + length * slope, following)
    return noisy + length * 0.5 * (slope + ahead)


STEPPERS: dict[str, Callable[[Velocity, Array, Array, Array, Array], Array]] = {"euler": euler, "heun": heun}


def guided(conditional: Array, unconditional: Array, guidance: Any) -> Array:
    """Classifier-free guidance (arXiv:2207.12598): 1 is the conditional prediction, more goes beyond it."""
    return unconditional + guidance * (conditional - unconditional)


def rescaled(
    guided_BNP: Float[Array, "B N P"],
    conditional_BNP: Float[Array, "B N P"],
    share_BNS: Float[Array, "B N S"],
    amount: float,
) -> Float[Array, "B N P"]:
    """The guided prediction, moved by `amount` towards the deviation that the conditional one has (arXiv:2305.08891, eq. 15, 16).

    Deviations are taken over the tokens of a slot, which share_BNS has as one-hot rows: neighbours in a row change nothing.
    """

    def deviation_BN(x_BNP: Array) -> Array:
        count_BS = jnp.maximum(share_BNS.sum(1), 1)
        mean_BS = jnp.einsum("bns,bnp->bs", share_BNS, x_BNP) / count_BS / x_BNP.shape[-1]
        off_BNP = x_BNP - jnp.einsum("bns,bs->bn", share_BNS, mean_BS)[..., None]
        variance_BS = jnp.einsum("bns,bnp->bs", share_BNS, jnp.square(off_BNP)) / count_BS / x_BNP.shape[-1]
        return jnp.einsum("bns,bs->bn", share_BNS, jnp.sqrt(variance_BS))

    factor_BN = deviation_BN(conditional_BNP) / jnp.maximum(deviation_BN(guided_BNP), 1e-6)
    return guided_BNP * (amount * factor_BN + 1 - amount)[..., None]


def sample(
    velocity: Velocity,
    start_BNP: Float[Array, "B N P"],
    slot_BN: Int[Array, "B N"],
    times_KBS: Float[Array, "K B S"],
    method: str,
) -> Float[Array, "B N P"]:
    """Integrate from the first of the times to the last. start_BNP is the point of the path at each token's first time."""

    def step(noisy_BNP: Array, span: tuple[Array, Array]) -> tuple[Array, None]:
        return STEPPERS[method](velocity, noisy_BNP, *span, slot_BN), None

    clean_BNP, _ = jax.lax.scan(step, start_BNP, (times_KBS[:-1], times_KBS[1:]))
    return clean_BNP

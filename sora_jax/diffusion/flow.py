"""Rectified flow: a straight path between data and noise, its times, and conversions between what a network may predict.

time is in [0, 1]: 0 is data, 1 is noise. noisy = (1 - time) clean + time noise; velocity = noise - clean, the path's slope
(arXiv:2209.03003, arXiv:2210.02747). Pure functions of arrays; randomness is an argument.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """Density of training times: the logistic of a normal (arXiv:2403.03206, section 3.1), then shifted.

    shift > 1 moves weight towards noise, as larger clips need; see resolution_shift. known_noise is the most noise that is
    added to what of a clip is known, in standard deviations of a latent; how much is uniform, by clip, and not told to the
    model. What it makes is given to it again when videos grow window by window: it learns not to pass on small errors
    (as arXiv:2408.14837, section 3.2.1, with levels that are told). posterior is how much of the deviation of the VAE's
    posterior lies on clips: 1 trains on samples of it (as arXiv:2112.10752), which videos then show as noise that differs from
    group to group, 0 on its means. emphasis is the power of a channel's deviation, before latents were whitened, by which its
    squared error counts: 0 counts all alike, 2 nearly as pixels would, in which the largest axis is nearly all.
    """

    mean: float = 0.4
    std: float = 1.0
    shift: float = 1.0
    known_noise: float = 0.0
    posterior: float = 1.0
    emphasis: float = 0.0

    def __post_init__(self) -> None:
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"flow: std {self.std} and shift {self.shift} must be positive")
        if self.known_noise < 0:
            raise ValueError(f"flow.known_noise is {self.known_noise}; it must not be negative")
        if self.emphasis < 0:
            raise ValueError(f"flow.emphasis is {self.emphasis}; it must not be negative")
        if not 0 <= self.posterior <= 1:
            raise ValueError(f"flow.posterior is {self.posterior}; it is a share in [0, 1]")


def times(normal: Float[Array, ...], config: TimeConfig) -> Float[Array, ...]:
    """Training times from standard normal draws."""
    return shifted(jax.nn.sigmoid(config.mean + config.std * normal), config.shift)


def shifted(time: Any, shift: Any) -> Any:
    """Move times towards noise: equation 23 of arXiv:2403.03206. 0 and 1 stay where they are."""
    return shift * time / (1 + (shift - 1) * time)


def resolution_shift(tokens: Any, base_tokens: float) -> Any:
    """Shift for a clip of so many tokens that gives the signal-to-noise ratio that base_tokens have at shift 1."""
    return (tokens / base_tokens) ** 0.5


def corrupt(
    clean: Float[Array, "B N P"], noise: Float[Array, "B N P"], time: Float[Array, "B N"]
) -> Float[Array, "B N P"]:
    """The point of the straight path at each token's time."""
    time = time[..., None]
    return (1 - time) * clean + time * noise


def spread(x_BS: Any, slot_BN: Any) -> Any:
    """A slot's value for each of its tokens (B, N)."""
    return jnp.take_along_axis(x_BS, slot_BN, axis=1)


def velocity(clean: Array, noise: Array) -> Array:
    return noise - clean


def clean_from_velocity(noisy: Array, predicted: Array, time: Float[Array, "B N"]) -> Array:
    return noisy - time[..., None] * predicted


def noise_from_velocity(noisy: Array, predicted: Array, time: Float[Array, "B N"]) -> Array:
    return noisy + (1 - time[..., None]) * predicted


def velocity_from_clean(noisy: Array, clean: Array, time: Float[Array, "B N"]) -> Array:
    """Undefined at time 0, where noisy is clean: callers keep time > 0."""
    return (noisy - clean) / time[..., None]


def velocity_from_noise(noisy: Array, noise: Array, time: Float[Array, "B N"]) -> Array:
    """Undefined at time 1, where noisy is noise: callers keep time < 1."""
    return (noise - noisy) / (1 - time[..., None])


def velocity_of_gaussian(noisy: Array, mean: Any, std: Any, time: Float[Array, "B N"]) -> Array:
    """The best prediction of the velocity for who knows of the clean value only that it is normal: its mean given noisy."""
    time = time[..., None]
    variance = jnp.square((1 - time) * std) + jnp.square(time)
    slope = (time - (1 - time) * jnp.square(std)) / jnp.maximum(variance, 1e-12)
    return slope * (noisy - (1 - time) * mean) - mean


def loss(
    predicted: Float[Array, "B N P"], target: Float[Array, "B N P"], weight: Float[Array, "B N"]
) -> tuple[Float[Array, ""], Float[Array, "B N"]]:
    """(weighted mean of the squared error over tokens, squared error per token), in float32.

    weight is 0 for padding and for known tokens. A batch without weight gives 0, not NaN.
    """
    error_BN = jnp.mean(jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)
    return jnp.sum(error_BN * weight) / jnp.maximum(jnp.sum(weight), 1.0), error_BN


def token_noise(key: Array, clip_BN: Array, draw_BN: Array, index_BN: Array, patch_dim: int) -> Float[Array, "B N P"]:
    """Standard normal noise of each token, keyed by (key, clip, draw, index in the clip's grid).

    Neither the packing nor the mesh nor the number of hosts changes the noise of a clip.
    """

    def one(clip: Array, draw: Array, index: Array) -> Array:
        place = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, clip), draw), index)
        return jax.random.normal(place, (patch_dim,))

    return jax.vmap(jax.vmap(one))(clip_BN, draw_BN, index_BN)


def slot_normal(key: Array, clip_BS: Array, draw_BS: Array) -> Float[Array, "B S"]:
    """One standard normal per slot, keyed like token_noise."""

    def one(clip: Array, draw: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, clip), draw))

    return jax.vmap(jax.vmap(one))(clip_BS, draw_BS)

"""Causal video VAE: clips to latents and back, in whole or chunk by chunk with carried state.

Every level folds a block of (frames, height, width) into channels and refines with residual causal convolutions, in space
and then in time. The first frame is repeated to fill its temporal block, so it stands alone: an image is a video of one
frame, and latent k sees no frame after its own. Sources: the VAE of arXiv:1312.6114, causal video tokenisers as in MAGVIT-v2
(arXiv:2310.05737).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from sora_jax.nn.causal_conv import CausalConv
from sora_jax.nn.layers import Linear, RMSNorm

# What a config may ask for: a checkpoint's is built before its arrays are held against it.
MOST_WIDTH, MOST_BLOCKS = 2**17, 2**8


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """folds, widths and blocks have one entry a level, from pixels to latents.

    kernel is (frames, height, width), which a block applies as (1, height, width) and then (frames, 1, 1); the encoder's has
    encoder_frames in place of its frames. With 1 a latent tells of its own frames alone, whatever came before them: a part of
    a video then has the latents that it has within the whole, which is what prompting with parts asks for.
    """

    folds: tuple[tuple[int, int, int], ...] = ((4, 8, 8),)
    widths: tuple[int, ...] = (192,)
    blocks: tuple[int, ...] = (2,)
    kernel: tuple[int, int, int] = (2, 3, 3)
    encoder_frames: int = 2
    channels: int = 32
    remat: bool = False

    def __post_init__(self) -> None:
        if not len(self.folds) == len(self.widths) == len(self.blocks) > 0:
            raise ValueError(
                f"vae: folds, widths and blocks need one entry per level, but have {len(self.folds)}, {len(self.widths)} and "
                f"{len(self.blocks)}"
            )
        if min(self._sizes) < 1:
            raise ValueError("vae: folds, widths, kernel, encoder_frames and channels must be positive")
        if min(self.blocks) < 0 or sum(self.blocks) > MOST_BLOCKS or len(self.blocks) > MOST_BLOCKS:
            raise ValueError(
                f"vae: blocks {str(self.blocks)[:100]} must not be negative, nor more than {MOST_BLOCKS} in all"
            )
        if max(self._sizes) > MOST_WIDTH:
            raise ValueError(
                f"vae: folds, widths, kernel, encoder_frames or channels is beyond any machine; at most {MOST_WIDTH}"
            )
        if self.kernel[1] % 2 == 0 or self.kernel[2] % 2 == 0:
            raise ValueError(f"vae.kernel {self.kernel}: height and width must be odd")

    @property
    def _sizes(self) -> tuple[int, ...]:
        folds = (n for fold in self.folds for n in fold)
        return (*folds, *self.widths, *self.kernel, self.encoder_frames, self.channels)

    @property
    def encoder_kernel(self) -> tuple[int, int, int]:
        return (self.encoder_frames, *self.kernel[1:])

    @property
    def stride(self) -> tuple[int, int, int]:
        """(frames, height, width) of pixels that one latent stands for."""
        return tuple(math.prod(fold[axis] for fold in self.folds) for axis in range(3))  # type: ignore[return-value]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a clip. Raises ValueError for sizes that the stride does not divide."""
        st, sh, sw = self.stride
        if frames < 1 or (frames - 1) % st:
            raise ValueError(
                f"{frames} frames: the VAE takes 1 + {st}k frames; use {max(0, frames - 1) // st * st + 1}"
            )
        if height % sh or width % sw or min(height, width) < 1:
            raise ValueError(f"size {height}x{width}: height must be a multiple of {sh} and width of {sw}")
        return 1 + (frames - 1) // st, height // sh, width // sw, self.channels


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents."""

    mean: Float[Array, "B t h w c"]
    logvar: Float[Array, "B t h w c"]

    @property
    def std(self) -> Array:
        return jnp.exp(0.5 * self.logvar)

    def kl(self) -> Array:
        """Nats per latent value against N(0, 1), elementwise."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar)


class LatentStatistic(nnx.Variable):
    """Statistics of the latents, measured after training and kept with the weights."""


# Variance, as a part of the mean variance of all axes, below which an axis of the latents is no longer raised to unit
# variance: such an axis is mostly the posterior's own noise.
VARIANCE_FLOOR = 0.01


def latent_statistics(
    mean_NC: Float[np.ndarray, "N C"], variance_NC: Float[np.ndarray, "N C"]
) -> dict[str, np.ndarray]:
    """latent_mean (C), latent_axes (C, C) and latent_std (C) of posteriors given by mean and variance.

    The axes are the principal axes of the aggregate posterior, one per column. What an autoencoder finds large is not what
    a viewer does: on plain scenes the background takes half of the variance, shape and motion a hundredth of it, and noise
    of one strength on all channels drowns them. So every axis is scaled to the same variance, down to VARIANCE_FLOOR;
    the mean variance over axes is 1.
    """
    centre_C = mean_NC.mean(0, dtype=np.float64)
    covariance_CC = np.cov(mean_NC.T.astype(np.float64), bias=True) + np.diag(variance_NC.mean(0, dtype=np.float64))
    variance_C, axes_CC = np.linalg.eigh(covariance_CC)
    std_C = np.sqrt(variance_C + VARIANCE_FLOOR * variance_C.mean())
    std_C *= np.sqrt(np.mean(variance_C / std_C**2))
    return {
        "latent_mean": centre_C.astype(np.float32),
        "latent_axes": axes_CC.astype(np.float32),
        "latent_std": std_C.astype(np.float32),
    }


# The carried state of a stream: one past per convolution, in the order of their calls.
Pasts = list[Array]


def fold_down(x: Float[Array, "B T H W i"], fold: tuple[int, int, int]) -> Array:
    ft, fh, fw = fold
    return rearrange(x, "b (t ft) (h fh) (w fw) i -> b t h w (ft fh fw i)", ft=ft, fh=fh, fw=fw)


def unfold_up(x: Float[Array, "B t h w i"], fold: tuple[int, int, int]) -> Array:
    ft, fh, fw = fold
    return rearrange(x, "b t h w (ft fh fw i) -> b (t ft) (h fh) (w fw) i", ft=ft, fh=fh, fw=fw)


class ResidualBlock(nnx.Module):
    """norm, SiLU, convolution, twice: first in space, then in time, a full kernel in two factors (arXiv:1711.11248).

    Norms act on channels of one position: statistics over time would break causality.
    """

    def __init__(self, width: int, kernel: tuple[int, int, int], rngs: nnx.Rngs):
        frames, height, across = kernel
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.conv1 = CausalConv(width, width, (1, height, across), rngs=rngs)
        self.conv2 = CausalConv(width, width, (frames, 1, 1), rngs=rngs, gain=0.0)

    def __call__(self, x: Array, pasts: tuple[Array | None, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        h, past1 = self.conv1(jax.nn.silu(self.norm1(x)), pasts[0])
        h, past2 = self.conv2(jax.nn.silu(self.norm2(h)), pasts[1])
        return x + h, (past1, past2)


def run_blocks(blocks: Sequence[ResidualBlock], x: Array, past: Pasts | None, remat: bool) -> tuple[Array, Pasts]:
    """The blocks of one level; past holds two entries per block, or None at the start of a clip."""
    following: Pasts = []
    for number, block in enumerate(blocks):
        before = (None, None) if past is None else (past[2 * number], past[2 * number + 1])
        if remat:
            graphdef, state = nnx.split(block)
            x, after = jax.checkpoint(lambda s, x, p, g=graphdef: nnx.merge(g, s)(x, p))(state, x, before)
        else:
            x, after = block(x, before)
        following.extend(after)
    return x, following


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        inputs = (3, *config.widths[:-1])
        self.ins = nnx.List(
            [
                Linear(math.prod(fold) * below, width, rngs=rngs)
                for fold, below, width in zip(config.folds, inputs, config.widths, strict=True)
            ]
        )
        self.levels = nnx.List(
            [
                nnx.List([ResidualBlock(width, config.encoder_kernel, rngs) for _ in range(count)])
                for width, count in zip(config.widths, config.blocks, strict=True)
            ]
        )
        self.norm = RMSNorm(config.widths[-1])
        self.out = Linear(config.widths[-1], 2 * config.channels, rngs=rngs)
        self.config = config

    def __call__(self, frames: Array, pasts: list[Pasts] | None) -> tuple[Posterior, list[Pasts]]:
        x, following = frames, []
        for level, fold in enumerate(self.config.folds):
            x = self.ins[level](fold_down(x, fold))
            x, after = run_blocks(self.levels[level], x, pasts[level] if pasts else None, self.config.remat)
            following.append(after)
        mean, logvar = jnp.split(self.out(self.norm(x)), 2, axis=-1)
        # Bounds keep the posterior's width finite at the start of training.
        return Posterior(mean, jnp.clip(logvar, -14.0, 6.0)), following


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        outputs = (3, *config.widths[:-1])
        self.into = Linear(config.channels, config.widths[-1], rngs=rngs)
        self.levels = nnx.List(
            [
                nnx.List([ResidualBlock(width, config.kernel, rngs) for _ in range(count)])
                for width, count in zip(config.widths, config.blocks, strict=True)
            ]
        )
        self.norms = nnx.List([RMSNorm(width) for width in config.widths])
        self.outs = nnx.List(
            [
                Linear(width, math.prod(fold) * below, rngs=rngs)
                for fold, below, width in zip(config.folds, outputs, config.widths, strict=True)
            ]
        )
        self.config = config

    def __call__(self, latent: Array, pasts: list[Pasts] | None) -> tuple[Array, list[Pasts]]:
        x, following = self.into(latent), []
        for turn, level in enumerate(reversed(range(len(self.config.folds)))):
            x, after = run_blocks(self.levels[level], x, pasts[turn] if pasts else None, self.config.remat)
            x = unfold_up(self.outs[level](self.norms[level](x)), self.config.folds[level])
            following.append(after)
        return x, following


class VAE(nnx.Module):
    """Frames in [-1, 1], float32, (B, T, H, W, 3) with T = 1 + 4k (for a temporal stride of 4)."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.latent_mean = LatentStatistic(jnp.zeros(config.channels))
        self.latent_axes = LatentStatistic(jnp.eye(config.channels))
        self.latent_std = LatentStatistic(jnp.ones(config.channels))

    def encode_chunk(
        self, frames: Float[Array, "B T H W 3"], pasts: list[Pasts] | None
    ) -> tuple[Posterior, list[Pasts]]:
        """Posterior of the next frames of a clip and the state to carry on.

        pasts is None for the first chunk, which has 1 + 4k frames; every later chunk has 4k. Raises ValueError for other sizes.
        """
        st = self.config.stride[0]
        _, length, height, width, _ = frames.shape
        if pasts is None:
            self.config.latent_shape(length, height, width)
            frames = jnp.concatenate([jnp.repeat(frames[:, :1], st - 1, axis=1), frames], axis=1)
        else:
            self.config.latent_shape(length + 1, height, width)
        return self.encoder(frames, pasts)

    def decode_chunk(self, latent: Float[Array, "B t h w c"], pasts: list[Pasts] | None) -> tuple[Array, list[Pasts]]:
        """Frames of the next latents of a clip and the state to carry on; pasts is None for the first chunk."""
        frames, following = self.decoder(latent, pasts)
        return (frames[:, self.config.stride[0] - 1 :] if pasts is None else frames), following

    def encode(self, frames: Float[Array, "B T H W 3"]) -> Posterior:
        """Posterior of whole clips, in the VAE's own latent units (see normalise)."""
        return self.encode_chunk(frames, None)[0]

    def decode(self, latent: Float[Array, "B t h w c"]) -> Float[Array, "B T H W 3"]:
        """Frames of whole clips from latents in the VAE's own units (see denormalise)."""
        return self.decode_chunk(latent, None)[0]

    def normalise(self, posterior: Posterior) -> tuple[Array, Array]:
        """(mean, std) per latent value along the latents' principal axes, scaled as latent_statistics says.

        Along these axes the posterior's values are correlated; std keeps the deviation of each.
        """
        axes_CC, std_C = self.latent_axes[...], self.latent_std[...]
        mean = jnp.dot(posterior.mean - self.latent_mean[...], axes_CC, precision="highest") / std_C
        variance = jnp.dot(jnp.square(posterior.std), jnp.square(axes_CC), precision="highest")
        return mean, jnp.sqrt(variance) / std_C

    def denormalise(self, latent: Float[Array, "B t h w c"]) -> Float[Array, "B t h w c"]:
        return (
            jnp.dot(latent * self.latent_std[...], self.latent_axes[...].T, precision="highest") + self.latent_mean[...]
        )


def split(vae: VAE) -> tuple[Any, Any, Any]:
    """(graphdef, params, rest): the functional form that steps and checkpoints use."""
    parts: Any = nnx.split(vae, nnx.Param, ...)
    return parts

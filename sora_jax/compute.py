"""Training FLOPs of a config, analytic: XLA's own count sees the body of a scan once. One multiply-add is 2 FLOPs.

Matrix products, convolutions and attention are counted; elementwise work is not. Backward costs twice the forward.
"""

from __future__ import annotations

import math

from sora_jax.data.pack import PackConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.vae import VAEConfig


def dit_forward(config: DiTConfig, rows: int, row_tokens: int, row_slots: int, row_text: int) -> float:
    """FLOPs of one forward pass as executed, padding and masked attention included."""
    D, blocks = config.width, config.blocks
    N, S, L, P, M = row_tokens, row_slots, row_text, config.patch_dim, config.text_width
    token = 2 * N * D * (3 * D + D) + 2 * N * D * (2 * D) + 2 * 2 * N * D * config.mlp_ratio * D
    attend = 2 * 2 * N * N * D + 2 * 2 * N * L * D
    text = 2 * L * D * 2 * D
    slots = 2 * S * D * 6 * D + 2 * N * S * 6 * D
    ends = 2 * N * D * (P + 48) + 2 * N * D * P + 2 * S * D * (2 * D) + 2 * N * S * 2 * D
    heads = 2 * L * M * D + 2 * S * (64 * D + D * D + 48 * D + M * D + L * M)
    encoder = 0.0 if config.text is None else text_encoder_forward(config.text, 1, row_text)
    return rows * (blocks * (token + attend + text + slots) + ends + heads + encoder)


def text_encoder_forward(config: TextEncoderConfig, rows: int, row_tokens: int) -> float:
    D = config.width
    layer = 2 * row_tokens * D * (4 * D + 2 * config.mlp_width) + 2 * 2 * row_tokens**2 * D
    return float(rows * config.layers * layer)


def vae_forward(config: VAEConfig, clips: int, frames: int, height: int, width: int) -> tuple[float, float]:
    """(encoder, decoder) FLOPs of one forward pass over clips of one size."""
    t, h, w, _ = config.latent_shape(frames, height, width)
    frames = t * config.stride[0]
    encoder, decoder = 0.0, 0.0
    kt, kh, kw = config.kernel
    cells, below = frames * height * width, 3
    for fold, size, blocks in zip(config.folds, config.widths, config.blocks, strict=True):
        cells //= math.prod(fold)
        convolutions = cells * blocks * 2 * (kh * kw + kt) * size * size
        ends = cells * 2 * math.prod(fold) * below * size
        encoder, decoder, below = encoder + convolutions + ends, decoder + convolutions + ends, size
    latents = t * h * w
    encoder += latents * 2 * config.widths[-1] * 2 * config.channels
    decoder += latents * 2 * config.widths[-1] * config.channels
    return clips * encoder, clips * decoder


def vae_step(config: VAEConfig, batch: int, crop: tuple[int, int, int]) -> float:
    """FLOPs of one training step: forward and backward."""
    return 3 * sum(vae_forward(config, batch, *crop))


def dit_step(config: DiTConfig, packing: PackConfig) -> float:
    """FLOPs of one training step: forward and backward; recomputed activations are not counted."""
    return 3 * dit_forward(config, packing.rows, packing.row_tokens, packing.row_slots, packing.row_text)

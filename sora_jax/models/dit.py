"""Diffusion transformer over packed rows of spacetime patches (DiT, arXiv:2212.09748; NaViT, arXiv:2307.06304).

A token knows its noise level through its slot: modulation is computed once per slot and then handed to the slot's tokens,
so known frames at time 0 and frames being denoised share one sequence. Self-attention stays within a clip, cross-attention
goes from a clip's tokens to its own caption.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from sora_jax import sharding, structs
from sora_jax.models import text_encoder
from sora_jax.nn import blockwise, multihead, rope
from sora_jax.nn.layers import MLP, Linear, layer_norm, whole
from sora_jax.nn.multihead import CrossAttention, SelfAttention

# Below it the velocity of a predicted clean patch is held, as it would grow without bound.
LEAST_TIME = 0.05
# What a config may ask for: a checkpoint's is built before its arrays are held against it.
MOST_WIDTH, MOST_BLOCKS = 2**17, 2**12
_ATTENTION = jax.checkpoint_policies.save_only_these_names(blockwise.KEPT)
REMAT = {
    "none": None,
    # Products of weights, and what attention in blocks or a kernel gave: what is needed of it is no larger, and takes long to make
    # again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    # Of long rows it is the most work for what it takes. The reference of short ones gives nothing to keep, as with "full".
    "attention": _ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products of weights, in the host's memory until they are wanted.
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
# Of those that compute again, the ones by which attention in blocks, or a kernel's, does not run forward a second time.
KEEPS_ATTENTION = ("dots", "attention")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer. patch is (frames, height, width) in latent cells; wavelengths are in seconds and pixels.

    predict is what the last layer gives: the 'velocity', or the 'clean' patches, from which the velocity follows. A velocity
    holds all of a patch's noise, and of large patches it is hardly learned; what is clean lies in fewer directions
    (arXiv:2511.13720, and experiments/README.md). attention is its backend (nn/attention.BACKENDS), to captions too.
    """

    width: int
    blocks: int
    heads: int
    patch: tuple[int, int, int] = (1, 1, 1)
    channels: int = 32
    mlp_ratio: int = 4
    text_width: int = 384
    wavelengths: tuple[tuple[float, float], ...] = ((0.5, 32.0), (16.0, 1024.0), (16.0, 1024.0))
    dtype: str = "float32"
    remat: str = "none"
    predict: str = "velocity"
    attention: str = "auto"
    text: text_encoder.TextEncoderConfig | None = None

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.heads, *self.patch, self.channels, self.mlp_ratio, self.text_width) < 1:
            raise ValueError("dit: width, blocks, heads, patch, channels, mlp_ratio and text_width must be positive")
        if self.width > MOST_WIDTH or self.blocks > MOST_BLOCKS:
            raise ValueError(
                f"dit: width {self.width} or blocks {self.blocks} is beyond any machine; at most {MOST_WIDTH} and {MOST_BLOCKS}"
            )
        multihead.check("dit", self.width, self.heads, self.wavelengths, self.dtype, self.attention)
        if self.remat not in REMAT:
            raise ValueError(f"dit.remat {self.remat!r} is none of {', '.join(REMAT)}")
        if self.predict not in ("velocity", "clean"):
            raise ValueError(f"dit.predict {self.predict!r} is neither velocity nor clean")
        if self.text is not None and self.text.width != self.text_width:
            raise ValueError(f"dit.text_width {self.text_width} must equal dit.text.width {self.text.width}")

    @property
    def patch_dim(self) -> int:
        return math.prod(self.patch) * self.channels

    @property
    def common_heads(self) -> int:
        """What a mesh that splits heads has to divide: those of the model and of the text encoder that is trained with it."""
        return self.heads if self.text is None else math.gcd(self.heads, self.text.heads)


def fourier(x: Float[Array, ...], shortest: float, longest: float, count: int) -> Float[Array, "... features"]:
    """cos and sin of x at `count` wavelengths, spread geometrically."""
    angle = x[..., None] * (2 * jnp.pi / jnp.geomspace(shortest, longest, count))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def axis_features(x: Float[Array, "... 3"], wavelengths: tuple[tuple[float, float], ...], count: int) -> Array:
    """Fourier features of (seconds, y, x), each axis over twice its rotary range."""
    return jnp.concatenate(
        [fourier(x[..., axis], short, 2 * long, count) for axis, (short, long) in enumerate(wavelengths)], -1
    )


def modulate(x_BND: Array, shift_BND: Array, scale_BND: Array) -> Array:
    """Layer norm with scale and shift from the condition (adaLN)."""
    return whole(layer_norm(x_BND) * (1 + scale_BND) + shift_BND)


class Block(nnx.Module):
    """adaLN-zero block: self-attention and MLP are scaled, shifted and gated by the slot's condition."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.modulation = Linear(config.width, 6 * config.width, rngs=rngs, gain=0.0)
        sizes = config.width, config.heads, rngs, config.dtype, config.attention
        self.attention = SelfAttention(*sizes)
        self.cross = CrossAttention(*sizes, gain=0.0)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, rngs=rngs, dtype=config.dtype)

    def __call__(self, x_BND: Array, context: Context) -> Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = context.modulations(self.modulation, 6)
        layout = context.layout
        h_BND = modulate(x_BND, shift1, scale1)
        x_BND = whole(x_BND + gate1 * self.attention(h_BND, context.turn, layout.segment_BN))
        h_BND = whole(layer_norm(x_BND))
        x_BND = whole(x_BND + self.cross(h_BND, context.text_BLD, layout.segment_BN, layout.text_segment_BL))
        h_BND = modulate(x_BND, shift2, scale2)
        return whole(x_BND + gate2 * self.mlp(h_BND))


@dataclasses.dataclass(frozen=True)
class Context:
    """What every block sees beside the tokens."""

    layout: structs.Layout
    turn: tuple[Array, Array]
    condition_BSD: Array
    text_BLD: Array
    slot_one_hot_BNS: Array

    def modulations(self, linear: Linear, count: int) -> list[Array]:
        """`count` vectors (B, N, D) a token, made of its slot's condition by `linear`.

        They are computed once a slot and handed to its tokens by a one-hot product, whose gradient is a matmul, not a scatter.
        """
        # For the same reason as in whole().
        slots_BSX = sharding.constrain(linear(self.condition_BSD), "rows", "slots", "none")
        return [jnp.einsum("bns,bsd->bnd", self.slot_one_hot_BNS, part) for part in jnp.split(slots_BSX, count, -1)]


class DiT(nnx.Module):
    """velocity_BNP = DiT(noisy_BNP, time_BS, layout)."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.patch_in = Linear(config.patch_dim, width, rngs=rngs)
        self.position_in = Linear(3 * 2 * 8, width, rngs=rngs)
        self.time_in = Linear(64, width, rngs=rngs)
        self.time_out = Linear(width, width, rngs=rngs)
        self.extent_in = Linear(3 * 2 * 8, width, rngs=rngs)
        self.text_in = Linear(config.text_width, width, rngs=rngs)
        self.pooled_in = Linear(config.text_width, width, rngs=rngs)
        self.text = None if config.text is None else text_encoder.TextEncoder(config.text, rngs=rngs)
        make = nnx.vmap(Block, in_axes=(None, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        self.blocks = make(config, rngs.split(config.blocks))
        self.modulation = Linear(width, 2 * width, rngs=rngs, gain=0.0)
        self.patch_out = Linear(width, config.patch_dim, rngs=rngs, gain=0.0)

    def text_states(self, layout: structs.Layout) -> Float[Array, "B L M"]:
        """States of the row's captions: from the batch when the encoder is frozen, else from the encoder trained here."""
        if self.text is None:
            if layout.text_BLM is None:
                raise ValueError(
                    "this DiT takes states of a frozen text encoder, but the batch carries none (layout.text_BLM)"
                )
            return layout.text_BLM.astype(jnp.float32)
        if layout.text_token_BL is None:
            raise ValueError(
                "this DiT trains its own text encoder, but the batch carries no tokens (layout.text_token_BL)"
            )
        return self.text(layout.text_token_BL, layout.text_segment_BL)

    def condition(self, time_BS: Array, text_BLM: Array, layout: structs.Layout) -> Float[Array, "B S D"]:
        """One vector per slot from its noise level, its clip's extent and the mean state of its caption."""
        config = self.config
        belongs_BSL = layout.slot_segment_BS[:, :, None] == layout.text_segment_BL[:, None, :]
        belongs_BSL = belongs_BSL.astype(jnp.float32)
        pooled_BSM = jnp.einsum("bsl,blm->bsm", belongs_BSL, text_BLM) / jnp.maximum(
            belongs_BSL.sum(-1, keepdims=True), 1
        )
        parts = (
            self.time_out(jax.nn.silu(self.time_in(fourier(time_BS, 0.02, 4.0, 32)))),
            self.extent_in(axis_features(layout.extent_BS3, config.wavelengths, 8)),
            self.pooled_in(pooled_BSM),
        )
        # For the same reason as in nn.layers.whole, each by itself: their sum came out wrong for a part of the rows.
        time_BSD, extent_BSD, pooled_BSD = (sharding.constrain(part, "rows", "slots", "width") for part in parts)
        return jax.nn.silu(time_BSD + extent_BSD + pooled_BSD)

    def __call__(
        self, noisy_BNP: Float[Array, "B N P"], time_BS: Float[Array, "B S"], layout: structs.Layout
    ) -> Float[Array, "B N P"]:
        config = self.config
        text_BLM = self.text_states(layout)
        frequency = rope.frequencies(config.width // config.heads, config.wavelengths)
        context = Context(
            layout=layout,
            turn=rope.angles(layout.position_BN3, frequency),
            condition_BSD=sharding.constrain(self.condition(time_BS, text_BLM, layout), "rows", "slots", "width"),
            text_BLD=sharding.constrain(layer_norm(self.text_in(text_BLM)), "rows", "none", "width"),
            slot_one_hot_BNS=jax.nn.one_hot(layout.slot_BN, layout.slot_segment_BS.shape[1]),
        )
        place_BNF = axis_features(layout.position_BN3, config.wavelengths, 8)
        x_BND = whole(whole(self.patch_in(noisy_BNP)) + whole(self.position_in(place_BNF)))

        # The stacked blocks are one scan: compile time does not grow with depth.
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_BND: Array, block: Any) -> tuple[Array, None]:
            return nnx.merge(graphdef, block)(x_BND, context), None

        if config.remat != "none":
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[config.remat])
        x_BND, _ = jax.lax.scan(body, x_BND, stacked)

        shift_BND, scale_BND = context.modulations(self.modulation, 2)
        out_BNP = self.patch_out(modulate(x_BND, shift_BND, scale_BND))
        if config.predict == "velocity":
            return out_BNP
        time_BN = jnp.einsum("bns,bs->bn", context.slot_one_hot_BNS, time_BS)
        return (noisy_BNP - out_BNP) / jnp.maximum(time_BN, LEAST_TIME)[..., None]

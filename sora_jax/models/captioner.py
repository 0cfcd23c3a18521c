"""The captioner: says in words what a clip shows, from its latent patches (as CoCa does from images, arXiv:2205.01917).

Its captions are what a generator is better trained on than on people's ("Improving Image Generation with Better Captions",
Betker et al. 2023, which DALL-E 3 and Sora follow). An encoder sees all patches of a clip; a decoder says one word after the
other and looks at the patches of its own clip. Clips and captions share rows exactly as they do for the DiT: one packer, one
loader.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from sora_jax import sharding, structs
from sora_jax.models.dit import MOST_BLOCKS, MOST_WIDTH, axis_features
from sora_jax.models.text_encoder import POSITION_SCALE, WORD_SCALE, segment_positions
from sora_jax.nn import multihead, rope
from sora_jax.nn.attention import reference
from sora_jax.nn.layers import MLP, Linear, RMSNorm, whole
from sora_jax.nn.multihead import CrossAttention, SelfAttention

MOST_WORDS = 2**20

Keys = tuple[Array, Array]  # keys and values of an attention


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Shape of the captioner. blocks are the encoder's and text_blocks the decoder's; words is the size of the vocabulary, of
    which not all need be used, and max_tokens the length of a caption with its start and stop. The rest is as for the DiT."""

    width: int
    blocks: int
    text_blocks: int
    heads: int
    words: int
    max_tokens: int
    patch: tuple[int, int, int]
    channels: int
    mlp_ratio: int
    wavelengths: tuple[tuple[float, float], ...]
    dtype: str
    attention: str

    def __post_init__(self) -> None:
        least = 1, self.width, self.blocks, self.text_blocks, self.heads, *self.patch, self.channels, self.mlp_ratio
        if min(least) < 1 or self.max_tokens < 2 or self.words < 5:
            raise ValueError(
                "captioner: width, blocks, text_blocks, heads, patch, channels and mlp_ratio must be positive, max_tokens at "
                "least 2 and words at least 5"
            )
        if self.width > MOST_WIDTH or max(self.blocks, self.text_blocks, self.max_tokens) > MOST_BLOCKS:
            raise ValueError(
                f"captioner: width {self.width}, blocks {self.blocks}, text_blocks {self.text_blocks} or max_tokens "
                f"{self.max_tokens} is beyond any machine; at most {MOST_WIDTH} and {MOST_BLOCKS}"
            )
        if self.words > MOST_WORDS:
            raise ValueError(f"captioner.words {self.words} is beyond any language; at most {MOST_WORDS}")
        multihead.check("captioner", self.width, self.heads, self.wavelengths, self.dtype, self.attention)

    @property
    def patch_dim(self) -> int:
        return math.prod(self.patch) * self.channels


class SeeingBlock(nnx.Module):
    """A pre-norm block of the encoder: self-attention within clips, then the MLP."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads, rngs, config.dtype, config.attention)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, rngs=rngs, dtype=config.dtype)

    def __call__(self, x_BND: Array, turn: tuple[Array, Array], segment_BN: Array) -> Array:
        x_BND = whole(x_BND + self.attention(whole(self.attention_norm(x_BND)), turn, segment_BN))
        return whole(x_BND + self.mlp(whole(self.mlp_norm(x_BND))))


class SayingBlock(nnx.Module):
    """A pre-norm block of the decoder: attention to the words before, then to the clip's patches, then the MLP."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        width, heads = config.width, config.heads
        self.attention_norm, self.cross_norm, self.mlp_norm = (RMSNorm(width) for _ in range(3))
        self.attention = SelfAttention(width, heads, rngs, config.dtype, causal=True)
        self.cross = CrossAttention(width, heads, rngs, config.dtype, "reference")
        self.mlp = MLP(width, config.mlp_ratio * width, rngs=rngs, dtype=config.dtype)

    def __call__(self, x_BLD: Array, seen_BND: Array, layout: structs.Layout) -> Array:
        before_BLD = self.attention(whole(self.attention_norm(x_BLD), "none"), None, layout.text_segment_BL)
        x_BLD = whole(x_BLD + before_BLD, "none")
        return self._looked(x_BLD, self.cross.keys(seen_BND), layout.text_segment_BL, layout.segment_BN)

    def following(
        self, x_BSD: Array, place: Array, before: Keys, seen: Keys, segment_BS: Array, segment_BN: Array
    ) -> tuple[Array, Keys]:
        """As __call__, of the words at one place of S captions a row, whose keys up to there are `before`, (B S, T, K, E); those
        with this word's are handed back."""
        q, *new = self.attention.projected(whole(self.attention_norm(x_BSD), "none"))
        q, *new = (rearrange(x, "b s k e -> (b s) 1 k e") for x in (q, *new))
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, x, place, 1) for old, x in zip(before, new, strict=True))
        said = jnp.broadcast_to(jnp.arange(k.shape[1]) <= place, k.shape[:2]).astype(jnp.int32)
        attended = reference(q, k, v, jnp.ones_like(said[:, :1]), said, self.attention.dtype)
        x_BSD = x_BSD + self.attention.joined(rearrange(attended, "(b s) 1 k e -> b s k e", b=len(x_BSD)))
        return self._looked(whole(x_BSD, "none"), seen, segment_BS, segment_BN), (k, v)

    def _looked(self, x_BLD: Array, seen: Keys, text_segment_BL: Array, segment_BN: Array) -> Array:
        across_BLD = self.cross.to(seen, whole(self.cross_norm(x_BLD), "none"), text_segment_BL, segment_BN)
        x_BLD = whole(x_BLD + across_BLD, "none")
        return whole(x_BLD + self.mlp(whole(self.mlp_norm(x_BLD), "none"), "none"), "none")


class Captioner(nnx.Module):
    """logits of each next word = say(see(patches, layout), words, layout)."""

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.patch_in = Linear(config.patch_dim, width, rngs=rngs)
        self.position_in = Linear(3 * 2 * 8, width, rngs=rngs)
        self.blocks = _stacked(SeeingBlock, config, rngs, config.blocks)
        self.seen_norm = RMSNorm(width)
        words, places = (nnx.initializers.normal(scale) for scale in (WORD_SCALE, POSITION_SCALE))
        self.token = nnx.Embed(config.words, width, rngs=rngs, embedding_init=words)
        self.position = nnx.Embed(config.max_tokens, width, rngs=rngs, embedding_init=places)
        self.text_blocks = _stacked(SayingBlock, config, rngs, config.text_blocks)
        self.said_norm = RMSNorm(width)
        self.word_out = Linear(width, config.words, rngs=rngs, gain=0.1)

    def see(self, patch_BNP: Float[Array, "B N P"], layout: structs.Layout) -> Float[Array, "B N D"]:
        """States of the clips' patches, each of which knows all of its clip."""
        config = self.config
        turn = rope.angles(layout.position_BN3, rope.frequencies(config.width // config.heads, config.wavelengths))
        place_BNF = axis_features(layout.position_BN3, config.wavelengths, 8)
        x_BND = whole(whole(self.patch_in(patch_BNP)) + whole(self.position_in(place_BNF)))
        x_BND = _scan(self.blocks, lambda block, x_BND: block(x_BND, turn, layout.segment_BN), x_BND)
        # Words look at all of a row's patches, wherever these lie.
        return whole(self.seen_norm(x_BND), "none")

    def say(
        self, seen_BND: Float[Array, "B N D"], token_BL: Int[Array, "B L"], layout: structs.Layout
    ) -> Float[Array, "B L V"]:
        """For each word of the captions so far the logits of the one after it."""
        place_BL = segment_positions(layout.text_segment_BL)
        x_BLD = whole(self.token(token_BL) + self.position(place_BL), "none")
        x_BLD = _scan(self.text_blocks, lambda block, x_BLD: block(x_BLD, seen_BND, layout), x_BLD)
        return self.words(x_BLD)

    def words(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits of the next words from the decoder's states."""
        logits_BLV = self.word_out(whole(self.said_norm(x_BLD), "none"))
        return sharding.constrain(logits_BLV, "rows", "none", "none")


def loss(
    logits_BLV: Float[Array, "B L V"], token_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(mean cross-entropy in nats, number) of the words that follow one of their own caption."""
    following_BL = jnp.roll(token_BL, -1, axis=1)
    # The last of a row has none after it.
    said_BL = (
        (segment_BL > 0)
        & (jnp.roll(segment_BL, -1, axis=1) == segment_BL)
        & (jnp.arange(token_BL.shape[1]) + 1 < token_BL.shape[1])
    )
    chosen_BL = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), following_BL[..., None], -1)[..., 0]
    count = said_BL.sum().astype(jnp.float32)
    return -jnp.sum(jnp.where(said_BL, chosen_BL, 0)) / jnp.maximum(count, 1), count


def write(
    model: Captioner,
    patch_BNP: Float[Array, "B N P"],
    layout: structs.Layout,
    segment_BS: Int[Array, "B S"],
    start: int,
    stop: int,
    sayable_V: Any,
) -> Int[Array, "B S T"]:
    """Captions of S clips a row (segment_BS, 0 is none), each word the likeliest that may be said (bool, one for each word).

    A caption begins with `start` and ends with `stop`; what is behind it is `stop` too. Keys of words that were said are kept, so
    that a word costs what it costs alone.
    """
    config = model.config
    (B, S), T = segment_BS.shape, config.max_tokens
    seen_BND = model.see(patch_BNP, layout)
    graphdef, blocks = nnx.split(model.text_blocks)
    seen = jax.vmap(lambda block: nnx.merge(graphdef, block).cross.keys(seen_BND))(blocks)
    empty = jnp.zeros((config.text_blocks, B * S, T, config.heads, config.width // config.heads))

    def unsaid(carry: Any) -> Array:
        place, token_BST, _ = carry
        return (place + 1 < T) & jnp.any((token_BST[..., place] != stop) & (segment_BS > 0))

    def one(carry: Any) -> Any:
        place, token_BST, before = carry
        last_BS = token_BST[..., place]
        x_BSD = model.token(last_BS) + model.position(place)

        def block(x_BSD: Array, of_block: Any) -> tuple[Array, Keys]:
            state, before, seen = of_block
            layer = nnx.merge(graphdef, state)
            return layer.following(x_BSD, place, before, seen, segment_BS, layout.segment_BN)

        x_BSD, before = jax.lax.scan(block, x_BSD, (blocks, before, seen))
        logits_BSV = jnp.where(sayable_V, model.words(x_BSD), -jnp.inf)
        following_BS = jnp.where(last_BS == stop, stop, jnp.argmax(logits_BSV, -1).astype(jnp.int32))
        return place + 1, token_BST.at[..., place + 1].set(following_BS), before

    token_BST = jnp.full((B, S, T), stop, jnp.int32).at[..., 0].set(start)
    return jax.lax.while_loop(unsaid, one, (jnp.int32(0), token_BST, (empty, empty)))[1]


def _stacked(kind: Any, config: CaptionerConfig, rngs: nnx.Rngs, count: int) -> Any:
    make = nnx.vmap(kind, in_axes=(None, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    return make(config, rngs.split(count))


def _scan(stacked: Any, call: Any, x: Array) -> Array:
    """x through stacked blocks; one scan, so that compile time does not grow with depth."""
    graphdef, layers = nnx.split(stacked)
    return jax.lax.scan(lambda x, layer: (call(nnx.merge(graphdef, layer), x), None), x, layers)[0]

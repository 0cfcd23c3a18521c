"""The text encoder: a BERT-style transformer, post-norm, with learned positions (Devlin et al., arXiv:1810.04805).

One module serves two uses: MiniLM-L6 with loaded, frozen weights (text/encode.py), and a small encoder that is trained
from scratch together with the diffusion transformer. Several captions may share a row, told apart by segment ids.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from sora_jax import sharding
from sora_jax.nn.attention import attention
from sora_jax.nn.layers import Linear, whole

MOST = 2**17  # a checkpoint's config is built before its arrays are held against it
NORM_EPSILON = 1e-12  # BERT's; safe because norms are computed in float32
# Of new embeddings: a step of Adam at 3e-4 is small beside them, unlike beside the 0.02 of BERT, and a word's state is
# mostly the word, wherever it stands.
WORD_SCALE, POSITION_SCALE = 0.5, 0.05


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The shape of a text encoder. Raises ValueError for a combination that cannot be built."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_tokens: int  # positions a caption may use
    dtype: str  # of matmul inputs, "float32" or "bfloat16"; parameters, norms, softmax and matmul outputs are float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "mlp_width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"text encoder: {name} is {getattr(self, name)}; it must be at least 1")
        if max(self.width, self.mlp_width, self.layers) > MOST:
            raise ValueError(f"text encoder: width, mlp_width or layers is beyond any machine; at most {MOST}")
        if self.width % self.heads:
            raise ValueError(f"text encoder: width {self.width} is not a multiple of heads {self.heads}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"text encoder: dtype is {self.dtype!r}; use 'float32' or 'bfloat16'")


MINILM = TextEncoderConfig(
    vocab_size=30522, width=384, layers=6, heads=12, mlp_width=1536, max_tokens=512, dtype="float32"
)


class TextEncoder(nnx.Module):
    """Tokens to states; blocks are stacked on a leading layer axis and scanned, so that depth costs no compile time.

    A new encoder begins as its word embeddings: the last map of every branch is zero.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        word, position = nnx.initializers.normal(WORD_SCALE), nnx.initializers.normal(POSITION_SCALE)
        self.token = nnx.Embed(config.vocab_size, config.width, embedding_init=word, rngs=rngs)
        self.position = nnx.Embed(config.max_tokens, config.width, embedding_init=position, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.blocks = _stacked_blocks(config, rngs)

    def __call__(self, token_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]) -> Float[Array, "B L M"]:
        """States of every token, float32; zero where segment_BL is 0 (padding).

        The tokens of a segment must be adjacent: a token's position is its index within its segment. A token attends to
        its own segment only. A token id or position beyond its table gives NaN, not a wrong word: text/tokenise.py
        truncates.
        """
        x_BLM = whole(self.norm(self.token(token_BL) + self.position(segment_positions(segment_BL))), "none")
        graphdef, layers = nnx.split(self.blocks)

        def block(x_BLM: Array, layer: PyTree) -> tuple[Array, None]:
            return nnx.merge(graphdef, layer)(x_BLM, segment_BL), None

        x_BLM, _ = jax.lax.scan(block, x_BLM, layers)
        return jnp.where(segment_BL[:, :, None] > 0, x_BLM, 0.0)


class Block(nnx.Module):
    """Attention, then an MLP with the exact (erf) GELU; each is followed by residual and norm."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.dtype = config.dtype
        self.query = Linear(config.width, config.width, rngs=rngs, dtype=config.dtype)
        self.key = Linear(config.width, config.width, rngs=rngs, dtype=config.dtype)
        self.value = Linear(config.width, config.width, rngs=rngs, dtype=config.dtype)
        self.out = Linear(config.width, config.width, rngs=rngs, dtype=config.dtype, gain=0.0)
        self.attention_norm = _norm(config, rngs)
        self.up = Linear(config.width, config.mlp_width, rngs=rngs, dtype=config.dtype)
        self.down = Linear(config.mlp_width, config.width, rngs=rngs, dtype=config.dtype, gain=0.0)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x_BLM: Float[Array, "B L M"], segment_BL: Int[Array, "B L"]) -> Float[Array, "B L M"]:
        x_BLM = whole(self.attention_norm(x_BLM + self.out(self.attend(x_BLM, segment_BL))), "none")
        up_BLF = sharding.constrain(self.up(x_BLM), "rows", "none", "hidden")
        return whole(self.mlp_norm(x_BLM + self.down(jax.nn.gelu(up_BLF, approximate=False))), "none")

    def attend(self, x_BLM: Float[Array, "B L M"], segment_BL: Int[Array, "B L"]) -> Float[Array, "B L M"]:
        q_BLKE, k_BLKE, v_BLKE = (
            sharding.constrain(
                rearrange(project(x_BLM), "b l (k e) -> b l k e", k=self.heads), "rows", "none", "heads", "none"
            )
            for project in (self.query, self.key, self.value)
        )
        attended = attention(q_BLKE, k_BLKE, v_BLKE, segment_BL, segment_BL, self.dtype, queries="none", keys="none")
        return rearrange(attended, "b l k e -> b l (k e)")


def segment_positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Index of every token within its run of equal segment ids; 0 on padding, which may outrun the position table."""
    index_BL = jnp.broadcast_to(jnp.arange(segment_BL.shape[1]), segment_BL.shape)
    first_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1] - 1) != 0
    start_BL = jax.lax.cummax(jnp.where(first_BL, index_BL, 0), axis=1)
    return jnp.where(segment_BL > 0, index_BL - start_BL, 0)


def _stacked_blocks(config: TextEncoderConfig, rngs: nnx.Rngs) -> Block:
    make = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
    return nnx.split_rngs(splits=config.layers)(make)(rngs)


def _norm(config: TextEncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs)

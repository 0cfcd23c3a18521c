"""Linear, norms and the MLP: float32 parameters, matmuls in a given dtype with float32 accumulation; models without arrays."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from sora_jax import sharding
from sora_jax.nn.products import product

Model = TypeVar("Model", bound=nnx.Module)


def whole(x_BND: Array, tokens: str = "tokens") -> Array:
    """Tokens with their whole width on one device; tokens is the logical axis of the tokens.

    Every activation of a residual stream is constrained, because a width that XLA's partitioner splits by itself, to suit
    the next weight, comes out wrong on a mesh of data, fsdp and tensor (jax 0.10.2, with either partitioner).
    """
    return sharding.constrain(x_BND, "rows", tokens, "width")


@functools.lru_cache(maxsize=64)
def abstract(kind: Callable[..., Model], config: Any) -> Model:
    """kind(config, rngs) with shapes in place of its arrays. One for all who ask, as it takes long to trace: not to be changed."""
    return nnx.eval_shape(lambda: kind(config, nnx.Rngs(0)))


def parameters(model: nnx.Module) -> Any:
    """What is trained of a model: nested dicts of arrays by name."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


class Linear(nnx.Module):
    """Affine map of the last axis. gain scales the fan-in initialisation; 0 starts the map at zero."""

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: str = "float32", gain: float = 1.0, bias: bool = True
    ):
        init = (
            nnx.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal") if gain else nnx.initializers.zeros
        )
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        rows = string.ascii_lowercase[: x.ndim - 1]
        y = product(f"{rows}y,yz->{rows}z", x, self.kernel[...], self.dtype)
        return y if self.bias is None else y + self.bias[...]


def layer_norm(x: Float[Array, "... D"], epsilon: float = 1e-6) -> Float[Array, "... D"]:
    """Layer normalisation without affine parameters: adaLN brings scale and shift."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis with a learned scale (arXiv:1910.07467)."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * self.scale[...]


class MLP(nnx.Module):
    """Two linear maps around a GELU."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: str):
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x_BND: Float[Array, "B N D"], tokens: str = "tokens") -> Float[Array, "B N D"]:
        """tokens is the logical axis of the tokens."""
        h_BNF = sharding.constrain(jax.nn.gelu(self.up(x_BND), approximate=True), "rows", tokens, "hidden")
        return self.down(h_BNF)

"""Analytic FLOPs against XLA's own count on small models without loops."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax import compute
from sora_jax.models import dit, vae
from sora_jax.structs import Layout


def counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("width", [192, 384])
def test_dit(width):
    # One block, so that the scan's body is counted as often as it runs. Wide, so that elementwise work is small beside it.
    config = dit.DiTConfig(width=width, blocks=1, heads=2, channels=32, text_width=64)
    B, N, S, L = 2, 64, 4, 32
    layout = Layout(
        shape(B, N, dtype=jnp.int32), shape(B, N, dtype=jnp.int32), shape(B, N, 3), shape(B, S, dtype=jnp.int32),
        shape(B, S, 3), shape(B, L, dtype=jnp.int32), shape(B, L, 64),
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, nnx.Rngs(0))), nnx.Param)
    flops = counted(lambda p, *a: nnx.merge(graphdef, p)(*a), params, shape(B, N, 32), shape(B, S), layout)
    assert compute.dit_forward(config, B, N, S, L) == pytest.approx(flops, rel=0.04)


@pytest.mark.parametrize("name", ["toy", "three"])
def test_vae(name):
    config = {
        "toy": vae.VAEConfig(widths=(128,), blocks=(2,)),
        "three": vae.VAEConfig(
            folds=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
            widths=(32, 64, 128),
            blocks=(1, 1, 1),
            kernel=(3, 3, 3),
            channels=8,
        ),
    }[name]
    graphdef, params, rest = vae.split(nnx.eval_shape(lambda: vae.VAE(config, nnx.Rngs(0))))
    frames, latent = shape(1, 9, 64, 64, 3), shape(1, *config.latent_shape(9, 64, 64))
    encoder = counted(lambda p, r, x: nnx.merge(graphdef, p, r).encode(x).mean, params, rest, frames)
    decoder = counted(lambda p, r, z: nnx.merge(graphdef, p, r).decode(z), params, rest, latent)
    analytic = compute.vae_forward(config, 1, 9, 64, 64)
    # XLA leaves out products with the zero borders of 'same' convolutions, which are counted here.
    assert analytic[0] == pytest.approx(encoder, rel=0.2) and analytic[1] == pytest.approx(decoder, rel=0.2)
    assert analytic[0] >= encoder * 0.98

"""What a codec's VAE decodes, before it is rounded to 255 levels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models import vae


def pixels(codec, latents):
    """Frames (T, H, W, 3) from 0 to 1 of each normalised latent (t, h, w, c)."""
    graphdef, _, _ = vae.split(nnx.eval_shape(lambda: vae.VAE(codec.config, nnx.Rngs(0))))
    model = nnx.merge(graphdef, *jax.tree.map(jnp.asarray, codec._weights))
    decoded = [model.decode(model.denormalise(jnp.asarray(latent[None])))[0] for latent in latents]
    return [np.asarray(jnp.clip(frames, -1, 1) + 1) / 2 for frames in decoded]

"""Pixels to normalised latents and back for any number of clips, in temporal chunks, so that memory does not grow with duration."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax import sharding
from sora_jax.models import vae
from sora_jax.nn.layers import abstract

# Latent frames a chunk: large enough for short clips to be one chunk, small enough for long ones to fit.
CHUNK = 8
# Pixels that a device processes together: clips of one size share a batch up to this.
BATCH_PIXELS = 2**21
# Pixels of a batch that is shared out: all devices hold what goes in and what comes out.
MOST_PIXELS = 2**28


def to_unit(frames: Any) -> Any:
    """uint8 to float32 in [-1, 1]."""
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def to_uint8(frames: Any) -> Any:
    """[-1, 1] to uint8; values outside are clipped."""
    return jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class Codec:
    """A trained VAE as two functions of numpy arrays; clips are shared out to the devices of the mesh of the context."""

    def __init__(self, config: vae.VAEConfig, params: Any, rest: Any) -> None:
        self.config = config
        graphdef, _, _ = vae.split(abstract(vae.VAE, config))

        @jax.jit
        def encode_chunk(weights: Any, frames: Any, pasts: Any) -> Any:
            model = nnx.merge(graphdef, *weights)
            posterior, following = model.encode_chunk(_shared_out(to_unit(frames)), pasts)
            return sharding.everywhere(model.normalise(posterior)), following

        @jax.jit
        def decode_chunk(weights: Any, latent: Any, pasts: Any) -> Any:
            model = nnx.merge(graphdef, *weights)
            frames, following = model.decode_chunk(model.denormalise(latent), pasts)
            # Rounded by each device, so that bytes are what goes to the others.
            return sharding.everywhere(_shared_out(to_uint8(frames))), following

        # On the host, so that they go wherever the context computes: one device or a mesh.
        self._weights = sharding.on_host((params, rest))
        self._encode_chunk, self._decode_chunk = encode_chunk, decode_chunk

    def encode(self, clips: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(mean, std) of the normalised latent, float32 (t, h, w, c) each, of uint8 clips (T, H, W, 3) of any sizes."""
        first, step = 1 + (CHUNK - 1) * self.config.stride[0], CHUNK * self.config.stride[0]

        def one_batch(frames: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
            pasts, parts = None, []
            for chunk in _chunks(frames, first, step):
                part, pasts = self._encode_chunk(self._weights, chunk, pasts)
                parts.append(jax.device_get(part))
            return list(zip(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)), strict=True))

        return _by_shape(clips, one_batch, lambda clip: clip[..., 0].size)

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 clips (T, H, W, 3) of normalised latents (t, h, w, c) of any sizes."""

        def one_batch(latent: np.ndarray) -> list[np.ndarray]:
            pasts, parts = None, []
            for chunk in _chunks(latent, CHUNK, CHUNK):
                part, pasts = self._decode_chunk(self._weights, chunk, pasts)
                parts.append(np.asarray(part))
            return list(np.concatenate(parts, axis=1))

        cells = int(np.prod(self.config.stride))
        return _by_shape(latents, one_batch, lambda latent: latent[..., 0].size * cells)


def _shared_out(clips: jax.Array) -> jax.Array:
    """A batch over devices, if it is one that _by_shape made for them; else each does all of it."""
    if clips.shape[0] % sharding.shards("rows"):
        return clips
    return sharding.constrain(clips, "rows", *["none"] * (clips.ndim - 1))


def _chunks(frames: np.ndarray, first: int, following: int) -> Iterator[np.ndarray]:
    yield frames[:, :first]
    for start in range(first, frames.shape[1], following):
        yield frames[:, start : start + following]


def _by_shape(
    items: Sequence[np.ndarray], one_batch: Callable[[np.ndarray], list[Any]], pixels: Callable[[np.ndarray], int]
) -> list[Any]:
    """one_batch over items of equal shape, in batches of one size each (the last is padded by repeating), in order."""
    groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for number, item in enumerate(items):
        groups[item.shape].append(number)
    results: list[Any] = [None] * len(items)
    for members in groups.values():
        one = pixels(items[members[0]])
        over = sharding.shards("rows")
        if len(members) < over or over * one > MOST_PIXELS:
            over = 1
        # A power of two on each device, so that groups of many sizes share few compiled programs.
        most, each = max(1, min(BATCH_PIXELS, MOST_PIXELS // over) // one), -(-len(members) // over)
        size = over * min(1 << (most.bit_length() - 1), 1 << (each - 1).bit_length())
        for start in range(0, len(members), size):
            some = members[start : start + size]
            padded = some + some[-1:] * (size - len(some))
            for number, result in zip(some, one_batch(np.stack([items[i] for i in padded])), strict=False):
                results[number] = result
    return results

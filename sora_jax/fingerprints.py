"""Fingerprints of arrays: 64 bits that change with every flipped bit and with values that move, the same on every mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of(arrays: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Two 32-bit numbers of every array: the sum of its words, and the sum weighted by position, modulo 2^32.

    They depend on the bits alone, not on mesh or sharding. One flipped bit always changes the first; the second sees
    values that moved. Arrays in host memory are summed where they are; others by a jitted function, so that each device
    reads its own shard.
    """
    found = {path: _words_host(leaf) for path, leaf in arrays.items() if _on_host(leaf)}
    # One program for all: many small ones at once, each of which waits for all devices, can starve each other of threads.
    elsewhere = on_devices({path: leaf for path, leaf in arrays.items() if path not in found})
    found |= {path: (int(one), int(other)) for path, (one, other) in jax.device_get(elsewhere).items()}
    return {path: found[path] for path in arrays}


def _on_host(leaf: Any) -> bool:
    # On the CPU numpy reads a jax array in place, and needs no compilation, which costs 0.1 s for every shape.
    if isinstance(leaf, np.ndarray):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _words_host(leaf: Any) -> tuple[int, int]:
    values = np.ascontiguousarray(leaf).reshape(-1)
    words = values.view(np.uint32 if values.itemsize >= 4 else f"u{values.itemsize}")
    total, weighted = 0, 0
    block = 1 << 16  # fits the cache
    positions = np.arange(min(block, words.size), dtype=np.uint32)
    for start in range(0, words.size, block):
        part = words[start : start + block].astype(np.uint32, copy=False)
        part_total = int(part.sum(dtype=np.uint32))
        total += part_total
        weighted += start * part_total + int(np.dot(part, positions[: part.size]))
    return total % 2**32, weighted % 2**32


@jax.jit
def on_devices(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The same of arrays on any mesh, each device of its own shard."""
    return {path: _fingerprint(leaf) for path, leaf in arrays.items()}


def _fingerprint(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    # 8 bytes become two words on a new last axis, low word first, as numpy views them.
    width = min(bits.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"u{width}")).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * position, dtype=jnp.uint32)

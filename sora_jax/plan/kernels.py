"""Attention on the chips of a plan: which part of a model has no kernel there and what would give it one, and what kernels do.

Without one it goes block by block, in loops whose length depends on the data: a plan counts them once, and its times are too short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sora_jax import sharding
from sora_jax.data.pack import PackConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.nn import attention, blockwise, flash, kernels

# By platform: the kernel, and what numbers of tokens it takes are multiples of.
KERNELS = {"tpu": ("splash", kernels.SPLASH_LANES), "gpu": ("triton", 1), "cuda": ("triton", 1)}
AMONG, CAPTIONS = "among a row's tokens", "to captions"
# The backend of an attention by tokens and text of a row, and over how many devices its tokens are split.
Backend = Callable[[int, int, int], str]


def missing(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> list[str]:
    """A sentence for each attention that goes without the kernel of a platform's chips: which, and the remedy.

    Nothing of platforms that have no kernel.
    """
    if platform not in KERNELS:
        return []
    kernel, step = KERNELS[platform]
    heads, split = model.heads // sharding.shards("heads", mesh), sharding.shards("tokens", mesh)
    now = {"pack.row_tokens": packing.row_tokens, "pack.row_text": packing.row_text, "mesh.sequence": split}
    better = {
        "pack.row_tokens": _up(packing.row_tokens, step * split),
        "pack.row_text": _up(packing.row_text, step),
        "mesh.sequence": math.gcd(heads, split),
    }
    if model.attention == "blockwise":
        return [f"dit.attention=blockwise takes no {kernel} kernel: set dit.attention=auto"]
    return [
        f"no {kernel} kernel for attention {what}: {_remedy(backend, now, better)}"
        for what, backend in _backends(model, packing, mesh, platform).items()
        if backend(*now.values()) == "blockwise"
    ]


def _backends(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> dict[str, Backend]:
    """Of the attentions, if their backend is chosen."""
    heads = model.heads // sharding.shards("heads", mesh)

    def among(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, tokens, tokens, heads, split)

    def to_captions(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, tokens // split, text, heads)

    return {AMONG: among, CAPTIONS: to_captions} if model.attention == "auto" else {}


class Work(NamedTuple):
    """Pairs of tokens, and of tokens and words, that attention computes in a step, and the bytes that its kernels read again.

    pairs are None where all of a row are computed. A TPU's kernel reads the keys of a block anew for every block of queries.
    """

    pairs: float | None
    text_pairs: float | None
    read_again: float


def work(
    model: DiTConfig,
    packing: PackConfig,
    mesh: Mesh | AbstractMesh,
    platform: str,
    segments: tuple[np.ndarray, np.ndarray],
    passes: tuple[int, int],
) -> Work:
    """What kernels do, which leave out blocks of other clips; other backends compute all pairs of a row.

    segments are those of rows' tokens (R, N) and words (R, L), any number of rows, for which a step's stand; passes are how often
    a block's attention goes over keys for its queries, and over queries for its keys.
    """
    split, (kernel, _) = sharding.shards("tokens", mesh), KERNELS.get(platform, (None, 1))
    chosen = {
        what: backend(packing.row_tokens, packing.row_text, split)
        for what, backend in _backends(model, packing, mesh, platform).items()
    }
    tokens, text = map(jnp.asarray, segments)
    found: list[float | None] = []
    read = 0.0
    # Captions are met by a device's own tokens; for those among each other it has all tokens of some heads.
    for what, keys, parts in ((AMONG, tokens, 1), (CAPTIONS, text, split)):
        if chosen.get(what, model.attention) != kernel:
            found.append(None)
            continue
        splash = kernel == "splash"
        bq, bk = (
            kernels.splash_blocks(tokens.shape[1] // parts, keys.shape[1]) if splash else (flash.BLOCK, flash.BLOCK)
        )
        met = blockwise.meetings(blockwise.in_blocks(tokens, bq), blockwise.in_blocks(keys, bk), bq, bk)
        of_a_step = int(met.sum()) * packing.rows / len(tokens)
        # A GPU's multiplies heads as large as the next power of two.
        size = model.width // model.heads
        padded = 1.0 if splash else 2 ** math.ceil(math.log2(size)) / size
        found.append(of_a_step * bq * bk * padded)
        # Two arrays in bfloat16 of all heads: keys and values, or queries and what their gradients are of. A GPU has a row's in
        # its cache: of 32k tokens of a head of 128 they are 16 of an H100's 50 MiB.
        read += of_a_step * (passes[0] * bk + passes[1] * bq) * model.width * 2 * 2 * model.blocks if splash else 0
    return Work(found[0], found[1], read)


def _remedy(backend: Backend, now: dict[str, int], better: dict[str, int]) -> str:
    """The fewest settings that give attention a kernel."""
    changes = [name for name in now if better[name] != now[name]]
    for count in range(1, len(changes) + 1):
        for names in itertools.combinations(changes, count):
            if backend(*(now | {name: better[name] for name in names}).values()) != "blockwise":
                return "set " + " and ".join(f"{name}={better[name]}" for name in names)
    return "there is none that takes it"


def _up(value: int, step: int) -> int:
    return -(-value // step) * step

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
from sora_jax.config import ConfigError
from sora_jax.data.pack import PackConfig
from sora_jax.models import dit as dit_model
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.nn import attention, blockwise, flash, kernels


class Kernel(NamedTuple):
    """An attention backend of a chip's own: its name, what numbers of tokens it takes are multiples of, the sides of its blocks for
    numbers of queries and keys, the size of a head as it multiplies it, and whether every block of queries reads its keys anew."""

    name: str
    multiple: int
    blocks: Callable[[int, int], tuple[int, int]]
    head: Callable[[int], int]
    reads_again: bool


# Products of all pairs that both take backward beyond the four of an attention that keeps its weights, which compute.py counts: the
# gradients of queries take three in a kernel of their own, those of keys and values four, as each makes the weights anew.
MORE_BACKWARD = 3
SPLASH = Kernel("splash", kernels.SPLASH_LANES, kernels.splash_blocks, lambda size: size, reads_again=True)
# A GPU has a row's keys and values in its cache: of 32k tokens of a head of 128 they are 16 of an H100's 50 MiB.
TRITON = Kernel("triton", 1, lambda queries, keys: (flash.BLOCK, flash.BLOCK), flash.padded_head, reads_again=False)
KERNELS = {"tpu": SPLASH} | dict.fromkeys(attention.GPUS, TRITON)
AMONG, CAPTIONS = "among a row's tokens", "to captions"
# The backend of an attention by tokens and text of a row, and over how many devices its tokens are split.
Backend = Callable[[int, int, int], str]


def missing(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> list[str]:
    """A sentence for each attention that goes without the kernel of a platform's chips: which, and the remedy.

    Nothing of platforms that have no kernel.
    """
    if platform not in KERNELS:
        return []
    kernel = KERNELS[platform]
    now, better = _settings(model, packing, mesh, kernel)
    if model.attention == "blockwise":
        return [f"dit.attention=blockwise takes no {kernel.name} kernel: set dit.attention=auto"]
    return [
        f"no {kernel.name} kernel for attention {what}: {_remedy(backend, now, better)}"
        for what, backend in _backends(model, packing, mesh, platform).items()
        if backend(*now.values()) == "blockwise"
    ]


def refuse(
    stage: str, model: DiTConfig | CaptionerConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str
) -> None:
    """Raises ConfigError if a model names a kernel of other chips, or one that does not take its rows or heads on the mesh.

    stage is that of its config's keys.
    """
    if model.attention not in attention.KERNELS:
        return
    named, kernel = f"{stage}.attention={model.attention}", KERNELS.get(platform)
    if kernel is None or kernel.name != model.attention:
        raise ConfigError(f"{named} is no kernel of a {platform}: set {stage}.attention=auto")
    now, better = _settings(model, packing, mesh, kernel)
    # A captioner's words go to the reference, among each other and to tokens.
    free = ("pack.row_text",) if isinstance(model, CaptionerConfig) else ()
    changes = [f"{name}={better[name]}" for name in now if better[name] != now[name] and name not in free]
    if changes:
        raise ConfigError(
            f"{named} does not take these rows and heads: set {' and '.join(changes)}, or {stage}.attention=auto"
        )


def _settings(
    model: DiTConfig | CaptionerConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, kernel: Kernel
) -> tuple[dict[str, int], dict[str, int]]:
    """Settings on which it depends whether a kernel takes attention: as they are, and as each would have to be."""
    heads, split = model.heads // sharding.shards("heads", mesh), sharding.shards("tokens", mesh)
    now = {"pack.row_tokens": packing.row_tokens, "pack.row_text": packing.row_text, "mesh.sequence": split}
    better = {
        "pack.row_tokens": sharding.padded(packing.row_tokens, "tokens", kernel.multiple, mesh),
        "pack.row_text": sharding.padded(packing.row_text, "none", kernel.multiple, mesh),
        "mesh.sequence": math.gcd(heads, split),
    }
    return now, better


def _backends(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> dict[str, Backend]:
    """Of the attentions, if their backend is chosen."""
    heads = model.heads // sharding.shards("heads", mesh)

    def among(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, tokens, tokens, heads, split)

    def to_captions(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, tokens // split, text, heads)

    return {AMONG: among, CAPTIONS: to_captions} if model.attention == "auto" else {}


def taken(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> set[str]:
    """The attentions, AMONG and CAPTIONS, that the kernel of a platform's chips takes."""
    if platform not in KERNELS:
        return set()
    split = sharding.shards("tokens", mesh)
    chosen = {
        what: backend(packing.row_tokens, packing.row_text, split)
        for what, backend in _backends(model, packing, mesh, platform).items()
    }
    return {what for what in (AMONG, CAPTIONS) if chosen.get(what, model.attention) == KERNELS[platform].name}


class Work(NamedTuple):
    """Pairs of tokens, and of tokens and words, that attention computes in a step, the FLOPs that its kernels take backward beyond
    those of an attention that keeps its weights, less those of what a policy keeps of theirs, and the bytes that they read again.

    pairs are None where all of a row are computed.
    """

    pairs: float | None
    text_pairs: float | None
    more_flops: float
    read_again: float


def work(
    model: DiTConfig,
    packing: PackConfig,
    mesh: Mesh | AbstractMesh,
    platform: str,
    segments: tuple[np.ndarray, np.ndarray],
    trains: bool = True,
) -> Work:
    """What kernels do, which leave out blocks of other clips; other backends compute all pairs of a row.

    segments are those of rows' tokens (R, N) and words (R, L), any number of rows, for which a step's stand.
    """
    # Blocks of queries read keys forward, once more where that is done again, and for their gradients; keys queries for theirs.
    again = model.remat not in ("none", *dit_model.KEEPS_ATTENTION)
    over_keys, over_queries = (2 + again, 1) if trains else (1, 0)
    split, kernel, own = sharding.shards("tokens", mesh), KERNELS.get(platform), taken(model, packing, mesh, platform)
    tokens, text = map(jnp.asarray, segments)
    found: list[float | None] = []
    more = read = 0.0
    # Captions are met by a device's own tokens; for those among each other it has all tokens of some heads.
    for what, keys, parts in ((AMONG, tokens, 1), (CAPTIONS, text, split)):
        if kernel is None or what not in own:
            found.append(None)
            continue
        bq, bk = kernel.blocks(tokens.shape[1] // parts, keys.shape[1])
        met = blockwise.meetings(blockwise.in_blocks(tokens, bq), blockwise.in_blocks(keys, bk), bq, bk)
        of_a_step = int(met.sum()) * packing.rows / len(tokens)
        size = model.width // model.heads
        pairs = of_a_step * bq * bk * kernel.head(size) / size
        found.append(pairs)
        if trains:
            more += MORE_BACKWARD * 2 * pairs * model.width * model.blocks - kept(model, pairs)
        if kernel.reads_again:
            # Two arrays in bfloat16 of all heads: keys and values, or queries and what their gradients are of.
            read += of_a_step * (over_keys * bk + over_queries * bq) * model.width * 2 * 2 * model.blocks
    return Work(found[0], found[1], more, read)


def kept(model: DiTConfig, pairs: float) -> float:
    """FLOPs that a policy saves that keeps what kernels gave, where the reference is computed again (compute.dit)."""
    return 2 * 2 * pairs * model.width * model.blocks if model.remat in dit_model.KEEPS_ATTENTION else 0.0


def _remedy(backend: Backend, now: dict[str, int], better: dict[str, int]) -> str:
    """The fewest settings that give attention a kernel."""
    changes = [name for name in now if better[name] != now[name]]
    for count in range(1, len(changes) + 1):
        for names in itertools.combinations(changes, count):
            if backend(*(now | {name: better[name] for name in names}).values()) != "blockwise":
                return "set " + " and ".join(f"{name}={better[name]}" for name in names)
    return "there is none that takes it"

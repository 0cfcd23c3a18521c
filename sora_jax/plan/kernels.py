"""Which attention of a model has no kernel on its chips, and what would give it one.

Without one it goes block by block, in loops whose length depends on the data: a plan counts them once, and its times are too short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from jax.sharding import AbstractMesh, Mesh

from sora_jax import sharding
from sora_jax.data.pack import PackConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.nn import attention, kernels

# By platform: the kernel, and what numbers of tokens it takes are multiples of.
KERNELS = {
    "tpu": ("splash", kernels.SPLASH_LANES),
    "gpu": ("triton", kernels.TRITON_BLOCK),
    "cuda": ("triton", kernels.TRITON_BLOCK),
}


def missing(model: DiTConfig, packing: PackConfig, mesh: Mesh | AbstractMesh, platform: str) -> list[str]:
    """A sentence for each attention that goes without the kernel of a platform's chips: which, and the remedy.

    Nothing of platforms that have no kernel.
    """
    if platform not in KERNELS:
        return []
    kernel, step = KERNELS[platform]
    rows = packing.rows // sharding.shards("rows", mesh)
    heads, split = model.heads // sharding.shards("heads", mesh), sharding.shards("tokens", mesh)
    now = {"pack.row_tokens": packing.row_tokens, "pack.row_text": packing.row_text, "mesh.sequence": split}
    better = {
        "pack.row_tokens": _up(packing.row_tokens, step * split),
        "pack.row_text": _up(packing.row_text, step),
        "mesh.sequence": math.gcd(heads, split),
    }

    def among_tokens(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, rows, tokens, tokens, heads, split)

    def to_captions(tokens: int, text: int, split: int) -> str:
        return attention.chosen(platform, rows, tokens // split, text, heads)

    if model.attention == "blockwise":
        return [f"dit.attention=blockwise takes no {kernel} kernel: set dit.attention=auto"]
    parts = {"to captions": to_captions}
    if model.attention == "auto":
        parts = {"among a row's tokens": among_tokens} | parts
    return [
        f"no {kernel} kernel for attention {what}: {_remedy(backend, now, better)}"
        for what, backend in parts.items()
        if backend(*now.values()) == "blockwise"
    ]


def _remedy(backend: Callable[[int, int, int], str], now: dict[str, int], better: dict[str, int]) -> str:
    """The fewest settings that give attention a kernel."""
    changes = [name for name in now if better[name] != now[name]]
    for count in range(1, len(changes) + 1):
        for names in itertools.combinations(changes, count):
            if backend(*(now | {name: better[name] for name in names}).values()) != "blockwise":
                return "set " + " and ".join(f"{name}={better[name]}" for name in names)
    return "there is none that takes it"


def _up(value: int, step: int) -> int:
    return -(-value // step) * step

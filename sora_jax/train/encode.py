"""Encode the clips of a world once: latents for the diffusion transformer's loader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sora_jax import processes, sharding
from sora_jax.checkpoint import fingerprints
from sora_jax.config import DataConfig
from sora_jax.data import latents
from sora_jax.data.worlds import clips
from sora_jax.data.worlds.world import Split
from sora_jax.generate.codec import Codec
from sora_jax.models.vae import VAEConfig

# Clips in memory at a time.
AT_ONCE = 1024
SPLITS: tuple[Split, ...] = ("train", "heldout")


def fingerprint_of(params: Any) -> str:
    """What tells the weights of one VAE from those of another, wherever they lie."""
    prints = fingerprints({sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)})
    return hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()


def encode_all(
    folder: Path, data: DataConfig, config: VAEConfig, params: Any, rest: Any
) -> dict[Split, latents.LatentStore]:
    """The stores of both splits in folder, encoded by the VAE of these weights; of several processes the first does it."""
    network, name = Codec(config, params, rest), fingerprint_of(params)

    def of(split: Split) -> latents.LatentStore:
        return processes.first_then_all(lambda: encode_split(folder, data, split, network, name))

    return {split: of(split) for split in SPLITS}


def encode_split(folder: Path, data: DataConfig, split: Split, network: Codec, fingerprint: str) -> latents.LatentStore:
    """The store of a split in folder, under a name of its data and VAE: runs that train on the same share it."""
    count = {"train": data.train_clips, "heldout": data.heldout_clips}[split]
    meta = json.loads(
        json.dumps(
            {"world": dataclasses.asdict(data.world), "split": split, "clips": count, "vae": fingerprint}
            | {"format": latents.FORMAT}
        )
    )
    path = folder / f"latents-{split}-{hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:12]}"
    if (path / "store.json").exists():
        return latents.LatentStore(path)
    logging.info("encoding %d %s clips to %s", count, split, path)

    def encoded() -> Iterator[latents.Latent]:
        for start in range(0, count, AT_ONCE):
            some = list(clips.clips(data.world, split, range(start, min(count, start + AT_ONCE))))
            for clip, (mean, std) in zip(some, network.encode([clip.frames_THWC for clip in some]), strict=True):
                yield latents.Latent(clip.id, mean, std, clip.fps, clip.captions, clip.to_and_fro)

    return latents.write(path, encoded(), meta)

"""Encode the clips of a world once: latents for the diffusion transformer's loader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sora_jax import fingerprints, processes, sharding
from sora_jax.config import DataConfig
from sora_jax.data import latents
from sora_jax.data.worlds import clips
from sora_jax.data.worlds.world import Split, WorldConfig
from sora_jax.generate.codec import Codec
from sora_jax.models.vae import VAEConfig

# Clips of a part of a store, and bytes of their frames: what of a data set is in memory at a time.
PART_CLIPS, PART_BYTES = 1024, 2**30
TOLD_EVERY = 60.0  # seconds between two lines of progress
SPLITS: tuple[Split, ...] = ("train", "heldout")


def fingerprint_of(params: Any) -> str:
    """What tells the weights of one VAE from those of another, wherever they lie."""
    prints = fingerprints.of({sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)})
    return hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()


def encode_all(
    folder: Path, data: DataConfig, config: VAEConfig, params: Any, rest: Any
) -> dict[Split, latents.LatentStore]:
    """The stores of both splits in folder, encoded by the VAE of these weights; each of several processes does its part, on all
    of its own devices."""
    network, name = Codec(config, params, rest), fingerprint_of(params)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())):
        return {split: encode_split(folder, data, split, network, name) for split in SPLITS}


def encode_split(folder: Path, data: DataConfig, split: Split, network: Codec, fingerprint: str) -> latents.LatentStore:
    """The store of a split in folder, under a name of its data and VAE: runs that train on the same share it.

    It is made of parts, each a store by itself, of which every process encodes every so many; parts that are there already,
    from a run that was stopped, are kept. The first process joins them.
    """
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

    spans = part_spans(count, data.world)
    parts = [path.with_name(f"{path.name}.parts") / f"{span.start}-{span.stop}" for span in spans]
    began, mine = time.monotonic(), range(jax.process_index(), len(spans), jax.process_count())
    for done, number in enumerate(mine):
        if time.monotonic() > began + TOLD_EVERY:
            began = time.monotonic()
            logging.info("encoded %d of %d parts of %s clips", done, len(mine), split)
        if not (parts[number] / "store.json").exists():
            latents.write(parts[number], _encoded(data, split, spans[number], network), meta)

    def joined() -> latents.LatentStore:
        if not (path / "store.json").exists():
            latents.join(path, [latents.LatentStore(part) for part in parts], meta)
            shutil.rmtree(path.with_name(f"{path.name}.parts"))
        return latents.LatentStore(path)

    processes.meet()
    return processes.first_then_all(joined)


def part_spans(count: int, world: WorldConfig) -> list[range]:
    """Clips 0 .. count - 1 in parts, of which all frames fit into memory."""
    largest = max(3 * max(world.frame_counts) * math.prod(size) for size in world.clip_sizes)
    clips_each = max(1, min(PART_CLIPS, PART_BYTES // largest))
    return [range(start, min(count, start + clips_each)) for start in range(0, count, clips_each)]


def _encoded(data: DataConfig, split: Split, span: range, network: Codec) -> Iterator[latents.Latent]:
    some = list(clips.clips(data.world, split, span))
    for clip, (mean, std) in zip(some, network.encode([clip.frames_THWC for clip in some]), strict=True):
        yield latents.Latent(clip.id, mean, std, clip.fps, clip.captions, clip.to_and_fro)

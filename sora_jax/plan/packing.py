"""How the clips of a world will fill rows, found by packing many of their sizes without their pixels."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.config import ConfigError, DiTRun
from sora_jax.data import latents, loader, pack
from sora_jax.data.worlds import captions, world
from sora_jax.models.vae import VAEConfig
from sora_jax.train import dit

# Scenes whose sizes stand for the data.
SCENES = 2000


class Packed(NamedTuple):
    """How the world's clips fill rows: shares, counts of a step, the pairs of tokens (and of tokens and words) that attention has
    use for in it, and the segments of the tokens and words of some rows."""

    fill: float
    clips_per_step: float
    pairs: float
    text_pairs: float
    segment_RN: np.ndarray
    text_segment_RL: np.ndarray


def packed(run: DiTRun, network: VAEConfig) -> Packed:
    """Of many clips of the run's world, each as the loader draws it: with its caption, what of it is known, and dropped tokens.

    A caption counts as its words, signs and two marks: tokenisers are not asked. How many repeats drop_repeats leaves out is told
    by pixels, and none are. Raises ConfigError for clips that no row can hold, or so few that there is no batch.
    """
    found = run.data.world
    dit.longest_clip(run, network)
    packing = dataclasses.replace(run.pack, drop_repeats=0.0)
    geometry = pack.Geometry(run.dit.patch, network.stride)
    tokeniser = loader.Tokeniser(
        run.loader, packing, geometry, functools.partial(_counted, run.text.max_tokens), run.seed
    )
    clips = []
    for number in range(SCENES):
        scene = world.sample_scene(found, "train", number)
        nothing = np.zeros((*network.latent_shape(scene.num_frames, scene.height, scene.width)[:3], 0), np.float32)
        texts = captions.captions(scene, len(found.sizes) > 1)
        clips.append(tokeniser(latents.Latent(number, nothing, nothing, scene.fps, texts), 0)[0])
    count, rows = pack.Count(), list[Sequence[pack.Tokens]]()
    for start in range(0, len(clips), run.pack.window):
        made, counted = pack.pack_rows(clips[start : start + run.pack.window], run.pack, np.random.default_rng(start))
        rows += made
        count.add(counted)
    if run.data.train_clips * len(rows) / len(clips) < run.pack.rows:
        raise ConfigError(
            f"{run.data.train_clips} clips fill {run.data.train_clips * len(rows) / len(clips):.1f} rows, less than a batch of "
            f"{run.pack.rows}; raise data.train_clips or lower pack.rows"
        )
    each = run.pack.rows / len(rows)
    return Packed(
        count.fill,
        each * len(clips),
        each * count.pairs,
        each * count.text_pairs,
        segments([[len(clip.index_N) for clip in row] for row in rows], run.pack.row_tokens),
        segments([[clip.num_text for clip in row] for row in rows], run.pack.row_text),
    )


def segments(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 (R, length): 1, 2, .. for the tokens of the clips of each row, so many of each, and 0 for padding."""
    found = np.zeros((len(rows), length), np.int32)
    for row, sizes in zip(found, rows, strict=True):
        row[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return found


def _counted(most: int, caption: str) -> tuple[None, np.ndarray]:
    """As many tokens as a caption has words and signs, and two marks."""
    return None, np.zeros(min(most, len(re.findall(r"\w+|[^\w\s]", caption)) + 2), np.int32)

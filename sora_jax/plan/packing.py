"""How the clips of a world will fill rows, found by packing many of their sizes without their pixels."""

from __future__ import annotations

import math

import numpy as np

from sora_jax.config import ConfigError, DiTRun
from sora_jax.data import pack
from sora_jax.data.worlds import captions, world
from sora_jax.models.vae import VAEConfig
from sora_jax.train import dit

# Scenes whose sizes stand for the data.
SCENES = 2000


def packed(run: DiTRun, network: VAEConfig) -> dict[str, float]:
    """How the world's clips fill rows, and the pairs of tokens that attention has use for in a step.

    A caption counts as its words and two marks: tokenisers are not asked. Raises ConfigError for clips that no row can hold, or
    so few that there is no batch.
    """
    found = run.data.world
    dit.longest_clip(run, network)
    clips = []
    for number in range(SCENES):
        scene = world.sample_scene(found, "train", number)
        shape = network.latent_shape(scene.num_frames, scene.height, scene.width)
        tokens = math.prod(pack.grid_shape(shape, run.dit.patch))
        # What any tokeniser makes of it at least: its words and two marks.
        words = min(run.text.max_tokens, len(captions.prompt(scene, len(found.sizes) > 1).split()) + 2)
        clips.append(_counted(number, tokens, words))
    count, rows = pack.Count(), 0
    for start in range(0, len(clips), run.pack.window):
        made, counted = pack.pack_rows(clips[start : start + run.pack.window], run.pack, np.random.default_rng(start))
        rows += len(made)
        count.add(counted)
    if run.data.train_clips * rows / len(clips) < run.pack.rows:
        raise ConfigError(
            f"{run.data.train_clips} clips fill {run.data.train_clips * rows / len(clips):.1f} rows, less than a batch of "
            f"{run.pack.rows}; raise data.train_clips or lower pack.rows"
        )
    each = run.pack.rows / rows
    return {
        "fill": count.fill,
        "clips_per_step": each * len(clips),
        "pairs": each * count.pairs,
        "text_pairs": each * count.text_pairs,
    }


def _counted(number: int, tokens: int, words: int) -> pack.Tokens:
    """A clip of so many tokens, without their values."""
    nothing = np.zeros((tokens, 0), np.float32)
    return pack.Tokens(
        mean_NP=nothing,
        std_NP=nothing,
        position_N3=nothing,
        index_N=np.arange(tokens, dtype=np.int32),
        known_N=np.zeros(tokens, bool),
        ceiling=1.0,
        extent_3=np.zeros(3, np.float32),
        clip=number,
        draw=0,
        text_LM=None,
        text_token_L=np.zeros(words, np.int32),
    )

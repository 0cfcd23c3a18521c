"""Scene number i of a world as a clip: pixels, captions and the scene itself."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sora_jax import structs
from sora_jax.data.worlds import captions, render, world
from sora_jax.data.worlds.scene import Scene

# Clips drawn together by clips(): enough to fill its groups, few enough for the cache and for the first to come soon.
CLIPS_AT_ONCE = 256
PIXELS_AT_ONCE = 2**21
LEAST_WAY = 4  # steps between two turns of a clip that is played to and fro
TO_AND_FRO = 2  # its key, beside those of the splits


def clip(config: world.WorldConfig, split: world.Split, index: int) -> structs.Clip:
    """Clip number `index` of a split; its id is the index, so ids are unique within a split."""
    return next(clips(config, split, [index]))


def clips(config: world.WorldConfig, split: world.Split, indices: Iterable[int]) -> Iterator[structs.Clip]:
    """The clips of these indices, in this order; equal to clip() on each, and many times faster."""
    for some in _batched(indices, CLIPS_AT_ONCE):
        drawn = [world.sample_scene(config, split, index) for index in some]
        for index, scene, frames_THWC in zip(some, drawn, render_mixed(drawn), strict=True):
            clip = structs.Clip(
                id=index,
                frames_THWC=frames_THWC,
                fps=scene.fps,
                captions=captions.captions(scene, size_words=len(config.sizes) > 1),
                scene=scene,
            )
            yield _played(clip, config) if split == "train" and config.to_and_fro else clip


def _played(clip: structs.Clip, config: world.WorldConfig) -> structs.Clip:
    """The clip, or by chance its frames to and fro; a way is at most half of it, so that it comes back."""
    rng = np.random.default_rng((config.seed, TO_AND_FRO, clip.id))
    last = len(clip.frames_THWC) - 1
    if rng.random() >= config.to_and_fro or last < 2 * LEAST_WAY:
        return clip
    way = int(rng.integers(LEAST_WAY, last // 2 + 1))
    start, phase = int(rng.integers(last - way + 1)), int(rng.integers(2 * way))
    order_T = start + np.abs((np.arange(last + 1) + phase) % (2 * way) - way)
    return dataclasses.replace(clip, frames_THWC=clip.frames_THWC[order_T], scene=None, to_and_fro=True)


def render_mixed(drawn: Sequence[Scene]) -> list[np.ndarray]:
    """Renders scenes of any frame counts and sizes, in order: uint8 (T, H, W, 3) each."""
    groups = collections.defaultdict(list)
    for number, scene in enumerate(drawn):
        groups[scene.num_frames, scene.height, scene.width].append(number)
    frames: list[np.ndarray] = [np.empty(0, np.uint8)] * len(drawn)
    for (num_frames, height, width), members in groups.items():
        for some in _batched(members, max(1, PIXELS_AT_ONCE // (num_frames * height * width))):
            frames_BTHWC = render.render([drawn[number] for number in some])
            for number, frames_THWC in zip(some, frames_BTHWC, strict=True):
                frames[number] = frames_THWC
    return frames


def _batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some

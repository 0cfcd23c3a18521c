"""Do videos show what was asked for? Attributes read from pixels, between the floor of chance and the ceiling of real clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora_jax.data.worlds import captions
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import reader

ATTRIBUTES = ("colour", "shape", "size", "motion", "relation", "background", "all")


def judge(
    videos: Sequence[np.ndarray], scenes: Sequence[Scene], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(adherence, floor): the share of videos whose attribute is right, and the same against shuffled scenes.

    "all" is colour, shape and motion of every thing, whole, and the relation, but not size and background; "count" is the number
    of videos.
    """
    readings = reader.read_many(videos)
    scores = reader.score_readings(readings, scenes), reader.shuffled_floor(readings, scenes, seed)
    adherence, floor = ({name: score[name] for name in ATTRIBUTES if name in score} for score in scores)
    return adherence | {"count": float(len(videos))}, floor


def in_words(video: np.ndarray) -> str:
    """What the reader sees, as a caption would say it; 'nothing' for a video without a thing in it."""
    reading = reader.read(video)
    if reading is None:
        return "nothing"
    things = []
    for thing in reading.things:
        motion = f" {captions.MOTION_WORDS[thing.motion][0]}" if thing.motion else ""
        pieces = "" if thing.whole else " in pieces"
        things.append(f"a {thing.colour} {thing.shape}{pieces}{motion}")
    return f" {captions.RELATION_WORDS.get(reading.relation or '', 'and')} ".join(things)

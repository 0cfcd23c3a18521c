"""Do videos show what was asked for? Attributes read from pixels, between the floor of chance and a ceiling, which callers make of
real clips through the VAE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora_jax.data.worlds import captions
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import reader

ATTRIBUTES = ("colour", "shape", "size", "motion", "relation", "background", "all", "frames")


def judge(
    videos: Sequence[np.ndarray], scenes: Sequence[Scene], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(adherence, floor): the share of videos whose attribute is right, and the same against shuffled scenes.

    "all" is colour, shape and motion of every thing, whole and lasting, and the relation, but not size and background; "frames"
    the share of a video's frames that show by themselves every thing, whole, of its colour and shape; "count" is the number of
    videos.
    """
    readings, frames = reader.read_many(videos), reader.read_frames(videos)
    scores = reader.score_readings(readings, scenes), reader.shuffled_floor(readings, scenes, seed)
    adherence, floor = (
        {name: score[name] for name in ATTRIBUTES if name in score} | {"frames": of_frames(frames, wanted)}
        for score, wanted in zip(scores, (scenes, reader.shuffled(scenes, seed)), strict=True)
    )
    return adherence | {"count": float(len(videos))}, floor


def of_frames(readings: Sequence[Sequence[reader.Reading | None]], scenes: Sequence[Scene]) -> float:
    """The share of frames that are right, see reader.frames_right; each video counts the same."""
    return float(np.mean([right_T.mean() for right_T in reader.frames_right(readings, scenes)]))


def in_words(video: np.ndarray) -> str:
    """What the reader sees, as a caption would say it; 'nothing' for a video without a thing in it."""
    reading = reader.read(video)
    if reading is None:
        return "nothing"
    things = []
    for thing in reading.things:
        motion = f" {captions.MOTION_WORDS[thing.motion][0]}" if thing.motion else ""
        pieces = "" if thing.whole else " in pieces"
        gone = "" if thing.lasts else ", not always there,"
        things.append(f"a {thing.colour} {thing.shape}{pieces}{gone}{motion}")
    return f" {captions.RELATION_WORDS.get(reading.relation or '', 'and')} ".join(things)

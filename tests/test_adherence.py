"""The judge: real clips are right, chance is the floor, and what is read is said in words."""

import numpy as np

from sora_jax.data.worlds import clips, world
from sora_jax.evaluate import adherence


def test_real_clips_are_right_and_the_floor_is_chance():
    found = [clip for clip in clips.clips(world.COMPACT, "heldout", range(80)) if not clip.scene.is_image]
    videos, scenes = [clip.frames_THWC for clip in found], [clip.scene for clip in found]
    scores, floor = adherence.judge(videos, scenes, seed=0)
    assert scores["count"] == len(found) and all(
        scores[name] >= 0.98 for name in ("colour", "shape", "motion", "all", "frames")
    )
    assert floor["all"] < 0.1 and floor["shape"] < 0.5 and floor["frames"] < 0.2
    assert [*scores] == [name for name in (*adherence.ATTRIBUTES, "count") if name != "relation"] and [*floor] == [
        *scores
    ][:-1]


def test_in_words():
    found = next(
        clip for clip in clips.clips(world.COMPACT, "train", range(40)) if clip.scene.things[0].motion == "left"
    )
    thing = found.scene.things[0]
    assert adherence.in_words(found.frames_THWC) == f"a {thing.colour} {thing.shape} moves left"
    twice = np.concatenate([found.frames_THWC] * 2, axis=1)
    assert f" {thing.shape} in pieces" in adherence.in_words(twice)
    gone = found.frames_THWC.copy()
    gone[1] = gone[1, 0, 0]
    assert adherence.in_words(gone) == f"a {thing.colour} {thing.shape}, not always there, moves left"
    assert adherence.in_words(np.zeros((5, 32, 32, 3), np.uint8)) == "nothing"

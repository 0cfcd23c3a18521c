"""The reader: real clips read as what they are, also when blurred; blank ones are wrong, and nothing crashes."""

import dataclasses
import functools

import numpy as np
import pytest

from sora_jax.data.worlds import clips, world
from sora_jax.data.worlds.scene import REACH, track
from sora_jax.evaluate import reader

PAIRS = dataclasses.replace(world.FULL, two_things_fraction=1.0)
WORLDS = {"compact": world.COMPACT, "full": world.FULL, "pairs": PAIRS}
each_world = pytest.mark.parametrize("name", WORLDS)
ATTRIBUTES = ("colour", "shape", "size", "motion", "background", "all")
COUNT = 120


@functools.cache
def _clips(name: str):
    return list(clips.clips(WORLDS[name], "train", range(COUNT)))


@functools.cache
def _readings(name: str):
    return reader.read_many([clip.frames_THWC for clip in _clips(name)])


def _scenes(name: str):
    return [clip.scene for clip in _clips(name)]


def _worsen(frames_THWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of 1 px and noise of 0.03 on [-1, 1]."""
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    kernel /= kernel.sum()
    video = frames_THWC / 127.5 - 1
    for axis in (1, 2):
        wide = np.pad(video, [(3, 3) if it == axis else (0, 0) for it in range(4)], mode="edge")
        video = sum(
            weight * np.take(wide, range(step, step + video.shape[axis]), axis) for step, weight in enumerate(kernel)
        )
    return (video + rng.normal(0, 0.03, video.shape)).astype(np.float32)


@each_world
def test_real_clips_read_as_they_are(name):
    score = reader.score_readings(_readings(name), _scenes(name))
    assert all(score[attribute] >= 0.98 for attribute in ATTRIBUTES), score
    assert name == "compact" or score["relation"] >= 0.98


@each_world
def test_blur_and_noise_do_not_matter(name):
    rng = np.random.default_rng(0)
    some = [clip for clip in _clips(name) if clip.frames_THWC[..., 0].size < 60_000]
    score = reader.score([_worsen(clip.frames_THWC, rng) for clip in some], [clip.scene for clip in some])
    assert all(score[attribute] >= 0.95 for attribute in ATTRIBUTES), score


def test_the_floor_is_near_chance():
    """Chance is 1/8, 1/4 and 1/7 in this world."""
    floors = [reader.shuffled_floor(_readings("compact"), _scenes("compact"), seed) for seed in range(20)]
    mean = {name: np.mean([floor[name] for floor in floors]) for name in ATTRIBUTES}
    assert mean["colour"] == pytest.approx(1 / 8, abs=0.05)
    assert mean["shape"] == pytest.approx(1 / 4, abs=0.05)
    assert mean["motion"] == pytest.approx(1 / 7, abs=0.05)
    assert mean["all"] < 0.03
    assert floors[0]["motion_count"] == reader.score_readings(_readings("compact"), _scenes("compact"))["motion_count"]


@pytest.mark.parametrize("attribute", ["colour", "shape", "motion"])
def test_one_wrong_attribute_is_wrong_there_and_in_all(attribute):
    """Scores are of attributes: change one in every scene and only it, and all, fall to nothing."""
    other = {"colour": ("red", "blue"), "shape": ("star", "circle"), "motion": ("left", "up")}[attribute]
    scenes, readings = [], []
    for reading, scene in zip(_readings("compact"), _scenes("compact"), strict=True):
        if scene.is_image:
            continue
        (thing,) = scene.things
        wrong = next(word for word in other if word != getattr(thing, attribute))
        scenes.append(dataclasses.replace(scene, things=(dataclasses.replace(thing, **{attribute: wrong}),)))
        readings.append(reading)
    score = reader.score_readings(readings, scenes)
    assert score[attribute] == score["all"] == 0
    assert all(score[name] >= 0.98 for name in ("colour", "shape", "motion") if name != attribute)


def test_a_pair_needs_both_things_and_its_relation():
    turned = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    scenes = [dataclasses.replace(it, relation=turned[it.relation]) for it in _scenes("pairs")]
    score = reader.score_readings(_readings("pairs"), scenes)
    assert score["relation"] == score["all"] == 0 and score["colour"] >= 0.98
    halves = [it and dataclasses.replace(it, things=it.things[:1], relation=None) for it in _readings("pairs")]
    score = reader.score_readings(halves, _scenes("pairs"))
    assert score["relation"] == score["all"] == 0 and score["colour"] == pytest.approx(0.5, abs=0.02)
    assert score["colour_count"] == 2 * COUNT


def test_a_thing_too_many_is_wrong():
    more = [dataclasses.replace(it, things=it.things * 2) for it in _readings("compact")]
    score = reader.score_readings(more, _scenes("compact"))
    assert score["all"] == 0 and score["colour"] >= 0.98


def test_a_thing_in_pieces_is_wrong():
    """The same thing twice, as models under-trained make it: colour, shape and motion may be read right, all must not."""
    chosen = [clip for clip in _clips("compact") if clip.scene.relation is None]
    twice, scenes = [], []
    for clip in chosen:
        frames = clip.frames_THWC
        # Of a second frame beside the first the background is the same, so nothing but the thing is doubled.
        twice.append(np.concatenate([frames, frames], axis=2))
        scenes.append(clip.scene)
    readings = reader.read_many(twice)
    assert not any(thing.whole for reading in readings for thing in reading.things)
    assert reader.score_readings(readings, scenes)["all"] == 0
    for name in WORLDS:
        assert np.mean([thing.whole for reading in _readings(name) for thing in reading.things]) == 1


def test_a_thing_is_inside_where_nothing_of_it_is_cut_off():
    native, squares = (
        dataclasses.replace(world.COMPACT, frame_sizes=((32, 48), (48, 32)), square=square) for square in (False, True)
    )
    seen = set()
    for index in range(60):
        whole, cut = (world.sample_scene(config, "train", index) for config in (native, squares))
        assert reader.inside(clips.render_mixed([whole])[0]).all()
        path_T3 = track(cut.things[0], cut.num_frames)
        reach_2 = np.array(REACH[cut.things[0].shape])
        beyond = np.max(
            [reach_2 * path_T3[:, 2:] - path_T3[:, :2], path_T3[:, :2] + reach_2 * path_T3[:, 2:] - 32], (0, 2)
        )
        inside = reader.inside(clips.render_mixed([cut])[0])
        assert inside[beyond < -0.5].all()
        # The others do not reach as far on every side.
        if cut.things[0].shape in ("circle", "square"):
            assert not inside[beyond > 2].any()
        seen |= set(inside.tolist())
    assert seen == {True, False}
    assert not reader.inside(np.full((3, 32, 32, 3), 128, np.uint8)).any()


def test_images_do_not_count_for_motion():
    images = [clip for clip in _clips("full") if clip.scene.is_image]
    score = reader.score([clip.frames_THWC for clip in images], [clip.scene for clip in images])
    assert images and "motion" not in score and score["all"] >= 0.98
    assert reader.read(images[0].frames_THWC).things[0].motion is None


def test_time_reversed_is_the_opposite_motion():
    """Motion comes from the order of frames alone."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    for clip, reading in zip(_clips("compact"), _readings("compact"), strict=True):
        motion = reading.things[0].motion
        if motion is not None:
            assert reader.read(clip.frames_THWC[::-1]).things[0].motion == opposite.get(motion, motion)


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_nothing_is_none_and_nothing_crashes(num_frames):
    shape = (num_frames, 32, 48, 3)
    rng = np.random.default_rng(0)
    speck = np.zeros(shape, np.uint8)
    speck[:, 5:7, 5:7, 0] = 255
    broken = np.full(shape, -1.0, np.float32)
    broken[:, 8:20, 8:20, 0] = 1.0
    assert reader.read(broken).things[0].shape == "square"
    broken[-1, 0, 0] = np.nan
    blank = [
        np.zeros(shape, np.uint8),
        np.full(shape, 255, np.uint8),
        np.zeros(shape, np.float32),
        np.full(shape, np.nan, np.float32),
        np.broadcast_to(rng.integers(0, 256, (*shape[:3], 1), np.uint8), shape),
        speck,
        broken,
    ]
    assert reader.read_many(blank) == [None] * len(blank)
    flash = np.zeros(shape, np.uint8)
    flash[-1, 8:20, 8:20, 0] = 255
    full = np.zeros(shape, np.uint8)
    full[..., 0] = 255
    noise = rng.integers(0, 256, shape, np.uint8)
    wild = rng.normal(0, 100, shape)
    odd = [flash, full, noise, wild, noise[:, :3, :2], flash[:, 7:21, 7:21]]
    reader.read_many(odd)
    scene = world.sample_scene(world.COMPACT, "train", 0)
    assert set(reader.score(blank, [scene] * len(blank)).values()) == {0.0, float(len(blank))}


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="T, H, W, 3"):
        reader.read(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="one per scene"):
        reader.score_readings([None], [])


@each_world
def test_frames_of_real_clips_are_right_by_themselves(name):
    frames = reader.read_frames([clip.frames_THWC for clip in _clips(name)])
    right = reader.frames_right(frames, _scenes(name))
    assert [len(right_T) for right_T in right] == [scene.num_frames for scene in _scenes(name)]
    assert np.mean([right_T.mean() for right_T in right]) >= 0.98


def test_a_thing_that_comes_apart_in_a_frame_is_wrong_there_alone():
    """The video as a whole is right: it is read in the mean and the median over frames."""
    clip = next(
        clip for clip in _clips("compact") if clip.scene.num_frames > 8 and clip.scene.things[0].motion == "left"
    )
    frames_THWC = np.concatenate(
        [clip.frames_THWC, np.broadcast_to(clip.frames_THWC[:, :1, :1], clip.frames_THWC.shape)], 2
    )
    frames_THWC[3] = np.concatenate([clip.frames_THWC[3]] * 2, axis=1)  # twice, side by side
    (right_T,) = reader.frames_right(reader.read_frames([frames_THWC]), [clip.scene])
    assert not right_T[3] and right_T.sum() == len(right_T) - 1
    (reading,) = reader.read_many([frames_THWC])
    assert reading.things[0].whole and reading.things[0].shape == clip.scene.things[0].shape
    other = dataclasses.replace(clip.scene.things[0], colour="red" if clip.scene.things[0].colour != "red" else "blue")
    (right_T,) = reader.frames_right(
        reader.read_frames([frames_THWC]), [dataclasses.replace(clip.scene, things=(other,))]
    )
    assert not right_T.any()


@pytest.mark.parametrize("gone", [slice(1, None, 2), slice(9, None), slice(8, 9)])
def test_a_thing_that_is_gone_for_a_while_is_wrong(gone):
    """Colour, shape and motion are read from the frames that show it, and right; all must not be."""
    clip = next(
        clip for clip in _clips("compact") if clip.scene.num_frames == 17 and clip.scene.things[0].motion == "left"
    )
    frames_THWC = clip.frames_THWC.copy()
    frames_THWC[gone] = frames_THWC[:1, :1, :1]
    score = reader.score([frames_THWC], [clip.scene])
    assert score["colour"] == score["shape"] == score["motion"] == 1 and score["all"] == 0
    for name in WORLDS:
        assert all(thing.lasts for reading in _readings(name) for thing in reading.things)

"""Procedural worlds: deterministic, exact, split as they say, and described in full."""

import dataclasses
import itertools

import numpy as np
import pytest

from sora_jax.data.worlds import captions, clips, render, scene, world

PAIRS = dataclasses.replace(world.FULL, two_things_fraction=1.0)
WORLDS = {"compact": world.COMPACT, "full": world.FULL, "pairs": PAIRS}
each_world = pytest.mark.parametrize("config", WORLDS.values(), ids=WORLDS.keys())


def _scenes(config: world.WorldConfig, split: world.Split, count: int) -> list[scene.Scene]:
    return [world.sample_scene(config, split, index) for index in range(count)]


def test_colours_have_one_chroma_and_backgrounds_none():
    for rgb in scene.COLOURS.values():
        assert max(rgb) - min(rgb) == scene.CHROMA and min(rgb) >= 0 and max(rgb) <= 255
    for scene_ in _scenes(world.FULL, "train", 60):
        empty = render.render([dataclasses.replace(scene_, things=())])
        assert (empty.max(-1) == empty.min(-1)).all()


def test_chroma_is_coverage():
    """Chroma / CHROMA is the coverage of each pixel, and its sum is the area of the shape, wherever it is."""
    for scene_ in _scenes(dataclasses.replace(world.FULL, two_things_fraction=0.0), "train", 200):
        frames_THWC = render.render([scene_])[0].astype(int)
        cover_THW = (frames_THWC.max(-1) - frames_THWC.min(-1)) / scene.CHROMA
        (thing,) = scene_.things
        track_T3 = scene.track(thing, scene_.num_frames)
        grid_y, grid_x = np.meshgrid(np.arange(scene_.height) + 0.5, np.arange(scene_.width) + 0.5, indexing="ij")
        for cover_HW, (y, x, radius) in zip(cover_THW, track_T3, strict=True):
            exact_HW = render.coverage(thing.shape, grid_y - y, grid_x - x, np.array([[radius]]))
            np.testing.assert_allclose(cover_HW, exact_HW, atol=1.01 / scene.CHROMA)
            area = scene.AREA[thing.shape] * radius**2
            np.testing.assert_allclose(cover_HW.sum(), area, rtol=0.06, atol=1.0)
            centroid = (cover_HW * grid_y).sum() / cover_HW.sum(), (cover_HW * grid_x).sum() / cover_HW.sum()
            np.testing.assert_allclose(centroid, (y, x), atol=0.2)


@pytest.mark.parametrize("shape", scene.SHAPES)
def test_shapes_have_their_area_reach_and_centroid(shape):
    """On a fine grid: the constants that placement and reading rely on are those of what is drawn."""
    at = np.arange(-150, 151, dtype=float)
    cover = render.coverage(shape, at[:, None], at[None, :], np.array([[100.0]]))
    assert cover.sum() == pytest.approx(scene.AREA[shape] * 100**2, rel=0.002)
    y, x = (np.abs(at[(cover > 0).any(axis)]) for axis in (1, 0))
    assert (y.max(), x.max()) == pytest.approx(tuple(100 * reach for reach in scene.REACH[shape]), abs=1.5)
    assert (at[:, None] * cover).sum() / cover.sum() == pytest.approx(0, abs=0.2)
    assert (at[None, :] * cover).sum() / cover.sum() == pytest.approx(0, abs=0.2)


@each_world
def test_scenes_do_not_depend_on_order(config):
    forward = _scenes(config, "train", 50)
    backward = [world.sample_scene(config, "train", index) for index in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 50
    frames = [(it.height, it.width, it.num_frames, it.background) for it in forward]
    for others in (_scenes(config, "heldout", 50), _scenes(dataclasses.replace(config, seed=1), "train", 50)):
        assert frames != [(it.height, it.width, it.num_frames, it.background) for it in others]


@each_world
def test_clips_are_the_same_alone_and_together(config):
    indices = [7, 3, 300, 4, 11, 3]
    for index, together in zip(indices, clips.clips(config, "train", indices), strict=True):
        alone = clips.clip(config, "train", index)
        np.testing.assert_array_equal(alone.frames_THWC, together.frames_THWC)
        assert (alone.id, alone.scene, alone.captions) == (together.id, together.scene, together.captions)
        shape = (alone.scene.num_frames, alone.scene.height, alone.scene.width, 3)
        assert alone.id == index and alone.frames_THWC.shape == shape and alone.frames_THWC.dtype == np.uint8


@each_world
def test_heldout_combinations_are_never_trained_on(config):
    heldout = world.heldout_combinations(config)
    for scene_ in _scenes(config, "train", 1500):
        assert not any(thing.combination in heldout for thing in scene_.things)
        assert world.split_of(config, scene_) == "train"
    shown = {thing.combination for it in _scenes(config, "heldout", 500) for thing in it.things} & heldout
    assert len(shown) > 0.8 * len(heldout)
    assert all(world.split_of(config, it) == "heldout" for it in _scenes(config, "heldout", 500))


@each_world
@pytest.mark.parametrize("seed", range(3))
def test_heldout_combinations_are_balanced(config, seed):
    config = dataclasses.replace(config, seed=seed)
    heldout = world.heldout_combinations(config)
    everything = set(itertools.product(config.colours, config.shapes, config.motions))
    assert len(heldout) == round(config.holdout_fraction * len(everything))
    for place, words in enumerate((config.colours, config.shapes, config.motions)):
        count = [sum(combination[place] == word for combination in heldout) for word in words]
        assert min(count) >= 1 and max(count) - min(count) <= 2
        assert {combination[place] for combination in everything - heldout} == set(words)


@each_world
def test_things_stay_in_their_cells_and_move_enough(config):
    for scene_ in _scenes(config, "train", 1000):
        centres = []
        for place, thing in enumerate(scene_.things):
            track_T3 = scene.track(thing, scene_.num_frames)
            top, left, height, width = scene.cell(scene_.relation, place, scene_.height, scene_.width)
            reach_y, reach_x = (reach * track_T3[:, 2] for reach in scene.REACH[thing.shape])
            assert (track_T3[:, 0] - reach_y).min() >= top and (track_T3[:, 0] + reach_y).max() <= top + height
            assert (track_T3[:, 1] - reach_x).min() >= left and (track_T3[:, 1] + reach_x).max() <= left + width
            if thing.motion in scene.DIRECTIONS or thing.motion == "bounce":
                assert thing.travel >= 0.1 * min(scene_.height, scene_.width)
            centres.append((thing.centre_y, thing.centre_x))
        if scene_.relation:
            assert scene_.things[0].colour != scene_.things[1].colour
            offset = np.subtract(*centres)
            assert np.dot(offset, scene.RELATIONS[scene_.relation]) >= 1.6 * np.abs(offset).min() > -1


def test_shorter_clips_move_less():
    """Speeds are in real units: the median travel of a second is half that of two."""
    base = dataclasses.replace(world.COMPACT, motions=("left",), frame_counts=(9,), holdout_fraction=0.0)
    second = np.median([it.things[0].travel for it in _scenes(base, "train", 200)])
    two_seconds = dataclasses.replace(base, frame_counts=(17,))
    assert np.median([it.things[0].travel for it in _scenes(two_seconds, "train", 200)]) == pytest.approx(
        2 * second, rel=0.1
    )


@each_world
def test_captions_name_every_attribute(config):
    size_words = len(config.sizes) > 1
    for scene_ in _scenes(config, "train", 400):
        for number, text in enumerate(captions.captions(scene_, size_words)):
            is_long = number >= captions.SHORT_VARIANTS
            assert scene_.background in text
            assert not scene_.relation or captions.RELATION_WORDS[scene_.relation] in text
            for thing in scene_.things:
                assert f"{thing.colour} {thing.shape}" in text
                assert (f"{thing.size} {thing.colour}" in text) == (size_words or is_long)
                assert any(words in text for words in captions.MOTION_WORDS[thing.motion]) != scene_.is_image
            assert not is_long or len(text.split()) <= 40, text
            assert "  " not in text and " a orange" not in f" {text}"


def test_captions_read_as_written():
    star = scene.Thing("orange", "star", "small", "up-left", radius=5, centre_y=8, centre_x=8)
    disc = scene.Thing("blue", "circle", "large", "still", radius=8, centre_y=20, centre_x=20)
    one = scene.Scene((star,), None, "light gray", height=32, width=32, num_frames=9, fps=8)
    two = dataclasses.replace(one, things=(disc, star), relation="right of")
    image = dataclasses.replace(one, num_frames=1)
    assert captions.prompt(one) == "a small orange star moves up and left on a light gray background"
    assert captions.prompt(one, size_words=False) == "an orange star moves up and left on a light gray background"
    assert captions.prompt(image) == "a small orange star on a light gray background"
    assert captions.prompt(two) == (
        "a large blue circle stays still, to the right of a small orange star that moves up and left, "
        "on a light gray background"
    )
    assert captions.long_caption(two, 0) == (
        "A video of a large blue circle to the right of a small orange star on a plain light gray background. "
        "The blue circle stays still in one place. The orange star moves diagonally up to the left."
    )
    relations = [captions.prompt(dataclasses.replace(two, relation=relation)) for relation in scene.RELATIONS]
    for words, text in zip(("left of a", "right of a", "above a", "below a"), relations, strict=True):
        assert words in text


def test_captions_tell_scenes_apart():
    """No two scenes that differ in an attribute share a caption of one variant."""
    meaning: dict[tuple[int, str], tuple] = {}
    for scene_ in _scenes(world.FULL, "train", 3000):
        told = [(it.colour, it.shape, it.size, None if scene_.is_image else it.motion) for it in scene_.things]
        attributes = (tuple(told), scene_.relation, scene_.background, scene_.is_image)
        for number, text in enumerate(captions.captions(scene_)):
            assert meaning.setdefault((number, text), attributes) == attributes


def test_a_square_is_the_middle_of_the_frame():
    squares = dataclasses.replace(world.COMPACT, square=True)
    assert world.COMPACT.clip_sizes == world.COMPACT.frame_sizes and squares.clip_sizes == ((32, 32),)
    for index in range(30):
        whole, cut = (clips.clip(config, "train", index) for config in (world.COMPACT, squares))
        top, left = ((size - 32) // 2 for size in whole.frames_THWC.shape[1:3])
        assert np.array_equal(cut.frames_THWC, whole.frames_THWC[:, top : top + 32, left : left + 32])
        assert cut.captions == whole.captions


def test_squares_of_all_sizes_are_brought_to_the_least():
    """What is half as large in a square of half the side is the same picture at half the scale."""
    config = dataclasses.replace(world.COMPACT, frame_sizes=((32, 32), (64, 96)), frame_size_weights=())
    squares, large = dataclasses.replace(config, square=True), 0
    assert squares.clip_sizes == ((32, 32),)
    for index in range(12):
        whole, cut = (clips.clip(each, "train", index).frames_THWC.astype(float) for each in (config, squares))
        if whole.shape[1] == 64:
            middle = whole[:, :, 16:80].reshape(len(whole), 32, 2, 32, 2, 3).mean((2, 4))
            assert np.abs(middle - cut).mean() < 1.5
            large += 1
    assert large


def test_frames_are_played_to_and_fro_in_training_alone_and_words_and_numbers_stay():
    played = dataclasses.replace(world.COMPACT, to_and_fro=0.5)
    turned = videos = 0
    for index in range(120):
        once, clip = (clips.clip(config, "train", index) for config in (world.COMPACT, played))
        assert (clip.id, clip.captions, clip.fps) == (once.id, once.captions, once.fps)
        assert clip.frames_THWC.shape == once.frames_THWC.shape
        videos += len(once.frames_THWC) > 1
        if not clip.to_and_fro:
            assert np.array_equal(clip.frames_THWC, once.frames_THWC)
            continue
        turned += 1
        assert len(clip.frames_THWC) >= 9 and clip.scene is None
        apart_TT = np.abs(clip.frames_THWC[:, None].astype(int) - once.frames_THWC[None]).max((2, 3, 4))
        assert (apart_TT.min(1) == 0).all()  # no frame is new
        if once.scene.things[0].motion != "still":
            order_T = apart_TT.argmin(1)
            steps_T = np.diff(order_T)
            assert (np.abs(steps_T) == 1).all()  # none is left out or held
            turns = np.flatnonzero(np.diff(steps_T))
            assert len(turns) and (np.diff(turns) >= clips.LEAST_WAY).all()  # it turns, and not at once
            assert np.ptp(order_T) <= (len(order_T) - 1) // 2  # and there is time to come back
    assert 0.35 < turned / videos < 0.65
    for index in range(20):
        assert not clips.clip(played, "heldout", index).to_and_fro


def test_weights_of_sizes_are_for_training_alone():
    weighted = dataclasses.replace(world.COMPACT, frame_size_weights=(0.0, 0.25, 0.75))
    for split, expected in (("train", (0, 0.25, 0.75)), ("heldout", (1 / 3,) * 3)):
        scenes = [world.sample_scene(weighted, split, index) for index in range(600)]
        sizes = [(scene.height, scene.width) for scene in scenes]
        shares = [sizes.count(size) / len(sizes) for size in weighted.frame_sizes]
        assert np.allclose(shares, expected, atol=0.06), split


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colours": ("red", "mauve")}, "mauve"),
        ({"frame_counts": (1, 8)}, "4k"),
        ({"motions": ("left", "right"), "holdout_fraction": 0.0}, "still"),
        ({"frame_sizes": ((16, 16),)}, "32"),
        ({"frame_count_weights": (1.0,)}, "frame_count_weights"),
        ({"frame_counts": (1, 9), "frame_count_weights": (1.0, 0.0)}, "leave a count of no weight out"),
        ({"frame_size_weights": (0.0, 0.0, 0.0)}, "not all zero"),
        ({"holdout_fraction": 0.01}, "raise it to"),
        ({"two_things_fraction": 1.5}, "two_things_fraction"),
    ],
)
def test_impossible_worlds_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(world.COMPACT, **change)

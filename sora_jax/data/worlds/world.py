"""Which scenes a world holds, which of them are never trained on, and how scene number i is drawn."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from typing import Literal, get_args

import numpy as np

from sora_jax.data.worlds import scene as scenes
from sora_jax.data.worlds.scene import Scene, Thing

Split = Literal["train", "heldout"]
Combination = tuple[str, str, str]  # colour, shape, motion

# Speeds are in real units: a shorter clip moves less. Fractions of the frame's shorter side.
SPEED = (0.16, 0.22)  # per second
LEAST_TRAVEL = 0.125  # of however short a clip: 4 px of 32
MOST_PIXELS = 2**33  # of a clip: two minutes at 1080p
# Change of the radius as a fraction of it.
GROWTH_SPEED = 0.35  # per second
LEAST_GROWTH, MOST_GROWTH = 0.3, 0.7
ORBIT_SECONDS, BOUNCE_SECONDS = 2.0, 1.0
MARGIN = 0.5  # px between a thing and the edge of its cell
# In a pair, the offset across the relation is at most this part of that along it: the relation is plain to see.
ACROSS = 0.6


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The scenes of a world. Every choice is uniform, except frame sizes and frame counts where weights are given.

    frame_sizes are (height, width) pairs; frame_size_weights, empty or one a size, are of training scenes alone: small
    frames teach much for few tokens, but what is held out shows all sizes alike. frame_counts are 4k + 1, where 1 is an
    image; frame_count_weights is empty or one weight per count. two_things_fraction of the scenes hold two things.
    holdout_fraction of all combinations (colour, shape, motion) never occur in training. With square, clips are what the
    middle square of a frame shows, resized to the least side of any, as data sets were cut before models took any size: things
    may be cut, too. to_and_fro is
    the share of training videos whose frames are played to and fro, turning at a random place and back within the clip: a
    model that connects what is given learns to lead back from them. Raises ValueError if a world cannot be drawn from these.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    motions: tuple[str, ...]
    backgrounds: tuple[str, ...]
    frame_sizes: tuple[tuple[int, int], ...]
    frame_size_weights: tuple[float, ...]
    frame_counts: tuple[int, ...]
    frame_count_weights: tuple[float, ...]
    fps: tuple[float, ...]
    two_things_fraction: float
    holdout_fraction: float
    square: bool
    to_and_fro: float
    seed: int

    def __post_init__(self) -> None:
        _check_words("colours", self.colours, scenes.COLOURS)
        _check_words("shapes", self.shapes, scenes.SHAPES)
        _check_words("sizes", self.sizes, scenes.SIZES)
        _check_words("motions", self.motions, scenes.MOTIONS)
        _check_words("backgrounds", self.backgrounds, scenes.BACKGROUNDS)
        _check_frames(self)
        for name in ("two_things_fraction", "to_and_fro"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.two_things_fraction > 0 and len(self.colours) < 2:
            raise ValueError("two things need two colours; add a colour or set two_things_fraction to 0")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        _check_holdout(self)

    @property
    def clip_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the clips: of the frames, or the one of all squares."""
        return ((self._side, self._side),) if self.square else self.frame_sizes

    @property
    def _side(self) -> int:
        return min(map(min, self.frame_sizes))


@functools.lru_cache(maxsize=64)
def heldout_combinations(config: WorldConfig) -> frozenset[Combination]:
    """The combinations that training never shows.

    They are taken one by one: always one whose colour, shape and motion were taken least so far, ties by a seeded hash.
    So each colour, shape and motion occurs about equally often among them, and each still occurs in training.
    """
    taken: dict[str, int] = dict.fromkeys((*config.colours, *config.shapes, *config.motions), 0)
    left = sorted(_combinations(config), key=lambda combination: _hash(config.seed, combination))
    heldout = set()
    for _ in range(_num_heldout(config)):
        best = min(left, key=lambda combination: sum(taken[word] for word in combination))
        left.remove(best)
        heldout.add(best)
        for word in best:
            taken[word] += 1
    return frozenset(heldout)


def split_of(config: WorldConfig, scene: Scene) -> Split:
    """A scene is held out if the combination of any of its things is."""
    heldout = heldout_combinations(config)
    return "heldout" if any(thing.combination in heldout for thing in scene.things) else "train"


def sample_scene(config: WorldConfig, split: Split, index: int) -> Scene:
    """Scene number `index` of a split: the same whenever and in whatever order it is asked for.

    In a training scene no thing is held out. In a held-out scene one thing is, and a second thing may be anything.
    Raises ValueError for an unknown split, a negative index, or a held-out scene of a world that holds nothing out.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; it must be one of {get_args(Split)}")
    if index < 0:
        raise ValueError(f"index is {index}; it must not be negative")
    if split == "heldout" and not config.holdout_fraction:
        raise ValueError("this world holds nothing out; set holdout_fraction above 0")
    rng = np.random.default_rng((config.seed, get_args(Split).index(split), index))
    height, width = _weighted(rng, config.frame_sizes, config.frame_size_weights if split == "train" else ())
    num_frames = _weighted(rng, config.frame_counts, config.frame_count_weights)
    relation = _pick(rng, tuple(scenes.RELATIONS)) if rng.random() < config.two_things_fraction else None
    blank = Scene(
        things=(),
        relation=relation,
        background=_pick(rng, config.backgrounds),
        height=height,
        width=width,
        num_frames=num_frames,
        fps=_pick(rng, config.fps),
    )
    combinations = _pick_combinations(rng, config, split, blank)
    things = tuple(_sample_thing(rng, config, blank, place, each) for place, each in enumerate(combinations))
    scene = dataclasses.replace(blank, things=_align(things, blank))
    return _middle_square(scene, config.clip_sizes[0][0]) if config.square else scene


def _middle_square(scene: Scene, side: int) -> Scene:
    """What the middle square of a scene shows, resized: its lengths are those of the drawing, so nothing is blurred."""
    short = min(scene.height, scene.width)
    top, left, scale = (scene.height - short) / 2, (scene.width - short) / 2, side / short
    things = tuple(
        dataclasses.replace(
            thing,
            centre_y=(thing.centre_y - top) * scale,
            centre_x=(thing.centre_x - left) * scale,
            radius=thing.radius * scale,
            travel=thing.travel * scale,
        )
        for thing in scene.things
    )
    return dataclasses.replace(scene, things=things, height=side, width=side)


def _pick_combinations(rng: np.random.Generator, config: WorldConfig, split: Split, blank: Scene) -> list[Combination]:
    """One combination per thing, of different colours, in random order."""
    chosen = [_pick(rng, _pool(config, split, blank.is_image))]
    if blank.relation is not None:
        others = _pool(config, "train" if split == "train" else None, blank.is_image)
        chosen.append(_pick(rng, tuple(other for other in others if other[0] != chosen[0][0])))
        if rng.random() < 0.5:
            chosen.reverse()
    return chosen


@functools.lru_cache(maxsize=256)
def _pool(config: WorldConfig, split: Split | None, is_image: bool) -> tuple[Combination, ...]:
    """The combinations of a split, or of both (None); an image shows nothing but rest."""
    heldout = heldout_combinations(config)
    return tuple(
        combination
        for combination in _combinations(config)
        if (split is None or (combination in heldout) == (split == "heldout"))
        and (not is_image or combination[2] == "still")
    )


def _sample_thing(
    rng: np.random.Generator, config: WorldConfig, blank: Scene, place: int, combination: Combination
) -> Thing:
    colour, shape, motion = combination
    top, left, cell_height, cell_width = scenes.cell(blank.relation, place, blank.height, blank.width)
    size = _pick(rng, config.sizes)
    radius = rng.uniform(*scenes.radius_range(size, blank.relation)) * min(cell_height, cell_width)
    reach_y, reach_x = (radius * reach for reach in scenes.REACH[shape])

    growth = _growth(
        motion, blank.seconds, min(cell_height / 2 - MARGIN, cell_width / 2 - MARGIN) / max(reach_y, reach_x)
    )
    reach_y, reach_x = (reach * (1 + abs(growth) / 2) for reach in (reach_y, reach_x))
    room_y, room_x = cell_height - 2 * (reach_y + MARGIN), cell_width - 2 * (reach_x + MARGIN)
    side = min(blank.height, blank.width)
    wanted = max(rng.uniform(*SPEED) * blank.seconds, LEAST_TRAVEL) * side
    travel, path_y, path_x = _travel(motion, wanted, room_y, room_x)
    return Thing(
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        radius=radius,
        centre_y=top + cell_height / 2 + rng.uniform(-0.5, 0.5) * (room_y - path_y),
        centre_x=left + cell_width / 2 + rng.uniform(-0.5, 0.5) * (room_x - path_x),
        travel=travel,
        growth=growth,
        cycles=_cycles(motion, blank),
        phase=rng.random() if motion == "orbit" else 0.0,
    )


def _growth(motion: str, seconds: float, most_factor: float) -> float:
    """Change of the radius over the clip as a fraction of its mean; the largest is at most most_factor means."""
    if motion not in ("grow", "shrink"):
        return 0.0
    growth = min(max(GROWTH_SPEED * seconds, LEAST_GROWTH), MOST_GROWTH, 2 * (most_factor - 1))
    return growth if motion == "grow" else -growth


def _travel(motion: str, wanted: float, room_y: float, room_x: float) -> tuple[float, float, float]:
    """(travel, height of the path, width of the path) in pixels, within the room there is."""
    if motion in scenes.DIRECTIONS:
        step_y, step_x = (abs(step) for step in scenes.DIRECTIONS[motion])
        travel = min(wanted, room_y / max(step_y, 1e-6), room_x / max(step_x, 1e-6))
        return travel, travel * step_y, travel * step_x
    if motion == "orbit":
        travel = min(wanted, room_y, room_x) / 2
        return travel, 2 * travel, 2 * travel
    if motion == "bounce":
        travel = min(wanted, room_y)
        return travel, travel, 0.0
    return 0.0, 0.0, 0.0


def _cycles(motion: str, blank: Scene) -> int:
    """Whole cycles in the clip: at least one, and slow enough to be seen at this frame rate."""
    if motion == "orbit":
        return max(1, min(round(blank.seconds / ORBIT_SECONDS), (blank.num_frames - 1) // 6))
    if motion == "bounce":
        return max(1, min(round(blank.seconds / BOUNCE_SECONDS), (blank.num_frames - 1) // 4))
    return 0


def _align(things: tuple[Thing, ...], blank: Scene) -> tuple[Thing, ...]:
    """Moves the things of a pair towards the middle across their relation, until the relation is what one sees."""
    if blank.relation is None:
        return things
    one, other = things
    gap_y, gap_x = abs(one.centre_y - other.centre_y), abs(one.centre_x - other.centre_x)
    if scenes.RELATIONS[blank.relation][0]:
        middle, factor = blank.width / 2, min(1.0, ACROSS * gap_y / max(gap_x, 1e-6))
        return tuple(dataclasses.replace(it, centre_x=middle + factor * (it.centre_x - middle)) for it in things)
    middle, factor = blank.height / 2, min(1.0, ACROSS * gap_x / max(gap_y, 1e-6))
    return tuple(dataclasses.replace(it, centre_y=middle + factor * (it.centre_y - middle)) for it in things)


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _weighted(rng: np.random.Generator, choices, weights: tuple[float, ...]):
    if not weights:
        return _pick(rng, choices)
    share = np.cumsum(weights) / sum(weights)
    return choices[int(np.searchsorted(share, rng.random(), side="right"))]


def _combinations(config: WorldConfig) -> tuple[Combination, ...]:
    return tuple(itertools.product(config.colours, config.shapes, config.motions))


def _num_heldout(config: WorldConfig) -> int:
    return round(config.holdout_fraction * len(_combinations(config)))


def _hash(seed: int, combination: Combination) -> bytes:
    return hashlib.sha256(repr((seed, combination)).encode()).digest()


def _check_words(name: str, words: tuple[str, ...], known) -> None:
    unknown = [word for word in words if word not in known]
    if not words or unknown or len(set(words)) < len(words):
        raise ValueError(f"{name} is {words}; it must be a non-empty choice, without repeats, of {tuple(known)}")


def _check_frames(config: WorldConfig) -> None:
    if not config.frame_sizes or any(min(size) < 32 for size in config.frame_sizes):
        raise ValueError(
            f"frame_sizes is {config.frame_sizes}; give (height, width) pairs of at least 32 pixels a side"
        )
    if not config.frame_counts or any(count < 1 or count % 4 != 1 for count in config.frame_counts):
        raise ValueError(f"frame_counts is {config.frame_counts}; each must be 4k + 1 (1 is an image)")
    if max(height * width for height, width in config.frame_sizes) * max(config.frame_counts) > MOST_PIXELS:
        raise ValueError(f"the largest clip of frame_sizes and frame_counts has more than {MOST_PIXELS} pixels")
    if 1 in config.frame_counts and "still" not in config.motions:
        raise ValueError(
            "images (frame count 1) show things at rest; add 'still' to motions or drop 1 from frame_counts"
        )
    for name, weights, choices in (
        ("frame_size_weights", config.frame_size_weights, config.frame_sizes),
        ("frame_count_weights", config.frame_count_weights, config.frame_counts),
    ):
        if weights and (len(weights) != len(choices) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"{name} is {weights}; leave it empty or give one weight for each of the {len(choices)} choices, not all zero"
            )
    # Frame sizes of no weight are still asked for in judgement.
    if 0 in config.frame_count_weights:
        raise ValueError(
            f"frame_count_weights is {config.frame_count_weights}; leave a count of no weight out of frame_counts"
        )
    if not config.fps or min(config.fps) <= 0:
        raise ValueError(f"fps is {config.fps}; give at least one positive rate")


def _check_holdout(config: WorldConfig) -> None:
    if not 0 <= config.holdout_fraction <= 0.5:
        raise ValueError(f"holdout_fraction is {config.holdout_fraction}; it must be in [0, 0.5]")
    needed = max(len(config.colours), len(config.shapes), len(config.motions))
    if config.holdout_fraction and _num_heldout(config) < needed:
        total = len(_combinations(config))
        raise ValueError(
            f"holdout_fraction {config.holdout_fraction} holds out {_num_heldout(config)} of {total} combinations, but "
            f"{needed} are needed to show every colour, shape and motion; raise it to {needed / total + 0.001:.3f}"
        )


# A world that a small model learns in minutes, and all of it.
COMPACT = WorldConfig(
    colours=tuple(scenes.COLOURS),
    shapes=scenes.SHAPES,
    sizes=("large",),
    motions=("still", "left", "right", "up", "down", "grow", "shrink"),
    backgrounds=("white", "gray", "black"),
    frame_sizes=((32, 32), (48, 32), (32, 48)),
    frame_size_weights=(),
    frame_counts=(1, 9, 13, 17),
    frame_count_weights=(),
    fps=(8.0,),
    two_things_fraction=0.0,
    holdout_fraction=0.1,
    square=False,
    to_and_fro=0.0,
    seed=0,
)
FULL = WorldConfig(
    colours=tuple(scenes.COLOURS),
    shapes=scenes.SHAPES,
    sizes=scenes.SIZES,
    motions=scenes.MOTIONS,
    backgrounds=tuple(scenes.BACKGROUNDS),
    frame_sizes=((32, 32), (48, 32), (32, 48), (48, 48), (64, 48), (48, 64), (64, 64), (96, 64), (64, 96)),
    frame_size_weights=(),
    frame_counts=(1, 5, 9, 13, 17, 25, 33),
    frame_count_weights=(),
    fps=(4.0, 8.0, 12.0, 16.0),
    two_things_fraction=0.3,
    holdout_fraction=0.1,
    square=False,
    to_and_fro=0.0,
    seed=0,
)

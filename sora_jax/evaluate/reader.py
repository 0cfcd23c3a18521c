"""Reads a scene of data.worlds back from its pixels: which things, how they move, where they are.

Colours share one chroma and backgrounds have none (see data.worlds.scene), so that a pixel's position on the plane of
hues is coverage times a known vector: linear in the pixel, so blur keeps areas and centroids, and noise averages out.
A video that shows no thing reads as None; so does one that is not finite. Nothing here knows the caption.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.data.worlds import render
from sora_jax.data.worlds import scene as scenes
from sora_jax.data.worlds.scene import Scene

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LEAST_COVERAGE = 0.25  # of a pixel, smoothed, for it to belong to a thing
CUT_COVERAGE = 0.75  # of an outermost pixel, where a thing goes on beyond the frame
LEAST_AREA = 0.006  # of the frame: two thirds of the smallest thing of a world
LEAST_SHARE = 0.1  # of the first thing's area, for a second
# Of a thing that is whole, see _Track: real clips reach 0.21, two discs with a gap of half their width 0.44. A blur of 1.2 px is
# forgiven, which small things need.
MOST_SPREAD, BLUR_MOMENT = 0.28, 3.0  # the latter in square pixels
# Of the frames a thing may be out of sight and still last: none of short videos. Of real clips 0.03 at most, of squares cut out.
MOST_LOST = 0.05
NUM_MATCHED_FRAMES = 8  # frames that a shape is read from
BLURS = (0.0, 0.8, 1.4)  # px, tried on the templates of shapes
RADII = (0.92, 1.0, 1.08)  # tried around the radius that the area gives
# The least that is not rest: a travel of this part of the shorter side, a growth of this part of the radius.
LEAST_TRAVEL, LEAST_GROWTH = 0.06, 0.15
STRAIGHT = 0.75  # part of the movement that a straight line at constant speed explains
ROUND = 0.2  # part of the movement along x that tells an orbit from a bounce


@dataclasses.dataclass(frozen=True)
class ThingReading:
    """What one thing looks like; motion is None in an image. radius is in pixels.

    whole is False where its colour lies about in pieces, as of two things that should be one; lasts where it is out of sight for
    more than MOST_LOST of the frames. Everything else is read from the frames that show it.
    """

    colour: str
    shape: str
    size: str
    motion: str | None
    radius: float
    whole: bool
    lasts: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a video shows. relation says where things[0], the larger, is relative to things[1]; None if there is one."""

    things: tuple[ThingReading, ...]
    relation: str | None
    background: str


def read(frames_THWC: np.ndarray) -> Reading | None:
    """Reads one video, or an image (T = 1): uint8, or floats in [-1, 1]. Raises ValueError for other shapes."""
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or 0 in frames_THWC.shape:
        raise ValueError(f"frames are of shape {frames_THWC.shape}; a video is (T, H, W, 3), an image has T = 1")
    level_THWC = _levels(frames_THWC)
    if not np.isfinite(level_THWC).all():
        return None
    hue_THW = _hue_plane(level_THWC)
    smooth_THW = _smooth(hue_THW)
    colours = _find_colours(smooth_THW)
    covers = _separate(hue_THW, smooth_THW, colours)
    tracks = [_follow(cover_THW) for cover_THW in covers]
    if not tracks or any(len(track.frames_F) == 0 for track in tracks):
        return None
    num_frames, height, width = hue_THW.shape
    relation = _read_relation(tracks)
    things = []
    for cover_THW, track in zip(covers, tracks, strict=True):
        shape = _read_shape(cover_THW, track)
        radius = float(np.sqrt(track.area_F / scenes.AREA[shape]).mean())
        things.append(
            ThingReading(
                colour=_read_colour(hue_THW, cover_THW),
                shape=shape,
                size=_read_size(radius, relation, height, width),
                motion=None if num_frames == 1 else _read_motion(track, num_frames, min(height, width)),
                radius=radius,
                whole=bool(np.median(track.spread_F) <= MOST_SPREAD),
                lasts=len(track.frames_F) >= (1 - MOST_LOST) * num_frames,
            )
        )
    return Reading(tuple(things), relation, _read_background(level_THWC, smooth_THW))


def places(frames_THWC: np.ndarray) -> np.ndarray:
    """(T, 2): the centroid (y, x) of a video's larger thing in each frame, in pixels; NaN where it is not in sight."""
    found_T2 = np.full((len(frames_THWC), 2), np.nan)
    if track := _largest(frames_THWC):
        found_T2[track.frames_F] = np.stack([track.y_F, track.x_F], axis=1)
    return found_T2


def areas(frames_THWC: np.ndarray) -> np.ndarray:
    """(T,): the area of a video's larger thing in each frame, in pixels; 0 where it is not in sight."""
    found_T = np.zeros(len(frames_THWC))
    if track := _largest(frames_THWC):
        found_T[track.frames_F] = track.area_F
    return found_T


def inside(frames_THWC: np.ndarray) -> np.ndarray:
    """(T,): whether a video's larger thing is in sight in each frame and none of it is cut off by the frame's edge."""
    found_T = np.zeros(len(frames_THWC), bool)
    if covers := _cover(frames_THWC):
        edges = (covers[0][:, [0, -1]].max((1, 2)), covers[0][:, :, [0, -1]].max((1, 2)))
        found_T[_follow(covers[0]).frames_F] = True
        # A thing that ends within the outermost pixels covers them in part.
        found_T &= np.maximum(*edges) < CUT_COVERAGE
    return found_T


def _largest(frames_THWC: np.ndarray) -> _Track | None:
    covers = _cover(frames_THWC)
    return _follow(covers[0]) if covers else None


def _cover(frames_THWC: np.ndarray) -> list[np.ndarray]:
    """How much of each pixel each thing covers, of at most two, the larger first."""
    hue_THW = _hue_plane(_levels(frames_THWC))
    smooth_THW = _smooth(hue_THW)
    return _separate(hue_THW, smooth_THW, _find_colours(smooth_THW))


def read_many(videos: Sequence[np.ndarray]) -> list[Reading | None]:
    """Reads videos of any shapes; see read."""
    return [read(frames_THWC) for frames_THWC in videos]


def read_frames(videos: Sequence[np.ndarray]) -> list[list[Reading | None]]:
    """Reads each frame of videos by itself, as an image; see read."""
    return [read_many(list(frames_THWC[:, None])) for frames_THWC in videos]


def score(videos: Sequence[np.ndarray], wanted: Sequence[Scene]) -> dict[str, float]:
    """How often videos show the scenes they should; see read and score_readings."""
    return score_readings(read_many(videos), wanted)


def score_readings(readings: Sequence[Reading | None], wanted: Sequence[Scene]) -> dict[str, float]:
    """Accuracy in [0, 1] of each attribute, and under '<attribute>_count' how many judgements it is the mean of.

    colour, shape, size and motion are judged for every thing, motion in videos only; relation for scenes of two
    things; background and all once a scene. all is right if the number of things, each colour, shape and motion, and
    the relation are, and each thing is whole and lasts. The things of a pair are matched as suits the reading best. An attribute
    that no scene has is left out.
    Raises ValueError if there are not as many readings as scenes, or none.
    """
    if len(readings) != len(wanted) or not wanted:
        raise ValueError(f"got {len(readings)} readings for {len(wanted)} scenes; give one per scene, and at least one")
    marks: dict[str, list[bool]] = {
        name: [] for name in ("colour", "shape", "size", "motion", "relation", "background", "all")
    }
    for reading, scene in zip(readings, wanted, strict=True):
        for name, right in _judge(reading, scene).items():
            marks[name] += right
    accuracy = {name: float(np.mean(right)) for name, right in marks.items() if right}
    return accuracy | {f"{name}_count": float(len(marks[name])) for name in accuracy}


def shuffled_floor(readings: Sequence[Reading | None], wanted: Sequence[Scene], seed: int) -> dict[str, float]:
    """The score that readings get against each other's scenes: what a model gets that ignores its captions.

    Images trade scenes with images and videos with videos, so that motion is judged as often as in score_readings.
    """
    return score_readings(readings, shuffled(wanted, seed))


def shuffled(wanted: Sequence[Scene], seed: int) -> list[Scene]:
    """The same scenes in another order; images stay where images were."""
    rng = np.random.default_rng(seed)
    found = list(wanted)
    for is_image in (False, True):
        members = [number for number, scene in enumerate(wanted) if scene.is_image == is_image]
        for number, other in zip(members, rng.permutation(members), strict=True):
            found[number] = wanted[other]
    return found


def frames_right(readings: Sequence[Sequence[Reading | None]], wanted: Sequence[Scene]) -> list[np.ndarray]:
    """(T,) of each video: whether each frame, of read_frames, shows all of its scene's things and no other, whole, in their
    colours and shapes.

    Stricter than score_readings, for which a thing is of the shape that it has in the mean over frames, and whole if it is in
    the median one. Where the things of a pair are to each other is left to the video as a whole.
    """
    found = []
    for frames, scene in zip(readings, wanted, strict=True):
        image = dataclasses.replace(scene, num_frames=1, relation=None)
        found.append(np.array([_judge(frame, image)["all"][0] for frame in frames]))
    return found


# --- judging


def _judge(reading: Reading | None, scene: Scene) -> dict[str, list[bool]]:
    """What is right about a reading, with its things in the order that suits the scene best."""
    things = reading.things[: len(scene.things)] if reading else ()
    missing = (None,) * (len(scene.things) - len(things))
    orders = [_judge_things(order, scene) for order in itertools.permutations((*things, *missing))]
    chosen = max(range(len(orders)), key=lambda number: sum(sum(right) for right in orders[number].values()))
    marks = orders[chosen]
    marks["background"] = [reading is not None and reading.background == scene.background]
    if scene.relation is not None:
        read_as = reading.relation if reading else None
        marks["relation"] = [read_as is not None and read_as == (scene.relation, OPPOSITE[scene.relation])[chosen]]
    marks["all"] = [
        reading is not None
        and len(reading.things) == len(scene.things)
        and all(thing.whole and thing.lasts for thing in reading.things)
        and all(all(marks.get(name, [])) for name in ("colour", "shape", "motion", "relation"))
    ]
    return marks


def _judge_things(things: Sequence[ThingReading | None], scene: Scene) -> dict[str, list[bool]]:
    names = ("colour", "shape", "size") if scene.is_image else ("colour", "shape", "size", "motion")
    return {
        name: [
            seen is not None and getattr(seen, name) == getattr(thing, name)
            for seen, thing in zip(things, scene.things, strict=True)
        ]
        for name in names
    }


# --- colours and cover


def _levels(frames_THWC: np.ndarray) -> np.ndarray:
    """float32 levels in [0, 255]."""
    if frames_THWC.dtype == np.uint8:
        return frames_THWC.astype(np.float32)
    return (np.clip(frames_THWC.astype(np.float32), -1, 1) + 1) * 127.5


def _hue_plane(level_HWC: np.ndarray) -> np.ndarray:
    """Colour less its gray as a complex number, complex64: its angle is the hue, its size about the coverage."""
    red, green, blue = level_HWC[..., 0], level_HWC[..., 1], level_HWC[..., 2]
    hue_HW = np.empty(red.shape, np.complex64)
    hue_HW.real = (red - (green + blue) / 2) / scenes.CHROMA
    hue_HW.imag = (green - blue) * (np.sqrt(0.75) / scenes.CHROMA)
    return hue_HW


COLOUR_NAMES = tuple(scenes.COLOURS)
HUES = _hue_plane(np.array([list(scenes.COLOURS.values())], np.float32))[0]  # of a pixel that is covered fully
HUE_DIRECTIONS = HUES / np.abs(HUES)  # the same on the unit circle


def _smooth(hue_THW: np.ndarray) -> np.ndarray:
    """The mean of each pixel and its eight neighbours."""
    wide = np.pad(hue_THW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / 9


def _grow_mask(mask_THW: np.ndarray) -> np.ndarray:
    """A mask and all pixels up to two away: the soft edge of a thing belongs to it."""
    wide = np.pad(mask_THW, ((0, 0), (2, 2), (2, 2)))
    height, width = mask_THW.shape[1:]
    wide = functools.reduce(np.logical_or, (wide[:, step : step + height] for step in range(5)))
    return functools.reduce(np.logical_or, (wide[..., step : step + width] for step in range(5)))


def _along(hue: Any, direction: np.complex64) -> Any:
    return hue.real * direction.real + hue.imag * direction.imag


def _find_colours(smooth_THW: np.ndarray) -> list[int]:
    """Indices of the colours of at most two things, the larger first; two only if they are in different places."""
    num_frames, height, width = smooth_THW.shape
    size_THW = np.abs(smooth_THW)
    frame, y, x = np.nonzero(size_THW > LEAST_COVERAGE)
    hue, weight = smooth_THW[frame, y, x], size_THW[frame, y, x]
    nearest = np.argmax([_along(hue, direction) for direction in HUE_DIRECTIONS], axis=0) if len(hue) else frame
    area_K = np.bincount(nearest, weight, minlength=len(HUES)) / num_frames
    first, *others = (int(k) for k in np.argsort(-area_K, kind="stable"))
    least = LEAST_AREA * height * width
    if area_K[first] < least:
        return []

    def centres(colour: int) -> np.ndarray:
        own = nearest == colour
        total = np.bincount(frame[own], weight[own], minlength=num_frames)
        with np.errstate(invalid="ignore"):  # a frame without this colour has no centre
            return np.stack([np.bincount(frame[own], (weight * at)[own], num_frames) / total for at in (y, x)])

    for second in others:
        if area_K[second] < max(least, LEAST_SHARE * area_K[first]):
            break
        apart = np.hypot(*(centres(first) - centres(second)))
        seen = np.isfinite(apart)
        radii = np.sqrt(area_K[first] / np.pi) + np.sqrt(area_K[second] / np.pi)
        if seen.any() and np.median(apart[seen]) > 0.75 * radii:
            return [first, second]
    return [first]


def _separate(hue_THW: np.ndarray, smooth_THW: np.ndarray, colours: list[int]) -> list[np.ndarray]:
    """How much of each pixel each colour covers: float32 (T, H, W), zero away from the things of that colour."""
    along = [_along(smooth_THW, HUE_DIRECTIONS[colour]) for colour in colours]
    nearest_THW = np.argmax(along, axis=0) if colours else None
    size_THW = np.abs(smooth_THW)
    near = []
    for place in range(len(colours)):
        own_THW = (size_THW > LEAST_COVERAGE) & (nearest_THW == place) & (along[place] > 0.5 * size_THW)
        near.append(_grow_mask(own_THW))
    covers = []
    for place, colour in enumerate(colours):
        mask_THW = near[place]
        for other in range(len(colours)):
            if other != place:
                mask_THW = mask_THW & ((nearest_THW == place) | ~near[other])
        covers.append(_along(hue_THW, HUE_DIRECTIONS[colour]) / np.abs(HUES[colour]) * mask_THW)
    return covers


# --- one thing


def _read_colour(hue_THW: np.ndarray, cover_THW: np.ndarray) -> str:
    """The colour nearest to the mean hue of a thing, weighted by how much it covers."""
    mean_hue = (hue_THW * np.maximum(cover_THW, 0)).sum()
    return COLOUR_NAMES[int(np.argmax([_along(mean_hue, direction) for direction in HUE_DIRECTIONS]))]


@dataclasses.dataclass(frozen=True)
class _Track:
    """The frames that show a thing, with its centroid, area and spread in each, in pixels.

    spread is the second moment around the centroid, less that of a blur, as a part of the area: 0.16 of a disc.
    """

    frames_F: np.ndarray
    y_F: np.ndarray
    x_F: np.ndarray
    area_F: np.ndarray
    spread_F: np.ndarray


def _follow(cover_THW: np.ndarray) -> _Track:
    _, height, width = cover_THW.shape
    row_TH, column_TW = cover_THW.sum(2, dtype=np.float64), cover_THW.sum(1, dtype=np.float64)
    area_T = row_TH.sum(1)
    frames_F = np.flatnonzero(area_T > max(0.25 * np.median(area_T), LEAST_AREA / 4 * height * width))
    area_F = area_T[frames_F]
    y_H, x_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    y_F, x_F = row_TH[frames_F] @ y_H / area_F, column_TW[frames_F] @ x_W / area_F
    moment_F = (row_TH[frames_F] @ y_H**2 + column_TW[frames_F] @ x_W**2) / area_F - y_F**2 - x_F**2
    return _Track(frames_F, y_F, x_F, area_F, (moment_F - BLUR_MOMENT) / area_F)


def _read_shape(cover_THW: np.ndarray, track: _Track) -> str:
    """The shape whose template, at the measured centroid and area, is most like the cover; averaged over frames."""
    chosen = np.unique(np.linspace(0, len(track.frames_F) - 1, NUM_MATCHED_FRAMES).round().astype(int))
    y_F, x_F, area_F = track.y_F[chosen], track.x_F[chosen], track.area_F[chosen]
    half = int(np.ceil(scenes.TIP * np.sqrt(area_F.max() / min(scenes.AREA.values())))) + 3
    offset_K = np.arange(-half, half + 1)
    wide = np.pad(cover_THW[track.frames_F[chosen]], ((0, 0), (half, half), (half, half)))
    rows_FK = np.clip(np.floor(y_F).astype(int)[:, None] + offset_K + half, 0, wide.shape[1] - 1)
    columns_FK = np.clip(np.floor(x_F).astype(int)[:, None] + offset_K + half, 0, wide.shape[2] - 1)
    seen_FKK = wide[np.arange(len(chosen))[:, None, None], rows_FK[:, :, None], columns_FK[:, None, :]]
    seen_FKK = seen_FKK / np.maximum(np.linalg.norm(seen_FKK, axis=(1, 2), keepdims=True), 1e-6)

    y_FK1 = (np.floor(y_F) + 0.5 - y_F).astype(np.float32)[:, None, None] + offset_K[:, None].astype(np.float32)
    x_F1K = (np.floor(x_F) + 0.5 - x_F).astype(np.float32)[:, None, None] + offset_K.astype(np.float32)
    best = {}
    for shape, unit_area in scenes.AREA.items():
        radius_RF11 = (np.array(RADII)[:, None] * np.sqrt(area_F / unit_area)).astype(np.float32)[..., None, None]
        template_RFKK = render.coverage(shape, y_FK1, x_F1K, radius_RF11)
        best[shape] = max(_likeness(template_RFKK, seen_FKK, blur) for blur in BLURS)
    return max(best, key=best.__getitem__)


def _likeness(template_RFKK: np.ndarray, seen_FKK: np.ndarray, blur: float) -> float:
    """The cosine between blurred templates and what is seen, mean over frames, for the best radius."""
    spread_KK = _spread(seen_FKK.shape[-1], blur)
    template_RFKK = spread_KK @ template_RFKK @ spread_KK
    norm_RF = np.maximum(np.sqrt(np.einsum("rfij,rfij->rf", template_RFKK, template_RFKK)), 1e-6)
    return float((np.einsum("rfij,fij->rf", template_RFKK, seen_FKK) / norm_RF).mean(1).max())


@functools.lru_cache(maxsize=256)
def _spread(size: int, blur: float) -> np.ndarray:
    """The (size, size) matrix that blurs one axis with a Gaussian."""
    if blur == 0:
        return np.eye(size, dtype=np.float32)
    apart = np.subtract.outer(np.arange(size), np.arange(size))
    kernel = np.exp(-0.5 * (apart / blur) ** 2)
    return (kernel / np.exp(-0.5 * (np.arange(-size, size + 1) / blur) ** 2).sum()).astype(np.float32)


def _read_motion(track: _Track, num_frames: int, side: float) -> str | None:
    """The motion of a thing in a video; None where it shows in too few frames to move. side is the frame's shorter."""
    if len(track.frames_F) < 3:
        return None
    time_F = track.frames_F / (num_frames - 1)
    time_F = time_F - time_F.mean()
    radius_F = np.sqrt(track.area_F)
    growth = _slope(time_F, radius_F) / radius_F.mean()
    path_F2 = np.stack([track.y_F - track.y_F.mean(), track.x_F - track.x_F.mean()], axis=1)
    step_y, step_x = _slope(time_F, path_F2[:, 0]), _slope(time_F, path_F2[:, 1])
    movement = path_F2.var(0).sum()
    # The length of the straight path at constant speed that would have this variance.
    travel = np.sqrt(movement / time_F.var())
    if max(abs(growth) / LEAST_GROWTH, travel / (LEAST_TRAVEL * side)) < 1:
        return "still"
    if abs(growth) / LEAST_GROWTH > travel / (LEAST_TRAVEL * side):
        return "grow" if growth > 0 else "shrink"
    if (step_y**2 + step_x**2) * time_F.var() > STRAIGHT * movement:
        return max(scenes.DIRECTIONS, key=lambda name: np.dot(scenes.DIRECTIONS[name], (step_y, step_x)))
    return "orbit" if path_F2[:, 1].var() > ROUND * movement else "bounce"


def _slope(time_F: np.ndarray, value_F: np.ndarray) -> float:
    """Least-squares change of a value over the whole clip."""
    return float(time_F @ (value_F - value_F.mean()) / (time_F @ time_F))


# --- the whole scene


def _read_background(level_THWC: np.ndarray, smooth_THW: np.ndarray) -> str:
    """The background nearest to the mean gray of the pixels that no thing touches."""
    free_THW = np.abs(smooth_THW) < 0.1
    seen_HW = free_THW.sum(0)
    gray_HW = (level_THWC.mean(-1) * free_THW).sum(0) / np.maximum(seen_HW, 1)
    height, width = seen_HW.shape
    return min(
        scenes.BACKGROUNDS,
        key=lambda name: float((seen_HW * (gray_HW - scenes.BACKGROUNDS[name](height, width)) ** 2).sum()),
    )


def _read_relation(tracks: Sequence[_Track]) -> str | None:
    if len(tracks) < 2:
        return None
    one, other = tracks
    offset = (one.y_F.mean() - other.y_F.mean(), one.x_F.mean() - other.x_F.mean())
    return max(scenes.RELATIONS, key=lambda name: np.dot(scenes.RELATIONS[name], offset))


def _read_size(radius: float, relation: str | None, height: int, width: int) -> str:
    """The size whose range of radii is nearest, in the cell that this relation leaves to a thing."""
    _, _, cell_height, cell_width = scenes.cell(relation, 0, height, width)
    fraction = radius / min(cell_height, cell_width)
    return min(scenes.SIZES, key=lambda size: abs(np.log(fraction / np.mean(scenes.radius_range(size, relation)))))

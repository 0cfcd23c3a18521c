"""Scenes to pixels: anti-aliased shapes from signed distances, all frames of many clips at once."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.data.worlds import scene as scenes
from sora_jax.data.worlds.scene import Scene

# Crops grow in steps of this many pixels, so that things of similar size are drawn together.
CROP_STEP = 4


def _circle(y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.sqrt(y * y + x * x) - radius


def _square(y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(y), np.abs(x)) - scenes.HALF_SIDE * radius


def _triangle(y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    sin, cos = math.sin(math.tau / 12), math.cos(math.tau / 12)
    return np.maximum(y, cos * np.abs(x) - sin * y) - 0.5 * scenes.TIP * radius


def _star(y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Mirrors the plane into one tenth of it, where the star is bounded by the line from its top tip to a notch."""
    x, up = np.abs(x), -y
    for angle in (0.3 * math.tau, 0.1 * math.tau):  # from the top, clockwise
        beyond = np.maximum(math.cos(angle) * x - math.sin(angle) * up, 0)
        x, up = x - 2 * math.cos(angle) * beyond, up + 2 * math.sin(angle) * beyond
    notch_x, notch_up = scenes.NOTCH * math.sin(0.1 * math.tau), scenes.NOTCH * math.cos(0.1 * math.tau)
    length = math.hypot(notch_x, 1 - notch_up)
    return ((1 - notch_up) * np.abs(x) + notch_x * (up - scenes.TIP * radius)) / length


# Signed distance in pixels to the edge of a shape, negative inside; arguments broadcast.
DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}


def coverage(
    shape: str, y: Float[np.ndarray, "*#grid"], x: Float[np.ndarray, "*#grid"], radius: Float[np.ndarray, "*#grid"]
) -> Float[np.ndarray, "*grid"]:
    """The fraction of a pixel that a shape covers; (y, x) is the pixel's centre as seen from the shape's, in pixels."""
    return np.clip(0.5 - DISTANCE[shape](y, x, radius), 0, 1)


def render(drawn: Sequence[Scene]) -> UInt8[np.ndarray, "clips T H W 3"]:
    """Draws scenes of one frame count and size: uint8 (clips, T, H, W, 3). Raises ValueError if these differ."""
    kinds = {(scene.num_frames, scene.height, scene.width) for scene in drawn}
    if len(kinds) != 1:
        raise ValueError(
            f"got scenes of {len(kinds)} kinds (num_frames, height, width): {sorted(kinds)}; render one kind at once"
        )
    ((num_frames, height, width),) = kinds
    still_BHW = np.stack([scenes.BACKGROUNDS[scene.background](height, width) for scene in drawn])
    frames_BTHWC = np.empty((len(drawn), num_frames, height, width, 3), np.uint8)
    frames_BTHWC[:] = still_BHW[:, None, :, :, None]
    for place in range(max(len(scene.things) for scene in drawn)):  # second things are drawn over what the first left
        for (shape, crop), members in _by_shape_and_crop(drawn, place).items():
            _draw(frames_BTHWC, shape, min(crop, height), min(crop, width), members)
    return frames_BTHWC


def _by_shape_and_crop(drawn: Sequence[Scene], place: int) -> dict[tuple[str, int], list]:
    """(shape, crop in pixels) -> [(clip, track, colour)]."""
    groups = collections.defaultdict(list)
    for number, scene in enumerate(drawn):
        if place < len(scene.things):
            thing = scene.things[place]
            track_T3 = scenes.track(thing, scene.num_frames)
            needed = 2 * (max(scenes.REACH[thing.shape]) * track_T3[:, 2].max() + 1) + 1
            crop = CROP_STEP * math.ceil(needed / CROP_STEP)
            groups[thing.shape, crop].append((number, track_T3, scenes.COLOURS[thing.colour]))
    return groups


def _draw(frames_BTHWC: np.ndarray, shape: str, crop_height: int, crop_width: int, members: list) -> None:
    """Blends one shape into crops of the frames, in place."""
    _, num_frames, height, width, channels = frames_BTHWC.shape
    clip_B1 = np.array([number for number, _, _ in members])[:, None]
    track_BT3 = np.stack([track_T3 for _, track_T3, _ in members])
    colour_BC = np.array([colour for _, _, colour in members], np.float32)
    top_BT = np.clip(np.rint(track_BT3[..., 0] - crop_height / 2), 0, height - crop_height).astype(np.intp)
    left_BT = np.clip(np.rint(track_BT3[..., 1] - crop_width / 2), 0, width - crop_width).astype(np.intp)

    y_BTh = (top_BT - track_BT3[..., 0])[..., None].astype(np.float32) + np.arange(0.5, crop_height, dtype=np.float32)
    x_BTw = (left_BT - track_BT3[..., 1])[..., None].astype(np.float32) + np.arange(0.5, crop_width, dtype=np.float32)
    radius_BT11 = track_BT3[..., 2, None, None].astype(np.float32)
    cover_BThw = coverage(shape, y_BTh[..., :, None], x_BTw[..., None, :], radius_BT11)

    # Rows of (width, channel) are contiguous: a crop is a window on (H, W * C).
    rows_BTHX = frames_BTHWC.reshape(*frames_BTHWC.shape[:3], width * channels)
    window = (crop_height, crop_width * channels)
    crops = np.lib.stride_tricks.sliding_window_view(rows_BTHX, window, axis=(2, 3), writeable=True)
    where = (clip_B1, np.arange(num_frames), top_BT, left_BT * channels)
    below_BThwC = crops[where].reshape(*cover_BThw.shape, channels).astype(np.float32)
    below_BThwC += cover_BThw[..., None] * (colour_BC[:, None, None, None] - below_BThwC)
    below_BThwC += 0.5  # truncation then rounds
    crops[where] = below_BThwC.astype(np.uint8).reshape(*cover_BThw.shape[:3], crop_width * channels)

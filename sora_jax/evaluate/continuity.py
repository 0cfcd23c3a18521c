"""Does a video flow? Jumps between neighbouring frames, in pixels' levels and in the place of the thing that it shows.

What is usual is taken from the video itself, so that fast and slow motions are judged alike. Nothing here knows the caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.evaluate import reader

# Pixels; a thing at rest is read to within about a third of it, and videos of rest have no usual step of their own.
LEAST_STEP = 0.5
# Levels of 255; the same for whole frames.
LEAST_CHANGE = 0.25


def changes(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, " T-1"]:
    """Mean absolute difference of each frame from the one before it, in levels of 255."""
    return np.abs(np.diff(frames_THWC.astype(np.float32), axis=0)).mean((1, 2, 3))


def loop_change(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> float:
    """The change from the last frame to the first, as a multiple of the mean change between neighbours."""
    closing = changes(frames_THWC[[-1, 0]])[0]
    return float(closing / max(changes(frames_THWC).mean(), LEAST_CHANGE))


def seam_change(frames_THWC: UInt8[np.ndarray, "T H W 3"], at: Sequence[int]) -> float:
    """The largest change into one of the frames `at`, as a multiple of the mean of the others."""
    found = changes(frames_THWC)
    places = np.asarray(at) - 1
    others = np.delete(found, places)
    return float(found[places].max() / max(others.mean() if len(others) else 0.0, LEAST_CHANGE))


def change_into_groups(frames_THWC: UInt8[np.ndarray, "T H W 3"], group: int) -> float:
    """The mean change into the first frame of each `group` frames after the first, as a multiple of the mean change.

    A causal VAE decodes a group from one latent frame, and groups are to join unseen: 1 for motions of one speed.
    """
    found = changes(frames_THWC)
    return float(found[::group].mean() / max(found.mean(), LEAST_CHANGE))


def most_change(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> float:
    """The largest change between neighbours, as a multiple of the mean one."""
    found = changes(frames_THWC)
    return float(found.max() / max(found.mean(), LEAST_CHANGE))


def worst_change(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> float:
    """The largest change between neighbours, as a multiple of the median one."""
    found = changes(frames_THWC)
    return float(found.max() / max(np.median(found), LEAST_CHANGE))


def seam(frames_THWC: UInt8[np.ndarray, "T H W 3"], at: int) -> dict[str, float]:
    """How far the thing jumps into frame `at`, and how much its velocity changes there, in usual steps.

    position is the step into the frame and velocity the larger of its changes from the step before it and to the step behind
    it, so that what was given has a part in it on whichever side it is; a usual step is the mean of the others. Both are
    infinite where the thing is not in sight.
    """
    return seams(frames_THWC, [at])[0]


def seams(frames_THWC: UInt8[np.ndarray, "T H W 3"], at: Sequence[int]) -> list[dict[str, float]]:
    """As seam, of each of these frames; usual are the steps that lead into none of them."""
    place_T2 = reader.places(frames_THWC)
    step_T2 = np.diff(place_T2, axis=0)
    length_T = np.linalg.norm(step_T2, axis=1)
    others = np.delete(length_T, np.asarray(at) - 1)
    usual = max(float(np.nanmean(others)) if np.isfinite(others).any() else 0.0, LEAST_STEP)

    def one(frame: int) -> dict[str, float]:
        turns = np.linalg.norm(np.diff(step_T2[max(0, frame - 2) : frame + 1], axis=0), axis=1)
        found = {"position": length_T[frame - 1] / usual, "velocity": turns.max(initial=0.0) / usual}
        return {name: float(value) if np.isfinite(value) else float("inf") for name, value in found.items()}

    return [one(frame) for frame in at]


def kept(frames_THWC: UInt8[np.ndarray, "T H W 3"], window: int, most_lost: float = reader.MOST_LOST) -> bool:
    """Whether the thing of the first `window` frames is there to the end: in sight, and between half and twice its usual area, but
    for a share of the frames, of its colour, in one piece."""
    first, last = reader.read(frames_THWC[:window]), reader.read(frames_THWC[-window:])
    if first is None or last is None or len(last.things) != len(first.things):
        return False
    area_T = reader.areas(frames_THWC)
    usual = np.median(area_T[:window])
    lost = (area_T < usual / 2) | (area_T > 2 * usual)
    return bool(lost.mean() <= most_lost) and all(
        one.colour == other.colour and other.whole and other.lasts
        for one, other in zip(first.things, last.things, strict=True)
    )

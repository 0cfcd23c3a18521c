"""What a scene can show, and where its things are in every frame.

Pixel (row i, column j) covers [i, i+1) x [j, j+1): its centre is (i + 0.5, j + 0.5). y grows downwards.

Every colour has the same chroma (largest minus smallest channel) and every background is achromatic, so wherever a
thing covers a fraction a of a pixel, the chroma of that pixel is a * CHROMA, whatever the colour and the background.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

CHROMA = 200.0  # of 255

# Hues 33 to 65 degrees apart, so that a blurred copy can still be told; lightness differs as the names suggest.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 22, 49),
    "orange": (248, 138, 48),
    "yellow": (250, 250, 50),
    "green": (10, 210, 27),
    "cyan": (45, 238, 245),
    "blue": (20, 60, 220),
    "purple": (137, 20, 220),
    "pink": (255, 55, 195),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")

# Unit steps (y, x) of the motions in a straight line.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (0.0, 1.0),
    "left": (0.0, -1.0),
    "up": (-1.0, 0.0),
    "down": (1.0, 0.0),
    "up-right": (-math.sqrt(0.5), math.sqrt(0.5)),
    "up-left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down-right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down-left": (math.sqrt(0.5), -math.sqrt(0.5)),
}
MOTIONS = ("still", *DIRECTIONS, "orbit", "bounce", "grow", "shrink")

# Unit steps (y, x) from the second thing to the first.
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}


def _uniform(level: int) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: np.full((height, width), level, np.uint8)


def _gradient(height: int, width: int) -> np.ndarray:
    level_H = np.linspace(220, 40, height).round().astype(np.uint8)
    return np.repeat(level_H[:, None], width, axis=1)


def _checkered(height: int, width: int) -> np.ndarray:
    tile = 8  # px, the stride of a latent cell
    odd_HW = (np.arange(height)[:, None] // tile + np.arange(width) // tile) % 2
    return np.where(odd_HW == 1, 96, 160).astype(np.uint8)


# Name -> (height, width) -> gray levels, uint8 (H, W).
BACKGROUNDS: dict[str, Callable[[int, int], UInt8[np.ndarray, "H W"]]] = {
    "white": _uniform(250),
    "light gray": _uniform(192),
    "gray": _uniform(128),
    "dark gray": _uniform(66),
    "black": _uniform(6),
    "gradient": _gradient,
    "checkered": _checkered,
}

# How far a shape of radius 1 reaches from its centroid along (y, x), and its area.
TIP, NOTCH, HALF_SIDE = 1.15, 0.5, 0.89
REACH: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (HALF_SIDE, HALF_SIDE),
    "triangle": (TIP, TIP * math.sin(math.tau / 3)),
    "star": (TIP, TIP * math.cos(math.tau / 20)),
}
AREA: dict[str, float] = {
    "circle": math.pi,
    "square": 4 * HALF_SIDE**2,
    "triangle": 3 * math.sqrt(3) / 4 * TIP**2,
    "star": 5 * TIP * TIP * NOTCH * math.sin(math.tau / 10),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One coloured shape and its motion; lengths in pixels.

    (centre_y, centre_x) is the middle of its path. radius is the mean over the clip, of the disc that a shape is about
    as large as (see REACH). travel is the length of a straight path, the height of a bounce or the radius of an orbit.
    growth is the change of the radius over the clip as a fraction of radius, negative for shrink. cycles counts orbits
    or bounces in the clip; phase is where an orbit begins, in turns.
    """

    colour: str
    shape: str
    size: str
    motion: str
    radius: float
    centre_y: float
    centre_x: float
    travel: float = 0.0
    growth: float = 0.0
    cycles: int = 0
    phase: float = 0.0

    @property
    def combination(self) -> tuple[str, str, str]:
        """The (colour, shape, motion) by which training and held-out scenes are told apart."""
        return (self.colour, self.shape, self.motion)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things on a background.

    relation says where things[0] is relative to things[1]; None if there is one thing.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str
    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return (self.num_frames - 1) / self.fps


def track(thing: Thing, num_frames: int) -> Float[np.ndarray, "T 3"]:
    """Where a thing is: float64 (num_frames, 3) of centroid y, centroid x and radius, in pixels."""
    progress_T = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.full(1, 0.5)
    y_T, x_T = _path(thing, progress_T)
    radius_T = thing.radius * (1 + thing.growth * (progress_T - 0.5))
    return np.stack([thing.centre_y + thing.travel * y_T, thing.centre_x + thing.travel * x_T, radius_T], axis=1)


def _path(thing: Thing, progress_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A path around (0, 0) for a travel of one pixel."""
    zero_T = np.zeros_like(progress_T)
    if thing.motion in DIRECTIONS:
        step_y, step_x = DIRECTIONS[thing.motion]
        return step_y * (progress_T - 0.5), step_x * (progress_T - 0.5)
    if thing.motion == "orbit":  # clockwise as seen on the screen
        angle_T = math.tau * (thing.phase + thing.cycles * progress_T)
        return np.sin(angle_T), np.cos(angle_T)
    if thing.motion == "bounce":  # from the ground up and back
        return 0.5 - np.abs(np.sin(math.pi * thing.cycles * progress_T)), zero_T
    return zero_T, zero_T


def cell(relation: str | None, place: int, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of the frame that thing number `place` lives in: (top, left, height, width) in pixels."""
    if relation is None:
        return 0.0, 0.0, float(height), float(width)
    step_y, step_x = RELATIONS[relation]
    first = (step_y + step_x < 0) == (place == 0)  # the upper or the left half
    if step_y:
        return (0.0 if first else height / 2), 0.0, height / 2, float(width)
    return 0.0, (0.0 if first else width / 2), float(height), width / 2


# Radius as a fraction of the shorter side of the cell, (lowest, highest): alone in the frame, and in a pair.
RADIUS_ALONE: dict[str, tuple[float, float]] = {"small": (0.14, 0.16), "large": (0.25, 0.28)}
RADIUS_IN_PAIR: dict[str, tuple[float, float]] = {"small": (0.20, 0.215), "large": (0.29, 0.31)}


def radius_range(size: str, relation: str | None) -> tuple[float, float]:
    return (RADIUS_ALONE if relation is None else RADIUS_IN_PAIR)[size]

"""What of a clip is given while the rest is made: the masks of prompting, drawn at random for training. numpy only.

One model serves text, images and videos as prompts because it was trained to fill in whatever is missing: a mask says which
patches are known, and these stay at time 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

# (t, h, w) in patches -> which of them are known, of fewer frames if the clip ends there; None if it is too small for it.
Mask = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class KnownConfig:
    """The share of clips that are trained with something given, by what it is; the rest is made from text alone.

    first_frame: the first latent frame, an image to animate. first_frames: some of them, a video to go on with.
    last_frames: some at the end, to be led up to. both_ends: some at each end, to be connected. some_frames: any of them.
    box: what is outside a box of random place, size and time, or inside it: to be painted in, or around. less_noise: nothing,
    but times are drawn from [0, c] with c uniform in [0, 1], as a video that is edited starts from less than noise.
    next_frame: all before a latent frame, which is the clip's last, for a model that is rolled out frame by frame. A clip too
    small for what was drawn, such as an image for frames, has nothing given.
    """

    first_frame: float = 0.0
    first_frames: float = 0.0
    last_frames: float = 0.0
    both_ends: float = 0.0
    some_frames: float = 0.0
    box: float = 0.0
    less_noise: float = 0.0
    next_frame: float = 0.0

    @property
    def gives(self) -> bool:
        """Whether any clip is trained with a part of it given."""
        return any(share for name, share in dataclasses.asdict(self).items() if name != "less_noise")

    def __post_init__(self) -> None:
        shares = dataclasses.asdict(self)
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"loader.known.{name} is {share}; it is a share in [0, 1]")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of loader.known sum to {sum(shares.values()):g}; they must not exceed 1")


def draw(
    config: KnownConfig, rng: np.random.Generator, grid: tuple[int, int, int], to_and_fro: bool = False
) -> tuple[Bool[np.ndarray, "t h w"], float]:
    """(which patches of the grid are known, the highest time of the others). At least one patch is unknown.

    Where t is less than the grid's, the clip ends there. Of a clip that is played to and fro both ends are known, whatever
    the shares, as no caption asks for its turn.
    """
    nothing = np.zeros(grid, bool)
    if to_and_fro:
        known = _both_ends(rng, grid)
        return (nothing if known is None else known), 1.0
    names = [field.name for field in dataclasses.fields(config)]
    ends = np.cumsum([getattr(config, name) for name in names])
    place = int(np.searchsorted(ends, rng.random(), side="right"))
    if place == len(names):
        return nothing, 1.0
    if names[place] == "less_noise":
        return nothing, float(rng.random())
    known = MASKS[names[place]](rng, grid)
    return (nothing if known is None else known), 1.0


def _first_frame(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    return _frames(grid, range(1)) if grid[0] > 1 else None


def _first_frames(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    return _frames(grid, range(int(rng.integers(1, grid[0])))) if grid[0] > 1 else None


def _last_frames(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    return _frames(grid, range(int(rng.integers(1, grid[0])), grid[0])) if grid[0] > 1 else None


def _both_ends(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    t = grid[0]
    if t < 3:
        return None
    gap = int(rng.integers(1, t - 1))
    start = int(rng.integers(1, t - gap))
    return _frames(grid, [*range(start), *range(start + gap, t)])


def _some_frames(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    t = grid[0]
    return _frames(grid, rng.choice(t, int(rng.integers(1, t)), replace=False)) if t > 1 else None


def _next_frame(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    frames = int(rng.integers(1, grid[0] + 1))
    return _frames((frames, *grid[1:]), range(frames - 1))


def _box(rng: np.random.Generator, grid: tuple[int, int, int]) -> np.ndarray | None:
    """Half the time what is outside the box is known, half the time what is inside, and then in all frames, so that something
    is unknown."""
    if grid[1] * grid[2] < 2:
        return None
    inside = np.ones(grid, bool)
    across = [_span(rng, size) for size in grid]
    outside_known = rng.random() < 0.5
    if not outside_known:
        across[0] = slice(0, grid[0])
    inside[tuple(across)] = False
    known = inside if outside_known else ~inside
    return None if known.all() or not known.any() else known


def _span(rng: np.random.Generator, size: int) -> slice:
    length = int(rng.integers(1, size + 1))
    start = int(rng.integers(0, size - length + 1))
    return slice(start, start + length)


def _frames(grid: tuple[int, int, int], frames: range | list[int] | np.ndarray) -> np.ndarray:
    known = np.zeros(grid, bool)
    known[np.asarray(frames, int)] = True
    return known


MASKS: dict[str, Mask] = {
    "first_frame": _first_frame,
    "first_frames": _first_frames,
    "last_frames": _last_frames,
    "both_ends": _both_ends,
    "some_frames": _some_frames,
    "box": _box,
    "next_frame": _next_frame,
}

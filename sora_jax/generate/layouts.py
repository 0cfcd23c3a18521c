"""The modes of prompting, each a way to lay out a timeline: which frames there are, what of them is given, and in which windows
the rest is made. That is all that a mode is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import repeat

from sora_jax.generate import canvas, media
from sora_jax.generate.canvas import Job, Timeline, Window
from sora_jax.generate.known import known_cells
from sora_jax.generate.media import Fit, Part, Video
from sora_jax.generate.requests import Order, RequestError, Size

# Of an interpolation that does not say.
FACTOR = 2
# By how much more another aspect of a draft weighs than another size.
ASPECT = 2.0


class Grid(NamedTuple):
    """What the model's sizes are multiples of: a latent in (frames, pixels, pixels), and a token in latents; and whether it makes
    latents of time one by one."""

    stride: tuple[int, int, int]
    patch: tuple[int, int, int] = (1, 1, 1)
    one_by_one: bool = False


# Sizes --------------------------------------------------------------------------------------------------------------


def _off(what: str, value: int, unit: int, offset: int = 0) -> list[str]:
    """A sentence if value is not offset + unit k, with the nearest that are, or none."""
    if value >= 1 and (value - offset) % unit == 0:
        return []
    below = (value - offset) // unit * unit + offset
    found = [str(near) for near in (below, below + unit) if near > 0]
    rule = f"{offset} + {unit}k" if offset else f"a multiple of {unit}"
    verb = "are the nearest that work" if len(found) > 1 else "is the nearest that works"
    return [f"{what} not {rule}; {' and '.join(found)} {verb}"]


def check_size(size: Size, grid: Grid) -> None:
    """Raises RequestError, with the nearest sizes that work, for what the strides do not allow."""
    (st, sh, sw), (pt, ph, pw) = grid.stride, grid.patch
    wrong = _off(f"height {size.height} is", size.height, sh * ph) + _off(f"width {size.width} is", size.width, sw * pw)
    wrong += _off(f"{size.frames} frames are", size.frames, st * pt, 1 + st * (pt - 1))
    if wrong:
        raise RequestError("; and ".join(wrong))


# Jobs ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What the modes lay out a timeline with. size.frames is the default length, borders (left, right, top, bottom)."""

    order: Order
    size: Size
    borders: tuple[int, int, int, int]
    window: int
    grid: Grid
    limits: media.Limits
    told: list[str]

    @property
    def stride(self) -> int:
        """Frames a group."""
        return self.grid.stride[0]

    @property
    def part(self) -> Part:
        return Part(self.order.start or 0.0, self.order.end)

    def fit(self) -> Fit:
        """The size that inputs are brought to."""
        left, right, top, bottom = self.borders
        height, width = self.size.height - top - bottom, self.size.width - left - right
        if min(height, width) < 1:
            raise RequestError(
                f"left, right, top and bottom leave no room in {self.size.height}x{self.size.width}; make it larger"
            )
        (_, sh, sw), (_, ph, pw) = self.grid.stride, self.grid.patch
        return Fit(height, width, self.order.fit or "crop", (sh * ph, sw * pw))

    def read(self, path: str, fps: float | None = None, part: Part | None = None) -> Video:
        video = media.read(Path(path), fps or self.size.fps, self.fit(), part or self.part, self.limits)
        if video.fps is None and part is None and self.part != media.WHOLE:
            raise RequestError(f"start and end are for videos, but {path} is an image; leave them out")
        self.told.extend(line for line in video.told if line not in self.told)
        return video

    def masked(self, video: Video, path: str) -> Timeline:
        """A video in windows, of which a mask's white part is made anew."""
        mask = media.read_mask(Path(path), self.size.fps, self.fit(), self.part, self.limits)
        (height, width), (H, W) = mask.source_size, video.source_size
        if abs(height * W - width * H) > max(height, width, H, W):
            raise RequestError(f"mask is {height}x{width}, but what it is for is {H}x{W}; give it the same size")
        frames = len(video.frames_THWC)
        if len(mask.new_THW) not in (1, frames):
            raise RequestError(
                f"mask has {len(mask.new_THW)} frames at {self.size.fps:g} fps, but what it is for {frames}; "
                "give it as many, or an image"
            )
        if not mask.new_THW.any():
            fit = self.fit()
            cut = fit.how == "crop" and fit.height * W != fit.width * H
            where = f" in the part that is kept of {H}x{W}; use fit letterbox, or" if cut else ";"
            raise RequestError(f"mask has no white{where} make white what is to be made anew")
        timeline = _timeline([video], self.plan(0, frames))
        given_THW = timeline.given_THW & ~mask.new_THW
        return dataclasses.replace(timeline, given_THW=given_THW, clips=_runs(given_THW.all((1, 2))))

    def tell_unseen(self, timeline: Timeline) -> None:
        """Tells how much of what is given the model does not see: what shares a latent with something that is to be made."""
        given = unseen = 0
        for window in timeline.windows:
            frames = np.clip(np.arange(window.start, window.stop), 0, len(timeline.given_THW) - 1)
            given_THW = timeline.given_THW[frames]
            seen_thw = known_cells(given_THW, self.grid.stride)
            st, sh, sw = self.grid.stride
            seen_THW = repeat(seen_thw, "t h w -> (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)[st - 1 :]
            given, unseen = given + int(given_THW.sum()), unseen + int((given_THW & ~seen_THW).sum())
        if unseen:
            self.told.append(
                f"{100 * unseen / given:.3g} % of what is given is not seen by the model, as it lies in cells of {sh}x{sw} pixels "
                f"(and {st} frames after the first) of which a part is made anew; edges on multiples of these join best"
            )

    def whole(self) -> int:
        """How many frames a video from a prompt or an image has; of seconds, the nearest length that works."""
        if self.order.seconds is None:
            return self.order.frames or self.size.frames
        wanted, groups = self.order.seconds * self.size.fps, self.grid.patch[0]
        frames = 1 + self.stride * (groups * max(1, round(((wanted - 1) / self.stride + 1) / groups)) - 1)
        if not math.isclose(frames, wanted):
            self.told.append(f"{self.order.seconds:g} seconds at {self.size.fps:g} fps are made as {frames} frames")
        return frames

    def added(self) -> int:
        """How many frames are added to what is given: half a window if the order does not say."""
        if self.order.seconds is not None:
            return max(1, round(self.order.seconds * self.size.fps))
        return self.order.frames or self.stride * max(1, (self.window - 1) // self.stride // 2)

    def plan(
        self, first: int, last: int, before: int = 0, after: int = 0, backward: bool = False
    ) -> tuple[Window, ...]:
        if self.grid.one_by_one:
            return canvas.one_by_one(first, last, window=self.window, stride=self.stride)
        return canvas.plan(
            first, last, window=self.window, stride=self.stride, before=before, after=after, backward=backward
        )

    def check_memory(self, frames: int) -> None:
        """Raises RequestError for a result that is larger than what may be read."""
        if frames * self.size.height * self.size.width > self.limits.kept_pixels:
            raise RequestError(
                f"{frames} frames of {self.size.height}x{self.size.width} are more than fits in memory; make less at once"
            )

    def blank(self, frames: int) -> Video:
        """Frames of which nothing is given."""
        self.check_memory(frames)
        size = self.size.height, self.size.width
        return Video(np.zeros((frames, *size, 3), np.uint8), np.zeros(size, bool), self.size.fps, size, ())


def prepare(
    order: Order, defaults: Size, grid: Grid, window: int | None = None, limits: media.Limits = media.LIMITS
) -> Job:
    """Reads an order's files and lays it out; order.samples is not looked at (see Order.variations).

    defaults is the size where the order says none; window is how many frames the model makes at once where the order does not
    say (None: those of defaults). Raises RequestError and media.MediaError.
    """
    if grid.one_by_one and (order.mode not in ("text", "image", "extend") or order.direction == "backward"):
        raise RequestError(
            "this model makes frames one after the other; it is prompted by text, an image or a video that goes on forward"
        )
    window = _window(order, window or defaults.frames, grid)
    left, right, top, bottom = borders = _borders(order)
    size = dataclasses.replace(
        defaults,
        height=order.height or defaults.height + top + bottom,
        width=order.width or defaults.width + left + right,
        fps=order.fps or defaults.fps,
    )
    # Before files are read for it; as long as defaults say, it is a good length.
    try:
        check_size(dataclasses.replace(size, frames=1 + grid.stride[0] * (grid.patch[0] - 1)), grid)
    except RequestError as error:
        if not any(borders):
            raise
        raise RequestError(f"with left, right, top and bottom {error}; change them or say height and width") from error
    told: list[str] = []
    layout = _LAYOUTS[order.mode]
    timeline, fps = layout(_Scene(order, size, borders, window, grid, limits, told))
    made = dataclasses.replace(size, frames=len(timeline.frames_THWC), fps=fps)
    if len(timeline.windows) > 1 and made.frames > window:
        told.append(
            f"more than {window} frames are not made at once: {made.frames} are made in {len(timeline.windows)} windows, "
            f"each from what is {'after' if order.direction == 'backward' else 'before'} it"
        )
    draft = None
    if order.draft is not None:
        small = _small_size(size, order.draft, grid)
        shares = (small.width / size.width,) * 2 + (small.height / size.height,) * 2
        shrunk = [round(border * share) for border, share in zip(borders, shares, strict=True)]
        draft, _ = layout(_Scene(order, small, (shrunk[0], shrunk[1], shrunk[2], shrunk[3]), window, grid, limits, []))
        told.append(f"a draft of {small.height}x{small.width} is made first")
        if stretched := abs(math.log(small.height * size.width / (small.width * size.height))):
            told[-1] += f" and stretched by {stretched:.0%} to {size.height}x{size.width}"
    return Job(order, made, tuple(told), grid.stride[0], timeline, draft)


def _borders(order: Order) -> tuple[int, int, int, int]:
    return order.left or 0, order.right or 0, order.top or 0, order.bottom or 0


def _window(order: Order, window: int, grid: Grid) -> int:
    """How many frames are made at once. Raises RequestError for what the grid does not allow."""
    window = order.window or window
    if grid.patch[0] == 1:
        if wrong := _off(f"window {window} is", window, grid.stride[0], 1):
            raise RequestError(wrong[0])
        return window
    spans = f"this model's tokens span {grid.patch[0]} latents of time"
    if order.mode != "text":
        raise RequestError(f"{spans}; it is prompted by text alone: leave {order.mode} out")
    if order.window is not None:
        raise RequestError(f"{spans}, so all frames are made at once; leave window out")
    return 1 + grid.stride[0] * 10**6  # nothing can be known beside what is made: all at once


def _small_size(size: Size, share: float, grid: Grid) -> Size:
    """About this share of height and width, of an aspect as near to the whole's as there is: what is drafted is not to be
    stretched. Raises RequestError if no smaller size works."""
    units = grid.stride[1] * grid.patch[1], grid.stride[2] * grid.patch[2]

    def distance(sides: tuple[int, int]) -> float:
        down, across = sides[0] / size.height, sides[1] / size.width
        return abs(math.log(down * across / share**2)) / 2 + ASPECT * abs(math.log(down / across))

    whole = size.height, size.width
    sizes = [whole]
    for height in range(units[0], size.height + 1, units[0]):
        # On either side of the whole's aspect.
        below = height * size.width // size.height // units[1] * units[1]
        sizes += [(height, width) for width in (below, below + units[1]) if 0 < width <= size.width]
    nearest = min(sizes, key=distance)
    if nearest == whole:
        raise RequestError(
            f"draft {share:g} of {size.height}x{size.width} is no smaller size in steps of {units[0]}x{units[1]}; make it smaller"
        )
    return dataclasses.replace(size, height=nearest[0], width=nearest[1])


Layout = tuple[Timeline, float]


def _text(scene: _Scene) -> Layout:
    frames = scene.whole()
    check_size(dataclasses.replace(scene.size, frames=frames), scene.grid)
    return _timeline([scene.blank(frames)], scene.plan(0, frames)), scene.size.fps


def _image(scene: _Scene) -> Layout:
    assert scene.order.image is not None
    image = media.read_image(Path(scene.order.image), scene.fit(), scene.limits)
    scene.told.extend(line for line in image.told if line not in scene.told)
    frames = scene.whole()
    if frames == 1:
        raise RequestError(
            f"an image is the first frame, and 1 frame leaves none to make; give {1 + scene.stride} or more"
        )
    check_size(dataclasses.replace(scene.size, frames=frames), scene.grid)
    return _around([image, scene.blank(frames - 1)], scene, made=1), scene.size.fps


def _extend(scene: _Scene) -> Layout:
    assert scene.order.extend is not None
    video, new = scene.read(scene.order.extend), scene.blank(scene.added())
    backward = scene.order.direction == "backward"
    return _around([new, video] if backward else [video, new], scene, made=0 if backward else 1), scene.size.fps


def _connect(scene: _Scene) -> Layout:
    assert scene.order.connect is not None
    a, b = (scene.read(path, part=media.WHOLE) for path in scene.order.connect)
    return _around([a, scene.blank(scene.added()), b], scene, made=1), scene.size.fps


def _loop(scene: _Scene) -> Layout:
    if scene.order.loop is True:
        # Clip and bridge are both made; half of it, in whole groups, leads back as fast as the other half led away.
        whole = scene.whole()
        bridge = max(1, min(whole - 1, scene.stride * max(1, whole // 2 // scene.stride)))
        bridge += (whole - bridge - 1) % scene.stride
        clip = whole - bridge
        if clip < 1:
            raise RequestError(f"{whole} frame is too few for a loop; 2 is the least")
        windows = scene.plan(0, clip) + scene.plan(clip, whole, before=clip, after=clip)
        timeline = _timeline([scene.blank(whole)], windows)
        joints = canvas.joints(clip, whole, window=scene.window, stride=scene.stride)
        return dataclasses.replace(timeline, loop=clip, joints=joints), scene.size.fps
    assert isinstance(scene.order.loop, str)
    video = scene.read(scene.order.loop)
    length, new = len(video.frames_THWC), scene.blank(scene.added())
    timeline = _around([video, new], scene, made=1)
    windows = scene.plan(length, length + len(new.frames_THWC), before=length, after=length)
    if not video.given_HW.all():
        windows = scene.plan(0, length) + windows
    return dataclasses.replace(timeline, windows=windows, loop=length), scene.size.fps


def _edit(scene: _Scene) -> Layout:
    assert scene.order.edit is not None
    video = scene.read(scene.order.edit)
    strength = canvas.STRENGTH if scene.order.strength is None else scene.order.strength
    if scene.order.mask is not None:
        timeline = scene.masked(video, scene.order.mask)
        if strength == 1:
            scene.tell_unseen(timeline)
    else:
        nothing = video._replace(given_HW=np.zeros_like(video.given_HW))
        timeline = _timeline([nothing], scene.plan(0, len(video.frames_THWC)))
    return dataclasses.replace(timeline, strength=strength), scene.size.fps


def _inpaint(scene: _Scene) -> Layout:
    assert scene.order.inpaint is not None and scene.order.mask is not None
    timeline = scene.masked(scene.read(scene.order.inpaint), scene.order.mask)
    scene.tell_unseen(timeline)
    return timeline, scene.size.fps


def _outpaint(scene: _Scene) -> Layout:
    assert scene.order.outpaint is not None
    video = scene.read(scene.order.outpaint)
    scene.check_memory(len(video.frames_THWC))
    left, right, top, bottom = scene.borders
    edges = ((top, bottom), (left, right))
    larger = video._replace(
        frames_THWC=np.pad(video.frames_THWC, ((0, 0), *edges, (0, 0)), mode="edge"),
        given_HW=np.pad(video.given_HW, edges),
    )
    timeline = _timeline([larger], scene.plan(0, len(video.frames_THWC)))
    scene.tell_unseen(timeline)
    return timeline, scene.size.fps


def _interpolate(scene: _Scene) -> Layout:
    order, factor = scene.order, scene.order.factor or FACTOR
    assert order.interpolate is not None
    path, fit = Path(order.interpolate), scene.fit()
    video = media.read(path, order.fps / factor if order.fps else None, fit, scene.part, scene.limits)
    scene.told.extend(video.told)
    if len(video.frames_THWC) < 2 or video.fps is None:
        raise RequestError(f"{order.interpolate} has one frame; give two or more to go between")
    scene.check_memory(factor * len(video.frames_THWC))
    frames_THWC = canvas.stretch(video.frames_THWC, factor)
    timeline = _timeline([video._replace(frames_THWC=frames_THWC)], scene.plan(0, len(frames_THWC)))
    timeline.given_THW[np.arange(len(frames_THWC)) % factor > 0] = False
    strength = canvas.STRENGTH if order.strength is None else order.strength
    if strength == 1:
        scene.tell_unseen(timeline)
    return dataclasses.replace(timeline, strength=strength), video.fps * factor


_LAYOUTS: dict[str, Callable[[_Scene], Layout]] = {
    "text": _text,
    "image": _image,
    "extend": _extend,
    "connect": _connect,
    "loop": _loop,
    "edit": _edit,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "interpolate": _interpolate,
}


def _timeline(parts: Sequence[Video], windows: tuple[Window, ...]) -> Timeline:
    if len(parts) == 1:
        # Not copied: blank frames take no memory until something is written to them.
        (part,) = parts
        given_THW = np.zeros(part.frames_THWC.shape[:3], bool)
        if part.given_HW.any():
            given_THW[:] = part.given_HW
        return Timeline(part.frames_THWC, given_THW, windows)
    frames_THWC = np.concatenate([part.frames_THWC for part in parts])
    given = [np.broadcast_to(part.given_HW, part.frames_THWC.shape[:3]) for part in parts]
    return Timeline(frames_THWC, np.concatenate(given), windows)


def _runs(true_T: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(first, last) of frames first .. last - 1 for which it holds, each as long as it can be."""
    edges = np.flatnonzero(np.diff(true_T.astype(int), prepend=0, append=0))
    return tuple((int(first), int(last)) for first, last in edges.reshape(-1, 2))


def _around(parts: Sequence[Video], scene: _Scene, made: int) -> Timeline:
    """Parts in order, of which number `made` is made and the others are given.

    If a letterbox left over pixels of what is given, all of it is made; the given pixels are put back.
    """
    ends = np.cumsum([0, *(len(part.frames_THWC) for part in parts)]).tolist()
    first, last, total = ends[made], ends[made + 1], ends[-1]
    backward = first == 0
    if not all(part.given_HW.all() for number, part in enumerate(parts) if number != made):
        if 0 < first < last < total:
            # Both ends before the bridge, which is to see where it leads.
            bridge = scene.plan(first, last, before=first, after=total - last)
            windows = scene.plan(0, first) + scene.plan(last, total) + bridge
        else:
            windows = scene.plan(0, total, backward=backward)
        timeline = _timeline(parts, windows)
        scene.tell_unseen(timeline)
        return timeline
    windows = scene.plan(first, last, before=first, after=total - last, backward=backward)
    clips = [(start, end) for number, (start, end) in enumerate(itertools.pairwise(ends)) if number != made]
    return dataclasses.replace(_timeline(parts, windows), clips=tuple(clips))

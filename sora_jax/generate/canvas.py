"""From orders to canvases: every way of prompting is pixels that are given, a noise level for the rest, and one sampler.

A Job lays an order out on a Timeline: all frames of the result, which pixels are given, and the windows in which the rest is
made. `passes` walks through it: it yields what is to be sampled, is sent what was made, and returns the result. numpy only.

Time goes in groups, as the causal VAE has it: of a canvas, frame 0 is a latent alone and latent k stands for frames
stride (k - 1) + 1 .. stride k. A latent is known where every pixel that it stands for is given, so windows are laid such that
given frames fill whole groups. A frame that shares a group with frames to be made is not known to the model, but is put back
into the result all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sora_jax.generate.known import Known
from sora_jax.generate.requests import Order, RequestError, Size

# Of orders that begin from frames and do not say how much noise they get.
STRENGTH = 0.6
# The most that a window insists on frames of which it knows only that the model made them just now, and that lead nowhere: what
# insisting pushes too far adds up over windows.
ONLY_GOING_ON = 1.0
# The most where a loop is led back without a prompt: insisted on by 2, its way back is a leap in twice as many.
LED_BACK = 1.5
# The time from which what is around a joint of a loop is made once more: late enough to be the same video.
JOINED = 0.5


class Pass(NamedTuple):
    """One video to sample. known is None where nothing is given; where everything is, its round trip alone is wanted.
    known_guidance is that of the order, if it has one, else that of the settings but at most most_known_guidance."""

    prompt: str
    size: Size
    seed: int
    known: Known | None
    known_guidance: float | None
    most_known_guidance: float


class Window(NamedTuple):
    """Frames start .. stop - 1 of a timeline are sampled together, 1 + stride k of them; first .. last - 1 are made by it.

    start may be before the timeline and stop behind it, where what is needed does not fill whole groups.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """All frames of a video before it is made.

    clips are ranges of frames that are given in whole and come back as their own round trip. Behind the end come the first
    `loop` frames again; 0 is a video that does not loop, whose last frame is held. What is around the joints of a loop is made
    once more: these windows go round.
    """

    frames_THWC: np.ndarray
    given_THW: np.ndarray
    windows: tuple[Window, ...]
    strength: float = 1.0
    clips: tuple[tuple[int, int], ...] = ()
    loop: int = 0
    joints: tuple[Window, ...] = ()

    @property
    def seams(self) -> list[int]:
        """The frames at which what was made or given apart meets, first to last."""
        edges = {edge for clip in self.clips for edge in clip} | {
            edge for window in self.windows for edge in (window.first, window.last)
        }
        return sorted(edges - {0, len(self.frames_THWC)})


@dataclasses.dataclass(frozen=True)
class Job:
    """An order, laid out. size is that of the result; told are sentences for the user; draft is the same in small."""

    order: Order
    size: Size
    told: tuple[str, ...]
    stride: int
    timeline: Timeline
    draft: Timeline | None = None

    @property
    def timelines(self) -> list[Timeline]:
        """That of the result, and of its draft."""
        return [timeline for timeline in (self.timeline, self.draft) if timeline is not None]

    @property
    def goes_on(self) -> bool:
        """Whether the model meets something in it that is there already: given, or made in another window."""
        return any(each.given_THW.any() or each.loop > 0 or len(each.windows) > 1 for each in self.timelines)

    @property
    def most_frames(self) -> int:
        """Of what is made at once."""
        return min(self.size.frames, max(window.stop - window.start for window in self.timeline.windows))


# Windows ------------------------------------------------------------------------------------------------------------


def plan(
    first: int, last: int, *, window: int, stride: int, before: int = 0, after: int = 0, backward: bool = False
) -> tuple[Window, ...]:
    """Windows of at most `window` frames that make frames first .. last - 1, each once and in order.

    `before` frames before first are given, and `after` from last on. What does not fit one window with a quarter of it given, is
    made in windows of which half was given or made before. A bridge (before and after) has at least a quarter on each side in
    its last window, the only one that sees where it leads. backward begins at the end.
    Raises RequestError if the window is too small for given and new frames together.
    """
    groups = (window - 1) // stride
    least = 2 if after and not backward else 1
    if groups < least and (last - first > 1 or before or after):
        raise RequestError(
            f"window {window} is too small to make frames beside given ones; raise it to at least {1 + least * stride}"
        )
    windows: list[Window] = []
    at = last if backward else first
    while first < at if backward else at < last:
        if backward:
            windows.append(_window_before(first, at, last - at + after, groups, stride))
            at = windows[-1].first
        else:
            windows.append(_window_after(at, last, at - first + before, after, groups, stride))
            at = windows[-1].last
    return tuple(windows)


def _window_after(at: int, last: int, have: int, after: int, groups: int, stride: int) -> Window:
    """The window that makes frames from `at` on, with `have` frames before it: 1 + stride head of them are in it."""
    # Without frames before, the frame that is a latent alone is made too.
    alone = 1 if have == 0 else 0
    wanted = math.ceil((last - at - alone) / stride)
    tail = max(1, groups // 4) if after else 0
    seen = 0 if alone else (have - 1) // stride
    head = min(seen, groups // 4, groups - 1 - tail)
    if wanted <= groups - head - tail:
        made, spare = wanted, groups - head - tail - wanted
        if after:
            # What fills the last group is of the frames after it.
            whole = (after - (alone + stride * made - (last - at))) // stride
            tail += min(spare if alone else spare // 2, max(0, whole - tail))
        end = last
    else:
        tail, made = 0, groups - min(seen, groups // 2)
        # The last window, which sees what comes after, has something to make.
        made = wanted // 2 if made >= wanted else made
        end = at + alone + stride * made
    head = min(seen, groups - made - tail)
    start = at if alone else at - 1 - stride * head
    return Window(start, at + alone + stride * (made + tail), at, end)


def _window_before(first: int, at: int, have: int, groups: int, stride: int) -> Window:
    """The window that makes frames up to `at`, with `have` frames from there on: stride head of them are in it."""
    wanted = math.ceil((at - first - 1) / stride)
    # A clip shorter than a group is held to fill one.
    seen = max(1, have // stride) if have else 0
    made = wanted if wanted <= groups - min(seen, max(1, groups // 4)) else groups - min(seen, max(1, groups // 2))
    head = min(seen, groups - made)
    start = at - 1 - stride * made
    return Window(start, at + stride * head, max(first, start), at)


def joints(clip: int, total: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """The windows that make once more what is on both sides of the joints of a loop of `total` frames: of frame `clip`, where its
    bridge begins, and then of where it closes. Each is between a frame and a group that stay, and frames go round.

    A VAE joins what is within a group, so the loop closes in the middle of one, and the groups of the first are half of one out of
    step with those: what it leaves at its edges is within what is made next. None where there is no room.
    """
    groups = (min(window, total + 1) - 1) // stride
    if groups < 2:
        return ()
    made = stride * (groups - 1)
    before = stride * (groups // 2 - 1) + stride // 2
    # Of a group alone the joint itself is the middle.
    earlier = stride // 2 - (total - clip) % stride if groups > 2 else 0
    firsts = clip - before - earlier, total - before
    return tuple(Window(first - 1, first + made + stride, first, first + made) for first in firsts)


def one_by_one(first: int, last: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """Windows that make frames first .. last - 1 a latent each, from all before it that a window of `window` frames holds: the way
    of a model that was trained to make the next one alone."""
    windows = [Window(0, 1, 0, 1)] if first == 0 else []
    for at in range(max(first, 1), last, stride):
        start = at - 1 - stride * min((at - 1) // stride, max(0, (window - 1) // stride - 1))
        windows.append(Window(start, at + stride, at, min(at + stride, last)))
    return tuple(windows)


# Frames -------------------------------------------------------------------------------------------------------------


def fill(
    frames_THWC: UInt8[np.ndarray, "T H W 3"], given_THW: Bool[np.ndarray, "T H W"]
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames whose not given pixels repeat the nearest given one of their frame, or where it has none, the nearest frame that
    has, the later of two. What was there has no part in it. Grey if nothing is given.

    The VAE sees little that is foreign to the given frames: its encoder is causal, so given frames at the end of a canvas look
    at a past in which their first is held.
    """
    from scipy import ndimage

    some_T, all_T = given_THW.any((1, 2)), given_THW.all((1, 2))
    if not some_T.any():
        return np.full_like(frames_THWC, 128)
    filled = frames_THWC.copy()
    for frame in np.flatnonzero(some_T & ~all_T):
        down, across = ndimage.distance_transform_edt(~given_THW[frame], return_distances=False, return_indices=True)
        filled[frame] = frames_THWC[frame][down, across]
    sources, frames = np.flatnonzero(some_T), np.flatnonzero(~some_T)
    later = np.searchsorted(sources, frames)
    earlier_frame, later_frame = sources[np.maximum(later - 1, 0)], sources[np.minimum(later, len(sources) - 1)]
    closer = np.abs(later_frame - frames) <= np.abs(earlier_frame - frames)
    filled[frames] = filled[np.where(closer, later_frame, earlier_frame)]
    return filled


def stretch(frames_THWC: UInt8[np.ndarray, "T H W 3"], factor: int) -> UInt8[np.ndarray, "U H W 3"]:
    """factor (T - 1) + 1 frames: every frame of the video, and linear blends between them."""
    count = factor * (len(frames_THWC) - 1) + 1
    found_UHWC = np.empty((count, *frames_THWC.shape[1:]), np.uint8)
    # One after the other: all of them in floating point would be eight times as large.
    for number in range(count):
        before, part = divmod(number, factor)
        after, weight = min(before + 1, len(frames_THWC) - 1), part / factor
        found_UHWC[number] = np.round((1 - weight) * frames_THWC[before] + weight * frames_THWC[after])
    return found_UHWC


def enlarge(frames_THWC: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Frames stretched to another size by bicubic interpolation."""
    from PIL import Image

    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames_THWC]
    return np.stack([np.asarray(image) for image in resized])


# Passes -------------------------------------------------------------------------------------------------------------


def pass_seed(seed: int, number: int) -> int:
    """The seed of an order's pass: its own for the first, and others behind it, so that windows do not share their noise."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


class Result(NamedTuple):
    """A video, uint8 (T, H, W, 3), and the draft that it was made from, if it was."""

    frames_THWC: np.ndarray
    draft_THWC: np.ndarray | None = None


Walk = Generator[Pass, np.ndarray, np.ndarray]


def passes(job: Job) -> Generator[Pass, np.ndarray, Result]:
    """Yields what is to be sampled and is sent what was made of it. A draft has the seeds of what is made from it."""
    if job.draft is None:
        return Result((yield from _walk(job, job.timeline)))
    small_THWC = yield from _walk(job, job.draft)
    drafted_THWC = enlarge(small_THWC, job.size.height, job.size.width)
    timeline = dataclasses.replace(
        job.timeline,
        frames_THWC=np.where(job.timeline.given_THW[..., None], job.timeline.frames_THWC, drafted_THWC),
        strength=STRENGTH if job.order.strength is None else job.order.strength,
    )
    return Result((yield from _walk(job, timeline)), small_THWC)


def _walk(job: Job, timeline: Timeline) -> Walk:
    """Window after window; frames that were made are given to the windows after them, which insist on them only where they have
    to meet something. Where a loop is led back there is no prompt: it tells of the way there."""
    frames_THWC, given_THW, number = timeline.frames_THWC.copy(), timeline.given_THW.copy(), 0
    from_prompt = timeline.loop > 0 and not timeline.given_THW.any()

    def one(known: Known, most: float = math.inf, prompt: str = job.order.prompt) -> Pass:
        length, height, width = known.given_THW.shape
        size = Size(height, width, length, job.size.fps)
        nothing = known.strength == 1 and not known.given_THW.any()
        seed = pass_seed(job.order.seed, number)
        return Pass(prompt, size, seed, None if nothing else known, job.order.known_guidance, most)

    for window in timeline.windows:
        shown = _indices(window.start, window.stop, len(frames_THWC), timeline.loop)
        given = given_THW[shown]
        seen_THWC = frames_THWC[shown]
        known = Known(fill(seen_THWC, given) if timeline.strength == 1 else seen_THWC, given, timeline.strength)
        leads = given[: window.first - window.start].any() and given[window.last - window.start :].any()
        users = timeline.given_THW[shown].any()
        if from_prompt and leads:
            made_THWC = yield one(known, LED_BACK, prompt="")
        else:
            made_THWC = yield one(known, math.inf if users or leads else ONLY_GOING_ON)
        frames_THWC[window.first : window.last] = made_THWC[window.first - window.start : window.last - window.start]
        given_THW[window.first : window.last] = True
        number += 1
    for window in timeline.joints:
        shown = np.arange(window.start, window.stop) % len(frames_THWC)
        made = slice(window.first - window.start, window.last - window.start)
        stays_THW = np.ones((len(shown), *given_THW.shape[1:]), bool)
        stays_THW[made] = False
        made_THWC = yield one(Known(frames_THWC[shown], stays_THW, JOINED), ONLY_GOING_ON)
        frames_THWC[shown[made]] = made_THWC[made]
        number += 1
    # After the windows, which are to see what was given and not its round trip.
    for first, last in timeline.clips:
        count = _whole(last - first, job.stride)
        shown = first + np.minimum(np.arange(count), last - first - 1)
        known = Known(timeline.frames_THWC[shown], np.ones((count, *given_THW.shape[1:]), bool))
        made_THWC = yield one(known)
        frames_THWC[first:last] = made_THWC[: last - first]
        number += 1
    return frames_THWC


def _whole(frames: int, stride: int) -> int:
    """The least 1 + stride k that are no fewer."""
    return 1 + stride * math.ceil((frames - 1) / stride)


def _indices(start: int, stop: int, total: int, loop: int) -> np.ndarray:
    """The frames of a timeline that a window sees: before it the first, behind it the last, or the loop's first ones."""
    at = np.arange(start, stop)
    inside = np.clip(at, 0, total - 1)
    return np.where(at >= total, np.minimum(at - total, loop - 1), inside) if loop else inside


def run(jobs: Sequence[Job], sample: Callable[[list[Pass]], Sequence[np.ndarray]]) -> Iterator[tuple[int, Result]]:
    """(number, result) of jobs, each as soon as it is there. sample makes one pass of each unfinished job at a time, so that they
    can share rows: what is given comes back as the VAE's round trip of the canvas, exactly."""
    walks = [passes(job) for job in jobs]
    waiting = {number: next(walk) for number, walk in enumerate(walks)}
    while waiting:
        numbers = list(waiting)
        for number, made in zip(numbers, sample([waiting[n] for n in numbers]), strict=True):
            try:
                waiting[number] = walks[number].send(made)
            except StopIteration as done:
                del waiting[number]
                yield number, done.value

"""What each way of prompting reaches: a trained DiT, prompted with real held-out clips, judged from the pixels of its videos.

Every mode with something given is an order, laid out and sampled as a user's is. Shares are of videos; what real clips or naive
ways reach stands beside them as ceiling and floor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import StudyRun
from sora_jax.data.worlds import captions, clips, world
from sora_jax.data.worlds.scene import Scene
from sora_jax.data.worlds.world import WorldConfig
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.evaluate import adherence, continuity, reader, reconstruction
from sora_jax.generate import canvas, layouts
from sora_jax.generate.canvas import Job
from sora_jax.generate.pipeline import Pipeline, Request
from sora_jax.generate.requests import Order, Size
from sora_jax.study import judgement, report
from sora_jax.train import dit

# A jump at a seam, in usual steps; of a loop's and a bridge's change, in usual ones. Pixels that an edit may move a thing by.
MOST_SEAM, MOST_LOOP, MOST_BRIDGE, MOST_MOVED = 1.5, 1.25, 2.0, 2.0
# How much longer than the longest clips of training "long" is, and the motions that can go on for so long within a frame.
LONGER = 8
SHOWN = 4  # videos a mode
ENDLESS = ("still", "orbit")
# Pixels of the margin of what is shown, even for the codecs, and its colour beside what was given and beside what was made.
MARGIN, GIVEN, MADE = 2, (0, 150, 80), (225, 225, 225)
# Seeds of the judge are of other scenes, too.
SCENES_A_SEED = 10**6


@dataclasses.dataclass(frozen=True)
class Made(report.Video):
    """A video with what of it was given, None is nothing; clips are frames that were given in whole, and where they begin; source
    is the video that it was made of, from some noise."""

    given_THW: np.ndarray | None = None
    clips: tuple[tuple[int, np.ndarray], ...] = ()
    source_THWC: np.ndarray | None = None

    def marked(self) -> report.Video:
        """With a margin that is green beside what was given, and behind its source."""
        given_THW = np.zeros(self.frames_THWC.shape[:3], bool) if self.given_THW is None else self.given_THW
        frames_THWC = _framed(self.frames_THWC, given_THW)
        if self.source_THWC is not None:
            source_THWC = _framed(self.source_THWC, np.ones(self.source_THWC.shape[:3], bool))
            frames_THWC = np.concatenate([source_THWC, frames_THWC], axis=2)
        return report.Video(frames_THWC, self.fps, self.prompt, self.seed)


def _framed(frames_THWC: np.ndarray, given_THW: np.ndarray) -> np.ndarray:
    edges = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
    framed_THWC = np.where(np.pad(given_THW, edges, mode="edge")[..., None], GIVEN, MADE).astype(np.uint8)
    framed_THWC[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = frames_THWC
    return framed_THWC


Mode = tuple[dict[str, float], Sequence[Made]]


def of(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """Scores of stages by mode, and the videos of the last one; kept beside the checkpoints, in prompted.json and prompted.npz."""
    judges = reader, adherence, continuity, sys.modules[__name__]

    def judged(made: Pipeline, settings: SamplerConfig, there: Collection[str]) -> Iterator[report.Rung]:
        with tempfile.TemporaryDirectory() as inputs:
            yield from Prompting(made, settings, study.prompts, study.seed, Path(inputs)).judge(there)

    found = {name: judgement.once(study, workdir / name, "prompted", judges, judged) for name in names}
    words = (
        "Prompted with real held-out clips. The margin is green beside what was given, and grey beside what was made; what was "
        "made of a whole video stands to the right of it."
    )
    shown = [rung for rung in found[names[-1]] if rung.samples]
    numbers = {name: {rung.name: dict(rung.scores) for rung in rungs} for name, rungs in found.items()}
    return numbers, report.Section("prompting", "Prompting", words, shown)


def check(world: WorldConfig, stride: int) -> None:
    """Raises ValueError for a world that this does not judge a model of; stride is the VAE's, of frames."""
    if world.two_things_fraction or len(world.fps) > 1:
        raise ValueError(
            "prompting is judged on worlds of one thing at one frame rate; this one has pairs or several rates"
        )
    if min(len(world.colours), len(world.shapes)) < 2:
        raise ValueError("prompting is judged by edits of colours and shapes; give the world two of each or more")
    if not set(ENDLESS) & set(world.motions) or set(world.motions) == {"still"}:
        raise ValueError(
            f"prompting is judged on things that move, and in long videos on those that stay in the frame; this world has "
            f"{', '.join(world.motions)}: give it {' or '.join(ENDLESS)}, and a motion"
        )
    if max(world.frame_counts) < 1 + 2 * stride:
        raise ValueError(
            f"prompting is judged on clips with something between their ends; the longest of this world have "
            f"{max(world.frame_counts)} frames: give it some of {1 + 2 * stride} or more"
        )


@dataclasses.dataclass
class Prompting:
    """Judges one model; `count` videos a mode, of which SHOWN are handed on for the report. Input files go to folder.

    Raises ValueError for a model of worlds that this does not judge.
    """

    made: Pipeline
    settings: SamplerConfig
    count: int
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        self.world, self.stride = self.made.run.data.world, self.made.geometry.stride[0]
        check(self.world, self.stride)
        self.window, (self.fps,) = max(self.world.frame_counts), self.world.fps
        self.start = self.seed * SCENES_A_SEED
        self.scenes = dit.heldout_videos(self.world, self.count, self.start, self.window)
        self.real = clips.render_mixed(self.scenes)
        self.round_trips = self._round_trips(self.real)
        self._numbers = itertools.count()
        # About half of a clip, in whole groups.
        self.half = 1 + self.stride * ((self.window - 1) // self.stride // 2)

    @functools.cached_property
    def from_text(self) -> list[np.ndarray]:
        """Videos of the same prompts and seeds of which nothing is given."""
        return judgement.sampled(self.made, self.settings, self.scenes, self.seed, "text")

    def judge(self, there: Collection[str] = ()) -> Iterator[report.Rung]:
        """Every mode that is not there already, with its scores and some of its videos."""
        for name, mode in self.modes().items():
            if name in there:
                continue
            began = time.perf_counter()
            found, videos = mode()
            shown = [video.marked() for video in videos[:SHOWN]]
            logging.info("%s: %s in %.1f s", name, _told(found), time.perf_counter() - began)
            yield report.Rung(name, shown, found | {"count": len(videos)})

    def modes(self) -> dict[str, Callable[[], Mode]]:
        """The ways of prompting by name, in the order of the page."""
        ways = (
            self.text,
            self.image,
            self.extend_forward,
            self.extend_backward,
            self.long,
            self.loop,
            self.loop_file,
            self.connect,
            self.connect_others,
            self.edit,
            self.edit_shape,
            self.edit_masked,
            self.inpaint,
            self.inpaint_time,
            self.outpaint,
            self.interpolate,
            self.draft,
            self.still,
            self.variations,
        )
        sizes = {f"sizes_{name}": functools.partial(self.sizes, name) for name in self.groups_of_sizes()}
        lengths = {
            f"length_{name}": functools.partial(self.lengths, frames) for name, frames in self.other_lengths().items()
        }
        return {way.__name__: way for way in ways} | sizes | lengths

    # Modes -----------------------------------------------------------------------------------------------------------

    def text(self) -> Mode:
        """Of a prompt alone, which the other ways are held against; right frames of each motion, too."""
        right = reader.frames_right(reader.read_frames(self.from_text), self.scenes)
        shares: dict[str, list[float]] = {motion: [] for motion in self.world.motions}
        for scene, right_T in zip(self.scenes, right, strict=True):
            shares[scene.things[0].motion].append(float(right_T.mean()))
        of_motions = {f"frames_{motion}": float(np.mean(found)) for motion, found in shares.items() if found}
        videos = _of_requests(self.from_text, judgement.asked(self.world, self.scenes, self.seed))
        return adherence.judge(self.from_text, self.scenes, self.seed)[0] | of_motions, videos

    def image(self) -> Mode:
        """The first frame of a real clip is animated."""
        videos = self._made(self.scenes, lambda number: {"image": self._file(self.real[number][:1])})
        made = [video.frames_THWC for video in videos]
        kept = _identity(made, self.scenes) | _identity(self.round_trips, self.scenes, "_ceiling")
        return self._returned(videos) | kept | {
            "motion": reader.score(made, self.scenes)["motion"],
            "motion_of_text": reader.score(self.from_text, self.scenes)["motion"],
        }, videos

    def extend_forward(self) -> Mode:
        """The first half of a real clip goes on."""
        return self._extended(self.half, lambda clip: clip[: self.half], {})

    def extend_backward(self) -> Mode:
        """What was before the second half of a real clip."""
        return self._extended(self.half, lambda clip: clip[self.half :], {"direction": "backward"})

    def _extended(self, seam: int, part: Callable[[np.ndarray], np.ndarray], more: dict[str, Any]) -> Mode:
        def given(number: int) -> dict[str, Any]:
            clip = part(self.real[number])
            return {"extend": self._file(clip), "frames": self.window - len(clip)} | more

        videos = self._made(self.scenes, given)
        made = [video.frames_THWC for video in videos]
        found = _seams(made, seam) | {
            f"{name}_ceiling": share for name, share in _seams(self.round_trips, seam).items()
        }
        if moving := _that_move(self.scenes):
            found["both_of_moving"] = _seams([made[number] for number in moving], seam)["both"]
        motion = reader.score(made, self.scenes)["motion"]
        return found | _identity(made, self.scenes) | {"motion": motion} | self._returned(videos), videos

    def long(self) -> Mode:
        """The first half of a real clip goes on to LONGER times the length of any clip of training, of motions that stay in the
        frame; half as many, as each takes long."""
        scenes = of_motions(self.world, ENDLESS, max(1, self.count // 2), self.window, self.start)
        frames = 1 + self.stride * math.ceil((LONGER * self.window - 1) / self.stride)
        beginnings = [clip[: self.half] for clip in clips.render_mixed(scenes)]
        videos = self._made(
            scenes, lambda number: {"extend": self._file(beginnings[number]), "frames": frames - self.half}
        )
        made = [video.frames_THWC for video in videos]
        windows = canvas.plan(self.half, frames, window=self.window, stride=self.stride, before=self.half)
        at = [window.first for window in windows]
        seams = [max(seam.values()) for frames_THWC in made for seam in continuity.seams(frames_THWC, at)]
        ends = [frames_THWC[-self.window :] for frames_THWC in made]
        at_end = {"": range(len(made)), "_of_moving": _that_move(scenes)}
        kept = [continuity.kept(frames_THWC, self.window) for frames_THWC in made]
        found = {
            "kept_in_every_frame": float(np.mean([continuity.kept(each, self.window, most_lost=0.0) for each in made])),
            "seams_smooth": float(np.mean(np.array(seams) <= MOST_SEAM)),
            "length": float(frames),
        } | _identity([frames_THWC[: self.window] for frames_THWC in made], scenes, "_at_start")
        for of, which in at_end.items():
            if which:
                found[f"kept{of}"] = float(np.mean([kept[number] for number in which]))
                found |= _identity(
                    [ends[number] for number in which], [scenes[number] for number in which], f"_at_end{of}"
                )
        return found | self._returned(videos), videos

    def loop(self) -> Mode:
        """A video that is made from a prompt and leads back to its start; of motions that are ever where they were also alone."""
        videos = self._made(self.scenes, lambda number: {"loop": True})
        return self._looped([video.frames_THWC for video in videos], self.from_text), videos

    def loop_file(self) -> Mode:
        """The first half of a real clip is led back to its start."""
        halves = [clip[: self.half] for clip in self.real]
        videos = self._made(self.scenes, lambda number: {"loop": self._file(halves[number])})
        return self._looped([video.frames_THWC for video in videos], halves) | self._returned(videos), videos

    def _looped(self, made: Sequence[np.ndarray], led: Sequence[np.ndarray]) -> dict[str, float]:
        """Do loops close, and move, beside videos that were not led back."""

        def closed(frames: Sequence[np.ndarray]) -> np.ndarray:
            return np.array([continuity.loop_change(each) <= MOST_LOOP for each in frames])

        motions = np.array([scene.things[0].motion for scene in self.scenes])
        returns, moves = np.isin(motions, ENDLESS), motions != "still"
        # All the way round: one that jumps elsewhere closes, too.
        rounds = [np.concatenate([each, each[:1]]) for each in made]
        smooth = np.array([continuity.worst_change(each) <= MOST_BRIDGE for each in rounds])
        even = [continuity.most_change(each) <= MOST_SEAM for each in rounds]
        changes = zip(*([continuity.changes(each).mean() for each in group] for group in (made, led)), strict=True)
        return (
            {
                "closed": float(closed(made).mean()),
                "closed_floor": float(closed(led).mean()),
                "even": float(np.mean(even)),
                # A loop of something at rest is none.
                "alive": float(np.mean([one >= other / 2 for one, other in changes])),
            }
            | {
                name: float(shares[which].mean())
                for name, shares, which in (
                    ("closed_of_endless_motions", closed(made), returns),
                    ("smooth_of_moving", smooth, moves),
                )
                if which.any()
            }
            | _identity(made, self.scenes)
        )

    def connect(self) -> Mode:
        """The first half of a clip is led to the second half of it played backwards: as far away as the thing goes in that time."""
        scenes = self._moving(self.count)
        ends = [(clip[: self.half], clip[self.half :][::-1]) for clip in clips.render_mixed(scenes)]
        found, videos = self._connected(scenes, ends)
        # Fades are smooth; a bridge shows the thing in every frame.
        bridges = [video.frames_THWC[len(one) : -len(other)] for video, (one, other) in zip(videos, ends, strict=True)]
        right = [right_T.all() for right_T in reader.frames_right(reader.read_frames(bridges), scenes)]
        smooth = [continuity.worst_change(video.frames_THWC) <= MOST_BRIDGE for video in videos]
        both = float(np.mean(np.logical_and(right, smooth)))
        return found | {"smooth_and_right": both} | _identity(bridges, scenes), videos

    def connect_others(self) -> Mode:
        """The first half of a clip is led to the second half of another one of that size, of another thing."""
        # Enough for each to find another, however few are judged.
        scenes = self._moving(self.count + 100)
        led_to = []
        for number, scene in enumerate(scenes[: self.count]):
            others = (each for each in scenes[number + 1 :] if (each.height, each.width) == (scene.height, scene.width))
            led_to.append(next(each for each in others if _looks(each) != _looks(scene)))
        both = clips.render_mixed(scenes[: self.count]), clips.render_mixed(led_to)
        return self._connected(led_to, [(a[: self.half], b[self.half :]) for a, b in zip(*both, strict=True)])

    def _moving(self, count: int) -> list[Scene]:
        """Scenes of things that move: one at rest has no usual change to hold that of its bridge against."""
        motions = [motion for motion in self.world.motions if motion != "still"]
        return of_motions(self.world, motions, count, self.window, self.start)

    def _connected(self, scenes: Sequence[Scene], ends: Sequence[tuple[np.ndarray, np.ndarray]]) -> Mode:
        """Bridges between ends, with the prompts of scenes."""
        videos = self._made(scenes, lambda number: {"connect": tuple(self._file(end) for end in ends[number])})

        def smooth(frames: Sequence[np.ndarray]) -> float:
            return float(np.mean([continuity.worst_change(each) <= MOST_BRIDGE for each in frames]))

        frames = [video.frames_THWC for video in videos]
        return {
            "smooth": smooth(frames),
            "smooth_floor": smooth([np.concatenate(pair) for pair in ends]),
            "smooth_floor_of_fades": smooth([_faded(*pair, len(frames[0])) for pair in ends]),
            "smooth_ceiling": smooth(self.round_trips),
        } | self._returned(videos), videos

    def edit(self) -> Mode:
        """Real clips are made anew with another colour in the prompt, any of the others."""
        return self._remade("colour", self.recoloured)

    def edit_shape(self) -> Mode:
        """The same with another shape."""
        return self._remade("shape", self._changed("shape", self.world.shapes))

    def _remade(self, attribute: str, scenes: Sequence[Scene]) -> Mode:
        videos = self._made(scenes, lambda number: {"edit": self._file(self.real[number])})
        return self._edited([video.frames_THWC for video in videos], attribute, scenes), videos

    def edit_masked(self) -> Mode:
        """The same within a box around the thing alone."""
        masks = [_box(clip) for clip in self.real]

        def given(number: int) -> dict[str, Any]:
            return {"edit": self._file(self.real[number]), "mask": self._file(_white(masks[number][None]))}

        videos = self._made(self.recoloured, given)
        made = [video.frames_THWC for video in videos]
        black = [number for number, mask in enumerate(masks) if not mask.all()]
        around = [[clips[number][:, ~masks[number]] for number in black] for clips in (self.real, made)]
        return self._edited(made, "colour", self.recoloured) | (
            {"original_psnr": reconstruction.psnr(*around)} if black else {}
        ), videos

    @functools.cached_property
    def recoloured(self) -> list[Scene]:
        return self._changed("colour", self.world.colours)

    def _changed(self, attribute: str, values: Sequence[str]) -> list[Scene]:
        """The scenes with another colour or shape, any of the others."""
        rng = np.random.default_rng(self.seed)
        found = []
        for scene in self.scenes:
            (thing,) = scene.things
            others = [value for value in values if value != getattr(thing, attribute)]
            changed = dataclasses.replace(thing, **{attribute: others[int(rng.integers(len(others)))]})
            found.append(dataclasses.replace(scene, things=(changed,)))
        return found

    def _edited(self, made: Sequence[np.ndarray], attribute: str, scenes: Sequence[Scene]) -> dict[str, float]:
        found = {"changed": reader.score(made, scenes)[attribute]}
        return found | _identity(made, scenes) | _place_kept(made, self.real)

    def inpaint(self) -> Mode:
        """The right half of real clips is made anew."""

        def right(clip: np.ndarray) -> np.ndarray:
            white_THW = np.zeros((1, *clip.shape[1:3]), bool)
            white_THW[:, :, clip.shape[2] // 2 :] = True
            return white_THW

        videos = self._inpainted(right)
        made, halves = [video.frames_THWC for video in videos], [clip.shape[2] // 2 for clip in self.real]
        left = [[clip[:, :, :half] for clip, half in zip(group, halves, strict=True)] for group in (self.real, made)]
        original = reconstruction.psnr(*left)
        return {"original_psnr": original} | _identity(made, self.scenes) | _place_kept(made, self.real), videos

    def inpaint_time(self) -> Mode:
        """Frames in the middle of real clips are made anew, of whole groups."""
        groups = (self.window - 1) // self.stride
        new = max(1, groups // 2)
        first, last = (1 + self.stride * number for number in ((groups - new) // 2, (groups + new) // 2))

        def middle(clip: np.ndarray) -> np.ndarray:
            white_THW = np.zeros(clip.shape[:3], bool)
            white_THW[first:last] = True
            return white_THW

        videos = self._inpainted(middle)
        made = [video.frames_THWC for video in videos]
        both = [continuity.seams(frames_THWC, [first, last]) for frames_THWC in made]
        smooth = [max(*one.values(), *other.values()) <= MOST_SEAM for one, other in both]
        found = {"seams_smooth": float(np.mean(smooth))} | _identity(made, self.scenes)
        return found | _place_kept(made, self.real) | self._returned(videos), videos

    def _inpainted(self, white: Callable[[np.ndarray], np.ndarray]) -> list[Made]:
        def given(number: int) -> dict[str, Any]:
            clip = self.real[number]
            return {"inpaint": self._file(clip), "mask": self._file(_white(white(clip)))}

        return self._made(self.scenes, given)

    def outpaint(self) -> Mode:
        """Real clips go on to the left and to the right, by a cell of the VAE each."""
        border = self.made.geometry.stride[2]
        videos = self._made(
            self.scenes, lambda number: {"outpaint": self._file(self.real[number]), "left": border, "right": border}
        )
        made = [video.frames_THWC for video in videos]
        inner = [frames_THWC[:, :, border:-border] for frames_THWC in made]
        original = reconstruction.psnr(self.real, inner)
        return {"original_psnr": original} | _identity(made, self.scenes) | _place_kept(inner, self.real), videos

    def interpolate(self) -> Mode:
        """Every other frame of real clips is made anew from its neighbours."""
        videos = self._made(
            self.scenes, lambda number: {"interpolate": self._file(self.real[number]), "factor": 2, "fps": self.fps}
        )
        made = [video.frames_THWC for video in videos]

        # Between frames of things at rest there is nothing to make.
        moving = _that_move(self.scenes)

        def between(group: Sequence[np.ndarray]) -> float:
            return reconstruction.psnr(*([clips[number][1::2] for number in moving] for clips in (self.real, group)))

        return {
            "smooth": float(np.mean([continuity.worst_change(each) <= MOST_BRIDGE for each in made])),
            "original_psnr": reconstruction.psnr([clip[::2] for clip in self.real], [clip[::2] for clip in made]),
        } | (
            {
                "made_psnr": between(made),
                # Of means of the neighbours, which show the thing at both places, half each.
                "made_psnr_floor": between(self._round_trips([_blended(clip) for clip in self.real])),
                "made_psnr_ceiling": between(self.round_trips),
            }
            if moving
            else {}
        ) | _identity(made, self.scenes) | _place_kept(made, self.real), videos

    def draft(self) -> Mode:
        """A draft of two thirds of the height and width first, then the same in full size, larger than those of training."""
        side = max(map(max, self.world.clip_sizes))
        scenes = dit.heldout_videos(
            dataclasses.replace(self.world, frame_sizes=((side, side),), frame_size_weights=()),
            self.count,
            self.start,
            self.window,
        )
        videos = self._made(scenes, lambda number: {"draft": 2 / 3})
        return {"adherence_all": reader.score([video.frames_THWC for video in videos], scenes)["all"]}, videos

    def still(self) -> Mode:
        """Single images from text."""
        videos = self._made(self.scenes, lambda number: {"frames": 1})
        return _identity([video.frames_THWC for video in videos], self.scenes), videos

    def variations(self) -> Mode:
        """SHOWN seeds of a prompt each."""
        prompts = self.scenes[: max(1, self.count // SHOWN)]
        scenes = [scene for scene in prompts for _ in range(SHOWN)]
        videos = self._made(scenes, lambda number: {})
        made = [video.frames_THWC for video in videos]
        groups = [made[start : start + SHOWN] for start in range(0, len(made), SHOWN)]
        apart = [
            # Infinite is where no thing is in sight.
            MOST_MOVED < _apart(*pair).mean() < math.inf
            for group in groups
            for pair in itertools.combinations(group, 2)
        ]
        return {"adherence_all": reader.score(made, scenes)["all"], "apart": float(np.mean(apart))}, videos

    def groups_of_sizes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Sizes of training, sizes between them, and 1.5 times the largest area, the longest side and both sides."""
        known = self.world.clip_sizes
        low, high = min(map(min, known)), max(map(max, known))
        between = (low + high) // 2 // 8 * 8
        more, less = high * 3 // 2 // 8 * 8, low * 3 // 2 // 8 * 8
        groups = {
            "trained": tuple(known),
            "between": ((between, low), (low, between), (between, between)),
            "larger_area": ((high, high),),
            "longer_side": ((more, low), (low, more)),
            "both_sides": ((more, less), (less, more)),
        }
        return {name: group for name, group in groups.items() if name == "trained" or set(group) - set(known)}

    def sizes(self, name: str) -> Mode:
        """Adherence at the sizes of a group."""
        config = dataclasses.replace(self.world, frame_sizes=self.groups_of_sizes()[name], frame_size_weights=())
        scenes = dit.heldout_videos(config, self.count, self.start)
        requests = judgement.asked(config, scenes, self.seed)
        made = self.made.sample(requests, self.settings)
        return adherence.judge(made, scenes, self.seed)[0], _of_requests(made, requests)

    def other_lengths(self) -> dict[str, int]:
        """Frames between those of the two longest kinds of clips of training, and 1.5 times as many as the longest have."""
        *_, less, most = sorted({1, *self.world.frame_counts})

        def whole(frames: float) -> int:
            return 1 + self.stride * round((frames - 1) / self.stride)

        found = {"between": whole((less + most) / 2), "longer": whole(1.5 * most)}
        return {name: frames for name, frames in found.items() if frames not in self.world.frame_counts}

    def lengths(self, frames: int) -> Mode:
        """Adherence at a length of none of the clips of training, which is made in windows if it is longer."""
        world = dataclasses.replace(self.world, frame_counts=(frames,), frame_count_weights=())
        scenes = dit.heldout_videos(world, self.count, self.start)
        videos = self._made(scenes, lambda number: {"frames": frames})
        return adherence.judge([video.frames_THWC for video in videos], scenes, self.seed)[0], videos

    # Making ----------------------------------------------------------------------------------------------------------

    def _made(self, scenes: Sequence[Scene], given: Callable[[int], dict[str, Any]]) -> list[Made]:
        """Videos of the scenes' prompts, each with its order's own keys."""
        several_sizes = len(self.world.sizes) > 1
        jobs = []
        for number, scene in enumerate(scenes):
            usual = Size(scene.height, scene.width, self.window, scene.fps)
            order = Order(prompt=captions.prompt(scene, several_sizes), seed=self.seed + number, **given(number))
            jobs.append(layouts.prepare(order, usual, self.made.grid))
        made = self.made.make(jobs, self.settings)

        def kept(frames_THWC: np.ndarray, job: Job) -> Made:
            timeline = job.timeline
            given = tuple((first, timeline.frames_THWC[first:last]) for first, last in timeline.clips)
            return Made(
                frames_THWC,
                job.size.fps,
                job.order.prompt,
                job.order.seed,
                given_THW=timeline.given_THW,
                clips=given,
                source_THWC=timeline.frames_THWC if timeline.strength < 1 else None,
            )

        return [kept(frames_THWC, job) for frames_THWC, job in zip(made, jobs, strict=True)]

    def _returned(self, videos: Sequence[Made]) -> dict[str, float]:
        """How what was given came back: beside its round trip, of the worst video too, and the largest difference, in levels."""
        given = [(video, first, clip) for video in videos for first, clip in video.clips]
        wanted = self._round_trips([clip for _, _, clip in given])
        made = [video.frames_THWC[first : first + len(clip)] for video, first, clip in given]
        pairs = list(zip(wanted, made, strict=True))
        return {
            "given_psnr": reconstruction.psnr(wanted, made),
            "given_psnr_least": min(reconstruction.psnr([one], [other]) for one, other in pairs),
            "given_apart": float(max(int(np.abs(one.astype(int) - other).max()) for one, other in pairs)),
        }

    def _round_trips(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Through the VAE; the last frame is held to fill a group."""
        held = [np.concatenate([each, *[each[-1:]] * (-(len(each) - 1) % self.stride)]) for each in videos]
        return [
            whole[: len(each)] for whole, each in zip(judgement.reconstructed(self.made, held), videos, strict=True)
        ]

    def _file(self, frames_THWC: np.ndarray) -> str:
        """A clip as an input file, without loss but for a level of one pixel in every other frame: Pillow drops repeated frames."""
        from PIL import Image

        path = self.folder / f"{next(self._numbers)}.png"
        frames_THWC = frames_THWC.copy()
        frames_THWC[1::2, 0, 0] ^= 1
        images = [Image.fromarray(frame) for frame in frames_THWC]
        milliseconds = 1000 / self.fps
        images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
        return str(path)


def _of_requests(made: Sequence[np.ndarray], requests: Sequence[Request]) -> list[Made]:
    """Videos of which nothing is given."""
    return [
        Made(frames_THWC, request.fps, request.prompt, request.seed)
        for frames_THWC, request in zip(made, requests, strict=True)
    ]


def _seams(videos: Sequence[np.ndarray], at: int) -> dict[str, float]:
    """Shares of videos without a jump of place and of velocity at a seam."""
    seams = [continuity.seam(frames, at) for frames in videos]
    found = {name: float(np.mean([seam[name] <= MOST_SEAM for seam in seams])) for name in ("position", "velocity")}
    return found | {"both": float(np.mean([max(seam.values()) <= MOST_SEAM for seam in seams]))}


def _place_kept(made: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of videos whose thing is within MOST_MOVED pixels of the real one's place, on the mean over frames and always."""
    apart = [_apart(one, other) for one, other in zip(made, real, strict=True)]
    return {
        "place_kept": float(np.mean([each_T.mean() <= MOST_MOVED for each_T in apart])),
        "place_kept_always": float(np.mean([each_T.max() <= MOST_MOVED for each_T in apart])),
    }


def _apart(one_THWC: np.ndarray, other_THWC: np.ndarray) -> np.ndarray:
    """(T,), pixels between the things of two videos, frame by frame; infinite where one is out of sight."""
    apart = np.linalg.norm(reader.places(one_THWC) - reader.places(other_THWC), axis=1)
    return np.nan_to_num(apart, nan=np.inf)


def _blended(clip_THWC: np.ndarray) -> np.ndarray:
    """With the mean of its neighbours for every other frame."""
    found = clip_THWC.astype(np.float32)
    last = len(found) - 2 - (len(found) + 1) % 2  # the last odd frame with a neighbour on both sides
    found[1 : last + 1 : 2] = (found[0:last:2] + found[2 : last + 2 : 2]) / 2
    return found.round().astype(np.uint8)


def _faded(one_THWC: np.ndarray, other_THWC: np.ndarray, frames: int) -> np.ndarray:
    """Two clips with a crossfade between them, so many frames in all."""
    missing = frames - len(one_THWC) - len(other_THWC)
    share_T111 = (np.arange(1, missing + 1) / (missing + 1))[:, None, None, None]
    between_THWC = (1 - share_T111) * one_THWC[-1] + share_T111 * other_THWC[0]
    return np.concatenate([one_THWC, between_THWC.round().astype(np.uint8), other_THWC])


def _that_move(scenes: Sequence[Scene]) -> list[int]:
    """Numbers of those whose thing moves."""
    return [number for number, scene in enumerate(scenes) if scene.things[0].motion != "still"]


def _looks(scene: Scene) -> tuple[str, str]:
    return scene.things[0].colour, scene.things[0].shape


def _white(white_THW: np.ndarray) -> np.ndarray:
    """A mask as frames."""
    return np.repeat(np.where(white_THW, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def _box(clip_THWC: np.ndarray) -> np.ndarray:
    """(H, W), the box of all that is not background in any frame, and two pixels around it."""
    away_HW = (np.abs(clip_THWC.astype(int) - clip_THWC[:, :1, :1]).sum(-1) > 60).any(0)
    box_HW = np.zeros(away_HW.shape, bool)
    rows, columns = np.flatnonzero(away_HW.any(1)), np.flatnonzero(away_HW.any(0))
    box_HW[max(0, rows[0] - 2) : rows[-1] + 3, max(0, columns[0] - 2) : columns[-1] + 3] = True
    return box_HW


def _identity(videos: Sequence[np.ndarray], scenes: Sequence[Scene], of: str = "") -> dict[str, float]:
    """The share of videos that show one thing, always and in one piece, of the scene's colour and shape; of_frames is that of their
    frames, each read by itself."""
    kept = [
        reading is not None
        and len(reading.things) == 1
        and reading.things[0].whole
        and reading.things[0].lasts
        and (reading.things[0].colour, reading.things[0].shape) == _looks(scene)
        for reading, scene in zip(reader.read_many(videos), scenes, strict=True)
    ]
    of_frames = adherence.of_frames(reader.read_frames(videos), scenes)
    return {f"identity{of}": float(np.mean(kept)), f"identity_of_frames{of}": of_frames}


def of_motions(
    config: world.WorldConfig, motions: Sequence[str], count: int, frames: int, start: int = 0
) -> list[Scene]:
    """Held-out scenes of these motions, of those that the world has, from `start` on. Raises ValueError if it has none of them."""
    if not set(motions) & set(config.motions):
        raise ValueError(f"this world has none of the motions {', '.join(motions)}")
    found: list[Scene] = []
    while len(found) < count:
        drawn = dit.heldout_videos(config, count, start=start, frames=frames)
        found += [scene for scene in drawn if scene.things[0].motion in motions]
        start += 100 * count
    return found[:count]


def _told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())

"""What each way of prompting reaches: a trained DiT, prompted with real held-out clips, judged from the pixels of its videos.

Every mode is an order, laid out and sampled as a user's is. Shares are of videos; what real clips or naive ways reach stands
beside them as ceiling and floor.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import StudyRun
from sora_jax.data.worlds import captions, clips, world
from sora_jax.data.worlds.scene import Scene
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.evaluate import adherence, continuity, reader, reconstruction
from sora_jax.generate import canvas, layouts
from sora_jax.generate.pipeline import Pipeline
from sora_jax.generate.requests import Order, Size
from sora_jax.study import judgement, report
from sora_jax.train import dit

# A jump at a seam, in usual steps; of a loop's and a bridge's change, in usual ones. Pixels that an edit may move a thing by.
MOST_SEAM, MOST_LOOP, MOST_BRIDGE, MOST_MOVED = 1.5, 1.25, 2.0, 2.0
# How much longer than the longest clips of training "long" is, and the motions that can go on for so long within a frame.
LONGER = 8
SHOWN = 4  # videos a mode
ENDLESS = ("still", "orbit")


def of(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """Scores of stages by mode, and the videos of the last one; kept beside the checkpoints, in prompted.json and prompted.npz."""
    judges = reader, adherence, continuity, layouts, canvas, sys.modules[__name__]

    def judged(made: Pipeline, settings: SamplerConfig) -> list[report.Rung]:
        with tempfile.TemporaryDirectory() as inputs:
            return Prompting(made, settings, study.prompts, study.seed, Path(inputs)).judge()

    found = {name: judgement.once(study, workdir / name, "prompted", judges, judged) for name in names}
    words = "Prompted with real held-out clips; what was given comes back, the rest is made."
    shown = [rung for rung in found[names[-1]] if rung.samples]
    numbers = {name: {rung.name: dict(rung.scores) for rung in rungs} for name, rungs in found.items()}
    return numbers, report.Section("prompting", "Prompting", words, shown)


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
        if self.world.two_things_fraction or len(self.world.fps) > 1:
            raise ValueError(
                "prompting is judged on worlds of one thing at one frame rate; this one has pairs or several rates"
            )
        self.window, (self.fps,) = max(self.world.frame_counts), self.world.fps
        self.scenes = dit.heldout_videos(self.world, self.count, frames=self.window)
        self.real = clips.render_mixed(self.scenes)
        self.round_trips = self._round_trips(self.real)
        # About half of a clip, in whole groups.
        self.half = 1 + self.stride * ((self.window - 1) // self.stride // 2)

    @functools.cached_property
    def from_text(self) -> list[np.ndarray]:
        """Videos of the same prompts and seeds of which nothing is given."""
        return judgement.sampled(self.made, self.settings, self.scenes, self.seed, "text")

    def judge(self) -> list[report.Rung]:
        """Every mode with its scores and some of its videos."""
        rungs: list[report.Rung] = []
        for mode in (
            self.image,
            self.extend_forward,
            self.extend_backward,
            self.long,
            self.loop,
            self.connect,
            self.edit,
            self.inpaint,
            self.outpaint,
            self.interpolate,
            self.draft,
            self.still,
        ):
            began = time.perf_counter()
            found, videos = mode()
            rungs.append(report.Rung(mode.__name__, videos[:SHOWN], found | {"count": len(videos)}))
            logging.info("%s: %s in %.1f s", mode.__name__, _told(found), time.perf_counter() - began)
        for name, part in self.sizes().items():
            rungs.append(report.Rung(f"sizes_{name}", (), part))
            logging.info("sizes %s: %s", name, _told(part))
        return rungs

    # Modes -----------------------------------------------------------------------------------------------------------

    def image(self) -> tuple[dict[str, float], list[report.Video]]:
        """The first frame of a real clip is animated."""
        videos = self._made(self.scenes, lambda number: {"image": self._file(self.real[number][:1])})
        firsts = self._round_trips([clip[:1] for clip in self.real])
        made = [video.frames_THWC for video in videos]
        return {
            "first_frame_psnr": reconstruction.psnr(firsts, [frames_THWC[:1] for frames_THWC in made]),
            "identity": _identity(made, self.scenes),
            "identity_ceiling": _identity(self.round_trips, self.scenes),
            "motion": reader.score(made, self.scenes)["motion"],
            "motion_of_text": reader.score(self.from_text, self.scenes)["motion"],
        }, videos

    def extend_forward(self) -> tuple[dict[str, float], list[report.Video]]:
        """The first half of a real clip goes on."""
        return self._extended(self.half, lambda clip: clip[: self.half], {})

    def extend_backward(self) -> tuple[dict[str, float], list[report.Video]]:
        """What was before the second half of a real clip."""
        return self._extended(self.half, lambda clip: clip[self.half :], {"direction": "backward"})

    def _extended(
        self, seam: int, part: Callable[[np.ndarray], np.ndarray], more: dict[str, Any]
    ) -> tuple[dict[str, float], list[report.Video]]:
        def given(number: int) -> dict[str, Any]:
            clip = part(self.real[number])
            return {"extend": self._file(clip), "frames": self.window - len(clip)} | more

        videos = self._made(self.scenes, given)
        return _seams([video.frames_THWC for video in videos], seam) | {
            f"{name}_ceiling": share for name, share in _seams(self.round_trips, seam).items()
        }, videos

    def long(self) -> tuple[dict[str, float], list[report.Video]]:
        """LONGER times as long as any clip of training, of motions that stay in the frame; half as many, as each takes long."""
        scenes = of_motions(self.world, ENDLESS, max(1, self.count // 2), self.window)
        frames = 1 + self.stride * ((LONGER * self.window - 1) // self.stride)
        videos = self._made(scenes, lambda number: {"frames": frames})
        kept = [continuity.kept(video.frames_THWC, self.window) for video in videos]
        windows = canvas.plan(0, frames, window=self.window, stride=self.stride)
        at = [window.first for window in windows[1:]]
        seams = [max(seam.values()) for video in videos for seam in continuity.seams(video.frames_THWC, at)]
        return {
            "kept": float(np.mean(kept)),
            "seams_smooth": float(np.mean(np.array(seams) <= MOST_SEAM)),
            "frames": float(frames),
        }, videos

    def loop(self) -> tuple[dict[str, float], list[report.Video]]:
        """A video that is made from a prompt and leads back to its start; of motions that are ever where they were also alone."""
        videos = self._made(self.scenes, lambda number: {"loop": True})

        def closed(frames: Sequence[np.ndarray]) -> np.ndarray:
            return np.array([continuity.loop_change(each) <= MOST_LOOP for each in frames])

        made = [video.frames_THWC for video in videos]
        motions = np.array([scene.things[0].motion for scene in self.scenes])
        returns, moves = np.isin(motions, ENDLESS), motions != "still"
        # All the way round: one that jumps elsewhere closes, too.
        smooth = np.array([continuity.worst_change(np.concatenate([each, each[:1]])) <= MOST_BRIDGE for each in made])
        changes = zip(
            *([continuity.changes(each).mean() for each in group] for group in (made, self.from_text)), strict=True
        )
        return {
            "closed": float(closed(made).mean()),
            "closed_floor": float(closed(self.from_text).mean()),
            "closed_of_endless_motions": float(closed(made)[returns].mean()) if returns.any() else 0.0,
            "smooth_of_moving": float(smooth[moves].mean()) if moves.any() else 0.0,
            # A loop of something at rest is none.
            "alive": float(np.mean([one >= other / 2 for one, other in changes])),
            "identity": _identity(made, self.scenes),
        }, videos

    def connect(self) -> tuple[dict[str, float], list[report.Video]]:
        """The first half of a clip is led to the second half of it played backwards: as far away as the thing goes in that time.

        Of things that move: one at rest has no usual change to hold that of its bridge against.
        """
        moving = [motion for motion in self.world.motions if motion != "still"]
        scenes = of_motions(self.world, moving, self.count, self.window)
        ends = [(clip[: self.half], clip[self.half :][::-1]) for clip in clips.render_mixed(scenes)]
        videos = self._made(scenes, lambda number: {"connect": tuple(self._file(end) for end in ends[number])})

        def smooth(frames: Sequence[np.ndarray]) -> float:
            return float(np.mean([continuity.worst_change(each) <= MOST_BRIDGE for each in frames]))

        wanted = [self._round_trips([pair[place] for pair in ends]) for place in range(2)]
        made = [
            [video.frames_THWC[: len(start)] for video, start in zip(videos, wanted[0], strict=True)],
            [video.frames_THWC[-len(end) :] for video, end in zip(videos, wanted[1], strict=True)],
        ]
        return {
            "smooth": smooth([video.frames_THWC for video in videos]),
            "smooth_floor": smooth([np.concatenate(pair) for pair in ends]),
            "smooth_ceiling": smooth(self.round_trips),
            "ends_psnr": min(reconstruction.psnr(one, other) for one, other in zip(wanted, made, strict=True)),
        }, videos

    def edit(self) -> tuple[dict[str, float], list[report.Video]]:
        """Real clips are made anew with another colour in the prompt, any of the others."""
        rng = np.random.default_rng(self.seed)
        wanted = []
        for scene in self.scenes:
            (thing,) = scene.things
            others = [colour for colour in self.world.colours if colour != thing.colour]
            recoloured = dataclasses.replace(thing, colour=others[int(rng.integers(len(others)))])
            wanted.append(dataclasses.replace(scene, things=(recoloured,)))
        videos = self._made(wanted, lambda number: {"edit": self._file(self.real[number])})
        made = [video.frames_THWC for video in videos]
        return {"changed": reader.score(made, wanted)["colour"], "place_kept": _place_kept(made, self.real)}, videos

    def inpaint(self) -> tuple[dict[str, float], list[report.Video]]:
        """The right half of real clips is made anew."""

        def given(number: int) -> dict[str, Any]:
            clip = self.real[number]
            white = np.zeros_like(clip[:1])
            white[:, :, clip.shape[2] // 2 :] = 255
            return {"inpaint": self._file(clip), "mask": self._file(white)}

        videos = self._made(self.scenes, given)
        made, halves = [video.frames_THWC for video in videos], [clip.shape[2] // 2 for clip in self.real]
        return {
            "identity": _identity(made, self.scenes),
            "place_kept": _place_kept(made, self.real),
            "given_psnr": reconstruction.psnr(
                [clip[:, :, :half] for clip, half in zip(self.real, halves, strict=True)],
                [clip[:, :, :half] for clip, half in zip(made, halves, strict=True)],
            ),
        }, videos

    def outpaint(self) -> tuple[dict[str, float], list[report.Video]]:
        """Real clips go on to the left and to the right, by a cell of the VAE each."""
        border = self.made.geometry.stride[2]
        videos = self._made(
            self.scenes, lambda number: {"outpaint": self._file(self.real[number]), "left": border, "right": border}
        )
        return {"identity": _identity([video.frames_THWC for video in videos], self.scenes)}, videos

    def interpolate(self) -> tuple[dict[str, float], list[report.Video]]:
        """Every other frame of real clips is made anew from its neighbours."""
        videos = self._made(
            self.scenes, lambda number: {"interpolate": self._file(self.real[number]), "factor": 2, "fps": self.fps}
        )
        made = [video.frames_THWC for video in videos]
        return {"identity": _identity(made, self.scenes), "place_kept": _place_kept(made, self.real)}, videos

    def draft(self) -> tuple[dict[str, float], list[report.Video]]:
        """A draft of two thirds of the height and width first, then the same in full size, larger than those of training."""
        side = max(map(max, self.world.clip_sizes))
        scenes = dit.heldout_videos(
            dataclasses.replace(self.world, frame_sizes=((side, side),), frame_size_weights=()),
            self.count,
            frames=self.window,
        )
        videos = self._made(scenes, lambda number: {"draft": 2 / 3})
        return {"adherence_all": reader.score([video.frames_THWC for video in videos], scenes)["all"]}, videos

    def still(self) -> tuple[dict[str, float], list[report.Video]]:
        """Single images from text."""
        videos = self._made(self.scenes, lambda number: {"frames": 1})
        return {"identity": _identity([video.frames_THWC for video in videos], self.scenes)}, videos

    def sizes(self) -> dict[str, dict[str, float]]:
        """Adherence at sizes of training, at sizes between them, and at 1.5 times the largest area and side."""
        known = self.world.clip_sizes
        low, high = min(map(min, known)), max(map(max, known))
        between = (low + high) // 2 // 8 * 8
        groups = {
            "trained": known,
            "between": ((between, low), (low, between), (between, between)),
            "larger_area": ((high, high),),
            "longer_side": ((high * 3 // 2, low), (low, high * 3 // 2)),
        }
        found = {}
        for name, group in groups.items():
            if name != "trained" and not set(group) - set(known):
                continue
            config = dataclasses.replace(self.world, frame_sizes=tuple(group), frame_size_weights=())
            scenes = dit.heldout_videos(config, self.count)
            videos = self.made.sample(judgement.asked(config, scenes, self.seed), self.settings)
            found[name] = adherence.judge(videos, scenes, self.seed)[0]
        return found

    # Making ----------------------------------------------------------------------------------------------------------

    def _made(self, scenes: Sequence[Scene], given: Callable[[int], dict[str, Any]]) -> list[report.Video]:
        """Videos of the scenes' prompts, each with its order's own keys."""
        grid = layouts.Grid(self.made.geometry.stride, self.made.geometry.patch)
        several_sizes = len(self.world.sizes) > 1
        jobs = []
        for number, scene in enumerate(scenes):
            usual = Size(scene.height, scene.width, self.window, scene.fps)
            order = Order(prompt=captions.prompt(scene, several_sizes), seed=self.seed + number, **given(number))
            jobs.append(layouts.prepare(order, usual, grid))
        made = self.made.make(jobs, self.settings)
        return [
            report.Video(frames_THWC, job.size.fps, job.order.prompt, job.order.seed)
            for frames_THWC, job in zip(made, jobs, strict=True)
        ]

    def _round_trips(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Through the VAE; the last frame is held to fill a group."""
        held = [np.concatenate([each, *[each[-1:]] * (-(len(each) - 1) % self.stride)]) for each in videos]
        return [
            whole[: len(each)] for whole, each in zip(judgement.reconstructed(self.made, held), videos, strict=True)
        ]

    def _file(self, frames_THWC: np.ndarray) -> str:
        """A clip as an input file, without loss but for a level of one pixel in every other frame: Pillow drops repeated frames."""
        from PIL import Image

        path = self.folder / f"{len(list(self.folder.iterdir()))}.png"
        frames_THWC = frames_THWC.copy()
        frames_THWC[1::2, 0, 0] ^= 1
        images = [Image.fromarray(frame) for frame in frames_THWC]
        milliseconds = 1000 / self.fps
        images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
        return str(path)


def _seams(videos: Sequence[np.ndarray], at: int) -> dict[str, float]:
    """Shares of videos without a jump of place and of velocity at a seam."""
    seams = [continuity.seam(frames, at) for frames in videos]
    found = {name: float(np.mean([seam[name] <= MOST_SEAM for seam in seams])) for name in ("position", "velocity")}
    return found | {"both": float(np.mean([max(seam.values()) <= MOST_SEAM for seam in seams]))}


def _place_kept(made: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> float:
    """The share of videos whose thing is within MOST_MOVED pixels of the real one's place, on the mean over frames."""
    apart = [
        np.nan_to_num(np.linalg.norm(reader.places(one) - reader.places(other), axis=1), nan=np.inf).mean()
        for one, other in zip(made, real, strict=True)
    ]
    return float(np.mean(np.array(apart) <= MOST_MOVED))


def _identity(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> float:
    """The share of videos that show one thing, of the scene's colour and shape."""
    kept = [
        reading is not None
        and len(reading.things) == 1
        and (reading.things[0].colour, reading.things[0].shape) == (scene.things[0].colour, scene.things[0].shape)
        for reading, scene in zip(reader.read_many(videos), scenes, strict=True)
    ]
    return float(np.mean(kept))


def of_motions(config: world.WorldConfig, motions: Sequence[str], count: int, frames: int) -> list[Scene]:
    """Held-out scenes of these motions, of those that the world has. Raises ValueError if it has none of them."""
    if not set(motions) & set(config.motions):
        raise ValueError(f"this world has none of the motions {', '.join(motions)}")
    found: list[Scene] = []
    start = 0
    while len(found) < count:
        drawn = dit.heldout_videos(config, count, start=start, frames=frames)
        found += [scene for scene in drawn if scene.things[0].motion in motions]
        start += 100 * count
    return found[:count]


def _told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())

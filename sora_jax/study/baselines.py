"""How video was made before whole clips of any size were denoised together, on the same data and compute, held against that.

Two comparisons: clips of native frames against clips cut to squares (is the thing within the frame?), and frames made together
against frames made one after the other (how long does the thing last?). Shares are of videos or of their frames.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import StudyRun
from sora_jax.data.worlds import captions, clips
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import adherence, reader
from sora_jax.generate import canvas, layouts, pipeline
from sora_jax.generate.canvas import Job, Window
from sora_jax.generate.pipeline import Pipeline
from sora_jax.generate.requests import Order, Size
from sora_jax.study import judgement, prompting, report
from sora_jax.train import dit

SHOWN = 8  # videos a model
LONGEST = 8  # of what is rolled out, in longest clips of training; told after 1, 2, 4 and so on of them


# Native frames or squares --------------------------------------------------------------------------------------------


def framing(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """All models make the same held-out prompts in the squares that they all know; kept in framed.json beside the checkpoints."""
    about = {"count": study.prompts, "seed": study.seed, "judges": _judges()}
    rungs = [
        judgement.once(workdir / name, "framed", about, functools.partial(_framed, study, workdir / name))
        for name in names
    ]
    words = (
        "The same prompts and seeds in square frames: 'inside' is the share of frames in which all of the thing is in sight, "
        "'of_real' that of the clips of training through the VAE."
    )
    return _section("framing", "Native frames against squares", words, names, [rung for each in rungs for rung in each])


def _framed(study: StudyRun, folder: Path) -> list[report.Rung]:
    made = pipeline.load(folder)
    world = made.run.data.world
    squares = dataclasses.replace(world, square=True)
    side = min(min(size) for size in squares.clip_sizes)
    native = dataclasses.replace(world, square=False, frame_sizes=((side, side),), frame_size_weights=())
    scenes = dit.heldout_videos(native, study.prompts)
    videos = judgement.sampled(made, made.run.sampler, scenes, study.seed, "framing")
    real = clips.render_mixed(dit.heldout_videos(world, study.prompts))
    scores = adherence.judge(videos, scenes, study.seed)[0]
    found = {
        "inside": _inside(videos),
        "inside_of_real": _inside(judgement.reconstructed(made, real)),
        "whole_videos": float(np.mean([reader.inside(video).all() for video in videos])),
        "adherence_all": scores["all"],
        "count": len(videos),
    }
    return [report.Rung(folder.name, _shown(videos, scenes, study.seed), found)]


def _inside(videos: Sequence[np.ndarray]) -> float:
    return float(np.mean([reader.inside(video).mean() for video in videos]))


# Together or one after the other ---------------------------------------------------------------------------------------


def rollout(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """Each model makes long videos as it was trained to; kept in rolled.json beside the checkpoints.

    A model whose clips had a next_frame (loader.known) makes one latent frame after the other, each from those before it; any
    other makes windows of which half was made before (canvas.plan).
    """
    about = {"count": study.prompts, "seed": study.seed, "judges": _judges()}
    rungs = [
        judgement.once(workdir / name, "rolled", about, functools.partial(_rolled, study, workdir / name))
        for name in names
    ]
    words = (
        "The same prompts and seeds, many times as long as any clip of training: the share of videos of which the last clip's "
        "length up to so many frames shows all that was asked for."
    )
    return _section(
        "rollout", "Together against one after the other", words, names, [rung for each in rungs for rung in each]
    )


def _rolled(study: StudyRun, folder: Path) -> list[report.Rung]:
    made = pipeline.load(folder)
    world, stride = made.run.data.world, made.geometry.stride[0]
    window = max(world.frame_counts)
    scenes = prompting.of_motions(world, prompting.ENDLESS, study.prompts, window)
    total = 1 + stride * ((LONGEST * window - 1) // stride)
    alone = made.run.loader.known.next_frame > 0
    jobs = [_job(made, scene, study.seed + number, total, window, alone) for number, scene in enumerate(scenes)]
    videos = made.make(jobs, made.run.sampler)
    lengths = [min(total, window * 2**n) for n in range(LONGEST.bit_length())]
    found = {
        f"after_{length}": reader.score([video[length - window : length] for video in videos], scenes)["all"]
        for length in lengths
    }
    return [report.Rung(folder.name, _shown(videos, scenes, study.seed), found | {"count": len(videos)})]


def _job(made: Pipeline, scene: Scene, seed: int, frames: int, window: int, alone: bool) -> Job:
    order = Order(prompt=captions.prompt(scene, len(made.run.data.world.sizes) > 1), seed=seed, frames=frames)
    usual = Size(scene.height, scene.width, window, scene.fps)
    job = layouts.prepare(order, usual, layouts.Grid(made.geometry.stride, made.geometry.patch))
    if not alone:
        return job
    windows = one_by_one(frames, window, made.geometry.stride[0])
    return dataclasses.replace(job, timeline=dataclasses.replace(job.timeline, windows=windows))


def one_by_one(frames: int, window: int, stride: int) -> tuple[Window, ...]:
    """Windows that make one latent frame each: the first from nothing, the others from all before it that a window holds."""
    windows = [Window(0, 1, 0, 1)]
    for first in range(1, frames, stride):
        start = max(0, first + stride - window)
        windows.append(Window(start, first + stride, first, first + stride))
    return tuple(windows)


# Both -----------------------------------------------------------------------------------------------------------------


def _section(
    name: str, title: str, words: str, names: Sequence[str], rungs: Sequence[report.Rung]
) -> tuple[dict[str, Any], report.Section]:
    return {rung.name: dict(rung.scores) for rung in rungs}, report.Section(name, title, words, rungs)


def _shown(videos: Sequence[np.ndarray], scenes: Sequence[Scene], seed: int) -> list[report.Video]:
    return [
        report.Video(video, scene.fps, captions.prompt(scene, False), seed + number)
        for number, (video, scene) in enumerate(zip(videos[:SHOWN], scenes, strict=False))
    ]


@functools.cache
def _judges() -> str:
    """What tells one state of the judges' code from another."""
    modules = (reader, adherence, canvas, sys.modules[__name__])
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()

"""How video was made before whole clips of any size were denoised together, on the same data and compute, held against that.

Two comparisons: clips of native frames against clips cut to squares (is the thing within the frame?), and frames made together
against frames made one after the other (how long does the thing last?). Shares are of videos or of their frames.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import StudyRun
from sora_jax.data.worlds import captions, clips
from sora_jax.data.worlds.scene import Scene, track
from sora_jax.data.worlds.world import WorldConfig
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.evaluate import adherence, reader
from sora_jax.generate.pipeline import Pipeline
from sora_jax.generate.requests import Order
from sora_jax.study import judgement, prompting, report
from sora_jax.train import dit

SHOWN = 8  # videos a model
LONGEST = 8  # of what is rolled out, in longest clips of training; told after 1, 2, 4 and so on of them


# Native frames or squares --------------------------------------------------------------------------------------------


def framing(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """All models make the same held-out prompts in the squares that they all know; kept in framing.json beside the checkpoints."""
    words = (
        "The same prompts and seeds in square frames: 'visible' is how much of the thing is within the frame, 'inside' the share "
        "of frames in which all of it is, and 'of real' those of real clips like those of training, through the VAE."
    )
    return _compared(study, workdir, names, _framed, ("framing", "Native frames against squares", words))


def check_framing(world: WorldConfig, stride: int) -> None:
    """Raises ValueError for a world of which models cannot be compared so."""
    if world.two_things_fraction:
        raise ValueError(
            f"framing is of one thing; set data.world.two_things_fraction ({world.two_things_fraction}) to 0"
        )


def _framed(
    study: StudyRun, made: Pipeline, settings: SamplerConfig
) -> tuple[dict[str, Any], list[np.ndarray], Sequence[Scene]]:
    world = made.run.data.world
    side, frames = min(map(min, world.frame_sizes)), max(world.frame_counts)
    squares = dataclasses.replace(
        world,
        square=False,
        frame_sizes=((side, side),),
        frame_size_weights=(),
        frame_counts=(frames,),
        frame_count_weights=(),
    )
    scenes = dit.heldout_videos(squares, study.prompts)
    videos = judgement.sampled(made, settings, scenes, study.seed, "framing")
    of_training = dit.heldout_videos(world, study.prompts)
    real = judgement.reconstructed(made, clips.render_mixed(of_training))
    scores = _in_sight(videos, scenes) | {
        f"{name}_of_real": value for name, value in _in_sight(real, of_training).items()
    }
    return scores | {"adherence_all": adherence.judge(videos, scenes, study.seed)[0]["all"]}, videos, scenes


def _in_sight(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """How much of what scenes show is within the frames of videos; and the share of frames, and of videos, that have all of it."""
    inside, visible = [reader.inside(video) for video in videos], []
    for video, whole_T, scene, frame in zip(
        videos, inside, scenes, clips.render_mixed([_alone(s) for s in scenes]), strict=True
    ):
        (thing,) = scene.things
        area_T = reader.areas(frame)[0] * (track(thing, scene.num_frames)[:, 2] / thing.radius) ** 2
        # What is not cut is visible in whole, in whatever size it was made.
        visible.append(np.where(whole_T, 1, np.minimum(reader.areas(video) / area_T, 1)))
    return {
        "visible": float(np.mean([frames.mean() for frames in visible])),
        "inside": float(np.mean([frames.mean() for frames in inside])),
        "whole_videos": float(np.mean([frames.all() for frames in inside])),
    }


def _alone(scene: Scene) -> Scene:
    """An image of the scene's thing in the middle, where nothing of it is cut."""
    (thing,) = scene.things
    middle = dataclasses.replace(
        thing, motion="still", centre_y=scene.height / 2, centre_x=scene.width / 2, travel=0.0, growth=0.0, cycles=0
    )
    return dataclasses.replace(scene, things=(middle,), num_frames=1)


# Together or one after the other ---------------------------------------------------------------------------------------


def rollout(study: StudyRun, workdir: Path, names: Sequence[str]) -> tuple[dict[str, Any], report.Section]:
    """Each model makes long videos as it was trained to; kept in rollout.json beside the checkpoints.

    A model whose clips had a next_frame (loader.known) makes one latent frame after the other, each from those before it
    (canvas.one_by_one); any other makes windows of which half was made before (canvas.plan).
    """
    words = (
        "The same prompts and seeds, many times as long as any clip of training: the share of videos of the colour, shape and "
        "motion asked for in as many frames as a clip of training has, up to the one that is named."
    )
    return _compared(study, workdir, names, _rolled, ("rollout", "Together against one after the other", words))


def check_rollout(world: WorldConfig, stride: int) -> None:
    """Raises ValueError for a world of which models cannot be compared so."""
    if not set(prompting.ENDLESS) & set(world.motions):
        raise ValueError(
            f"rollout is of motions that stay in the frame; give data.world.motions {' or '.join(prompting.ENDLESS)}"
        )


def _rolled(
    study: StudyRun, made: Pipeline, settings: SamplerConfig
) -> tuple[dict[str, Any], list[np.ndarray], Sequence[Scene]]:
    world, stride = made.run.data.world, made.geometry.stride[0]
    window = max(world.frame_counts)
    scenes = prompting.of_motions(world, prompting.ENDLESS, study.prompts, window)
    total = 1 + stride * ((LONGEST * window - 1) // stride)
    several_sizes, orders = len(world.sizes) > 1, []
    for number, scene in enumerate(scenes):
        prompt, seed = captions.prompt(scene, several_sizes), study.seed + number
        orders.append(Order(prompt=prompt, seed=seed, height=scene.height, width=scene.width, frames=total))
    jobs = made.prepare(orders)
    videos = made.make(jobs, settings)
    lengths = [min(total, window * 2**n) for n in range(LONGEST.bit_length())]
    shares = {
        f"after_{length}": reader.score([video[length - window : length] for video in videos], scenes)["all"]
        for length in lengths
    }
    return shares, videos, scenes


# Both -----------------------------------------------------------------------------------------------------------------

# (study, model, its sampler) -> (scores, videos, the scenes that these should show)
Judge = Callable[[StudyRun, Pipeline, SamplerConfig], tuple[dict[str, Any], list[np.ndarray], Sequence[Scene]]]


def _compared(
    study: StudyRun, workdir: Path, names: Sequence[str], judge: Judge, told: tuple[str, str, str]
) -> tuple[dict[str, Any], report.Section]:
    """Scores by stage, and some videos of each. told is (name, title, words) of the section."""
    judges = reader, adherence, prompting, sys.modules[__name__]

    def judged(name: str, made: Pipeline, settings: SamplerConfig, there: Collection[str]) -> Iterator[report.Rung]:
        if name in there:
            return
        scores, videos, scenes = judge(study, made, settings)
        requests = judgement.asked(made.run.data.world, scenes[:SHOWN], study.seed)
        shown = [
            report.Video(video, request.fps, request.prompt, request.seed)
            for video, request in zip(videos, requests, strict=False)
        ]
        yield report.Rung(name, shown, scores | {"count": len(videos)})

    rungs = [
        rung
        for name in names
        for rung in judgement.once(study, workdir / name, told[0], judges, functools.partial(judged, name))
    ]
    return {rung.name: dict(rung.scores) for rung in rungs}, report.Section(*told, rungs)

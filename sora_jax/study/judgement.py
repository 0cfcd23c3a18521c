"""Judging DiTs on the same held-out prompts; in a study what is judged is kept, so that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sora_jax import checkpoint, config, disk, processes
from sora_jax.config import StudyRun
from sora_jax.data import pack
from sora_jax.data.worlds import captions, clips, render, scene, world
from sora_jax.data.worlds.scene import Scene
from sora_jax.data.worlds.world import WorldConfig
from sora_jax.diffusion import flow, sampler
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.evaluate import adherence, frechet, fvd, i3d, mobilenet, reader, reconstruction
from sora_jax.generate import canvas, codec, files, known, layouts, media, pipeline
from sora_jax.generate.pipeline import Pipeline
from sora_jax.models import dit as dit_model
from sora_jax.models import vae as vae_model
from sora_jax.study import report
from sora_jax.train import dit

# Scenes of real clips that samples are held against as a set: other ones than those that were asked for.
REAL_SCENES = 1_000_000
MAX_JUDGED_BYTES = 2**32  # of the shown samples
# What makes the pixels that are judged, real and sampled: after a change of any, scores that were kept say nothing.
MAKERS = (
    *(world, scene, captions, clips, render, dit),  # what is asked for
    *(pack, dit_model, vae_model, pipeline, sampler, flow, codec, known, layouts, canvas, media),
    *(reconstruction, sys.modules[__name__]),
)
SHOWN = "shown"  # among kept scores: what the kept videos are of


@dataclasses.dataclass
class Judge:
    """Samples `study.prompts` held-out prompts from trained DiTs and scores them; with frechets also as a set.

    Scores and the shown samples of a run are kept beside its checkpoints, in judged.json and judged.npz.
    """

    study: StudyRun
    workdir: Path
    frechets: bool

    def __post_init__(self) -> None:
        self._bounds: dict[Any, Bounds] = {}

    def of(self, name: str) -> tuple[dict[str, Any], list[report.Video]]:
        """Scores of a stage and the samples that the report shows: kept ones if they are of this checkpoint."""
        folder = self.workdir / name
        about = about_of(self.study, folder, reader, adherence, frechet, mobilenet) | {
            "shown": self.study.shown,
            "frechets": self.frechets and mobilenet.available(),
        }
        run = pipeline.load_run(folder)
        scenes = dit.heldout_videos(run.data.world, self.study.prompts)
        kept = read_kept(folder, "judged", about)
        if kept is None:
            kept = self._judge(name, scenes)
            write_kept(folder, "judged", about, *kept)
        scores, videos = kept
        requests = asked(run.data.world, scenes, self.study.seed)
        shown = [
            report.Video(
                video, scene.fps, request.prompt, request.seed, expected=expected(scene), read=adherence.in_words(video)
            )
            for video, scene, request in zip(videos, scenes, requests, strict=False)
        ]
        return scores, shown

    def _judge(self, name: str, scenes: Sequence[Scene]) -> tuple[dict[str, Any], list[np.ndarray]]:
        made = pipeline.load(self.workdir / name)
        of = made.run.vae_checkpoint, made.run.data.world
        if of not in self._bounds:
            self._bounds[of] = bounds_of(made, scenes, self.study.seed, self.frechets)
        settings = self.study.stages[name].sampler
        scores, videos = judged(made, settings, scenes, self.study.seed, self._bounds[of], name)
        return scores, videos[: self.study.shown]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the samples of a VAE's models are held against: real clips, and real clips through the VAE.

    ceiling is the adherence of the asked scenes' real clips through the VAE, reconstructions their Frechet distance from real
    clips, nothing that of what knows nothing: noise, decoded. real and decoded are features of twice as many other held-out
    clips, as they are and through the VAE. Without the weights of the features' network all but the ceiling are None.
    """

    ceiling: dict[str, float]
    real: np.ndarray | None = None
    decoded: np.ndarray | None = None
    reconstructions: float | None = None
    nothing: float | None = None


def bounds_of(made: Pipeline, scenes: Sequence[Scene], seed: int, frechets: bool = True) -> Bounds:
    reconstructions = reconstructed(made, clips.render_mixed(scenes))
    ceiling, _ = adherence.judge(reconstructions, scenes, seed)
    if not frechets:
        return Bounds(ceiling)
    if processes.on_any(not mobilenet.available()):
        logging.warning("no %s: its weights are not installed; %s", frechet.NAME, mobilenet.REMEDY)
        return Bounds(ceiling)
    others = clips.render_mixed(dit.heldout_videos(made.run.data.world, 2 * len(scenes), start=REAL_SCENES))
    real, decoded = (frechet.features(videos) for videos in (others, reconstructed(made, others)))
    through, nothing = (
        frechet.compare(real, frechet.features(videos)).distance
        for videos in (reconstructions, noise(made, scenes, seed))
    )
    return Bounds(ceiling, real, decoded, through, nothing)


def judged(
    made: Pipeline,
    settings: SamplerConfig,
    scenes: Sequence[Scene],
    seed: int,
    bounds: Bounds,
    name: str = "samples",
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Scores of samples of the scenes' prompts, and the samples.

    Adherence is that of samples made with guidance. Frechet distances compare distributions and guidance changes a model's
    own, so they are of samples without it, as in the scaling study of the DiT paper (arXiv:2212.09748): 'frechet' from real
    clips, and 'frechet_latent' from real clips through the VAE, which leaves what the transformer alone is answerable for.
    """
    videos = sampled(made, settings, scenes, seed, name)
    scores, floor = adherence.judge(videos, scenes, seed)
    numbers: dict[str, Any] = {
        "adherence": scores,
        "adherence_floor": floor,
        "adherence_ceiling": bounds.ceiling,
    }
    if bounds.real is not None and bounds.decoded is not None:
        plain = dataclasses.replace(settings, guidance=1.0)
        free = videos if settings == plain else sampled(made, plain, scenes, seed, f"{name} without guidance")
        features = frechet.features(free)
        for key, reference in (("frechet", bounds.real), ("frechet_latent", bounds.decoded)):
            found = frechet.compare(reference, features)
            numbers[key] = {"metric": frechet.NAME} | dataclasses.asdict(found)
        numbers["frechet"] |= {"reconstructions": bounds.reconstructions, "ceiling": bounds.nothing}
    return numbers, videos


def evaluate(
    made: Pipeline,
    settings: SamplerConfig,
    prompts: int,
    seed: int,
    i3d_weights: Path | None = None,
    fvd_videos: int = fvd.NUM_VIDEOS,
) -> dict[str, Any]:
    """Every judgement of a trained DiT: adherence with floor and ceiling, Frechet distances, FVD if I3D's weights are given.

    prompts are the first held-out ones, the same as in a study. Raises ValueError for a number of either that is too
    small, clips too short for FVD or weights that are not I3D's, FileNotFoundError if there is no such file.
    """
    if prompts < 2:
        raise ValueError(f"prompts is {prompts}; a set of videos needs at least 2")
    numbers: dict[str, Any] = {}
    if i3d_weights is not None:
        # First: what is wrong with the weights or the world is told before an hour of work.
        numbers["fvd"] = video_distance(made, settings, i3d_weights, fvd_videos, seed)
    scenes = dit.heldout_videos(made.run.data.world, prompts)
    scores, _ = judged(made, settings, scenes, seed, bounds_of(made, scenes, seed))
    return numbers | scores


def table(scores: dict[str, Any]) -> str:
    """The scores of evaluate() for a terminal."""
    ways = {"measured": "adherence", "floor": "adherence_floor", "ceiling": "adherence_ceiling"}
    lines = ["".join(f"{title:>10}" for title in ("adherence", *ways))]
    for name in adherence.ATTRIBUTES:
        if name in scores["adherence"]:
            lines.append(f"{name:>10}" + "".join(f"{scores[way][name]:>10.3f}" for way in ways.values()))
    lines.append(
        f"of {scores['adherence']['count']:.0f} held-out prompts; floor: shuffled prompts, ceiling: real clips through the VAE"
    )
    if found := scores.get("frechet"):
        latent = scores["frechet_latent"]
        lines += [
            f"{found['metric']} without guidance, {found['num_videos']} videos each:",
            f"{found['distance']:>10.1f} from real clips (real clips through the VAE {found['reconstructions']:.1f}, "
            f"other real clips {found['floor']:.1f}, noise through the VAE {found['ceiling']:.1f})",
            f"{latent['distance']:>10.1f} from real clips through the VAE (others of them {latent['floor']:.1f})",
        ]
    if found := scores.get("fvd"):
        lines.append(
            f"{found['metric']} {found['value']:.1f} (real clips through the VAE {found['reconstructions']:.1f}, other real clips "
            f"{found['floor']:.1f})"
        )
    return "\n".join(lines)


def asked(world: WorldConfig, scenes: Sequence[Scene], seed: int) -> list[pipeline.Request]:
    """What is asked for in judgement: each scene's prompt and size, with seeds from `seed` on."""
    sizes = len(world.sizes) > 1
    return [dit.request_of(scene, captions.prompt(scene, sizes), seed + number) for number, scene in enumerate(scenes)]


def sampled(
    made: Pipeline, settings: SamplerConfig, scenes: Sequence[Scene], seed: int, name: str = "samples"
) -> list[np.ndarray]:
    began = time.perf_counter()
    videos = made.sample(asked(made.run.data.world, scenes, seed), settings)
    logging.info("%s: %d held-out prompts in %.1f s", name, len(videos), time.perf_counter() - began)
    return videos


def video_distance(
    made: Pipeline, settings: SamplerConfig, i3d_weights: Path, num_videos: int, seed: int
) -> dict[str, Any]:
    """FVD of samples of held-out prompts, all of at least 16 frames, from real clips of other held-out scenes.

    Beside it stand that of yet other real clips (floor) and of the asked scenes' real clips through the VAE (reconstructions).
    """
    wanted, others, rest = (
        dit.heldout_videos(made.run.data.world, num_videos, start=start, frames=fvd.NUM_FRAMES)
        for start in (0, REAL_SCENES, 2 * REAL_SCENES)
    )
    i3d.load_weights(i3d_weights)  # refused before the samples are made
    videos = sampled(made, settings, wanted, seed, "FVD")
    sets = {
        "made": videos,
        "floor": clips.render_mixed(rest),
        "reconstructions": reconstructed(made, clips.render_mixed(wanted)),
    }
    found = fvd.distances(clips.render_mixed(others), sets, i3d_weights, num_videos)
    bounds = {name: found[name].value for name in ("floor", "reconstructions")}
    return dataclasses.asdict(found["made"]) | bounds | {"metric": found["made"].name}


def expected(scene: Scene) -> str:
    """The scene as adherence.in_words says it of a perfect video."""
    return adherence.in_words(clips.render_mixed([scene])[0])


def reconstructed(made: Pipeline, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return made.codec.decode([mean for mean, _ in made.codec.encode(videos)])


def noise(made: Pipeline, scenes: Sequence[Scene], seed: int) -> list[np.ndarray]:
    """Videos of the scenes' sizes as they are where sampling begins: latents of noise, decoded."""
    rng, shape = np.random.default_rng(seed), made.codec.config.latent_shape
    shapes = [shape(scene.num_frames, scene.height, scene.width) for scene in scenes]
    return made.codec.decode([rng.standard_normal(each, np.float32) for each in shapes])


# (model, its sampler, names of rungs that are there) -> the other rungs, one after the other
Judging = Callable[[Pipeline, SamplerConfig, Collection[str]], Iterable[report.Rung]]


def once(study: StudyRun, folder: Path, stem: str, judges: Sequence[ModuleType], judge: Judging) -> list[report.Rung]:
    """What `judge` finds of the DiT in folder, a stage's, sampled as the study says; kept there as stem.json and stem.npz, and read
    from these for the same checkpoint, sampler, prompts, seed and code of `judges`. Until all are, each is kept in the folder
    stem_begun as soon as it is judged."""
    about, begun = about_of(study, folder, *judges), folder / f"{stem}_begun"
    rungs = _kept_rungs(folder, stem, about)
    if rungs is None:
        kept = (_kept_rungs(begun, str(number), about) for number in itertools.count())
        rungs = [rung for some in itertools.takewhile(lambda some: some is not None, kept) for rung in some or ()]
        for rung in judge(pipeline.load(folder), study.stages[folder.name].sampler, [rung.name for rung in rungs]):
            begun.mkdir(exist_ok=True)
            _keep_rungs(begun, str(len(rungs)), about, [rung])
            rungs.append(rung)
        _keep_rungs(folder, stem, about, rungs)
    shutil.rmtree(begun, ignore_errors=True)
    return rungs


def _keep_rungs(folder: Path, stem: str, about: dict[str, Any], rungs: Sequence[report.Rung]) -> None:
    scores = {rung.name: dict(rung.scores) for rung in rungs}
    # What is shown is told with the scores: of which rung it is, and what was asked for.
    scores[SHOWN] = {
        f"{rung.name}/{number}": f"{video.seed} {video.fps} {video.prompt}"
        for rung in rungs
        for number, video in enumerate(rung.samples)
    }
    write_kept(folder, stem, about, scores, [video.frames_THWC for rung in rungs for video in rung.samples])


def _kept_rungs(folder: Path, stem: str, about: dict[str, Any]) -> list[report.Rung] | None:
    kept = read_kept(folder, stem, about)
    try:
        return None if kept is None else _with_videos(*kept)
    except (KeyError, ValueError) as error:
        logging.warning("%s does not say what its videos are (%r); judging anew", folder / f"{stem}.json", error)
        return None


def _with_videos(scores: dict[str, Any], videos: Sequence[np.ndarray]) -> list[report.Rung]:
    """Rungs from what was kept of them. Raises KeyError or ValueError if it does not say what the videos are."""
    samples: dict[str, list[report.Video]] = {}
    for (place, told), frames_THWC in zip(scores[SHOWN].items(), videos, strict=True):
        seed, fps, prompt = str(told).split(" ", 2)
        samples.setdefault(place.split("/")[0], []).append(report.Video(frames_THWC, float(fps), prompt, int(seed)))
    return [report.Rung(name, samples.get(name, ()), part) for name, part in scores.items() if name != SHOWN]


def about_of(study: StudyRun, folder: Path, *judges: ModuleType) -> dict[str, Any]:
    """What scores of the DiT of a stage depend on: what is drawn, how it is made, and who judges it."""
    return {
        "checkpoint": checkpoint.digest(folder),
        "sampler": config.to_dict(study.stages[folder.name])["sampler"],
        "prompts": study.prompts,
        "seed": study.seed,
        "judges": code_of(*MAKERS, *judges),
    }


@functools.cache
def code_of(*judges: ModuleType) -> str:
    """What tells one state of these modules from another: scores of an older judge are not kept."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in judges).encode()).hexdigest()


def read_kept(folder: Path, stem: str, about: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """Kept scores and videos, if there are any of these settings; None for damaged ones, to be made anew."""
    scores, arrays_path = folder / f"{stem}.json", folder / f"{stem}.npz"
    if not scores.is_file():
        return None
    try:
        kept = disk.read_json(scores)
        if not isinstance(kept, dict) or kept.get("about") != about:
            return None
        if not _are_scores(kept.get("scores")):
            raise disk.FileError(f"{scores} holds no scores")
        arrays = disk.read_npz(arrays_path, MAX_JUDGED_BYTES)
        videos = [arrays.get(f"video_{number}") for number in range(len(arrays))]
        found = [video for video in videos if video is not None and video.dtype == np.uint8 and video.ndim == 4]
        if len(found) != len(videos):
            raise disk.FileError(f"{arrays_path} holds something else than videos")
    except (disk.FileError, FileNotFoundError) as error:
        logging.warning("%s; judging anew", error)
        return None
    return kept["scores"], found


def _are_scores(scores: Any) -> bool:
    """Whether it is numbers by name, in groups, some with the name of a measure."""
    return isinstance(scores, dict) and all(
        isinstance(group, dict) and all(isinstance(each, int | float | str | None) for each in group.values())
        for group in scores.values()
    )


def write_kept(
    folder: Path, stem: str, about: dict[str, Any], scores: dict[str, Any], videos: Sequence[np.ndarray]
) -> None:
    """The videos first, and no older scores beside them: where there are scores there are their videos."""
    (folder / f"{stem}.json").unlink(missing_ok=True)
    content = io.BytesIO()
    arrays: dict[str, Any] = {f"video_{number}": video for number, video in enumerate(videos)}
    np.savez_compressed(content, **arrays)
    files.write_atomically(folder / f"{stem}.npz", content.getvalue())
    files.write_atomically(folder / f"{stem}.json", json.dumps({"about": about, "scores": scores}).encode())

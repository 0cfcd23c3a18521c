"""Judging the DiTs of a study on the same held-out prompts; what is judged is kept, so that a study goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import checkpoint
from sora_jax.config import DiTRun, StudyRun
from sora_jax.data.worlds import captions, clips
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import adherence, frechet, mobilenet
from sora_jax.generate import files, pipeline
from sora_jax.study import report
from sora_jax.train import dit

# Scenes of real clips that samples are held against as a set: other ones than those that were asked for.
REAL_SCENES = 1_000_000


@dataclasses.dataclass
class Judge:
    """Samples `study.prompts` held-out prompts from trained DiTs and scores them; with frechets also as a set.

    Scores and the shown samples of a run are kept beside its checkpoints, in judged.json and judged.npz.
    """

    study: StudyRun
    workdir: Path
    frechets: bool

    def __post_init__(self) -> None:
        self._ceilings: dict[str, dict[str, float]] = {}

    def of(self, name: str) -> tuple[dict[str, Any], list[report.Video]]:
        """Scores of a stage and the samples that the report shows: kept ones if they are of this checkpoint."""
        folder = self.workdir / name
        about = {
            "checkpoint": checkpoint.digest(folder),
            "prompts": self.study.prompts,
            "shown": self.study.shown,
            "seed": self.study.seed,
            "frechets": self.frechets and mobilenet.available(),
        }
        run = pipeline.load_run(folder)
        scenes = dit.heldout_videos(run.data.world, self.study.prompts)
        kept = _read(folder, about)
        if kept is None:
            kept = self._judge(name, scenes)
            _write(folder, about, *kept)
        scores, videos = kept
        seeds, prompts = self._asked(run, scenes)
        shown = [
            report.Video(video, scene.fps, prompt, seed, expected=expected(scene), read=adherence.in_words(video))
            for video, scene, prompt, seed in zip(videos, scenes, prompts, seeds, strict=False)
        ]
        return scores, shown

    def _asked(self, run: DiTRun, scenes: Sequence[Scene]) -> tuple[list[int], list[str]]:
        seeds = [self.study.seed + number for number in range(len(scenes))]
        return seeds, [captions.prompt(scene, len(run.data.world.sizes) > 1) for scene in scenes]

    def _judge(self, name: str, scenes: Sequence[Scene]) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Adherence with its floor (shuffled captions) and ceiling (real clips through the VAE), and the Frechet distance.

        The distance is to real clips of the same world, twice as many, with its floor.
        """
        made = pipeline.load(self.workdir / name)
        seeds, prompts = self._asked(made.run, scenes)
        requests = [dit.request_of(*each) for each in zip(scenes, prompts, seeds, strict=True)]
        began = time.perf_counter()
        videos = made.sample(requests, made.run.sampler)
        logging.info("%s: sampled %d held-out prompts in %.1f s", name, len(videos), time.perf_counter() - began)
        scores, floor = adherence.judge(videos, scenes, self.study.seed)
        numbers: dict[str, Any] = {
            "adherence": scores,
            "adherence_floor": floor,
            "adherence_ceiling": self._ceiling(made, scenes),
        }
        if self.frechets and self.real_features is not None:
            found = frechet.compare(self.real_features, frechet.features(videos))
            numbers["frechet"] = {"metric": frechet.NAME} | dataclasses.asdict(found)
        return numbers, videos[: self.study.shown]

    def _ceiling(self, made: pipeline.Pipeline, scenes: Sequence[Scene]) -> dict[str, float]:
        source = made.run.vae_checkpoint
        if source not in self._ceilings:
            decoded = reconstructed(made, clips.render_mixed(scenes))
            self._ceilings[source], _ = adherence.judge(decoded, scenes, self.study.seed)
        return self._ceilings[source]

    @functools.cached_property
    def real_features(self) -> np.ndarray | None:
        """Features of twice as many held-out clips as are sampled; None, told, if the network's weights are not installed.

        The world is that of the last DiT: distances compare runs on one world.
        """
        if not mobilenet.available():
            logging.warning("no %s: its weights are not installed; %s", frechet.NAME, mobilenet.REMEDY)
            return None
        world = [stage for stage in self.study.stages.values() if isinstance(stage, DiTRun)][-1].data.world
        scenes = dit.heldout_videos(world, 2 * self.study.prompts, start=REAL_SCENES)
        return frechet.features(clips.render_mixed(scenes))


def expected(scene: Scene) -> str:
    """The scene as adherence.in_words says it of a perfect video."""
    return adherence.in_words(clips.render_mixed([scene])[0])


def reconstructed(made: pipeline.Pipeline, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return made.codec.decode([mean for mean, _ in made.codec.encode(videos)])


def _read(folder: Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """Kept scores and videos, if there are any of these settings."""
    if not (folder / "judged.json").is_file():
        return None
    kept = json.loads((folder / "judged.json").read_text())
    if kept["about"] != about:
        return None
    with np.load(folder / "judged.npz", allow_pickle=False) as arrays:
        return kept["scores"], [arrays[f"video_{number}"] for number in range(len(arrays.files))]


def _write(folder: Path, about: dict[str, Any], scores: dict[str, Any], videos: Sequence[np.ndarray]) -> None:
    """The videos first: where there are scores there are videos."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {f"video_{number}": video for number, video in enumerate(videos)}
    np.savez_compressed(content, **arrays)
    files.write_atomically(folder / "judged.npz", content.getvalue())
    files.write_atomically(folder / "judged.json", json.dumps({"about": about, "scores": scores}).encode())

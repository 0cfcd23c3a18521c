"""A study: stages one after the other, then samples, judgement and a report. Running it again goes on where it stopped."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax import checkpoint, compute
from sora_jax.config import DiTRun, StudyRun, VAERun
from sora_jax.data.worlds import captions, clips
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import adherence, frechet, mobilenet
from sora_jax.generate import pipeline
from sora_jax.study import report, scaling
from sora_jax.train import dit, loop, progress, vae

# Scenes of real clips that samples are held against as a set: other ones than those that were asked for.
REAL_SCENES = 1_000_000
# Held-out clips whose reconstructions the report shows.
SHOWN_PAIRS = 8


def run(study: StudyRun, workdir: Path, command: str) -> Path:
    """Train what is not trained yet, judge, and write workdir/report.html and report.json; returns the page.

    A DiT stage whose vae_checkpoint is the name of another stage works with that stage's VAE.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    clock = Clock(workdir / "seconds.json")
    for name in study.order:
        with clock.measure(name):
            logging.info("stage %s", name)
            loop.fit(make_task(stage_run(study, name, workdir), workdir / "encoded"), workdir / name)
    with clock.measure("evaluation"):
        page = judge(study, workdir, command)
    numbers = dict(page.numbers) | {"seconds": clock.seconds | {"total": sum(clock.seconds.values())}}
    path = report.write(workdir, dataclasses.replace(page, numbers=numbers))
    logging.info("report: %s", path)
    return path


def stage_run(study: StudyRun, name: str, workdir: Path) -> VAERun | DiTRun:
    """A stage as it is trained: with the VAE of another stage, and along the frontier that earlier stages found."""
    stage = study.stages[name]
    if isinstance(stage, VAERun):
        return stage
    if stage.vae_checkpoint in study.stages:
        stage = dataclasses.replace(stage, vae_checkpoint=str(workdir / stage.vae_checkpoint))
    isoflop = study.groups.get("isoflop", ())
    if stage.compute.along == "frontier" and isoflop:
        return scaling.along_frontier(stage, {each: run_numbers(workdir / each) for each in isoflop})
    return stage


def own_flops(directory: Path) -> float:
    """What the training in a work dir cost, without what it builds on."""
    meta = checkpoint.read_meta(directory)
    return meta["total_flops"] - meta["flops_before"]


def run_numbers(directory: Path) -> dict[str, Any]:
    """What a trained DiT is, cost and reached. flops is its own training, useful_flops without attention between clips."""
    meta = checkpoint.read_meta(directory)
    run = pipeline.load_run(directory)
    steps, packing = run.loop.steps, packing_totals(directory)
    step = compute.dit_step(run.dit, run.pack)
    # The packer counts a window when its first row is drawn: of all rows that it packed, those of the steps were used.
    used = steps * run.pack.rows * run.pack.row_tokens / max(1.0, packing["row_tokens"])
    pairs = {name: packing[name] * used / steps for name in ("pairs", "text_pairs")}
    return (
        {
            "width": run.dit.width,
            "blocks": run.dit.blocks,
            "patch": list(run.dit.patch),
            "steps": steps,
            "seconds": meta["seconds"],
            "flops": steps * step.total,
            "flops_by_part": {part: steps * flops for part, flops in step.by_part().items()},
            "useful_flops": steps * compute.dit_step(run.dit, run.pack, **pairs).total,
            "fill": packing["fill"],
        }
        | parameters(directory)
        | {name: value for name, value in last_evaluation(directory).items() if name.startswith("val_loss")}
    )


def make_task(run: VAERun | DiTRun, encoded: Path) -> Any:
    """The task that trains a run; encoded clips and captions are shared by the stages of a study."""
    return vae.VAETask(run) if isinstance(run, VAERun) else dit.DiTTask(run, encoded)


def judge(study: StudyRun, workdir: Path, command: str) -> report.Page:
    """Everything the report says, from the last checkpoints of the stages."""
    names = {kind: name for name, stage in study.stages.items() for kind in (VAERun, DiTRun) if isinstance(stage, kind)}
    numbers: dict[str, Any] = {
        "title": study.title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": loop.versions(),
        "total_flops": sum(own_flops(workdir / name) for name in study.stages),
    }
    samples: Sequence[report.Video] = ()
    pairs: Sequence[report.Pair] = ()
    if VAERun in names:
        scores = last_evaluation(workdir / names[VAERun])
        read = {name: scores[f"attributes/{name}"] for name in ("colour", "shape", "motion")}
        numbers["vae"] = {"psnr": scores["psnr"], "attributes": read} | parameters(workdir / names[VAERun])
    # A sweep has a picture of its own.
    swept = set(study.groups.get("isoflop", ())) - set(study.groups.get("ladder", ()))
    drawn = [name for name in study.order if name not in swept]
    rungs: list[report.Rung] = []
    dits = [name for name in study.order if isinstance(study.stages[name], DiTRun)]
    if dits:
        runs = {name: run_numbers(workdir / name) for name in dits}
        ladder = study.groups.get("ladder", ())
        real_features = features_of_real(study, pipeline.load_run(workdir / dits[-1])) if ladder else None
        for name in ladder or dits[-1:]:
            made = pipeline.load(workdir / name)
            scores, samples = sample_prompts(study, made, real_features)
            numbers["dit"] = runs[name]
            runs[name] = runs[name] | scores
            rungs.append(report.Rung(name, samples))
        names[DiTRun] = name
        numbers["text_encoder"] = made.run.text.encoder
        numbers["packing"] = packing_totals(workdir / name)
        numbers |= scores
        pairs = reconstruct(made)
        if len(dits) > 1:
            numbers["runs"] = runs
            numbers["scaling"] = scaling.fitted(runs, ladder, study.groups.get("isoflop", ()))
    return report.Page(
        title=study.title,
        numbers=numbers,
        samples=samples,
        rungs=rungs if len(rungs) > 1 else (),
        pairs=pairs,
        curves={name: progress.read_metrics(workdir / name, "train") for name in drawn},
        evaluations={name: progress.read_metrics(workdir / name, "eval") for name in drawn},
        commands=[command, *sample_commands(workdir, names, samples)],
    )


def sample_prompts(
    study: StudyRun, made: pipeline.Pipeline, real_features: np.ndarray | None
) -> tuple[dict[str, Any], list[report.Video]]:
    """Adherence on held-out prompts with its floor (shuffled captions) and ceiling (real clips through the VAE).

    With features of real clips (of the same world, twice as many), their Frechet distance too, with its floor.
    """
    world = made.run.data.world
    scenes = dit.heldout_videos(world, study.prompts)
    prompts = [captions.prompt(scene, len(world.sizes) > 1) for scene in scenes]
    seeds = [study.seed + number for number in range(len(scenes))]
    requests = [dit.request_of(*each) for each in zip(scenes, prompts, seeds, strict=True)]
    began = time.perf_counter()
    videos = made.sample(requests, made.run.sampler)
    logging.info("sampled %d held-out prompts in %.1f s", len(videos), time.perf_counter() - began)
    scores, floor = adherence.judge(videos, scenes, study.seed)
    real = clips.render_mixed(scenes)
    ceiling, _ = adherence.judge(reconstructed(made, real), scenes, study.seed)
    shown = [
        report.Video(video, scene.fps, prompt, seed, expected=expected(scene), read=adherence.in_words(video))
        for video, scene, prompt, seed in zip(videos, scenes, prompts, seeds, strict=True)
    ][: study.shown]
    numbers: dict[str, Any] = {"adherence": scores, "adherence_floor": floor, "adherence_ceiling": ceiling}
    if real_features is not None:
        found = frechet.compare(real_features, frechet.features(videos))
        numbers["frechet"] = {"metric": frechet.NAME} | dataclasses.asdict(found)
    return numbers, shown


def features_of_real(study: StudyRun, run: DiTRun) -> np.ndarray | None:
    """Features of twice as many held-out clips as are sampled; None, told, if the network's weights are not installed."""
    if not mobilenet.available():
        logging.warning("no %s: its weights are not installed; %s", frechet.NAME, mobilenet.REMEDY)
        return None
    scenes = dit.heldout_videos(run.data.world, 2 * study.prompts, start=REAL_SCENES)
    return frechet.features(clips.render_mixed(scenes))


def expected(scene: Scene) -> str:
    """The scene as adherence.in_words says it of a perfect video."""
    return adherence.in_words(clips.render_mixed([scene])[0])


def reconstructed(made: pipeline.Pipeline, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return made.codec.decode([mean for mean, _ in made.codec.encode(videos)])


def reconstruct(made: pipeline.Pipeline) -> list[report.Pair]:
    found = list(clips.clips(made.run.data.world, "heldout", range(SHOWN_PAIRS)))
    decoded = reconstructed(made, [clip.frames_THWC for clip in found])
    return [
        report.Pair(clip.frames_THWC, after, clip.fps, clip.captions[0])
        for clip, after in zip(found, decoded, strict=True)
    ]


def last_evaluation(directory: Path) -> dict[str, Any]:
    return progress.read_metrics(directory, "eval")[-1]


def parameters(directory: Path) -> dict[str, int]:
    return {"parameters": checkpoint.describe(directory).num_parameters("params")}


def packing_totals(directory: Path) -> dict[str, float]:
    """Sums of the packer's counts over the run, and the share of the token budget that was filled."""
    lines = progress.read_metrics(directory, "train")
    names = sorted({name for line in lines for name in line if name.startswith("packing/")} - {"packing/fill"})
    totals = {name.removeprefix("packing/"): sum(line.get(name, 0.0) for line in lines) for name in names}
    return totals | {"fill": totals["tokens"] / max(1.0, totals["row_tokens"])}


def sample_commands(workdir: Path, names: dict[Any, str], samples: Sequence[report.Video]) -> list[str]:
    if DiTRun not in names or not samples:
        return []
    first = samples[0]
    height, width = first.frames_THWC.shape[1:3]
    return [
        f'sora-jax sample --checkpoint={workdir / names[DiTRun]} --prompt="{first.prompt}" --seed={first.seed} '
        f"--height={height} --width={width} --frames={len(first.frames_THWC)} --fps={first.fps:g} --out=sample.mp4"
    ]


def machine() -> dict[str, Any]:
    """The machine a report was made on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "platform": platform.platform(terse=True),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "devices": ", ".join(sorted({device.device_kind for device in jax.devices()})),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Clock:
    """Wall-clock seconds per part of a study, added up over restarts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def measure(self, name: str) -> _Lap:
        return _Lap(self, name)


class _Lap:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self.clock.seconds
        seconds[self.name] = seconds.get(self.name, 0.0) + time.perf_counter() - self.began
        self.clock.path.write_text(json.dumps(seconds))

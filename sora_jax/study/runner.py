"""A study: stages one after the other, then samples, judgement and a report. Running it again goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from sora_jax import checkpoint, compute, config, disk
from sora_jax.config import DiTRun, StudyRun, VAERun
from sora_jax.data.worlds import clips
from sora_jax.generate import pipeline
from sora_jax.models import dit as dit_model
from sora_jax.nn.layers import abstract
from sora_jax.study import baselines, dry_run, judgement, prompting, report, scaling
from sora_jax.train import dit, lock, loop, progress, vae

# Held-out clips whose reconstructions the report shows.
SHOWN_PAIRS = 8
KEPT_EVERY = 10.0  # seconds


def run(study: StudyRun, workdir: Path, command: str) -> Path:
    """Train what is not trained yet, judge, and write workdir/report.html and report.json; returns the page.

    A DiT stage whose vae_checkpoint is the name of another stage works with that stage's VAE. Raises as loop.fit does.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with lock.locked(workdir):
        return _run(study, workdir, command)


def _run(study: StudyRun, workdir: Path, command: str) -> Path:
    clock = Clock(workdir / "seconds.json")
    for name in study.order:
        with clock.measure(name):
            logging.info("stage %s", name)
            try:
                loop.fit(make_task(stage_run(study, name, workdir), workdir / "encoded"), workdir / name)
            except loop.DivergedError as error:
                raise loop.DivergedError(f"stage {name}: {error}") from error
    scored = judged(study, workdir, clock)
    sections: Sections = {}
    for group, of in SECTIONS.items():
        if group in study.groups:
            with clock.measure(group):
                sections[group] = of(study, workdir, study.groups[group])
    with clock.measure("report"):
        page = page_of(study, workdir, command, scored, sections)
    seconds = clock.of(study)
    numbers = dict(page.numbers) | {"seconds": seconds | {"total": sum(seconds.values())}}
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
        return scaling.along_frontier(dit.with_encoder(stage), {each: run_numbers(workdir / each) for each in isoflop})
    return stage


def own_flops(directory: Path) -> float:
    """What the training in a work dir cost, without what it builds on."""
    meta = checkpoint.read_meta(directory)
    total, before = (config.stored_number(meta, name, directory) for name in ("total_flops", "flops_before"))
    return total - before


def encoding_flops(workdir: Path, study: StudyRun) -> float:
    """What encoding cost the stages: once for all that read the same clips through the same VAE."""
    found: dict[tuple[str, str], float] = {}
    for name, stage in study.stages.items():
        if isinstance(stage, DiTRun):
            meta = checkpoint.read_meta(workdir / name)
            # Checkpoints of before it was counted do not tell.
            cost = config.stored_number({"encoding_flops": 0.0} | meta, "encoding_flops", workdir / name)
            found[str(meta.get("vae_weights")), repr(stage.data)] = cost
    return sum(found.values())


def run_numbers(directory: Path) -> dict[str, Any]:
    """What a trained DiT is, cost and reached. flops is its own training, useful_flops without attention between clips
    and products that only move numbers; optimizer_flops come on top."""
    meta = checkpoint.read_meta(directory)
    run = pipeline.load_run(directory)
    steps, packing = run.loop.steps, packing_totals(directory)
    step = compute.dit_step(run.dit, run.pack)
    model = abstract(dit_model.DiT, run.dit)
    # The packer counts a window when its first row is drawn: of all rows that it packed, those of the steps were used.
    used = steps * run.pack.rows * run.pack.row_tokens / max(1.0, packing["row_tokens"])
    pairs = {name: packing[name] * used / steps for name in ("pairs", "text_pairs")}
    return (
        {
            "seed": run.seed,
            "rate": run.optimizer.rate,
            "width": run.dit.width,
            "blocks": run.dit.blocks,
            "patch": list(run.dit.patch),
            "steps": steps,
            "seconds": config.stored_number(meta, "seconds", directory),
            "flops": steps * step.total,
            "optimizer_flops": dry_run.optimizer_flops(run, model),
            "flops_by_part": {part: steps * flops for part, flops in step.by_part().items()},
            "useful_flops": steps * compute.dit_step(run.dit, run.pack, **pairs).useful,
            "fill": packing["fill"],
        }
        | parameters(directory)
        | {name: value for name, value in last_evaluation(directory).items() if name.startswith("val_loss")}
    )


def make_task(run: VAERun | DiTRun, encoded: Path) -> Any:
    """The task that trains a run; encoded clips and captions are shared by the stages of a study."""
    return vae.VAETask(run) if isinstance(run, VAERun) else dit.DiTTask(run, encoded)


# Of a group: its numbers, and what the page shows of it.
Sections = dict[str, tuple[dict[str, Any], report.Section]]
SECTIONS: dict[str, Callable[[StudyRun, Path, Sequence[str]], tuple[dict[str, Any], report.Section]]] = {
    "prompting": prompting.of,
    "framing": baselines.framing,
    "rollout": baselines.rollout,
}

# Of judged stages, in order: scores and the samples that are shown.
Judged = dict[str, tuple[dict[str, Any], list[report.Video]]]


def judged(study: StudyRun, workdir: Path, clock: Clock) -> Judged:
    """Scores and samples of the ladder and of the models, or else of the best of the rates, or of the last DiT."""
    ladder, models, rates = (study.groups.get(group, ()) for group in ("ladder", "models", "rates"))
    dits = [name for name in study.order if isinstance(study.stages[name], DiTRun)]
    alone = [_best(workdir, rates)] if rates else dits[-1:]
    judge = judgement.Judge(study, workdir, frechets=bool(ladder or models))
    found: Judged = {}
    for name in [name for name in dits if name in (*ladder, *models)] or alone:
        with clock.measure(f"{name} judged"):
            found[name] = judge.of(name)
    return found


def _best(workdir: Path, names: Iterable[str]) -> str:
    """The run with the least loss."""
    return min(names, key=lambda name: run_numbers(workdir / name)["val_loss"])


def page_of(study: StudyRun, workdir: Path, command: str, scored: Judged, sections: Sections) -> report.Page:
    """Everything the report says, from the last checkpoints of the stages and what was judged."""
    names = {kind: name for name, stage in study.stages.items() for kind in (VAERun, DiTRun) if isinstance(stage, kind)}
    encoding = encoding_flops(workdir, study)
    numbers: dict[str, Any] = {
        "title": study.title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": loop.versions(),
        "encoding_flops": encoding,
        "total_flops": sum(own_flops(workdir / name) for name in study.stages) + encoding,
    }
    samples: Sequence[report.Video] = ()
    pairs: Sequence[report.Pair] = ()
    rungs = [report.Rung(name, scored[name][1]) for name in scaling.repeats(study)]
    if VAERun in names:
        scores = last_evaluation(workdir / names[VAERun])
        read = {name: scores[f"attributes/{name}"] for name in ("colour", "shape", "motion")}
        cost = {"flops": own_flops(workdir / names[VAERun])}
        numbers["vae"] = {"psnr": scores["psnr"], "attributes": read} | parameters(workdir / names[VAERun]) | cost
    if scored:
        runs = {name: run_numbers(workdir / name) for name in study.order if isinstance(study.stages[name], DiTRun)}
        # The headline is of the largest rung, or of the best run that was judged.
        ladder = scaling.repeats(study)
        names[DiTRun] = best = max(ladder, key=lambda name: runs[name]["flops"]) if ladder else _best(workdir, scored)
        made, (scores, samples) = pipeline.load(workdir / best), scored[best]
        numbers |= {"dit": runs[best], "text_encoder": made.run.text.encoder, "packing": packing_totals(workdir / best)}
        numbers |= scores
        pairs = reconstruct(made)
        if len(runs) > 1:
            numbers["runs"] = {name: run | (scored[name][0] if name in scored else {}) for name, run in runs.items()}
            numbers["scaling"] = scaling.findings(numbers["runs"], study)
    numbers |= {group: found for group, (found, _) in sections.items()}
    # Sweeps have pictures of their own, and of several seeds one is enough.
    drawn = [name for name in study.order if name in (*names.values(), *(rung.name for rung in rungs))]
    return report.Page(
        title=study.title,
        numbers=numbers,
        samples=samples,
        rungs=rungs if len(rungs) > 1 else (),
        sections=[section for _, section in sections.values()],
        pairs=pairs,
        curves={name: progress.read_metrics(workdir / name, "train") for name in drawn},
        evaluations={name: progress.read_metrics(workdir / name, "eval") for name in drawn},
        commands=[command, *sample_commands(study, workdir, names, samples)],
    )


def reconstruct(made: pipeline.Pipeline) -> list[report.Pair]:
    found = list(clips.clips(made.run.data.world, "heldout", range(SHOWN_PAIRS)))
    decoded = judgement.reconstructed(made, [clip.frames_THWC for clip in found])
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


def sample_commands(
    study: StudyRun, workdir: Path, names: dict[Any, str], samples: Sequence[report.Video]
) -> list[str]:
    if DiTRun not in names or not samples:
        return []
    first, folder = samples[0], workdir / names[DiTRun]
    height, width = first.frames_THWC.shape[1:3]
    # A study may judge with another sampler than that of the training, which is the checkpoint's. From text alone nothing is
    # given to insist on.
    trained, judged = (
        dataclasses.asdict(run.sampler) for run in (pipeline.load_run(folder), study.stages[folder.name])
    )
    changed = [name for name in judged if judged[name] != trained[name] and name != "known_guidance"]
    flags = "".join(f"--{name}={_as_flag(judged[name])} " for name in changed)
    return [
        f'sora-jax sample --checkpoint={folder} --prompt="{first.prompt}" --seed={first.seed} '
        f"--height={height} --width={width} --frames={len(first.frames_THWC)} --fps={first.fps:g} {flags}--out=sample.mp4"
    ]


def _as_flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    """Wall-clock seconds per part of a study, added up over restarts; what is killed loses KEPT_EVERY seconds at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = self._kept()

    def _kept(self) -> dict[str, float]:
        try:
            found = disk.read_json(self.path) if self.path.exists() else {}
            if not isinstance(found, dict) or not all(isinstance(each, int | float) for each in found.values()):
                raise disk.FileError(f"{self.path} holds no seconds by name")
        except disk.FileError as error:
            logging.warning("%s; counting from 0", error)
            return {}
        return found

    def of(self, study: StudyRun) -> dict[str, float]:
        """The parts of this study: others may have been run in the same work dir."""
        judged = (f"{name} judged" for name in study.order)
        names = {*study.order, *judged, *study.groups, "report"}
        return {name: seconds for name, seconds in self.seconds.items() if name in names}

    def measure(self, name: str) -> _Lap:
        return _Lap(self, name)


class _Lap:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name
        self.ended = threading.Event()
        self.keeper = threading.Thread(target=self._keep_on, daemon=True)

    def __enter__(self) -> None:
        self.began, self.before = time.perf_counter(), self.clock.seconds.get(self.name, 0.0)
        self.keeper.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.keeper.join()
        self._keep()

    def _keep_on(self) -> None:
        while not self.ended.wait(KEPT_EVERY):
            with contextlib.suppress(OSError):  # the end of the lap tells
                self._keep()

    def _keep(self) -> None:
        self.clock.seconds[self.name] = self.before + time.perf_counter() - self.began
        disk.write_atomically(self.clock.path, json.dumps(self.clock.seconds).encode())

"""The videos that VBench reads: `sora-jax sample --vbench`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sora_jax
from sora_jax.cli import asked, flags, trained
from sora_jax.cli.failures import Failure, errors_for_users, errors_of_writing

if TYPE_CHECKING:
    import numpy as np

# Prompts whose videos for VBench are held at a time.
VBENCH_PROMPTS = 8


def sample_for_vbench(arguments: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Five videos of every prompt, or --samples of them, a few prompts at a time, in the folder that VBench reads."""
    from sora_jax.evaluate import vbench

    least, folder = vbench.SAMPLES_PER_PROMPT, arguments.vbench
    count = arguments.samples or least
    if count < least:
        raise Failure(f"--samples={count}: VBench takes {least} videos of every prompt or more; leave --samples out")
    if repeated := sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
        raise Failure(f"prompt {repeated[0]!r} comes twice; VBench names videos by their prompts")
    with errors_for_users(FileExistsError):
        vbench.new_folder(folder)
    seeds = _seeds(arguments.seed or 0, count)
    pipeline, (workdir, step), settings = trained.load_with(arguments.checkpoint, arguments)
    from sora_jax import checkpoint, processes
    from sora_jax.generate import files, layouts, manifest
    from sora_jax.generate.pipeline import Request

    size = asked.size_of(arguments, pipeline.usual_size)
    with errors_for_users(ValueError):  # a size that cannot be made
        layouts.check_size(size, pipeline.grid)
    asked.warn_of(size, pipeline.run.data.world)
    trained.tell_mesh(pipeline)
    logging.info("sampling %d of %s", len(prompts) * count, size)

    def samples() -> Iterator[vbench.Samples]:
        for start in range(0, len(prompts), VBENCH_PROMPTS):
            chosen = prompts[start : start + VBENCH_PROMPTS]
            requests = [Request(prompt, **dataclasses.asdict(size), seed=seed) for prompt in chosen for seed in seeds]
            made = pipeline.sample(requests, settings)
            for number, prompt in enumerate(chosen):
                yield vbench.Samples(prompt, made[number * count : (number + 1) * count], seeds)
            logging.info("%d of %d prompts", start + len(chosen), len(prompts))

    def write_video(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
        files.write_video(path, frames_THWC, fps, arguments.scale or 1)

    made_by = {
        "checkpoint": str(workdir.absolute()),
        "step": step,
        "fingerprint": checkpoint.digest(workdir, step),
        "settings": dataclasses.asdict(settings),
        "versions": {"sora_jax": sora_jax.__version__, **manifest.versions(trained.device(pipeline))},
        "command": arguments.command,
    }
    processes.meet()  # the others have looked, too, whether the folder is new
    if not processes.is_first():
        collections.deque(samples(), maxlen=0)  # made together, written by the first
        return
    with errors_of_writing(folder):
        print(vbench.export(folder, samples(), size.fps, write_video, made_by))


def _seeds(first: int, count: int) -> list[int]:
    if first + count - 1 > flags.MAX_SEED:
        raise Failure(f"--seed={first} with --samples={count} goes beyond {flags.MAX_SEED}; choose a smaller seed")
    return list(range(first, first + count))

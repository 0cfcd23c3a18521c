"""The verbs train and study, with their flags."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli import flags
from sora_jax.cli.configs import load_run
from sora_jax.cli.failures import INTERRUPTED, LOST, RUN_ERROR, Failure, errors_for_users, make_folder, refuse_file
from sora_jax.cli.process import meeting

if TYPE_CHECKING:
    from sora_jax.config import CaptionerRun, DiTRun, Run, VAERun

# What faulthandler still counts, and more than anyone waits.
LONGEST_SECONDS = 1e6


def add_train(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "train",
        train,
        "train one stage: the VAE, the diffusion transformer or the captioner",
        "Train one stage: the VAE, the diffusion transformer or the captioner.\n"
        "The same command again resumes from the newest checkpoint.",
        """examples:
  sora-jax train --config=experiments/quickstart.py:vae --workdir=runs/vae
  sora-jax train --config=experiments/quickstart.py:dit --config.vae_checkpoint=runs/vae --workdir=runs/dit
  sora-jax train --config=experiments/quickstart.py:vae --config.loop.steps=50 --workdir=runs/short
  sora-jax train --config=experiments/dit.py:full --workdir=/shared/dit --coordinator=host0:8476 --processes=2 --process=0""",
    )
    flags.add_run_flags(parser)
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="N:M",
        help="write a profile of steps N to M into DIR/profile; SIGUSR1 asks for one of the next 5 steps (default: only by signal)",
    )
    parser.add_argument(
        "--hang_seconds",
        type=_seconds,
        default=600.0,
        metavar="X",
        help="where no step, evaluation or save finishes for so long, show the stacks of all threads, also in DIR/stacks.txt, and "
        "go on; 0 = never; SIGUSR2 shows them at once (default: %(default)g)",
    )
    flags.add_processes(
        parser,
        "The same command on every machine, with a --workdir that all of them see. Where one dies the others stop within\n"
        f"seconds with exit code {LOST}; started again they resume.",
    )


def add_study(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "study",
        study,
        "train several stages, measure them and write a report",
        "Train the stages of a study in order, measure the result and write DIR/report.html and DIR/report.json.\n"
        "The same command again resumes.",
        """examples:
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart
  sora-jax study --config=experiments/quickstart.py --config.stages.dit.loop.steps=400 --workdir=runs/short
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart --dry_run""",
    )
    flags.add_run_flags(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print size, steps, FLOPs and about the time of every stage, refuse what cannot work, and train nothing "
        "(default: train)",
    )


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a first and a last step, counted from 1, such as 10:14")
    if int(last) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} holds no step: the first comes after the last")
    return int(first), int(last)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= LONGEST_SECONDS:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds in 0..{LONGEST_SECONDS:g}")


def train(arguments: argparse.Namespace) -> None:
    """Trains the stage of --config in --workdir, or goes on with it."""
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import checkpoint, config, processes, signals
    from sora_jax.data import loader
    from sora_jax.train import dit, loop, watch

    if isinstance(run, config.StudyRun):
        name = arguments.config.partition(":")[0]
        raise Failure(
            f"{arguments.config} is a study; use sora-jax study, or train a stage: {_variants(name, run.stages)}"
        )
    if arguments.profile:
        with errors_for_users():
            # Steps may follow from a budget.
            steps = (dit.resolve(run) if isinstance(run, config.DiTRun) else run).loop.steps
        if arguments.profile[0] > steps:
            first, last = arguments.profile
            raise Failure(f"--profile={first}:{last} begins after the run's last step, {steps}; give steps before it")
    options = watch.Options(arguments.profile, arguments.hang_seconds)
    make_folder(arguments.workdir)
    try:
        with meeting(arguments) as met, contextlib.nullcontext() if met else signals.handled():
            task = _task(run, arguments.workdir)
            with errors_for_users():
                loop.fit(task, arguments.workdir, options)
    except (loop.DivergedError, checkpoint.SaveError, loader.LoaderError) as error:
        raise Failure(error, RUN_ERROR) from error
    except KeyboardInterrupt as interrupt:
        step = checkpoint.latest_step(arguments.workdir)
        kept = "nothing was saved yet, the same command starts anew"
        raise Failure(
            f"{_interrupted(interrupt)}; {kept if step is None else f'the same command resumes from step {step}'}",
            getattr(interrupt, "code", INTERRUPTED),
        ) from None
    if processes.is_first():
        print(f"trained: {arguments.workdir}")


def study(arguments: argparse.Namespace) -> None:
    """Trains the stages of --config in --workdir, or goes on with them, and writes the report."""
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import checkpoint, config, signals
    from sora_jax.data import loader
    from sora_jax.train import loop

    if not isinstance(run, config.StudyRun):
        raise Failure(f"{arguments.config} is a single stage, not a study; use sora-jax train")
    from sora_jax.study import dry_run, runner

    with errors_for_users():
        stages = dry_run.plan(run)
        _check_kernels({f"stage {name}: ": stage for name, stage in run.stages.items()})
    if arguments.dry_run:
        print(dry_run.table(stages, dry_run.matmul_speed()))
        return
    make_folder(arguments.workdir)
    try:
        with errors_for_users(), signals.handled():
            runner.run(run, arguments.workdir, arguments.command)
    except (loop.DivergedError, checkpoint.SaveError, loader.LoaderError) as error:
        raise Failure(error, RUN_ERROR) from error
    except KeyboardInterrupt as interrupt:
        message = f"{_interrupted(interrupt)}; the same command goes on from the newest checkpoint of each stage"
        raise Failure(message, getattr(interrupt, "code", INTERRUPTED)) from None


def _interrupted(error: KeyboardInterrupt) -> str:
    """'stopped by SIGTERM', or 'interrupted' where signals were not handled."""
    return str(error) or "interrupted"


def _task(run: VAERun | DiTRun | CaptionerRun, workdir: Path) -> Any:
    """The task of a run; refuses a mesh that the devices do not fill and a VAE that is not there."""
    from sora_jax import checkpoint, config, sharding
    from sora_jax.train import captioner, dit, vae

    with errors_for_users():
        sharding.make_mesh(run.mesh)
        _check_kernels({"": run})
    with errors_for_users(ValueError):
        if not isinstance(run, config.VAERun):
            refuse_file(run.vae_checkpoint)
            checkpoint.read_meta(run.vae_checkpoint)
    with errors_for_users():
        if isinstance(run, config.VAERun):
            return vae.VAETask(run)
        return dit.DiTTask(run, workdir) if isinstance(run, config.DiTRun) else captioner.CaptionerTask(run, workdir)


def _check_kernels(runs: Mapping[str, Run]) -> None:
    """Refuses transformers whose attention is a kernel that does not take them, and tells of those that go without their chip's:
    they are many times slower, and nothing else says so. A run's name begins what is said of it."""
    from sora_jax import config, sharding
    from sora_jax.plan import kernels

    for name, run in runs.items():
        if not isinstance(run, config.DiTRun | config.CaptionerRun):
            continue
        mesh = sharding.make_mesh(run.mesh)
        platform = mesh.devices.flat[0].platform
        stage, model = ("dit", run.dit) if isinstance(run, config.DiTRun) else ("captioner", run.captioner)
        try:
            kernels.refuse(stage, model, run.pack, mesh, platform)
        except config.ConfigError as error:
            raise config.ConfigError(f"{name}{error}") from error
        for line in kernels.missing(run.dit, run.pack, mesh, platform) if isinstance(run, config.DiTRun) else ():
            logging.warning("%s%s", name, line)


def _variants(name: str, stages: Iterable[str]) -> str:
    return " or ".join(f"--config={name}:{stage}" for stage in stages)

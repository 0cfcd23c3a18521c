"""The verbs train and study."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli.configs import load_run
from sora_jax.cli.failures import INTERRUPTED, RUN_ERROR, Failure, errors_for_users, make_folder, refuse_file

if TYPE_CHECKING:
    from sora_jax.config import CaptionerRun, DiTRun, VAERun


def train(arguments: argparse.Namespace) -> None:
    """Trains the stage of --config in --workdir, or goes on with it."""
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import checkpoint, config, processes, signals
    from sora_jax.data import loader
    from sora_jax.train import loop, watch

    if isinstance(run, config.StudyRun):
        name = arguments.config.partition(":")[0]
        raise Failure(
            f"{arguments.config} is a study; use sora-jax study, or train a stage: {_variants(name, run.stages)}"
        )
    if arguments.profile and arguments.profile[0] > run.loop.steps:
        first, last = arguments.profile
        raise Failure(f"--profile={first}:{last} begins after the run's last step, {run.loop.steps}")
    options = watch.Options(arguments.profile, arguments.hang_seconds)
    make_folder(arguments.workdir)
    try:
        with _meeting(arguments), signals.handled():
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


@contextlib.contextmanager
def _meeting(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a run, if the flags say that there are any, and leaves them in order."""
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if given == (None, None, None) and not arguments.distributed:
        yield
        return
    if None in given and not arguments.distributed:
        raise Failure("--coordinator, --processes and --process go together; or give --distributed")
    from sora_jax import processes, signals

    try:
        processes.start(*given)
    except (RuntimeError, ValueError) as error:
        raise Failure(f"the processes did not meet: {error}", RUN_ERROR) from error
    try:
        yield
    except signals.Stopped:
        # This process ends without jax's own leave-taking, which ends the others' if it comes first.
        processes.leave(together=True)
        raise
    processes.leave()


def _task(run: VAERun | DiTRun | CaptionerRun, workdir: Path) -> Any:
    """The task of a run; refuses a mesh that the devices do not fill and a VAE that is not there."""
    from sora_jax import checkpoint, config, sharding
    from sora_jax.train import captioner, dit, vae

    with errors_for_users():
        sharding.make_mesh(run.mesh)
    with errors_for_users(ValueError):
        if not isinstance(run, config.VAERun):
            refuse_file(run.vae_checkpoint)
            checkpoint.read_meta(run.vae_checkpoint)
    with errors_for_users():
        if isinstance(run, config.VAERun):
            return vae.VAETask(run)
        return dit.DiTTask(run, workdir) if isinstance(run, config.DiTRun) else captioner.CaptionerTask(run, workdir)


def _variants(name: str, stages: Iterable[str]) -> str:
    return " or ".join(f"--config={name}:{stage}" for stage in stages)

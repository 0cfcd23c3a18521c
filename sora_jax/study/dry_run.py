"""What a study would run, before it runs: size, steps and FLOPs of every stage and about how long it trains.

A plan that cannot work is refused here, not after an hour.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sora_jax import checkpoint, compute, sharding
from sora_jax.config import ConfigError, DiTRun, StudyRun, VAERun
from sora_jax.evaluate import frechet, mobilenet
from sora_jax.generate import pipeline
from sora_jax.models import dit as dit_model
from sora_jax.models import vae as vae_model
from sora_jax.nn.layers import abstract, parameters
from sora_jax.study import baselines, prompting, scaling
from sora_jax.train import dit, optimizer, progress

# Training reaches about this part of the speed of a large float32 matrix product (experiments/README.md).
SHARE_OF_MATMUL = 0.25
# What refuses worlds of which a group's models cannot be judged.
CHECKS = {"prompting": prompting.check, "framing": baselines.check_framing, "rollout": baselines.check_rollout}
MATMUL_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: units are clips for a VAE and tokens, padding included, for a DiT. optimizer_flops come on top of flops, by which
    budgets are counted. Of one that follows a frontier which is yet to be found, parameters and steps are provisional."""

    name: str
    parameters: int
    steps: int
    units: float
    unit: str
    flops: float
    optimizer_flops: float
    provisional: bool = False


def plan(study: StudyRun, devices: Sequence[Any] | None = None) -> list[StagePlan]:
    """The stages in order, on these devices (all by default). Raises ConfigError for what cannot work: budgets, sizes, stages that
    need a later one, what could not be judged, and MeshError for stages that do not divide over the devices.

    A stage along a frontier that is yet to be found is planned with the config's exponent.
    """
    if "models" in study.groups and not mobilenet.available():
        raise ConfigError(
            f"the group models is compared by {frechet.NAME}, and its weights are not installed; {mobilenet.REMEDY}"
        )
    plans: list[StagePlan] = []
    vaes: dict[str, Any] = {}
    for name in study.order:
        stage = study.stages[name]
        try:
            mesh = sharding.make_mesh(stage.mesh, devices)
        except sharding.MeshError as error:
            raise sharding.MeshError(f"stage {name}: {error}") from error
        late = set(study.groups.get("isoflop", ())) - {each.name for each in plans}
        if isinstance(stage, DiTRun) and stage.compute.along == "frontier" and late:
            raise ConfigError(
                f"stage {name} grows along the frontier that the isoflop group finds; put {min(late)} before it in order"
            )
        if isinstance(stage, VAERun):
            vaes[name] = stage.vae
            plans.append(_vae_plan(name, stage, mesh))
        else:
            plans.append(_dit_plan(name, stage, vaes, study, mesh))
    along = [
        name for name, stage in study.stages.items() if isinstance(stage, DiTRun) and stage.compute.along == "frontier"
    ]
    if along and "isoflop" in study.groups:
        _check_sweep({each.name: each for each in plans if each.name in study.groups["isoflop"]}, along[0])
    return plans


def _check_sweep(swept: dict[str, StagePlan], name: str) -> None:
    groups = scaling.budgets({each: {"flops": plan.flops} for each, plan in swept.items()})
    if sum(len({swept[each].parameters for each in group}) >= 3 for group in groups) < 2:
        raise ConfigError(
            f"stage {name} grows along a frontier; the isoflop group needs two budgets with three sizes each"
        )


def _vae_plan(name: str, run: VAERun, mesh: Mesh) -> StagePlan:
    shapes = abstract(vae_model.VAE, run.vae)
    _check_mesh(name, mesh, shapes, rows=run.vae_train.batch)
    flops = compute.vae_step(run.vae, run.vae_train).total * run.loop.steps
    units = run.loop.steps * run.vae_train.batch
    return StagePlan(name, _size(shapes), run.loop.steps, units, "clips", flops, optimizer_flops(run, shapes))


def _dit_plan(name: str, stage: DiTRun, vaes: dict[str, Any], study: StudyRun, mesh: Mesh) -> StagePlan:
    source = stage.vae_checkpoint
    if source in study.stages and source not in vaes:
        raise ConfigError(f"stage {name} works with the VAE of stage {source}; put {source} before it in order")
    if source not in study.stages and not checkpoint.exists(source):
        raise ConfigError(
            f"stage {name}: vae_checkpoint {source!r} is neither a stage nor a checkpoint; name a stage or the work dir of a VAE"
        )
    network = vaes[source] if source in vaes else pipeline.load_vae_config(Path(source))
    try:
        run = dit.resolve(stage)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error
    if network.channels != run.dit.channels:
        raise ConfigError(f"stage {name}: dit.channels is {run.dit.channels}, its VAE has {network.channels}")
    try:
        dit.longest_clip(run, network)
        for group, check in CHECKS.items():
            if name in study.groups.get(group, ()):
                check(run.data.world, network.stride[0])
    except ValueError as error:
        raise ConfigError(f"stage {name}: {error}") from error
    tokens = run.loop.steps * run.pack.rows * run.pack.row_tokens
    shapes = abstract(dit_model.DiT, run.dit)
    _check_mesh(name, mesh, shapes, rows=run.pack.rows, tokens=run.pack.row_tokens, heads=run.dit.common_heads)
    flops = compute.dit_step(run.dit, run.pack).total * run.loop.steps
    follows = stage.compute.along == "frontier" and stage.compute.multiplier != 1 and "isoflop" in study.groups
    besides = optimizer_flops(run, shapes)
    return StagePlan(name, _size(shapes), run.loop.steps, tokens, "tokens", flops, besides, provisional=follows)


def optimizer_flops(run: VAERun | DiTRun, model: nnx.Module) -> float:
    """What the optimizer of a run multiplies in all its steps. The model may be of shapes alone."""
    return run.loop.steps * optimizer.flops(run.optimizer, parameters(model))


def _check_mesh(name: str, mesh: Mesh, model: nnx.Module, **sizes: int) -> None:
    try:
        sharding.check(mesh, **sizes)
        sharding.parameter_shardings(parameters(model), mesh)
    except sharding.MeshError as error:
        raise sharding.MeshError(f"stage {name}: {error}") from error


def _size(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def matmul_speed() -> float:
    """FLOP/s of a large float32 matrix product on one device, the best of three."""
    x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    best = min(_seconds(lambda: multiply(x, x).block_until_ready()) for _ in range(3))
    return 2 * MATMUL_SIZE**3 / best


def _seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def table(plans: Sequence[StagePlan], speed: float) -> str:
    """The plan as lines of text, with times at `speed` FLOP/s of matrix products."""
    rows = [("stage", "parameters", "steps", "consumes", "FLOPs", "optimizer's", "trains about")]
    for each in plans:
        cost = _cost(each.flops, each.optimizer_flops, speed)
        units = f"{progress.si(each.units)}{each.unit}"
        rows.append((each.name, f"{each.parameters:,}", f"{each.steps:,}", units, *cost))
    totals = sum(each.flops for each in plans), sum(each.optimizer_flops for each in plans)
    rows.append(("all", "", "", "", *_cost(*totals, speed)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    note = (
        "FLOPs are of the model, as budgets are; what its optimizer multiplies comes on top.\n"
        f"Times: training alone, on one device, at {SHARE_OF_MATMUL:.0%} of a large matrix product's speed here, "
        f"{progress.si(speed)}FLOP/s; encoding and judging come on top."
    )
    if not mobilenet.available():
        note += f"\nWeights for {frechet.NAME} are not installed, so it will be left out; {mobilenet.REMEDY}"
    if names := [each.name for each in plans if each.provisional]:
        note += (
            f"\nSizes and steps of {', '.join(names)} follow the frontier that the sweep will find; those here are of "
            "compute.exponent. FLOPs stay."
        )
    return "\n".join([*lines, note])


def _cost(flops: float, optimizer_flops: float, speed: float) -> tuple[str, str, str]:
    seconds = (flops + optimizer_flops) / (speed * SHARE_OF_MATMUL)
    return f"{flops:.3g}", f"{optimizer_flops:.3g}", progress.clock(seconds)

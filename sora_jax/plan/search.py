"""The most promising meshes, remat policies and rows for a target, compiled and ranked."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh

from sora_jax import compute, sharding
from sora_jax.config import ConfigError, DiTRun
from sora_jax.data.pack import PackConfig
from sora_jax.models import dit as dit_model
from sora_jax.models.vae import VAEConfig
from sora_jax.plan import kernels, roofline, step
from sora_jax.plan.packing import packed
from sora_jax.plan.topology import CHIPS, GIB, Target
from sora_jax.train import dit

# For estimates: weights of a block over its width squared; what it keeps on its chip for the backward pass, and what is there while
# one runs backward, in residual streams. The last is such that the three plans of experiments/README.md come out within a fifth.
WEIGHTS = 22
KEPT = {"full": 1, "attention": 2, "dots": 15, "none": 40, "offload": 1}
RUNNING = 70
# What attention sends to trade tokens for heads and back, of a block forward, again and backward, in residual streams: queries,
# keys, values and what they found, a part of it in bfloat16. Of the plan of 30b.
TRADED = 8.5


def search(run: DiTRun, network: VAEConfig, where: Target, tries: int) -> list[dict[str, Any]]:
    """The most promising meshes, remat policies, batches and lengths of rows for a target, compiled, the best first.

    Candidates are ranked by an estimate, and as many as `tries` of the best are compiled, the run as it is among them; what is
    refused without that is none of them. Those that fit come first, and of them those whose time is known whole, by the speed
    that is foretold at the slow end. Padding is no speed: what counts are tokens of clips.
    """
    chips, found = len(where.devices), list[dict[str, Any]]()
    own = _over(run, chips)
    tried = list(candidates(run, network, where))
    if own not in tried:  # why it cannot work is told
        tried.append(own)
    padding = {packing: _padding(run, packing, network) for packing in {each.pack for each in tried}}
    tried.sort(key=lambda each: 0.0 if each == own else estimate(each, where) * padding[each.pack])
    for candidate in tried:
        if len(found) == tries:
            break
        try:
            found.append(roofline.plan(candidate, network, where))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            logging.info("%s: %s", _told(candidate), str(error).splitlines()[0])
    return sorted(found, key=lambda each: (not each["verdict"]["fits"], bool(each.get("unknown_loops")), -speed(each)))


def speed(numbers: dict[str, Any]) -> float:
    """Tokens of clips a second, at the slow end of a plan; 0 where no time is foretold."""
    return numbers["packing"]["fill"] * numbers.get("tokens_per_second", [0])[0]


def _padding(run: DiTRun, packing: PackConfig, network: VAEConfig) -> float:
    """Tokens of a row for one of a clip; infinite for rows that the plan will refuse: they come last, and the plan says why."""
    try:
        return 1 / packed(dataclasses.replace(run, pack=packing), network).fill
    except ConfigError:
        return math.inf


def _over(run: DiTRun, chips: int) -> DiTRun:
    """The run with the sizes of its mesh over so many chips, if it has one over them."""
    try:
        return dataclasses.replace(run, mesh=sharding.MeshConfig(*sharding.mesh_shape(run.mesh, chips)))
    except sharding.MeshError:
        return run


def candidates(run: DiTRun, network: VAEConfig, where: Target) -> Iterator[DiTRun]:
    """The run on every mesh that its parameters, heads, rows and tokens divide over and that leaves attention its kernels, with
    every remat policy, with its rows and with half and twice as many or as long ones."""
    chips, platform = len(where.devices), where.devices[0].platform
    least, _ = dit.longest_clip(run, network)
    rows = [each for each in rows_like(run.pack) if each.row_tokens >= least and each.rows % run.loader.lanes == 0]
    shapes = step.parameter_shapes(run)
    for config in sharding.mesh_shapes(chips):
        mesh = sharding.abstract_mesh(config, chips)
        if not _fits(run, shapes, mesh):
            continue
        for packing in rows:
            divide = (
                packing.row_tokens % sharding.shards("tokens", mesh) == 0
                and packing.rows % sharding.shards("rows", mesh) == 0
            )
            if divide and _has_kernels(run, packing, mesh, platform):
                for remat in dit_model.REMAT:
                    yield dataclasses.replace(
                        run, mesh=config, dit=dataclasses.replace(run.dit, remat=remat), pack=packing
                    )


def rows_like(packing: PackConfig) -> list[PackConfig]:
    """Half, once and twice as many rows of half, once and twice the length; the longer, the more clips they hold."""
    budgets = ("row_tokens", "row_slots", "row_text")
    return [
        dataclasses.replace(
            packing,
            rows=int(packing.rows * many),
            **{name: math.ceil(getattr(packing, name) * long) for name in budgets},
        )
        for many in (0.5, 1, 2)
        for long in (0.5, 1, 2)
        if packing.rows * many >= 1
    ]


def _fits(run: DiTRun, shapes: Any, mesh: AbstractMesh) -> bool:
    try:
        sharding.check(mesh, heads=run.dit.common_heads)
        sharding.parameter_shardings(shapes, mesh)
    except sharding.MeshError:
        return False
    return True


def _has_kernels(run: DiTRun, packing: PackConfig, mesh: AbstractMesh, platform: str) -> bool:
    try:
        kernels.refuse("dit", run.dit, packing, mesh, platform)
    except ConfigError:
        return False
    return not kernels.missing(run.dit, packing, mesh, platform)


def estimate(run: DiTRun, where: Target) -> float:
    """About the seconds that a token takes, for ranking candidates before they are compiled; more than memory is infinite."""
    chip = where.chip or CHIPS["v5e"]
    chips, model = len(where.devices), run.dit
    mesh = sharding.abstract_mesh(run.mesh, chips)
    rows, embed, heads, tokens = (sharding.shards(name, mesh) for name in ("rows", "embed", "heads", "tokens"))
    replicas = rows / embed
    count = run.pack.rows * run.pack.row_tokens
    weights = WEIGHTS * model.width**2 * model.blocks
    stream = 4 * model.width * count / (rows * tokens)
    # Weights, average, two moments and gradients; of the blocks what is kept, and what one needs to run backward.
    state = 20 * weights / (embed * heads)
    activations = stream * (KEPT[model.remat] * model.blocks + RUNNING) / heads
    if state + activations > chip.usable * chip.memory * GIB:
        return math.inf
    # Weights in bfloat16 forward, again and backward, and their gradients in float32.
    gathered = (3 * 2 + 4) * weights / heads * (embed - 1) / embed
    reduced = 2 * 4 * weights / (embed * heads) * (replicas - 1) / replicas
    # The stream is summed over heads twice a block, both ways.
    over = 8 * (heads - 1) / heads + TRADED * (tokens - 1) / tokens
    executed = compute.dit_step(model, run.pack).executed
    own = kernels.taken(model, run.pack, mesh, where.devices[0].platform)
    meets = {kernels.AMONG: run.pack.row_tokens, kernels.CAPTIONS: run.pack.row_text}
    executed -= kernels.kept(model, float(count * sum(meets[what] for what in own)))
    seconds = executed / chips / chip.flops / roofline.MATMUL_SHARE
    # To the host and back, what attention gave not among it.
    hosted = 2 * (KEPT["dots"] - 1) * stream * model.blocks / heads if model.remat == "offload" else 0
    # All of it along one axis, as if that were a ring: which axes it goes along, the plan says.
    sent = (gathered + reduced + stream * model.blocks * over) / chip.link
    return (seconds + sent + hosted / chip.host) / count


def _told(run: DiTRun) -> str:
    mesh = sharding.in_words(dataclasses.asdict(run.mesh))
    return f"{mesh}, remat {run.dit.remat}, {run.pack.rows} rows of {run.pack.row_tokens} tokens"

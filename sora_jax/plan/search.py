"""The most promising meshes, remat policies and batch sizes for a target, compiled and ranked."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from sora_jax import compute, sharding
from sora_jax.config import DiTRun
from sora_jax.models import dit as dit_model
from sora_jax.models.vae import VAEConfig
from sora_jax.plan import roofline
from sora_jax.plan.topology import CHIPS, GIB, Target

# For estimates: weights of a block over its width squared, and what it keeps for the backward pass, in residual streams.
WEIGHTS = 22
KEPT = {"full": 1, "dots": 14, "none": 40, "offload": 1}


def search(run: DiTRun, network: VAEConfig, where: Target, tries: int) -> list[dict[str, Any]]:
    """The most promising meshes, remat policies and rows a batch for a target, compiled, the best first.

    Candidates are ranked by an estimate, and as many as `tries` of the best are compiled. Those that fit come first, by the
    speed that is foretold at the slow end.
    """
    chips = len(where.devices)
    candidates = sorted(
        (
            dataclasses.replace(
                run,
                mesh=sharding.MeshConfig(*shape),
                dit=dataclasses.replace(run.dit, remat=remat),
                pack=dataclasses.replace(run.pack, rows=rows),
            )
            for shape in mesh_shapes(chips, run)
            for remat in dit_model.REMAT
            for rows in {run.pack.rows, 2 * run.pack.rows, max(1, run.pack.rows // 2)}
            if rows % (shape[0] * shape[1]) == 0 and rows % run.loader.lanes == 0
        ),
        key=lambda candidate: estimate(candidate, where),
    )
    found = []
    for candidate in candidates[:tries]:
        try:
            found.append(roofline.plan(candidate, network, where))
        except ValueError as error:
            logging.info("%s, remat %s: %s", dataclasses.astuple(candidate.mesh), candidate.dit.remat, error)
    return sorted(found, key=lambda each: (not each["verdict"]["fits"], -each.get("tokens_per_second", [0])[0]))


def mesh_shapes(chips: int, run: DiTRun) -> list[tuple[int, int, int, int]]:
    """All (data, fsdp, tensor, sequence) over so many chips that the run's heads, width and tokens divide over."""
    found = []
    divisors = [size for size in range(1, chips + 1) if chips % size == 0]
    for tensor in divisors:
        for sequence in divisors:
            for fsdp in divisors:
                rest, over = divmod(chips, tensor * sequence * fsdp)
                fits = (
                    run.dit.heads % tensor == 0 == run.dit.width % fsdp and run.pack.row_tokens % (128 * sequence) == 0
                )
                if not over and rest and fits:
                    found.append((rest, fsdp, tensor, sequence))
    return found


def estimate(run: DiTRun, where: Target) -> float:
    """About the seconds that a token takes, for ranking candidates before they are compiled; more than memory is infinite."""
    chip = where.chip or CHIPS["v5e"]
    chips, mesh, model = len(where.devices), run.mesh, run.dit
    tokens = run.pack.rows * run.pack.row_tokens
    weights = WEIGHTS * model.width**2 * model.blocks
    stream = 4 * model.width * tokens / (mesh.data * mesh.fsdp * mesh.sequence)
    # Weights, average and two moments; of the blocks what is kept, and of one of them all while it runs backward.
    state = 16 * weights / (mesh.fsdp * mesh.tensor)
    activations = stream * (KEPT[model.remat] * model.blocks + KEPT["none"]) / mesh.tensor
    if state + activations > chip.memory * GIB:
        return math.inf
    # Weights in bfloat16 forward, again and backward, and their gradients in float32.
    gathered = (3 * 2 + 4) * weights / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    reduced = 2 * 4 * weights / (mesh.fsdp * mesh.tensor) * (mesh.data - 1) / mesh.data
    # The stream is summed over tensor twice a block, both ways; keys and values go round the sequence, three times.
    over = 8 * (mesh.tensor - 1) / mesh.tensor + 6 * (mesh.sequence - 1) / mesh.sequence
    seconds = compute.dit_step(model, run.pack).executed / chips / chip.flops / roofline.MATMUL_SHARE
    return (seconds + (gathered + reduced + stream * model.blocks * over) / chip.link) / tokens

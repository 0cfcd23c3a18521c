"""What a run needs: the plan of its step, from memory, FLOPs, collectives and the peaks of a chip.

Memory is the compiler's own account of the step that would run. Collectives and memory traffic are read from the compiled
program with its loops counted (hlo.py), FLOPs are analytic (compute.py), times are those of a roofline.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from sora_jax import compute, hlo, sharding
from sora_jax.config import DiTRun
from sora_jax.models.vae import VAEConfig
from sora_jax.plan.packing import packed
from sora_jax.plan.step import compile_step, memory, traffic
from sora_jax.plan.topology import GIB, SOURCE, Chip, Target, mesh_on

# What large matrix products reach of the peak at best in practice, for the low end of a prediction.
MATMUL_SHARE = 0.8


def plan(run: DiTRun, network: VAEConfig, where: Target) -> dict[str, Any]:
    """Everything that is foretold of a resolved run: JSON. A run that does not fit the memory is a finding, not an error.

    Raises ConfigError or ValueError for what cannot work on any hardware.
    """
    packing = packed(run, network)
    mesh = mesh_on(where.devices, run.mesh)
    sharding.share(mesh, run.pack.rows)
    count = compute.dit_step(run.dit, run.pack)
    useful = compute.dit_step(run.dit, run.pack, packing["pairs"], packing["text_pairs"])
    chips = len(where.devices)
    numbers: dict[str, Any] = {
        "topology": where.name,
        "chips": chips,
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "model": {
            "width": run.dit.width,
            "blocks": run.dit.blocks,
            "heads": run.dit.heads,
            "remat": run.dit.remat,
            "dtype": run.dit.dtype,
        },
        "step": {
            "rows": run.pack.rows,
            "row_tokens": run.pack.row_tokens,
            "tokens": run.pack.rows * run.pack.row_tokens,
            "flops": count.total,
            "executed_flops": count.executed,
            "useful_flops": useful.total,
        },
        "packing": {name: value for name, value in packing.items() if "pairs" not in name},
    }
    if where.chip is not None:
        numbers["peaks"] = dataclasses.asdict(where.chip) | {"source": SOURCE}
    try:
        step = compile_step(run, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return numbers | {"verdict": {"fits": False, "why": _too_large(str(error), run)}}
    program = hlo.Program(step.compiled.as_text())
    numbers["model"]["parameters"] = sum(x.size for x in jax.tree.leaves(step.shapes.params))
    numbers["compile_seconds"] = step.seconds
    numbers["memory"] = memory(step, program, run.dit.blocks)
    numbers["collectives"] = traffic(program.collectives(mesh.shape))
    numbers["kernels"] = program.kernels()
    if program.unknown_loops:
        numbers["unknown_loops"] = sorted(program.unknown_loops)
    if where.chip is not None:
        numbers |= foretold(numbers, program, where.chip, run)
    numbers["verdict"] = verdict(numbers, where.chip)
    return numbers


def foretold(numbers: dict[str, Any], program: hlo.Program, chip: Chip, run: DiTRun) -> dict[str, Any]:
    """Times of a step by roofline, and what follows from them for the whole run.

    The fast end does everything at its peak and at the same time; the slow end computes at MATMUL_SHARE of the peak and waits for
    the interconnect, one thing after the other.
    """
    chips, step = numbers["chips"], numbers["step"]
    compute_s = step["executed_flops"] / chips / chip.flops
    memory_s = program.memory_traffic() / chip.bandwidth
    link_s = sum(each["bytes"] for each in numbers["collectives"]) / chip.link
    fast = max(compute_s, memory_s, link_s)
    slow = max(compute_s / MATMUL_SHARE, memory_s) + link_s
    steps = run.loop.steps
    return {
        "seconds": {"compute": compute_s, "memory": memory_s, "interconnect": link_s, "step": [fast, slow]},
        "mfu": [step["flops"] / chips / chip.flops / seconds for seconds in (slow, fast)],
        # Without attention between clips of a row, which a kernel may compute and nobody needs.
        "useful_mfu": [step["useful_flops"] / chips / chip.flops / seconds for seconds in (slow, fast)],
        "tokens_per_second": [step["tokens"] / seconds for seconds in (slow, fast)],
        "run": {
            "steps": steps,
            "flops": steps * step["flops"],
            "hours": [steps * seconds / 3600 for seconds in (fast, slow)],
            "chip_hours": [chips * steps * seconds / 3600 for seconds in (fast, slow)],
        },
    }


def verdict(numbers: dict[str, Any], chip: Chip | None) -> dict[str, Any]:
    """Whether it fits, and what to look at first."""
    why = []
    if chip is None:
        return {"fits": True, "why": ["it compiles; simulated devices have no memory to fit"]}
    share = numbers["memory"]["total"] / (chip.memory * GIB)
    why.append(f"{share:.0%} of {chip.memory:g} GiB a chip")
    seconds = numbers["seconds"]
    slowest = max(("compute", "memory", "interconnect"), key=lambda name: seconds[name])
    why.append(f"bound by {slowest}")
    if slowest == "interconnect":
        why.append(
            "give a chip more tokens (pack.row_tokens, pack.rows) or spread weights over fewer chips (mesh.fsdp)"
        )
    if slowest == "memory":
        why.append("longer rows or wider models use memory's bandwidth better")
    if numbers["packing"]["fill"] < 0.9:
        why.append(
            f"only {numbers['packing']['fill']:.0%} of the tokens are filled; raise pack.row_tokens, row_text or window"
        )
    return {"fits": share <= 1, "why": why}


def _too_large(message: str, run: DiTRun) -> list[str]:
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
    why = [f"the step needs {found[1]} of {found[2]} a chip" if found else "the step does not fit the memory of a chip"]
    if run.dit.remat != "full":
        why.append("keep less for the backward pass (dit.remat=full)")
    return [
        *why,
        "spread weights over more chips (mesh.fsdp), split rows (mesh.sequence) or shorten them (pack.row_tokens)",
    ]

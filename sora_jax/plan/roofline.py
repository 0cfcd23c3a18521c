"""What a run needs: the plan of its step or its sampler, from memory, FLOPs, collectives and the peaks of a chip.

Memory is the compiler's own account of the step that would run. Collectives and memory traffic are read from the compiled
program with its loops counted (hlo.py), FLOPs are analytic (compute.py), times are those of a roofline.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sora_jax import compute, hlo, sharding
from sora_jax.config import ConfigError, DiTRun
from sora_jax.generate import pipeline
from sora_jax.models.vae import VAEConfig
from sora_jax.plan import kernels
from sora_jax.plan.packing import packed, segments
from sora_jax.plan.step import Lowered, lower_sampler, lower_step, memory, memory_of_refused, traffic
from sora_jax.plan.topology import FRACTION, GIB, SOURCE, Chip, Target
from sora_jax.train import dit

# What large matrix products reach of the peak at best in practice, for the low end of a prediction.
MATMUL_SHARE = 0.8
# The most of a GPU's memory that jax is to take: its driver, and what runs beside it, need some.
MOST_FRACTION = 0.95
# What a program is bound by.
PARTS = ("compute", "memory", "interconnect", "host")


def plan(run: DiTRun, network: VAEConfig, where: Target) -> dict[str, Any]:
    """Everything that is foretold of training a resolved run: JSON. A run that does not fit the memory is a finding, not an
    error.

    Raises ConfigError or ValueError for what cannot work on any hardware.
    """
    mesh, platform = sharding.make_mesh(run.mesh, where.devices), where.devices[0].platform
    kernels.refuse("dit", run.dit, run.pack, mesh, platform)
    packing = packed(run, network)
    sharding.check(mesh, rows=run.pack.rows, tokens=run.pack.row_tokens, heads=run.dit.common_heads)
    done = kernels.work(run.dit, run.pack, mesh, platform, (packing.segment_RN, packing.text_segment_RL))
    numbers = _asked(run, where, mesh) | {
        "step": {
            "rows": run.pack.rows,
            "row_tokens": run.pack.row_tokens,
            "tokens": run.pack.rows * run.pack.row_tokens,
            "flops": compute.dit_step(run.dit, run.pack).total,
            "executed_flops": compute.dit_step(run.dit, run.pack, done.pairs, done.text_pairs).executed
            + done.more_flops,
            "useful_flops": compute.dit_step(run.dit, run.pack, packing.pairs, packing.text_pairs).useful,
            "read_again": done.read_again,
        },
        "packing": {"fill": packing.fill, "clips_per_step": packing.clips_per_step},
    }
    without = kernels.missing(run.dit, run.pack, mesh, platform)
    return _compiled(numbers, lambda: lower_step(run, network, mesh), run, where, mesh, foretold, without)


def plan_sampler(run: DiTRun, network: VAEConfig, where: Target) -> dict[str, Any]:
    """Everything that is foretold of sampling a resolved run's longest clips, as many at a time as the pipeline does.

    Text encoder and VAE are not counted. Raises as plan does.
    """
    run, mesh = pipeline.anywhere(run), sharding.make_mesh(run.mesh, where.devices)
    sharding.check(mesh, heads=run.dit.common_heads)
    tokens, (frames, height, width) = dit.longest_clip(run, network)
    many = 2 * len(where.devices) * max(1, pipeline.BATCH_TOKENS // tokens)
    with jax.set_mesh(mesh):
        packing = pipeline.packing_for([tokens] * many, run.text.max_tokens)
    videos = packing.rows * (packing.row_tokens // tokens)
    pairs = float(videos * tokens**2), float(videos * tokens * run.text.max_tokens)
    clips, platform = packing.row_tokens // tokens, where.devices[0].platform
    rows = segments([[tokens] * clips], packing.row_tokens), segments([[run.text.max_tokens] * clips], packing.row_text)
    done = kernels.work(run.dit, packing, mesh, platform, rows, trains=False)
    numbers = _asked(run, where, mesh) | {
        "sampling": {
            "videos": videos,
            "frames": frames,
            "height": height,
            "width": width,
            "tokens": tokens,
            "row_tokens": packing.row_tokens,
            "steps": run.sampler.steps,
            "method": run.sampler.method,
            "guidance": run.sampler.guidance,
            "flops": compute.sampling(run.dit, packing, run.sampler),
            "executed_flops": compute.sampling(run.dit, packing, run.sampler, done.pairs, done.text_pairs),
            "useful_flops": compute.sampling(run.dit, packing, run.sampler, *pairs),
            "read_again": done.read_again * run.sampler.evaluations,
        },
    }
    without = kernels.missing(run.dit, packing, mesh, platform)
    return _compiled(numbers, lambda: lower_sampler(run, packing, mesh), run, where, mesh, foretold_of_sampler, without)


def _asked(run: DiTRun, where: Target, mesh: Mesh) -> dict[str, Any]:
    """What is planned, and for what."""
    model = {name: getattr(run.dit, name) for name in ("width", "blocks", "heads", "remat", "dtype")}
    asked = {
        "topology": where.name,
        "chips": len(where.devices),
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "model": model,
    }
    return asked if where.chip is None else asked | {"peaks": dataclasses.asdict(where.chip) | {"source": SOURCE}}


Foretell = Callable[[dict[str, Any], hlo.Program, Chip, DiTRun], dict[str, Any]]


def _compiled(
    numbers: dict[str, Any],
    make: Callable[[], Lowered],
    run: DiTRun,
    where: Target,
    mesh: Mesh,
    foretell: Foretell,
    without: Sequence[str],
) -> dict[str, Any]:
    """numbers with what the compiled program says, and the verdict; without are the kernels that are missing."""
    began = time.perf_counter()
    made = make()
    numbers["model"]["parameters"] = made.parameters
    try:
        program = hlo.Program(made.program.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        # A kernel may ask for too much of a chip's small memory (vmem), which says nothing of the step's.
        said = str(error)
        if "vmem" in said or ("RESOURCE_EXHAUSTED" not in said and "out of memory" not in said.lower()):
            raise ConfigError(f"the compiler for {where.name} refuses it: {said.splitlines()[0]}") from error
        numbers["memory"] = memory_of_refused(made, said)
        return numbers | {"verdict": {"fits": False, "why": _too_large(numbers, where.chip)}}
    numbers["compile_seconds"] = time.perf_counter() - began
    numbers["memory"] = memory(made, program, run.dit.blocks)
    numbers["collectives"] = traffic(program.collectives(numbers["mesh"]))
    if where.chip is not None:
        for each in numbers["collectives"]:
            each["bytes_per_second"] = where.rate(mesh, each["axes"])
    numbers["kernels"] = program.kernels()
    if program.unknown_loops:
        numbers["unknown_loops"] = sorted(program.unknown_loops)
    if where.chip is not None:
        numbers |= foretell(numbers, program, where.chip, run)
    numbers["verdict"] = verdict(numbers, where.chip, without)
    return numbers


def times(numbers: dict[str, Any], work: dict[str, float], program: hlo.Program, chip: Chip) -> dict[str, Any]:
    """Seconds of a program by roofline; work has its executed_flops, and the bytes that kernels read_again.

    The fast end of whole does everything at its peak and at the same time; the slow end computes at MATMUL_SHARE of the peak and
    waits for the interconnect and the host, one thing after the other.
    """
    compute_s = work["executed_flops"] / numbers["chips"] / chip.flops
    memory_s = (program.memory_traffic() + work["read_again"] / numbers["chips"]) / chip.bandwidth
    link_s = sum(each["bytes"] / each["bytes_per_second"] for each in numbers["collectives"])
    host_s = program.host_traffic() / chip.host
    parts = dict(zip(PARTS, (compute_s, memory_s, link_s, host_s), strict=True))
    return parts | {"whole": [max(parts.values()), max(compute_s / MATMUL_SHARE, memory_s) + link_s + host_s]}


def mfu(numbers: dict[str, Any], work: dict[str, float], seconds: Sequence[float], chip: Chip) -> list[float]:
    """Model FLOPs by peak FLOPs of the slow and of the fast end. Attention between clips of a row is of no use and none of them,
    whether it is computed or not; nor are recomputation and products that only move numbers."""
    return [work["useful_flops"] / numbers["chips"] / chip.flops / each for each in reversed(seconds)]


def foretold(numbers: dict[str, Any], program: hlo.Program, chip: Chip, run: DiTRun) -> dict[str, Any]:
    """Times of a training step, and what follows from them for the whole run."""
    chips, step, steps = numbers["chips"], numbers["step"], run.loop.steps
    seconds = times(numbers, step, program, chip)
    fast, slow = seconds["whole"]
    return {
        "mfu": mfu(numbers, step, seconds["whole"], chip),
        "seconds": seconds,
        "tokens_per_second": [step["tokens"] / each for each in (slow, fast)],
        "run": {
            "steps": steps,
            "flops": steps * step["flops"],
            "hours": [steps * each / 3600 for each in (fast, slow)],
            "chip_hours": [chips * steps * each / 3600 for each in (fast, slow)],
        },
    }


def foretold_of_sampler(numbers: dict[str, Any], program: hlo.Program, chip: Chip, run: DiTRun) -> dict[str, Any]:
    """Times of denoising a batch of videos, and what follows for many."""
    made = numbers["sampling"]
    seconds = times(numbers, made, program, chip)
    return {
        "mfu": mfu(numbers, made, seconds["whole"], chip),
        "seconds": seconds,
        "videos_per_hour": [3600 * made["videos"] / each for each in reversed(seconds["whole"])],
        "chip_seconds_per_video": [numbers["chips"] * each / made["videos"] for each in seconds["whole"]],
    }


def verdict(numbers: dict[str, Any], chip: Chip | None, without: Sequence[str]) -> dict[str, Any]:
    """Whether it fits, and what to look at first: of kernels that it is without, before all else."""
    why = []
    if chip is None:
        return {"fits": True, "why": ["it compiles; simulated devices have no memory to fit"]}
    share = numbers["memory"]["total"] / (chip.memory * GIB)
    why.append(f"{share:.0%} of {chip.memory:g} GiB a chip")
    if numbers.get("unknown_loops"):
        why += ["its time is not known", *without]
    seconds = numbers["seconds"]
    slowest = max(PARTS, key=lambda name: seconds[name])
    why.append(f"bound by {slowest}")
    if slowest == "interconnect":
        more = "give a chip more tokens (pack.row_tokens, pack.rows) or " if "step" in numbers else ""
        why.append(f"{more}spread weights over fewer chips (mesh.fsdp)")
    if slowest == "host":
        why.append("what is kept for the backward pass waits at the host; recompute it (dit.remat=attention or full)")
    if slowest == "memory":
        why.append("longer rows or wider models use memory's bandwidth better")
    if "packing" in numbers and numbers["packing"]["fill"] < 0.9:
        why.append(
            f"only {numbers['packing']['fill']:.0%} of the tokens are filled; raise pack.row_tokens, row_text or window"
        )
    if chip.usable < share <= MOST_FRACTION:
        fraction = min(MOST_FRACTION, share + 0.05)
        why.insert(1, f"jax takes {chip.usable:.0%} of it; set {FRACTION}={fraction:.2f}")
    elif share > chip.usable:
        why = [*_too_large(numbers, chip), *why[1:]]
    return {"fits": share <= chip.usable, "why": why}


def _too_large(numbers: dict[str, Any], chip: Chip | None) -> list[str]:
    training, total = "step" in numbers, numbers["memory"].get("total")
    what = "the step" if training else "the sampler"
    why = [f"{what} does not fit the memory of a chip"]
    if total is not None and chip is not None:
        why = [f"{what} needs {total / GIB:.1f} of {chip.memory:g} GiB a chip"]
        if MOST_FRACTION < total / GIB / chip.memory <= 1:
            why.append(f"jax can take {MOST_FRACTION:.0%} of them")
    if training and numbers["model"]["remat"] != "full":
        why.append("keep less for the backward pass (dit.remat=full)")
    shorter = "shorten them (pack.row_tokens)" if training else "make shorter clips"
    return [*why, f"spread weights over more chips (mesh.fsdp), split rows (mesh.sequence) or {shorter}"]

"""What a run needs on hardware that need not be there: the real step, compiled ahead of time, and what follows from it.

Memory is the compiler's own account of the step that would run. Collectives and memory traffic are read from the compiled
program with its loops counted (hlo.py), FLOPs are analytic (compute.py), times are those of a roofline with the peaks below.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from sora_jax import compute, hlo, sharding
from sora_jax.config import ConfigError, DiTRun
from sora_jax.data import pack
from sora_jax.data.worlds import captions, world
from sora_jax.models import dit as dit_model
from sora_jax.models.vae import VAEConfig
from sora_jax.structs import TrainState
from sora_jax.train import dit, loop, optimizer, progress

GIB = 2**30
# Scenes whose sizes stand for the data.
SCENES = 2000
# What large matrix products reach of the peak at best in practice, for the low end of a prediction.
MATMUL_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip: GiB of main memory, bfloat16 FLOP/s, bytes/s of main memory, and bytes/s that it sends along one axis
    of its interconnect, both ways of a ring together."""

    memory: float
    flops: float
    bandwidth: float
    link: float


SOURCE = (
    "Google Cloud documentation of TPU versions; Austin et al., How to Scale Your Model (jax-ml.github.io/scaling-book), "
    "chapter 2; NVIDIA H100 data sheet"
)
CHIPS = {
    "v4": Chip(32, 275e12, 1.23e12, 9.0e10),
    "v5e": Chip(16, 197e12, 0.82e12, 9.0e10),
    "v5p": Chip(95, 459e12, 2.77e12, 1.8e11),
    "v6e": Chip(32, 918e12, 1.64e12, 1.8e11),
    "h100": Chip(80, 989e12, 3.35e12, 4.5e11),
}
WORKER = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. chip is None for simulated CPU devices, of which no time is foretold."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def target(name: str) -> Target:
    """'v5p:4x4x8', 'v5e:2x4', 'v6e:8x8' or 'cpu:8'. Raises ConfigError for what is unknown or cannot be compiled for here."""
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or kind not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"topology {name!r} is none of {', '.join(CHIPS)} or cpu with a shape, such as v5p:4x4x8 or cpu:8"
        )
    if kind == "cpu":
        if len(jax.devices("cpu")) < int(shape):
            raise ConfigError(
                f"topology {name}: this process has {len(jax.devices('cpu'))} CPU devices; set JAX_NUM_CPU_DEVICES={shape}"
            )
        return Target(name, jax.devices("cpu")[: int(shape)], None)
    if kind == "h100":
        raise ConfigError(
            "topology h100: ahead-of-time compilation for GPUs is not wired up yet; plan for a TPU or cpu:N"
        )
    # libtpu looks for the machine's own chips unless it is told what it is.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": WORKER[kind],
    }.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:
        if "libtpu" in str(error) or "No module" in str(error) or "not found" in str(error).lower():
            raise ConfigError(f"topology {name} needs libtpu to compile for it: pip install -e '.[tpu]'") from error
        raise ConfigError(f"topology {name}: {str(error).splitlines()[0]}") from error
    return Target(name, found.devices, CHIPS[kind])


def mesh_on(devices: Sequence[Any], config: sharding.MeshConfig) -> Mesh:
    """The config's mesh laid over devices as their network lies. Raises ValueError if the sizes do not fit."""
    shape = sharding.mesh_shape(config, len(devices))
    if devices[0].platform == "cpu":
        return sharding.make_mesh(config, list(devices))
    laid = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(laid, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step as it was compiled. shapes and shardings are of the state."""

    compiled: Any
    shapes: TrainState
    shardings: TrainState
    batch_bytes: int
    seconds: float


def compile_step(run: DiTRun, mesh: Mesh) -> Step:
    """The training step of a resolved run for a mesh. Raises jax's own error if it does not fit the memory."""
    tx = optimizer.make(run.optimizer, run.loop.steps)
    objective = dit.Objective(run)

    def init() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(dit_model.DiT(run.dit, nnx.Rngs(0)), nnx.Param))
        # The VAE is not part of the step.
        return TrainState(jnp.int32(0), params, params, {}, tx.init(params))

    began = time.perf_counter()
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
        shardings = loop.state_shardings(shapes, mesh)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        width = None if run.dit.text else run.dit.text_width
        row = pack.empty_row(run.pack, run.dit.patch_dim, width)
        placed = sharding.rows(mesh)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((run.pack.rows, *x.shape), x.dtype, sharding=placed), row)
        step = loop.make_step(objective, tx, run.loop.ema, run.seed)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return Step(compiled, shapes, shardings, bytes_on_device(batch), time.perf_counter() - began)


def bytes_on_device(tree: Any, shardings: Any = None) -> int:
    """Bytes of arrays on one device; shardings are the leaves' own unless given."""
    leaves = jax.tree.leaves(tree)
    placed = [x.sharding for x in leaves] if shardings is None else jax.tree.leaves(shardings)
    return sum(
        math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize for x, where in zip(leaves, placed, strict=True)
    )


def plan(run: DiTRun, network: VAEConfig, where: Target) -> dict[str, Any]:
    """Everything that is foretold of a resolved run: JSON. A run that does not fit the memory is a finding, not an error.

    Raises ConfigError or ValueError for what cannot work on any hardware.
    """
    packing = packed(run, network)
    mesh = mesh_on(where.devices, run.mesh)
    sharding.own_rows(mesh, run.pack.rows)
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


def search(run: DiTRun, network: VAEConfig, where: Target, tries: int) -> list[tuple[DiTRun, dict[str, Any]]]:
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
            found.append((candidate, plan(candidate, network, where)))
        except ValueError as error:
            logging.info("%s, remat %s: %s", dataclasses.astuple(candidate.mesh), candidate.dit.remat, error)
    return sorted(found, key=lambda each: (not each[1]["verdict"]["fits"], -each[1].get("tokens_per_second", [0])[0]))


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
    weights = 22 * model.width**2 * model.blocks
    tokens = run.pack.rows * run.pack.row_tokens
    own = tokens / (mesh.data * mesh.fsdp * mesh.sequence)
    kept_ = {"full": 1, "dots": 14, "none": 40, "offload": 1}[model.remat]
    bytes_ = (
        16 * weights / (mesh.fsdp * mesh.tensor) + 4 * own * model.width * (kept_ * model.blocks + 40) / mesh.tensor
    )
    if bytes_ > chip.memory * GIB:
        return math.inf
    gathered = (3 * 2 + 4) * weights / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    reduced = 2 * 4 * weights / (mesh.fsdp * mesh.tensor) * (mesh.data - 1) / mesh.data
    split = (
        4
        * own
        * model.width
        * model.blocks
        * (8 * (mesh.tensor - 1) / mesh.tensor + 6 * (mesh.sequence - 1) / mesh.sequence)
    )
    executed = compute.dit_step(model, run.pack).executed
    return (executed / chips / chip.flops / MATMUL_SHARE + (gathered + reduced + split) / chip.link) / tokens


def memory(step: Step, program: hlo.Program, blocks: int) -> dict[str, int]:
    """Bytes on one device by kind. activations are what blocks keep for the backward pass; temporaries all that is left."""
    shapes, placed = step.shapes, step.shardings
    analysis = step.compiled.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    )
    kinds = {
        "parameters": bytes_on_device(shapes.params, placed.params),
        "ema": bytes_on_device(shapes.ema, placed.ema),
        "optimizer": bytes_on_device(shapes.opt_state, placed.opt_state),
        "batch": step.batch_bytes,
    }
    stacks = [
        where.shard_shape(x.shape)
        for x, where in zip(jax.tree.leaves(shapes.params), jax.tree.leaves(placed.params), strict=True)
    ]
    kinds["activations"] = min(kept(program, blocks, stacks), analysis.temp_size_in_bytes)
    return kinds | {"temporaries": total - sum(kinds.values()), "total": total}


def kept(program: hlo.Program, blocks: int, weights: Sequence[tuple[int, ...]]) -> int:
    """Bytes that a loop over blocks stacks up, a part a block, which are neither weights nor gradients."""
    most, known = 0, set(weights)
    for each in program.computations[program.entry].instructions.values():
        if each.kind != "while" or program.trips(each) != blocks:
            continue
        stacked = [(dtype, shape) for dtype, shape in hlo.arrays(each.type) if len(shape) > 1 and shape[0] == blocks]
        most = max(most, sum(math.prod(shape) * hlo.BYTES[dtype] for dtype, shape in stacked if shape not in known))
    return most


def traffic(collectives: Sequence[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives of a step by kind and mesh axes, the most first. bytes is what a device sends."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for each in collectives:
        sums = found.setdefault((each.kind, each.axes, each.devices), [0, 0.0])
        sums[0] += each.times
        sums[1] += each.sent
    return [
        {"kind": kind, "axes": axes, "devices": devices, "count": int(count), "bytes": sent}
        for (kind, axes, devices), (count, sent) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


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


def packed(run: DiTRun, network: VAEConfig) -> dict[str, float]:
    """How the world's clips fill rows, and the pairs of tokens that attention has use for in a step.

    Raises ConfigError for clips that no row can hold, or so few that there is no batch.
    """
    found = run.data.world
    clips, longest = [], 0
    for number in range(SCENES):
        scene = world.sample_scene(found, "train", number)
        shape = network.latent_shape(scene.num_frames, scene.height, scene.width)
        tokens = math.prod(pack.grid_shape(shape, run.dit.patch))
        longest = max(longest, tokens)
        words = min(run.text.max_tokens, len(captions.prompt(scene, len(found.sizes) > 1).split()) + 2)
        clips.append(_counted(number, tokens, words))
    if longest > run.pack.row_tokens:
        raise ConfigError(
            f"the world's longest clip has {longest} tokens and rows {run.pack.row_tokens}; raise pack.row_tokens or make "
            "clips shorter or smaller"
        )
    count, rows = pack.Count(), 0
    for start in range(0, len(clips), run.pack.window):
        made, counted = pack.pack_rows(clips[start : start + run.pack.window], run.pack, np.random.default_rng(start))
        rows += len(made)
        count.add(counted)
    if run.data.train_clips * rows / len(clips) < run.pack.rows:
        raise ConfigError(
            f"{run.data.train_clips} clips fill {run.data.train_clips * rows / len(clips):.1f} rows, less than a batch of "
            f"{run.pack.rows}; raise data.train_clips or lower pack.rows"
        )
    each = run.pack.rows / rows
    return {
        "fill": count.fill,
        "longest_clip": longest,
        "clips_per_step": each * len(clips),
        "pairs": each * count.pairs,
        "text_pairs": each * count.text_pairs,
    }


def _counted(number: int, tokens: int, words: int) -> pack.Tokens:
    """A clip of so many tokens, without their values."""
    nothing = np.zeros((tokens, 0), np.float32)
    return pack.Tokens(
        mean_NP=nothing,
        std_NP=nothing,
        position_N3=nothing,
        index_N=np.arange(tokens, dtype=np.int32),
        known_N=np.zeros(tokens, bool),
        extent_3=np.zeros(3, np.float32),
        clip=number,
        draw=0,
        text_LM=None,
        text_token_L=np.zeros(words, np.int32),
    )


def size_of(count: float) -> str:
    """'1.23 GiB', or MiB below a tenth of one."""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def table(numbers: dict[str, Any]) -> str:
    """A plan for a terminal."""
    step, mesh = numbers["step"], " x ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items())
    model = numbers["model"]
    lines = [
        f"{numbers['topology']}: {numbers['chips']} chips as {mesh}",
        f"model: {progress.si(model.get('parameters', 0))}parameters, width {model['width']}, {model['blocks']} blocks, "
        f"remat {model['remat']}",
        f"step: {step['rows']} rows of {step['row_tokens']:,} tokens, filled to {numbers['packing']['fill']:.1%}, "
        f"{progress.si(step['flops'])}FLOP ({progress.si(step['useful_flops'])}within clips, "
        f"{progress.si(step['executed_flops'])}with recomputation)",
    ]
    if "memory" in numbers:
        lines.append("memory of a chip:")
        lines += [f"  {name:<12} {size_of(size):>11}" for name, size in numbers["memory"].items()]
        lines.append("sent by a chip in a step:")
        lines += [
            f"  {each['kind']:<18} over {each['axes']:<12} {each['count']:>5} times  {size_of(each['bytes']):>10}"
            for each in numbers["collectives"]
        ] or ["  nothing"]
    if "seconds" in numbers:
        seconds = numbers["seconds"]
        lines += [
            f"roofline: compute {seconds['compute']:.3f} s, memory {seconds['memory']:.3f} s, "
            f"interconnect {seconds['interconnect']:.3f} s; a step {seconds['step'][0]:.3f} to {seconds['step'][1]:.3f} s",
            f"MFU {numbers['mfu'][0]:.0%} to {numbers['mfu'][1]:.0%}, "
            f"{' to '.join(progress.si(rate).strip() for rate in numbers['tokens_per_second'])} tokens/s",
            f"run: {numbers['run']['steps']:,} steps, {' to '.join(f'{hours:,.0f}' for hours in numbers['run']['hours'])} hours, "
            f"{' to '.join(f'{hours:,.0f}' for hours in numbers['run']['chip_hours'])} chip-hours",
        ]
    verdict = numbers["verdict"]
    lines.append(f"{'fits' if verdict['fits'] else 'DOES NOT FIT'}: {'; '.join(verdict['why'])}")
    return "\n".join(lines)


def ranking(plans: Sequence[dict[str, Any]]) -> str:
    """Plans of a search as lines, the best first."""
    lines = [f"{'data':>5}{'fsdp':>5}{'tensor':>7}{'sequence':>9}{'remat':>9}{'rows':>6}{'GiB':>8}{'MFU':>12}"]
    for each in plans:
        mesh, model = each["mesh"], each["model"]
        size = f"{each['memory']['total'] / GIB:.1f}" if "memory" in each else "over"
        speed = " - ".join(f"{value:.0%}" for value in each["mfu"]) if "mfu" in each else ""
        lines.append(
            f"{mesh['data']:>5}{mesh['fsdp']:>5}{mesh['tensor']:>7}{mesh['sequence']:>9}{model['remat']:>9}"
            f"{each['step']['rows']:>6}{size:>8}{speed:>12}"
        )
    return "\n".join(lines)

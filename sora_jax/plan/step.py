"""The real training step, compiled ahead of time, and what the compiled program says: memory by kind, and collectives."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sora_jax import hlo, sharding
from sora_jax.config import DiTRun
from sora_jax.data import pack
from sora_jax.models import dit as dit_model
from sora_jax.structs import TrainState
from sora_jax.train import dit, loop, optimizer


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

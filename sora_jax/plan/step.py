"""The real training step or sampler, lowered for its devices, and what the compiled program says: memory by kind, collectives."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sora_jax import hlo, sharding
from sora_jax.config import DiTRun
from sora_jax.data import pack
from sora_jax.generate import pipeline
from sora_jax.models import dit as dit_model
from sora_jax.models.vae import VAEConfig
from sora_jax.nn.layers import abstract, parameters
from sora_jax.structs import PackedBatch, TrainState
from sora_jax.train import dit, guard, loop, optimizer


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program before its compiler has seen it. bytes are its inputs' on one device, by kind; weights are shapes with their
    shardings."""

    stage: jax.stages.Lowered
    bytes: dict[str, int]
    weights: Any

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.weights))

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        """Compiled when it is first asked for. Raises jax's own error if it does not fit the memory."""
        return self.stage.compile()


def lower_step(run: DiTRun, network: VAEConfig, mesh: Mesh) -> Lowered:
    """The training step of a resolved run beside its VAE, for a mesh."""
    tx = optimizer.make(run.optimizer, run.loop.steps)
    objective = dit.Objective(run)

    def init() -> TrainState:
        # The VAE lies beside what is trained: checkpoints and samples need it, and what a channel weighs in the loss.
        params, rest = pipeline.initial_weights(run, network, jax.random.key(0))
        return TrainState(jnp.int32(0), params, params, rest, tx.init(params), guard.fresh())

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
        state = sharding.abstract(shapes, loop.state_shardings(shapes, mesh))
        batch = _batch(run, run.pack, sharding.rows(mesh))
        step = loop.make_step(objective, tx, run.loop.ema, run.seed, run.loop.spike_factor)
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    kinds = {
        "parameters": state.params,
        "ema": state.ema,
        "optimizer": state.opt_state,
        "vae": state.rest,
        "batch": batch,
    }
    return Lowered(lowered, _sizes(kinds), state.params)


def lower_sampler(run: DiTRun, packing: pack.PackConfig, mesh: Mesh) -> Lowered:
    """The sampler of a resolved run for rows of requests."""
    with jax.set_mesh(mesh):
        shapes = parameter_shapes(run)
        params = sharding.abstract(shapes, sharding.parameter_shardings(shapes, mesh))
        batch = _batch(run, packing, sharding.replicated(mesh))
        denoise = jax.jit(pipeline.denoiser(run.dit), static_argnames="settings")
        inputs = params, batch, batch.layout, batch.clip_BS, batch.ceiling_BS
        lowered = denoise.lower(*inputs, settings=run.sampler)
    return Lowered(lowered, _sizes({"parameters": params, "batch": inputs[1:]}), params)


def parameter_shapes(run: DiTRun) -> Any:
    """Shapes of a resolved run's parameters."""
    return parameters(abstract(dit_model.DiT, run.dit))


def _batch(run: DiTRun, packing: pack.PackConfig, placed: NamedSharding) -> PackedBatch:
    """Shapes of a batch of rows."""
    row = pack.empty_row(packing, run.dit.patch_dim, None if run.dit.text else run.dit.text_width)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((packing.rows, *x.shape), x.dtype, sharding=placed), row)


def _sizes(kinds: dict[str, Any]) -> dict[str, int]:
    return {name: bytes_on_device(tree) for name, tree in kinds.items()}


def bytes_on_device(tree: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(math.prod(_part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _part(x: Any) -> tuple[int, ...]:
    """Shape of what one device has of an array."""
    return x.sharding.shard_shape(x.shape)


def memory(made: Lowered, program: hlo.Program, blocks: int) -> dict[str, int]:
    """Bytes on one device by kind. activations are what a training step's blocks keep for its backward pass, temporaries
    all that is left."""
    analysis: Any = made.program.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    )
    kinds = dict(made.bytes)
    if "optimizer" in kinds:
        stacks = [_part(x) for x in jax.tree.leaves(made.weights)]
        kinds["activations"] = min(kept(program, blocks, stacks), analysis.temp_size_in_bytes)
    return kinds | {"temporaries": total - sum(kinds.values()), "total": total}


def memory_of_refused(made: Lowered, message: str) -> dict[str, int]:
    """Bytes on one device by kind, of a program of which its compiler says that it does not fit: its inputs', and as far as it
    tells temporaries, with what blocks keep, and the total."""
    inputs = sum(made.bytes.values())
    if told := re.search(r"temporaries \(([\d.]+)([KMGT])\)", message):
        temporaries = _bytes(*told.groups())
    elif told := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        temporaries = _bytes(*told.groups()) - inputs
    else:
        return made.bytes
    return made.bytes | {"temporaries": temporaries, "total": inputs + temporaries}


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def kept(program: hlo.Program, blocks: int, weights: Sequence[tuple[int, ...]]) -> int:
    """Bytes that a loop over blocks stacks up on the device, a part a block, which are neither weights nor gradients."""
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

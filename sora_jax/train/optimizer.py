"""Optimizers: Muon for hidden matrices with Adam for the rest, or AdamW for all; rates rise and then decay."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

from sora_jax import sharding
from sora_jax.config import OptimizerConfig

# Rate of a text encoder that is trained with the DiT, as a part of the DiT's own: what a word means must hold still while
# the DiT learns to act on it. At the full rate the words of motion were not told apart (experiments/README.md).
TEXT_ENCODER_RATE = 0.1
# Adam's step has the same size whatever the fan-in, so what it adds to the output of a map grows with the fan-in: hidden and
# output maps that Adam moves do so by the rate times BASE_WIDTH / width (muP, arXiv:2203.03466, table 3). Muon's step has a
# fixed spectral norm and needs no such factor (arXiv:2310.17813).
BASE_WIDTH = 96
WIDE_INPUTS = ("time_out/kernel", "modulation/kernel", "patch_out/kernel")
# Iterations of Newton and Schulz by which Muon makes a step orthogonal.
ITERATIONS = 5


def rates(peak: float, config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rate per step: linear warm-up, then the decay, which ends at zero with the run."""
    warmup = min(config.warmup_steps, steps - 1)
    rest = max(1, steps - warmup)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])


def matrix_axes(params: Any) -> Any:
    """Which leaves Muon takes (arXiv:2502.16982): kernels of stacked blocks and of convolutions, as (inputs, outputs) matrices.

    Stacked blocks (layers, in, out) keep their leading axis apart; a convolution (h, w, in, out) is one matrix. The maps of
    text states into the model are taken too: what tells "left" from "right" is a small part of a state's variance, and a step
    of Muon is as long in every direction (experiments/README.md).
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = sharding.path_name(path)
        if "blocks/" in name and name.endswith("/kernel") and leaf.ndim == 3:
            return contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        if name in ("text_in/kernel", "pooled_in/kernel"):
            return contrib.MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1,))
        if leaf.ndim == 4:
            return contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
        return None

    return jax.tree_util.tree_map_with_path(one, params)


def rate_factors(params: Any, name: str) -> Any:
    """By how much each leaf's step of this optimizer is multiplied, so that one rate serves every width of the DiT."""

    def one(path: tuple[Any, ...], leaf: Any) -> float:
        where = sharding.path_name(path)
        if where.startswith("text/"):
            return TEXT_ENCODER_RATE
        if where in WIDE_INPUTS:
            return BASE_WIDTH / leaf.shape[0]
        # In maps of a block, which have the width on one side and a multiple of it on the other, all fans grow with it.
        block = where.startswith("blocks/") and where.endswith("/kernel") and leaf.ndim == 3
        return BASE_WIDTH / min(leaf.shape[1:]) if block and name == "adamw" else 1.0

    return jax.tree_util.tree_map_with_path(one, params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `steps` steps."""
    if config.name == "adamw":
        step = optax.adamw(rates(config.rate, config, steps), b2=0.99, weight_decay=config.weight_decay)
    else:
        step = contrib.muon(
            rates(config.rate, config, steps),
            adam_learning_rate=rates(config.adam_rate, config, steps),
            adam_b2=0.99,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrix_axes,
            ns_steps=ITERATIONS,
        )
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, rate_factors(updates, config.name))
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step, scale)


def flops(config: OptimizerConfig, params: Any) -> float:
    """FLOPs of the matrix products of one update, whatever the batch: of Muon, X X^T, its square and their product with X a time.

    params are arrays or their shapes. What goes element by element is not counted, as in compute.py.
    """
    if config.name == "adamw":
        return 0.0
    total = 0
    axes = jax.tree.leaves(
        matrix_axes(params), is_leaf=lambda each: each is None or isinstance(each, contrib.MuonDimensionNumbers)
    )
    for of, leaf in zip(axes, jax.tree.leaves(params), strict=True):
        if of is not None:
            sides = [math.prod(leaf.shape[axis] for axis in side) for side in (of.reduction_axis, of.output_axis)]
            short, long = sorted(sides)
            total += leaf.size // (short * long) * ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return float(total)

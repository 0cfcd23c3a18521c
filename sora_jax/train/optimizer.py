"""Optimizers: Muon for hidden matrices with Adam for the rest, or AdamW for all; rates rise and then decay."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
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
# Factors of X, X X^T X and (X X^T)^2 X in each of the five iterations of Newton and Schulz by which Muon makes a step orthogonal.
QUINTIC = (3.4445, -4.7750, 2.0315)


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
        transforms = {
            "muon": _muon(rates(config.rate, config, steps), config.weight_decay),
            "adam": optax.adamw(rates(config.adam_rate, config, steps), b2=0.99, weight_decay=0.0, nesterov=True),
        }
        step = optax.partition(transforms, _takers)
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, rate_factors(updates, config.name))
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step, scale)


def _is_axes(each: Any) -> bool:
    return each is None or isinstance(each, contrib.MuonDimensionNumbers)


def _takers(params: Any) -> Any:
    return jax.tree.map(lambda axes: "adam" if axes is None else "muon", matrix_axes(params), is_leaf=_is_axes)


def _muon(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """optax.contrib.muon for the leaves that Muon takes, with orthogonal() for its iterations and the same state."""
    moment = contrib.scale_by_muon(QUINTIC, ns_steps=0, weight_dimension_numbers=matrix_axes)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        normed, state = moment.update(grads, state, params)
        return jax.tree.map(_of_matrices, normed, matrix_axes(normed)), state

    return optax.chain(
        optax.GradientTransformation(moment.init, update),
        optax.stateless(lambda updates, _: jax.tree.map(_scaled, updates, matrix_axes(updates))),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _of_matrices(x: jax.Array, axes: contrib.MuonDimensionNumbers) -> jax.Array:
    """A leaf with each of its matrices made orthogonal."""
    return jax.vmap(orthogonal)(x.reshape(-1, *_sides(x, axes))).reshape(x.shape)


def _scaled(x: jax.Array, axes: contrib.MuonDimensionNumbers) -> jax.Array:
    """Steps of one length whatever the fans of a matrix (https://github.com/KellerJordan/Muon)."""
    inputs, outputs = _sides(x, axes)
    return math.sqrt(max(1.0, outputs / inputs)) * x


def _sides(x: Any, axes: contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """How many inputs and outputs a leaf's matrices have."""
    inputs, outputs = (math.prod(x.shape[axis] for axis in side) for side in (axes.reduction_axis, axes.output_axis))
    return inputs, outputs


def orthogonal(x_MN: jax.Array) -> jax.Array:
    """A matrix of norm 1 at most with its singular values brought near 1 by the iteration of Newton and Schulz that Muon takes:
    X to a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al., https://kellerjordan.github.io/posts/muon).

    What X is multiplied with in some iterations is a polynomial of the X X^T before them. For long matrices it is found first, from
    products of X X^T, and X is multiplied once for them all: half of the work, and the same step (_iterations).
    """
    if x_MN.shape[0] > x_MN.shape[1]:
        return orthogonal(x_MN.T).T
    for count in _iterations(*x_MN.shape):
        square_MM = x_MN @ x_MN.T
        step_MM = all_MM = _polynomial(square_MM)
        for _ in range(count - 1):
            square_MM = step_MM @ (step_MM @ square_MM)
            step_MM = _polynomial(square_MM)
            all_MM = step_MM @ all_MM
        x_MN = all_MM @ x_MN
    return x_MN


def _iterations(short: int, long: int) -> tuple[int, ...]:
    """How many are done at once, one after the other, on a matrix of such sides.

    What rounding makes of small eigenvalues of X X^T grows tenfold with each, so there are not many, and with products of less than
    float32, which other platforms have, only one.
    """
    return (2, 3) if long >= 2 * short and sharding.platform() == "cpu" else (1, 1, 1, 1, 1)


def _polynomial(square_MM: jax.Array) -> jax.Array:
    a, b, c = QUINTIC
    return a * jnp.eye(len(square_MM)) + b * square_MM + c * square_MM @ square_MM


def flops(config: OptimizerConfig, params: Any) -> float:
    """FLOPs of the matrix products of one update, whatever the batch: of Muon, what orthogonal() multiplies.

    params are arrays or their shapes. What goes element by element is not counted, as in compute.py.
    """
    if config.name == "adamw":
        return 0.0
    total = 0
    for of, leaf in zip(jax.tree.leaves(matrix_axes(params), is_leaf=_is_axes), jax.tree.leaves(params), strict=True):
        if of is not None:
            short, long = sorted(_sides(leaf, of))
            each = sum(4 * short**2 * long + (4 * count - 3) * 2 * short**3 for count in _iterations(short, long))
            total += leaf.size // (short * long) * each
    return float(total)

"""Laws of scaling fitted to runs: the best model of a budget, the loss that a budget buys, and how sure both are.

Approach 2 of Hoffmann et al. (arXiv:2203.15556) for the frontier, and their law of the loss with one term for compute,
loss(C) = E + A C^-a. numpy and scipy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize

Numbers = Sequence[float] | np.ndarray

# Fits start from each of these exponents, as the surface has more than one valley.
STARTS = (0.05, 0.1, 0.2, 0.4, 0.8)
# Width of the middle of Huber's loss, in logarithms of the loss: what Hoffmann et al. take.
HUBER = 1e-3
FEWEST_RUNS = 4  # for three constants and an error


@dataclasses.dataclass(frozen=True)
class Law:
    """loss(C) = irreducible + scale * (C / unit) ** -exponent, C in FLOPs."""

    irreducible: float
    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: float | np.ndarray) -> np.ndarray:
        return np.asarray(self.irreducible + self.scale * (np.asarray(flops, float) / self.unit) ** -self.exponent)


def fit_law(flops: Numbers, losses: Numbers) -> Law:
    """The law with the smallest Huber loss of log-residuals; its constants are not negative.

    Raises ValueError for fewer than four runs, fewer than three budgets or numbers that are not positive.
    """
    C, loss = np.asarray(flops, float), np.asarray(losses, float)
    if len(C) < FEWEST_RUNS or len(np.unique(np.round(np.log(C), 2))) < 3:
        raise ValueError(f"{len(C)} runs cannot fix a law of three constants; give {FEWEST_RUNS} or more of 3 budgets")
    if np.any(C <= 0) or np.any(loss <= 0) or not (np.all(np.isfinite(C)) and np.all(np.isfinite(loss))):
        raise ValueError("FLOPs and losses must be positive and finite")
    # In units of the middle budget the constants are of the size of the loss, which the optimiser needs.
    unit = float(np.exp(np.mean(np.log(C))))
    x = np.log(C / unit)

    def residuals(constants: np.ndarray) -> np.ndarray:
        irreducible, log_scale, exponent = constants
        return np.logaddexp(np.log(max(irreducible, 1e-12)), log_scale - exponent * x) - np.log(loss)

    best = None
    for start in STARTS:
        first = np.array([0.5 * loss.min(), np.log(0.5 * loss.mean()), start])
        found = optimize.least_squares(
            residuals, first, bounds=([0, -20, 0], [loss.min(), 20, 3]), loss="huber", f_scale=HUBER, x_scale="jac"
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return Law(float(best.x[0]), float(np.exp(best.x[1])), float(best.x[2]), unit)


def band(
    flops: Numbers,
    losses: Numbers,
    at: Numbers,
    level: float = 0.9,
    draws: int = 200,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the law at some budgets, from fits to resampled runs; draws that fix no law are left out."""
    rng = np.random.default_rng(seed)
    C, loss = np.asarray(flops, float), np.asarray(losses, float)
    curves = []
    for _ in range(draws):
        chosen = rng.integers(len(C), size=len(C))
        try:
            curves.append(fit_law(C[chosen], loss[chosen])(np.asarray(at, float)))
        except ValueError:
            continue
    if not curves:
        raise ValueError("no resampled set of runs has three budgets; add runs")
    low, high = np.quantile(np.stack(curves), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best model of one budget. inside: whether models on both sides of it were run, or it is an end of the sweep."""

    flops: float
    parameters: float
    loss: float
    inside: bool


def optimum(flops: float, parameters: Numbers, losses: Numbers) -> Optimum:
    """The best model of runs that cost the same, see lowest. Raises ValueError for fewer than three sizes."""
    x, loss, inside = lowest(parameters, losses)
    return Optimum(flops, x, loss, inside)


def lowest(x: Numbers, losses: Numbers) -> tuple[float, float, bool]:
    """(x, loss, True) at the lowest point of the parabola through the best run and its two neighbours in log x.

    The neighbours alone: a budget's losses rise far more steeply on the side of models too large for it, and a parabola
    through all of them misses the bottom. Where the best run is the first or the last, it itself and False; runs of one x
    count as their mean. Raises ValueError for fewer than three different x.
    """
    values, which = np.unique(np.asarray(x, float), return_inverse=True)
    if len(values) < 3:
        raise ValueError(f"{len(values)} different values do not fix a parabola; run at least 3")
    loss = np.bincount(which, np.asarray(losses, float)) / np.bincount(which)
    best = int(loss.argmin())
    if best in (0, len(values) - 1):
        return float(values[best]), float(loss[best]), False
    near = np.log(values[best - 1 : best + 2])
    middle = near.mean()
    curve, slope, level = np.polyfit(near - middle, loss[best - 1 : best + 2], 2)
    return float(np.exp(middle - slope / (2 * curve))), float(level - slope**2 / (4 * curve)), True


def correlation(x: Numbers, y: Numbers) -> float:
    """Pearson's, of two sequences of equal length. Raises ValueError for fewer than three points."""
    if len(x) < 3:
        raise ValueError(f"{len(x)} points have no correlation to speak of; give 3 or more")
    return float(np.corrcoef(np.asarray(x, float), np.asarray(y, float))[0, 1])


@dataclasses.dataclass(frozen=True)
class Frontier:
    """N(C) = scale * (C / unit) ** exponent, parameters of the best model of a budget of C FLOPs."""

    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: float | np.ndarray) -> np.ndarray:
        return np.asarray(self.scale * (np.asarray(flops, float) / self.unit) ** self.exponent)


def frontier(optima: Sequence[Optimum]) -> Frontier:
    """The line through the optima, in logarithms. Raises ValueError for fewer than two budgets."""
    if len({each.flops for each in optima}) < 2:
        raise ValueError("a frontier needs the optima of at least two budgets")
    x = np.log([each.flops for each in optima])
    exponent, level = np.polyfit(x - x.mean(), np.log([each.parameters for each in optima]), 1)
    return Frontier(float(np.exp(level)), float(exponent), float(np.exp(x.mean())))

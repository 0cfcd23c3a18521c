"""Laws of scaling fitted to runs: the best model of a budget, the loss that a budget buys, and how sure both are.

After Hoffmann et al. (arXiv:2203.15556), with their law of the loss in one term for compute, loss(C) = E + A C^-a. Their
approach 2 finds the best size of every budget; what is left of a run's noise is then a budget's. Here all runs of all budgets
fix the law, the frontier and the curvature of the budgets together (fit_surface). numpy and scipy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

Numbers = Sequence[float] | np.ndarray

# Fits start from each of these exponents, as the surface has more than one valley.
STARTS = (0.05, 0.1, 0.2, 0.4, 0.8)
# Width of the middle of Huber's loss, in logarithms of the loss: about the noise of a run.
HUBER = 0.01
# A parabola holds near the best size of a budget: models more than this many times larger or smaller are left out.
NEAR = np.e
CONSTANTS = 6
FEWEST_RUNS = CONSTANTS + 2


@dataclasses.dataclass(frozen=True)
class Law:
    """loss(C) = irreducible + scale * (C / unit) ** -exponent, C in FLOPs."""

    irreducible: float
    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: float | np.ndarray) -> np.ndarray:
        return np.asarray(self.irreducible + self.scale * (np.asarray(flops, float) / self.unit) ** -self.exponent)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """N(C) = scale * (C / unit) ** exponent, parameters of the best model of a budget of C FLOPs."""

    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: float | np.ndarray) -> np.ndarray:
        return np.asarray(self.scale * (np.asarray(flops, float) / self.unit) ** self.exponent)


@dataclasses.dataclass(frozen=True)
class Surface:
    """loss(C, N) = law(C) exp(curvature log(N / frontier(C))^2) of models of N parameters trained with C FLOPs.

    The law is then that of the best model of every budget, and the frontier says which that is.
    """

    law: Law
    frontier: Frontier
    curvature: float

    def __call__(self, flops: float | Numbers, parameters: float | Numbers) -> np.ndarray:
        C, N = np.asarray(flops, float), np.asarray(parameters, float)
        return np.asarray(self.law(C) * np.exp(self.curvature * np.log(N / self.frontier(C)) ** 2))


def near(flops: Numbers, parameters: Numbers, frontier: Frontier) -> np.ndarray:
    """Which runs are of models near enough to a first frontier to be fitted."""
    off = np.log(np.asarray(parameters, float) / frontier(np.asarray(flops, float)))
    return np.abs(off) < np.log(NEAR)


def fit_surface(flops: Numbers, parameters: Numbers, losses: Numbers) -> Surface:
    """The surface with the smallest Huber loss of log-residuals; constants are not negative but for logarithms.

    Raises ValueError for fewer than eight runs, three budgets or three sizes, or for numbers that are not positive.
    """
    C, N, loss = (np.asarray(values, float) for values in (flops, parameters, losses))
    few = min(len(np.unique(np.round(np.log(values), 2))) for values in (C, N)) if len(C) else 0
    if len(C) < FEWEST_RUNS or few < 3:
        raise ValueError(
            f"{len(C)} runs cannot fix a law of {CONSTANTS} constants; give {FEWEST_RUNS} or more, of 3 budgets and 3 sizes"
        )
    if min(C.min(), N.min(), loss.min()) <= 0 or not all(np.all(np.isfinite(values)) for values in (C, N, loss)):
        raise ValueError("FLOPs, parameters and losses must be positive and finite")
    # In units of their middles the constants are of the size of one, which the optimiser needs.
    unit, middle = (float(np.exp(np.mean(np.log(values)))) for values in (C, N))
    x, y = np.log(C / unit), np.log(N / middle)

    low, high = [0, -20, 0, 0, -10, 0], [loss.min(), 20, 3, 5, 10, 2]
    fits = [
        optimize.least_squares(
            lambda constants: _log_loss(constants, x, y) - np.log(loss),
            [0.5 * loss.min(), np.log(0.5 * loss.mean()), start, 0.1, 0.0, 0.5],
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
        )
        for start in STARTS
    ]
    irreducible, log_scale, exponent, curvature, offset, slope = map(float, min(fits, key=lambda fit: fit.cost).x)
    law = Law(irreducible, float(np.exp(log_scale)), exponent, unit)
    return Surface(law, Frontier(middle * float(np.exp(offset)), slope, unit), curvature)


def _log_loss(constants: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A surface's logarithm, from logarithms of FLOPs and parameters in their units."""
    irreducible, log_scale, exponent, curvature, offset, slope = constants
    best = np.log(np.maximum(irreducible + np.exp(log_scale - exponent * x), 1e-12))
    return best + curvature * (y - offset - slope * x) ** 2


def band(
    surface: Surface, flops: Numbers, parameters: Numbers, losses: Numbers, at: Numbers, level: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the law at some budgets, from a surface and the runs that it was fitted to.

    The law's logarithm is taken for linear in the constants near the fit, with Student's quantile of the residuals
    (Seber & Wild, Nonlinear Regression, section 5.1).
    """
    law, line = surface.law, surface.frontier
    constants = np.array(
        [law.irreducible, np.log(law.scale), law.exponent, surface.curvature, 0.0, line.exponent], dtype=float
    )

    def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # Of one point scipy makes a vector.
        return optimize.approx_fprime(constants, lambda values: _log_loss(values, x, y)).reshape(len(x), CONSTANTS)

    C, N, loss, wanted = (np.asarray(values, float) for values in (flops, parameters, losses, at))
    residuals = np.log(loss / surface(C, N))
    free = len(C) - CONSTANTS
    covariance = np.linalg.pinv((J := slopes(np.log(C / law.unit), np.log(N / line.scale))).T @ J)
    covariance *= np.sum(residuals**2) / free
    x = np.log(wanted / law.unit)
    g = slopes(x, line.exponent * x)
    width = stats.t.ppf((1 + level) / 2, free) * np.sqrt(np.einsum("na,ab,nb->n", g, covariance, g))
    return law(wanted) * np.exp(-width), law(wanted) * np.exp(width)


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


def frontier(optima: Sequence[Optimum]) -> Frontier:
    """The line through the optima, in logarithms. Raises ValueError for fewer than two budgets."""
    if len({each.flops for each in optima}) < 2:
        raise ValueError("a frontier needs the optima of at least two budgets")
    x = np.log([each.flops for each in optima])
    exponent, level = np.polyfit(x - x.mean(), np.log([each.parameters for each in optima]), 1)
    return Frontier(float(np.exp(level)), float(exponent), float(np.exp(x.mean())))

"""Laws of scaling fitted to runs: the best model of a budget, the loss that a budget buys, and how sure both are.

After Hoffmann et al. (arXiv:2203.15556): their approach 3 fits loss(N, D) to all runs of all budgets together, and with what a
step costs the best size of every budget and the law loss(C) = E + A C^-a follow from it (their section 3.3 and equation 4). Their
approach 2 finds the best size of every budget by itself, and a law goes through the losses of these. numpy and scipy alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

Numbers = Sequence[float] | np.ndarray

# Fits start from each of these pairs of exponents, as the surface has more than one valley.
STARTS = tuple((a, b) for a in (0.2, 0.4, 0.8) for b in (0.2, 0.4, 0.8, 1.2))
# Width of the middle of Huber's loss, in logarithms of the loss: about the noise of a run.
HUBER = 0.01
CONSTANTS = 5
FEWEST_RUNS = CONSTANTS + 2
# Least and most of both exponents. At 0 a larger model, or a longer run, would be none the better, and no size the best.
EXPONENTS = (1e-3, 3.0)


def _different(values: Numbers) -> int:
    """How many values there are that differ by more than 2 %."""
    return 1 + int(np.sum(np.diff(np.sort(np.log(np.asarray(values, float)))) > 0.02))


@dataclasses.dataclass(frozen=True)
class Power:
    """y(x) = scale * (x / unit) ** exponent."""

    scale: float
    exponent: float
    unit: float

    def __call__(self, x: float | Numbers) -> np.ndarray:
        return np.asarray(self.scale * (np.asarray(x, float) / self.unit) ** self.exponent)


def power(x: Numbers, y: Numbers) -> Power:
    """The straight line in logarithms through points. Raises ValueError if all x are alike."""
    if _different(x) < 2:
        raise ValueError("a power law needs points at two places at least")
    logs = np.log(np.asarray(x, float))
    exponent, level = np.polyfit(logs - logs.mean(), np.log(np.asarray(y, float)), 1)
    return Power(float(np.exp(level)), float(exponent), float(np.exp(logs.mean())))


@dataclasses.dataclass(frozen=True)
class Law:
    """loss(C) = irreducible + scale * (C / unit) ** -exponent, C in FLOPs."""

    irreducible: float
    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: float | Numbers) -> np.ndarray:
        return np.asarray(self.irreducible + self.scale * (np.asarray(flops, float) / self.unit) ** -self.exponent)


class Runs(NamedTuple):
    """What fits are made to, a value a run: parameters, steps of batches of one size, FLOPs of these, and the loss reached."""

    parameters: Numbers
    steps: Numbers
    flops: Numbers
    losses: Numbers


@dataclasses.dataclass(frozen=True)
class Surface:
    """loss(N, D) = irreducible + size(N) + data(D) of models of N parameters trained for D steps, each of cost(N) FLOPs.

    Equation 2 of arXiv:2203.15556, with steps of one size in place of tokens.
    """

    irreducible: float
    size: Power
    data: Power
    cost: Power

    def __call__(self, flops: float | Numbers, parameters: float | Numbers) -> np.ndarray:
        """The loss of models of some sizes, trained with C FLOPs."""
        N = np.asarray(parameters, float)
        return self.after(N, np.asarray(flops, float) / self.cost(N))

    def after(self, parameters: float | Numbers, steps: float | Numbers) -> np.ndarray:
        """The loss of models of some sizes after some steps."""
        return np.asarray(self.irreducible + self.size(parameters) + self.data(steps))

    @property
    def frontier(self) -> Power:
        """N(C), parameters of the best model of a budget of C FLOPs: where the loss of C / cost(N) steps has no slope in N."""
        a, b = -self.size.exponent, -self.data.exponent
        # At the unit of FLOPs the steps are that of data times ratio ** -cost.exponent, for ratio times the size's unit.
        growth = self.cost.exponent * b
        ratio = (a * self.size.scale / (growth * self.data.scale)) ** (1 / (a + growth))
        return Power(self.size.unit * ratio, b / (a + growth), self.unit)

    @property
    def law(self) -> Law:
        """The loss that the frontier's models reach."""
        best = float(self.frontier(self.unit))
        reducible = float(self(self.unit, best)) - self.irreducible
        return Law(self.irreducible, reducible, -self.size.exponent * self.frontier.exponent, self.unit)

    @property
    def unit(self) -> float:
        """FLOPs of the middle of the runs: a model of its size for its steps."""
        return float(self.cost(self.size.unit)) * self.data.unit


def fit_surface(runs: Runs) -> Surface:
    """The surface with the smallest Huber loss of log-residuals (equation 3 of arXiv:2203.15556).

    Raises ValueError for fewer than seven runs, three sizes or three budgets, for numbers that are not positive, and for losses
    that do not depend on the size or on the steps, of which no frontier follows.
    """
    N, D, C, loss = (np.asarray(values, float) for values in runs)
    if len(N) < FEWEST_RUNS or min(_different(N), _different(C)) < 3:
        raise ValueError(
            f"{len(N)} runs cannot fix a law of {CONSTANTS} constants; give {FEWEST_RUNS} or more, of 3 sizes and 3 budgets"
        )
    if min(map(np.min, (N, D, C, loss))) <= 0 or not all(np.all(np.isfinite(values)) for values in (N, D, C, loss)):
        raise ValueError("parameters, steps, FLOPs and losses must be positive and finite")
    # In units of their middles the constants are of the size of one, which the optimiser needs.
    units = [float(np.exp(np.mean(np.log(values)))) for values in (N, D)]
    x, y = np.log(N / units[0]), np.log(D / units[1])
    guess = np.log(0.25 * loss.mean())
    fits = [
        optimize.least_squares(
            lambda constants: _log_loss(constants, x, y) - np.log(loss),
            [0.5 * loss.min(), guess, a, guess, b],
            jac=lambda constants: _slopes(constants, x, y),
            bounds=([0, -20, EXPONENTS[0], -20, EXPONENTS[0]], [loss.min(), 20, EXPONENTS[1], 20, EXPONENTS[1]]),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
        )
        for a, b in STARTS
    ]
    constants = min(fits, key=lambda fit: fit.cost).x
    for exponent, of in zip(constants[[2, 4]], ("size", "steps"), strict=True):
        if exponent < 2 * EXPONENTS[0]:
            raise ValueError(f"the losses do not depend on the {of} of the runs; give runs of more different ones")
    return _surface(constants, units, power(N, C / D))


def fit_law(flops: Numbers, losses: Numbers) -> Law:
    """The law through the best losses of budgets, with the smallest squares of relative residuals and nothing negative.

    Raises ValueError for fewer than three budgets, as a law has three constants, or for numbers that are not positive.
    """
    C, loss = np.asarray(flops, float), np.asarray(losses, float)
    if len(C) < 3 or _different(C) < 3:
        raise ValueError(f"{len(C)} budgets do not fix a law of 3 constants; give 3 or more")
    if not all(np.all(values > 0) and np.all(np.isfinite(values)) for values in (C, loss)):
        raise ValueError("FLOPs and losses must be positive and finite")
    unit = float(np.exp(np.mean(np.log(C))))
    tried = np.geomspace(*EXPONENTS, 24)
    best = int(np.argmin([_linear_constants(C / unit, loss, exponent)[1] for exponent in tried]))
    near = (tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)])
    exponent = float(
        optimize.minimize_scalar(
            lambda a: _linear_constants(C / unit, loss, a)[1] ** 2,
            bounds=near,
            options={"xatol": 1e-6},
            method="bounded",
        ).x
    )
    (irreducible, scale), _ = _linear_constants(C / unit, loss, exponent)
    return Law(float(irreducible), float(scale), exponent, unit)


def _linear_constants(x: np.ndarray, loss: np.ndarray, exponent: float) -> tuple[np.ndarray, float]:
    """(irreducible, scale) of the law of this exponent, which is linear in them, and how far it misses the losses."""
    return optimize.nnls(np.stack([1 / loss, x**-exponent / loss], axis=1), np.ones(len(x)))


def _surface(constants: np.ndarray, units: Sequence[float], cost: Power) -> Surface:
    irreducible, log_A, a, log_B, b = map(float, constants)
    size, data = (
        Power(math.exp(log_scale), -exponent, unit)
        for log_scale, exponent, unit in zip((log_A, log_B), (a, b), units, strict=True)
    )
    return Surface(irreducible, size, data, cost)


def _log_loss(constants: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A surface's logarithm, from logarithms of parameters and steps in their units."""
    irreducible, log_A, a, log_B, b = constants
    return np.log(np.maximum(irreducible + np.exp(log_A - a * x) + np.exp(log_B - b * y), 1e-12))


def _slopes(constants: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivatives (runs, constants) of _log_loss by the constants."""
    irreducible, log_A, a, log_B, b = constants
    size, data = np.exp(log_A - a * x), np.exp(log_B - b * y)
    by_loss = np.stack([np.ones_like(x), size, -x * size, data, -y * data], axis=1)
    return by_loss / np.maximum(irreducible + size + data, 1e-12)[:, None]


def deviation(surface: Surface, runs: Runs) -> float:
    """Standard deviation of the logarithms of runs' losses around the surface that was fitted to them."""
    residuals = np.log(np.asarray(runs.losses, float) / surface.after(runs.parameters, runs.steps))
    return float(np.sqrt(np.sum(residuals**2) / (len(residuals) - CONSTANTS)))


def band(surface: Surface, runs: Runs, at: Numbers, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the law at some budgets, from a surface and the runs that it was fitted to.

    The law's logarithm is taken for linear in the constants near the fit, with Student's quantile of the residuals
    (Seber & Wild, Nonlinear Regression, section 5.1).
    """
    units = [surface.size.unit, surface.data.unit]
    constants = np.array(
        [
            surface.irreducible,
            math.log(surface.size.scale),
            -surface.size.exponent,
            math.log(surface.data.scale),
            -surface.data.exponent,
        ]
    )
    N, D = np.asarray(runs.parameters, float), np.asarray(runs.steps, float)
    wanted = np.asarray(at, float)
    J = _slopes(constants, np.log(N / units[0]), np.log(D / units[1]))
    by_constants = optimize.approx_fprime(
        constants, lambda values: np.log(_surface(values, units, surface.cost).law(wanted))
    )
    g = by_constants.reshape(len(wanted), CONSTANTS)  # of one point scipy makes a vector
    covariance = np.linalg.pinv(J.T @ J) * deviation(surface, runs) ** 2
    width = stats.t.ppf((1 + level) / 2, len(N) - CONSTANTS) * np.sqrt(np.einsum("na,ab,nb->n", g, covariance, g))
    law = surface.law
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


def frontier(optima: Sequence[Optimum]) -> Power:
    """The line through the optima, in logarithms. Raises ValueError for fewer than two budgets."""
    if len({each.flops for each in optima}) < 2:
        raise ValueError("a frontier needs the optima of at least two budgets")
    return power([each.flops for each in optima], [each.parameters for each in optima])

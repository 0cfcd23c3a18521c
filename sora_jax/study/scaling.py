"""What runs of several sizes and budgets say together: the best model of a budget, the law of the loss, what it foretold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax import compute
from sora_jax.config import DiTRun, StudyRun
from sora_jax.study import laws

# Runs whose costs differ by less than this ratio have one budget.
SAME_BUDGET = 1.05
LEVEL = 0.9  # of the bands
DRAWS = 200  # of sweeps, for the band of the law of optima


def budgets(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Names of runs by what they cost, cheapest first."""
    found: list[list[str]] = []
    for name in sorted(runs, key=lambda name: runs[name]["flops"]):
        if found and runs[name]["flops"] < SAME_BUDGET * runs[found[-1][0]]["flops"]:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def optima(runs: Mapping[str, Mapping[str, Any]]) -> list[laws.Optimum]:
    """The best model of every budget that three sizes were run at."""
    found = []
    for names in budgets(runs):
        sizes = [runs[name]["parameters"] for name in names]
        if len(set(sizes)) >= 3:
            cost = float(np.mean([runs[name]["flops"] for name in names]))
            found.append(laws.optimum(cost, sizes, [runs[name]["val_loss"] for name in names]))
    return found


def findings(runs: Mapping[str, Mapping[str, Any]], study: StudyRun) -> dict[str, Any]:
    """Numbers of the report about the study's groups: optima, frontier, law, rungs, ladder, models and rates.

    runs maps a stage to what runner.run_numbers says of it, with scores where it was judged. Parts that the runs do not fix
    are left out.
    """
    ladder, isoflop, models, rates = (study.groups.get(name, ()) for name in ("ladder", "isoflop", "models", "rates"))
    found = {"groups": {name: list(members) for name, members in study.groups.items()}}
    found |= fitted(runs, ladder, isoflop)
    if ladder:
        found["ladder"] = climbed(runs, repeats(study))
    if models:
        found["models"] = compared({name: runs[name] for name in models})
    if rates:
        found["rates"] = best_rates({name: runs[name] for name in rates})
    return found


def frontier(runs: Mapping[str, Mapping[str, Any]]) -> laws.Power:
    """That of the surface; of runs too few for one, the line through the optima. Raises ValueError for one budget."""
    line = laws.frontier(optima(runs))
    try:
        return laws.fit_surface(_columns(runs)).frontier
    except ValueError:
        return line


def _columns(runs: Mapping[str, Mapping[str, Any]]) -> laws.Runs:
    return laws.Runs(*([run[name] for run in runs.values()] for name in ("parameters", "steps", "flops", "val_loss")))


def fitted(runs: Mapping[str, Mapping[str, Any]], ladder: Sequence[str], isoflop: Sequence[str]) -> dict[str, Any]:
    """Numbers of the report: optima, frontier, laws with their bands, their losses beside that of every rung, and a backtest.

    runs maps a stage to its flops, steps, parameters and val_loss. Only runs of the isoflop group are fitted: what the law says
    of a rung that cost more is foretold. Parts that the runs do not fix are left out; no_law says why there is no law.
    """
    swept = {name: runs[name] for name in isoflop}
    best = optima(swept)
    numbers: dict[str, Any] = {"optima": [dataclasses.asdict(each) for each in best]}
    if len(best) >= 2:
        numbers["frontier"] = dataclasses.asdict(frontier(swept))
    try:
        found = laws.fit_surface(columns := _columns(swept))
    except ValueError as error:
        return numbers | ({"no_law": str(error)} if swept else {})
    law, up_to = found.law, max(columns.flops)
    at = [runs[name]["flops"] for name in ladder] or [up_to]
    low, high = laws.band(found, columns, at=at, level=LEVEL)
    numbers["law"] = dataclasses.asdict(law) | {"fitted_up_to": up_to, "runs": len(swept), "band": LEVEL}
    numbers["surface"] = dataclasses.asdict(found)
    numbers["rungs"] = {
        name: {
            "flops": runs[name]["flops"],
            "parameters_of_frontier": float(found.frontier(runs[name]["flops"])),
            "val_loss": runs[name]["val_loss"],
            **_beside(runs[name], law, low[number], high[number]),
            "foretold": runs[name]["flops"] > SAME_BUDGET * up_to,
        }
        for number, name in enumerate(ladder)
    }
    if of_best := law_of_optima(swept, found, at):
        law, low, high = of_best
        numbers["law_of_optima"] = dataclasses.asdict(law) | {"budgets": len(best)}
        for number, name in enumerate(ladder):
            numbers["rungs"][name]["of_optima"] = _beside(runs[name], law, low[number], high[number])
    numbers |= backtest(runs, ladder, isoflop)
    return numbers


def _beside(run: Mapping[str, Any], law: laws.Law, low: float, high: float) -> dict[str, float]:
    """What a law and its band say of a run, and by what share of the loss that it reached the law is off."""
    told = float(law(run["flops"]))
    return {"law": told, "low": float(low), "high": float(high), "off_by": told / run["val_loss"] - 1}


def law_of_optima(
    swept: Mapping[str, Mapping[str, Any]], surface: laws.Surface, at: Sequence[float]
) -> tuple[laws.Law, np.ndarray, np.ndarray] | None:
    """The law through the best of every budget, and its band (low, high) at some FLOPs.

    The band is what such laws miss that of the surface by, of sweeps drawn from the surface with the noise that its own runs have
    around it (a parametric bootstrap). None where optima fix no law, or hardly any sweep that was drawn has such ones.
    """
    if not (law := _through(optima(swept))):
        return None
    columns = _columns(swept)
    exact, deviation = surface.after(columns.parameters, columns.steps), laws.deviation(surface, columns)
    missed = []
    for noise in np.random.default_rng(0).normal(0, deviation, (DRAWS, len(swept))):
        losses = exact * np.exp(noise)
        drawn = {name: {**run, "val_loss": loss} for (name, run), loss in zip(swept.items(), losses, strict=True)}
        if other := _through(optima(drawn)):
            missed.append(other(at) / surface.law(at))
    if len(missed) < DRAWS / 10:
        return None
    below, above = np.quantile(missed, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return law, law(at) / above, law(at) / below


def _through(best: Sequence[laws.Optimum]) -> laws.Law | None:
    """The law through optima; None of fewer than three, or if one is the smallest or the largest size that was run: the best of
    all may lie beyond."""
    if len(best) < 3 or not all(each.inside for each in best):
        return None
    return laws.fit_law([each.flops for each in best], [each.loss for each in best])


def backtest(runs: Mapping[str, Mapping[str, Any]], ladder: Sequence[str], isoflop: Sequence[str]) -> dict[str, Any]:
    """How well the sweep without its largest budget foretells all runs of that budget: what a law of these runs is worth.

    And the best of that budget by the law of the optima, where there is one. Nothing if the smaller budgets alone fix no law.
    """
    swept = {name: runs[name] for name in isoflop}
    *smaller, largest = budgets(swept)
    fewer = {name: runs[name] for names in smaller for name in names}
    try:
        found = laws.fit_surface(_columns(fewer))
    except ValueError:
        return {}
    cost = runs[largest[0]]["flops"]
    foretold = [*largest, *(name for name in ladder if 1 / SAME_BUDGET < runs[name]["flops"] / cost < SAME_BUDGET)]
    N, D, _, losses = _columns({name: runs[name] for name in foretold})
    off = found.after(N, D) / np.asarray(losses) - 1
    mean = float(np.abs(off).mean())
    numbers: dict[str, Any] = {"off_by": dict(zip(foretold, off.tolist(), strict=True)), "mean_absolute": mean}
    best = optima(swept)
    # Of the largest budget there is no best where fewer than three sizes were run at it.
    if (
        best
        and 1 / SAME_BUDGET < best[-1].flops / cost < SAME_BUDGET
        and best[-1].inside
        and (law := _through(best[:-1]))
    ):
        numbers["of_optima_off_by"] = float(law(best[-1].flops)) / best[-1].loss - 1
    return {"backtest": numbers}


def repeats(study: StudyRun) -> dict[str, list[str]]:
    """The ladder's runs by rung: the first of those that differ in nothing but their seed, and all of them."""
    found: dict[str, list[str]] = {}
    for name in study.groups.get("ladder", ()):
        same = (each for each in found if _but_seed(study.stages[each]) == _but_seed(study.stages[name]))
        found.setdefault(next(same, name), []).append(name)
    return found


def _but_seed(stage: DiTRun) -> DiTRun:
    return dataclasses.replace(stage, seed=0)


# What rungs are compared by, and whether more of it is better.
METRICS = {
    "val_loss": False,
    "frechet.distance": False,
    "frechet_latent.distance": False,
    "adherence.all": True,
    "adherence.colour": True,
    "adherence.shape": True,
    "adherence.motion": True,
}


def climbed(runs: Mapping[str, Mapping[str, Any]], rungs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Mean and standard deviation of every metric over the seeds of a rung, and what each step up the ladder gains.

    A step's gain is positive where the next rung is better; in deviations it is divided by the larger of the two rungs'
    standard deviations (n - 1), which one seed does not have.
    """
    means: dict[str, dict[str, Any]] = {}
    for rung, names in rungs.items():
        means[rung] = {"seeds": len(names)}
        for metric in METRICS:
            values = [value for name in names if (value := value_at(runs[name], metric)) is not None]
            if len(values) == len(names):
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                means[rung][metric] = {"mean": float(np.mean(values)), "deviation": deviation}
    steps: dict[str, dict[str, Any]] = {}
    for below, above in itertools.pairwise(rungs):
        steps[f"{below} to {above}"] = {
            metric: _gain(means[below][metric], means[above][metric], more_is_better)
            for metric, more_is_better in METRICS.items()
            if metric in means[below] and metric in means[above]
        }
    return {"rungs": means, "steps": steps}


def _gain(below: Mapping[str, Any], above: Mapping[str, Any], more_is_better: bool) -> dict[str, float | None]:
    gain = (above["mean"] - below["mean"]) * (1 if more_is_better else -1)
    deviations = [each["deviation"] for each in (below, above)]
    known = None not in deviations and max(deviations) > 0
    return {"gain": gain, "in_deviations": gain / max(deviations) if known else None}


def value_at(numbers: Mapping[str, Any], path: str) -> Any:
    """What stands at 'a.b', or None."""
    value: Any = numbers
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def compared(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Correlation of the logarithm of training FLOPs with the Frechet distances (-0.93 in figure 8 of arXiv:2212.09748).

    Of runs without a distance, or of fewer than three, only the count.
    """
    known = [run for run in runs.values() if value_at(run, "frechet.distance") is not None]
    if len(known) < 3:
        return {"count": len(known)}
    costs = np.log([run["flops"] for run in known])
    return {"count": len(known)} | {
        name: laws.correlation(costs, [run[key]["distance"] for run in known])
        for name, key in (("correlation", "frechet"), ("correlation_latent", "frechet_latent"))
    }


def best_rates(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The best rate of every width of which three rates were run, and how far the best ones lie apart as a ratio; None where a best
    one is the smallest or largest that was tried, and so perhaps not the best of all. Seeds of a rate count as their mean."""
    sweeps: dict[int, list[tuple[float, float]]] = {}
    for run in runs.values():
        sweeps.setdefault(run["width"], []).append((run["rate"], run["val_loss"]))
    found: dict[str, Any] = {"best": {}, "inside": {}}
    for width, sweep in sorted(sweeps.items()):
        if len({rate for rate, _ in sweep}) >= 3:
            rate, _, inside = laws.lowest(*zip(*sweep, strict=True))
            found["best"][str(width)], found["inside"][str(width)] = rate, inside
    if found["best"]:
        apart = max(found["best"].values()) / min(found["best"].values())
        found["apart"] = apart if all(found["inside"].values()) else None
    return found


def along_frontier(stage: DiTRun, runs: Mapping[str, Mapping[str, Any]]) -> DiTRun:
    """A stage whose model is as large as the frontier of isoflop runs says for its budget.

    compute.exponent, which says how a step's cost grows, becomes the one that leads there from the stage's own model; a stage
    of multiplier 1 keeps that. The text encoder must be resolved (train.dit.with_encoder), as it is part of the cost.
    Raises ValueError if the runs fix no frontier.
    """
    settings = stage.compute
    line = frontier(runs)
    if settings.multiplier == 1:
        return stage
    # What a step of a model of so many parameters costs: between the runs a power law.
    cost = laws.power(*zip(*((run["parameters"], run["flops"] / run["steps"]) for run in runs.values()), strict=True))
    base = compute.dit_step(stage.dit, stage.pack).total
    budget = settings.multiplier * (settings.budget or stage.loop.steps * base)
    growth = math.log(float(cost(float(line(budget)))) / base)
    exponent = round(min(max(growth / math.log(settings.multiplier), 0.0), 1.0), 3)
    return dataclasses.replace(stage, compute=dataclasses.replace(settings, exponent=exponent))

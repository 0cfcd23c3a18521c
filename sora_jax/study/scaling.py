"""What runs of several sizes and budgets say together: the best model of a budget, the law of the loss, what it foretold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.config import DiTRun
from sora_jax.study import laws

# Runs whose costs differ by less than this ratio have one budget.
SAME_BUDGET = 1.05
LEVEL = 0.9  # of the band


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


def fitted(runs: Mapping[str, Mapping[str, Any]], ladder: Sequence[str], isoflop: Sequence[str]) -> dict[str, Any]:
    """Numbers of the report: optima, frontier, law with its band, and the law's loss beside that of every rung.

    runs maps a stage to its flops, parameters and val_loss. Only runs of the isoflop group are fitted: what the law says of a
    rung that cost more is foretold. Parts that the runs do not fix are left out.
    """
    best = optima({name: runs[name] for name in isoflop})
    numbers: dict[str, Any] = {"optima": [dataclasses.asdict(each) for each in best]}
    if len(best) >= 2:
        numbers["frontier"] = dataclasses.asdict(laws.frontier(best))
    costs, losses = [each.flops for each in best], [each.loss for each in best]
    try:
        law = laws.fit_law(costs, losses)
        at = [runs[name]["flops"] for name in ladder] or costs
        low, high = laws.band(costs, losses, at, LEVEL)
    except ValueError:
        return numbers
    numbers["law"] = dataclasses.asdict(law) | {"fitted_up_to": max(costs), "band": LEVEL}
    numbers["rungs"] = {
        name: {
            "flops": runs[name]["flops"],
            "val_loss": runs[name]["val_loss"],
            "law": float(law(runs[name]["flops"])),
            "low": float(low[number]),
            "high": float(high[number]),
            "off_by": float(law(runs[name]["flops"])) / runs[name]["val_loss"] - 1,
            "foretold": runs[name]["flops"] > SAME_BUDGET * max(costs),
        }
        for number, name in enumerate(ladder)
    }
    return numbers


def along_frontier(stage: DiTRun, runs: Mapping[str, Mapping[str, Any]]) -> DiTRun:
    """A stage that grows along the frontier, with the exponent fitted to isoflop runs in place of the config's.

    Raises ValueError if they fix no frontier.
    """
    exponent = round(min(max(laws.frontier(optima(runs)).exponent, 0.0), 1.0), 3)
    return dataclasses.replace(stage, compute=dataclasses.replace(stage.compute, exponent=exponent))

"""Pictures of scaling: loss against model size at equal compute, and loss against compute with its law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.study import curves, laws, scaling

POINTS = 60  # of a law's line


def draw(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, svg) of what the runs show. Raises ImportError without matplotlib."""
    return [
        (title, curves.picture(plot, f"scaling-{number}-")) for number, (title, plot) in enumerate(plots(runs, found))
    ]


def plots(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, curves.Plot]]:
    """(title, plot) of what the runs show: for curves.picture or curves.png."""
    groups = found.get("groups", {})
    known = {name: run for name, run in runs.items() if run.get("val_loss") is not None}
    made = []
    if found.get("optima"):
        swept = {name: run for name, run in known.items() if name in groups.get("isoflop", known)}
        made.append(("loss over parameters, one line a budget", _isoflop(swept, found)))
    if found.get("law"):
        made.append(("loss over compute, with its law", _law(known, found)))
    if "correlation" in found.get("models", {}):
        title = f"Frechet distance over compute, correlation {found['models']['correlation']:.2f}"
        made.append((title, _models(runs, groups["models"])))
    if found.get("rates", {}).get("best"):
        made.append(("loss over rate, one line a width", _rates(runs, groups["rates"])))
    return made


def _isoflop(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> curves.Plot:
    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        groups = [names for names in scaling.budgets(runs) if len(names) >= 3]
        for number, names in enumerate(groups):
            ordered = sorted(names, key=lambda name: runs[name]["parameters"])
            shade = 0.35 + 0.65 * (number + 1) / len(groups)
            line = [(runs[name]["parameters"], runs[name]["val_loss"]) for name in ordered]
            label = f"{runs[names[0]]['flops']:.2g} FLOP"
            axes.plot(*np.array(line).T, "o-", color=colours.line, alpha=shade, markersize=4, label=label)
        best = [(each["parameters"], each["loss"]) for each in found["optima"]]
        axes.plot(*np.array(best).T, "*", color=colours.point, markersize=9, label="best")
        curves.dress(axes, colours, "parameters", False)

    return plot


def _law(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> curves.Plot:
    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        constants = {name: found["law"][name] for name in ("irreducible", "scale", "exponent", "unit")}
        law, fitted_up_to = laws.Law(**constants), found["law"]["fitted_up_to"]
        costs = [run["flops"] for run in runs.values()]
        line = np.geomspace(min(costs), max(costs), POINTS)
        axes.plot(line, law(line), color=colours.line, linewidth=1.4, label="law")
        axes.plot(
            costs,
            [run["val_loss"] for run in runs.values()],
            "o",
            color=colours.line,
            markersize=3.5,
            alpha=0.5,
            label="runs",
        )
        rungs = list(found.get("rungs", {}).values())
        if rungs:
            x = np.array([rung["flops"] for rung in rungs])
            below, above = ([abs(rung["law"] - rung[end]) for rung in rungs] for end in ("low", "high"))
            axes.errorbar(
                x, [rung["law"] for rung in rungs], [below, above], fmt="none", ecolor=colours.line, capsize=3
            )
            axes.plot(x, [rung["val_loss"] for rung in rungs], "o", color=colours.point, markersize=5, label="ladder")
        if math.isfinite(fitted_up_to):
            axes.axvline(fitted_up_to, color=colours.grid, linewidth=0.8)
        curves.dress(axes, colours, "training FLOPs", True)

    return plot


def _models(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> curves.Plot:
    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        known = [runs[name] for name in names if runs[name].get("frechet")]
        patches = sorted({tuple(run["patch"]) for run in known})
        for number, patch in enumerate(patches):
            line = [(run["flops"], run["frechet"]["distance"]) for run in known if tuple(run["patch"]) == patch]
            shade = 0.35 + 0.65 * (number + 1) / len(patches)
            label = f"patch {'x'.join(map(str, patch))}"
            axes.plot(*np.array(sorted(line)).T, "o-", color=colours.line, alpha=shade, markersize=4, label=label)
        curves.dress(axes, colours, "training FLOPs", True)

    return plot


def _rates(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> curves.Plot:
    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        widths = sorted({runs[name]["width"] for name in names})
        for number, width in enumerate(widths):
            line = [(runs[name]["rate"], runs[name]["val_loss"]) for name in names if runs[name]["width"] == width]
            shade = 0.35 + 0.65 * (number + 1) / len(widths)
            label = f"width {width}"
            axes.plot(*np.array(sorted(line)).T, "o-", color=colours.line, alpha=shade, markersize=4, label=label)
        curves.dress(axes, colours, "rate", False)

    return plot

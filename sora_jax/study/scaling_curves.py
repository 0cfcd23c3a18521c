"""Pictures of scaling: loss against model size at equal compute, and loss against compute with its law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.study import curves, laws, scaling

POINTS = 60  # of a law's line
FLOPS = "training FLOPs"
Point = tuple[float, float]


def plots(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, curves.Plot]]:
    """(title, plot) of what the runs show: for curves.picture or curves.png."""
    groups = found.get("groups", {})
    known = {name: run for name, run in runs.items() if run.get("val_loss") is not None}
    made = []
    if found.get("optima"):
        swept = {name: run for name, run in known.items() if name in groups.get("isoflop", known)}
        made.append(("loss over parameters, one line a budget", _isoflop(swept, found)))
    if found.get("law"):
        # Runs of other groups have another patch, or a rate that is not the best.
        others = {name for group in ("models", "rates") for name in groups.get(group, ())}
        made.append(
            (
                "loss over compute, with its laws",
                _law({name: known[name] for name in known if name not in others}, found),
            )
        )
    for name, key, of in (
        ("correlation", "frechet", "real clips"),
        ("correlation_latent", "frechet_latent", "real clips through the VAE"),
    ):
        if name in found.get("models", {}):
            title = f"Frechet distance from {of}, correlation {found['models'][name]:.2f}"
            made.append((title, _models(runs, groups["models"], key)))
    if found.get("rates", {}).get("best"):
        made.append(("loss over rate, one line a width", _rates(runs, groups["rates"])))
    return made


def _isoflop(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> curves.Plot:
    lines = {
        f"{runs[names[0]]['flops']:.2g} FLOP": [(runs[name]["parameters"], runs[name]["val_loss"]) for name in names]
        for names in scaling.budgets(runs)
        if len(names) >= 3
    }
    best = [(each["parameters"], each["loss"]) for each in found["optima"]]
    return _family(lines, "parameters", best)


def _family(lines: Mapping[str, Sequence[Point]], x_name: str, best: Sequence[Point] = ()) -> curves.Plot:
    """Lines of one colour, darker from the first to the last, and a star at the best points."""

    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        for number, (label, points) in enumerate(lines.items(), 1):
            shade = 0.35 + 0.65 * number / len(lines)
            axes.plot(*np.array(sorted(points)).T, "o-", color=colours.line, alpha=shade, markersize=4, label=label)
        if best:
            axes.plot(*np.array(best).T, "*", color=colours.point, markersize=9, label="best")
        curves.dress(axes, colours, x_name, x_name == FLOPS)

    return plot


def _law(runs: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> curves.Plot:
    def plot(axes: Any, colours: curves.Colours) -> None:
        axes.set_xscale("log")
        fitted_up_to = found["law"]["fitted_up_to"]
        costs = [run["flops"] for run in runs.values()]
        line = np.geomspace(min(costs), max(costs), POINTS)
        for key, label, style in (("law", "law of all", "-"), ("law_of_optima", "law of the best", "--")):
            if key in found:
                law = laws.Law(*(found[key][field.name] for field in dataclasses.fields(laws.Law)))
                axes.plot(line, law(line), style, color=colours.line, linewidth=1.4, label=label)
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
        banded = [rung for rung in rungs if rung["low"] is not None and rung["high"] is not None]
        if banded:
            x = [rung["flops"] for rung in banded]
            below, above = ([abs(rung["law"] - rung[end]) for rung in banded] for end in ("low", "high"))
            axes.errorbar(
                x, [rung["law"] for rung in banded], [below, above], fmt="none", ecolor=colours.line, capsize=3
            )
        if rungs:
            x = [rung["flops"] for rung in rungs]
            axes.plot(x, [rung["val_loss"] for rung in rungs], "o", color=colours.point, markersize=5, label="ladder")
        if math.isfinite(fitted_up_to):
            axes.axvline(fitted_up_to, color=colours.grid, linewidth=0.8)
        curves.dress(axes, colours, FLOPS, True)

    return plot


def _models(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str], key: str) -> curves.Plot:
    lines: dict[str, list[Point]] = {}
    for run in sorted((runs[name] for name in names if runs[name].get(key)), key=lambda run: run["patch"]):
        label = f"patch {'x'.join(map(str, run['patch']))}"
        lines.setdefault(label, []).append((run["flops"], run[key]["distance"]))
    return _family(lines, FLOPS)


def _rates(runs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> curves.Plot:
    losses: dict[tuple[int, float], list[float]] = {}
    for name in names:
        losses.setdefault((runs[name]["width"], runs[name]["rate"]), []).append(runs[name]["val_loss"])
    lines: dict[str, list[Point]] = {}
    for (width, rate), of_seeds in sorted(losses.items()):
        lines.setdefault(f"width {width}", []).append((rate, sum(of_seeds) / len(of_seeds)))
    return _family(lines, "rate")

"""What the runs of a study say together, in words: the law and what it foretold, the frontier, rates, the DiT paper's claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sora_jax.train.progress import si


def sentences(found: Mapping[str, Any]) -> list[str]:
    """One for each finding (scaling.findings) that there is, with what it leaves unsure."""
    said = (_law, _law_of_optima, _frontier, _backtest, _rates, _models)
    return [words for each in said if (words := each(found))]


def rungs(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of every rung: name, FLOPs, what was measured, what the law says with its band, by how much it is off, the same of the law of
    the best of every budget (empty without one), and whether it was foretold."""
    return [
        (
            name,
            f"{si(rung['flops'])}FLOP",
            f"{rung['val_loss']:.3f}",
            *_told(rung),
            *_told(rung.get("of_optima")),
            "foretold" if rung["foretold"] else "within the sweep",
        )
        for name, rung in found.get("rungs", {}).items()
    ]


def _told(by: Mapping[str, Any] | None) -> tuple[str, str]:
    if not by:
        return "", ""
    off = f"{100 * by['off_by']:+.1f} %".replace("-", "\u2212")
    # A band without an end is kept as None.
    low, high = ("\u221e" if end is None else f"{end:.3f}" for end in (by["low"], by["high"]))
    return f"{by['law']:.3f} [{low}, {high}]", off


def _law(found: Mapping[str, Any]) -> str:
    if not (law := found.get("law")):
        return f"No law of the loss: {found['no_law']}." if "no_law" in found else ""
    return (
        f"{_formula(law)}, fitted to {law['runs']} runs of up to {si(law['fitted_up_to'])}FLOP; in brackets is where the law "
        f"itself is with {law['band']:.0%} confidence, of which single runs differ more."
    )


def _law_of_optima(found: Mapping[str, Any]) -> str:
    if not (law := found.get("law_of_optima")):
        return ""
    return (
        f"Through the best of each of {law['budgets']} budgets alone (approach 2 of arXiv:2203.15556, where the other is its "
        f"approach 3) {_formula(law)}; its band is of sweeps that differ from the first law by chance as this one does."
    )


def _formula(law: Mapping[str, Any]) -> str:
    return f"loss(C) = {law['irreducible']:.3f} + {law['scale']:.3f} (C / {si(law['unit'])}FLOP)^-{law['exponent']:.3f}"


def _frontier(found: Mapping[str, Any]) -> str:
    if not (line := found.get("frontier")):
        return ""
    optima = found["optima"]
    ends = sum(not each["inside"] for each in optima)
    unsure = (
        f" At {ends} of {len(optima)} budgets the best of the sizes that were run is the smallest or largest of them, "
        "so the best of all may lie beyond."
        if ends
        else ""
    )
    power = f"(C / {si(line['unit'])}FLOP)^{line['exponent']:.2f}"
    return f"The best model for C FLOPs has {si(line['scale'])}parameters times {power}.{unsure}"


def _backtest(found: Mapping[str, Any]) -> str:
    if not (test := found.get("backtest")):
        return ""
    worst = max(abs(each) for each in test["off_by"].values())
    optima = test.get("of_optima_off_by")
    told = "" if optima is None else f", and its best with one of {100 * abs(optima):.1f} % by the law of the best"
    return (
        f"Fitted without its largest budget, the sweep foretells that budget's {len(test['off_by'])} runs with an error of "
        f"{100 * test['mean_absolute']:.1f} % on average and {100 * worst:.1f} % at worst{told}."
    )


def _rates(found: Mapping[str, Any]) -> str:
    rates = found.get("rates") or {}
    if not (best := rates.get("best")):
        return ""
    words = ", ".join(f"{rate:.3g} at width {width}" for width, rate in best.items())
    ends = [width for width, inside in rates["inside"].items() if not inside]
    apart = rates.get("apart")
    told = f"apart by a factor of {apart:.2f}" if apart else ""
    if ends:
        told = f"at width {' and '.join(ends)} the smallest or largest that was tried, so how far they lie apart is not known"
    return f"Best rates are {words}, {told}."


def _models(found: Mapping[str, Any]) -> str:
    models = found.get("models") or {}
    if "correlation" not in models:
        return ""
    return (
        f"Over {models['count']} models the logarithm of FLOPs and the Frechet distance correlate by "
        f"{models['correlation_latent']:.3f} from real clips through the VAE and by {models['correlation']:.3f} from real clips "
        "(the DiT paper has -0.93 from its data)."
    ).replace("-", "\u2212")

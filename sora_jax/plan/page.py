"""A plan as a page: what fills a chip's memory, where a step's time goes, what is sent, and the verdict."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from sora_jax.plan.roofline import PARTS
from sora_jax.plan.text import asked, bound, kernels, outcome, peaks, rate, size_of, uncounted, unknown
from sora_jax.plan.topology import GIB
from sora_jax.train import progress

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem;
color: #1c2430; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.verdict { font-weight: 600; padding: .5rem .8rem; border-radius: 6px; background: #e4f3e8 } .verdict.no { background: #fbe4e1 }
.bar { display: flex; height: 26px; border-radius: 4px; overflow: hidden; background: #eef0f3 } .bar div { min-width: 1px }
table { border-collapse: collapse; width: 100% }
td, th { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e6e8ec }
td:first-child, th:first-child { text-align: left } .key { display: inline-block; width: .8em; height: .8em; border-radius: 2px }
.quiet { color: #66707f; font-size: .9rem } @media (prefers-color-scheme: dark) { body { color: #dfe4ec; background: #14181f }
.verdict { background: #1f3a28 } .verdict.no { background: #4a231e } .bar { background: #262c36 } td, th { border-color: #2c333f } }
"""
COLOURS = ("#2f5d8a", "#5b8cbb", "#9bbcdc", "#c9a227", "#6b8f4e", "#d9772b", "#8a8f98")


def page(numbers: Mapping[str, Any], command: str) -> str:
    """One self-contained HTML page of a plan's numbers."""
    verdict = numbers["verdict"]
    word = "Fits" if verdict["fits"] else "Does not fit"
    mesh = " \u00d7 ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items() if size > 1) or "one device"
    model = numbers["model"]
    size = f"{progress.si(model['parameters'])}parameters, " if "parameters" in model else ""
    parts = [
        f"<h1>{html.escape(numbers['topology'])}</h1>",
        f"<p class=quiet>{numbers['chips']} chips, {mesh}. {size}width {model['width']}, {model['blocks']} blocks, remat "
        f"{html.escape(model['remat'])}. {_sentence(asked(numbers))}.</p>",
        f"<p class='verdict{'' if verdict['fits'] else ' no'}'>{word}: {html.escape('; '.join(verdict['why']))}</p>",
    ]
    if "memory" in numbers:
        parts.append(_memory(numbers))
    if "seconds" in numbers:
        parts.append(_time(numbers))
    if numbers.get("collectives"):
        parts.append(_sent(numbers))
    if "kernels" in numbers:
        parts.append(f"<p class=quiet>Kernels: {html.escape(kernels(numbers['kernels']))}.</p>")
    if "peaks" in numbers:
        parts.append(f"<p class=quiet>Peaks of a chip: {html.escape(peaks(numbers['peaks']))}.</p>")
    parts.append(f"<p class=quiet><code>{html.escape(command)}</code></p>")
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Plan</title>"
    return f"{head}<style>{STYLE}</style>" + "\n".join(parts)


def _memory(numbers: Mapping[str, Any]) -> str:
    kinds = {name: size for name, size in numbers["memory"].items() if name != "total"}
    total = sum(kinds.values())
    has = numbers.get("peaks", {}).get("memory", 0) * GIB
    limit = max(total, has)
    bars = "".join(
        f"<div style='width:{100 * size / limit:.2f}%;background:{colour}' title='{name}'></div>"
        for (name, size), colour in zip(kinds.items(), COLOURS[: len(kinds)], strict=True)
    )
    rows = "".join(
        f"<tr><td><span class=key style='background:{colour}'></span> {name}</td><td>{size_of(size)}</td></tr>"
        for (name, size), colour in zip(kinds.items(), COLOURS[: len(kinds)], strict=True)
    )
    limited = f" of {has / GIB:.0f}" if has else ""
    title = f"Memory of a chip{unknown(numbers)}: {total / GIB:.1f}{limited} GiB"
    return f"<h2>{title}</h2><div class=bar>{bars}</div><table>{rows}</table>"


def _time(numbers: Mapping[str, Any]) -> str:
    seconds = numbers["seconds"]
    longest = max(seconds[name] for name in PARTS)
    rows = "".join(
        f"<tr><td>{name}</td><td style='width:60%'><div class=bar><div style='width:{100 * seconds[name] / longest:.1f}%;"
        f"background:{colour}'></div></div></td><td>{seconds[name]:.3f} s</td></tr>"
        for name, colour in zip(PARTS, COLOURS, strict=False)
    )
    low, high = numbers["mfu"]
    fast, slow = seconds["whole"]
    short = f" {_sentence(loops)}." if (loops := uncounted(numbers)) else ""
    return (
        f"<h2>A {_once(numbers)}: {fast:.3f} to {slow:.3f} s, MFU {bound(numbers, 'at most ')}{low:.0%} to {high:.0%}</h2>"
        f"<table>{rows}</table>"
        f"<p>Attention between clips of a row and recomputation are not counted as of use. "
        f"{_sentence(outcome(numbers))}.{short}</p>"
    )


def _sent(numbers: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{each['kind']}</td><td>{html.escape(each['axes'])}</td><td>{each['count']:,}</td>"
        f"<td>{size_of(each['bytes'])}{rate(each)}</td></tr>"
        for each in numbers["collectives"]
    )
    head = "<tr><th>collective</th><th>over</th><th>times</th><th></th></tr>"
    return f"<h2>Sent by a chip in a {_once(numbers)}</h2><table>{head}{rows}</table>"


def _sentence(line: str) -> str:
    return html.escape(line[:1].upper() + line[1:])


def _once(numbers: Mapping[str, Any]) -> str:
    """What one execution of the program is."""
    return "step" if "step" in numbers else "batch of videos"

"""A plan for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sora_jax.plan.topology import GIB
from sora_jax.train import progress


def size_of(count: float) -> str:
    """'1.23 GiB', or MiB below a tenth of one."""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def table(numbers: dict[str, Any]) -> str:
    """A plan for a terminal."""
    step, mesh = numbers["step"], " x ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items())
    model = numbers["model"]
    lines = [
        f"{numbers['topology']}: {numbers['chips']} chips as {mesh}",
        f"model: {progress.si(model.get('parameters', 0))}parameters, width {model['width']}, {model['blocks']} blocks, "
        f"remat {model['remat']}",
        f"step: {step['rows']} rows of {step['row_tokens']:,} tokens, filled to {numbers['packing']['fill']:.1%}, "
        f"{progress.si(step['flops'])}FLOP ({progress.si(step['useful_flops'])}within clips, "
        f"{progress.si(step['executed_flops'])}with recomputation)",
    ]
    if "memory" in numbers:
        lines.append("memory of a chip:")
        lines += [f"  {name:<12} {size_of(size):>11}" for name, size in numbers["memory"].items()]
        lines.append("sent by a chip in a step:")
        lines += [
            f"  {each['kind']:<18} over {each['axes']:<12} {each['count']:>5} times  {size_of(each['bytes']):>10}"
            for each in numbers["collectives"]
        ] or ["  nothing"]
    if "seconds" in numbers:
        seconds = numbers["seconds"]
        lines += [
            f"roofline: compute {seconds['compute']:.3f} s, memory {seconds['memory']:.3f} s, "
            f"interconnect {seconds['interconnect']:.3f} s; a step {seconds['step'][0]:.3f} to {seconds['step'][1]:.3f} s",
            f"MFU {numbers['mfu'][0]:.0%} to {numbers['mfu'][1]:.0%} (within clips {numbers['useful_mfu'][0]:.0%} to "
            f"{numbers['useful_mfu'][1]:.0%}), "
            f"{' to '.join(progress.si(rate).strip() for rate in numbers['tokens_per_second'])} tokens/s",
            f"run: {numbers['run']['steps']:,} steps, {' to '.join(f'{hours:,.0f}' for hours in numbers['run']['hours'])} hours, "
            f"{' to '.join(f'{hours:,.0f}' for hours in numbers['run']['chip_hours'])} chip-hours",
        ]
    verdict = numbers["verdict"]
    lines.append(f"{'fits' if verdict['fits'] else 'DOES NOT FIT'}: {'; '.join(verdict['why'])}")
    return "\n".join(lines)


def ranking(plans: Sequence[dict[str, Any]]) -> str:
    """Plans of a search as lines, the best first."""
    lines = [f"{'data':>5}{'fsdp':>5}{'tensor':>7}{'sequence':>9}{'remat':>9}{'rows':>6}{'GiB':>8}{'MFU':>12}"]
    for each in plans:
        mesh, model = each["mesh"], each["model"]
        size = f"{each['memory']['total'] / GIB:.1f}" if "memory" in each else "over"
        speed = " - ".join(f"{value:.0%}" for value in each["mfu"]) if "mfu" in each else ""
        lines.append(
            f"{mesh['data']:>5}{mesh['fsdp']:>5}{mesh['tensor']:>7}{mesh['sequence']:>9}{model['remat']:>9}"
            f"{each['step']['rows']:>6}{size:>8}{speed:>12}"
        )
    return "\n".join(lines)

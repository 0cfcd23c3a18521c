"""A plan for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax import sharding
from sora_jax.plan.roofline import PARTS
from sora_jax.plan.topology import GIB
from sora_jax.train import progress


def size_of(count: float) -> str:
    """'1.23 GiB', or MiB below a tenth of one."""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def table(numbers: dict[str, Any]) -> str:
    """A plan for a terminal."""
    mesh = sharding.in_words(numbers["mesh"])
    model = numbers["model"]
    lines = [
        f"{numbers['topology']}: {numbers['chips']} chips as {mesh}",
        f"model: {progress.si(model.get('parameters', 0))}parameters, width {model['width']}, {model['blocks']} blocks, "
        f"remat {model['remat']}",
        asked(numbers),
    ]
    if "memory" in numbers:
        lines.append(f"memory of a chip{unknown(numbers)}:")
        lines += [f"  {name:<12} {size_of(size):>11}" for name, size in numbers["memory"].items()]
    if "collectives" in numbers:
        lines.append(f"sent by a chip in a {'step' if 'step' in numbers else 'batch'}:")
        lines += [
            f"  {each['kind']:<18} over {each['axes']:<12} {each['count']:>5} times  {size_of(each['bytes']):>10}{rate(each)}"
            for each in numbers["collectives"]
        ] or ["  nothing"]
    if "seconds" in numbers:
        seconds = numbers["seconds"]
        fast, slow = seconds["whole"]
        low, high = numbers["mfu"]
        lines += [
            f"roofline: {', '.join(f'{name} {seconds[name]:.3f} s' for name in PARTS)}; in all {fast:.3f} to {slow:.3f} s",
            f"MFU {bound(numbers, 'at most ')}{low:.0%} to {high:.0%} (neither attention between clips nor recomputation)",
            outcome(numbers),
        ]
    if loops := uncounted(numbers):
        lines.append(loops)
    if "kernels" in numbers:
        lines.append(f"kernels: {kernels(numbers['kernels'])}")
    if "peaks" in numbers:
        lines.append(f"peaks of a chip: {peaks(numbers['peaks'])}")
    verdict = numbers["verdict"]
    lines.append(f"{'fits' if verdict['fits'] else 'DOES NOT FIT'}: {'; '.join(verdict['why'])}")
    return "\n".join(lines)


def rate(collective: Mapping[str, Any]) -> str:
    """At how many bytes a second it goes, where that is known."""
    return f" at {collective['bytes_per_second'] / 1e9:g} GB/s" if "bytes_per_second" in collective else ""


def asked(numbers: Mapping[str, Any]) -> str:
    """What one execution of the program does."""
    if "step" in numbers:
        step = numbers["step"]
        return (
            f"step: {step['rows']} rows of {step['row_tokens']:,} tokens, filled to {numbers['packing']['fill']:.1%}, "
            f"{progress.si(step['flops'])}FLOP ({progress.si(step['useful_flops'])}FLOP within clips, padding included, "
            f"{progress.si(step['executed_flops'])}FLOP with recomputation)"
        )
    made = numbers["sampling"]
    return (
        f"batch: {made['videos']} videos of {made['frames']}x{made['height']}x{made['width']} ({made['tokens']:,} tokens), "
        f"{made['steps']} steps of {made['method']}, guidance {made['guidance']:g}, {progress.si(made['flops'])}FLOP"
    )


def unknown(numbers: Mapping[str, Any]) -> str:
    """What an account of memory leaves out, if it does."""
    return "" if "total" in numbers["memory"] else ", beside what the compiler did not tell of"


def uncounted(numbers: Mapping[str, Any]) -> str:
    """What the times leave out, if they do."""
    count = len(numbers.get("unknown_loops", ()))
    return f"{count} loops of unknown length are counted once: times are too short by the rest of them" if count else ""


def bound(numbers: Mapping[str, Any], words: str) -> str:
    """These words of a number that loops of unknown length make too good."""
    return words if uncounted(numbers) else ""


def kernels(found: Mapping[str, int]) -> str:
    """Custom kernels, and how often each runs."""
    return ", ".join(f"{name} {times:,} times" for name, times in found.items()) or "none but the compiler's own"


def peaks(found: Mapping[str, Any]) -> str:
    """The peaks of a chip that times are held against, and who says so."""
    return (
        f"{found['memory']:g} GiB, {found['flops'] / 1e12:g} TFLOP/s in bfloat16, {found['bandwidth'] / 1e12:g} TB/s of memory, "
        f"{found['link'] / 1e9:g} GB/s along an axis of the interconnect, both ways, {found['host'] / 1e9:g} GB/s to the host "
        f"({found['source']})"
    )


def outcome(numbers: Mapping[str, Any]) -> str:
    """What comes of it, and what it costs."""
    if "run" in numbers:
        run = numbers["run"]
        return (
            f"run: {bound(numbers, 'at best ')}{_range(numbers['tokens_per_second'])} tokens/s, {run['steps']:,} steps in "
            f"{' to '.join(f'{hours:,.0f}' for hours in run['hours'])} hours, "
            f"{' to '.join(f'{hours:,.0f}' for hours in run['chip_hours'])} chip-hours"
        )
    costs = " to ".join(f"{seconds:,.3g}" for seconds in numbers["chip_seconds_per_video"])
    many = f"{bound(numbers, 'at best ')}{_range(numbers['videos_per_hour'])}"
    return f"sampling: {many} videos an hour, {costs} chip-seconds a video"


def _range(values: Sequence[float]) -> str:
    return " to ".join(progress.si(value).strip() for value in values)


def ranking(plans: Sequence[dict[str, Any]]) -> str:
    """Plans of a search as lines, the best first."""
    widths = {axis: max(4, len(axis)) + 1 for axis in sharding.AXES}

    def line(sizes: Mapping[str, Any], *others: Any) -> str:
        axes = "".join(f"{sizes[axis]:>{width}}" for axis, width in widths.items())
        return axes + "".join(f"{each:>{width}}" for each, width in zip(others, (9, 6, 8, 7, 8, 12), strict=True))

    lines = [line({axis: axis for axis in widths}, "remat", "rows", "tokens", "fill", "GiB", "MFU")]
    for each in plans:
        step, fill = each["step"], f"{each['packing']['fill']:.1%}"
        size = f"{each['memory']['total'] / GIB:.1f}" if "total" in each.get("memory", {}) else "over"
        speed = " - ".join(f"{value:.0%}" for value in each["mfu"]) if "mfu" in each else ""
        lines.append(line(each["mesh"], each["model"]["remat"], step["rows"], step["row_tokens"], fill, size, speed))
    return "\n".join(lines)

"""What a checkpoint holds, and how two differ, as tables of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sora_jax import checkpoint


def description(told: checkpoint.Description, depth: int | None = 2) -> str:
    """A page of text: what it is, a table of the arrays, and meta.

    depth is how many levels below an item get rows of their own; deeper modules are summed. None shows every array.
    Raises ValueError for a negative depth.
    """
    if depth is not None and depth < 0:
        raise ValueError(f"depth is {depth}; it must be 0 or more")
    others = f" (the directory holds {', '.join(map(str, told.steps))})" if len(told.steps) > 1 else ""
    head = [
        f"checkpoint  {told.path}",
        f"step        {'-' if told.step is None else told.step}{others}",
        f"on disk     {checkpoint.megabytes(told.bytes_on_disk)}",
    ]
    rows: list[tuple[str, ...]] = [("item", "shape", "dtype", "values", "size", "sharding")]
    for name, infos in told.items.items():
        rows += _rows(name, checkpoint.nest({info.path: info for info in infos}), 0, depth)
    rows.append(("total", "", "", f"{told.num_parameters():,}", checkpoint.megabytes(told.num_bytes()), ""))
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    meta = _outline(told.meta, 0) if told.meta else ["(none)"]
    return "\n".join([*head, "", *_aligned(rows), "", "meta", *(f"  {line}" for line in meta)])


def changes(found: Sequence[checkpoint.Change], depth: int | None = 2) -> str:
    """A table of changed arrays, those of a module deeper than depth summed. None shows every array."""
    if not found:
        return "no array differs"
    groups: dict[str, list[checkpoint.Change]] = {}
    for change in found:
        parts = (change.item, *change.path.split("/"))
        groups.setdefault("/".join(parts if depth is None else parts[: depth + 1]), []).append(change)
    rows: list[tuple[str, ...]] = [("changed", "arrays", "relative change", "")]
    for name in groups:
        members = groups[name]
        norms = [change.norms for change in members if change.norms is not None]
        moved, was = (
            (sum(value**2 for value in column) ** 0.5 for column in zip(*norms, strict=True)) if norms else (0, 0)
        )
        words = {_told(change) for change in members if change.norms is None}
        told = "; ".join(sorted(words)[:2]) + (f"; and {len(words) - 2} more" if len(words) > 2 else "")
        rows.append((name, str(len(members)), f"{moved / was:.2e}" if was else "" if not norms else "from 0", told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _told(change: checkpoint.Change) -> str:
    if change.before is None or change.after is None:
        return "only in the second" if change.before is None else "only in the first"
    return f"{list(change.before.shape)} became {list(change.after.shape)}"


def _rows(name: str, node: Any, level: int, depth: int | None) -> Iterator[tuple[str, ...]]:
    infos = [node] if isinstance(node, checkpoint.ArrayInfo) else list(checkpoint.flatten_dict(node).values())
    folded = depth is not None and level >= depth
    if isinstance(node, checkpoint.ArrayInfo):
        shape = " x ".join(map(str, node.shape)) or "scalar"
    else:
        shape = (f"{len(infos)} array" + "s" * (len(infos) != 1)) if folded or not infos else ""
    dtypes = sorted({info.dtype for info in infos}) if shape else []
    values, size = sum(info.num_values for info in infos), sum(info.num_bytes for info in infos)
    laid = {info.sharding for info in infos} if shape else set()
    sharding = laid.pop() if len(laid) == 1 else "several" * bool(laid)
    yield (
        "  " * level + (name or "(array)"),
        shape,
        ", ".join(dtypes),
        f"{values:,}",
        checkpoint.megabytes(size),
        sharding,
    )
    if isinstance(node, dict) and not folded:
        for child in sorted(node, key=_natural):
            yield from _rows(child, node[child], level + 1, depth)


def _natural(name: str) -> tuple[bool, int, str]:
    """Block 10 comes after block 9."""
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = {"values", "size"}
    sides = [">" if title in numeric else "<" for title in rows[0]]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _outline(value: Any, level: int) -> list[str]:
    """A JSON value as indented lines."""
    pad = "  " * level
    if isinstance(value, Mapping) and value:
        return [line for key, child in value.items() for line in _outline_entry(f"{pad}{_scalar(key)}:", child, level)]
    if isinstance(value, list) and any(isinstance(child, Mapping | list) for child in value):
        return [line for child in value for line in _outline_entry(f"{pad}-", child, level)]
    return [pad + _scalar(value)]


def _outline_entry(label: str, child: Any, level: int) -> list[str]:
    lines = _outline(child, level + 1)
    nested = bool(child) and (
        isinstance(child, Mapping) or (isinstance(child, list) and any(isinstance(x, Mapping | list) for x in child))
    )
    return [label, *lines] if nested else [f"{label} {lines[0].strip()}"]


def _scalar(value: Any) -> str:
    # What is not printable could steer a terminal.
    text = value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"

"""What a compiled program does, read from its text: collectives by mesh axis and bytes of memory moved, loops counted.

XLA's own cost analysis counts the body of a loop once, and a scan over blocks is a loop. Here every computation is counted as
often as it runs: a loop's trip count is in its backend config or in the constant that its condition compares with.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "tf32": 4} | {
    f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)
}
# These move nothing by themselves.
STILL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "while", "conditional",
    "call", "iota", "domain", "opt-barrier", "add-dependency",
}  # fmt: skip

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")  # in a layout: where an array lies that is not in the main memory
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    rest: str  # attributes, and a constant's or parameter's number

    @property
    def is_still(self) -> bool:
        """Whether it moves nothing by itself; what goes on beside other work does so at its start."""
        return self.kind in STILL or self.kind.endswith(("-done", "-update"))

    def calls(self, role: str) -> list[str]:
        """Names of the computations that it calls in a role, such as 'body'."""
        return [
            name
            for found, names in _CALLED.findall(self.rest)
            if found == role
            for name in re.findall(r"%([\w.\-]+)", names)
        ]


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """bytes are those of the whole result (of what is reduced, before a reduce-scatter) on a device, each time; axes are the
    mesh axes over which devices take part, 'data+fsdp' where a group spans both."""

    kind: str
    axes: str
    devices: int
    bytes: int
    times: int
    where: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, by the best ring algorithm."""
        n = self.devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return share * self.bytes * self.times


class Program:
    """A compiled program's text. loops without a known trip count are counted once and named in unknown_loops."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for computation, is_entry in _computations(text):
            self.computations[computation.name] = computation
            self.entry = computation.name if is_entry else self.entry
        if not self.entry:
            raise ValueError("this text holds no program; give compiled.as_text()")
        self.unknown_loops: set[str] = set()

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs, those within fusions and reductions left out."""
        times: dict[str, int] = collections.Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for each in self.computations[name].instructions.values():
                for body in each.calls("body"):
                    visit(body, count * self.trips(each))
                called = [] if each.kind == "fusion" else each.calls("calls")
                if each.kind == "call":
                    called = each.calls("to_apply")
                for role in ("branch_computations", "true_computation", "false_computation"):
                    called = called + each.calls(role)
                for other in called:
                    visit(other, count)

        visit(self.entry, 1)
        return dict(times)

    def trips(self, loop: Instruction) -> int:
        """How often a while loop runs."""
        known = re.search(r'known_trip_count[^}]*?"?n"?[:=] ?"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        (name,) = loop.calls("condition")
        condition = self.computations[name]
        root = condition.instructions[condition.root]
        constants = [
            int(each.rest.split(")")[0])
            for operand in root.operands
            if (each := condition.instructions.get(operand)) is not None and each.kind == "constant"
        ]
        if root.kind == "compare" and "direction=LT" in root.rest and len(constants) == 1:
            return constants[0]
        self.unknown_loops.add(loop.name)
        return 1

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """All collectives of a program for devices on a mesh {axis: size}, in the mesh's order."""
        found = []
        for name, times in self.runs.items():
            for each, kind in self._collectives_of(self.computations[name]):
                groups = _groups(each.rest, math.prod(mesh.values()))
                size = len(groups[0]) if kind != "collective-permute" else _ring(groups, mesh)
                if size > 1:
                    found.append(
                        Collective(kind, _axes(groups, mesh), size, _moved(each, kind, size), times, each.name)
                    )
        return found

    def _collectives_of(self, computation: Computation) -> Iterator[tuple[Instruction, str]]:
        """(instruction, kind) of a computation and of its fusions.

        Channels tell nothing apart: all collectives of jax's shard_map have the same one, and XLA's own permutations too.
        """
        begun: set[str] = set()
        for each in computation.instructions.values():
            kind = each.kind.removesuffix("-start")
            if kind in KINDS:
                yield each, "reduce-scatter" if self._is_scattered(each, computation) else kind
            elif each.kind == "fusion":
                for fused in each.calls("calls"):
                    for inner, kind in self._collectives_of(self.computations[fused]):
                        # A TPU begins a collective in a fusion, goes on with it in others beside their own work, and ends it
                        # in one more. Each of them holds a copy, and the copies are of one chain.
                        chain = re.search(r'chain_id="(\d+)"', inner.rest)
                        if chain is None or chain[1] not in begun:
                            yield inner, kind
                        begun |= {chain[1]} if chain else set()

    @staticmethod
    def _is_scattered(each: Instruction, computation: Computation) -> bool:
        """Whether a sum over devices is one of which each keeps its own slice: TPUs run that as a reduce-scatter."""
        readers = [other for other in computation.instructions.values() if each.name in other.operands]
        return each.kind == "all-reduce" and len(readers) == 1 and readers[0].kind == "dynamic-slice"

    def kernels(self) -> dict[str, int]:
        """Custom kernels by the name that they were given, and how often each runs."""
        found: dict[str, int] = collections.Counter()
        for name, times in self.runs.items():
            for each in self.computations[name].instructions.values():
                target = re.search(
                    r'custom_call_target="(tpu_custom_call|__gpu\$[\w.]+|triton_kernel_call\w*)"', each.rest
                )
                if target:
                    # On GPUs all are named after the call; where it was made they have their own.
                    own = (
                        re.search(r'op_name="[^"]*?([^/"]+)/pallas_call"', each.rest) if "pallas" in each.name else None
                    )
                    found[own[1] if own else re.sub(r"[.\d]+$", "", each.name)] += times
        return dict(found)

    def memory_traffic(self) -> int:
        """Bytes read from and written to a device's main memory, what its compiler keeps in faster memory left out."""
        total = 0
        for name, times in self.runs.items():
            computation = self.computations[name]
            total += times * sum(self._traffic(each, computation) for each in computation.instructions.values())
        return total

    def host_traffic(self) -> int:
        """Bytes that a device and its host's memory, S(5), send each other."""
        total = 0
        for name, times in self.runs.items():
            instructions = self.computations[name].instructions
            for each in instructions.values():
                if each.is_still:
                    continue
                inputs = [instructions[operand].type for operand in each.operands if operand in instructions]
                if "S(5)" not in "".join((each.type, *inputs)):
                    continue
                # What is written into a stack there is the second operand; what is read is the result, without the stack itself.
                part = inputs[1] if each.kind.startswith("dynamic-update-slice") else each.type
                total += times * size_of(part, fast=True)
        return total

    def _traffic(self, each: Instruction, computation: Computation) -> int:
        if each.is_still:
            return 0
        inputs = [computation.instructions[name].type for name in each.operands if name in computation.instructions]
        if each.kind == "dynamic-slice":
            return 2 * size_of(each.type)
        if each.kind == "dynamic-update-slice":
            return 2 * size_of(inputs[1])
        if each.kind == "fusion":
            (fused,) = each.calls("calls")
            return self._fusion_traffic(self.computations[fused], inputs, each.type)
        if each.kind.endswith("-start"):
            return _traffic_of_start(each, inputs)
        return size_of(each.type) + sum(map(size_of, inputs))

    def _fusion_traffic(self, fused: Computation, inputs: list[str], output: str) -> int:
        """Inputs of which a slice is read count as that slice, as does an output that is a slice put into an input."""
        uses: dict[str, list[Instruction]] = collections.defaultdict(list)
        for each in fused.instructions.values():
            for operand in each.operands:
                uses[operand].append(each)
        written = fused.instructions[fused.root]
        while written.kind in ("bitcast", "copy", "convert") and written.operands[0] in fused.instructions:
            written = fused.instructions[written.operands[0]]
        in_place = written.kind == "dynamic-update-slice"
        total = size_of(fused.instructions[written.operands[1]].type) if in_place else size_of(output)
        for each in fused.instructions.values():
            if each.kind != "parameter":
                continue
            number = int(each.rest.split(")")[0])
            readers = uses[each.name]
            if readers and all(reader.kind == "dynamic-slice" for reader in readers):
                total += sum(size_of(reader.type) for reader in readers)
            elif not (in_place and all(reader is written and reader.operands[0] == each.name for reader in readers)):
                total += size_of(inputs[number]) if number < len(inputs) else 0
        return total


def _traffic_of_start(each: Instruction, inputs: list[str]) -> int:
    """Of an asynchronous instruction. Its type is a tuple that holds the operands, too; of a slice, all of what it is cut from or
    put into, of which no more is moved than the slice."""
    if "slice" in each.kind:
        part = inputs[1] if each.kind.startswith("dynamic-update-slice") else _behind_operands(each.type)
        return size_of(part) + (size_of(part, fast=True) if _SPACE.search(inputs[0]) is None else 0)
    return size_of(each.type) + (0 if each.type.startswith("(") else sum(map(size_of, inputs)))


def _behind_operands(type_: str) -> str:
    """The result's array in the type ((operands), result, context) of an asynchronous instruction."""
    depth = 0
    for at, sign in enumerate(type_):
        depth += (sign == "(") - (sign == ")")
        if depth == 1 and sign == ")":
            return found[0] if (found := _ARRAY.search(type_, at)) else ""
    return ""


def size_of(type_: str, fast: bool = False) -> int:
    """Bytes of an array or tuple type on its device; arrays that the layout puts into fast memory, such as S(1), only if asked, and
    those in the host's, S(5), never."""
    total = 0
    for dtype, dimensions, layout in _ARRAY.findall(type_):
        space = int(found[1]) if (found := _SPACE.search(layout)) else 0
        if space == 0 or (fast and space != 5):
            count = math.prod(int(size) for size in dimensions.split(",")) if dimensions else 1
            total += count * BYTES.get(dtype, 1)
    return total


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array of a type that lies on the device, and not with its host."""
    return [
        (dtype, tuple(int(size) for size in dimensions.split(",")) if dimensions else ())
        for dtype, dimensions, layout in _ARRAY.findall(type_)
        if "S(5)" not in layout
    ]


def _computations(text: str) -> Iterator[tuple[Computation, bool]]:
    name, is_entry, root = "", False, ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            is_entry, name, root, instructions = bool(head[1]), head[2], "", {}
        elif line.rstrip() == "}" and name:  # not "}}" that ends the metadata of a kernel
            yield Computation(name, instructions, root), is_entry
            name = ""
        elif name and (each := _instruction(line)) is not None:
            instructions[each.name] = each
            if line.lstrip().startswith("ROOT "):
                root = each.name


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    after = line[found.end() :]
    end = _closing(after, 0) + 1 if after.startswith("(") else after.index(" ")
    type_, after = after[:end], after[end:].lstrip()
    kind, _, inner = after.partition("(")
    stop = _closing("(" + inner, 0) - 1
    return Instruction(found[1], kind, type_, tuple(re.findall(r"%([\w.\-]+)", inner[:stop])), inner)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at start is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"brackets do not close: {text[:80]}")


def _moved(each: Instruction, kind: str, devices: int) -> int:
    total = size_of(each.type, fast=True)
    if each.kind.endswith("-start"):
        if kind == "all-gather":  # (operand, result)
            total = total * devices // (devices + 1)
        elif kind in ("collective-permute", "all-to-all"):  # (operand, result, two counters), (operands, results)
            total //= 2
        elif kind == "reduce-scatter":  # (operand, result)
            return total * devices // (devices + 1)
    return total * devices if each.kind == "reduce-scatter" else total


def _groups(rest: str, devices: int) -> list[list[int]]:
    """Groups of so many devices, or the (source, target) pairs of a permutation, from any way that XLA writes them."""
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        return [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", found[1])]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest):
        return [[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape = [int(x) for x in found[3].split(",")]
        order = [int(x) for x in found[4].split(",")] if found[4] else list(range(len(shape)))
        return (
            np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(int(found[1]), int(found[2])).tolist()
        )
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids: np.ndarray = np.arange(math.prod(sizes.values()))
        if found[2]:
            ids = ids.reshape([int(x) for x in found[2].split(",")])
            ids = ids.transpose([int(x) for x in found[3].split(",")] if found[3] else range(ids.ndim))
        inner = re.findall(r"'(\w+)'", found[4])
        outer = [name for name in sizes if name not in inner]
        ids = ids.reshape(tuple(sizes.values())).transpose([list(sizes).index(name) for name in (*outer, *inner)])
        return ids.reshape(-1, math.prod(sizes[name] for name in inner)).tolist()
    if "replica_groups={}" in rest:
        return [list(range(devices))]
    raise ValueError(f"the devices of a collective are written in an unknown way: {rest[:200]}")


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
    """Mesh axes along which the members of a group differ."""
    places = [np.stack(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
    return "+".join(axis for row, axis in enumerate(mesh) if any(np.ptp(place[row]) for place in places)) or "none"


def _ring(pairs: list[list[int]], mesh: Mapping[str, int]) -> int:
    """How many devices pass on to each other."""
    names = _axes(pairs, mesh).split("+")
    return math.prod(mesh.get(name, 1) for name in names)

"""The device mesh and the one table from names to mesh axes. No other module names a mesh axis.

Parameters are matched by path to *logical* axes (PARAMETERS); logical axes map to mesh axes (RULES). The table is total: a
parameter without a row, a mesh axis used twice, or a dimension that does not divide is an error with its remedy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.structs import Share

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis -> mesh axes it is split over. None: every device holds it whole.
RULES: dict[str, tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),
    "tokens": ("sequence",),
    "slots": None,
    "width": None,
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "embed": ("fsdp",),  # the input side of a weight: gathered block by block, as in FSDP
    "wide": ("tensor",),  # the output side of a weight
    "layers": None,
    "none": None,
}

# Path pattern -> logical axes, from the last axis backwards; a leading stacked axis of scanned blocks is "layers".
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(bias|scale|count|shift|stretch)$", ("none",)),
    (r"embedding$", ("none", "embed")),
    (r"conv\w*/kernel$", ("none", "none", "embed", "wide")),
    # Pixels, latent channels, words and features of times and places are few and need not divide.
    (r"(patch_in|position_in|extent_in|time_in|ins/\d+|into)/kernel$", ("none", "wide")),
    (r"(patch_out|word_out|encoder/out|outs/\d+)/kernel$", ("embed", "none")),
    (r"(out|down)/kernel$", ("wide", "embed")),
    (r"kernel$", ("embed", "wide")),
)

# Arrays in an optimizer's state that are of no parameter, by the end of their path: every device has them whole.
OF_NO_PARAMETER = ("ns_coeffs",)  # the polynomial of Muon, as optax keeps it


class MeshError(ValueError):
    """What cannot lie on a mesh; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of 0 takes all devices that the others leave. Raises ValueError for several, or less than 0."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if min(sizes) < 0 or sizes.count(0) > 1:
            raise ValueError(f"mesh {sizes}: axis sizes must be at least 1 (one of them may be 0: the rest)")


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, int, int, int]:
    """Sizes of the axes over `count` devices. Raises MeshError if they do not fit."""
    sizes = dataclasses.astuple(config)
    rest = count // math.prod(size or 1 for size in sizes)
    data, fsdp, tensor, sequence = (size or rest for size in sizes)
    if data * fsdp * tensor * sequence != count:
        told = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise MeshError(f"mesh {told} does not cover {count} devices; choose sizes whose product is {count}")
    return data, fsdp, tensor, sequence


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes AXES over the given devices (all by default), laid as their network lies: an axis of the mesh may be a
    part of one of the network's. The devices need not be there. Raises MeshError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    laid = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shapes(count: int) -> Iterator[MeshConfig]:
    """Every mesh over `count` devices."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(sizes) == count:
            yield MeshConfig(*sizes)


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """A mesh of devices of which nothing is known. Raises MeshError if the sizes do not fit."""
    return AbstractMesh(mesh_shape(config, count), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_words(sizes: Mapping[str, int]) -> str:
    """'data 2 x fsdp 4 x tensor 1 x sequence 1', of sizes by mesh axis."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def spec(logical: tuple[str, ...], where: str) -> P:
    """Partition spec of logical axes. Raises ValueError for an unknown name or a mesh axis that is used twice."""
    mesh_axes: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name in logical:
        if name not in RULES:
            raise ValueError(f"{where}: no logical axis {name!r}; sharding.RULES has {', '.join(RULES)}")
        axes = RULES[name]
        if axes and used & set(axes):
            raise ValueError(
                f"{where}: axes {', '.join(logical)} use mesh axis {', '.join(sorted(used & set(axes)))} twice; one must go over "
                "another mesh axis or none: change its row in sharding.PARAMETERS, or sharding.RULES"
            )
        used |= set(axes or ())
        mesh_axes.append(axes)
    return P(*mesh_axes)


def constrain(x: jax.Array, *logical: str) -> jax.Array:
    """Tell the compiler how an activation lies on the mesh of the context; without a mesh nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical, f"activation {x.shape}"))


def platform() -> str:
    """That of the mesh of the context, whose devices need not be there; else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def shards(logical: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Over how many devices of a mesh, by default that of the context, a logical axis is split."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[logical] or ())


def padded(size: int, logical: str, step: int = 1, mesh: Mesh | AbstractMesh | None = None) -> int:
    """The least size, no smaller than this, of which each device of a logical axis has a multiple of `step`."""
    step *= shards(logical, mesh)
    return -(-size // step) * step


def check(mesh: Mesh | AbstractMesh, **sizes: int) -> None:
    """Raises MeshError if one of the sizes, which are by logical axis, does not divide over the mesh."""
    for name, size in sizes.items():
        if size % shards(name, mesh):
            raise MeshError(
                f"{size} {name} do not divide over {shards(name, mesh)} devices of mesh axes {RULES[name]}; "
                "change the model, its rows or the mesh"
            )


def mesh_axis(logical: str) -> str:
    """The one mesh axis that a logical axis is split over, as collectives name it."""
    (axis,) = RULES[logical] or ()
    return axis


def on_each_device(
    function: Callable[..., jax.Array], inputs: Sequence[tuple[str, ...]], output: tuple[str, ...]
) -> Any:
    """function as each device of the mesh of the context does it with its own part of the arrays, of these logical axes.

    It raises MeshError for an axis that does not divide over its devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    specs = tuple(spec(axes, "on_each_device") for axes in inputs)
    parted = jax.shard_map(function, in_specs=specs, out_specs=spec(output, "on_each_device"), check_vma=False)

    def checked(*arrays: jax.Array) -> jax.Array:
        for x, axes in zip(arrays, inputs, strict=True):
            for size, name in zip(x.shape, axes, strict=True):
                check(mesh, **{name: size})
        return parted(*arrays)

    return checked


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Logical axes of the parameter at path ('blocks/attention/qkv/kernel'). Raises ValueError if no row matches."""
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path) and len(shape) - len(axes) in (0, 1):
            return ("layers",) * (len(shape) - len(axes)) + axes
    raise ValueError(
        f"parameter {path} {shape} matches no row of sharding.PARAMETERS; add one for its name with {len(shape)} logical axes, or "
        "with one less if blocks are stacked"
    )


def path_name(path: tuple[Any, ...]) -> str:
    """'blocks/mlp/up/kernel' from a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every array of params (arrays or ShapeDtypeStructs), from the table. Raises MeshError for a dimension
    that does not divide, ValueError for a parameter without a row."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        partition = spec(logical_axes(name, leaf.shape), f"parameter {name} {leaf.shape}")
        for size, axes in zip(leaf.shape, partition, strict=True):
            shards = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % shards:
                raise MeshError(
                    f"{name} {leaf.shape}: {size} does not divide over {shards} devices of mesh axes {axes}; "
                    f"change the model's width or the mesh"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, params)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of params' structure (optimizer moments): matched by path suffix and shape.

    Scalars, and what OF_NO_PARAMETER names, every device has whole. Raises ValueError for another array that is like no parameter:
    whole on every device it could be as large as all weights.
    """
    table = {
        path_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves(shardings), strict=True
        )
    }

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        parts = name.split("/")
        for start in range(len(parts)):
            shape, sharding = table.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        if leaf.ndim and not name.endswith(OF_NO_PARAMETER):
            raise ValueError(
                f"{name} {leaf.shape} of the optimizer is like no parameter in path and shape, so nothing says how it lies on a "
                "mesh; keep moments in trees of the parameters' shapes, or name it in sharding.OF_NO_PARAMETER"
            )
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with its shardings, and no arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Batches: split over rows."""
    return NamedSharding(mesh, P(RULES["rows"]))


def share(mesh: Mesh, count: int) -> Share:
    """Which of a batch's rows lie on devices of this process.

    They need not be next to each other: meshes follow the network of the devices, not their processes. Where an axis that does
    not split rows spans processes, several have the same row. Raises MeshError if rows do not divide over the devices.
    """
    check(mesh, rows=count)
    here, holders = jax.process_index(), [set[int]() for _ in range(count)]
    places: Any = rows(mesh).devices_indices_map((count,))
    for device, place in places.items():
        for row in range(*place[0].indices(count)):
            holders[row].add(device.process_index)
    own = tuple(row for row in range(count) if here in holders[row])
    return Share(own, frozenset(row for row in own if min(holders[row]) == here))


def place_rows(tree: Any, mesh: Mesh, count: int) -> Any:
    """A batch of `count` rows on the mesh, from this process's share of it."""
    placed = rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, placed)
    at = {row: number for number, row in enumerate(share(mesh, count).rows)}

    def array(x: Any) -> jax.Array:
        x = np.asarray(x)

        def part(index: Any) -> np.ndarray:
            # Rows of a device are next to each other, and so they are among this process's own.
            start, stop, _ = index[0].indices(count)
            return x[at[start] : at[stop - 1] + 1]

        return jax.make_array_from_callback((count, *x.shape[1:]), placed, part)

    return jax.tree.map(array, tree)


def everywhere(tree: Any) -> Any:
    """Arrays that every device of the mesh of the context has whole: results that every process may read."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def on_host(tree: Any) -> Any:
    """Arrays as numpy, also such as lie on devices of other processes."""
    if all(getattr(x, "is_fully_addressable", True) or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.device_get(jax.jit(everywhere)(tree))

"""Checkpoints: save, restore on any mesh, verify, describe, compare. The only module that imports orbax.

A directory of checkpoints holds one directory a step. A step holds *items* ("params", "ema", "opt_state", ...), each a
tree of arrays that can be read alone, and *meta*, whatever JSON the caller needs to go on (config, FLOPs spent, loader
position).

Orbax neither notices damaged array data nor falls back to an older step, and casts dtypes without a word (measured: 22
of 22 flipped bits loaded). So every save also stores a *record*: dtype, shape and fingerprint (fingerprints.py) of every
array, and a digest of the record itself. Every restore holds the request against the record before it reads, and the
arrays against it after.

What is on disk is held against a *seal* (seal.py), SHA256SUMS: the digest of every file of the step, written last, when
all processes have written theirs. A byte that changed anywhere is found before anything is parsed, and so is a file that
is missing or was not there. The fingerprints are of what was in memory and the same on every mesh; the seal is of these
very files. A step that has none by its record (an older one, or one in an object store, which checks its own objects) is
held against its fingerprints alone.

Items are stored as nested dicts, whatever containers they have in memory: names, not classes, are the format, so that
optax states, empty states and None come back exactly as `like` has them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from sora_jax import disk, fingerprints, processes, seal

PyTree = Any
Flat = dict[str, Any]  # "blocks/0/kernel" -> array
Result = TypeVar("Result")

_RECORD = "sora_jax"  # our key in orbax's custom metadata
_ORBAX_METADATA = "_CHECKPOINT_METADATA"  # the JSON file where orbax keeps custom metadata
_ORBAX_SHARDING = "_sharding"  # the JSON file where orbax keeps how the arrays of one item lay over devices
_ORBAX_TREE = "_METADATA"  # the JSON file where orbax keeps the tree of one item
_ORBAX_TEMPORARY = "*.orbax-checkpoint-tmp*"
_SEALED = "sealed"  # in a record: that a seal is part of the step
_PART = ".part"  # follows the number of a step that is not whole, as it is being written or deleted
# Statuses of TensorStore and XLA that say nothing about the files.
_NOT_THE_FILES = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
)
# What the system says of a disk, when a library passes on its words alone.
_OF_THE_DISK = (
    "No space left",
    "quota exceeded",
    "File too large",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
)
_PART_BYTES = 2**28  # of a device, that are read back at a time
# From how many on devices that hold the same array write a part of it each: every part is cut out by a program of its own, and
# compiling them for the 38 small arrays of the quickstart's transformer on eight devices took 10 s of a first save, which is 0.2 s.
_SHARED_BYTES = 2**24
# Of what others may have written.
_MAX_METADATA_BYTES = 2**25  # of a JSON file of orbax's: 100,000 arrays
_MAX_ARRAYS = 2**17
_MAX_AXES = 32
_MAX_VALUES = 2**48  # of an array: sums of them must not go round
_MAX_NAME = 200
_REMEDY = "use another step, or fetch the checkpoint again"
_MAX_PROBLEMS = 8  # an error that lists every parameter of a model hides what is wrong


class CorruptCheckpointError(ValueError):
    """What is on disk is not what was saved."""


class MismatchError(ValueError):
    """A checkpoint of another model: items, paths, dtypes or shapes differ from those that are wanted."""


class ReadError(RuntimeError):
    """A checkpoint could not be read now: memory, rights, or a disk that is away. Nothing is known to be wrong with it."""


class SaveError(RuntimeError):
    """A checkpoint could not be written: the disk is full, read-only or away. Older checkpoints are as they were."""


class Restored(NamedTuple):
    """What restore gives back; items has the structure of `like`."""

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of one array of an item; path is "module/.../name". sharding says over which axes of the mesh each dimension
    was divided when it was saved, such as "fsdp 8, -"; "" if it was whole on every device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str = dataclasses.field(default="", compare=False)

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Description:
    """What one step holds, without its arrays.

    step is None when the directory of a single checkpoint has no number for a name; steps are its numbered siblings.
    bytes_on_disk is what the files take, which is less than the arrays where they compress.
    """

    path: str
    step: int | None
    steps: tuple[int, ...]
    items: Mapping[str, tuple[ArrayInfo, ...]]
    bytes_on_disk: int
    meta: Mapping[str, Any]

    def num_parameters(self, item: str | None = None) -> int:
        """Number of values of one item, or of all items."""
        return sum(info.num_values for name in self.items if item in (None, name) for info in self.items[name])

    def num_bytes(self, item: str | None = None) -> int:
        """Bytes of one item's arrays in memory, or of all items'."""
        return sum(info.num_bytes for name in self.items if item in (None, name) for info in self.items[name])


# --- Save ---


def save(
    directory: str | os.PathLike[str], step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any], *, keep: int
) -> None:
    """Writes directory/step, reads it back, and then deletes all but the newest `keep` steps. Returns when all that is done.

    items maps a name to a tree of jax or numpy arrays; an item without arrays is fine. meta is JSON. A step appears all
    at once, read back and sealed, or not at all: a process killed in the middle leaves a directory of another name, which
    the next save removes. All processes call it; directory must be one that all of them see.

    Raises ValueError if the step exists, if keep < 1, if meta is not JSON, if a leaf is not a plain array, or if two
    parameters share a name; SaveError, and leaves what was there, if the step could not be written or is not on disk what it
    was in memory.
    """
    root = _root(directory)
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}; it must be a whole number of at least 0, as it names a folder")
    if wrong := [name for name in items if not _is_name(name) or "/" in name]:
        raise ValueError(f"{wrong[0]!r} cannot be the name of an item, which is that of a folder; rename it")
    if step in steps(root):
        raise ValueError(f"{root} already holds step {step}; ask latest_step() first, or save to another directory")
    flat = {name: _flatten(name, tree) for name, tree in items.items()}
    stored = {name: nest(_storable(arrays)) for name, arrays in flat.items() if _storable(arrays)}
    if not stored:
        raise ValueError(f"none of the items {sorted(items)} holds a value; there is nothing to save")
    record: dict[str, Any] = {
        "meta": _as_json(meta),
        "items": {name: _describe_arrays(arrays) for name, arrays in flat.items()},
    }
    if sealed := seal.possible(root):
        record[_SEALED] = True
    place = root / f"{step}{_PART}" if sealed else root / str(step)
    try:
        _sweep(root)
        # Blocking on purpose: a small model takes 0.2 s, and the caller may donate its buffers to the next step at once.
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _SHARED_BYTES
        with context:
            ocp.save_checkpointables(place, stored, custom_metadata={_RECORD: record, "sha256": _digest(record)})
        wrong = _wrong(place, record, {name: _abstracts(arrays) for name, arrays in flat.items()})
        if not (damaged := processes.on_any(bool(wrong))) and sealed:
            seal.write(place, root / str(step))
    except Exception as error:
        if not _is_the_disk(error):
            raise
        _sweep_soon(root)
        raise SaveError(_not_saved(root, step, _first_cause(error))) from error
    if damaged:
        if jax.process_index() == 0:
            _rename_aside(root, place.name, f"{step}.corrupt")
        raise SaveError(_not_saved(root, step, f"read back, {wrong[0] if wrong else 'it differs for another process'}"))
    if jax.process_index() == 0:
        for old in steps(root)[:-keep]:
            # A step below newer ones, as after a restart from an old step, must survive its own save.
            if old != step:
                _delete(root, old, atomically=sealed)


def _delete(root: epath.Path, step: int, *, atomically: bool) -> None:
    """atomically: half of a step must not be left under its name when the process dies."""
    path = root / str(step)
    if atomically:
        path = path.rename(root / f"{step}{_PART}")
    path.rmtree()


def _sweep(root: epath.Path) -> bool:
    """Removes what saves that did not end have left; whether there was something."""
    found = False
    if jax.process_index() == 0:
        for pattern in (_ORBAX_TEMPORARY, f"*{_PART}") if root.exists() else ():
            for leftover in root.glob(pattern):
                found = True
                leftover.rmtree()
    return found


def _sweep_soon(root: epath.Path) -> None:
    """After a save that failed, as on a disk that is full anyway. Orbax's threads may still be writing, which makes the
    directories again that they write to: until nothing has come back for a while."""
    quiet = 0
    for _ in range(20):
        try:
            quiet = 0 if _sweep(root) else quiet + 1
        except OSError:
            quiet = 0
        if quiet == 3:
            return
        time.sleep(0.1)


def _not_saved(root: epath.Path, step: int, why: str) -> str:
    good = [number for number in steps(root) if number != step]
    kept = f"step {good[-1]} is the newest that is whole" if good else "there is no older one"
    return f"step {step} could not be saved in {root} ({why}); {kept}; free space or mend the disk, and run again"


def _is_the_disk(error: BaseException) -> bool:
    return any(
        isinstance(cause, OSError) or any(words in str(cause) for words in _OF_THE_DISK) for cause in _chain(error)
    )


def _flatten(item: str, tree: PyTree) -> Flat:
    """The arrays of a tree by path. Raises ValueError for a leaf that is no array and for paths that collide."""
    flat: Flat = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        _check_leaf(f"{item}/{path}" if path else item, leaf)
        if path in flat:
            raise ValueError(f"{item}/{path}: two parameters have this path; rename one")
        flat[path] = leaf
    if wrong := [path for path in flat if path and not all(map(_is_name, path.split("/")))]:
        raise ValueError(
            f"{item}/{wrong[0]!r}: no name of an array, which is short, printable and neither . nor ..; rename it"
        )
    # Orbax joins names with dots, and would let {"a.b"} overwrite {"a": {"b"}}.
    if len({path.replace("/", ".") for path in flat}) < len(flat):
        raise ValueError(f"{item}: two parameters differ in '.' and '/' only; rename one of {sorted(flat)}")
    return flat


def _check_leaf(path: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise ValueError(f"{path}: {type(leaf).__name__} is not an array; use np.asarray, or put the value into meta")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(f"{path}: {leaf.dtype} has no bits of its own; store jax.random.key_data(key)")
    if not _storable_dtype(leaf.dtype):
        raise ValueError(f"{path}: {leaf.dtype} cannot be stored; a bool, integer or float array is needed")


def _storable_dtype(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) or np.dtype(dtype).kind in "biu"


def _storable(arrays: Flat) -> Flat:
    """Orbax refuses arrays without values; the record is enough to make them again."""
    return {path: leaf for path, leaf in arrays.items() if 0 not in leaf.shape}


def nest(flat: Flat) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}. A tree that is one bare array becomes {"": x}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: its parent {parent!r} is a parameter itself; rename one")
        if name in node:
            raise ValueError(f"{path}: a parameter and a module have this path; rename one")
        node[name] = leaf
    return tree


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for name, node in tree.items():
        flat |= flatten_dict(node, f"{prefix}{name}/") if isinstance(node, Mapping) else {prefix + name: node}
    return flat


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(meta)))
    except TypeError as error:
        raise ValueError(f"meta must be JSON, {error}; convert arrays with .tolist() or float()") from error


def _describe_arrays(arrays: Flat) -> dict[str, list[Any]]:
    prints = fingerprints.of(arrays)
    return {path: [str(leaf.dtype), list(leaf.shape), *prints[path]] for path, leaf in arrays.items()}


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# --- Restore ---


def restore(directory: str | os.PathLike[str], like: Mapping[str, PyTree], step: int | None = None) -> Restored:
    """Reads the items named in `like`, and no others, from the newest good step or from `step`.

    like maps an item to the tree wanted: containers, shapes, dtypes and shardings of its leaves. A leaf is a
    jax.ShapeDtypeStruct, a jax array (both give a jax array in their sharding; a struct without one, on the first local
    device), or a numpy array (gives numpy). The sharding may differ from the one that was saved.

    A newest step that is damaged is passed over with a warning, and renamed to STEP.corrupt once an older one was read.
    A step asked for by number is never replaced by another.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it is not what `like` wants (naming every
    parameter that differs), CorruptCheckpointError if no good step is left.
    """
    wanted = {name: _abstracts(_flatten(name, tree)) for name, tree in like.items()}

    def read(step_directory: epath.Path) -> Restored:
        record = _read_record(step_directory)
        _check_fit(step_directory, record, wanted)
        _check_seal(step_directory, record, wanted)
        arrays = _read_arrays(step_directory, record, wanted)
        items = {
            name: jax.tree.unflatten(jax.tree.structure(tree), list(arrays[name].values()))
            for name, tree in like.items()
        }
        return Restored(int(step_directory.name), items, record["meta"])

    return _newest_good(_root(directory), step, read)


def restore_nested(directory: str | os.PathLike[str], item: str, step: int | None = None) -> dict[str, Any]:
    """One item as nested dicts of numpy arrays, when its containers are not known. Verifies and falls back as restore.

    Fields of named tuples and indices of lists become keys. Raises as restore does.
    """

    def read(step_directory: epath.Path) -> dict[str, Any]:
        record = _read_record(step_directory)
        _check_items(step_directory, record, [item])
        _check_seal(step_directory, record, [item])
        return nest(_read_arrays(step_directory, record, {item: _numpy_likes(record["items"][item])})[item])

    return _newest_good(_root(directory), step, read)


def _wrong(step_directory: epath.Path, record: Mapping[str, Any], wanted: Mapping[str, Flat]) -> list[str]:
    """What is not as the record says, read back a part at a time; of a part that is damaged, each array by itself."""
    found = []
    for part in _parts(wanted):
        try:
            _read_arrays(step_directory, record, part)
        except CorruptCheckpointError as error:
            # Several processes read together, or not at all.
            halves = _halves(part) if jax.process_count() == 1 else ()
            found += [line for half in halves for line in _wrong(step_directory, record, half)] or [str(error)]
    return found


def _halves(part: Mapping[str, Flat]) -> tuple[dict[str, Flat], ...]:
    """The arrays of a part in two; of a single one nothing."""
    every = [(name, path, leaf) for name, flat in part.items() for path, leaf in flat.items()]
    halves: tuple[dict[str, Flat], ...] = ({}, {}) if len(every) > 1 else ()
    for place, (name, path, leaf) in enumerate(every if halves else ()):
        halves[2 * place // len(every)].setdefault(name, {})[path] = leaf
    return halves


def _parts(wanted: Mapping[str, Flat]) -> Iterator[dict[str, Flat]]:
    """The wanted arrays in parts of at most _PART_BYTES a device, or of one array."""
    part: dict[str, Flat] = {}
    size = 0
    for name, flat in wanted.items():
        for path, leaf in flat.items():
            shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.shape
            bytes_ = int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
            if part and size + bytes_ > _PART_BYTES:
                yield part
                part, size = {}, 0
            part.setdefault(name, {})[path] = leaf
            size += bytes_
    if part:
        yield part


def _abstracts(arrays: Flat) -> Flat:
    return {path: _abstract(leaf) for path, leaf in arrays.items()}


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return _numpy_like(leaf.dtype, leaf.shape)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _numpy_like(dtype: Any, shape: Sequence[int]) -> np.ndarray:
    # Orbax gives numpy for numpy; a broadcast zero has the shape without the memory.
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), tuple(shape))


def _newest_good(root: epath.Path, step: int | None, read: Callable[[epath.Path], Result]) -> Result:
    # What the first of several processes sees: another may see a step already that is being written, or not yet.
    available = processes.joined({str(jax.process_index()): steps(root)})["0"]
    if not available or (step is not None and step not in available):
        raise _nothing_there(root, step, available)
    damaged: dict[int, CorruptCheckpointError] = {}
    for candidate in [step] if step is not None else reversed(available):
        error = None
        try:
            result = read(root / str(candidate))
        except CorruptCheckpointError as caught:
            error = caught
        if not processes.on_any(error is not None):
            _set_aside(root, damaged, candidate)
            if damaged:
                processes.meet()  # nobody looks for the newest step before it is renamed
            return result
        damaged[candidate] = error or CorruptCheckpointError("another process found it damaged")
    reasons = "\n".join(f"  step {number}: {error}" for number, error in damaged.items())
    raise CorruptCheckpointError(f"no good checkpoint in {root}:\n{reasons}") from next(iter(damaged.values()))


def _set_aside(root: epath.Path, damaged: Mapping[int, CorruptCheckpointError], good: int) -> None:
    for step, error in damaged.items():
        logging.warning("checkpoint %s/%d is damaged (%s); using step %d instead", root, step, error, good)
        if jax.process_index() == 0:
            _rename_aside(root, str(step), f"{step}.corrupt")


def set_aside(directory: str | os.PathLike[str], *, after: int, name: str) -> None:
    """Renames every step later than `after` to STEP.name, so that steps of these numbers can be saved anew."""
    root = _root(directory)
    for step in steps(root):
        if step > after:
            _rename_aside(root, str(step), f"{step}.{name}")


def _rename_aside(root: epath.Path, name: str, aside: str) -> None:
    target, again = root / aside, 2
    while target.exists():
        target, again = root / f"{aside}-{again}", again + 1
    try:
        (root / name).rename(target)
    except OSError as failure:  # a reader may lack the right, or the writer may have deleted the step by now
        logging.warning("could not rename %s/%s to %s: %s", root, name, target.name, failure)


def _read_record(step_directory: epath.Path) -> dict[str, Any]:
    """The record of a step. Raises CorruptCheckpointError, or ValueError if this module did not write the step."""
    path = step_directory / _ORBAX_METADATA
    try:
        metadata = _read_json(path)["custom_metadata"]
    except disk.FileError as error:
        raise CorruptCheckpointError(str(error)) from error
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error!r}") from error
    except OSError as error:
        raise _not_read(step_directory, repr(error)) from error
    if not isinstance(metadata, dict) or not ({_RECORD, "sha256"} & metadata.keys()):
        raise ValueError(
            f"{step_directory} was not written by sora_jax, and has no fingerprints to check; load it with orbax and "
            "save it again with sora_jax.checkpoint.save"
        )
    if _digest(metadata.get(_RECORD)) != metadata.get("sha256"):
        raise CorruptCheckpointError(f"the record in {path} does not match its digest")
    # Anyone can make a digest.
    if reason := _fault(metadata[_RECORD]):
        raise CorruptCheckpointError(f"the record in {path} is none that sora_jax writes: {reason}")
    return metadata[_RECORD]


def _read_json(path: epath.Path) -> Any:
    """A JSON file of orbax's. Raises disk.FileError if it is too large or none, FileNotFoundError."""
    if "://" not in os.fspath(path):
        return disk.read_json(path, _REMEDY, _MAX_METADATA_BYTES)
    if (size := path.stat().length) > _MAX_METADATA_BYTES:
        raise disk.FileError(f"{path} has {size} bytes, and at most {_MAX_METADATA_BYTES} are read; {_REMEDY}")
    return disk.parse_json(path.read_bytes(), path, _REMEDY)


def _fault(record: Any) -> str:
    """Why a record is not one that save has made; '' if it may be."""
    if not isinstance(record, dict) or record.keys() - {_SEALED} != {"meta", "items"}:
        return "it has not just meta and items"
    if record.get(_SEALED, True) is not True:
        return "it is neither sealed nor not"
    if not isinstance(record["meta"], dict) or not isinstance(record["items"], dict):
        return "meta or items are no names with values"
    arrays = 0
    for item, held in record["items"].items():
        if not _is_name(item) or "/" in item or not isinstance(held, dict):
            return f"{item[:100]!r} cannot be the name of an item, or holds no arrays by name"
        arrays += len(held)
        if arrays > _MAX_ARRAYS:  # before it takes seconds to look at each
            return f"it has {arrays} arrays or more, and at most {_MAX_ARRAYS} are read"
        for path, array in held.items():
            if path and not all(map(_is_name, path.split("/"))):
                return f"{path[:100]!r} cannot be the path of an array"
            if reason := _array_fault(array):
                return f"{item}/{path}: {reason}"
    return ""


def _is_name(name: str) -> bool:
    """Whether it stays in its folder, and on its line when it is shown."""
    return 0 < len(name) <= _MAX_NAME and name not in (".", "..") and name.isprintable() and "\\" not in name


def _array_fault(array: Any) -> str:
    if not isinstance(array, list) or len(array) != 4:
        return "it is not dtype, shape and two sums"
    dtype, shape, *sums = array
    try:
        known = isinstance(dtype, str) and str(jnp.dtype(dtype)) == dtype and _storable_dtype(jnp.dtype(dtype))
    except TypeError:
        known = False
    if not known:
        return f"{str(dtype)[:100]!r} is no dtype of numbers"
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        return f"{str(shape)[:100]} is no shape"
    if math.prod(shape) > _MAX_VALUES:
        return f"a shape of {str(shape)[:100]} has more than {_MAX_VALUES} values"
    if not all(type(each) is int and 0 <= each < 2**32 for each in sums):
        return f"{str(sums)[:100]} are no fingerprints"
    return ""


def _check_items(step_directory: epath.Path, record: Mapping[str, Any], names: Sequence[str]) -> None:
    if missing := sorted(set(names) - record["items"].keys()):
        held = ", ".join(sorted(record["items"]))
        raise MismatchError(f"{step_directory} has no item {', '.join(missing)}; it holds {held}")


def _check_fit(step_directory: epath.Path, record: Mapping[str, Any], wanted: Mapping[str, Flat]) -> None:
    _check_items(step_directory, record, list(wanted))
    problems = [
        problem for name, arrays in wanted.items() for problem in _item_problems(name, record["items"][name], arrays)
    ]
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        listing = "\n".join(f"  {line}" for line in problems[:_MAX_PROBLEMS] + more)
        raise MismatchError(
            f"{step_directory} does not fit this model; run with the config stored in the checkpoint "
            f"(tools/inspect_checkpoint shows it) or start in another directory:\n{listing}"
        )


def _item_problems(item: str, held: Mapping[str, Sequence[Any]], wanted: Flat) -> Iterator[str]:
    for path, leaf in wanted.items():
        name = f"{item}/{path}" if path else item
        if path not in held:
            yield f"{name}: not in the checkpoint; {leaf.dtype}{list(leaf.shape)} is needed"
            continue
        dtype, shape = held[path][:2]
        if dtype != str(leaf.dtype) or list(shape) != list(leaf.shape):
            yield f"{name}: the checkpoint has {dtype}{shape}; {leaf.dtype}{list(leaf.shape)} is needed"
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            try:
                leaf.sharding.shard_shape(leaf.shape)
            except ValueError as error:
                yield f"{name}: {error}"
    for path in held.keys() - wanted.keys():
        yield f"{item}/{path}: in the checkpoint ({held[path][0]}{held[path][1]}), but not wanted"


def _read_arrays(step_directory: epath.Path, record: Mapping[str, Any], wanted: Mapping[str, Flat]) -> dict[str, Flat]:
    """The wanted arrays by item and path, in the order of `wanted`. Raises CorruptCheckpointError."""
    request = {name: nest(_storable(arrays)) for name, arrays in wanted.items() if _storable(arrays)}
    _check_memory(step_directory, wanted)
    for name, tree in request.items():
        _check_stored(step_directory / name, record["items"][name], flatten_dict(tree))
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _damage_told(step_directory), context:
        loaded = ocp.load_checkpointables(step_directory, request) if request else {}
    arrays = {name: flatten_dict(loaded.get(name, {})) for name in wanted}
    arrays = {
        name: {path: arrays[name][path] if 0 not in leaf.shape else _zeros(leaf) for path, leaf in flat.items()}
        for name, flat in wanted.items()
    }
    for name, flat in arrays.items():
        for path, found in fingerprints.of(flat).items():
            if tuple(record["items"][name][path][2:]) != found:
                raise CorruptCheckpointError(f"{step_directory}: {name}/{path} is not what was saved (fingerprint)")
    return arrays


@contextlib.contextmanager
def _damage_told(step_directory: epath.Path) -> Iterator[None]:
    """Turns errors of orbax's into CorruptCheckpointError if they are due to the files, into ReadError if due to the machine."""
    try:
        yield
    except (disk.FileError, CorruptCheckpointError):
        raise
    except Exception as error:
        if _is_damage(error):
            raise CorruptCheckpointError(f"{step_directory} cannot be read: {_first_cause(error)}") from error
        if _is_the_machine(error):
            raise _not_read(step_directory, _first_cause(error)) from error
        raise


def _check_memory(step_directory: epath.Path, wanted: Mapping[str, Flat]) -> None:
    """Raises disk.FileError if the arrays claim more than this machine's memory: TensorStore would end the process."""
    claimed = sum(_host_bytes(leaf) for flat in wanted.values() for leaf in flat.values())
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = memory if limit == resource.RLIM_INFINITY else min(memory, limit)
    if claimed > memory:
        raise disk.FileError(
            f"{step_directory} claims arrays of {megabytes(claimed)}, and this machine has {megabytes(memory)} of memory; "
            "use one with more, or more devices"
        )


def megabytes(num_bytes: int) -> str:
    """A number of bytes for people: 12.3 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _host_bytes(leaf: Any) -> int:
    """What a leaf takes of the host's memory."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    here = [device for device in leaf.sharding.addressable_devices if device.platform == "cpu"]
    return len(here) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize if here else 0


def _check_stored(item_directory: epath.Path, held: Mapping[str, Sequence[Any]], wanted: Flat) -> None:
    """Raises CorruptCheckpointError if stored arrays claim other shapes than the record has.

    TensorStore allocates what they claim, whatever is asked for, and ends the process if it cannot. What is missing or
    cannot be read is left to it.
    """
    try:
        about = _read_json(item_directory / _ORBAX_TREE)
        use_ocdbt, name = about["use_ocdbt"], "zarr.json" if about["use_zarr3"] else ".zarray"
        where = f"{item_directory}/"
        base = where if "://" in where else {"driver": "file", "path": where}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base} if use_ocdbt else base).result()
        found = {path: store.read(f"{path.replace('/', '.')}/{name}") for path in wanted}
        for path, reading in found.items():
            if reading.result().state == "value":
                told = disk.parse_json(reading.result().value, f"{name} of {path} in {item_directory}", _REMEDY)
                _check_claim(f"{item_directory}/{path}", told, held[path][1])
    except disk.FileError as error:
        raise CorruptCheckpointError(str(error)) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        logging.debug("%s: the shapes of its arrays cannot be read: %s", item_directory, error)


def _check_claim(name: str, told: Any, shape: Sequence[int]) -> None:
    """Holds what zarr says of an array, in either of its formats, against the shape in the record."""
    parts = told["chunk_grid"]["configuration"]["chunk_shape"] if "chunk_grid" in told else told["chunks"]
    fits = told["shape"] == list(shape) and len(parts) == len(shape)
    if not fits or not all(
        type(part) is int and 0 < part <= max(1, size) for part, size in zip(parts, shape, strict=True)
    ):
        raise CorruptCheckpointError(
            f"{name} claims the shape {str(told['shape'])[:100]} in parts of {str(parts)[:100]}, and was saved as {shape}"
        )


def _zeros(leaf: Any) -> Any:
    zeros = np.zeros(leaf.shape, leaf.dtype)
    return zeros if isinstance(leaf, np.ndarray) else jax.device_put(zeros, leaf.sharding)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_cause(error: BaseException) -> str:
    first = list(_chain(error))[-1]
    return f"{type(first).__name__}: {str(first)[:200]}"


def _is_damage(error: BaseException) -> bool:
    """Whether an error of orbax's is due to the files. The request was checked against the record before.

    A bad file shows as JSON, Unicode, key or value errors (TensorStore's), or as a missing file. Lack of memory or of
    rights and a file system that is away say nothing about the files, and must not cost a good checkpoint.
    """
    for cause in _chain(error):
        if isinstance(cause, RecursionError):  # of JSON that is nested too deeply
            return True
        if isinstance(cause, RuntimeError) or _is_of_the_machine(cause):
            return False
    return any(isinstance(cause, ValueError | LookupError | FileNotFoundError) for cause in _chain(error))


def _is_the_machine(error: BaseException) -> bool:
    return any(map(_is_of_the_machine, _chain(error)))


def _is_of_the_machine(cause: BaseException) -> bool:
    told = any(status in str(cause) for status in _NOT_THE_FILES)
    absent = isinstance(cause, FileNotFoundError)
    return told or isinstance(cause, MemoryError) or (isinstance(cause, OSError) and not absent)


def _not_read(step_directory: epath.Path, why: str) -> ReadError:
    return ReadError(
        f"{step_directory} cannot be read now ({why}); nothing was changed: free memory, or mend the disk or its rights, and "
        "run again"
    )


def _check_seal(step_directory: epath.Path, record: Mapping[str, Any], items: Iterable[str]) -> None:
    if broken := _broken(step_directory, record, items):
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise CorruptCheckpointError(f"{step_directory}: {broken[0]}{more}")


def _broken(step_directory: epath.Path, record: Mapping[str, Any], items: Iterable[str]) -> list[str]:
    """What is not as the seal says, of all files but those of other items. Raises ReadError if a file cannot be read."""
    if not record.get(_SEALED):
        return []
    try:
        return seal.broken(step_directory, record["items"].keys() - set(items))
    except OSError as error:
        raise _not_read(step_directory, str(error)) from error


# --- Look ---


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The finished steps in a directory, oldest first; empty if there is no such directory."""
    root = _root(directory)
    if not root.is_dir():
        return []
    return sorted(int(child.name) for child in root.iterdir() if _is_number(child.name) and child.is_dir())


def _is_number(name: str) -> bool:
    """As save writes it: 7, and neither 07 nor a digit of another script."""
    return name.isdecimal() and len(name) < 20 and name == str(int(name))


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest step, good or not; None if there is none."""
    return max(steps(directory), default=None)


def held_items(directory: str | os.PathLike[str]) -> list[str]:
    """The items of the newest step whose record is whole; errors as for read_meta."""
    return list(_newest_record(directory, None)["items"])


def exists(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a checkpoint."""
    return bool(steps(directory))


def read_meta(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The meta of a step (if None, the newest whose record is whole). Reads no array and starts no jax backend.

    The arrays of that step may be damaged: after a restore, use the meta that it gave back.
    Raises FileNotFoundError if there is no such step, CorruptCheckpointError, or ValueError if sora_jax did not write
    it.
    """
    return _newest_record(directory, step)["meta"]


def digest(directory: str | os.PathLike[str], step: int | None = None) -> str:
    """What tells a step of a directory, or the newest, from any other: of its meta and of the fingerprints of all its arrays.

    Reads no array; errors as for read_meta.
    """
    return _digest(_newest_record(directory, step))


def _newest_record(directory: str | os.PathLike[str], step: int | None) -> dict[str, Any]:
    root = _root(directory)
    available = steps(root)
    if not available or (step is not None and step not in available):
        raise _nothing_there(root, step, available)
    for candidate in reversed(available if step is None else [step]):
        try:
            return _read_record(root / str(candidate))
        except CorruptCheckpointError as error:
            if candidate in (step, available[0]):
                raise
            logging.warning("step %d is damaged (%s); looking at the one before", candidate, error)
    raise AssertionError("unreachable: the oldest step returns or raises")


def describe(path: str | os.PathLike[str]) -> Description:
    """What a step, or the newest step of a directory, holds. Reads no array.

    Checkpoints of plain orbax are described as far as orbax's own metadata goes.
    Raises FileNotFoundError if there is none, CorruptCheckpointError if its metadata is damaged.
    """
    step_directory, siblings = _located(path)
    items, meta = _items_and_meta(step_directory)
    return Description(
        path=str(step_directory),
        step=int(step_directory.name) if step_directory.name.isdecimal() else None,
        steps=tuple(siblings),
        items=items,
        bytes_on_disk=_bytes_on_disk(step_directory),
        meta=meta,
    )


def _located(path: str | os.PathLike[str]) -> tuple[epath.Path, list[int]]:
    """The directory of a step, or of the newest step of a directory, and the numbers of all steps beside it."""
    root = _root(path)
    if _is_step(root):
        return root, steps(root.parent) if root.name.isdecimal() else []
    siblings = steps(root)
    if not siblings:
        raise _nothing_there(root, None, siblings)
    return root / str(siblings[-1]), siblings


def _root(directory: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(directory)
    # Only a local path can be relative; absolute() would damage gs://bucket.
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _is_step(path: epath.Path) -> bool:
    return (path / _ORBAX_METADATA).exists() or (path / _ORBAX_TREE).exists()


def _nothing_there(root: epath.Path, step: int | None, available: Sequence[int]) -> FileNotFoundError:
    if step is not None and available:
        return FileNotFoundError(f"no step {step} in {root}; it holds {', '.join(map(str, available))}")
    if not root.exists():
        return FileNotFoundError(f"no checkpoint: {root} does not exist")
    near = [child for child in root.iterdir() if child.is_dir() and steps(child)]
    hint = f"; did you mean {sorted(near)[0]}?" if near else ""
    return FileNotFoundError(f"no checkpoint: {root} holds no steps{hint}")


def _items_and_meta(step_directory: epath.Path) -> tuple[dict[str, tuple[ArrayInfo, ...]], dict[str, Any]]:
    # What has neither orbax's record nor our seal was never ours.
    plain = not any((step_directory / name).exists() for name in (_ORBAX_METADATA, seal.FILE))
    try:
        record = None if plain else _read_record(step_directory)
    except CorruptCheckpointError:
        raise
    except ValueError:
        record = None
    if record is None:
        return _plain_items(step_directory), _plain_meta(step_directory)
    items = {
        name: _with_shardings(
            step_directory / name,
            tuple(ArrayInfo(path, tuple(shape), dtype) for path, (dtype, shape, *_) in arrays.items()),
        )
        for name, arrays in record["items"].items()
    }
    return items, record["meta"]


def _with_shardings(item_directory: epath.Path, infos: tuple[ArrayInfo, ...]) -> tuple[ArrayInfo, ...]:
    """With what orbax keeps of how arrays were laid over devices; it is told, not used, so what is no such thing is passed over."""
    try:
        told = _read_json(item_directory / _ORBAX_SHARDING)
        found = {base64.urlsafe_b64decode(name).decode(): _sharding_words(text) for name, text in told.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return infos
    return tuple(dataclasses.replace(info, sharding=found.get(info.path.replace("/", "."), "")) for info in infos)


def _sharding_words(text: str) -> str:
    told = disk.parse_json(text, _ORBAX_SHARDING)
    sizes = dict(zip(told.get("axis_names", ()), told.get("shape", ()), strict=False))
    spec = [[axis] if isinstance(axis, str) else axis or [] for axis in told.get("partition_spec", ())]
    words = [" ".join(f"{axis} {sizes[axis]}" for axis in axes if sizes.get(axis, 1) != 1) or "-" for axes in spec]
    return ", ".join(words)[:_MAX_NAME] if set(words) - {"-"} else ""


def _plain_items(step_directory: epath.Path) -> dict[str, tuple[ArrayInfo, ...]]:
    with _damage_told(step_directory):
        try:
            trees = ocp.checkpointables_metadata(step_directory).metadata
        except ocp.errors.InvalidLayoutError:  # of one tree without items
            trees = {"state": ocp.metadata(step_directory).metadata}
        places = {name: step_directory / name for name in trees}
        return {
            name: _with_shardings(places[name] if places[name].exists() else step_directory, tuple(_plain_arrays(tree)))
            for name, tree in trees.items()
        }


def _plain_arrays(tree: PyTree) -> Iterator[ArrayInfo]:
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            yield ArrayInfo(path, tuple(leaf.shape), str(jnp.dtype(leaf.dtype)))


def _plain_meta(step_directory: epath.Path) -> dict[str, Any]:
    if not (step_directory / _ORBAX_METADATA).exists():
        return {}
    with _damage_told(step_directory):
        metadata = _read_json(step_directory / _ORBAX_METADATA)["custom_metadata"]
    return metadata if isinstance(metadata, dict) else {}


def _bytes_on_disk(path: epath.Path) -> int:
    if path.is_dir():
        return sum(_bytes_on_disk(child) for child in path.iterdir() if not os.path.islink(child))
    return path.stat().length


# --- Read everything ---


class Verified(NamedTuple):
    """What verify found: wrong says what is not as it was saved, a line each. Without fingerprints arrays are only read."""

    path: str
    num_arrays: int
    fingerprints: bool
    wrong: tuple[str, ...]


class Change(NamedTuple):
    """How one array differs: the norm of the difference and that of the first, or None where only one has it or shapes differ."""

    item: str
    path: str
    before: ArrayInfo | None
    after: ArrayInfo | None
    norms: tuple[float, float] | None


def verify(path: str | os.PathLike[str]) -> Verified:
    """Holds every file of a step, or of the newest step of a directory, against the seal, and every array against its fingerprint.

    Raises FileNotFoundError if there is no checkpoint.
    """
    step_directory, _ = _located(path)
    try:
        record = _read_record(step_directory)
    except CorruptCheckpointError as error:
        return Verified(str(step_directory), 0, True, (str(error),))
    except ValueError:
        record = None
    if record is None:  # of plain orbax
        try:
            found = {name: _plain_arrays_of(step_directory, name) for name in _plain_items(step_directory)}
        except Exception as error:
            return Verified(str(step_directory), 0, False, (_first_cause(error),))
        return Verified(str(step_directory), sum(map(len, found.values())), False, ())
    wanted = {name: _numpy_likes(arrays) for name, arrays in record["items"].items()}
    wrong = [f"{step_directory}: {line}" for line in _broken(step_directory, record, wanted)]
    try:
        wrong += _wrong(step_directory, record, wanted)
    except Exception as error:
        if not wrong:
            raise
        wrong.append(_first_cause(error))  # of files that are known to be damaged anything may come
    return Verified(str(step_directory), sum(map(len, wanted.values())), True, tuple(wrong))


def changes(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> list[Change]:
    """The arrays in which two checkpoints differ, one item in memory at a time. Raises as describe, and for damaged arrays."""
    (before, _), (after, _) = _located(one), _located(other)
    items = _items_and_meta(before)[0], _items_and_meta(after)[0]
    found = []
    for item in dict.fromkeys((*items[0], *items[1])):
        infos = [{info.path: info for info in each.get(item, ())} for each in items]
        arrays = [
            _item_arrays(where, item) if item in each else {}
            for where, each in zip((before, after), items, strict=True)
        ]
        for path in dict.fromkeys((*infos[0], *infos[1])):
            was, now = infos[0].get(path), infos[1].get(path)
            if was is None or now is None or was.shape != now.shape:
                found.append(Change(item, path, was, now, None))
                continue
            first, second = (np.asarray(flat[path], np.float64) for flat in arrays)
            if was.dtype != now.dtype or not np.array_equal(first, second, equal_nan=True):
                norms = float(np.linalg.norm(second - first)), float(np.linalg.norm(first))
                found.append(Change(item, path, was, now, norms))
    return found


def _item_arrays(step_directory: epath.Path, item: str) -> Flat:
    """The arrays of one item in host memory, verified where there are fingerprints."""
    try:
        record = _read_record(step_directory)
    except CorruptCheckpointError:
        raise
    except ValueError:
        return _plain_arrays_of(step_directory, item)
    _check_seal(step_directory, record, [item])
    return _read_arrays(step_directory, record, {item: _numpy_likes(record["items"][item])})[item]


def _numpy_likes(arrays: Mapping[str, Sequence[Any]]) -> Flat:
    return {path: _numpy_like(dtype, shape) for path, (dtype, shape, *_) in arrays.items()}


def _plain_arrays_of(step_directory: epath.Path, item: str) -> Flat:
    """One item of a checkpoint that plain orbax wrote, in host memory, whatever devices it was on."""

    def on_host(leaf: Any) -> Any:
        return _numpy_like(leaf.dtype, leaf.shape) if hasattr(leaf, "shape") else leaf

    infos = _plain_items(step_directory)[item]
    _check_memory(step_directory, {item: {info.path: _numpy_like(info.dtype, info.shape) for info in infos}})
    with _damage_told(step_directory):
        try:
            metadata = ocp.checkpointables_metadata(step_directory).metadata[item]
        except ocp.errors.InvalidLayoutError:  # of one tree without items
            tree = ocp.load(step_directory, jax.tree.map(on_host, ocp.metadata(step_directory).metadata))
        else:
            tree = ocp.load_checkpointables(step_directory, {item: jax.tree.map(on_host, metadata)})[item]
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}

"""Reads the tensors of a state dict that torch.save wrote, without torch and without running what the file says.

A pickle is a program. pickle.load would run it with all of Python at hand; here the few instructions that a state dict is
made of act on plain values, the names it may ask for are those below, and anything else is an error. Both containers
are read: the zip archive of torch 1.6 and later, and the older one of pickles in a row with the storages after them
(the formats are those of torch/serialization.py).
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import disk

MAX_FILE_BYTES = 2**29
MAX_TENSOR_BYTES = 2**29  # of all tensors together: with strides of 0 a small file can claim far more than it holds
MAX_PICKLE_BYTES = 2**24  # of a pickle in a zip archive; a network of 1000 tensors needs 2**17
MAX_INSTRUCTIONS = 2**20
MAX_AXES = 16
LEGACY_START, LEGACY_VERSION = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e"), 1001  # a pickled magic number
REMEDY = "save the weights alone, with torch.save(model.state_dict(), path), and take files only from where you trust"

STORAGES: Mapping[str, np.dtype] = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a state dict by its name, in the file's order, each a contiguous array of its own.

    The file holds a state dict, or a dict with one under "state_dict"; other values, such as the number of an epoch, are
    left out. Raises FileNotFoundError if there is no file; disk.FileError if it is not of either format, is cut off, is
    larger than the caps above, or asks for anything but tensors of the types above (bfloat16 is not one).
    """
    path = Path(path)
    # In memory, where a length that a file claims allocates nothing beyond what the file has.
    file = io.BytesIO(disk.read_bytes(path, MAX_FILE_BYTES, REMEDY))
    try:
        return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except (*disk.ARCHIVE_ERRORS, struct.error) as error:
        raise disk.FileError(f"{path}: {error}") from error


# The values a file is made of ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Name:
    """A Python object that the file asks for by name; it is never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat array in the file, under its key."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count items."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        axes_agree = len(self.shape) == len(self.strides) <= MAX_AXES
        if not axes_agree or min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError(f"a tensor has {len(self.shape)} axes and {len(self.strides)} strides, or negative ones")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= self.storage.count:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage of {self.storage.count} items")

    @property
    def num_bytes(self) -> int:
        return self.storage.dtype.itemsize * math.prod(self.shape)


def _tensor(arguments: Sequence[Any]) -> _Tensor:
    """What torch._utils._rebuild_tensor and its second version make: (storage, offset, shape, strides, ...)."""
    match arguments:
        case [_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_]:
            if all(isinstance(number, int) for number in (*shape, *strides)):
                return _Tensor(storage, offset, shape, strides)
    raise ValueError("a tensor of the file is described by values of the wrong types")


def _parameter(arguments: Sequence[Any]) -> Any:
    return arguments[0] if arguments else None


def _ordered_dict(arguments: Sequence[Any]) -> dict:
    if arguments:
        raise ValueError("an OrderedDict of the file is not made empty and then filled")
    return {}


CALLS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


# Pickles -------------------------------------------------------------------------------------------------------------

_MARK = object()


def _unpickle(file: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """The value of one pickle, made of None, bool, int, float, str, list, tuple, dict and _Tensor; and its storages.

    Leaves file behind it. Instructions are those of pickle protocol 2, which torch.save writes.
    """
    storages: dict[str, _Storage] = {}
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop(wanted: type | tuple[type, ...] = object) -> Any:
        if not stack or stack[-1] is _MARK or not isinstance(stack[-1], wanted):
            raise ValueError("its pickle is damaged: a value is not where it should be")
        return stack.pop()

    def pop_to_mark() -> list[Any]:
        values = []
        while stack and stack[-1] is not _MARK:
            values.append(stack.pop())
        if not stack:
            raise ValueError("its pickle is damaged: a mark is missing")
        stack.pop()
        return values[::-1]

    def top(wanted: type) -> Any:
        value = pop(wanted)
        stack.append(value)
        return value

    for code, argument in _instructions(file):
        match code:
            case "PROTO":
                if argument > 2:
                    raise ValueError(
                        f"it is of pickle protocol {argument}; torch.save writes protocol 2 if not told else"
                    )
            case "STOP":
                return pop(), storages
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_allowed(argument))
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [pop() for _ in range(int(code[-1]))]
                stack.append(tuple(values[::-1]))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = pop()
                top(list).append(value)
            case "APPENDS":
                values = pop_to_mark()
                top(list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = pop(), pop()
                _fill(top(dict), [key, value])
            case "SETITEMS":
                values = pop_to_mark()
                _fill(top(dict), values)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise ValueError("its pickle is damaged: it asks for a value that it never kept")
                stack.append(memo[argument])
            case "BINPERSID":
                storage = _storage(pop(tuple))
                stack.append(storages.setdefault(storage.key, storage))
            case "REDUCE":
                arguments, function = pop(tuple), pop(_Name)
                if function.name not in CALLS:
                    raise ValueError(f"it calls {function.name}; {REMEDY}")
                stack.append(CALLS[function.name](arguments))
            case "BUILD":
                # The attributes of an OrderedDict, where torch keeps versions of modules: not needed.
                pop()
                top(dict)
            case _:
                raise ValueError(f"its pickle has the instruction {code}, which no state dict needs; {REMEDY}")
    raise ValueError("its pickle ends too early")


def _instructions(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction of a pickle. Raises ValueError if there are too many or it is damaged."""
    instructions = pickletools.genops(file)
    for _ in range(MAX_INSTRUCTIONS):
        try:
            instruction, argument, _ = next(instructions)
        except StopIteration:
            return
        except (ValueError, UnicodeError, struct.error) as error:
            raise ValueError("a pickle in it is damaged") from error
        yield instruction.name, argument
    raise ValueError(f"a pickle in it has more than {MAX_INSTRUCTIONS} instructions")


def _allowed(name: str) -> _Name:
    if name not in STORAGES and name not in CALLS:
        raise ValueError(f"it asks for {name[:100]!r}, which is refused; {REMEDY}")
    return _Name(name)


def _fill(items: dict, keys_and_values: Sequence[Any]) -> None:
    """Puts in what alternates. A key is a string or a number: to hash nested tuples can take for ever."""
    keys, values = keys_and_values[::2], keys_and_values[1::2]
    if len(keys) != len(values) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError("a dict of the file has keys that are neither strings nor whole numbers")
    items.update(zip(keys, values, strict=True))


def _storage(identity: tuple) -> _Storage:
    """From ("storage", type, key, device, count) and, in the older format, a view, which torch always left at None."""
    match identity:
        case ("storage", _Name(name), str(key), _, int(count)) | (
            "storage",
            _Name(name),
            str(key),
            _,
            int(count),
            None,
        ):
            if name in STORAGES and count >= 0:
                return _Storage(key, STORAGES[name], count)
    raise ValueError("a storage of the file is described by values of the wrong types")


# Containers ----------------------------------------------------------------------------------------------------------


def _read_zip(file: io.BytesIO) -> dict[str, np.ndarray]:
    """NAME/data.pkl is the pickle, NAME/data/KEY the bytes of a storage; nothing is compressed."""
    disk.check_archive(file.getvalue())
    with zipfile.ZipFile(file) as archive:

        def read(name: str, max_bytes: int) -> bytes:
            try:
                entry = archive.getinfo(name)
            except KeyError:
                raise ValueError(f"it is a zip archive without {name[:100]}, so not one of torch.save") from None
            # torch compresses nothing, and what is not compressed cannot unfold in memory.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > max_bytes:
                raise ValueError(f"{name[:100]} in it is compressed or has more than {max_bytes} bytes")
            return archive.read(entry)

        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} data.pkl, so not one of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and read(f"{folder}byteorder", 16) != b"little":
            raise ValueError("its numbers are big-endian; save it on a little-endian machine")
        value, _ = _unpickle(io.BytesIO(read(pickles[0], MAX_PICKLE_BYTES)))
        return _arrays(_state_dict(value), lambda storage: read(f"{folder}data/{storage.key}", storage.num_bytes))


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    """After the magic number, pickles of a version, the machine, the state dict and the keys of storages; then these.

    Each storage is its number of items, int64, and the items.
    """
    file.seek(0)
    if file.read(len(LEGACY_START)) != LEGACY_START:
        raise ValueError("it is no file of torch.save")
    (version, _), (machine, _) = _unpickle(file), _unpickle(file)
    if version != LEGACY_VERSION:
        raise ValueError("its version is none of torch.save's")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian; save it on a little-endian machine")
    value, storages = _unpickle(file)
    tensors = _state_dict(value)
    keys, _ = _unpickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
        raise ValueError("the storages that it lists are not those that its tensors use")
    contents: dict[str, bytes] = {}
    for key in keys:
        if int.from_bytes(_exactly(file, 8), "little") != storages[key].count:
            raise ValueError("a storage of it has another size than its tensors say")
        contents[key] = _exactly(file, storages[key].num_bytes)
    return _arrays(tensors, lambda storage: contents[storage.key])


def _exactly(file: io.BytesIO, num_bytes: int) -> bytes:
    content = file.read(min(num_bytes, MAX_FILE_BYTES))
    if len(content) != num_bytes:
        raise ValueError("it ends too early; fetch it again")
    return content


def _state_dict(value: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict. Raises ValueError if there is none, or if they are too large."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__.strip('_')}, not a state dict; {REMEDY}")
    tensors = {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, _Tensor)}
    if not tensors:
        raise ValueError(f"its dict holds no tensor; {REMEDY}")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    num_bytes = max(sum(each.num_bytes for each in kind.values()) for kind in (tensors, storages))
    if num_bytes > MAX_TENSOR_BYTES:
        raise ValueError(f"its tensors claim {num_bytes} bytes; at most {MAX_TENSOR_BYTES} are read")
    return tensors


def _arrays(tensors: Mapping[str, _Tensor], content_of: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    contents: dict[str, bytes] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in contents:
            contents[storage.key] = content_of(storage)
        if len(contents[storage.key]) != storage.num_bytes:
            raise ValueError(f"the storage of {name[:100]} is shorter than its tensors say; fetch it again")
        items = np.frombuffer(contents[storage.key], storage.dtype, storage.count)
        # Safe: _Tensor has checked that shape, strides and offset stay within the storage.
        strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(items[tensor.offset :], tensor.shape, strides, writeable=False)
        arrays[name] = view.copy()
    return arrays

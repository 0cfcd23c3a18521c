"""Encoded clips on disk: posterior means and standard deviations of normalised latents, sizes, frame rates and captions.

A store is a folder of .npy files, of which a clip's part is read when it is asked for, so that it may exceed memory; written
once, beside and renamed. Files are opened for every clip, not mapped: a disk that is away is an error that can be waited for,
not a signal that ends the process. numpy only: loader workers read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sora_jax import disk


@dataclasses.dataclass(frozen=True)
class Latent:
    """One encoded clip; mean and std are (t, h, w, c), the rest is as in structs.Clip."""

    id: int
    mean_thwc: np.ndarray
    std_thwc: np.ndarray
    fps: float
    captions: tuple[str, ...]
    to_and_fro: bool = False


# Of how a store is written: part of its meta, so that one written otherwise is not taken for this.
FORMAT = 3


REMEDY = "delete the folder to encode anew"


class DamagedClipError(disk.FileError):
    """What is stored of a clip is not what was written."""


class LatentStore:
    """Random access to the latents of a folder. Raises FileNotFoundError if it is not a store, disk.FileError if its files
    do not go together.

    Reading a clip raises DamagedClipError, or OSError if the files cannot be read now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise FileNotFoundError(f"{folder} holds no encoded clips (store.json is missing)")
        told = disk.read_json(folder / "store.json", REMEDY, MAX_STORE_BYTES)
        try:
            self.meta, self.captions = told["meta"], told["captions"]
        except (LookupError, TypeError) as error:
            raise disk.FileError(f"{folder / 'store.json'} lacks meta or captions; {REMEDY}") from error
        arrays = {name: disk.read_npy(folder / f"{name}.npy", REMEDY) for name in PER_CLIP}
        self.shapes, self.fps, self.caption_ids, self.ids, self.checks, self.to_and_fro = arrays.values()
        found = {name: _header(folder / f"{name}.npy") for name in VALUES}
        self._offsets = {name: offset for name, (offset, _) in found.items()}
        length, self.channels = found["mean"][1]
        if reason := self._fault(length) or (found["mean"][1] != found["std"][1] and "mean and std have two shapes"):
            raise disk.FileError(f"{folder}: {reason}; {REMEDY}")
        self.starts = np.concatenate([[0], np.cumsum(np.prod(self.shapes, axis=1))])

    def _fault(self, length: int) -> str:
        """Why the parts are not of one store with `length` positions; '' if they are."""
        for name, (kind, axes) in PER_CLIP.items():
            array = getattr(self, name)
            if array.dtype != kind or array.ndim != axes or len(array) != len(self.ids):
                return f"{name}.npy holds {array.dtype}{list(array.shape)}, not {kind}[{len(self.ids)}]"
        # In Python's numbers, as products of hostile ones go round in numpy's.
        sizes = [math.prod(shape) if min(shape) > 0 else -1 for shape in self.shapes.tolist() if len(shape) == 3]
        if len(sizes) != len(self.ids) or min(sizes, default=0) < 0 or sum(sizes) != length or length > MAX_POSITIONS:
            return f"shapes.npy does not add up to the {length} positions of mean.npy"
        if not (
            np.isfinite(self.fps).all() and (self.fps > 0).all() and (self.ids >= 0).all() and (self.ids < 2**31).all()
        ):
            return "a frame rate or the number of a clip is out of range"
        if not isinstance(self.captions, list) or not all(isinstance(caption, str) for caption in self.captions):
            return "captions are not strings"
        if self.caption_ids.max(initial=-1) >= len(self.captions) or not (self.caption_ids >= 0).any(axis=1).all():
            return "a clip has no caption, or one that is not there"
        return ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Latent:
        start, end = self.starts[number], self.starts[number + 1]
        shape = (*self.shapes[number], self.channels)
        parts = [self._part(name, int(start), int(end)) for name in VALUES]
        if _check(parts) != self.checks[number]:
            raise DamagedClipError(f"clip {number} of {self.folder} is not what was written; {REMEDY}")
        mean_thwc, std_thwc = (np.frombuffer(part, np.float16).reshape(shape) for part in parts)
        return Latent(
            id=int(self.ids[number]),
            mean_thwc=mean_thwc,
            std_thwc=std_thwc,
            fps=float(self.fps[number]),
            captions=tuple(self.captions[i] for i in self.caption_ids[number] if i >= 0),
            to_and_fro=bool(self.to_and_fro[number]),
        )

    def values(self, name: str) -> np.ndarray:
        """All that is stored of one of VALUES, float16 (positions, channels). Raises disk.FileError if the file is shorter."""
        length = int(self.starts[-1])
        found = np.frombuffer(self._part(name, 0, length), np.float16)
        if found.size != length * self.channels:
            raise disk.FileError(f"{self.folder / f'{name}.npy'} is cut short; {REMEDY}")
        return found.reshape(length, self.channels)

    def _part(self, name: str, start: int, end: int) -> bytes:
        value = self.channels * np.dtype(np.float16).itemsize
        with disk.open_file(self.folder / f"{name}.npy", disk.ANY_SIZE, REMEDY) as file:
            here, there = (self._offsets[name] + place * value for place in (start, end))
            # What the file does not have would be allocated before it is missed.
            if there > os.fstat(file.fileno()).st_size:
                return b""
            file.seek(here)
            return file.read(there - here)


VALUES = ("mean", "std")
# dtype and number of axes of what is stored of each clip beside its values.
PER_CLIP = {"shapes": ("int64", 2), "fps": ("float32", 1), "caption_ids": ("int32", 2), "ids": ("int64", 1)} | {
    "checks": ("uint32", 1),
    "to_and_fro": ("bool", 1),
}
MAX_POSITIONS = 2**48  # what is larger is no store, and sums of it would go round
MAX_STORE_BYTES = 2**28  # of store.json: a million captions


def _check(parts: Iterable[bytes]) -> int:
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return check


def _header(path: Path) -> tuple[int, tuple[int, int]]:
    """Where the values of an .npy file begin, and its (positions, channels). Raises disk.FileError, OSError as open does."""
    with disk.open_file(path, disk.ANY_SIZE, REMEDY) as file:
        shape, fortran, dtype = disk.npy_header(file, str(path), REMEDY)
        if len(shape) != 2 or fortran or dtype != np.float16:
            raise disk.FileError(f"{path} holds {dtype}{list(shape)}, not float16[positions, channels]; {REMEDY}")
        return file.tell(), (shape[0], shape[1])


def write(folder: Path, latents: Iterable[Latent], meta: dict) -> LatentStore:
    """Write a store in one go; the folder appears when it is whole. meta says how it was made."""
    items = list(latents)
    if not items:
        raise ValueError(f"no clips to write to {folder}")
    channels = items[0].mean_thwc.shape[-1]
    words: dict[str, int] = {}
    most = max(len(item.captions) for item in items)
    caption_ids = np.full((len(items), most), -1, np.int32)
    for number, item in enumerate(items):
        for place, caption in enumerate(item.captions):
            caption_ids[number, place] = words.setdefault(caption, len(words))
    arrays: dict[str, np.ndarray] = {
        "mean": np.concatenate([item.mean_thwc.reshape(-1, channels) for item in items]).astype(np.float16),
        "std": np.concatenate([item.std_thwc.reshape(-1, channels) for item in items]).astype(np.float16),
        "shapes": np.array([item.mean_thwc.shape[:3] for item in items], np.int64),
        "fps": np.array([item.fps for item in items], np.float32),
        "ids": np.array([item.id for item in items], np.int64),
        "caption_ids": caption_ids,
        "to_and_fro": np.array([item.to_and_fro for item in items], bool),
    }
    ends = np.cumsum(np.prod(arrays["shapes"], axis=1))[:-1]
    pieces = zip(*(np.split(arrays[name], ends) for name in VALUES), strict=True)
    arrays["checks"] = np.array([_check(part.tobytes() for part in parts) for parts in pieces], np.uint32)
    with _appearing(folder) as partial:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "store.json").write_text(json.dumps({"meta": meta, "captions": list(words)}))
    return LatentStore(folder)


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it, whatever was there, once all is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def join(folder: Path, parts: Sequence[LatentStore], meta: dict) -> LatentStore:
    """The store that write would have made of all clips of the parts, in order, whose values are copied part by part."""
    words: dict[str, int] = {}
    most = max(part.caption_ids.shape[1] for part in parts)
    caption_ids = []
    for part in parts:
        places = np.array([words.setdefault(caption, len(words)) for caption in part.captions] + [-1], np.int32)
        ids = places[part.caption_ids]  # -1, which is none, is the last of the places
        caption_ids.append(np.pad(ids, ((0, 0), (0, most - ids.shape[1])), constant_values=-1))
    with _appearing(folder) as partial:
        for name in VALUES:
            shape = (int(sum(part.starts[-1] for part in parts)), parts[0].channels)
            values = np.lib.format.open_memmap(partial / f"{name}.npy", "w+", np.float16, shape)
            end = 0
            for part in parts:
                start, end = end, end + int(part.starts[-1])
                values[start:end] = part.values(name)
            values.flush()
        for name in PER_CLIP:
            arrays = caption_ids if name == "caption_ids" else [getattr(part, name) for part in parts]
            np.save(partial / f"{name}.npy", np.concatenate(arrays))
        (partial / "store.json").write_text(json.dumps({"meta": meta, "captions": list(words)}))
    return LatentStore(folder)


def unique_captions(stores: Sequence[LatentStore]) -> list[str]:
    return list(dict.fromkeys(caption for store in stores for caption in store.captions))

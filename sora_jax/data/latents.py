"""Encoded clips on disk: posterior means and standard deviations of normalised latents, sizes, frame rates and captions.

A store is a folder of .npy files, of which a clip's part is read when it is asked for, so that it may exceed memory; written
once, beside and renamed. Files are opened for every clip, not mapped: a disk that is away is an error that can be waited for,
not a signal that ends the process. numpy only: loader workers read it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Latent:
    """One encoded clip; mean and std are (t, h, w, c)."""

    id: int
    mean_thwc: np.ndarray
    std_thwc: np.ndarray
    fps: float
    captions: tuple[str, ...]


# Of how a store is written: part of its meta, so that one written otherwise is not taken for this.
FORMAT = 2


class DamagedClipError(ValueError):
    """What is stored of a clip is not what was written."""


class LatentStore:
    """Random access to the latents of a folder. Raises FileNotFoundError if it is not a store.

    Reading a clip raises DamagedClipError, or OSError if the files cannot be read now.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise FileNotFoundError(f"{folder} holds no encoded clips (store.json is missing)")
        meta = json.loads((folder / "store.json").read_text())
        self.folder, self.meta = folder, meta["meta"]
        self.captions: list[str] = meta["captions"]
        self.shapes = np.load(folder / "shapes.npy", allow_pickle=False)
        self.fps = np.load(folder / "fps.npy", allow_pickle=False)
        self.caption_ids = np.load(folder / "caption_ids.npy", allow_pickle=False)
        self.ids = np.load(folder / "ids.npy", allow_pickle=False)
        self.starts = np.concatenate([[0], np.cumsum(np.prod(self.shapes, axis=1))])
        self.checks = np.load(folder / "checks.npy", allow_pickle=False)
        found = {name: _header(folder / f"{name}.npy", int(self.starts[-1])) for name in VALUES}
        self._offsets = {name: offset for name, (offset, _) in found.items()}
        self.channels = found["mean"][1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Latent:
        start, end = self.starts[number], self.starts[number + 1]
        shape = (*self.shapes[number], self.channels)
        parts = [self._part(name, int(start), int(end)) for name in VALUES]
        if _check(parts) != self.checks[number]:
            raise DamagedClipError(
                f"clip {number} of {self.folder} is not what was written; delete the folder to encode anew"
            )
        mean_thwc, std_thwc = (np.frombuffer(part, np.float16).reshape(shape) for part in parts)
        return Latent(
            id=int(self.ids[number]),
            mean_thwc=mean_thwc,
            std_thwc=std_thwc,
            fps=float(self.fps[number]),
            captions=tuple(self.captions[i] for i in self.caption_ids[number] if i >= 0),
        )

    def _part(self, name: str, start: int, end: int) -> bytes:
        value = self.channels * np.dtype(np.float16).itemsize
        with (self.folder / f"{name}.npy").open("rb") as file:
            file.seek(self._offsets[name] + start * value)
            return file.read((end - start) * value)


VALUES = ("mean", "std")


def _check(parts: Iterable[bytes]) -> int:
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return check


def _header(path: Path, length: int) -> tuple[int, int]:
    """Where the values of an .npy file of `length` positions begin, and how many channels they have. Raises DamagedClipError."""
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise DamagedClipError(f"{path} is no array file ({error}); delete the folder to encode anew") from error
        if len(shape) != 2 or shape[0] != length or fortran or dtype != np.float16:
            raise DamagedClipError(
                f"{path} holds {dtype}{list(shape)}, not float16[{length}, channels]; delete the folder"
            )
        return file.tell(), shape[1]


def write(folder: Path, latents: Iterable[Latent], meta: dict) -> LatentStore:
    """Write a store in one go; the folder appears when it is whole. meta says how it was made."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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
    }
    ends = np.cumsum(np.prod(arrays["shapes"], axis=1))[:-1]
    pieces = zip(*(np.split(arrays[name], ends) for name in VALUES), strict=True)
    arrays["checks"] = np.array([_check(part.tobytes() for part in parts) for parts in pieces], np.uint32)
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    (partial / "store.json").write_text(json.dumps({"meta": meta, "captions": list(words)}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return LatentStore(folder)


def unique_captions(stores: Sequence[LatentStore]) -> list[str]:
    return list(dict.fromkeys(caption for store in stores for caption in store.captions))

"""Encoded clips on disk: posterior means and standard deviations of normalised latents, sizes, frame rates and captions.

A store is a folder of .npy files, read through memory maps, so that it may exceed memory; written once, beside and renamed.
numpy only: loader workers read it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
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


class LatentStore:
    """Random access to the latents of a folder. Raises FileNotFoundError if it is not a store."""

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
        self.mean = np.load(folder / "mean.npy", mmap_mode="r", allow_pickle=False)
        self.std = np.load(folder / "std.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Latent:
        start, end = self.starts[number], self.starts[number + 1]
        shape = (*self.shapes[number], self.mean.shape[-1])
        return Latent(
            id=int(self.ids[number]),
            mean_thwc=self.mean[start:end].reshape(shape),
            std_thwc=self.std[start:end].reshape(shape),
            fps=float(self.fps[number]),
            captions=tuple(self.captions[i] for i in self.caption_ids[number] if i >= 0),
        )


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
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    (partial / "store.json").write_text(json.dumps({"meta": meta, "captions": list(words)}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return LatentStore(folder)


def unique_captions(stores: Sequence[LatentStore]) -> list[str]:
    return list(dict.fromkeys(caption for store in stores for caption in store.captions))

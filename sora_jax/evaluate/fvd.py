"""Frechet video distance as published (Unterthiner et al., arXiv:1812.01717): the logits of I3D, one protocol, in code.

16 frames a video, 224 x 224 pixels by bilinear resizing, values in [-1, 1], 2048 videos a side. Every one of these moves
the number, so none is a setting but the count, which the result carries in its name. The frame rate moves it too and is
the caller's: real and made videos must have the same.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from sora_jax.evaluate import frechet, i3d

NUM_VIDEOS = 2048
NUM_FRAMES = 16
SIDE = 224  # pixels
# 200 MB of the first layer's activations.
BATCH_VIDEOS = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """A distance with what it depends on; str() is fit for a table.

    weights_sha256 is of the file of I3D's weights: distances of different files are on different scales.
    """

    value: float
    num_videos: int
    weights_sha256: str

    @property
    def name(self) -> str:
        """'FVD' for the published 2048 videos a side; with fewer the distance is biased upwards, and N is named."""
        return "FVD" if self.num_videos == NUM_VIDEOS else f"FVD (N={self.num_videos})"

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1f}"


def fvd(
    real_videos: Sequence[np.ndarray],
    made_videos: Sequence[np.ndarray],
    weights_path: str | Path,
    num_videos: int | None = None,
) -> Result:
    """Frechet distance between real and made videos in the logits of I3D. Raises as distances does."""
    return distances(real_videos, {"made": made_videos}, weights_path, num_videos)["made"]


def distances(
    real_videos: Sequence[np.ndarray],
    sets: Mapping[str, Sequence[np.ndarray]],
    weights_path: str | Path,
    num_videos: int | None = None,
) -> dict[str, Result]:
    """Frechet distance between real videos and each of some sets by name, in the logits of I3D.

    Videos are uint8 RGB (T, H, W, 3) of any sizes; the first 16 frames of the first 2048 videos of each side are
    compared, or of the first num_videos, so shuffle a sorted set before. A sequence may read its videos when indexed.
    weights_path is a file for i3d.load_weights. Raises ValueError for too few or too short videos or weights that are
    not I3D's, FileNotFoundError if there is no such file.
    """
    every = {"real": real_videos, **sets}
    for name, videos in every.items():
        _check_count(len(videos), name, num_videos)
    count = NUM_VIDEOS if num_videos is None else num_videos
    params, weights = i3d.load_weights(weights_path), _sha256(Path(weights_path))
    found = {name: frechet.statistics(embed(params, videos, count, name)) for name, videos in every.items()}
    return {name: Result(float(frechet.distance(found["real"], found[name])), count, weights) for name in sets}


def embed(params: i3d.Params, videos: Sequence[np.ndarray], count: int, name: str) -> Float[np.ndarray, "N 400"]:
    """Logits of the first `count` videos; name is for messages. Raises ValueError for a video that is too short."""
    batches = []
    for start in range(0, count, BATCH_VIDEOS):
        numbers = range(start, min(start + BATCH_VIDEOS, count))
        # The last batch repeats its last video, so that one shape is compiled.
        clips = [preprocess(videos[number], f"{name} video {number}") for number in numbers]
        clips += clips[-1:] * (min(BATCH_VIDEOS, count) - len(clips))
        batches.append(np.asarray(_logits(params, np.stack(clips)))[: len(numbers)])
    return np.concatenate(batches)


def preprocess(frames_THWC: np.ndarray, name: str) -> Float[np.ndarray, "16 224 224 3"]:
    """The first 16 frames as I3D reads them: 224 x 224 whatever the aspect, float32 in [-1, 1].

    Raises ValueError for a video that is not uint8 RGB or has fewer frames.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or 0 in frames_THWC.shape:
        raise ValueError(
            f"{name} is {frames_THWC.dtype}{list(frames_THWC.shape)}; FVD needs uint8 (T, H, W, 3): "
            "map [-1, 1] to [0, 255] first"
        )
    if len(frames_THWC) < NUM_FRAMES:
        raise ValueError(f"{name} has {len(frames_THWC)} frames; FVD needs {NUM_FRAMES}: use longer videos")
    _, height, width, _ = frames_THWC.shape
    frames = frames_THWC[:NUM_FRAMES].astype(np.float32)
    resized = np.einsum("yh,thwc,xw->tyxc", _resize(height), frames, _resize(width), optimize=True)
    return resized / 127.5 - 1


@functools.lru_cache(maxsize=16)
def _resize(size: int) -> np.ndarray:
    """The (224, size) matrix that resizes one axis.

    It is that of TensorFlow 1's resize_bilinear, which the authors' code calls: output pixel i is read at i * size / 224
    (the corners of pixels lie on each other, not their centres), and shrinking is not smoothed. Programs that align
    centres instead give slightly other distances.
    """
    place = np.arange(SIDE) * (size / SIDE)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, size - 1)
    fraction = place - below
    matrix = np.zeros((SIDE, size), np.float32)
    np.add.at(matrix, (np.arange(SIDE), below), 1 - fraction)
    np.add.at(matrix, (np.arange(SIDE), above), fraction)
    return matrix


_logits = jax.jit(i3d.logits)


def _check_count(found: int, name: str, num_videos: int | None) -> None:
    if num_videos is None and found < NUM_VIDEOS:
        raise ValueError(
            f"{found} {name} videos; FVD is defined on {NUM_VIDEOS}: bring more, or pass num_videos={found}, which the "
            "result will name"
        )
    if num_videos is not None and num_videos < 2:
        raise ValueError(f"num_videos is {num_videos}; a covariance needs at least 2, and FVD {NUM_VIDEOS}")
    if num_videos is not None and found < num_videos:
        raise ValueError(f"{found} {name} videos, but num_videos is {num_videos}; bring more or pass a smaller number")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

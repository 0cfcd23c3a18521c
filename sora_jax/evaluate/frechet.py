"""FD-MobileNetV2: how far a set of videos is from a set of real ones, as a Frechet distance of Gaussians over features.

A video's features are what its frames show on average and how much that changes from frame to frame, both as MobileNetV2
with ImageNet weights sees them. It tells frozen, noisy and shuffled videos from real ones. It is not FVD, which is this
distance over the features of an I3D network; numbers of the two cannot be compared.

A distance says little without its floor, the distance of real videos from other real ones, and both fall with the number
of videos: compare() gives them at one number. Features are the costly part; compute those of a set once:

    real = frechet.features(real_videos)
    print(frechet.compare(real, frechet.features(samples)))
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sora_jax.evaluate import mobilenet

NAME = "FD-MobileNetV2"
PART = 128  # numbers that each of the two kinds of features is projected to
WIDTH = 2 * PART
PROJECTION_SEED, SPLIT_SEED = 0, 0


# Features ------------------------------------------------------------------------------------------------------------


def features(videos: Sequence[ndarray]) -> Float[ndarray, "V 256"]:
    """One row for each uint8 video (T, H, W, 3), float32; sizes and lengths may differ, and an image has T = 1.

    A row is a random projection, the same for ever, of MobileNetV2's features averaged over time, and another of the
    mean absolute difference between those of consecutive frames, which is 0 for an image. About 4 s per 1000 frames on
    2 cores. Raises FileNotFoundError if the weights are not installed; ValueError for frames of another type or shape.
    """
    for frames_THWC in videos:
        mobilenet.check_frames(frames_THWC)
    stream = mobilenet.stream(mobilenet.load(), videos)
    average, change = _projections()
    rows = np.zeros((len(videos), WIDTH), np.float32)
    for row, frames_THWC in zip(rows, videos, strict=True):
        seen_TF = np.stack(list(itertools.islice(stream, len(frames_THWC))))
        row[:PART] = seen_TF.mean(0) @ average
        if len(seen_TF) > 1:
            row[PART:] = np.abs(np.diff(seen_TF, axis=0)).mean(0) @ change
    return rows


@functools.cache
def _projections() -> tuple[ndarray, ndarray]:
    """Two matrices of random signs, which keep squared lengths on average (Achlioptas 2003)."""
    # Raw bits, because numpy keeps these the same in all its versions, and numbers are compared over years.
    words = np.random.PCG64(PROJECTION_SEED).random_raw(2 * mobilenet.WIDTH * PART // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8)).reshape(2, mobilenet.WIDTH, PART)
    average, change = (2 * bits.astype(np.float32) - 1) / np.float32(np.sqrt(PART))
    return average, change


# Distance ------------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """The Gaussian that a set of features is taken for: its mean, and a root R of its covariance, which is R^T R."""

    mean: Float[ndarray, " F"]
    root: Float[ndarray, "K F"]


def statistics(features: Float[ndarray, "V F"]) -> Statistics:
    """Mean and root of the unbiased covariance, float64. Raises ValueError for fewer than 2 videos, or if not all is finite."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 videos, not {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError("some features are not finite; look for the videos that they are of")
    centred = features.astype(np.float64)
    mean = centred.mean(0)
    centred -= mean
    return Statistics(mean, np.linalg.qr(centred, mode="r") / np.sqrt(len(features) - 1))


def distance(one: Statistics, other: Statistics) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982), as in FID (Heusel et al., arXiv:1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The last trace is the sum of the singular values of R1 R2^T, whatever roots
    these are: C1 C2 has the eigenvalues of their squares. It is real whatever the rounding, the same both ways, exact where
    covariances are singular, as they are for fewer videos than features, and then as small as there are videos. Raises
    ValueError if the widths differ.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of widths {one.mean.shape[0]} and {other.mean.shape[0]} cannot be compared")
    overlap = np.linalg.svd(one.root @ other.root.T, compute_uv=False).sum()
    apart = np.square(one.mean - other.mean).sum()
    # Rounding may leave a little less than nothing.
    return max(0.0, float(apart + np.square(one.root).sum() + np.square(other.root).sum() - 2 * overlap))


# With its floor ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A distance from real videos and that of other real videos from the same ones, each of num_videos against as many."""

    distance: float
    floor: float
    num_videos: int

    def __str__(self) -> str:
        return f"{NAME} {self.distance:.2f} (real against real {self.floor:.2f}, {self.num_videos} videos each)"


def compare(real: Float[ndarray, "R F"], generated: Float[ndarray, "G F"]) -> Comparison:
    """How far generated videos are from real ones, beside how far real ones are from each other, from their features.

    Both are against the same half of the real set, and at the same number of videos: all that are generated if there
    are twice as many real ones, else half as many as are real. Raises ValueError if that leaves fewer than 2.
    """
    num_videos = min(len(generated), len(real) // 2)
    reference, rest = _halves(real, num_videos)
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(generated))[:num_videos]
    return Comparison(
        distance=distance(statistics(generated[chosen]), statistics(reference)),
        floor=distance(statistics(rest), statistics(reference)),
        num_videos=num_videos,
    )


def _halves(real: ndarray, num_videos: int) -> tuple[ndarray, ndarray]:
    """Two disjoint parts of num_videos rows. Drawn, as a set may be in order of size or length."""
    if not 2 <= num_videos <= len(real) // 2:
        raise ValueError(
            f"{len(real)} real videos are no two sets of {num_videos}; a set needs 2 or more: give more real ones"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(real))
    return real[order[:num_videos]], real[order[num_videos : 2 * num_videos]]

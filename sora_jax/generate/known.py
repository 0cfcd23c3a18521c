"""What of a video is given: pixels with a mask, and which latent cells and patches that makes known. numpy only."""

from __future__ import annotations

import dataclasses

import numpy as np
from einops import reduce
from jaxtyping import Bool


@dataclasses.dataclass(frozen=True)
class Known:
    """Frames at the full size and length of a request, and which of their pixels are given.

    strength is the time from which the rest is made: 1 is from noise, less from the canvas's own frames with that much noise
    (SDEdit, arXiv:2108.01073); 0 leaves them as they are. What is not given still matters where strength is below 1, and
    to the encoder, which sees the neighbours of what is given.
    """

    frames_THWC: np.ndarray  # uint8 (T, H, W, 3)
    given_THW: np.ndarray  # bool (T, H, W)
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.given_THW.shape != self.frames_THWC.shape[:3]:
            raise ValueError(
                f"given has shape {list(self.given_THW.shape)} and the frames {list(self.frames_THWC.shape[:3])}; they must agree"
            )
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be in [0, 1]")


def known_cells(given_THW: Bool[np.ndarray, "T H W"], stride: tuple[int, int, int]) -> Bool[np.ndarray, "t h w"]:
    """Which latent cells are known: those of which every pixel is given. Latent 0 is frame 0, latent k the k-th `stride` frames
    after it."""
    st, sh, sw = stride
    # Frame 0 fills a group of its own.
    filled_THW = np.concatenate([np.repeat(given_THW[:1], st - 1, axis=0), given_THW])
    return reduce(filled_THW, "(t st) (h sh) (w sw) -> t h w", "min", st=st, sh=sh, sw=sw)


def known_patches(known_thw: Bool[np.ndarray, "t h w"], patch: tuple[int, int, int]) -> Bool[np.ndarray, " patches"]:
    """Which patches are known, in the order of pack.patchify: those of which every cell is."""
    pt, ph, pw = patch
    return reduce(known_thw, "(t pt) (h ph) (w pw) -> (t h w)", "min", pt=pt, ph=ph, pw=pw)

"""The shapes of the system: the letters that name every axis, and the few records that pass between its parts.

Letters (a name's suffix is its shape: x_BND is rows x tokens x width)

    T H W C   frames, height, width in pixels, C = 3; values in [-1, 1], uint8 only on disk
    t h w c   the latent grid and its channels
    B rows    N tokens per row    S slots per row    P patch dim    D width    K heads    E head dim
    L         text tokens per row                    M text width

A *clip* is a video (an image is a clip of one frame). Its latent is cut into *patches*, each a *token*. Tokens of several
clips share a *row*; the tokens of one clip are a *segment*. A *slot* is one (clip, noise level) pair of a row, so that a
clip may hold several noise levels at once: what is known stays at time 0 while the rest is noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video with its captions.

    frames_THWC is uint8; fps is frames a second; captions runs from short to long; scene is the exact ground truth when the
    clip comes from a procedural world, else None. Frames that are played to and fro turn back where they never did: such a
    clip is for learning how to lead from one end to another, not for what its captions say.
    """

    id: int
    frames_THWC: np.ndarray
    fps: float
    captions: tuple[str, ...]
    scene: Any = None
    to_and_fro: bool = False


class Share(NamedTuple):
    """Which rows of a batch a process has, in order, and which of them it has first, so that each is counted by one process."""

    rows: tuple[int, ...]
    first: frozenset[int]

    @classmethod
    def whole(cls, rows: int) -> Share:
        return cls(tuple(range(rows)), frozenset(range(rows)))


class Layout(NamedTuple):
    """Where the tokens of packed rows sit and which text belongs to them: all that a model needs beside values and times.

    Padding tokens have segment 0 and slot 0; nothing may depend on their values.
    """

    segment_BN: Any  # int32, 0 = padding, 1.. = which clip of the row
    slot_BN: Any  # int32, index into the slot arrays
    position_BN3: Any  # float32 (seconds, y, x), y and x in pixels: size, aspect and frame rate stay native
    slot_segment_BS: Any  # int32, which clip a slot belongs to; 0 = unused
    extent_BS3: Any  # float32 (seconds, height, width) of the clip
    text_segment_BL: Any  # int32, 0 = padding
    text_BLM: Any = None  # float32 states of a frozen encoder, or None
    text_token_BL: Any = None  # int32 ids for an encoder that is trained with the model, or None


class PackedBatch(NamedTuple):
    """Rows of packed latent patches; numpy in the loader, jax arrays in a step. One static shape, whatever the mix of sizes."""

    mean_BNP: Any  # float32, posterior mean of the normalised latent
    std_BNP: Any  # float32, posterior standard deviation
    index_BN: Any  # int32, the token's place in its clip's whole grid: with clip and draw, the key of its noise
    ceiling_BS: Any  # float32, the highest time of the slot's tokens: 1, less where they start from less noise, 0 if they are known
    clip_BS: Any  # int32, clip id of the slot
    draw_BS: Any  # int32, how often the clip was drawn before: a new pass draws new noise
    layout: Layout


class TrainState(NamedTuple):
    """What a run carries from step to step. ema has the structure of params; rest holds variables that are not trained.

    guard is train.guard's, which knows the steps that were skipped.
    """

    step: Any  # int32 scalar
    params: Any
    ema: Any
    rest: Any
    opt_state: Any
    guard: Any

"""Patch n' Pack: clips of any mix of sizes, aspects and durations as tokens in rows of one static shape (arXiv:2307.06304).

numpy only: this runs in loader workers. A latent becomes patches with positions in real units; some tokens may be dropped;
the tokens of several clips then share rows of a fixed budget. Nothing is silently lost: Count says what became of each clip.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from sora_jax.structs import Layout, PackedBatch


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Budgets of a row and how tokens are dropped.

    A row holds row_tokens tokens, row_slots slots and row_text text tokens; a batch has `rows` rows; `window` clips are
    packed together. drop_rate is the largest share of a clip's tokens that is dropped at random: each clip draws its own
    rate uniformly from [0, drop_rate]. Patches that differ from the patch before them by less than drop_repeats (root mean
    square, in units of the latent's standard deviation) are dropped too; 0 keeps them all.
    """

    rows: int
    row_tokens: int
    row_slots: int
    row_text: int
    window: int
    drop_rate: float = 0.0
    drop_repeats: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rows", "row_tokens", "row_slots", "row_text", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"pack.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.drop_rate < 1 or self.drop_repeats < 0:
            raise ValueError(
                f"pack: drop_rate {self.drop_rate} must be in [0, 1) and drop_repeats {self.drop_repeats} not negative"
            )


class Geometry(NamedTuple):
    """How a latent grid lies in the world: patch in latent cells, stride in (frames, pixels, pixels) a cell."""

    patch: tuple[int, int, int]
    stride: tuple[int, int, int]


class Tokens(NamedTuple):
    """One clip, cut into patches; what pack_rows puts into rows. ceiling is the highest time of its unknown patches."""

    mean_NP: np.ndarray
    std_NP: np.ndarray
    position_N3: np.ndarray
    index_N: np.ndarray
    known_N: np.ndarray
    ceiling: float
    extent_3: np.ndarray
    clip: int
    draw: int
    text_LM: np.ndarray | None
    text_token_L: np.ndarray | None

    @property
    def num_slots(self) -> int:
        """1, or 2 for a clip with both known and unknown tokens."""
        return 1 + (0 < int(self.known_N.sum()) < len(self.known_N))

    @property
    def num_text(self) -> int:
        return len(self.text_LM if self.text_LM is not None else self.text_token_L)  # type: ignore[arg-type]


@dataclasses.dataclass
class Count:
    """What became of clips and tokens; sums over batches are metrics."""

    clips: int = 0
    tokens: int = 0
    row_tokens: int = 0
    dropped_tokens: int = 0
    dropped_repeats: int = 0
    too_long_clips: int = 0
    pairs: int = 0  # of tokens that see each other in self-attention
    text_pairs: int = 0  # of tokens and text tokens in cross-attention
    read_retries: int = 0
    damaged_clips: int = 0  # left out, as what is stored is not what was written
    unreadable_clips: int = 0  # left out, as the system could not read them
    worker_deaths: int = 0

    @property
    def left_out(self) -> int:
        """Clips that could not be read."""
        return self.damaged_clips + self.unreadable_clips

    @property
    def fill(self) -> float:
        """Share of the rows' token budget that holds tokens."""
        return self.tokens / max(1, self.row_tokens)

    def add(self, other: Count) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def grid_shape(latent_shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(t, h, w) in patches. Raises ValueError if the patch does not divide the latent."""
    if any(size % part for size, part in zip(latent_shape, patch, strict=False)):
        raise ValueError(
            f"latent {latent_shape[:3]} is not a multiple of the patch {patch}; choose another size or patch"
        )
    return tuple(size // part for size, part in zip(latent_shape, patch, strict=False))  # type: ignore[return-value]


def patchify(latent_thwc: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """Patches (N, P) in order of time, height, width."""
    grid_shape(latent_thwc.shape, patch)
    pt, ph, pw = patch
    return rearrange(latent_thwc, "(t pt) (h ph) (w pw) c -> (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(x_NP: np.ndarray, latent_shape: tuple[int, int, int, int], patch: tuple[int, int, int]) -> np.ndarray:
    """The latent (t, h, w, c) of all its patches."""
    t, h, w = grid_shape(latent_shape, patch)
    pt, ph, pw = patch
    return rearrange(x_NP, "(t h w) (pt ph pw c) -> (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


@functools.lru_cache(maxsize=4096)  # clips share few sizes, and this is a third of the work on a clip
def positions(latent_shape: tuple[int, ...], geometry: Geometry, fps: float) -> np.ndarray:
    """(N, 3) float32: the centre of each patch as (seconds, pixels down, pixels across). Read-only, as it is shared.

    Latent 0 is the first frame alone, at second 0; latent k > 0 stands for frames stride (k - 1) + 1 .. stride k.
    """
    (pt, ph, pw), (st, sh, sw) = geometry
    t, h, w = grid_shape(latent_shape, geometry.patch)
    cell = np.arange(t * pt)
    frame = np.where(cell == 0, 0.0, cell * st - (st - 1) / 2)
    seconds = frame.reshape(t, pt).mean(1) / fps
    y = (np.arange(h) + 0.5) * ph * sh
    x = (np.arange(w) + 0.5) * pw * sw
    found = np.stack([axis.ravel() for axis in np.meshgrid(seconds, y, x, indexing="ij")], -1).astype(np.float32)
    found.flags.writeable = False
    return found


def extent(latent_shape: tuple[int, ...], geometry: Geometry, fps: float) -> np.ndarray:
    """(3,) float32: seconds from the first frame to the last, height and width in pixels."""
    st, sh, sw = geometry.stride
    return np.array([(latent_shape[0] - 1) * st / fps, latent_shape[1] * sh, latent_shape[2] * sw], np.float32)


def repeats(mean_NP: np.ndarray, frame_patches: int, threshold: float) -> np.ndarray:
    """(N,) bool: patches that say nearly what the patch before them in time said (as run-length tokenisation drops)."""
    frames = mean_NP.reshape(-1, frame_patches, mean_NP.shape[-1])
    change = np.sqrt(np.mean(np.square(np.diff(frames, axis=0)), -1))
    return np.concatenate([np.zeros((1, frame_patches), bool), change < threshold]).ravel()


def drop(tokens: Tokens, frame_patches: int, config: PackConfig, rng: np.random.Generator) -> tuple[Tokens, Count]:
    """Tokens without repeats and without a random share; at least one token stays."""
    total = len(tokens.index_N)
    keep_N = np.ones(total, bool)
    if config.drop_repeats:
        keep_N &= ~repeats(tokens.mean_NP, frame_patches, config.drop_repeats)
    repeated = total - int(keep_N.sum())
    if config.drop_rate:
        left = np.flatnonzero(keep_N)
        share = rng.uniform(0, config.drop_rate)
        gone = rng.permutation(left)[: min(math.floor(share * len(left) + rng.random()), len(left) - 1)]
        keep_N[gone] = False
    count = Count(dropped_tokens=total - int(keep_N.sum()) - repeated, dropped_repeats=repeated)
    if keep_N.all():
        return tokens, count
    per_token = ("mean_NP", "std_NP", "position_N3", "index_N", "known_N")
    return tokens._replace(**{name: getattr(tokens, name)[keep_N] for name in per_token}), count


def assign(
    sizes: Sequence[tuple[int, int, int]], budgets: tuple[int, int, int], order: Sequence[int]
) -> list[list[int]]:
    """Rows of item numbers: longest first, each into the fullest row that still has room in all three budgets.

    sizes and budgets are (tokens, slots, text tokens); order breaks ties. Items that fit no empty row must be removed before.
    """
    rows: list[list[int]] = []
    left = np.empty((len(sizes), len(budgets)), np.int64)
    for item in sorted(order, key=lambda i: -sizes[i][0]):
        room = left[: len(rows)]
        fitting = np.flatnonzero((room >= sizes[item]).all(1))
        if len(fitting):
            row = int(fitting[room[fitting, 0].argmin()])
        else:
            row = len(rows)
            rows.append([])
            left[row] = budgets
        rows[row].append(item)
        left[row] -= sizes[item]
    return rows


def fits(tokens: Tokens, config: PackConfig) -> bool:
    """Whether a clip fits an empty row."""
    return (
        len(tokens.index_N) <= config.row_tokens
        and tokens.num_slots <= config.row_slots
        and tokens.num_text <= config.row_text
    )


def pack_rows(
    clips: Sequence[Tokens], config: PackConfig, rng: np.random.Generator
) -> tuple[list[list[Tokens]], Count]:
    """All clips that fit, in as few rows as best-fit packing finds, rows in random order."""
    good = [clip for clip in clips if fits(clip, config)]
    sizes = [(len(clip.index_N), clip.num_slots, clip.num_text) for clip in good]
    rows = assign(sizes, (config.row_tokens, config.row_slots, config.row_text), rng.permutation(len(good)).tolist())
    count = Count(
        clips=len(good),
        tokens=sum(size[0] for size in sizes),
        row_tokens=len(rows) * config.row_tokens,
        too_long_clips=len(clips) - len(good),
        pairs=sum(size[0] ** 2 for size in sizes),
        text_pairs=sum(size[0] * size[2] for size in sizes),
    )
    return [[good[i] for i in rows[r]] for r in rng.permutation(len(rows))], count


def fill_row(clips: Sequence[Tokens], config: PackConfig, patch_dim: int, text_width: int | None) -> PackedBatch:
    """One row (the arrays of a PackedBatch without their leading axis). text_width None: the text is token ids.

    Raises ValueError if the clips exceed a budget.
    """
    N, S, L = config.row_tokens, config.row_slots, config.row_text
    row = empty_row(config, patch_dim, text_width)
    layout = row.layout
    token, slot, text = 0, 0, 0
    for segment, clip in enumerate(clips, 1):
        count, words = len(clip.index_N), clip.num_text
        if token + count > N or slot + clip.num_slots > S or text + words > L:
            raise ValueError(
                f"clip {clip.clip}: {count} tokens, {words} text tokens do not fit the row; raise pack's budgets"
            )
        here, there = slice(token, token + count), slice(text, text + words)
        row.mean_BNP[here], row.std_BNP[here], row.index_BN[here] = clip.mean_NP, clip.std_NP, clip.index_N
        layout.position_BN3[here], layout.segment_BN[here] = clip.position_N3, segment
        for known in (False, True):
            mine = clip.known_N == known
            if not mine.any():
                continue
            layout.slot_BN[here][mine] = slot
            layout.slot_segment_BS[slot], layout.extent_BS3[slot] = segment, clip.extent_3
            row.ceiling_BS[slot] = 0.0 if known else clip.ceiling
            row.clip_BS[slot], row.draw_BS[slot] = clip.clip, clip.draw
            slot += 1
        layout.text_segment_BL[there] = segment
        if text_width is None:
            layout.text_token_BL[there] = clip.text_token_L
        else:
            layout.text_BLM[there] = clip.text_LM
        token, text = token + count, text + words
    return row


def empty_row(config: PackConfig, patch_dim: int, text_width: int | None) -> PackedBatch:
    """A row of padding."""
    N, S, L = config.row_tokens, config.row_slots, config.row_text
    return PackedBatch(
        mean_BNP=np.zeros((N, patch_dim), np.float32),
        std_BNP=np.zeros((N, patch_dim), np.float32),
        index_BN=np.zeros(N, np.int32),
        ceiling_BS=np.zeros(S, np.float32),
        clip_BS=np.zeros(S, np.int32),
        draw_BS=np.zeros(S, np.int32),
        layout=Layout(
            segment_BN=np.zeros(N, np.int32),
            slot_BN=np.zeros(N, np.int32),
            position_BN3=np.zeros((N, 3), np.float32),
            slot_segment_BS=np.zeros(S, np.int32),
            extent_BS3=np.zeros((S, 3), np.float32),
            text_segment_BL=np.zeros(L, np.int32),
            text_BLM=None if text_width is None else np.zeros((L, text_width), np.float32),
            text_token_BL=np.zeros(L, np.int32) if text_width is None else None,
        ),
    )


def stack(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Rows as one batch with a leading axis B."""

    def join(*leaves: np.ndarray | None) -> np.ndarray | None:
        return None if leaves[0] is None else np.stack(leaves)  # type: ignore[arg-type]

    arrays: list[Any] = [join(*leaves) for leaves in zip(*(row[:-1] for row in rows), strict=True)]
    layout = Layout(*map(join, *(row.layout for row in rows)))
    return PackedBatch._make([*arrays, layout])


def unpack(x_BNP: np.ndarray, batch: PackedBatch) -> dict[int, np.ndarray]:
    """clip id -> its patches (N_clip, P), in the order of the clip's grid; dropped tokens are absent."""
    segment_BN, slot_BN = batch.layout.segment_BN, batch.layout.slot_BN
    clips = {}
    for row in range(len(x_BNP)):
        clip_N = batch.clip_BS[row][slot_BN[row]]
        for segment in range(1, segment_BN[row].max(initial=0) + 1):
            mine = np.flatnonzero(segment_BN[row] == segment)
            order = np.argsort(batch.index_BN[row][mine])
            clips[int(clip_N[mine[0]])] = x_BNP[row][mine[order]]
    return clips

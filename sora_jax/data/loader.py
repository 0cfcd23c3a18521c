"""From stored latents to packed batches: shuffled, resumable, the same whatever the number of workers or hosts.

Grain gives the order and the workers; what is drawn for a clip (caption, known frames, dropped tokens) is keyed by
(seed, clip, how often it was drawn), so no packing and no worker changes it. numpy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from sora_jax.data import pack
from sora_jax.data.latents import Latent, LatentStore
from sora_jax.structs import PackedBatch, Share


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is drawn for a clip and how it is loaded.

    long_captions is the share of descriptive captions, the rest are short; caption_dropout the share without caption (for
    classifier-free guidance); known_frames the share of clips whose first latents are given. workers is the number of
    loader processes, 0 loads in a thread. lanes is into how many streams clips are dealt, each packed into rows by itself, of
    which a batch has equally many of each: with as many lanes as training processes, or more, each reads its own clips alone.
    """

    long_captions: float = 0.2
    caption_dropout: float = 0.1
    known_frames: float = 0.0
    workers: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("long_captions", "caption_dropout", "known_frames"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loader.{name} is {getattr(self, name)}; it is a share in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"loader.workers is {self.workers}; it must not be negative")
        if self.lanes < 1:
            raise ValueError(f"loader.lanes is {self.lanes}; there must be at least one")


# caption -> (states (L, M), None) or (None, token ids (L,))
CaptionText = Callable[[str], tuple[np.ndarray | None, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Turns a stored latent into Tokens."""

    config: LoaderConfig
    packing: pack.PackConfig
    geometry: pack.Geometry
    text: CaptionText
    seed: int

    def __call__(self, latent: Latent, draw: int) -> tuple[pack.Tokens, pack.Count]:
        """Tokens of draw number `draw` of a clip, and how many were dropped."""
        rng = np.random.default_rng((self.seed, latent.id, draw))
        t, h, w = pack.grid_shape(latent.mean_thwc.shape, self.geometry.patch)
        known_N = np.arange(t * h * w) < self._known_frames(rng, t) * h * w
        text_LM, text_token_L = self.text(self._caption(rng, latent.captions))
        tokens = pack.Tokens(
            mean_NP=pack.patchify(latent.mean_thwc, self.geometry.patch).astype(np.float32),
            std_NP=pack.patchify(latent.std_thwc, self.geometry.patch).astype(np.float32),
            position_N3=pack.positions(latent.mean_thwc.shape, self.geometry, latent.fps),
            index_N=np.arange(t * h * w, dtype=np.int32),
            known_N=known_N,
            extent_3=pack.extent(latent.mean_thwc.shape, self.geometry, latent.fps),
            clip=latent.id,
            draw=draw,
            text_LM=text_LM,
            text_token_L=text_token_L,
        )
        return pack.drop(tokens, h * w, self.packing, rng)

    def _caption(self, rng: np.random.Generator, captions: tuple[str, ...]) -> str:
        """The empty caption, a short or a long one; by convention the longer half of a clip's captions is descriptive."""
        if rng.random() < self.config.caption_dropout:
            return ""
        ordered = sorted(captions, key=len)
        short, long = ordered[: (len(ordered) + 1) // 2], ordered[(len(ordered) + 1) // 2 :] or ordered
        chosen = long if rng.random() < self.config.long_captions else short
        return chosen[int(rng.integers(len(chosen)))]

    def _known_frames(self, rng: np.random.Generator, t: int) -> int:
        """How many of the first latent frames are given: none, or 1 .. t - 1."""
        if t < 2 or rng.random() >= self.config.known_frames:
            return 0
        return int(rng.integers(1, t))


class PackRows(grain.IterDataset):
    """Rows from clips: every `window` clips are packed together by pack.pack_rows."""

    def __init__(
        self,
        parent: grain.IterDataset,
        config: pack.PackConfig,
        finish: Callable[[list[pack.Tokens]], PackedBatch],
        seed: tuple[int, ...],
    ):
        super().__init__(parent)
        self.config, self.finish, self.seed = config, finish, seed

    def __iter__(self) -> PackRowsIterator:
        return PackRowsIterator(self._parent.__iter__(), self.config, self.finish, self.seed)


class PackRowsIterator(grain.DatasetIterator):
    """State: where the window began in the parent, its number, and how many of its rows were handed out."""

    def __init__(
        self,
        parent: Any,
        config: pack.PackConfig,
        finish: Callable[[list[pack.Tokens]], PackedBatch],
        seed: tuple[int, ...],
    ):
        super().__init__(parent)
        self.config, self.finish, self.seed = config, finish, seed
        self.window, self.next_row = -1, 0
        self.start = parent.get_state()
        self.rows: list[list[pack.Tokens]] = []
        self.count = pack.Count()

    def __next__(self) -> tuple[PackedBatch, pack.Count]:
        count = pack.Count()
        while self.next_row >= len(self.rows):
            self.start, self.window, self.next_row = self._parent.get_state(), self.window + 1, 0
            count.add(self._read_window())
        row = self.finish(self.rows[self.next_row])
        self.next_row += 1
        return row, count

    def _read_window(self) -> pack.Count:
        clips, count = [], pack.Count()
        for _ in range(self.config.window):
            tokens, dropped = next(self._parent)
            clips.append(tokens)
            count.add(dropped)
        self.rows, packed = pack.pack_rows(clips, self.config, np.random.default_rng((*self.seed, self.window)))
        count.add(packed)
        if not self.rows:
            raise ValueError(
                f"none of {self.config.window} clips fits a row of {self.config.row_tokens} tokens, {self.config.row_slots} "
                f"slots and {self.config.row_text} text tokens; raise pack.row_tokens or pack.row_text"
            )
        return count

    def get_state(self) -> dict[str, Any]:
        return {"parent": self.start, "window": self.window, "next_row": self.next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self.start, self.window, self.next_row = state["parent"], state["window"], state["next_row"]
        self.rows = []
        if self.window >= 0:
            self._read_window()


# Rows of a batch with what was counted for them.
Rows = list[tuple[PackedBatch, pack.Count]]


class Lanes(grain.IterDataset):
    """Batches of rows from several streams of lists of rows; of the rows only this process's share is kept."""

    def __init__(self, lanes: dict[int, grain.IterDataset], lane_rows: int, share: Share):
        super().__init__(list(lanes.values()))
        self.names, self.lane_rows, self.share = list(lanes), lane_rows, share

    def __iter__(self) -> LanesIterator:
        return LanesIterator([parent.__iter__() for parent in self._parents], self.names, self.lane_rows, self.share)


class LanesIterator(grain.DatasetIterator):
    """State: that of each lane by its number, so that processes with other lanes add theirs to it."""

    def __init__(self, lanes: list[Any], names: list[int], lane_rows: int, share: Share):
        super().__init__(lanes)
        self.names, self.lane_rows, self.share = names, lane_rows, share

    def __next__(self) -> tuple[PackedBatch, pack.Count]:
        rows, count = [], pack.Count()
        for name, lane in zip(self.names, self._parents, strict=True):
            for number, (row, counted) in enumerate(next(lane), name * self.lane_rows):
                if number in self.share.rows:
                    rows.append(row)
                if number in self.share.first:
                    count.add(counted)
        return pack.stack(rows), count

    def get_state(self) -> dict[str, Any]:
        return {str(name): lane.get_state() for name, lane in zip(self.names, self._parents, strict=True)}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, lane in zip(self.names, self._parents, strict=True):
            lane.set_state(state[str(name)])


def batches(
    store: LatentStore, tokeniser: Tokeniser, text_width: int | None, share: Share | None = None
) -> Iterator[tuple[PackedBatch, pack.Count]]:
    """An endless iterator of (batch, count) with get_state and set_state; every pass over the store is shuffled anew.

    share is what this process trains on of a batch, by default all; whatever it is, the batches of all processes together are
    the same. Raises ValueError if lanes do not divide the rows.
    """
    packing, seed, lanes = tokeniser.packing, tokeniser.seed, tokeniser.config.lanes
    patch_dim = int(np.prod(tokeniser.geometry.patch)) * store.mean.shape[-1]
    share = Share.whole(packing.rows) if share is None else share
    if packing.rows % lanes:
        raise ValueError(f"pack.rows {packing.rows} must be a multiple of loader.lanes {lanes}")
    lane_rows = packing.rows // lanes

    def draw(index: int, number: int) -> tuple[pack.Tokens, pack.Count]:
        return tokeniser(store[number], index // len(store))

    clips = grain.MapDataset.range(len(store)).seed(seed).shuffle().repeat().map_with_index(draw)

    def lane(number: int) -> grain.IterDataset:
        mine = clips if lanes == 1 else clips.slice(slice(number, None, lanes))
        return PackRows(
            mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)),
            packing,
            lambda members: pack.fill_row(members, packing, patch_dim, text_width),
            (seed,) if lanes == 1 else (seed, number),
        ).batch(lane_rows, batch_fn=list)

    read = {row // lane_rows for row in share.rows}
    dataset: grain.IterDataset = Lanes({number: lane(number) for number in sorted(read)}, lane_rows, share)
    if tokeniser.config.workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=tokeniser.config.workers))
    else:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4)
    return iter(dataset)


def fixed_batches(
    store: LatentStore, tokeniser: Tokeniser, text_width: int | None
) -> Iterator[tuple[PackedBatch, pack.Count]]:
    """One pass over a store in order, each clip once, the last batch padded with empty rows: for evaluation."""
    packing = tokeniser.packing
    patch_dim = int(np.prod(tokeniser.geometry.patch)) * store.mean.shape[-1]
    clips = [tokeniser(store[number], 0)[0] for number in range(len(store))]
    rows, count = pack.pack_rows(clips, packing, np.random.default_rng(0))
    for start in range(0, len(rows), packing.rows):
        some = [pack.fill_row(row, packing, patch_dim, text_width) for row in rows[start : start + packing.rows]]
        some += [pack.empty_row(packing, patch_dim, text_width)] * (packing.rows - len(some))
        yield pack.stack(some), count if start == 0 else pack.Count()

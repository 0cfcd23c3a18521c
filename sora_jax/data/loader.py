"""From stored latents to packed batches: shuffled, resumable, the same whatever the number of workers or hosts.

Grain gives the order and the workers; what is drawn for a clip (caption, what is known, dropped tokens) is keyed by
(seed, clip, how often it was drawn), so no packing and no worker changes it. numpy only.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from sora_jax.data import masks, pack
from sora_jax.data.latents import DamagedClipError, Latent, LatentStore
from sora_jax.structs import PackedBatch, Share


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is drawn for a clip and how it is loaded.

    long_captions is the share of descriptive captions, the rest are short; caption_dropout the share without caption (for
    classifier-free guidance); known says how often what of a clip is given. squeezed is the share of clips, for height and
    width each, whose positions are drawn together, down to LEAST_SCALE of what they are: frames longer than all of training
    are then sampled as some were trained (arXiv:2305.16843 trains on random positions for the sake of longer texts).

    workers is the number of loader processes, 0 loads in a thread. lanes is into how many streams clips are dealt, each packed
    into rows by itself, of which a batch has equally many of each: with as many lanes as training processes, or more, each
    reads its own clips alone.

    A store that cannot be read is tried again for `patience` seconds. A clip that cannot is left out; a run stops once these
    are more than the share skip_quota of the clips drawn, or of one pass as long as fewer were drawn.
    """

    long_captions: float = 0.2
    caption_dropout: float = 0.1
    known: masks.KnownConfig = dataclasses.field(default_factory=masks.KnownConfig)
    squeezed: float = 0.0
    workers: int = 0
    lanes: int = 1
    patience: float = 120.0
    skip_quota: float = 0.01

    def __post_init__(self) -> None:
        for name in ("long_captions", "caption_dropout", "squeezed", "skip_quota"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loader.{name} is {getattr(self, name)}; it is a share in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"loader.workers is {self.workers}; it must not be negative")
        if self.patience < 0:
            raise ValueError(f"loader.patience is {self.patience} seconds; it must not be negative")
        if self.lanes < 1:
            raise ValueError(f"loader.lanes is {self.lanes}; there must be at least one")


def check_lanes(packing: pack.PackConfig, config: LoaderConfig) -> None:
    """Raises ValueError if lanes do not divide the rows."""
    if packing.rows % config.lanes:
        raise ValueError(f"pack.rows {packing.rows} must be a multiple of loader.lanes {config.lanes}")


class LoaderError(RuntimeError):
    """Too much cannot be read."""


class Reader:
    """Clips of a store, with patience. Gives None for a clip that cannot be read, and what happened.

    Raises LoaderError if the store stays away for longer than `patience` seconds.
    """

    def __init__(self, store: LatentStore, patience: float) -> None:
        self.store, self.patience = store, patience
        self._left_out: dict[int, str] = {}  # number -> field of Count: nobody waits twice for a clip

    def __call__(self, number: int) -> tuple[Latent | None, pack.Count]:
        count = pack.Count()
        if number not in self._left_out:
            try:
                return self._read(number, count), count
            except (DamagedClipError, OSError) as error:
                self._left_out[number] = "damaged_clips" if isinstance(error, DamagedClipError) else "unreadable_clips"
                logging.warning("clip %d is left out: %s", number, error)
        setattr(count, self._left_out[number], 1)
        return None, count

    def _read(self, number: int, count: pack.Count) -> Latent:
        try:
            return self.store[number]
        except DamagedClipError:  # on the way perhaps, not on the disk
            count.read_retries += 1
            return self.store[number]
        except OSError as error:
            logging.warning("%s cannot be read (%s); trying again for %g s", self.store.folder, error, self.patience)
            return self._wait(number, count)

    def _wait(self, number: int, count: pack.Count) -> Latent:
        began, pause = time.monotonic(), LEAST_PAUSE
        while (left := self.patience - (time.monotonic() - began)) > 0:
            time.sleep(min(pause, left))
            pause *= 2
            count.read_retries += 1
            try:
                return self.store[number]
            except OSError:
                continue
        try:
            (self.store.folder / "store.json").read_bytes()
        except OSError as error:
            raise LoaderError(
                f"{self.store.folder} has been away for {self.patience:g} s ({error}); mount it and run again, "
                "or raise loader.patience"
            ) from error
        return self.store[number]


LEAST_SCALE = 0.5  # of positions: that of frames twice as long as any of training
LEAST_PAUSE = 0.1  # seconds before a failed read is tried again; doubled each time
MOST_DEATHS = 3  # of workers, with no batch in between

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
        grid = pack.grid_shape(latent.mean_thwc.shape, self.geometry.patch)
        known_thw, ceiling = masks.draw(self.config.known, rng, grid, latent.to_and_fro)
        t, h, w = known_thw.shape
        mean_thwc, std_thwc = (x[: t * self.geometry.patch[0]] for x in (latent.mean_thwc, latent.std_thwc))
        text_LM, text_token_L = self.text(self._caption(rng, latent.captions))
        tokens = pack.Tokens(
            mean_NP=pack.patchify(mean_thwc, self.geometry.patch).astype(np.float32),
            std_NP=pack.patchify(std_thwc, self.geometry.patch).astype(np.float32),
            position_N3=pack.positions(mean_thwc.shape, self.geometry, latent.fps),
            index_N=np.arange(t * h * w, dtype=np.int32),
            known_N=known_thw.ravel(),
            ceiling=ceiling,
            extent_3=pack.extent(mean_thwc.shape, self.geometry, latent.fps),
            clip=latent.id,
            draw=draw,
            text_LM=text_LM,
            text_token_L=text_token_L,
        )
        tokens, count = pack.drop(tokens, h * w, self.packing, rng)
        return self._squeezed(tokens, rng), count

    def _squeezed(self, tokens: pack.Tokens, rng: np.random.Generator) -> pack.Tokens:
        """Tokens, drawn together down and across in a share `squeezed` of clips each: as generate/pipeline.py draws together
        those of frames that are longer than all of training."""
        drawn_2, scale_2 = rng.random(2) < self.config.squeezed, rng.uniform(LEAST_SCALE, 1, 2)
        if not drawn_2.any():
            return tokens
        scale_3 = np.array([1, *np.where(drawn_2, scale_2, 1)], np.float32)
        return tokens._replace(position_N3=tokens.position_N3 * scale_3, extent_3=tokens.extent_3 * scale_3)

    def _caption(self, rng: np.random.Generator, captions: tuple[str, ...]) -> str:
        """The empty caption, a short or a long one; by convention the longer half of a clip's captions is descriptive."""
        if rng.random() < self.config.caption_dropout:
            return ""
        ordered = sorted(captions, key=len)
        short, long = ordered[: (len(ordered) + 1) // 2], ordered[(len(ordered) + 1) // 2 :] or ordered
        chosen = long if rng.random() < self.config.long_captions else short
        return chosen[int(rng.integers(len(chosen)))]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Tokens of the clip at a place of the endless order; a class, as workers get it by pickle."""

    reader: Reader
    tokeniser: Tokeniser

    def __call__(self, index: int, number: int) -> tuple[pack.Tokens | None, pack.Count]:
        latent, count = self.reader(number)
        if latent is None:
            return None, count
        tokens, dropped = self.tokeniser(latent, index // len(self.reader.store))
        count.add(dropped)
        return tokens, count


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
    """State: where the window began in the parent, its number, how many of its rows were handed out, and which of its clips
    could not be read: they are left out again when the window is read again, so that its rows are the same."""

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
        self.left_out: list[int] = []

    def __next__(self) -> tuple[PackedBatch, pack.Count]:
        count = pack.Count()
        while self.next_row >= len(self.rows):
            self.start, self.window, self.next_row, self.left_out = self._parent.get_state(), self.window + 1, 0, []
            count.add(self._read_window())
        row = self.finish(self.rows[self.next_row])
        self.next_row += 1
        return row, count

    def _read_window(self) -> pack.Count:
        clips, count = [], pack.Count()
        left_out, self.left_out = self.left_out, []
        for place in range(self.config.window):
            tokens, counted = next(self._parent)
            count.add(counted)
            if tokens is None or place in left_out:
                self.left_out.append(place)
            else:
                clips.append(tokens)
        if not clips:
            raise LoaderError(f"none of {self.config.window} clips in a row could be read; the warnings above say why")
        self.rows, packed = pack.pack_rows(clips, self.config, np.random.default_rng((*self.seed, self.window)))
        count.add(packed)
        if not self.rows:
            raise LoaderError(
                f"none of {self.config.window} clips fits a row of {self.config.row_tokens} tokens, {self.config.row_slots} "
                f"slots and {self.config.row_text} text tokens; raise pack.row_tokens or pack.row_text"
            )
        return count

    def get_state(self) -> dict[str, Any]:
        return {"parent": self.start, "window": self.window, "next_row": self.next_row, "left_out": self.left_out}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self.start, self.window, self.next_row = state["parent"], state["window"], state["next_row"]
        self.rows, self.left_out = [], list(state.get("left_out", ()))
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


class Guarded:
    """Batches of a grain dataset: a worker that died is replaced, and clips that could not be read are held against the quota."""

    def __init__(self, dataset: grain.IterDataset, clips: int, quota: float) -> None:
        self._dataset, self._clips, self._quota = dataset, clips, quota
        self._source = iter(dataset)
        self._state: Any = None
        self._total = pack.Count()

    def __iter__(self) -> Guarded:
        return self

    def __next__(self) -> tuple[PackedBatch, pack.Count]:
        batch, count = self._next()
        self._state = self._source.get_state()
        self._total.add(count)
        skipped, drawn = self._total.left_out, self._total.clips + self._total.left_out
        if skipped > self._quota * max(self._clips, drawn):
            raise LoaderError(
                f"{skipped} of {drawn} clips drawn could not be read, more than loader.skip_quota ({self._quota:g}) allows; "
                "mend the store, or delete it to encode anew"
            )
        return batch, count

    def _next(self) -> tuple[PackedBatch, pack.Count]:
        deaths = 0
        while True:
            try:
                batch, count = next(self._source)
            except RuntimeError as error:
                # Grain has no class of its own for it.
                if "terminated unexpectedly" not in str(error):
                    raise
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise LoaderError(
                        f"{deaths} loader workers died in a row ({error}); loader.workers=0 needs none"
                    ) from error
                logging.warning("a loader worker died (%s); starting another (%d of %d)", error, deaths, MOST_DEATHS)
                self._source = iter(self._dataset)
                if self._state is not None:
                    self._source.set_state(self._state)
            else:
                count.worker_deaths += deaths
                return batch, count

    def get_state(self) -> Any:
        return self._source.get_state()

    def set_state(self, state: Any) -> None:
        self._state = state
        self._source.set_state(state)


def batches(
    store: LatentStore, tokeniser: Tokeniser, text_width: int | None, share: Share | None = None
) -> Iterator[tuple[PackedBatch, pack.Count]]:
    """An endless iterator of (batch, count) with get_state and set_state; every pass over the store is shuffled anew.

    share is what this process trains on of a batch, by default all; whatever it is, the batches of all processes together are
    the same. Raises ValueError if lanes do not divide the rows or the store is empty; a batch raises LoaderError if too much
    cannot be read.
    """
    packing, seed, lanes = tokeniser.packing, tokeniser.seed, tokeniser.config.lanes
    patch_dim = int(np.prod(tokeniser.geometry.patch)) * store.channels
    share = Share.whole(packing.rows) if share is None else share
    check_lanes(packing, tokeniser.config)
    lane_rows = packing.rows // lanes

    if not len(store):
        raise LoaderError(f"{store.folder} holds no clips; delete it to encode anew")
    draw = Draw(Reader(store, tokeniser.config.patience), tokeniser)
    finish = functools.partial(pack.fill_row, config=packing, patch_dim=patch_dim, text_width=text_width)
    clips = grain.MapDataset.range(len(store)).seed(seed).shuffle().repeat().map_with_index(draw)

    def lane(number: int) -> grain.IterDataset:
        mine = clips if lanes == 1 else clips.slice(slice(number, None, lanes))
        return PackRows(
            mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)),
            packing,
            finish,
            (seed,) if lanes == 1 else (seed, number),
        ).batch(lane_rows, batch_fn=list)

    read = {row // lane_rows for row in share.rows}
    dataset: grain.IterDataset = Lanes({number: lane(number) for number in sorted(read)}, lane_rows, share)
    if tokeniser.config.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read some, which only absl programs have parsed
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=tokeniser.config.workers)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_end_with_run)
    else:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4)
    return Guarded(dataset, len(store), tokeniser.config.skip_quota)


def _end_with_run(*_: int) -> None:
    """In a worker: a run that is killed cannot end its workers, which would wait for ever to hand out what they have."""

    def wait() -> None:
        run = multiprocessing.parent_process()
        assert run is not None
        run.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with run", daemon=True).start()


def fixed_batches(
    store: LatentStore, tokeniser: Tokeniser, text_width: int | None
) -> Iterator[tuple[PackedBatch, pack.Count]]:
    """One pass over a store in order, each clip once, the last batch padded with empty rows: for evaluation.

    Raises LoaderError if a clip cannot be read or fits no row: a judgement is of all clips or of none.
    """
    packing = tokeniser.packing
    patch_dim = int(np.prod(tokeniser.geometry.patch)) * store.channels
    reader = Reader(store, tokeniser.config.patience)
    clips = []
    for number in range(len(store)):
        latent, _ = reader(number)
        if latent is None:
            raise LoaderError(f"clip {number} of {store.folder} cannot be read; delete the folder to encode anew")
        clips.append(tokeniser(latent, 0)[0])
    rows, count = pack.pack_rows(clips, packing, np.random.default_rng(0))
    if count.too_long_clips:
        raise LoaderError(
            f"{count.too_long_clips:.0f} of {len(clips)} clips of {store.folder} fit no row of {packing.row_tokens} tokens and "
            f"{packing.row_text} of text; the largest have {max(len(clip.index_N) for clip in clips)} and "
            f"{max(clip.num_text for clip in clips)}: raise pack.row_tokens or pack.row_text"
        )
    for start in range(0, len(rows), packing.rows):
        some = [pack.fill_row(row, packing, patch_dim, text_width) for row in rows[start : start + packing.rows]]
        some += [pack.empty_row(packing, patch_dim, text_width)] * (packing.rows - len(some))
        yield pack.stack(some), count if start == 0 else pack.Count()

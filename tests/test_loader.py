"""Laws of loading: deterministic, resumable at any batch, every clip once a pass, draws keyed by clip."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

from sora_jax import disk
from sora_jax.data import latents, loader, masks, pack
from sora_jax.structs import Share

GEOMETRY = pack.Geometry((1, 1, 1), (4, 8, 8))
PACKING = pack.PackConfig(rows=2, row_tokens=40, row_slots=8, row_text=24, window=12, drop_rate=0.3)
PLAIN = loader.LoaderConfig(long_captions=0.5, caption_dropout=0.2, known=masks.KnownConfig(first_frames=0.3, box=0.2))
CLIPS = 30


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)

    def made():
        for number in range(CLIPS):
            shape = [(1, 2, 2), (3, 2, 2), (2, 3, 4)][number % 3]
            mean = rng.standard_normal((*shape, 4)).astype(np.float32)
            yield latents.Latent(
                number, mean, np.abs(mean), 8.0, (f"short {number % 5}", f"a long caption {number % 5}")
            )

    return latents.write(tmp_path_factory.mktemp("store") / "latents", made(), {"made": "here"})


def text(caption):
    words = caption.split()
    return np.full((len(words) + 1, 6), len(caption), np.float32), None


def batches(store, **changes):
    tokeniser = loader.Tokeniser(dataclasses.replace(PLAIN, **changes), PACKING, GEOMETRY, text, seed=3)
    return loader.batches(store, tokeniser, 6)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_store_gives_back_what_was_written(store):
    again = latents.LatentStore(store.folder)
    assert len(again) == CLIPS and again.meta == {"made": "here"}
    item = again[4]
    assert item.mean_thwc.shape == (3, 2, 2, 4) and item.captions == ("short 4", "a long caption 4") and item.id == 4
    assert np.allclose(np.abs(item.mean_thwc), item.std_thwc)
    with pytest.raises(FileNotFoundError, match="no encoded clips"):
        latents.LatentStore(store.folder.parent)


@pytest.mark.parametrize("sizes", [(7, 7, 7, 9), (30,), (1, 29)])
def test_a_store_of_parts_is_that_of_one_go(store, tmp_path, sizes):
    assert sum(sizes) == CLIPS
    ends = np.cumsum(sizes)
    items = [store[number] for number in range(CLIPS)]
    # Clips of fewer captions, and captions of other parts.
    items = [dataclasses.replace(x, captions=x.captions[: 1 + (x.id > 12)] + ("all",) * (x.id % 3 > 0)) for x in items]
    whole = latents.write(tmp_path / "whole", items, {"made": "here"})
    parts = [
        latents.write(tmp_path / f"part{end}", items[end - size : end], {"a": 1})
        for size, end in zip(sizes, ends, strict=True)
    ]
    joined = latents.join(tmp_path / "joined", parts, {"made": "here"})
    assert all(same(dataclasses.astuple(joined[n]), dataclasses.astuple(whole[n])) for n in range(CLIPS))
    for path in whole.folder.iterdir():
        if path.suffix == ".npy":
            assert np.array_equal(np.load(path), np.load(joined.folder / path.name)), path.name
    assert (joined.folder / "store.json").read_text() == (whole.folder / "store.json").read_text()


def test_a_part_that_is_cut_short_is_not_joined(store, tmp_path):
    part = latents.LatentStore(shutil.copytree(store.folder, tmp_path / "part"))
    with (part.folder / "std.npy").open("r+b") as file:
        file.truncate(part._offsets["std"] + 10)
    with pytest.raises(disk.FileError, match=r"std\.npy is cut short; delete the folder to encode anew"):
        latents.join(tmp_path / "joined", [part], {})
    assert not (tmp_path / "joined").exists()


def test_two_loaders_give_the_same(store):
    one, other = batches(store), batches(store)
    for _ in range(5):
        assert same(next(one)[0], next(other)[0])


@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_resume_goes_on_exactly(store, before):
    source = batches(store)
    for _ in range(before):
        next(source)
    state = source.get_state()
    expected = [next(source)[0] for _ in range(6)]
    again = batches(store)
    again.set_state(state)
    for batch in expected:
        assert same(next(again)[0], batch)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_processes_read_parts_of_the_same_batches(store, lanes):
    """Whatever the number of processes; and they go on as another number of them."""
    packing = dataclasses.replace(PACKING, rows=4)
    tokeniser = loader.Tokeniser(dataclasses.replace(PLAIN, lanes=lanes), packing, GEOMETRY, text, seed=3)
    whole = loader.batches(store, tokeniser, 6)
    shares = Share((0, 2), frozenset({0})), Share((1, 2, 3), frozenset({1, 2, 3}))
    parts = [loader.batches(store, tokeniser, 6, share) for share in shares]
    for _ in range(5):
        batch, count = next(whole)
        found = [next(part) for part in parts]
        for share, (part, _) in zip(shares, found, strict=True):
            assert same(jax.tree.map(lambda leaf, rows=share.rows: leaf[list(rows)], batch), part)
        # A row that both have is counted once.
        both = pack.Count()
        for _, counted in found:
            both.add(counted)
        assert both == count
    states = [part.get_state() for part in parts]
    again = loader.batches(store, tokeniser, 6)
    again.set_state(states[0] | states[1])
    assert same(next(again)[0], next(whole)[0])


def test_processes_open_different_clips(store, monkeypatch):
    opened = []
    read = latents.LatentStore.__getitem__
    monkeypatch.setattr(latents.LatentStore, "__getitem__", lambda self, i: (opened.append(i), read(self, i))[1])
    tokeniser = loader.Tokeniser(dataclasses.replace(PLAIN, lanes=2), PACKING, GEOMETRY, text, seed=3)
    firsts = []
    for row in range(2):
        opened.clear()
        next(loader.batches(store, tokeniser, 6, Share((row,), frozenset({row}))))
        firsts.append(set(opened[: PACKING.window]))
    assert len(firsts[0]) == len(firsts[1]) == PACKING.window and not firsts[0] & firsts[1]


def test_lanes_divide_rows(store):
    tokeniser = loader.Tokeniser(dataclasses.replace(PLAIN, lanes=3), PACKING, GEOMETRY, text, seed=3)
    with pytest.raises(ValueError, match=r"pack\.rows 2 must be a multiple of loader\.lanes 3"):
        loader.batches(store, tokeniser, 6)


def test_every_pass_draws_every_clip_once(store):
    source, drawn = batches(store), []
    while len(drawn) < 3 * CLIPS:
        batch, _ = next(source)
        for clips, draws, slots in zip(batch.clip_BS, batch.draw_BS, batch.layout.slot_segment_BS, strict=True):
            drawn += sorted({(int(d), int(c)) for c, d, s in zip(clips, draws, slots, strict=True) if s})
    # Windows of 12 clips, so the first two passes are complete once the third has begun.
    for number in range(2):
        assert sorted(clip for draw, clip in drawn if draw == number) == list(range(CLIPS))


def test_counts_add_up(store):
    source, total = batches(store), pack.Count()
    tokens = 0
    for _ in range(10):
        batch, count = next(source)
        total.add(count)
        tokens += int((batch.layout.segment_BN > 0).sum())
    # A window is counted when it is opened, so at most one window is counted ahead.
    assert tokens <= total.tokens <= tokens + PACKING.window * 24
    assert total.too_long_clips == 0 and total.dropped_tokens > 0


def test_a_draw_depends_on_seed_clip_and_draw_alone(store):
    tokeniser = loader.Tokeniser(PLAIN, PACKING, GEOMETRY, text, seed=3)
    one, other = (tokeniser(store[7], 2)[0] for _ in range(2))
    assert same(one, other)
    different = [tokeniser(store[7], 3)[0], dataclasses.replace(tokeniser, seed=4)(store[7], 2)[0]]
    assert any(len(one.index_N) != len(d.index_N) or not same(one, d) for d in different)


def shares(store, settings):
    tokeniser = loader.Tokeniser(settings, PACKING, GEOMETRY, text, seed=0)
    return [tokeniser(store[1], draw)[0] for draw in range(400)]


def test_captions_are_dropped_and_lengths_mixed_as_configured(store):
    drawn = shares(store, loader.LoaderConfig(long_captions=0.25, caption_dropout=0.2))
    lengths = np.array([tokens.num_text for tokens in drawn])
    assert np.mean(lengths == 1) == pytest.approx(0.2, abs=0.06)
    assert np.mean(lengths == 5) == pytest.approx(0.8 * 0.25, abs=0.06)


def test_known_frames_are_whole_frames_at_the_start(store):
    drawn = shares(store, loader.LoaderConfig(known=masks.KnownConfig(first_frames=0.5)))
    found = {tuple(tokens.known_N[np.argsort(tokens.index_N)]) for tokens in drawn if len(tokens.index_N) == 12}
    assert found == {tuple(np.arange(12) < 4 * frames) for frames in range(3)}
    share = np.mean([tokens.known_N.any() for tokens in drawn])
    assert share == pytest.approx(0.5, abs=0.08)


def test_what_is_played_to_and_fro_is_stored_as_such_and_has_both_ends_given(tmp_path):
    values = np.ones((3, 2, 2, 4), np.float32)
    made = [latents.Latent(number, values, values, 8.0, ("a",), to_and_fro=number == 1) for number in range(2)]
    store = latents.write(tmp_path / "latents", made, {})
    tokeniser = loader.Tokeniser(loader.LoaderConfig(), PACKING, GEOMETRY, text, seed=3)
    assert [store[number].to_and_fro for number in range(2)] == [False, True]
    tokens = [tokeniser(store[number], 0)[0] for number in range(2)]
    assert not tokens[0].known_N.any()
    assert set(tokens[1].index_N[tokens[1].known_N] // 4) == {0, 2}
    assert set(tokens[1].index_N[~tokens[1].known_N] // 4) == {1}


def test_positions_are_squeezed_as_configured_and_nothing_else_is(store):
    plain, squeezed = shares(store, PLAIN), shares(store, dataclasses.replace(PLAIN, squeezed=0.5))
    scales = []
    for one, other in zip(plain, squeezed, strict=True):
        scale_3 = other.extent_3 / one.extent_3
        assert np.allclose(other.position_N3, one.position_N3 * scale_3)
        assert same(one._replace(position_N3=0, extent_3=0), other._replace(position_N3=0, extent_3=0))
        scales.append(scale_3)
    scales = np.array(scales)
    assert (scales[:, 0] == 1).all() and scales.min() >= loader.LEAST_SCALE - 1e-6 and scales.max() == 1
    assert np.mean(scales[:, 1:] < 1, 0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert np.corrcoef(scales[:, 1:].T)[0, 1] == pytest.approx(0, abs=0.15)
    assert scales[scales < 1].mean() == pytest.approx((1 + loader.LEAST_SCALE) / 2, abs=0.03)


def test_what_comes_after_a_next_frame_is_not_there(store):
    settings = loader.LoaderConfig(known=masks.KnownConfig(next_frame=1.0))
    packing, ends = dataclasses.replace(PACKING, drop_rate=0.0), set()
    for clip in range(len(store)):
        latent = store[clip]
        tokens, _ = loader.Tokeniser(settings, packing, GEOMETRY, text, 0)(latent, 0)
        whole, _ = loader.Tokeniser(loader.LoaderConfig(), packing, GEOMETRY, text, 0)(latent, 0)
        count, frame = len(tokens.index_N), latent.mean_thwc[0, ..., 0].size
        assert count % frame == 0 and (tokens.known_N == (np.arange(count) < count - frame)).all()
        assert (tokens.mean_NP == whole.mean_NP[:count]).all() and (
            tokens.position_N3 == whole.position_N3[:count]
        ).all()
        assert tokens.extent_3[0] <= whole.extent_3[0]
        ends.add((count // frame, len(latent.mean_thwc)))
    assert any(end < length for end, length in ends) and any(end == length > 1 for end, length in ends)


def test_evaluation_batches_hold_every_clip_once(store):
    tokeniser = loader.Tokeniser(
        loader.LoaderConfig(0, 0), dataclasses.replace(PACKING, drop_rate=0.0), GEOMETRY, text, 0
    )
    seen = {}
    for batch, _ in loader.fixed_batches(store, tokeniser, 6):
        assert batch.mean_BNP.shape[:2] == (2, 40)
        seen |= pack.unpack(batch.mean_BNP, batch)
    assert sorted(seen) == list(range(CLIPS))


def test_an_evaluation_leaves_no_clip_out(store):
    few = dataclasses.replace(PACKING, row_text=1)
    tokeniser = loader.Tokeniser(loader.LoaderConfig(0, 0), few, GEOMETRY, text, 0)
    with pytest.raises(
        loader.LoaderError, match=r"fit no row of 40 tokens and 1 of text.* raise pack\.row_tokens or pack"
    ):
        next(loader.fixed_batches(store, tokeniser, 6))


def test_nothing_that_fits_is_an_error(store):
    tokeniser = loader.Tokeniser(PLAIN, dataclasses.replace(PACKING, row_tokens=2), GEOMETRY, text, 0)
    with pytest.raises(loader.LoaderError, match=r"raise pack\.row_tokens"):
        next(loader.batches(store, tokeniser, 6))


# What goes wrong in reading ------------------------------------------------------------------------------------------


@pytest.fixture
def copied(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    return latents.LatentStore(tmp_path / "copy")


def flip(store, number, name="mean", bit=3):
    """Flips one bit of a clip on disk."""
    with (store.folder / f"{name}.npy").open("r+b") as file:
        at = store._offsets[name] + int(store.starts[number]) * store.channels * 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_store_that_comes_back_is_waited_for(store, copied):
    source, expected = batches(copied, patience=30.0), batches(store)
    away = copied.folder.with_name("away")
    copied.folder.rename(away)
    back = threading.Timer(0.5, away.rename, (copied.folder,))
    back.start()
    total = pack.Count()
    for _ in range(4):
        batch, count = next(source)
        total.add(count)
        assert same(batch, next(expected)[0])
    back.join()
    assert total.read_retries >= 2 and total.left_out == 0


def test_a_store_that_stays_away_is_an_error(copied):
    source = batches(copied, patience=0.3)
    shutil.rmtree(copied.folder)
    with pytest.raises(loader.LoaderError, match=r"has been away for 0\.3 s"):
        next(source)


@pytest.mark.parametrize("name", latents.VALUES)
def test_every_flipped_bit_of_a_clip_is_found(copied, name):
    for number in range(CLIPS):
        flip(copied, number, name, bit=number % 8)
        with pytest.raises(latents.DamagedClipError, match=f"clip {number} "):
            copied[number]


def test_a_damaged_clip_is_left_out_and_counted(copied):
    flip(copied, 4)
    source, drawn, total = batches(copied, skip_quota=1.0), set(), pack.Count()
    while total.clips + total.left_out < 2 * CLIPS + PACKING.window:
        batch, count = next(source)
        drawn |= set(batch.clip_BS[batch.layout.slot_segment_BS > 0].tolist())
        total.add(count)
    assert drawn == set(range(CLIPS)) - {4}
    assert total.damaged_clips in (2, 3) and total.unreadable_clips == 0


def test_a_clip_that_cannot_be_read_is_not_one_that_is_damaged(copied, monkeypatch):
    read = latents.LatentStore.__getitem__

    def refuse(self, number):
        if number == 4:
            raise OSError("Input/output error")
        return read(self, number)

    monkeypatch.setattr(latents.LatentStore, "__getitem__", refuse)
    reader = loader.Reader(copied, 0.2)
    assert [reader(number)[0] is None for number in (3, 4, 5)] == [False, True, False]
    assert reader(4)[1] == pack.Count(unreadable_clips=1)


def test_more_than_the_quota_is_an_error(copied):
    for number in range(4):
        flip(copied, number)
    source = batches(copied, skip_quota=3 / CLIPS)
    with pytest.raises(loader.LoaderError, match=r"more than loader\.skip_quota \(0\.1\)"):
        for _ in range(40):
            next(source)


def test_resume_leaves_out_what_was_left_out(copied):
    """Even if it could be read by now: the rows of an open window must not change."""
    flip(copied, 4)
    source = batches(copied, skip_quota=1.0)
    while not next(source)[1].damaged_clips:
        pass
    state = source.get_state()
    expected = next(source)[0]
    flip(copied, 4)
    again = batches(copied, skip_quota=1.0)
    again.set_state(state)
    assert same(next(again)[0], expected)


def test_a_judgement_needs_every_clip(copied):
    flip(copied, 4)
    tokeniser = loader.Tokeniser(PLAIN, PACKING, GEOMETRY, text, seed=3)
    with pytest.raises(loader.LoaderError, match="clip 4 of"):
        list(loader.fixed_batches(copied, tokeniser, 6))


def test_a_worker_that_dies_is_replaced(store):
    source = batches(store, workers=1)
    drawn, total = [next(source)], pack.Count()
    mine = multiprocessing.active_children()  # before the other source has any
    expected = batches(store, workers=1)
    os.kill(next(child.pid for child in mine if child.is_alive()), signal.SIGKILL)
    drawn += [next(source) for _ in range(11)]
    for batch, count in drawn:
        total.add(count)
        assert same(batch, next(expected)[0])
    assert total.worker_deaths == 1


def test_workers_that_keep_dying_are_an_error(store, monkeypatch):
    source = batches(store)

    def die(_):
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    monkeypatch.setattr(source, "_dataset", type("Dying", (), {"__iter__": lambda self: self, "__next__": die})())
    source._source = iter(source._dataset)
    with pytest.raises(loader.LoaderError, match="4 loader workers died in a row"):
        next(source)

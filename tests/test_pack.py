"""Laws of Patch n' Pack: nothing is lost, positions are in real units, packing and padding do not change what a model does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.data import pack
from sora_jax.models import dit

GEOMETRY = pack.Geometry(patch=(1, 1, 1), stride=(4, 8, 8))
CONFIG = pack.PackConfig(rows=2, row_tokens=64, row_slots=8, row_text=32, window=32)
SHAPES = [(1, 4, 4), (3, 4, 4), (2, 4, 6), (1, 6, 4), (4, 4, 4), (1, 2, 2)]


def make(rng, number, shape, known_frames=0, channels=4, words=5, text_width=6):
    t, h, w = shape
    tokens = t * h * w
    latent = rng.standard_normal((*shape, channels)).astype(np.float32)
    return pack.Tokens(
        mean_NP=pack.patchify(latent, GEOMETRY.patch),
        std_NP=np.full((tokens, channels), 0.1, np.float32),
        position_N3=pack.positions((*shape, channels), GEOMETRY, 8.0),
        index_N=np.arange(tokens, dtype=np.int32),
        known_N=np.arange(tokens) < known_frames * h * w,
        ceiling=0.75,
        extent_3=pack.extent((*shape, channels), GEOMETRY, 8.0),
        clip=number,
        draw=0,
        text_LM=rng.standard_normal((words, text_width)).astype(np.float32),
        text_token_L=None,
    )


@pytest.fixture
def clips(rng):
    return [make(rng, number, SHAPES[number % len(SHAPES)], known_frames=number % 2) for number in range(24)]


def packed(clips, config=CONFIG):
    rows, count = pack.pack_rows(clips, config, np.random.default_rng(0))
    return pack.stack([pack.fill_row(row, config, 4, 6) for row in rows]), count


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (3, 2, 1)])
def test_unpatchify_undoes_patchify(rng, patch):
    latent = rng.standard_normal((3, 4, 6, 5))
    assert np.array_equal(pack.unpatchify(pack.patchify(latent, patch), latent.shape, patch), latent)


def test_a_patch_is_a_block_of_neighbours(rng):
    latent = rng.standard_normal((2, 4, 4, 3))
    patches = pack.patchify(latent, (1, 2, 2))
    assert np.array_equal(patches[5], latent[1, :2, 2:].reshape(-1))


def test_patch_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        pack.patchify(np.zeros((3, 5, 4, 1)), (1, 2, 2))


def test_unpack_undoes_pack(clips):
    batch, count = packed(clips)
    back = pack.unpack(batch.mean_BNP, batch)
    assert sorted(back) == list(range(len(clips))) and count.clips == len(clips)
    for clip in clips:
        assert np.array_equal(back[clip.clip], clip.mean_NP)


def test_rows_keep_their_budgets_and_every_token_its_own(clips):
    batch, count = packed(clips)
    layout = batch.layout
    assert count.tokens == (layout.segment_BN > 0).sum() == sum(len(clip.index_N) for clip in clips)
    by_id = {clip.clip: clip for clip in clips}
    for row in range(len(layout.segment_BN)):
        for token in np.flatnonzero(layout.segment_BN[row]):
            slot = layout.slot_BN[row, token]
            clip = by_id[batch.clip_BS[row, slot]]
            place = batch.index_BN[row, token]
            assert layout.slot_segment_BS[row, slot] == layout.segment_BN[row, token]
            assert batch.ceiling_BS[row, slot] == (0 if clip.known_N[place] else clip.ceiling)
            assert np.array_equal(layout.position_BN3[row, token], clip.position_N3[place])
            assert np.array_equal(layout.extent_BS3[row, slot], clip.extent_3)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 9))


@given(
    st.lists(SIZES, min_size=1, max_size=12),
    st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 16)),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 2**32),
)
def test_any_mix_is_packed_within_its_budgets_and_comes_back(sizes, budgets, drop_rate, seed):
    """Clips of any sizes, with known frames, dropped tokens and words of any number."""
    config = pack.PackConfig(2, *budgets, window=8, drop_rate=drop_rate)
    rng, clips = np.random.default_rng(seed), []
    for number, (t, h, w, known, words) in enumerate(sizes):
        clip = make(rng, 7 * number + 3, (t, h, w), known_frames=min(known, t), words=words)
        clips.append(pack.drop(clip, h * w, config, rng)[0])
    rows, count = pack.pack_rows(clips, config, np.random.default_rng(seed))
    fitting = [clip for clip in clips if pack.fits(clip, config)]
    assert sorted(clip.clip for row in rows for clip in row) == [clip.clip for clip in fitting]
    assert count.too_long_clips == len(clips) - len(fitting) and count.tokens == sum(len(c.index_N) for c in fitting)
    for row in rows:
        sizes = np.array([(len(clip.index_N), clip.num_slots, clip.num_text) for clip in row]).sum(0)
        assert row and (sizes <= (config.row_tokens, config.row_slots, config.row_text)).all()
    if rows:
        batch = pack.stack([pack.fill_row(row, config, 4, 6) for row in rows])
        back = pack.unpack(batch.mean_BNP, batch)
        assert back.keys() == {clip.clip for clip in fitting}
        assert all(np.array_equal(back[clip.clip], clip.mean_NP) for clip in fitting)
        # Nothing but the clips' tokens and words is in a row.
        assert (batch.layout.segment_BN > 0).sum() == count.tokens and (
            batch.mean_BNP[batch.layout.segment_BN == 0] == 0
        ).all()
        assert (batch.layout.text_segment_BL > 0).sum() == sum(clip.num_text for clip in fitting)


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), max_size=40), st.randoms(use_true_random=False))
def test_rows_are_opened_only_when_no_other_has_room(sizes, random):
    budgets, order = (9, 9, 9), list(range(len(sizes)))
    random.shuffle(order)
    rows = pack.assign(sizes, budgets, order)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    used = [np.sum([sizes[item] for item in row], 0) for row in rows]
    assert all((each <= 9).all() for each in used)
    # The first of a row found no room in any earlier one, as these were then; all the less as they are now.
    for number, row in enumerate(rows):
        assert all(((earlier + sizes[row[0]]) > 9).any() for earlier in used[:number])


def test_too_long_clips_are_counted_not_lost(rng, clips):
    long = make(rng, 99, (5, 4, 4))
    wordy = make(rng, 98, (1, 4, 4), words=40)
    _, count = packed([*clips, long, wordy])
    assert count.too_long_clips == 2 and count.clips == len(clips)
    with pytest.raises(ValueError, match="do not fit the row"):
        pack.fill_row([long], CONFIG, 4, 6)


def test_fill_of_a_mix(rng):
    # Three sizes and four durations; the quickstart's own mix is in test_experiments.py.
    sizes = [(h, w) for h, w in [(4, 4), (6, 4), (4, 6)]]
    shapes = [(int(t), *sizes[rng.integers(3)]) for t in rng.choice([1, 3, 4, 5], 256, p=np.array([1, 2, 2, 4]) / 9)]
    clips = [make(rng, number, shape, words=2) for number, shape in enumerate(shapes)]
    config = dataclasses.replace(CONFIG, row_tokens=240, row_slots=32, row_text=64)
    _, count = packed(clips, config)
    assert count.fill >= 0.97


def test_positions_are_seconds_and_pixels():
    position = pack.positions((3, 2, 2, 1), GEOMETRY, fps=4.0).reshape(3, 2, 2, 3)
    # Latent 0 is frame 0; latent 1 stands for frames 1..4, whose middle is 2.5 frames; latent 2 for frames 5..8.
    assert position[:, 0, 0, 0] == pytest.approx([0.0, 2.5 / 4, 6.5 / 4])
    assert position[0, :, 0, 1] == pytest.approx([4.0, 12.0]) and position[0, 0, :, 2] == pytest.approx([4.0, 12.0])
    twice = pack.positions((3, 2, 2, 1), GEOMETRY, fps=8.0).reshape(3, 2, 2, 3)
    assert np.allclose(twice[..., 0] * 2, position[..., 0]) and np.array_equal(twice[..., 1:], position[..., 1:])
    coarse = pack.positions((3, 2, 2, 1), GEOMETRY._replace(patch=(1, 2, 2)), fps=4.0)
    assert np.allclose(coarse[:, 1:], 8.0)


def test_drop_rate_is_continuous_and_per_clip(rng):
    config = dataclasses.replace(CONFIG, drop_rate=0.8)
    clip = make(rng, 0, (4, 4, 4))
    kept = []
    for _ in range(300):
        fewer, count = pack.drop(clip, 16, config, rng)
        assert count.dropped_tokens == 64 - len(fewer.index_N)
        assert np.array_equal(fewer.mean_NP, clip.mean_NP[fewer.index_N])
        kept.append(len(fewer.index_N))
    assert len(set(kept)) > 25 and np.mean(kept) == pytest.approx(64 * 0.6, rel=0.05)
    assert min(kept) >= 1


def test_repeats_are_dropped_and_only_they(rng):
    clip = make(rng, 0, (3, 2, 2))
    still = np.concatenate([clip.mean_NP[:4], clip.mean_NP[:4] + 1e-4, clip.mean_NP[8:]])
    fewer, count = pack.drop(clip._replace(mean_NP=still), 4, dataclasses.replace(CONFIG, drop_repeats=0.01), rng)
    assert (
        list(fewer.index_N) == [0, 1, 2, 3, 8, 9, 10, 11] and count.dropped_repeats == 4 and count.dropped_tokens == 0
    )


@pytest.fixture(scope="module")
def model():
    config = dit.DiTConfig(width=24, blocks=2, heads=1, channels=4, text_width=6)
    graphdef, params = nnx.split(dit.DiT(config, nnx.Rngs(0)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Zero gates would make every output zero.
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, leaves)


def outputs_and_gradients(model, batch):
    """Outputs by clip, and the gradient of a loss that sums over clips."""
    graphdef, params = model
    time = jnp.asarray(batch.ceiling_BS * (0.3 + 0.02 * batch.clip_BS), jnp.float32)

    def loss(params):
        out = nnx.merge(graphdef, params)(jnp.asarray(batch.mean_BNP), time, jax.tree.map(jnp.asarray, batch.layout))
        return jnp.sum(jnp.where(batch.layout.segment_BN[..., None] > 0, jnp.sin(out), 0)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return pack.unpack(np.asarray(out), batch), grads


def test_packed_equals_unpacked_in_outputs_and_gradients(model, clips):
    clips = clips[:9]
    together, grads = outputs_and_gradients(model, packed(clips)[0])
    alone = pack.stack([pack.fill_row([clip], CONFIG, 4, 6) for clip in clips])
    apart, grads_apart = outputs_and_gradients(model, alone)
    for number in together:
        assert np.abs(together[number] - apart[number]).max() < 2e-5
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_apart), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-3 * float(jnp.abs(other).max() + 1e-6))


def test_padding_is_inert(model, clips):
    batch, _ = packed(clips)
    padding = batch.layout.segment_BN == 0
    assert padding.any()
    noisy = batch.mean_BNP.copy()
    noisy[padding] = 1e3
    where = batch.layout.position_BN3.copy()
    where[padding] = 50.0
    text = batch.layout.text_BLM.copy()
    text[batch.layout.text_segment_BL == 0] = 1e2
    spoiled = batch._replace(mean_BNP=noisy, layout=batch.layout._replace(position_BN3=where, text_BLM=text))
    one, grads_one = outputs_and_gradients(model, batch)
    other, grads_other = outputs_and_gradients(model, spoiled)
    for number in one:
        assert np.abs(one[number] - other[number]).max() < 2e-5
    for a, b in zip(jax.tree.leaves(grads_one), jax.tree.leaves(grads_other), strict=True):
        assert np.allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(a).max() + 1e-6))


def test_configs_check_themselves():
    with pytest.raises(ValueError, match="row_tokens"):
        dataclasses.replace(CONFIG, row_tokens=0)
    with pytest.raises(ValueError, match="drop_rate"):
        dataclasses.replace(CONFIG, drop_rate=1.0)

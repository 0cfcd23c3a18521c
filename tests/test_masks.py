"""Laws of the masks that are trained on: shares as told, whole frames where frames are meant, something always unknown."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.data import masks
from sora_jax.data.masks import KnownConfig

GRIDS = [(1, 1, 1), (1, 4, 4), (2, 1, 1), (2, 3, 4), (3, 1, 2), (5, 4, 6)]
KINDS = [field.name for field in dataclasses.fields(KnownConfig)]


def drawn(kind, grid, count=200, share=1.0):
    rng = np.random.default_rng(0)
    return [masks.draw(KnownConfig(**{kind: share}), rng, grid) for _ in range(count)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_something_is_always_unknown(kind, grid):
    assert not any(mask.all() for mask, _ in drawn(kind, grid))
    # Where the next frame is made, the clip ends with it.
    lengths = range(1, grid[0] + 1) if kind == "next_frame" else grid[:1]
    assert {mask.shape for mask, _ in drawn(kind, grid)} == {(length, *grid[1:]) for length in lengths}
    assert all(0 <= ceiling <= 1 for _, ceiling in drawn(kind, grid))


def frames(kind, grid=(5, 2, 3)):
    """Which frames are known, of all draws; each frame is known or unknown as a whole."""
    masks = [mask for mask, _ in drawn(kind, grid)]
    assert all(mask[time].all() or not mask[time].any() for mask in masks for time in range(grid[0]))
    return {tuple(np.flatnonzero(mask[:, 0, 0]).tolist()) for mask in masks}


def test_each_kind_of_frames_is_all_that_its_name_says():
    assert frames("first_frame") == {(0,)}
    assert frames("first_frames") == {tuple(range(k)) for k in (1, 2, 3, 4)}
    assert frames("last_frames") == {tuple(range(k, 5)) for k in (1, 2, 3, 4)}
    assert frames("both_ends") == {(*range(a), *range(b, 5)) for a in (1, 2, 3) for b in range(a + 1, 5)}
    assert len(frames("some_frames")) == 2**5 - 2


def test_of_what_is_played_to_and_fro_both_ends_are_known_whatever_the_shares():
    rng = np.random.default_rng(0)
    for config in (KnownConfig(), KnownConfig(box=1.0), KnownConfig(less_noise=1.0)):
        for _ in range(50):
            known, ceiling = masks.draw(config, rng, (5, 2, 3), to_and_fro=True)
            assert known[0].all() and known[-1].all() and not known.all() and ceiling == 1


def test_a_next_frame_ends_the_clip():
    for mask, ceiling in drawn("next_frame", (4, 2, 2)):
        assert mask[:-1].all() and not mask[-1].any() and ceiling == 1


def test_boxes_are_known_inside_or_outside_and_keep_their_place_where_known_inside():
    masks = [mask for mask, _ in drawn("box", (4, 4, 5), 400)]
    inside = outside = 0
    for mask in masks:
        if not mask.any():
            continue
        where = np.argwhere(~mask)
        low, high = where.min(0), where.max(0) + 1
        if (~mask).sum() == np.prod(high - low):  # the unknown is a box
            outside += 1
        else:
            inside += 1
            assert (mask == mask[:1]).all()
    assert min(inside, outside) > 50
    assert len({mask.tobytes() for mask in masks}) > 100


def test_less_noise_gives_nothing_and_lowers_the_ceiling():
    found = drawn("less_noise", (2, 2, 2))
    assert not any(mask.any() for mask, _ in found)
    ceilings = np.array([ceiling for _, ceiling in found])
    assert ceilings.mean() == pytest.approx(0.5, abs=0.06) and ceilings.max() > 0.95


def test_shares_are_as_told():
    config = KnownConfig(first_frame=0.2, last_frames=0.3, less_noise=0.1)
    rng = np.random.default_rng(1)
    found = [masks.draw(config, rng, (3, 2, 2)) for _ in range(2000)]
    first = np.mean([mask[0].all() for mask, _ in found])
    last = np.mean([mask[-1].all() for mask, _ in found])
    less = np.mean([ceiling < 1 for _, ceiling in found])
    assert [first, last, less] == pytest.approx([0.2, 0.3, 0.1], abs=0.03)


@pytest.mark.parametrize("bad", [{"box": -0.1}, {"box": 1.5}, {"box": 0.6, "first_frame": 0.6}])
def test_shares_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"loader\.known"):
        KnownConfig(**bad)


@given(
    st.lists(st.floats(0, 1 / len(KINDS)), min_size=len(KINDS), max_size=len(KINDS)),
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 2**32),
)
def test_any_mixture_of_any_grid_leaves_something_to_make(shares, grid, seed):
    config = KnownConfig(**dict(zip(KINDS, shares, strict=True)))
    mask, ceiling = masks.draw(config, np.random.default_rng(seed), grid)
    assert mask.dtype == bool and mask.shape[1:] == grid[1:] and 1 <= mask.shape[0] <= grid[0]
    assert not mask.all() and 0 <= ceiling <= 1
    # Less noise is for clips of which nothing is given; a clip is cut only where its last frame is made.
    assert ceiling == 1 or not mask.any()
    assert mask.shape[0] == grid[0] or not mask[-1].any()
    again, same = masks.draw(config, np.random.default_rng(seed), grid)
    assert np.array_equal(mask, again) and ceiling == same

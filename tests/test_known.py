"""Which cells and patches a mask of given pixels makes known."""

import numpy as np
import pytest

from sora_jax.generate import known
from sora_jax.generate.known import Known

STRIDE = (4, 8, 8)


def test_a_cell_is_known_only_if_all_its_pixels_are_given(rng):
    for _ in range(50):
        cells_thw = rng.random((3, 2, 4)) < 0.5
        # Frame 0 is latent 0, four frames are each of the others.
        frames = np.repeat(cells_thw, [1, 4, 4], axis=0)
        given_THW = frames.repeat(8, axis=1).repeat(8, axis=2)
        assert np.array_equal(known.known_cells(given_THW, STRIDE), cells_thw)
        if not cells_thw.any():
            continue
        T, H, W = (int(rng.choice(axis)) for axis in np.nonzero(given_THW))
        given_THW[T, H, W] = False
        cells_thw[(T + 3) // 4, H // 8, W // 8] = False
        assert np.array_equal(known.known_cells(given_THW, STRIDE), cells_thw)


def test_a_patch_is_known_only_if_all_its_cells_are():
    known_thw = np.ones((2, 4, 4), bool)
    known_thw[1, 3, 0] = False
    assert np.flatnonzero(~known.known_patches(known_thw, (1, 2, 2))).tolist() == [6]
    assert known.known_patches(known_thw, (2, 4, 4)).tolist() == [False]


def test_a_mask_of_another_size_and_strengths_outside_of_0_to_1_are_refused():
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="must agree"):
        Known(frames, np.zeros((4, 8, 8), bool))
    with pytest.raises(ValueError, match="strength"):
        Known(frames, np.zeros((5, 8, 8), bool), 1.5)

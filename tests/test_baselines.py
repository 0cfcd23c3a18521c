"""Laws of the comparisons with older ways: windows one by one make every frame once, each from those before it."""

import numpy as np
import pytest

from sora_jax.study import baselines


@pytest.mark.parametrize(("frames", "window", "stride"), [(17, 17, 4), (133, 17, 4), (9, 5, 4), (5, 5, 1), (1, 9, 4)])
def test_one_latent_frame_after_the_other(frames, window, stride):
    windows = baselines.one_by_one(frames, window, stride)
    made = [np.arange(each.first, each.last) for each in windows]
    assert np.concatenate(made).tolist() == list(range(frames))
    assert len(made[0]) == 1 and all(len(part) == stride for part in made[1:])
    for each in windows:
        assert 0 <= each.start <= each.first and each.stop == each.last
        assert (each.stop - each.start - 1) % stride == 0 and each.stop - each.start <= window
        # As much is seen as fits.
        assert each.start == 0 or each.stop - each.start == window

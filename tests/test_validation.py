"""Losses by part are means over tokens, and their weighted mean is the whole."""

import numpy as np
import pytest

from sora_jax.evaluate import validation


def test_parts_make_the_whole(rng):
    count = 40
    tokens = rng.integers(1, 30, count)
    sizes = [((1, 32, 32), (9, 48, 32))[number % 2] for number in range(count)]
    errors = validation.Errors(rng.uniform(0, 1, count) * tokens, tokens, rng.uniform(0, 1, count), sizes)
    found = validation.scores(errors)
    assert found["val_loss"] == pytest.approx(errors.error_n.sum() / tokens.sum())
    for kind, groups in (("time", 4), ("size", 2)):
        parts = {name: value for name, value in found.items() if name.startswith(f"val_loss_{kind}/")}
        assert len(parts) == groups
    large = np.array([size == (9, 48, 32) for size in sizes])
    whole = found["val_loss_size/9x48x32"] * tokens[large].sum() + found["val_loss_size/1x32x32"] * tokens[~large].sum()
    assert whole / tokens.sum() == pytest.approx(found["val_loss"])


def test_every_loss_has_its_bounds_beside_it(rng):
    count = 20
    tokens, times = rng.integers(1, 30, count), rng.uniform(0, 1, count)
    sizes = [(1, 32, 32)] * count
    bounds = {name: rng.uniform(0, 1, count) * tokens for name in validation.BOUNDS}
    found = validation.scores(validation.Errors(tokens * 0.5, tokens, times, sizes, bounds))
    for name, error in bounds.items():
        held = validation.scores(validation.Errors(error, tokens, times, sizes))
        for loss, value in held.items():
            assert found[f"{loss}_{name}"] == pytest.approx(value)


def test_what_no_clip_has_is_left_out():
    errors = validation.Errors(np.array([2.0]), np.array([4]), np.array([0.9]), [(1, 32, 32)])
    assert validation.scores(errors) == {
        "val_loss": 0.5,
        "val_loss_time/0.75-1.00": 0.5,
        "val_loss_size/1x32x32": 0.5,
    }

"""Rotary positions: scores depend on differences of position alone, each pair turns with one axis."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn import rope

WAVELENGTHS = ((0.5, 8.0), (16.0, 256.0), (16.0, 256.0))


def score(q, k, at_q, at_k):
    frequency = rope.frequencies(q.shape[-1], WAVELENGTHS)
    turned = [
        rope.rotate(x[None, None, None], rope.angles(jnp.asarray(at, jnp.float32)[None, None], frequency))
        for x, at in ((q, at_q), (k, at_k))
    ]
    return float((turned[0] * turned[1]).sum())


def test_only_differences_matter(rng):
    q, k = jnp.asarray(rng.standard_normal((2, 24)), jnp.float32)
    here, there, shift = np.array([0.3, 12.0, 20.0]), np.array([1.1, 4.0, 36.0]), np.array([2.0, 40.0, 8.0])
    assert score(q, k, here, there) == pytest.approx(score(q, k, here + shift, there + shift), abs=1e-3)
    assert score(q, k, here, there) != pytest.approx(score(q, k, here, there + shift), abs=1e-2)


def test_origin_is_not_turned_and_lengths_stay(rng):
    x = jnp.asarray(rng.standard_normal((1, 2, 1, 24)), jnp.float32)
    frequency = rope.frequencies(24, WAVELENGTHS)
    position = jnp.asarray([[[0.0, 0.0, 0.0], [1.0, 30.0, 7.0]]])
    turned = rope.rotate(x, rope.angles(position, frequency))
    assert np.allclose(turned[0, 0], x[0, 0]) and not np.allclose(turned[0, 1], x[0, 1])
    assert np.allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_every_pair_turns_with_one_axis_within_its_wavelengths():
    table = rope.frequencies(64, WAVELENGTHS)
    assert np.all((table > 0).sum(1) == 1) and list((table > 0).sum(0)) == [8, 12, 12]
    for axis, (short, long) in enumerate(WAVELENGTHS):
        turning = table[table[:, axis] > 0, axis]
        assert turning.max() == pytest.approx(2 * np.pi / short) and turning.min() == pytest.approx(2 * np.pi / long)


def test_small_heads_are_refused():
    with pytest.raises(ValueError, match="use fewer heads"):
        rope.frequencies(8, WAVELENGTHS)

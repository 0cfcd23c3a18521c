"""Laws of the flow: ends of the path, cycles of conversions, densities of times, keys of noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import flow


@pytest.fixture
def path(rng):
    clean, noise = jnp.asarray(rng.standard_normal((2, 3, 5, 4)), jnp.float32)
    time = jnp.asarray(rng.uniform(0.05, 0.95, (3, 5)), jnp.float32)
    return clean, noise, time, flow.corrupt(clean, noise, time)


def test_ends_of_the_path(path):
    clean, noise, time, _ = path
    assert np.allclose(flow.corrupt(clean, noise, jnp.zeros_like(time)), clean)
    assert np.allclose(flow.corrupt(clean, noise, jnp.ones_like(time)), noise)


def test_velocity_is_the_slope(path):
    clean, noise, time, noisy = path
    later = flow.corrupt(clean, noise, time + 1e-2)
    assert np.allclose((later - noisy) / 1e-2, flow.velocity(clean, noise), atol=1e-3)


def test_conversions_cycle(path):
    clean, noise, time, noisy = path
    from_velocity = {
        "clean": lambda v: flow.clean_from_velocity(noisy, v, time),
        "noise": lambda v: flow.noise_from_velocity(noisy, v, time),
        "velocity": lambda v: v,
    }
    to_velocity = {
        "clean": lambda x: flow.velocity_from_clean(noisy, x, time),
        "noise": lambda x: flow.velocity_from_noise(noisy, x, time),
        "velocity": lambda x: x,
    }
    truth = {"clean": clean, "noise": noise, "velocity": flow.velocity(clean, noise)}
    for start, end in itertools.product(truth, truth):
        assert np.allclose(from_velocity[end](to_velocity[start](truth[start])), truth[end], atol=2e-5), (start, end)


def test_shift_keeps_ends_and_order():
    time = np.linspace(0, 1, 50)
    for shift in (0.5, 1.0, 3.0):
        moved = flow.shifted(time, shift)
        assert moved[0] == 0 and moved[-1] == pytest.approx(1) and np.all(np.diff(moved) > 0)
    assert np.allclose(flow.shifted(flow.shifted(time, 3.0), 1 / 3.0), time)
    assert np.all(flow.shifted(time[1:-1], 3.0) > time[1:-1])


def test_resolution_shift_keeps_the_signal_to_noise_ratio():
    # Averaging n equal pixels divides the noise by sqrt(n): at the shifted time the average looks as before at the first.
    time, n = 0.3, 4.0
    before = (1 - time) / time
    after = flow.shifted(time, flow.resolution_shift(n, 1.0))
    assert (1 - after) / after * np.sqrt(n) == pytest.approx(before)


def test_times_are_logit_normal():
    normal = jax.random.normal(jax.random.key(0), (20000,))
    time = flow.times(normal, flow.TimeConfig(mean=0.4, std=0.7))
    logit = np.log(time / (1 - time))
    assert logit.mean() == pytest.approx(0.4, abs=0.02) and logit.std() == pytest.approx(0.7, abs=0.02)


def test_loss_ignores_what_has_no_weight(rng):
    predicted, target = jnp.asarray(rng.standard_normal((2, 2, 4, 3)), jnp.float32)
    weight = jnp.array([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    loss, error = flow.loss(predicted, target, weight)
    spoiled = jnp.where(weight[..., None] == 0, 1e6, predicted)
    assert flow.loss(spoiled, target, weight)[0] == loss
    assert loss == pytest.approx(np.asarray(error)[weight == 1].mean(), rel=1e-6)
    assert flow.loss(predicted, target, jnp.zeros_like(weight))[0] == 0


def test_noise_follows_the_clip_not_its_place():
    key = jax.random.key(7)
    clip, draw, index = jnp.array([[5, 5, 9]]), jnp.array([[0, 0, 0]]), jnp.array([[0, 1, 0]])
    noise = flow.token_noise(key, clip, draw, index, 4)
    moved = flow.token_noise(key, clip[:, ::-1], draw, index[:, ::-1], 4)[:, ::-1]
    assert np.array_equal(noise, moved)
    others = [
        flow.token_noise(jax.random.key(8), clip, draw, index, 4),
        flow.token_noise(key, clip + 1, draw, index, 4),
        flow.token_noise(key, clip, draw + 1, index, 4),
        flow.token_noise(key, clip, draw, index + 10, 4),
    ]
    assert not any(np.allclose(noise, other) for other in others)


def test_bad_times_are_refused():
    with pytest.raises(ValueError, match="positive"):
        flow.TimeConfig(std=0.0)
    with pytest.raises(ValueError, match="known_noise"):
        flow.TimeConfig(known_noise=-0.1)
    with pytest.raises(ValueError, match="posterior"):
        flow.TimeConfig(posterior=1.1)


def test_a_gaussian_is_known_as_far_as_its_deviation(rng):
    shape = (4, 4000, 3)
    mean, noise, spread = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    for std in (0.0, 0.3, 1.0):
        clean = mean + std * spread
        for at in (0.1, 0.5, 0.9):
            time = jnp.full(shape[:2], at)
            predicted = flow.velocity_of_gaussian(flow.corrupt(clean, noise, time), mean, std, time)
            off = np.asarray(predicted - flow.velocity(clean, noise))
            # What is left of a sum of two normals when the sum is known.
            left = std**2 / ((1 - at) ** 2 * std**2 + at**2)
            assert np.square(off).mean() == pytest.approx(left, rel=0.05, abs=1e-6)
            # Nothing more can be had from what was seen.
            seen = np.asarray(flow.corrupt(clean, noise, time) - (1 - at) * mean)
            assert abs((off * seen).mean()) < 0.02


def test_a_gaussian_at_time_0_is_seen(rng):
    clean = jnp.asarray(rng.standard_normal((1, 5, 2)), jnp.float32)
    assert np.isfinite(flow.velocity_of_gaussian(clean, clean, 0.0, jnp.zeros((1, 5)))).all()

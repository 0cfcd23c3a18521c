"""Laws of the samplers: exact on straight paths, order of convergence, guidance, known tokens stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import sampler
from sora_jax.diffusion.sampler import SamplerConfig


def config(**changes):
    return SamplerConfig(**({"steps": 8, "method": "euler", "guidance": 1.0, "shift": 1.0} | changes))


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_paths_are_exact(rng, method, shift):
    clean, noise = jnp.asarray(rng.standard_normal((2, 1, 3, 2)), jnp.float32)
    made = sampler.sample(lambda x, t: noise - clean, noise, config(method=method, shift=shift))
    assert np.allclose(made, clean, atol=1e-5)


def error(method, steps):
    """Of dx/dt = x from x(1) = 1: x(0) = 1/e."""
    made = sampler.sample(lambda x, t: x, jnp.ones((1, 1, 1)), config(method=method, steps=steps))
    return abs(float(made[0, 0, 0]) - np.exp(-1.0))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    assert error(method, 8) / error(method, 16) == pytest.approx(2**order, rel=0.15)


def test_time_dependence_is_seen():
    # dx/dt = 2t: x(0) = x(1) - 1. Heun integrates a slope linear in time exactly, Euler does not.
    start = jnp.ones((1, 1, 1))
    heun = sampler.sample(lambda x, t: jnp.full_like(x, 2 * t), start, config(method="heun", steps=3))
    assert float(heun[0, 0, 0]) == pytest.approx(0.0, abs=1e-6)
    euler = sampler.sample(lambda x, t: jnp.full_like(x, 2 * t), start, config(steps=4))
    assert float(euler[0, 0, 0]) == pytest.approx(1 - 1.25, abs=1e-6)


def test_known_tokens_stay(rng):
    noise, clean = jnp.asarray(rng.standard_normal((2, 1, 4, 2)), jnp.float32)
    known = np.array([[True, False, True, False]])
    made = sampler.sample(lambda x, t: x, noise, config(steps=2, method="heun"), jnp.asarray(known), jnp.asarray(clean))
    assert np.array_equal(np.asarray(made)[known], np.asarray(clean)[known])
    free = sampler.sample(lambda x, t: x, noise, config(steps=2, method="heun"))
    assert np.allclose(np.asarray(made)[~known], np.asarray(free)[~known])


def test_guidance():
    cond, uncond = jnp.array([2.0]), jnp.array([1.0])
    assert sampler.guided(cond, uncond, 1.0) == cond
    assert sampler.guided(cond, uncond, 0.0) == uncond
    assert sampler.guided(cond, uncond, 3.0) == 4.0


def test_schedule_runs_from_noise_to_data():
    times = sampler.schedule(config(steps=5, shift=2.0))
    assert times[0] == 1 and times[-1] == 0 and len(times) == 6 and np.all(np.diff(times) < 0)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"method": "rk4"}, {"guidance": -1.0}, {"shift": 0.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="sampler"):
        config(**bad)

"""Laws of the samplers: exact on straight paths, order of convergence, guidance, known tokens stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import flow, sampler
from sora_jax.diffusion.sampler import SamplerConfig


def config(**changes):
    return SamplerConfig(**({"steps": 8, "method": "euler", "guidance": 1.0, "shift": 1.0} | changes))


def sample(velocity, start, settings, ceilings=(1.0,), slot=None, tokens=16.0):
    """start (1, N, P), all of the tokens in slot 0 unless told."""
    ceiling_BS = jnp.asarray([ceilings], jnp.float32)
    slot_BN = jnp.zeros(start.shape[:2], jnp.int32) if slot is None else jnp.asarray([slot])
    times_KBS = sampler.schedule(settings, ceiling_BS, jnp.full_like(ceiling_BS, tokens))
    return sampler.sample(velocity, start, slot_BN, times_KBS, settings.method)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("ceiling", [1.0, 0.4])
def test_straight_paths_are_exact(rng, method, shift, ceiling):
    clean, noise = jnp.asarray(rng.standard_normal((2, 1, 3, 2)), jnp.float32)
    start = flow.corrupt(clean, noise, jnp.full((1, 3), ceiling))
    made = sample(lambda x, t: noise - clean, start, config(method=method, shift=shift), [ceiling])
    assert np.allclose(made, clean, atol=1e-5)


def error(method, steps):
    """Of dx/dt = x from x(1) = 1: x(0) = 1/e."""
    made = sample(lambda x, t: x, jnp.ones((1, 1, 1)), config(method=method, steps=steps))
    return abs(float(made[0, 0, 0]) - np.exp(-1.0))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    assert error(method, 8) / error(method, 16) == pytest.approx(2**order, rel=0.15)


def test_time_dependence_is_seen():
    # dx/dt = 2t: x(0) = x(1) - 1. Heun integrates a slope linear in time exactly, Euler does not.
    def slope(x, time_BS):
        return 2 * time_BS[..., None] * jnp.ones_like(x)

    start = jnp.ones((1, 1, 1))
    assert float(sample(slope, start, config(method="heun", steps=3))[0, 0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(sample(slope, start, config(steps=4))[0, 0, 0]) == pytest.approx(1 - 1.25, abs=1e-6)


def test_what_is_taken_once_more_is_paid_for():
    usual = config(steps=8, guidance=3.0)
    assert usual.steps_again == 0 and usual.evaluations == 16
    again = config(steps=8, guidance=3.0, restart=0.5)
    assert again.steps_again == 4 and again.evaluations == 24
    assert config(steps=1, restart=0.1).steps_again == 1
    with pytest.raises(ValueError, match=r"sampler\.restart is 1"):
        config(restart=1.0)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_known_tokens_stay_to_the_bit_and_the_others_do_not_care(rng, method):
    start = jnp.asarray(rng.standard_normal((1, 4, 2)), jnp.float32)
    slot = np.array([0, 1, 0, 1])
    made = np.asarray(sample(lambda x, t: 1e3 * x, start, config(steps=2, method=method), [0.0, 1.0], slot))
    assert np.array_equal(made[0, slot == 0], np.asarray(start)[0, slot == 0])
    free = np.asarray(sample(lambda x, t: 1e3 * x, start, config(steps=2, method=method)))
    assert np.allclose(made[0, slot == 1], free[0, slot == 1])


def test_guidance():
    cond, uncond = jnp.array([2.0]), jnp.array([1.0])
    assert sampler.guided(cond, uncond, 1.0) == cond
    assert sampler.guided(cond, uncond, 0.0) == uncond
    assert sampler.guided(cond, uncond, 3.0) == 4.0


def test_rescaling_gives_each_slot_the_deviation_of_its_conditional_prediction(rng):
    share = jax.nn.one_hot(jnp.array([[0, 0, 0, 1, 1, 1, 1]]), 3)
    cond = jnp.asarray(rng.standard_normal((1, 7, 5)), jnp.float32)
    made = cond * jnp.where(share[..., :1] > 0, 4.0, 2.0) + 1.0
    whole = np.asarray(sampler.rescaled(made, cond, share, 1.0))
    for tokens in (slice(0, 3), slice(3, 7)):
        assert whole[0, tokens].std() == pytest.approx(float(cond[0, tokens].std()), rel=1e-4)
    assert np.allclose(sampler.rescaled(made, cond, share, 0.0), made)


def schedule(settings, ceilings, tokens):
    return np.asarray(sampler.schedule(settings, jnp.asarray([ceilings]), jnp.asarray([tokens])))[:, 0]


def test_schedule_runs_from_each_ceiling_to_data():
    times = schedule(config(steps=5, shift=2.0), [1.0, 0.5, 0.0], [16.0, 16.0, 16.0])
    assert times[0].tolist() == [1, 0.5, 0] and not times[-1].any() and len(times) == 6
    assert np.all(np.diff(times[:, :2], axis=0) < 0) and not times[:, 2].any()


def test_larger_clips_stay_longer_in_noise():
    times = schedule(config(steps=4, base_tokens=16), [1.0] * 3, [4.0, 16.0, 64.0])
    assert np.all(np.diff(times[1:-1], axis=1) > 0)
    assert np.allclose(times[:, 1], np.linspace(1, 0, 5))
    assert np.allclose(times[:, 2], schedule(config(steps=4, shift=2.0), [1.0], [1.0])[:, 0])


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"method": "rk4"},
        {"guidance": -1.0},
        {"shift": 0.0},
        {"guidance_interval": (0.5, 0.2)},
        {"guidance_rescale": 2.0},
        {"known_guidance": -1.0},
        {"base_tokens": -1},
        *({name: value} for name in ("guidance", "guidance_going_on", "shift") for value in (np.nan, np.inf)),
    ],
)
def test_bad_settings_are_refused(bad):
    """By name: what is no number would make no video, and no manifest that can be read."""
    (name,) = bad
    with pytest.raises(ValueError, match=f"sampler.*{name}"):
        config(**bad)

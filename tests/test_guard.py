"""Laws of skipped steps: what is not finite or a spike does not count, and the window knows only what did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.train import guard

judged = jax.jit(guard.judged, static_argnames="factor")


def after(norms, factor=10.0, state=None):
    """(guard, which of the norms counted)."""
    state = state or guard.fresh()
    counted = []
    for norm in norms:
        norm = jnp.float32(norm)
        state, counts, _ = judged(state, jnp.isfinite(norm), norm, factor=factor)
        counted.append(bool(counts))
    return state, counted


def test_the_rule_is_the_median_of_what_counted():
    """Against the same rule in plain numpy, on norms of which some are spikes and some are not finite."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=400)) * np.where(rng.random(400) < 0.1, 30, 1)
    norms[rng.random(400) < 0.05] = np.nan
    window, expected = [], []
    for norm in norms.astype(np.float32):
        spike = len(window) >= guard.WINDOW // 2 and norm > 10 * np.median(window[-guard.WINDOW :])
        expected.append(bool(np.isfinite(norm) and not spike))
        window += [norm] if expected[-1] else []
    state, counted = after(norms)
    assert counted == expected and 0 < sum(~np.array(expected) & np.isfinite(norms)) < 60
    assert np.array_equal(np.asarray(state.norms_W), np.array(window[: -guard.WINDOW - 1 : -1]))


def test_nothing_is_a_spike_before_half_a_window():
    _, counted = after([1.0] * (guard.WINDOW // 2 - 1) + [1e6, 1e6])
    assert counted[-2:] == [True, False]


def test_factor_zero_skips_only_what_is_not_finite():
    _, counted = after([1.0] * guard.WINDOW + [1e9, np.inf], factor=0.0)
    assert counted[-2:] == [True, False]


@pytest.mark.parametrize("bad", [np.nan, 1e4])
def test_skipped_steps_in_a_row_are_counted_and_leave_the_window_alone(bad):
    before, _ = after([1.0] * guard.WINDOW)
    state, _ = after([bad] * 3, state=before)
    assert int(state.skipped) == 3 and np.array_equal(state.norms_W, before.norms_W)
    assert int(after([1.0], state=state)[0].skipped) == 0


def test_the_median_is_worked_out_once_however_many_parameters_ask():
    """A program in which every update has its own is half as large again, and as long in compiling."""

    def program(count):
        def step(state, norm, leaves):
            after, counts, _ = guard.judged(state, jnp.isfinite(norm), norm, 10.0)
            return after, [jnp.where(counts, leaf, 0) for leaf in leaves]

        leaves = [jnp.ones(shape) for shape in range(2, 2 + count)]
        return jax.jit(step).lower(guard.fresh(), jnp.float32(1), leaves).compile().as_text()

    assert program(8).count("nanmedian") == program(1).count("nanmedian") > 0

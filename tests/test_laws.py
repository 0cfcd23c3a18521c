"""Fits give back the laws that made the data, say how sure they are, and refuse what fixes nothing."""

import numpy as np
import pytest

from sora_jax.study import laws

LAW = laws.Law(irreducible=0.3, scale=0.4, exponent=0.35, unit=4e12)
BUDGETS = np.array([1e12, 2e12, 4e12, 8e12, 16e12])


def test_the_law_of_exact_data_is_found_and_carries_on():
    found = laws.fit_law(BUDGETS, LAW(BUDGETS))
    assert found.irreducible == pytest.approx(0.3, rel=1e-3) and found.exponent == pytest.approx(0.35, rel=1e-3)
    assert found(128e12) == pytest.approx(LAW(128e12), rel=1e-4)


def test_units_of_compute_change_nothing():
    flops = laws.fit_law(BUDGETS, LAW(BUDGETS))
    petaflops = laws.fit_law(BUDGETS / 1e15, LAW(BUDGETS))
    assert petaflops(0.128) == pytest.approx(flops(128e12), rel=1e-6)


def test_one_run_that_failed_does_not_bend_the_law():
    C = np.repeat(BUDGETS, 3)
    losses = LAW(C)
    losses[4] *= 1.5
    assert laws.fit_law(C, losses)(128e12) == pytest.approx(LAW(128e12), rel=0.02)


def test_the_band_holds_the_truth_and_widens_outwards(rng):
    C = np.repeat(BUDGETS, 3)
    losses = LAW(C) * np.exp(rng.normal(0, 0.005, len(C)))
    at = np.array([4e12, 128e12])
    low, high = laws.band(C, losses, at)
    assert np.all(low < LAW(at)) and np.all(LAW(at) < high)
    assert high[1] - low[1] > 2 * (high[0] - low[0])


@pytest.mark.parametrize(
    ("flops", "losses"), [([1e12, 2e12, 4e12], [1, 0.9, 0.8]), ([1e12] * 3 + [2e12] * 3, [1.0] * 6), (BUDGETS, [0] * 5)]
)
def test_what_fixes_no_law_is_refused(flops, losses):
    with pytest.raises(ValueError, match=r"cannot fix a law|must be positive"):
        laws.fit_law(flops, losses)


def test_the_lowest_point_of_a_budget():
    sizes = np.array([1e5, 3e5, 1e6, 3e6])
    losses = 0.5 + 0.02 * (np.log(sizes) - np.log(5e5)) ** 2
    found = laws.optimum(1e12, sizes, losses)
    assert found.inside and found.parameters == pytest.approx(5e5) and found.loss == pytest.approx(0.5)


@pytest.mark.parametrize("losses", [[0.5, 0.6, 0.7, 0.9], [0.5, 0.6, 0.65, 0.66]])
def test_an_end_of_the_sweep_is_no_optimum(losses):
    found = laws.optimum(1e12, [1e5, 3e5, 1e6, 3e6], losses)
    assert not found.inside and (found.parameters, found.loss) == (pytest.approx(1e5), 0.5)


def test_a_steep_side_does_not_move_the_bottom():
    sizes = np.geomspace(1e5, 27e5, 4)
    losses = 0.5 + 0.1 * (np.log(sizes) - np.log(4e5)) ** 2
    assert laws.lowest(sizes, losses)[:2] == (pytest.approx(4e5), pytest.approx(0.5))
    assert laws.lowest(sizes, np.add(losses, [0, 0, 0, 5])) == laws.lowest(sizes, losses)
    # Runs of one size count as their mean, in any order.
    twice = [(size, loss + sign * 0.01) for size, loss in zip(sizes, losses, strict=True) for sign in (1, -1)]
    assert laws.lowest(*zip(*twice[::-1], strict=True)) == pytest.approx(laws.lowest(sizes, losses))
    with pytest.raises(ValueError, match="2 different values"):
        laws.lowest([1e5, 3e5, 3e5], [1.0, 0.5, 0.6])


def test_the_frontier_goes_through_the_optima():
    optima = [laws.Optimum(C, 2e5 * (C / 1e12) ** 0.6, 0.5, True) for C in BUDGETS]
    found = laws.frontier(optima)
    assert found.exponent == pytest.approx(0.6) and found(128e12) == pytest.approx(2e5 * 128**0.6)
    with pytest.raises(ValueError, match="two budgets"):
        laws.frontier(optima[:1])

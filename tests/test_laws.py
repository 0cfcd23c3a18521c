"""Fits give back the laws that made the data, say how sure they are, and refuse what fixes nothing."""

import numpy as np
import pytest

from sora_jax.study import laws

LAW = laws.Law(irreducible=0.3, scale=0.4, exponent=0.35, unit=4e12)
SURFACE = laws.Surface(LAW, laws.Frontier(scale=4e5, exponent=0.6, unit=4e12), curvature=0.15)
BUDGETS = np.array([0.5e12, 1e12, 2e12, 4e12, 8e12])


@pytest.fixture
def runs():
    """FLOPs and parameters: four sizes around the best of every budget."""
    C = np.repeat(BUDGETS, 4)
    return C, np.tile([0.5, 0.8, 1.3, 2.2], len(BUDGETS)) * SURFACE.frontier(C)


def test_the_surface_of_exact_data_is_found_and_carries_on(runs):
    found = laws.fit_surface(*runs, SURFACE(*runs))
    assert found.law.irreducible == pytest.approx(0.3, rel=1e-3)
    assert found.law.exponent == pytest.approx(0.35, rel=1e-3)
    assert (found.frontier.exponent, found.curvature) == (pytest.approx(0.6, rel=1e-3), pytest.approx(0.15, rel=1e-3))
    assert found.law(128e12) == pytest.approx(LAW(128e12), rel=1e-4)
    assert found.frontier(128e12) == pytest.approx(SURFACE.frontier(128e12), rel=1e-3)
    # The law is the loss of the best size: a larger or a smaller model has a higher one.
    best = float(found.frontier(8e12))
    assert found(8e12, best) == pytest.approx(found.law(8e12))
    assert min(found(8e12, 2 * best), found(8e12, best / 2)) > 1.05 * found.law(8e12)


def test_units_change_nothing(runs):
    C, N = runs
    one = laws.fit_surface(C, N, SURFACE(C, N))
    other = laws.fit_surface(C / 1e15, N / 1e6, SURFACE(C, N))
    assert other.law(0.128) == pytest.approx(one.law(128e12), rel=1e-6)
    assert other.frontier(0.128) * 1e6 == pytest.approx(one.frontier(128e12), rel=1e-5)


def test_one_run_that_failed_does_not_bend_the_law(runs):
    losses = SURFACE(*runs)
    losses[6] *= 1.5
    assert laws.fit_surface(*runs, losses).law(64e12) == pytest.approx(LAW(64e12), rel=0.02)


def test_the_band_holds_the_truth_and_widens_outwards(runs, rng):
    losses = SURFACE(*runs) * np.exp(rng.normal(0, 0.005, len(runs[0])))
    at = np.array([2e12, 64e12])
    found = laws.fit_surface(*runs, losses)
    low, high = laws.band(found, *runs, losses, at)
    assert np.all(low < LAW(at)) and np.all(LAW(at) < high)
    assert high[1] - low[1] > 2 * (high[0] - low[0])


@pytest.mark.parametrize("spoil", ["few", "budgets", "sizes", "zero", "none"])
def test_what_fixes_no_law_is_refused(runs, spoil):
    C, N, losses = *runs, SURFACE(*runs)
    C, N, losses = {
        "few": (C[:7], N[:7], losses[:7]),
        "budgets": (np.full_like(C, 1e12), N, losses),
        "sizes": (C, np.full_like(N, 1e5), losses),
        "zero": (C, N, 0 * losses),
        "none": ([], [], []),
    }[spoil]
    with pytest.raises(ValueError, match=r"cannot fix a law|must be positive"):
        laws.fit_surface(C, N, losses)


def test_models_far_from_the_frontier_are_left_out():
    found = laws.near([1e12] * 4, [1e5, 2.1e5, 1e6, 2e6], laws.Frontier(scale=5e5, exponent=0.6, unit=1e12))
    assert found.tolist() == [False, True, True, False]


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

"""What runs say together: budgets are told apart, laws are found again, and only the future is foretold."""

import dataclasses

import numpy as np
import pytest
import quickstart

from sora_jax import config
from sora_jax.study import laws, scaling, scaling_curves

LAW = laws.Law(irreducible=0.3, scale=0.3, exponent=0.4, unit=4e12)
SIZES = (1e5, 3e5, 9e5, 27e5)
BUDGETS = (1e12, 2e12, 4e12, 8e12)


def run(flops, parameters, exponent=0.5):
    best = 3e5 * (flops / 2e12) ** exponent
    return {
        "flops": flops,
        "parameters": parameters,
        "val_loss": float(LAW(flops)) + 0.01 * np.log(parameters / best) ** 2,
    }


@pytest.fixture
def runs():
    found = {
        f"iso_{number}_{C:.0e}": run(C * (1 + 0.001 * number), N) for C in BUDGETS for number, N in enumerate(SIZES)
    }
    return found | {"x1": run(2e12, 3e5), "x32": run(64e12, 3e5 * 32**0.5)}


def test_runs_of_one_cost_are_one_budget(runs):
    groups = scaling.budgets({name: each for name, each in runs.items() if name.startswith("iso")})
    assert [len(group) for group in groups] == [4, 4, 4, 4]
    assert [runs[group[0]]["flops"] for group in groups] == sorted(BUDGETS)


def test_laws_are_found_and_the_last_rung_is_foretold(runs):
    found = scaling.fitted(runs, ("x1", "x32"), [name for name in runs if name.startswith("iso")])
    assert found["frontier"]["exponent"] == pytest.approx(0.5, abs=0.01)
    assert found["law"]["exponent"] == pytest.approx(0.4, rel=0.02)
    assert not found["rungs"]["x1"]["foretold"] and found["rungs"]["x32"]["foretold"]
    assert abs(found["rungs"]["x32"]["off_by"]) < 0.005
    titles = [title for title, svg in scaling_curves.draw(runs, found) if svg.startswith("<svg")]
    assert len(titles) == 2


def test_what_is_fitted_knows_nothing_of_the_ladder(runs):
    group = [name for name in runs if name.startswith("iso")]
    before = scaling.fitted(runs, ("x32",), group)
    runs["x32"]["val_loss"] *= 2
    after = scaling.fitted(runs, ("x32",), group)
    assert after["law"] == before["law"] and after["frontier"] == before["frontier"]
    assert after["rungs"]["x32"]["off_by"] == pytest.approx(-0.5, abs=0.01)


def test_two_budgets_give_a_frontier_but_no_law(runs):
    group = [name for name in runs if name.endswith(("1e+12", "2e+12"))]
    found = scaling.fitted(runs, (), group)
    assert "frontier" in found and "law" not in found
    assert scaling.fitted({"x1": runs["x1"]}, ("x1",), ()) == {"optima": []}


def test_a_stage_grows_along_the_frontier_that_was_found(runs):
    dit = config.from_config_dict(quickstart.get_config("dit"))
    iso = {name: each for name, each in runs.items() if name.startswith("iso")}
    along = dataclasses.replace(dit, compute=config.ComputeConfig(1e13, 4.0, "frontier", 0.2))
    assert scaling.along_frontier(along, iso).compute.exponent == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="at least two budgets"):
        scaling.along_frontier(along, {})


def test_groups_name_dit_stages():
    study = config.from_config_dict(quickstart.get_config())
    for groups, message in (
        ({"ladder": ("vae",)}, "must name DiT stages, not vae"),
        ({"ladder": ()}, "not nothing"),
        ({"stairs": ("dit",)}, "groups has no key 'stairs'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(study, groups=groups)

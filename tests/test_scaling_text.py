"""The words about what runs say together have their numbers, and say what is not sure."""

import json
from pathlib import Path

import pytest

from sora_jax.study import laws, scaling, scaling_text

RESULTS = Path(__file__).parent.parent / "experiments" / "results" / "scaling"


@pytest.fixture(scope="module")
def found():
    return json.loads((RESULTS / "report.json").read_text())["scaling"]


def test_every_rung_is_held_against_the_law(found):
    law = laws.Law(*(found["law"][name] for name in ("irreducible", "scale", "exponent", "unit")))
    rows = scaling_text.rungs(found)
    assert [row[0] for row in rows] == list(found["rungs"])
    for (_, _, measured, told, off, best, best_off, kind), rung in zip(rows, found["rungs"].values(), strict=True):
        assert told.startswith(f"{float(law(rung['flops'])):.3f} [")
        assert float(measured) == pytest.approx(rung["val_loss"], abs=5e-4)
        sign = "\u2212" if law(rung["flops"]) < rung["val_loss"] else "+"
        assert off.startswith(sign) and (kind == "foretold") == (rung["flops"] > 1.05 * found["law"]["fitted_up_to"])
        assert best.startswith(f"{rung['of_optima']['law']:.3f} [") and best_off.endswith(" %")
    assert {row[0]: row[-1] for row in rows}["32x"] == "foretold"


def test_what_is_not_sure_is_said(found):
    law, best, frontier, backtest = scaling_text.sentences(found)
    assert law.startswith("loss(C) = 0.112 + 0.554 (C / 1.88 TFLOP)^-0.250, fitted to 17 runs of up to 5 TFLOP")
    assert "best of each of 4 budgets" in best and "loss(C) = 0.022 + 0.651 (C / 1.77 TFLOP)^-0.227" in best
    assert "may lie beyond" not in frontier
    assert "1.9 % on average and 3.9 % at worst, and its best with one of 1.9 %" in backtest
    ends = found | {"optima": [each | {"inside": number > 1} for number, each in enumerate(found["optima"])]}
    assert (
        "At 2 of 4 budgets the best of the sizes that were run is the smallest or largest"
        in scaling_text.sentences(ends)[2]
    )


def test_without_a_law_of_the_best_nothing_is_said_of_it(found):
    rungs = {
        name: {key: value for key, value in rung.items() if key != "of_optima"} for name, rung in found["rungs"].items()
    }
    backtest = {key: value for key, value in found["backtest"].items() if key != "of_optima_off_by"}
    told = {key: value for key, value in found.items() if key != "law_of_optima"} | {
        "rungs": rungs,
        "backtest": backtest,
    }
    law, frontier, test = scaling_text.sentences(told)
    assert law.startswith("loss(C)") and frontier.startswith("The best model") and test.endswith("3.9 % at worst.")
    assert all(row[5:7] == ("", "") for row in scaling_text.rungs(told))


def runs_of(losses):
    """Of {width: {rate: loss}}."""
    return {
        f"{width}_{rate}": {"width": width, "rate": rate, "val_loss": loss}
        for width, sweep in losses.items()
        for rate, loss in sweep.items()
    }


def test_rates_at_the_end_of_what_was_tried_are_not_compared():
    bowl = {0.01: 1.0, 0.02: 0.9, 0.04: 1.0}
    known = scaling.best_rates(runs_of({32: bowl, 64: bowl}))
    assert known["apart"] == 1 and "apart by a factor of 1.00" in scaling_text.sentences({"rates": known})[0]
    unsure = scaling.best_rates(runs_of({32: bowl, 64: {0.01: 1.0, 0.02: 0.9, 0.04: 0.8}}))
    assert unsure["apart"] is None
    assert "at width 64 the smallest or largest that was tried" in scaling_text.sentences({"rates": unsure})[0]


def test_the_claim_about_models_says_both_distances():
    (words,) = scaling_text.sentences({"models": {"count": 9, "correlation": 0.6, "correlation_latent": -0.918}})
    assert "Over 9 models" in words and "\u22120.918" in words and "0.600" in words
    assert scaling_text.sentences({}) == [] == scaling_text.rungs({})

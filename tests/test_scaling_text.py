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
        # The best sizes of this sweep are at its ends, and have no law of their own.
        assert best == best_off == ""
    assert {row[0]: row[-1] for row in rows}["32x"] == "foretold"


def test_what_is_not_sure_is_said(found):
    law, frontier, backtest = scaling_text.sentences(found)
    assert law.startswith("loss(C) = 0.124 + 0.451 (C / 1.77 TFLOP)^-0.287, fitted to 16 runs of up to 5 TFLOP")
    assert "At 3 of 4 budgets the best of the sizes that were run is the smallest or largest" in frontier
    assert "2.8 % on average and 5.0 % at worst" in backtest
    inside = found | {"optima": [each | {"inside": True} for each in found["optima"]]}
    assert "may lie beyond" not in scaling_text.sentences(inside)[1]


def test_the_law_of_the_best_is_told_beside_the_other(found):
    best = found["law"] | {"irreducible": 0.05, "budgets": 4}
    rung = found["rungs"]["32x"]
    told = found | {
        "law_of_optima": best,
        "rungs": {"32x": rung | {"of_optima": {"law": 0.3, "low": 0.28, "high": 0.33, "off_by": -0.04}}},
        "backtest": found["backtest"] | {"of_optima_off_by": -0.019},
    }
    assert scaling_text.rungs(told)[0][5:7] == ("0.300 [0.280, 0.330]", "\u22124.0 %")
    words = scaling_text.sentences(told)
    assert "best of each of 4 budgets" in words[1] and "loss(C) = 0.050 +" in words[1]
    assert "its best with one of 1.9 %" in words[3]


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

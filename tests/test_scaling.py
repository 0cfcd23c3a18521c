"""What runs say together: budgets are told apart, laws are found again, and only the future is foretold."""

import dataclasses

import imageio.v3 as iio
import numpy as np
import pytest
import quickstart

from sora_jax import compute, config
from sora_jax.study import curves, laws, scaling, scaling_curves, scaling_text

# The best size of 2e12 FLOPs has 3e5 parameters and goes with the root of the budget.
SURFACE = laws.Surface(
    0.25, size=laws.Power(0.2, -0.6, 3e5), data=laws.Power(0.2, -0.6, 1000), cost=laws.Power(2e9, 1.0, 3e5)
)
SIZES = tuple(3e5 * 2**step for step in (-1, -0.25, 0.5, 1.25, 2))
BUDGETS = (1e12, 2e12, 4e12, 8e12)
COLUMNS = ("parameters", "steps", "flops", "val_loss")


def run(flops, parameters):
    return {
        "flops": flops,
        "parameters": parameters,
        "steps": flops / float(SURFACE.cost(parameters)),
        "val_loss": float(SURFACE(flops, parameters)),
    }


@pytest.fixture
def runs():
    found = {
        f"iso_{number}_{C:.0e}": run(C * (1 + 0.001 * number), N) for C in BUDGETS for number, N in enumerate(SIZES)
    }
    return found | {"x1": run(2e12, 3e5), "x32": run(64e12, 3e5 * 32**0.5)}


def test_runs_of_one_cost_are_one_budget(runs):
    groups = scaling.budgets({name: each for name, each in runs.items() if name.startswith("iso")})
    assert [len(group) for group in groups] == [len(SIZES)] * len(BUDGETS)
    assert [runs[group[0]]["flops"] for group in groups] == sorted(BUDGETS)


def test_laws_are_found_and_the_last_rung_is_foretold(runs):
    found = scaling.fitted(runs, ("x1", "x32"), [name for name in runs if name.startswith("iso")])
    assert found["frontier"]["exponent"] == pytest.approx(0.5, abs=0.01)
    assert found["law"]["exponent"] == pytest.approx(0.3, rel=0.02)
    assert not found["rungs"]["x1"]["foretold"] and found["rungs"]["x32"]["foretold"]
    assert abs(found["rungs"]["x32"]["off_by"]) < 0.005
    # Nor is the largest budget needed to foretell itself.
    assert len(found["backtest"]["off_by"]) == len(SIZES) and found["backtest"]["mean_absolute"] < 0.005
    svgs = [curves.picture(plot, "a-") for _, plot in scaling_curves.plots(runs, found)]
    assert len(svgs) == 2 and all(svg.startswith("<svg") for svg in svgs)


def test_the_law_of_the_best_is_fitted_beside_the_law_of_all(runs):
    group = [name for name in runs if name.startswith("iso")]
    found = scaling.fitted(runs, ("x1", "x32"), group)
    best, far = found["law_of_optima"], found["rungs"]["x32"]["of_optima"]
    assert best["budgets"] == len(BUDGETS)
    # A parabola through three sizes misses the bottom by a little.
    assert far["law"] == pytest.approx(found["rungs"]["x32"]["law"], rel=0.01)
    assert far["off_by"] == pytest.approx(far["law"] / runs["x32"]["val_loss"] - 1)
    assert abs(found["backtest"]["of_optima_off_by"]) < 0.005
    runs["x32"]["val_loss"] *= 2
    assert scaling.fitted(runs, ("x1", "x32"), group)["law_of_optima"] == best
    # Of a budget whose best size is the smallest that was run the best of all is not known, and of two budgets no law.
    smaller = [name for name in group if not name.startswith(("iso_0_4e+12", "iso_1_4e+12"))]
    two = [name for name in group if name.endswith(("4e+12", "8e+12"))]
    # Of the smaller budgets two sizes each, which have no best one.
    thin = [name for name in group if name.endswith(("4e+12", "8e+12")) or name.startswith(("iso_1", "iso_2"))]
    assert "law" in scaling.fitted(runs, (), thin)
    for fewer in (smaller, two, thin):
        others = scaling.fitted(runs, ("x1", "x32"), fewer)
        assert "law_of_optima" not in others and "of_optima_off_by" not in others.get("backtest", {})
        assert all("of_optima" not in rung for rung in others.get("rungs", {}).values())


def test_what_the_law_of_the_best_misses_for_certain_is_not_in_its_band(runs):
    """A parabola through three sizes misses the bottom, and so the law; without noise the band is at the truth."""
    exact = {name: runs[name] for name in runs if name.startswith("iso")}
    at = [runs["x32"]["flops"]]
    law, low, high = scaling.law_of_optima(exact, SURFACE, at)
    truth = float(SURFACE.law(at[0]))
    assert abs(law(at[0]) / truth - 1) > 1e-4
    assert (low[0], high[0]) == (pytest.approx(truth, rel=1e-6), pytest.approx(truth, rel=1e-6))


def test_most_bands_of_the_law_of_the_best_hold_the_truth(runs):
    """Over sweeps whose runs have 1 % of noise, at eight times what was fitted."""
    group = [name for name in runs if name.startswith("iso")]
    at, held = [runs["x32"]["flops"]], []
    for seed in range(20):
        noise = np.exp(np.random.default_rng(seed).normal(0, 0.01, len(group)))
        noisy = {
            name: runs[name] | {"val_loss": runs[name]["val_loss"] * by} for name, by in zip(group, noise, strict=True)
        }
        surface = laws.fit_surface(laws.Runs(*([run[key] for run in noisy.values()] for key in COLUMNS)))
        if found := scaling.law_of_optima(noisy, surface, at):
            _, low, high = found
            held.append(low[0] < runs["x32"]["val_loss"] < high[0])
    assert len(held) >= 14 and 0.8 <= np.mean(held) < 1


def test_the_curves_are_one_picture_too(runs):
    found = scaling.fitted(runs, ("x1", "x32"), [name for name in runs if name.startswith("iso")])
    plots = scaling_curves.plots(runs, found)
    one, both = (iio.imread(curves.png(chosen)) for chosen in (plots[:1], plots))
    assert both.shape[0] == one.shape[0] and both.shape[1] == pytest.approx(2 * one.shape[1], abs=2)
    # White ground, and what is drawn is in colour.
    assert (both[0, 0, :3] == 255).all() and (np.ptp(both[..., :3].astype(int), axis=-1) > 60).any()
    assert curves.png(plots) == curves.png(plots)
    # Runs of another kind are no points of a law.
    other = {"rate": runs["x1"] | {"flops": 1.0, "val_loss": 9.0}}
    law, with_others = plots[1:], scaling_curves.plots(runs | other, found | {"groups": {"rates": ["rate"]}})[1:]
    assert curves.png(law) == curves.png(with_others)


def test_why_there_is_no_law_is_said(runs):
    few = [name for name in runs if name.startswith("iso")][:6]
    found = scaling.fitted(runs, ("x1",), few)
    words = scaling_text.sentences(found)
    assert "law" not in found and words[0].startswith("No law of the loss: 6 runs cannot fix a law of 5 constants")
    assert "no_law" not in scaling.fitted(runs, ("x1",), ())


def test_what_is_fitted_knows_nothing_of_the_ladder(runs):
    group = [name for name in runs if name.startswith("iso")]
    before = scaling.fitted(runs, ("x32",), group)
    runs["x32"]["val_loss"] *= 2
    after = scaling.fitted(runs, ("x32",), group)
    assert after["law"] == before["law"] and after["frontier"] == before["frontier"]
    assert after["rungs"]["x32"]["off_by"] == pytest.approx(-0.5, abs=0.01)


def test_the_backtest_knows_nothing_of_what_it_foretells(runs):
    group = [name for name in runs if name.startswith("iso")]
    runs["x8"] = run(8e12, 6e5)
    for name in group:
        if name.endswith("8e+12"):
            runs[name]["val_loss"] *= 2
    backtest = scaling.fitted(runs, ("x1", "x8", "x32"), group)["backtest"]
    assert backtest["of_optima_off_by"] == pytest.approx(-0.5, abs=0.005)
    found = backtest["off_by"]
    assert found.pop("x8") == pytest.approx(0, abs=0.005)
    assert len(found) == len(SIZES) and all(off == pytest.approx(-0.5, abs=0.005) for off in found.values())
    # Two of three budgets fix no law.
    three = [name for name in group if not name.endswith("8e+12")]
    assert "law" in (kept := scaling.fitted(runs, (), three)) and "backtest" not in kept


@pytest.mark.parametrize("largest_alone", [True, False])
def test_a_budget_of_two_sizes_has_no_best_to_foretell(runs, largest_alone):
    """Whether it is the largest budget alone, or all of them are."""
    if largest_alone:
        group = [name for name in runs if name.startswith("iso") and not ("8e+12" in name and name > "iso_2")]
    else:
        runs = {f"{C:.0e}_{N}": run(C, N * 1.3**step) for step, C in enumerate((*BUDGETS, 16e12)) for N in (2e5, 5e5)}
        group = list(runs)
    found = scaling.fitted(runs, (), group)
    assert "of_optima_off_by" not in found["backtest"] and found["backtest"]["mean_absolute"] < 0.01


def test_a_band_without_an_end_is_told(runs):
    found = scaling.fitted(runs, ("x1", "x32"), [name for name in runs if name.startswith("iso")])
    found["rungs"]["x32"]["high"] = None  # what JSON makes of infinity
    assert "\u221e]" in str(scaling_text.rungs(found))
    assert all(curves.picture(plot, "a-").startswith("<svg") for _, plot in scaling_curves.plots(runs, found))


def test_two_budgets_give_a_frontier_but_no_law(runs):
    group = [name for name in runs if name.endswith(("1e+12", "2e+12"))]
    found = scaling.fitted(runs, (), group)
    assert "frontier" in found and "law" not in found
    assert scaling.fitted({"x1": runs["x1"]}, ("x1",), ()) == {"optima": []}


@pytest.mark.parametrize("multiplier", [4.0, 32.0])
def test_a_stage_is_as_large_as_the_frontier_says(runs, multiplier):
    """Not merely a multiple of its own beginning, which may lie beside the frontier."""
    dit = config.from_config_dict(quickstart.get_config("dit"))
    base = compute.dit_step(dit.dit, dit.pack).total
    # Steps that cost as much as the stage's: in a family in which twice the parameters cost twice as much.
    per_parameter = 2 * base / 3e5
    iso = {
        name: each | {"steps": each["flops"] / (each["parameters"] * per_parameter)}
        for name, each in runs.items()
        if name.startswith("iso")
    }
    along = dataclasses.replace(dit, compute=config.ComputeConfig(2e12, multiplier, "frontier", 0.2))
    found = scaling.along_frontier(along, iso)
    # At 2e12 FLOPs the best model has 3e5 parameters, twice those of the stage's.
    cost = base * multiplier**found.compute.exponent
    assert cost == pytest.approx(3e5 * multiplier**0.5 * per_parameter, rel=0.03)
    same = dataclasses.replace(along, compute=dataclasses.replace(along.compute, multiplier=1.0))
    assert scaling.along_frontier(same, iso) == same
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
    with pytest.raises(ValueError, match="sets of videos, which have 2 or more"):
        dataclasses.replace(study, groups={"models": ("dit",)}, prompts=1, shown=1)
    for seed in (-1, 2**31 - study.prompts + 1):
        with pytest.raises(ValueError, match=f"seed {seed} and those of the"):
            dataclasses.replace(study, seed=seed)
    dit = study.stages["dit"]
    elsewhere = dataclasses.replace(dit.data, world=dataclasses.replace(dit.data.world, seed=1))
    stages = study.stages | {"other": dataclasses.replace(dit, data=elsewhere)}
    with pytest.raises(ValueError, match=r"their data\.world must be the same"):
        dataclasses.replace(study, order=(*study.order, "other"), stages=stages, groups={"ladder": ("dit", "other")})


def rung(seed, loss, everything):
    return {"seed": seed, "val_loss": loss, "adherence": {"all": everything}}


def test_runs_that_differ_in_their_seed_alone_are_one_rung():
    dit = config.from_config_dict(quickstart.get_config("dit"))
    longer = dataclasses.replace(dit, compute=dataclasses.replace(dit.compute, multiplier=4.0))
    stages = {"1x": dit, "4x": longer, "4x_1": dataclasses.replace(longer, seed=1)}
    study = config.StudyRun("", tuple(stages), stages, {"ladder": tuple(stages)}, prompts=2, shown=0, seed=0)
    assert scaling.repeats(study) == {"1x": ["1x"], "4x": ["4x", "4x_1"]}


def test_steps_of_the_ladder_are_measured_in_deviations():
    runs = {
        "1x": rung(0, 0.6, 0.2), "1x_1": rung(1, 0.62, 0.3), "1x_2": rung(2, 0.64, 0.1),
        "4x": rung(0, 0.5, 0.5), "4x_1": rung(1, 0.5, 0.5), "4x_2": rung(2, 0.5, 0.5),
    }  # fmt: skip
    found = scaling.climbed(runs, {"1x": ["1x", "1x_1", "1x_2"], "4x": ["4x", "4x_1", "4x_2"]})
    assert found["rungs"]["1x"]["val_loss"] == pytest.approx({"mean": 0.62, "deviation": 0.02})
    step = found["steps"]["1x to 4x"]
    assert step["val_loss"] == pytest.approx({"gain": 0.12, "in_deviations": 6.0})
    assert step["adherence.all"] == pytest.approx({"gain": 0.3, "in_deviations": 3.0})
    assert "frechet.distance" not in step


def test_one_seed_has_no_deviation():
    found = scaling.climbed({"1x": rung(0, 0.6, 0.2), "4x": rung(0, 0.7, 0.5)}, {"1x": ["1x"], "4x": ["4x"]})
    assert found["rungs"]["1x"]["val_loss"]["deviation"] is None
    assert found["steps"]["1x to 4x"]["val_loss"] == {"gain": pytest.approx(-0.1), "in_deviations": None}


def test_more_flops_and_a_smaller_distance_are_a_negative_correlation():
    runs = {
        str(n): {"flops": 10.0**n, "frechet": {"distance": 5.0 + n}, "frechet_latent": {"distance": 50.0 - 3 * n}}
        for n in range(9)
    }
    found = scaling.compared(runs)
    assert found == {"count": 9, "correlation": pytest.approx(1), "correlation_latent": pytest.approx(-1)}
    assert scaling.compared(runs | {"none": {"flops": 1.0}})["count"] == 9
    assert scaling.compared({"0": runs["0"]}) == {"count": 1}


def test_the_best_rate_of_every_width():
    def loss(rate, best):
        return 0.5 + 0.1 * np.log(rate / best) ** 2

    runs = {
        f"{width}_{rate}": {"width": width, "rate": rate, "val_loss": loss(rate, best)}
        for width, best in ((48, 0.01), (96, 0.01), (192, 0.015))
        for rate in (0.003, 0.01, 0.03)
    }
    found = scaling.best_rates(runs)
    assert found["best"] == pytest.approx({"48": 0.01, "96": 0.01, "192": 0.015})
    assert found["apart"] == pytest.approx(1.5) and all(found["inside"].values())
    assert "apart" not in scaling.best_rates({"48_0.01": runs["48_0.01"]})
    # Seeds count as their mean, however far one of them is off.
    seeds = {
        f"{name}_{seed}": run | {"val_loss": run["val_loss"] + off}
        for name, run in runs.items()
        for seed, off in enumerate((0.3, -0.3) if run["rate"] == 0.03 else (0.1, -0.1))
    }
    assert scaling.best_rates(seeds)["best"] == pytest.approx(found["best"])


def test_pictures_of_models_and_rates():
    models = {
        f"m{n}": {"flops": 10.0**n, "patch": [1, n % 2 + 1, 1]}
        | {key: {"distance": 9.0 - n} for key in ("frechet", "frechet_latent")}
        for n in range(1, 7)
    }
    rates = {f"r{n}": {"flops": 1.0, "width": 48, "rate": 0.01 * n, "val_loss": 0.5 + n} for n in (1, 2, 3)}
    rates["r3_seed1"] = rates["r3"] | {"val_loss": 4.5}
    found = {
        "groups": {"models": list(models), "rates": list(rates)},
        "models": scaling.compared(models),
        "rates": scaling.best_rates(rates),
    }
    drawn = scaling_curves.plots(models | rates, found)
    assert [title.split(",")[0] for title, _ in drawn] == [
        "Frechet distance from real clips",
        "Frechet distance from real clips through the VAE",
        "loss over rate",
    ]
    assert all(curves.picture(plot, "a-").startswith("<svg") for _, plot in drawn)

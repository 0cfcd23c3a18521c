"""A plan says what its stages cost, and refuses what could only fail later."""

import dataclasses

import jax
import parts
import pytest
import quickstart
import scaling as scaling_experiment

from sora_jax import compute, config, sharding
from sora_jax.data import masks
from sora_jax.study import dry_run


def plan(study, count=1):
    return dry_run.plan(study, jax.devices()[:count])


@pytest.fixture(scope="module")
def study():
    run = config.from_config_dict(quickstart.get_config())
    scratch = dataclasses.replace(run.stages["dit"].text, encoder="scratch")
    return with_dit(run, text=scratch)


def with_dit(study, **changes):
    dit = dataclasses.replace(study.stages["dit"], **changes)
    return dataclasses.replace(study, stages=study.stages | {"dit": dit})


def test_stages_cost_what_they_train_for(study):
    vae, dit = plan(study)
    run = study.stages["vae"]
    assert (vae.steps, vae.units, vae.unit) == (450, 450 * 16, "clips")
    assert vae.flops == 450 * compute.vae_step(run.vae, run.vae_train).total
    assert (dit.steps, dit.units, dit.unit) == (3400, 3400 * 4 * 144, "tokens")
    assert 5e5 < vae.parameters < 2e6 and 5e5 < dit.parameters < 3e6


def test_a_multiplied_budget_shows(study):
    settings = dataclasses.replace(study.stages["dit"].compute, multiplier=4.0)
    dit, larger = plan(study)[1], plan(with_dit(study, compute=settings))[1]
    assert larger.flops == pytest.approx(4 * dit.flops, rel=0.01) and larger.steps == 4 * dit.steps


def test_the_table_has_a_line_a_stage(study):
    lines = dry_run.table(plan(study), speed=160e9).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "vae", "dit", "all", "FLOPs", "Times:"]
    total, besides = (sum(getattr(stage, name) for stage in plan(study)) for name in ("flops", "optimizer_flops"))
    assert besides > 0.1 * total  # of few clips a step Muon's products are no small part
    assert f"{total:.3g}" in lines[3] and f"{besides:.3g}" in lines[3]
    assert dry_run.progress.clock((total + besides) / 40e9) in lines[3]


def test_what_the_sweep_will_decide_is_said_to_be_provisional():
    study = config.from_config_dict(scaling_experiment.get_config())
    plans = plan(study)
    assert [each.name for each in plans if each.provisional] == ["4x", "32x"]
    assert "Sizes and steps of 4x, 32x follow the frontier" in dry_run.table(plans, speed=1e11)


def test_what_cannot_work_is_refused(study):
    dit = study.stages["dit"]
    cases = {
        "its VAE has 24": {"dit": dataclasses.replace(dit.dit, channels=8)},
        "neither a stage nor a checkpoint": {"vae_checkpoint": "nowhere"},
        r"raise pack\.row_tokens": {"pack": dataclasses.replace(dit.pack, row_tokens=64)},
        r"raise pack\.row_slots": {
            "pack": dataclasses.replace(dit.pack, row_slots=1),
            "loader": dataclasses.replace(dit.loader, known=masks.KnownConfig(first_frame=0.1)),
        },
        "not a multiple of the patch": {"dit": dataclasses.replace(dit.dit, patch=(1, 4, 4))},
        r"raise compute\.budget": {"compute": dataclasses.replace(dit.compute, budget=1e8)},
    }
    for message, changes in cases.items():
        with pytest.raises(config.ConfigError, match=message):
            plan(with_dit(study, **changes))
    with pytest.raises(config.ConfigError, match="put vae before it in order"):
        plan(dataclasses.replace(study, order=("dit", "vae")))
    with pytest.raises(ValueError, match="judged on what is held out; set it above 0"):
        dataclasses.replace(dit.data, world=dataclasses.replace(dit.data.world, holdout_fraction=0.0))


def test_a_frontier_is_found_before_it_is_followed(study):
    dit = study.stages["dit"]
    sweep = {
        f"{width}_{number}": dataclasses.replace(
            dit,
            dit=dataclasses.replace(dit.dit, width=width),
            compute=config.ComputeConfig(budget, 1.0, "steps", 0.5),
        )
        for number, budget in enumerate((1e13, 2e13))
        for width in (48, 96, 144)
    }
    rung = {"4x": dataclasses.replace(dit, compute=config.ComputeConfig(1e13, 4.0, "frontier", 0.5))}
    vae = {"vae": study.stages["vae"]}

    def planned(*parts, isoflop=tuple(sweep)):
        stages = {name: stage for part in parts for name, stage in part.items()}
        groups = {"isoflop": isoflop, "ladder": ("4x",)}
        return plan(dataclasses.replace(study, order=tuple(stages), stages=stages, groups=groups))

    assert planned(vae, sweep, rung)[-1].flops == pytest.approx(4e13, rel=0.01)
    with pytest.raises(config.ConfigError, match="before it in order"):
        planned(vae, rung, sweep)
    with pytest.raises(config.ConfigError, match="two budgets with three sizes"):
        planned(vae, sweep, rung, isoflop=("48_0", "96_0", "144_0", "96_1"))


def test_models_that_could_not_be_compared_are_refused(monkeypatch):
    monkeypatch.setattr(dry_run.mobilenet, "available", lambda: False)
    with pytest.raises(config.ConfigError, match="weights are not installed; run tools/install_weights"):
        plan(config.from_config_dict(scaling_experiment.get_config("models")))


@pytest.mark.parametrize(
    ("group", "world", "message"),
    [
        ("prompting", dict(two_things_fraction=0.3), "of one thing at one frame rate"),
        ("prompting", dict(fps=(4.0, 8.0)), "of one thing at one frame rate"),
        ("prompting", dict(shapes=("circle",), colours=tuple(parts.COLOURS)), "two of each"),
        ("prompting", dict(motions=("left", "right"), frame_counts=(9, 17)), "give it still or orbit"),
        ("prompting", dict(motions=("still",)), "and a motion"),
        ("prompting", dict(frame_counts=(1, 5)), "some of 9 or more"),
        ("framing", dict(two_things_fraction=0.3), "two_things_fraction"),
        ("rollout", dict(motions=("left", "right"), frame_counts=(9, 17)), "stay in the frame"),
    ],
)
def test_worlds_that_could_not_be_judged_are_refused(study, group, world, message):
    """Before hours of training, and each with its remedy; as it is the world passes."""
    groups = {group: ("dit",)}
    plan(dataclasses.replace(study, groups=groups))
    data = study.stages["dit"].data
    changed = dataclasses.replace(data, world=dataclasses.replace(data.world, holdout_fraction=0.3, **world))
    with pytest.raises(config.ConfigError, match=f"stage dit: .*{message}"):
        plan(dataclasses.replace(with_dit(study, data=changed), groups=groups))


def test_what_does_not_divide_over_the_devices_is_refused(study):
    with pytest.raises(sharding.MeshError, match="stage dit: 4 rows do not divide over 8 devices"):
        plan(with_dit(study, mesh=sharding.MeshConfig()), count=8)
    split = sharding.MeshConfig(tensor=8)
    with pytest.raises(sharding.MeshError, match="stage dit: 4 heads do not divide over 8 devices"):
        plan(with_dit(study, mesh=split), count=8)
    with pytest.raises(sharding.MeshError, match=r"stage dit: mesh data=3 .* does not cover 2 devices"):
        plan(with_dit(study, mesh=sharding.MeshConfig(data=3)), count=2)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["quickstart", "scaling"])
def test_few_rows_are_shared_by_as_many_devices_as_there_are(name, count):
    """The same configs on a laptop and on a node of accelerators."""
    experiment = {"quickstart": quickstart, "scaling": scaling_experiment}[name]
    study = config.from_config_dict(experiment.get_config())
    assert len(plan(study, count=count)) == len(study.order)

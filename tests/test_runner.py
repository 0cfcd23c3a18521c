"""A study of several DiTs from end to end: what the report says, and that running it again changes no number."""

import dataclasses
import json

import pytest
import tiny
from weights import needs_mobilenet

from sora_jax import config
from sora_jax.evaluate import frechet
from sora_jax.study import runner

LADDER = {"1x": 1.0, "4x": 4.0}


@pytest.fixture(scope="module")
def study():
    dit = tiny.dit_run("vae")
    rungs = {
        name: dataclasses.replace(dit, compute=config.ComputeConfig(0.0, multiplier, "steps", 0.5))
        for name, multiplier in LADDER.items()
    }
    stages = {"vae": tiny.vae_run()} | rungs
    groups = {"ladder": tuple(rungs), "isoflop": tuple(rungs)}
    return config.StudyRun("tiny", tuple(stages), stages, groups, prompts=4, shown=2, seed=3)


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    runner.run(study, workdir, "sora-jax study")
    return workdir, json.loads((workdir / "report.json").read_text())


def test_every_rung_is_told_with_its_cost(done):
    _, numbers = done
    assert list(numbers["runs"]) == list(LADDER)
    one, four = numbers["runs"].values()
    assert (one["steps"], four["steps"]) == (4, 16) and four["flops"] == 4 * one["flops"]
    assert 0 < one["useful_flops"] < one["flops"]
    for run in (one, four):
        assert run["val_loss"] > 0 and any(name.startswith("val_loss_time/") for name in run)
        assert set(run["adherence"]) >= {"colour", "shape", "motion", "all"} and run["adherence"]["count"] == 4
    assert numbers["adherence"] == four["adherence"]
    assert sum(four["flops_by_part"].values()) == pytest.approx(four["flops"])


def test_one_pass_over_the_clips_serves_all_stages(done):
    workdir, _ = done
    assert sorted(path.name.rsplit("-", 1)[0] for path in (workdir / "encoded").glob("latents-*")) == [
        "latents-heldout",
        "latents-train",
    ]


def test_the_page_shows_the_rungs_side_by_side(done):
    page = (done[0] / "report.html").read_text()
    assert page.index("More compute, better videos") < page.index("Headlines")
    assert page.count("<video") >= len(LADDER) * 2


def test_a_second_run_trains_nothing_and_says_the_same(done, study, monkeypatch):
    workdir, before = done
    monkeypatch.setattr(runner.loop, "make_step", None)
    runner.run(study, workdir, "sora-jax study")
    after = json.loads((workdir / "report.json").read_text())
    timings = ("created", "seconds")
    assert {k: v for k, v in after.items() if k not in timings} == {k: v for k, v in before.items() if k not in timings}


@needs_mobilenet
def test_a_ladder_has_frechet_distances_with_their_floor(done):
    for run in done[1]["runs"].values():
        assert run["frechet"]["metric"] == frechet.NAME and run["frechet"]["num_videos"] == 4
        assert run["frechet"]["distance"] > 0 and run["frechet"]["floor"] > 0

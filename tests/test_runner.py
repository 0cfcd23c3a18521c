"""A study of several DiTs from end to end: what the report says, and that running it again changes no number."""

import contextlib
import dataclasses
import html
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import xla
from weights import needs_mobilenet

from sora_jax import main
from sora_jax.evaluate import frechet
from sora_jax.study import judgement, runner
from sora_jax.train import loop

LADDER = ("1x", "4x")
# Runs a tiny study in the work dir that is its argument.
PROGRAM = """
import sys, pathlib, tiny
from sora_jax.study import runner
runner.run(tiny.study(save_every=3), pathlib.Path(sys.argv[1]), "sora-jax study")
"""


@pytest.fixture(scope="module")
def study():
    return tiny.study(save_every=3)


def but_timings(numbers):
    """The numbers of a report without what the clock says, and the commands, which name the work dir."""
    if isinstance(numbers, dict):
        return {
            key: but_timings(value) for key, value in numbers.items() if key not in ("created", "seconds", "commands")
        }
    return numbers


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What is compiled once for all runs of the study."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def done(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("study")
    finish(start(workdir, cache))
    return workdir, json.loads((workdir / "report.json").read_text())


def test_a_stage_that_diverged_is_named(tmp_path, monkeypatch):
    def fit(task, workdir):
        raise loop.DivergedError("the loss is nan; lower optimizer.rate")

    monkeypatch.setattr(loop, "fit", fit)
    with pytest.raises(loop.DivergedError, match=r"^stage vae: the loss is nan; lower optimizer\.rate$"):
        runner.run(tiny.study(), tmp_path, "sora-jax study")


def test_every_rung_is_told_with_its_cost(done):
    _, numbers = done
    assert tuple(numbers["runs"]) == LADDER
    one, four = numbers["runs"].values()
    assert (one["steps"], four["steps"]) == (4, 16) and four["flops"] == 4 * one["flops"]
    assert 0 < one["useful_flops"] < one["flops"]
    for run in (one, four):
        assert 0 < run["val_loss_floor"] < run["val_loss"] and any(name.startswith("val_loss_time/") for name in run)
        # The same noise on the same clips, whatever the model.
        for bound in ("val_loss_floor", "val_loss_ceiling"):
            assert run[bound] == one[bound]
        assert set(run["adherence"]) >= {"colour", "shape", "motion", "all"} and run["adherence"]["count"] == 4
    assert numbers["adherence"] == four["adherence"]
    trained = numbers["vae"]["flops"] + one["flops"] + four["flops"]
    assert (
        numbers["total_flops"] == pytest.approx(trained + numbers["encoding_flops"]) and numbers["encoding_flops"] > 0
    )
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


def test_groups_of_models_are_compared_on_the_page(done):
    workdir, numbers = done
    for group, score in {"framing": "inside_of_real", "rollout": "after_5"}.items():
        assert tuple(numbers[group]) == LADDER and all(score in found for found in numbers[group].values())
        assert (workdir / f"{group}.png").stat().st_size > 1000
    page = (workdir / "report.html").read_text()
    assert page.index("Native frames against squares") < page.index("Together against one after the other")


def test_a_second_run_trains_and_judges_nothing_and_says_the_same(done, study, monkeypatch):
    workdir, before = done
    monkeypatch.setattr(runner.loop, "make_step", None)
    monkeypatch.setattr(judgement.Judge, "_judge", None)
    runner.run(study, workdir, "sora-jax study")
    after = json.loads((workdir / "report.json").read_text())
    assert but_timings(after) == but_timings(before)
    monkeypatch.undo()
    monkeypatch.setattr(judgement.Judge, "_judge", None)
    with pytest.raises(TypeError, match="not callable"):
        runner.run(dataclasses.replace(study, seed=4), workdir, "sora-jax study")
    # Neither are the scores of another judge kept.
    monkeypatch.setattr(judgement, "code_of", lambda *judges: "another")
    with pytest.raises(TypeError, match="not callable"):
        runner.run(study, workdir, "sora-jax study")


def test_another_sampler_is_judged_on_the_same_training(done, study, monkeypatch, tmp_path):
    workdir, before = done
    monkeypatch.setattr(runner.loop, "make_step", None)
    stages = {
        name: dataclasses.replace(
            stage,
            sampler=dataclasses.replace(stage.sampler, steps=1, guidance_interval=(0.0, 0.9), known_guidance=4.0),
        )
        if name in LADDER
        else stage
        for name, stage in study.stages.items()
    }
    judged = {name: (workdir / name / "judged.npz").read_bytes() for name in LADDER}
    runner.run(dataclasses.replace(study, stages=stages), workdir, "sora-jax study")
    after = json.loads((workdir / "report.json").read_text())
    for name in LADDER:
        assert after["runs"][name]["val_loss"] == before["runs"][name]["val_loss"]
        assert (workdir / name / "judged.npz").read_bytes() != judged[name]
    # The page's command makes a video by the sampler that the page is of, although the checkpoint is of another.
    page = html.unescape((workdir / "report.html").read_text())
    (command,) = re.findall(r"sora-jax (sample .* --steps=1 --guidance_interval=0.0,0.9 --out=)sample.mp4", page)
    monkeypatch.undo()
    assert main.run([*shlex.split(command)[:-1], f"--out={tmp_path / 'sample.mp4'}"]) == 0


def start(workdir, cache):
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "experiments")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": xla.flags(),  # on one device
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(workdir)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, told = process.communicate()
    assert process.returncode == 0, told.decode()


def test_a_study_that_is_killed_at_any_moment_ends_with_the_same_numbers(done, cache, tmp_path):
    rng = random.Random(0)
    for stage in ("vae", "1x", "4x"):
        process = start(tmp_path, cache)
        while process.poll() is None and not (tmp_path / stage).exists():
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, 10))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "report.json").exists()
    finish(start(tmp_path, cache))
    assert but_timings(json.loads((tmp_path / "report.json").read_text())) == but_timings(done[1])


def test_of_rates_the_best_one_is_shown(study, monkeypatch, tmp_path):
    """And not the last, of which the rate is the largest that was tried."""
    losses = {"1x": 0.5, "4x": 0.7}
    monkeypatch.setattr(runner, "run_numbers", lambda path: {"val_loss": losses[path.name]})
    monkeypatch.setattr(judgement, "Judge", lambda *_, **__: type("", (), {"of": lambda _, name: ({}, [])})())
    alone = dataclasses.replace(study, groups={"rates": LADDER})
    clock = runner.Clock(tmp_path / "seconds.json")
    assert list(runner.judged(alone, tmp_path, clock)) == ["1x"]
    losses["4x"] = 0.3
    assert list(runner.judged(alone, tmp_path, clock)) == ["4x"]


def test_time_of_other_studies_in_a_work_dir_is_not_of_this_one(study, tmp_path):
    path = tmp_path / "seconds.json"
    path.write_text('{"vae": 1.0, "4x": 2.0, "4x judged": 3.0, "framing": 4.0, "report": 5.0, "64_rate3": 100.0}')
    assert sum(runner.Clock(path).of(study).values()) == 15


def test_time_is_kept_before_a_part_ends(tmp_path, monkeypatch):
    """So that what is killed was counted, and added to what there was."""
    monkeypatch.setattr(runner, "KEPT_EVERY", 0.01)
    path = tmp_path / "seconds.json"
    path.write_text('{"vae": 100.0, "dit": 5.0}')
    deadline = time.monotonic() + 60
    with runner.Clock(path).measure("vae"):
        while json.loads(path.read_text())["vae"] < 100.02 and time.monotonic() < deadline:
            time.sleep(0.01)
        kept = json.loads(path.read_text())
    assert 100.02 <= kept["vae"] <= json.loads(path.read_text())["vae"] < 160 and kept["dit"] == 5.0


@needs_mobilenet
def test_a_ladder_has_frechet_distances_with_their_floor(done):
    for run in done[1]["runs"].values():
        assert run["frechet"]["metric"] == frechet.NAME and run["frechet"]["num_videos"] == 4
        assert min(run["frechet"][name] for name in ("distance", "floor", "reconstructions", "ceiling")) > 0
        assert run["frechet_latent"]["num_videos"] == 4
        assert min(run["frechet_latent"][name] for name in ("distance", "floor")) > 0

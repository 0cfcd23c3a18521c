"""Recipes for machines that are not here, run with stand-ins for the commands that reach them."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "tools" / "launch"
# What stands in for a command notes how it was called. gcloud does on this machine what it is told to do on all workers.
COMMANDS = {
    "gcloud": """for word in "$@"; do case $word in
      --version=*|--accelerator-type=*) echo "$word" >> "$NOTES";;
      --command=*) cd "$HOME" && sh -c "${word#--command=}" || exit;;
    esac; done""",
    "sudo": 'echo "sudo $*" >> "$NOTES"',
    "python3": 'exit "$OLD_PYTHON"',
    "git": """case $1 in
      clone) mkdir -p sora_jax/tools sora_jax/.venv/bin && cp "$(command -v install)" sora_jax/tools/install &&
        cp "$(command -v train)" sora_jax/.venv/bin/sora-jax;;
      *) echo https://example.com/sora_jax;;
    esac""",
    "install": 'echo "install $*" >> "$NOTES"',
    "train": 'echo "train $*" >> "$NOTES"; exit "$CODE"',
    "srun": 'exit "$CODE"',
    "scontrol": 'echo "scontrol $*" >> "$NOTES"',
}


@pytest.fixture
def launch(tmp_path):
    """Runs a recipe; gives its exit code, its errors and the notes."""
    commands, notes = tmp_path / "commands", tmp_path / "notes"
    commands.mkdir()
    for name, script in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)

    def run(*command, **variables):
        notes.write_text("")
        there = {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path), "NOTES": str(notes)}
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | there | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr, notes.read_text().splitlines()

    return run


def tpu(kind):
    return LAUNCH / "tpu_vm.sh", "name", "zone", kind, "host:/share", "dit.py:7b", "dit", "--config.mesh.fsdp=8"


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-256", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_a_tpu_gets_the_runtime_of_its_kind(launch, kind, runtime):
    code, _, notes = launch(*tpu(kind), CODE="0", OLD_PYTHON="0")
    assert code == 0 and notes[:2] == [f"--accelerator-type={kind}", f"--version={runtime}"]
    trained = "train train --distributed --config=dit.py:7b --workdir=/mnt/runs/dit --config.mesh.fsdp=8"
    assert notes[-2:] == ["install tpu", trained]


def test_overrides_arrive_as_they_were_given(launch):
    """Though a shell on the other side reads them once more."""
    odd = ["--config.vae_train.crop=(9, 32, 32)", "--config.title=that's $HOME"]
    _, _, notes = launch(*tpu("v6e-8"), *odd, CODE="0", OLD_PYTHON="0")
    assert notes[-1].endswith(" ".join(["--config.mesh.fsdp=8", *odd]))


def test_a_kind_without_a_known_runtime_is_refused(launch):
    code, told, notes = launch(*tpu("v9-8"), CODE="0", OLD_PYTHON="0")
    assert code == 2 and "v9-8" in told and not notes


@pytest.mark.parametrize("old", ["0", "1"])
def test_a_python_that_is_too_old_is_not_the_one_that_is_used(launch, old):
    _, _, notes = launch(*tpu("v6e-8"), CODE="0", OLD_PYTHON=old)
    assert ("sudo apt-get install -y python3.12 python3.12-venv" in notes) == (old == "1")


@pytest.mark.parametrize(("code", "runs"), [("75", 11), ("137", 11), ("130", 1), ("1", 1), ("0", 1)])
def test_a_worker_begins_again_ten_times_at_most(launch, code, runs):
    ended, told, notes = launch(*tpu("v6e-8"), CODE=code, OLD_PYTHON="0")
    assert ended == int(code) and sum(note.startswith("train ") for note in notes) == runs
    assert ("restarted 10 times" in told) == (runs > 1)


@pytest.mark.parametrize(
    ("code", "before", "again"), [("75", "", True), ("143", "9", True), ("75", "10", False), ("1", "", False)]
)
def test_a_job_of_slurm_goes_back_into_the_queue_ten_times_at_most(launch, code, before, again):
    variables = {"SLURM_RESTART_COUNT": before} if before else {}
    job = "bash", LAUNCH / "slurm.sbatch", "dit.py:XL/2", "/shared/dit"
    ended, told, notes = launch(*job, CODE=code, SLURM_JOB_ID="7", **variables)
    assert ended == int(code) and notes == (["scontrol requeue 7"] if again else [])
    assert ("not again" in told) == (before == "10")

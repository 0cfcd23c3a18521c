"""Several real processes: the same losses as one, parts of a batch read apart, a killed peer noticed, and resumed from."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import xla

from sora_jax import checkpoint, processes

ROOT = Path(__file__).parent.parent
STEPS = 20
# Trains a tiny VAE, and a DiT on it, for as many steps as its second argument says, in the folder that is its first; or, of very
# many steps, the VAE alone. The DiT works on the VAE of its third argument, if there is one, and so on the very same latents.
PROGRAM = """
import dataclasses, logging, pathlib, sys, tiny
logging.basicConfig(level=logging.INFO, force=True)  # importing jax's friends may have set it up otherwise
from sora_jax import processes, sharding
if "--distributed" in sys.argv:
    processes.start()
from sora_jax.train import dit, loop, vae
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
mesh = sharding.MeshConfig(data=2, fsdp=4)
save_every = 4 if steps > 1000 else steps // 2
run = dataclasses.replace(tiny.vae_run(steps=steps, log_every=1, save_every=save_every), mesh=mesh)
loop.fit(vae.VAETask(run), folder / "vae")
trained = pathlib.Path(sys.argv[3]) if sys.argv[3:] and not sys.argv[3].startswith("-") else folder
run = dataclasses.replace(tiny.dit_run(trained / "vae", steps=steps, log_every=1, save_every=save_every), mesh=mesh)
run = dataclasses.replace(run, loader=dataclasses.replace(run.loader, lanes=2))
loop.fit(dit.DiTTask(run, folder / "encoded"), folder / "dit")
processes.leave()
"""


def environment(devices):
    paths = [str(ROOT / "tests"), str(ROOT / "experiments")]
    return os.environ | {
        "XLA_FLAGS": xla.flags(),
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


# `sora-jax` as it is installed.
COMMAND = "import sys; from sora_jax import main; sys.exit(main.run())"

# Rows of four on two devices of each of two processes: in turns, and where both have all.
ROWS = """
import jax, numpy as np
from sora_jax import processes, sharding
processes.start()
for sizes in (4, 1, 1, 1), (2, 1, 1, 2):
    devices = [jax.devices()[number] for number in (0, 2, 1, 3)]
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), devices)
    own, first = sharding.share(mesh, 4)
    batch = np.arange(12).reshape(4, 3)
    placed = sharding.place_rows(batch[list(own)], mesh, 4)
    right = all((np.asarray(shard.data) == batch[shard.index]).all() for shard in placed.addressable_shards)
    print(f"process {jax.process_index()} of {sizes}: rows {own}, first {sorted(first)}, placed right: {right}", flush=True)
processes.leave()
"""


@contextlib.contextmanager
def launched(folder, *program, count=2, devices=4):
    """tools/launch_local with a program, its own process group, and the file of what it says; killed at the end."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "launch_local"),
        f"--processes={count}",
        f"--devices={devices}",
        "--",
    ]
    log = folder / f"log{count}"
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, sys.executable, "-c", *map(str, program)],
            env=environment(devices),
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(found, process, log, seconds=300):
    """Waits until found() is true; fails if the process ends before, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def losses(folder, stage):
    return [line["loss"] for line in tiny.lines(folder / stage) if line["kind"] == "train"]


def apart(one, other, step):
    """By how much parameters of a step differ at most."""
    params = (checkpoint.restore_nested(folder, "params", step) for folder in (one, other))
    return max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, params), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-c", PROGRAM, str(folder), str(STEPS)]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_as_one_does(alone, tmp_path):
    with launched(tmp_path, PROGRAM, tmp_path, STEPS, alone) as (process, log):
        assert process.wait(600) == 0, log.read_text()
    for stage in ("vae", "dit"):
        one, two = losses(alone, stage), losses(tmp_path, stage)
        assert len(one) == len(two) and two == pytest.approx(one, abs=1e-5)
        assert apart(alone / stage, tmp_path / stage, STEPS // 2) <= 1e-6
    # What is counted is counted once.
    one, two = (
        [line["packing/tokens"] for line in tiny.lines(folder / "dit") if line["kind"] == "train"]
        for folder in (alone, tmp_path)
    )
    assert one == two
    # The first process alone reports, of each stage once.
    assert log.read_text().count(f"step {STEPS}/{STEPS}  loss") == 2


def test_what_one_process_began_two_bring_to_the_same_end(alone, tmp_path):
    """Ten steps from the middle of a run of one process; its loader's lanes are dealt out anew."""
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
    shutil.rmtree(tmp_path / "dit" / str(STEPS))
    with launched(tmp_path, PROGRAM, tmp_path, STEPS, alone) as (process, log):
        assert process.wait(600) == 0, log.read_text()
    assert f"resumed from step {STEPS // 2}" in log.read_text()
    assert apart(alone / "dit", tmp_path / "dit", STEPS) <= 1e-6


def test_processes_place_the_rows_that_are_theirs(tmp_path):
    with launched(tmp_path, ROWS, devices=2) as (process, log):
        assert process.wait(120) == 0, log.read_text()
    told = log.read_text()
    for line in (
        "process 0 of (4, 1, 1, 1): rows (0, 2), first [0, 2], placed right: True",
        "process 1 of (4, 1, 1, 1): rows (1, 3), first [1, 3], placed right: True",
        "process 0 of (2, 1, 1, 2): rows (0, 1, 2, 3), first [0, 1, 2, 3], placed right: True",
        "process 1 of (2, 1, 1, 2): rows (0, 1, 2, 3), first [], placed right: True",
    ):
        assert line in told, told


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_noticed_and_resumed_from(tmp_path, victim):
    with launched(tmp_path, PROGRAM, tmp_path, 100_000) as (process, log):
        # A folder is renamed to its number when all of a checkpoint is in it.
        until(lambda: any(path.name.isdigit() for path in tmp_path.glob("vae/*")), process, log)
        os.kill(children(process.pid)[victim], signal.SIGKILL)
        began = time.monotonic()
        process.wait(60)
        seconds = time.monotonic() - began
    told = log.read_text()
    assert seconds <= 15 + 2, told  # of starting and ending Python
    codes = [int(code) for code in re.search(r"exit codes (-?\d+), (-?\d+)", told).groups()]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == processes.LOST, told
    assert "start all processes again" in told
    if victim == 1:
        # Started again, on another number of processes, it goes on from the newest checkpoint.
        with launched(tmp_path, PROGRAM, tmp_path, 100_000, count=1, devices=8) as (process, log):
            until(lambda: "/100000  loss" in log.read_text(), process, log)
            assert "resumed from step" in log.read_text()


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, told):
    workdir, config = tmp_path / "run", f"--config={ROOT / 'tests' / 'tiny.py'}:vae"
    loop = ["--config.loop.steps=100000", "--config.loop.log_every=1", "--config.loop.save_every=0"]
    with launched(tmp_path, COMMAND, "train", config, f"--workdir={workdir}", *loop, devices=1) as (process, log):
        until(lambda: "step 3/100000" in log.read_text(), process, log)
        began = time.monotonic()
        os.kill(children(process.pid)[told], signal.SIGTERM)
        process.wait(60)
        seconds = time.monotonic() - began
    said = log.read_text()
    assert "exit codes 143, 143" in said and seconds < 15, said
    # Both took part in the save, so that it is whole; and no process made a step more, as each waits for all.
    (step,) = checkpoint.steps(workdir)
    assert step == max(line["step"] for line in tiny.lines(workdir)) and not checkpoint.verify(workdir).wrong
    assert said.count(f"the same command resumes from step {step}") == 2


def test_numbers_and_dicts_of_one_process_are_its_own():
    assert processes.summed({"a": 1.5}) == {"a": 1.5}
    assert processes.joined({"0": {"x": 1}}) == {"0": {"x": 1}}
    assert processes.first_then_all(lambda: 3) == 3 and processes.is_first()


def test_dicts_are_joined_key_by_key():
    assert processes._merged({"0": {"x": 1}, "n": 1}, {"1": {"x": 2}, "n": 2}) == {"0": {"x": 1}, "1": {"x": 2}, "n": 2}

"""Several real processes: the same losses as one, parts of a batch read apart, a signal to one stops all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from several import PROGRAM, ROOT, children, environment, launched, until

from sora_jax import checkpoint, processes
from sora_jax.generate import files, media

STEPS = 20
# `sora-jax` as it is installed.
COMMAND = "import sys; from sora_jax import main; sys.exit(main.run())"

# Without Frechet distances, which each process takes by itself and which take long to compile.
UNFEATURED = f"from sora_jax.evaluate import mobilenet; mobilenet.available = lambda: False; {COMMAND}"

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


def losses(folder, stage):
    return [line["loss"] for line in tiny.lines(folder / stage) if line["kind"] == "train"]


def apart(one, other, step):
    """By how much parameters of a step differ at most."""
    params = (checkpoint.restore_nested(folder, "params", step) for folder in (one, other))
    return max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, params), strict=True))


# What meets as the verbs do, and then does what its first argument says.
MEETING = """
import jax, logging, pathlib, sys, time
from sora_jax import main, processes
from sora_jax.cli import flags, process
from sora_jax.cli.failures import Failure
if "late" in sys.argv:
    processes.JAX_PATIENCE = 3

def verb(argv):
    parser = flags.Parser()
    parser.add_argument("what")
    parser.add_argument("folder")
    flags.add_processes(parser, "")
    arguments = parser.parse_args(argv)
    what, folder = arguments.what, pathlib.Path(arguments.folder)
    if what == "apart":
        arguments.seed = folder.exists() or folder.mkdir(exist_ok=True)
    with process.meeting(arguments):
        here = str(processes.is_first())
        if what == here or (what == "last" and jax.process_index() == jax.process_count() - 1):
            raise Failure("nothing to write to")
        if what in ("True", "False", "last"):
            time.sleep(60)
        if what == "late" and processes.is_first():
            time.sleep(8)
            folder.mkdir()
        if what == "wait":
            print("waiting", flush=True)
            time.sleep(60)
    return 0

def run(argv):
    with process.logging_to_stderr():
        try:
            return verb(argv)
        except Failure as failure:
            print("error:", failure, flush=True)
            return failure.code

main._run = run
sys.exit(main.run())
"""


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


@pytest.mark.parametrize("verb", ["sample", "vbench", "evaluate"])
def test_two_processes_make_what_one_makes(alone, tmp_path, verb):
    image = tmp_path / "start.png"
    files.write_image(image, np.full((32, 32, 3), 90, np.uint8))
    flags = {
        "sample": ("sample", "--prompt=a red circle", "--samples=3", f"--image={image}", "--outdir"),
        "vbench": ("sample", "--prompt=a red circle", "--frames=5", "--vbench"),
        "evaluate": ("evaluate", "--prompts=4", "--out"),
    }[verb]
    # The axis that spans both processes splits weights, and clips.
    mesh = {"sample": "fsdp=4", "vbench": "data=4", "evaluate": "data=2,fsdp=2"}[verb]
    command = [*flags[:-1], f"--checkpoint={alone / 'dit'}", f"--mesh={mesh}"]
    one, two = (tmp_path / name for name in ("one", "two"))
    done = subprocess.run(
        [sys.executable, "-c", UNFEATURED, *command, f"{flags[-1]}={one}"],
        env=environment(4),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with launched(tmp_path, UNFEATURED, *command, f"{flags[-1]}={two}", devices=2) as (process, log):
        assert process.wait(300) == 0, log.read_text()
    # The first alone tells and writes.
    told = {"sample": f"{two}/000.mp4", "vbench": f"{two}/videos", "evaluate": "of 4 held-out prompts; floor"}[verb]
    assert log.read_text().count(told) == 1, log.read_text()
    if verb == "evaluate":
        scores = [json.loads(path.read_text())["adherence"] for path in (one, two)]
        assert scores[0] == scores[1]
        return
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in (one, two)]
    assert names[0] == names[1] and len(names[0]) == {"sample": 4, "vbench": 7}[verb]
    for name in (name for name in names[0] if name.suffix == ".mp4"):
        videos = [media.read(folder / name).frames_THWC.astype(int) for folder in (one, two)]
        # Encoded from pixels that are the same but for rounding.
        assert np.abs(videos[0] - videos[1]).max() <= 3, name


def test_the_first_may_write_for_longer_than_jax_waits(tmp_path):
    with launched(tmp_path, MEETING, "late", tmp_path / "written", devices=1) as (process, log):
        assert process.wait(60) == 0, log.read_text()
    assert (tmp_path / "written").exists() and "exit codes 0, 0" in log.read_text()


@pytest.mark.parametrize(("refusing", "count"), [(True, 2), (False, 2), ("last", 3)])
def test_what_one_process_refuses_ends_all_with_its_exit_code(tmp_path, refusing, count):
    """Though the first, by which all know of each other, may be the first to hear of it."""
    began = time.monotonic()
    with launched(tmp_path, MEETING, refusing, tmp_path, count=count, devices=1) as (process, log):
        process.wait(60)
    told = log.read_text()
    assert time.monotonic() - began < 40, told
    assert "error: nothing to write to" in told and f"exit codes {', '.join('2' * count)}" in told, told


INTERRUPTED = """
import time
from sora_jax import signals
try:
    with signals.handled(), signals.held(0):
        print("ready", flush=True)
        while not (stopped := signals.stop_after(1)):
            time.sleep(0.05)
        time.sleep(1)  # the step goes on, and is saved
        print("saved", flush=True)
        raise stopped
except signals.Stopped:
    print("ended in order", flush=True)
"""


def test_processes_hear_once_of_a_ctrl_c():
    """It goes to all of a terminal's processes, and a second one would end them at once."""
    spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
    command = [sys.executable, str(ROOT / "tools" / "launch_local"), "--processes=1", "--", sys.executable, "-c"]
    with subprocess.Popen(
        [sys.executable, "-c", spawn, *command, INTERRUPTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(1),
    ) as process:
        told = ""
        while line := process.stdout.readline().decode():
            told += line
            if "ready" in line:
                process.stdin.write(b"\x03")
                process.stdin.flush()
    assert "saved" in told and "ended in order" in told, told


def test_a_program_that_is_not_there_is_told():
    command = [sys.executable, str(ROOT / "tools" / "launch_local"), "--", "sora-jaxx", "train"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 127 and found.stderr.startswith("launch_local: cannot start sora-jaxx: No such file")


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_that_does_not_train_stops_all(tmp_path, told):
    with launched(tmp_path, MEETING, "wait", tmp_path, devices=1) as (process, log):
        until(lambda: log.read_text().count("waiting") == 2, process, log)
        began = time.monotonic()
        os.kill(children(process.pid)[told], signal.SIGTERM)
        process.wait(60)
        seconds = time.monotonic() - began
    assert "exit codes 143, 143" in log.read_text() and seconds < 15, log.read_text()


def test_processes_of_other_flags_are_refused(tmp_path):
    with launched(tmp_path, MEETING, "apart", tmp_path / "folder", devices=1) as (process, log):
        process.wait(60)
    told = log.read_text()
    assert "this one was given other flags than the first" in told and "exit codes 2, 2" in told, told


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
    with pytest.raises(RuntimeError, match="would meet the others, who wait"):
        processes.first_then_all(processes.meet)
    processes.meet()


def test_dicts_are_joined_key_by_key():
    assert processes._merged({"0": {"x": 1}, "n": 1}, {"1": {"x": 2}, "n": 2}) == {"0": {"x": 1}, "1": {"x": 2}, "n": 2}

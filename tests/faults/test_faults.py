"""A run is damaged for real, by real processes, signals and disks, and nothing is lost that was promised to be kept."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import child
import pytest

from sora_jax import checkpoint

SEED = 20
STEPS = 100_000  # no run here comes to its end
LOOP = {"steps": STEPS, "log_every": 1, "save_every": 1}


def last_logged(workdir):
    """The last step of metrics.jsonl, of which the last line may be half there."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return max((line["step"] for line in map(json.loads, lines) if line["kind"] == "train"), default=0)


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """Starts a run that is left alone and keeps every step; the work dir of it once it has `steps` of them."""
    workdir = tmp_path_factory.mktemp("straight") / "run"

    def until(steps):
        if (checkpoint.latest_step(workdir) or 0) < steps:
            process = runs.start(workdir, **child.LOOP, keep=STEPS)
            child.wait_for(lambda: (checkpoint.latest_step(workdir) or 0) >= steps, 300)
            process.terminate()
            process.join(60)
        return workdir

    until(3)
    return until


def test_kill_at_any_moment(runs, straight, tmp_path, figures, times):
    """No kill costs more than the step that was not saved yet, and the state is that of a run that was left alone."""
    kills, rng, workdir = times(30, 300), random.Random(SEED), tmp_path / "run"
    saved, during_save = 0, 0
    for _ in range(kills):
        process = runs.start(workdir, **child.LOOP, keep=2)
        # Most lives come to their first steps; there the moment is random to a step's length.
        with contextlib.suppress(TimeoutError):
            child.wait_for(lambda before=saved: (checkpoint.latest_step(workdir) or 0) > before, rng.uniform(0, 20))
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.join()
        if not workdir.exists():
            continue
        during_save += bool(list(workdir.glob("*orbax-checkpoint-tmp*")))
        newest = checkpoint.latest_step(workdir) or 0
        assert newest >= saved
        if (workdir / "metrics.jsonl").exists():
            assert newest >= last_logged(workdir) - 1
        for step in checkpoint.steps(workdir):
            assert not checkpoint.verify(workdir / str(step)).wrong
        saved = newest
    assert saved > 5, runs.log(workdir)[-2000:]
    assert not checkpoint.changes(workdir / str(saved), straight(saved) / str(saved))
    figures("kill -9", kills=kills, during_saves=during_save, steps=saved, steps_lost_each_at_most=1)


def test_flipped_bits_are_found(straight, tmp_path, figures, times):
    """One bit anywhere in a step: it is found, or nothing that is read depends on it."""
    tries, rng, found, harmless = times(100, 2000), random.Random(SEED), 0, 0
    source = straight(3) / "3"
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    copy = tmp_path / "3"
    shutil.copytree(source, copy)
    for _ in range(tries):
        path = rng.choices(files, sizes)[0].relative_to(source)
        content = (copy / path).read_bytes()
        flipped = bytearray(content)
        at = rng.randrange(8 * len(content))
        flipped[at // 8] ^= 1 << at % 8
        (copy / path).write_bytes(flipped)
        if checkpoint.verify(copy).wrong:
            found += 1
        else:
            assert not checkpoint.changes(source, copy)
            assert checkpoint.read_meta(copy.parent, 3) == checkpoint.read_meta(source.parent, 3)
            harmless += 1
        (copy / path).write_bytes(content)
    assert not checkpoint.verify(copy).wrong
    figures("flipped bits", tried=tries, found=found, nothing_depends_on=harmless, missed=0)


@pytest.mark.parametrize("damage", ["missing", "empty", "halved"])
def test_files_that_are_not_whole_are_found(straight, tmp_path, figures, damage):
    source, tried, found = straight(3) / "3", 0, 0
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.stat().st_size):
        copy = tmp_path / "3"
        shutil.copytree(source, copy)
        target = copy / path.relative_to(source)
        content = target.read_bytes()
        target.unlink()
        if damage != "missing":
            target.write_bytes(content[: len(content) // 2] if damage == "halved" else b"")
        tried += 1
        if checkpoint_is_wrong(copy):
            found += 1
        else:
            assert not checkpoint.changes(source, copy)
        shutil.rmtree(copy)
    assert found
    figures(f"files {damage}", tried=tried, found=found, nothing_depends_on=tried - found)


def checkpoint_is_wrong(step):
    try:
        return checkpoint.verify(step).wrong
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(runs, straight, tmp_path, figures, number, code):
    workdir = tmp_path / "run"
    process = runs.start(workdir, **child.LOOP | {"save_every": 0}, keep=2)
    child.wait_for(lambda: last_logged(workdir) >= 4)
    assert checkpoint.latest_step(workdir) is None
    began = time.monotonic()
    os.kill(process.pid, number)
    process.join(30)
    seconds = time.monotonic() - began
    assert process.exitcode == code and seconds < 10
    steps = checkpoint.latest_step(workdir)
    assert steps == last_logged(workdir)
    assert not checkpoint.changes(workdir, straight(steps) / str(steps))
    figures(number.name, exit_code=code, seconds=round(seconds, 2))


def test_a_second_signal_exits_at_once(runs, tmp_path, figures):
    workdir = tmp_path / "run"
    process = runs.start(workdir, **child.LOOP | {"save_every": 0}, keep=2)
    child.wait_for(lambda: last_logged(workdir) >= 1)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    seconds = time.monotonic() - began
    assert process.exitcode in (143, -signal.SIGTERM) and seconds < 3
    figures("second signal", seconds=round(seconds, 2))


@pytest.fixture
def small_disk(tmp_path):
    """mount(size in bytes, *options) gives a small disk of its own, or the one there is anew."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(size, *options):
        again = ["remount"] if os.path.ismount(point) else []
        chosen = ",".join([*again, f"size={size}", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", point], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine does not let us mount a disk ({done.stderr.strip()})")
        return point

    yield mount
    if os.path.ismount(point):
        subprocess.run(["umount", "-l", point], check=True)


def size_of(step):
    return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())


def test_a_full_disk_keeps_the_last_good_checkpoint(runs, straight, small_disk, figures):
    whole = size_of(straight(3) / "3")
    disk = small_disk(int(1.6 * whole) + 2**19)
    workdir = disk / "run"
    assert runs.finish(workdir, **child.LOOP, keep=2) == 1
    kept = checkpoint.steps(workdir)
    assert (
        kept
        and "could not be saved" in (said := runs.log(workdir))
        and f"step {kept[-1]} is the newest that is whole" in said
    )
    assert not checkpoint.verify(workdir).wrong and not list(workdir.glob("*orbax-checkpoint-tmp*"))
    # It goes on once there is room.
    small_disk(10 * whole)
    process = runs.start(workdir, **child.LOOP, keep=2)
    child.wait_for(lambda: checkpoint.latest_step(workdir) > kept[-1] + 1)
    process.terminate()
    process.join(60)
    steps = checkpoint.latest_step(workdir)
    assert not checkpoint.changes(workdir, straight(steps) / str(steps))
    figures("full disk", kept_step=kept[-1], resumed_to=steps)


def test_a_read_only_disk_is_told(runs, straight, small_disk):
    disk = small_disk(2**26)
    workdir = disk / "run"
    shutil.copytree(straight(3), workdir, ignore=shutil.ignore_patterns("tensorboard"))
    before = checkpoint.digest(workdir)
    small_disk(2**26, "ro")
    assert runs.finish(workdir, **child.LOOP, keep=2) == 1
    said = runs.log(workdir)
    assert "Read-only file system" in said and "Traceback" not in said, said
    assert checkpoint.digest(workdir) == before

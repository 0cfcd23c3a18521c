"""Runs are killed, signalled and put on full disks for real, and lose nothing that was promised to be kept."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import child
import jax
import numpy as np
import pytest

from sora_jax import checkpoint

SEED = 20


def last_logged(workdir):
    """The last step of metrics.jsonl, of which the last line may be half there."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return max((line["step"] for line in map(json.loads, lines) if line["kind"] == "train"), default=0)


def unfinished(workdir):
    return list(workdir.glob("*.part*"))


def newest(workdir):
    return checkpoint.latest_step(workdir) or 0


def test_kill_at_any_moment(runs, straight, tmp_path, figures, times):
    """No kill costs more than the step that was not saved yet, and the state is that of a run that was left alone."""
    kills, rng, workdir = times(20, 300), random.Random(SEED), tmp_path / "run"
    saved, during_save = 0, 0
    for number in range(kills):
        process = runs.start(workdir, **child.LOOP, keep=2)
        # One life in six is too short for a step. Of the others each second ends while a checkpoint is written, read back,
        # sealed or deleted, the rest at any moment.
        short = number % 6 == 5
        with contextlib.suppress(TimeoutError):
            child.wait_for(lambda before=saved: newest(workdir) > before, rng.uniform(0, 2) if short else 60)
        if not short and number % 2:
            with contextlib.suppress(TimeoutError):
                child.wait_for(lambda: unfinished(workdir), 5, every=0.001)
            time.sleep(rng.uniform(0, 0.2))
        else:
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        if not workdir.exists():
            continue
        during_save += bool(unfinished(workdir))
        assert newest(workdir) >= saved
        if (workdir / "metrics.jsonl").exists():
            assert newest(workdir) >= last_logged(workdir) - 1
        for step in checkpoint.steps(workdir):
            assert not checkpoint.verify(workdir / str(step)).wrong
        saved = newest(workdir)
    assert saved > kills / 2 and during_save > kills / 10, runs.log(workdir)[-2000:]
    assert not checkpoint.changes(workdir / str(saved), straight(saved))
    assert "damaged" not in runs.log(workdir)
    figures("kill -9", kills=kills, of_them_during_saves=during_save, steps_saved=saved, most_steps_lost_by_one=1)


def sha256(step):
    """Of all that a step holds: every array, the loader's position and the counters."""
    state, home, number = hashlib.sha256(), step.parent, int(step.name)
    for item in sorted(checkpoint.describe(step).items):
        for path, array in sorted(named(checkpoint.restore_nested(home, item, number))):
            state.update(f"{item}/{path} {array.dtype} {array.shape} ".encode() + array.tobytes())
    meta = checkpoint.read_meta(home, number)
    state.update(json.dumps([number, meta["loader"], meta["total_flops"], meta["rollbacks"]], sort_keys=True).encode())
    return state.hexdigest()


def named(tree):
    return [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A VAE that came to its end, which is where it measures how latents are scaled."""
    folder = tmp_path_factory.mktemp("trained") / "vae"
    assert runs.finish(folder) == 0, runs.log(folder)
    return folder


@pytest.mark.parametrize("stage", ["vae", "dit", "captioner"])
def test_ten_steps_and_ten_more_are_twenty(runs, trained, tmp_path, figures, stage):
    """With packing, shuffling and a loader worker: to the bit on the same mesh, to 1e-6 on another."""
    of_run = {} if stage == "vae" else {"vae_checkpoint": trained, "loader.workers": 1}
    if stage == "dit":
        of_run |= {"loader.known.first_frames": 0.5}
    # A step more, before the end of which the run is killed, and nothing is evaluated.
    settings = {"stage": stage, "of_run": of_run, "steps": 21}
    at_once = runs.reach(20, tmp_path / "at once", **settings, save_every=20)
    halfway = runs.reach(10, tmp_path / "parted", **settings, save_every=10)
    elsewhere = shutil.copytree(
        halfway.parent, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("lock", "20", "*.part*")
    )
    parted = runs.reach(20, halfway.parent, **settings, save_every=10)
    assert "resumed from step 10" in runs.log(halfway.parent)
    assert sha256(parted) == sha256(at_once) != sha256(halfway)
    other = runs.reach(20, elsewhere, devices=2, **settings, save_every=10)
    assert "resumed from step 10" in runs.log(elsewhere)
    params = (checkpoint.restore_nested(step.parent, "params", 20) for step in (at_once, other))
    apart = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, params), strict=True))
    assert apart <= 1e-6
    figures(f"{stage}: 10 and 10 steps as 20", sha256_equal=True, on_two_devices_apart_at_most=f"{apart:.1e}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(runs, straight, tmp_path, figures, number, code):
    workdir = tmp_path / "run"
    process = runs.start(workdir, **child.LOOP | {"save_every": 0}, keep=2)
    child.wait_for(lambda: last_logged(workdir) >= 4)
    assert not newest(workdir)
    began = time.monotonic()
    os.kill(process.pid, number)
    process.join(60)
    seconds = time.monotonic() - began
    assert process.exitcode == code and seconds < 10
    assert newest(workdir) == last_logged(workdir)
    assert not checkpoint.changes(workdir, straight(newest(workdir)))
    figures(number.name, exit_code=code, seconds=round(seconds, 2))


def test_a_second_signal_exits_at_once(runs, tmp_path, figures):
    workdir = tmp_path / "run"
    process = runs.start(workdir, **child.LOOP | {"save_every": 0}, keep=2)
    child.wait_for(lambda: last_logged(workdir) >= 1)
    began = time.monotonic()
    # Two kinds, as two of one kind may come as one.
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    seconds = time.monotonic() - began
    assert process.exitcode in (130, 143) and seconds < 3
    assert not newest(workdir)  # the first alone would have saved
    figures("second signal", exit_code=process.exitcode, seconds=round(seconds, 2))


def test_a_second_run_in_the_same_folder_is_refused(runs, tmp_path, figures):
    workdir = tmp_path / "run"
    process = runs.start(workdir, **child.LOOP, keep=2)
    child.wait_for(lambda: newest(workdir) >= 1)
    assert runs.finish(workdir, **child.LOOP, keep=2) == 2
    (refusal,) = (line for line in runs.log(workdir).splitlines() if "error:" in line)
    assert str(process.pid) in refusal and socket.gethostname() in refusal
    before = newest(workdir)
    child.wait_for(lambda: newest(workdir) > before)  # the first goes on
    process.kill()
    process.join()
    figures("second writer", exit_code=2)


def test_numbers_that_are_none_never_reach_a_checkpoint(runs, tmp_path, figures):
    """A rate that no model survives: the run stops, and what it kept is finite."""
    workdir = tmp_path / "run"
    rates = {"optimizer.rate": 1e30, "optimizer.adam_rate": 1e30, "optimizer.warmup_steps": 1}
    assert runs.finish(workdir, of_run=rates, **child.LOOP, keep=2, max_bad_steps=3) == 1
    said = runs.log(workdir)
    assert "3 steps in a row" in said.splitlines()[-1] and "Traceback" not in said, said
    for step in checkpoint.steps(workdir):
        for item in checkpoint.describe(workdir / str(step)).items:
            if item in ("params", "ema"):
                assert all(
                    np.isfinite(array).all() for _, array in named(checkpoint.restore_nested(workdir, item, step))
                )
    figures("not finite", exit_code=1, steps_skipped=3)


def test_clips_that_are_damaged_while_a_run_is_away_are_counted_in_its_metrics(runs, tmp_path, figures):
    trained, workdir = tmp_path / "trained", tmp_path / "run"
    assert runs.finish(trained) == 0, runs.log(trained)
    of_run = {"vae_checkpoint": trained, "loader.patience": 0.0, "loader.skip_quota": 1.0}
    runs.reach(1, workdir, stage="dit", of_run=of_run, steps=4, save_every=1)
    (values,) = workdir.glob("**/latents-train-*/mean.npy")
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    assert runs.finish(workdir, "dit", of_run=of_run, **child.LOOP | {"steps": 4}, keep=1000) == 0, runs.log(workdir)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    damaged = sum(line.get("packing/damaged_clips", 0) for line in lines if line["kind"] == "train")
    assert damaged >= 1 and "is left out" in runs.log(workdir)
    figures("damaged clips", counted=int(damaged))


@pytest.fixture
def small_disk(tmp_path):
    """mount(size in bytes, *options) gives a small disk of its own, or the one there is anew."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(size, *options):
        again = ["remount"] if os.path.ismount(point) else []
        chosen = ",".join([*again, f"size={size}", *options])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", point], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this machine does not let us mount a disk ({done.stderr.strip()})")
        return point

    yield mount
    if os.path.ismount(point):
        subprocess.run(["umount", "-l", point], check=True)


def size_of(step):
    # A small disk gives whole pages.
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in step.rglob("*") if path.is_file())


def test_a_full_disk_keeps_the_last_good_checkpoint(runs, straight, small_disk, figures):
    """The run stops; once there is room, the same command goes on from where it was."""
    step = size_of(straight(3))
    workdir = small_disk(int(2.5 * step)) / "run"
    assert runs.finish(workdir, **child.LOOP, keep=3) == 1
    (*_, kept) = steps = checkpoint.steps(workdir)
    said = runs.log(workdir)
    last = said.splitlines()[-1]
    assert last.startswith(f"sora-jax train: error: step {kept + 1} could not be saved"), said
    assert f"step {kept} is the newest that is whole" in last
    assert not any(checkpoint.verify(workdir / str(step)).wrong for step in steps) and not unfinished(workdir)
    small_disk(20 * step)
    process = runs.start(workdir, **child.LOOP, keep=3)
    child.wait_for(lambda: newest(workdir) > kept)
    process.kill()
    process.join()
    assert not checkpoint.changes(workdir / str(kept + 1), straight(kept + 1))
    figures("full disk, max_failed_saves 0", exit_code=1, kept_step=kept, resumed_from=kept)


def test_a_run_goes_on_on_a_full_disk_until_there_is_room(runs, straight, small_disk, figures):
    step = size_of(straight(3))
    workdir = small_disk(int(2.5 * step)) / "run"
    process = runs.start(workdir, **child.LOOP | {"sample_every": 1}, keep=3, max_failed_saves=1000)
    child.wait_for(lambda: "going on (3 of 1000 times in a row)" in runs.log(workdir))
    kept = newest(workdir)
    assert kept and process.is_alive() and not checkpoint.verify(workdir / str(kept)).wrong
    small_disk(20 * step)
    child.wait_for(lambda: newest(workdir) > kept)
    process.terminate()
    process.join(60)
    last, failed = newest(workdir), runs.log(workdir).count("going on (")
    assert process.exitcode == 143 and last > kept + 3
    assert not checkpoint.changes(workdir, straight(last))
    figures("full disk, max_failed_saves 1000", kept_step=kept, saves_failed=failed, saved_after=last)


def test_a_read_only_disk_is_told(runs, straight, small_disk, figures):
    workdir = small_disk(2**26) / "run"
    shutil.copytree(straight(3), workdir / "3")
    before = checkpoint.digest(workdir)
    small_disk(2**26, "ro")
    assert runs.finish(workdir, **child.LOOP, keep=2) == 1
    said = runs.log(workdir)
    assert "Read-only file system" in said and "Traceback" not in said, said
    assert checkpoint.digest(workdir) == before and not checkpoint.verify(workdir).wrong
    figures("read-only disk", exit_code=1)

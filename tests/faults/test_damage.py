"""Checkpoints are damaged, bit by bit and file by file: every damage is found, and a run goes on from an older step."""

import functools
import random
import shutil

import child
import numpy as np
import pytest

from sora_jax import checkpoint

SEED = 21


@pytest.fixture
def copy(straight, tmp_path):
    """A step of a run that may be damaged, and the one it is a copy of."""
    return shutil.copytree(straight(3), tmp_path / "run" / "3"), straight(3)


def files_of(step):
    return sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())


@functools.cache
def whole(step):
    """What a restore of all that a step holds asks for."""
    items = {}
    for name, infos in checkpoint.describe(step).items.items():
        items[name] = {}
        for info in infos:
            *parents, last = info.path.split("/")
            node = items[name]
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = np.zeros(info.shape, info.dtype)
    return items


def is_found(step, source):
    """Whether a restore refuses the step as damaged. Whatever else it raises is an error of this test's."""
    try:
        checkpoint.restore(step.parent, whole(source))
    except checkpoint.CorruptCheckpointError:
        return True
    return False


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_is_found(copy, figures, times):
    tries, rng, (step, source) = times(100, 2000), random.Random(SEED), copy
    files = [path for path in files_of(step) if (step / path).stat().st_size]
    sizes = [(step / path).stat().st_size for path in files]
    assert not is_found(step, source)
    missed = []
    for number in range(tries):
        # Half of them anywhere, and half in any file, most of which are small.
        (path,) = rng.choices(files, sizes if number % 2 else None)
        content = (step / path).read_bytes()
        bit = rng.randrange(8 * len(content))
        (step / path).write_bytes(flipped(content, bit))
        if not is_found(step, source):
            missed.append(f"bit {bit} of {path}")
        (step / path).write_bytes(content)
    assert not missed
    assert not is_found(step, source)
    figures("flipped bits", tried=tries, found=tries - len(missed))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of another": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_that_is_not_whole_is_found(copy, figures, damage):
    (step, source), missed, tried = copy, [], 0
    for path in files_of(step):
        content = (step / path).read_bytes()
        DAMAGES[damage](step / path)
        if not (step / path).exists() or (step / path).read_bytes() != content:
            tried += 1
            if not is_found(step, source):
                missed.append(path)
        (step / path).write_bytes(content)
    assert not missed
    assert not is_found(step, source)
    figures(f"files {damage}", tried=tried, found=tried - len(missed))


def test_every_stray_file_is_found(copy, figures):
    (step, source), missed = copy, []
    folders = [step, *sorted(path for path in step.rglob("*") if path.is_dir())]
    for folder in folders:
        stray = folder / "stray"
        stray.touch()
        if not is_found(step, source):
            missed.append(stray)
        stray.unlink()
    assert not missed
    assert not is_found(step, source)
    figures("files stray", tried=len(folders), found=len(folders) - len(missed))


@pytest.mark.parametrize("where", ["values", "record", "stray"])
def test_a_run_goes_on_from_an_older_step(runs, straight, tmp_path, figures, where):
    workdir = tmp_path / "run"
    for number in (2, 3):
        shutil.copytree(straight(number), workdir / str(number))
    if where == "stray":
        (workdir / "3" / "params" / "stray").touch()
    else:
        name = "_CHECKPOINT_METADATA" if where == "record" else "ocdbt.process_0/d/*"
        path = max(workdir.glob(f"3/**/{name}"), key=lambda path: path.stat().st_size)
        path.write_bytes(flipped(path.read_bytes(), 4 * path.stat().st_size))
    damaged = (workdir / "3").stat().st_ino
    process = runs.start(workdir, **child.LOOP, keep=100)
    child.wait_for(lambda: (workdir / "4").exists())
    process.kill()
    process.join()
    assert f"{workdir}/3 is damaged" in (said := runs.log(workdir)) and "resumed from step 2" in said
    assert (workdir / "3.corrupt").stat().st_ino == damaged
    assert not checkpoint.verify(workdir / "3").wrong
    assert not checkpoint.changes(workdir / "3", straight(3))
    figures(f"a run whose newest step is damaged ({where})", resumed_from=2, set_aside="3.corrupt")

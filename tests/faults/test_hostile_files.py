"""Hostile files: whatever a file says, its reader gives back what was written or refuses it by its own error.

Files of every kind that the package reads are damaged at random, by a seed, and made by hand to do harm. They are read in a
process of its own with bounded memory, each within a bounded time; nothing may appear outside the folder of the file, and
what a pickle says may not happen.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
MEMORY = 2**30  # beyond what the process has once it has read one good file of each kind
SECONDS = 10.0  # of the processor for one file; a good one takes 0.3 at most
PATIENCE = 120.0  # of the clock


# The process that reads ----------------------------------------------------------------------------------------------


def digest(*values):
    """What tells one value from another: of arrays dtype, shape and bits, of containers their parts."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, dict):
            for key in sorted(value):
                found.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(b"[")
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()


def readers():
    """name -> (reader of a folder, its errors). A reader gives what it read, or None where files like it have no checks."""
    import argparse

    from sora_jax import checkpoint, checkpoint_text, config, disk, export
    from sora_jax.cli import asked, failures
    from sora_jax.data import latents
    from sora_jax.evaluate import i3d, torch_file
    from sora_jax.generate import pipeline
    from sora_jax.study import judgement, runner
    from sora_jax.text import encode
    from sora_jax.train import appended, lock, progress

    def store(folder):
        found = latents.LatentStore(folder)
        clips = [found[number] for number in range(len(found))]
        for clip in clips:
            assert clip.fps > 0 and clip.captions and all(isinstance(each, str) for each in clip.captions)
        return [(clip.mean_thwc.tobytes(), clip.std_thwc.tobytes()) for clip in clips]

    def metrics(folder):
        appended.mend(folder / "metrics.jsonl")
        progress.last_step(folder)
        for line in progress.read_metrics(folder, "train"):
            assert all(isinstance(value, int | float) for name, value in line.items() if name != "kind")

    def locked(folder):
        with lock.locked(folder):
            return None

    def stored_config(folder):
        run = config.from_stored(disk.read_json(folder / "config.json"))
        assert config.from_stored(json.loads(config.to_json(run))) == run

    def steps(folder):
        with contextlib.suppress(FileNotFoundError, checkpoint.CorruptCheckpointError):
            checkpoint_text.description(checkpoint.describe(folder))
            checkpoint.verify(folder)
        return {item: checkpoint.restore_nested(folder, item) for item in ("ema", "rest")}

    def weights(folder):
        step = export.import_weights(folder, folder / "back")
        return step, {item: checkpoint.restore_nested(folder / "back", item) for item in export.ITEMS}

    def claims(folder):
        """What a checkpoint with a right digest says of itself, as every verb reads it."""
        if isinstance(run := config.from_stored(checkpoint.read_meta(folder).get("config")), config.VAERun):
            pipeline.load_vae_config(folder)
        else:
            pipeline.load_run(folder)
        export.card({"meta": checkpoint.read_meta(folder), "step": 1, "source": ""}, 1, {}, "name")
        checkpoint_text.description(checkpoint.describe(folder), None)
        assert run == config.from_stored(config.to_dict(run))

    def legacy(folder):
        for array in torch_file.read_state_dict(folder / "net.pth").values():
            assert array.dtype == np.float32

    def kept(folder):
        found = judgement.read_kept(folder, "judged", {"checkpoint": "x"})
        return None if found is None else [video.tobytes() for video in found[1]]

    def prompts(folder):
        assert asked.prompts_of(argparse.Namespace(prompts_file=folder / "prompts.txt"))

    refused = (disk.FileError,)
    of_steps = (checkpoint.CorruptCheckpointError, FileNotFoundError, *refused)
    return {
        "torch zip": (lambda folder: torch_file.read_state_dict(folder / "net.pth"), refused),
        "torch legacy": (legacy, refused),
        "npz": (lambda folder: i3d._read(folder / "i3d.npz"), (FileNotFoundError, *refused)),
        "safetensors": (lambda folder: i3d._read(folder / "i3d.safetensors"), refused),
        "captions": (lambda folder: vars(encode.CaptionCache.load(folder / "captions.npz")), refused),
        "latents": (store, (FileNotFoundError, *refused)),
        "metrics": (metrics, ()),
        "lock": (locked, (config.ConfigError, *refused)),
        "seconds": (lambda folder: runner.Clock(folder / "seconds.json") and None, ()),
        "judged": (kept, ()),
        "config": (stored_config, (config.ConfigError, *refused)),
        "prompts": (prompts, (failures.Failure,)),
        "checkpoint": (steps, (*of_steps, ValueError)),
        "claims": (claims, (*of_steps, config.ConfigError, ValueError)),
        "export": (weights, refused),
    }


def virtual_memory():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve():
    """Reads the folders that stdin names, and tells of each on stdout; 'bound' bounds the memory from then on."""
    answers, sys.stdout = sys.stdout, sys.stderr
    known = readers()
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "bound":
            limit = virtual_memory() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            print(json.dumps({"limit": limit}), file=answers, flush=True)
            continue
        name, folder = asked
        read, errors = known[name]
        began = time.process_time()
        try:
            told = {"outcome": "read", "digest": digest(read(Path(folder)))}
        except errors as error:
            told = {"outcome": "refused", "error": f"{type(error).__name__}: {error}"}
        except BaseException as error:
            told = {"outcome": "broken", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        told["seconds"] = time.process_time() - began
        told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(told), file=answers, flush=True)


class Child:
    """The process that reads; one that dies is told of, and replaced for the next file."""

    def __init__(self, log):
        self.log, self.process = log, None

    def start(self):
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, what):
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.stop()
        return {"outcome": "broken", "error": f"the process ended with {code}", "seconds": 0.0, "peak": 0}

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None


# Good files ----------------------------------------------------------------------------------------------------------


class Harm:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """name -> a folder with a good file of its kind."""
    import safetensors.numpy
    import test_torch_file
    import tiny

    from sora_jax import checkpoint, config, export
    from sora_jax.data import latents
    from sora_jax.study import judgement
    from sora_jax.text import encode

    home = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    folders = {name: home / name.replace(" ", "_") for name in KINDS}
    for name, folder in folders.items():
        if name not in ("latents", "export"):
            folder.mkdir()
    test_torch_file.zip_file(folders["torch zip"] / "net.pth", test_torch_file.GOOD)
    test_torch_file.legacy_file(folders["torch legacy"] / "net.pth", test_torch_file.GOOD)
    arrays = {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "b": np.arange(5)}
    np.savez_compressed(folders["npz"] / "i3d.npz", **arrays)
    safetensors.numpy.save_file(arrays, folders["safetensors"] / "i3d.safetensors", {"made": "here"})
    captions = {caption: number for number, caption in enumerate(["", "a red ball", "a blue ball"])}
    states = rng.standard_normal((9, 6)).astype(np.float16)
    encode.CaptionCache("tiny", captions, states, np.array([0, 2, 5, 9])).save(folders["captions"] / "captions.npz")
    clips = [
        latents.Latent(
            number, *(rng.standard_normal((1 + number, 2, 2, 4)) for _ in range(2)), 8.0, ("a", f"b {number}")
        )
        for number in range(4)
    ]
    latents.write(folders["latents"], clips, {"made": "here"})
    lines = [{"kind": "train", "step": step, "loss": 0.5 / step, "packing/tokens": 8.0} for step in range(1, 9)]
    (folders["metrics"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folders["lock"] / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 12, "started": 3}))
    (folders["seconds"] / "seconds.json").write_text(json.dumps({"vae": 1.5, "report": 2.0}))
    videos = [rng.integers(0, 255, (2, 8, 8, 3)).astype(np.uint8) for _ in range(2)]
    judgement.write_kept(
        folders["judged"], "judged", {"checkpoint": "x"}, {"adherence": {"colour": 0.5, "count": 4.0}}, videos
    )
    (folders["config"] / "config.json").write_text(config.to_json(tiny.dit_run("vae")))
    (folders["prompts"] / "prompts.txt").write_text("a red circle moves left\na blue square grows\n")
    items = {
        item: {
            "blocks": {"kernel": rng.standard_normal((6, 8)).astype(np.float32), "bias": np.arange(5)},
            "scale": np.ones(3),
        }
        for item in export.ITEMS
    }
    meta = {
        "total_flops": 1e9,
        "flops_before": 0.0,
        "seconds": 2.0,
        "versions": {"jax": "1"},
        "loader": {"0": {"at": 3}},
    }
    run, vae = config.to_dict(tiny.dit_run("vae")), config.to_dict(tiny.vae_run())
    for step in (1, 2):
        checkpoint.save(folders["checkpoint"], step, items, meta | {"config": vae}, keep=2)
    checkpoint.save(folders["claims"], 1, items, meta | {"config": run, "vae": vae["vae"]}, keep=1)
    checkpoint.save(home / "source", 1, items, meta | {"config": vae}, keep=1)
    export.export_weights(home / "source", folders["export"])
    return folders


# How often each kind is damaged in the usual run: dearer ones less often.
KINDS = {
    "torch zip": 60,
    "torch legacy": 60,
    "npz": 60,
    "safetensors": 60,
    "captions": 60,
    "latents": 60,
    "metrics": 40,
    "lock": 40,
    "seconds": 30,
    "judged": 40,
    "config": 80,
    "prompts": 10,
    "checkpoint": 40,
    "claims": 60,
    "export": 40,
}


# Damage --------------------------------------------------------------------------------------------------------------


def flipped(rng, content):
    for _ in range(rng.integers(1, 5)):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return content


def cut(rng, content):
    return content[: rng.integers(len(content))]


def inserted(rng, content):
    place = int(rng.integers(len(content) + 1))
    return content[:place] + rng.bytes(int(rng.integers(1, 40))) + content[place:]


def removed(rng, content):
    place = int(rng.integers(len(content)))
    return content[:place] + content[place + int(rng.integers(1, 40)) :]


def swapped(rng, content):
    one, two, three = sorted(int(place) for place in rng.integers(0, len(content) + 1, 3))
    return content[:one] + content[two:three] + content[one:two] + content[three:]


def blown_up(rng, content):
    """An integer of a header becomes one at the edge of its type."""
    width = int(rng.choice([1, 2, 4, 8]))
    place = int(rng.integers(min(len(content), 4096)))
    value = [0, 2 ** (8 * width) - 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1)][rng.integers(4)]
    content[place : place + width] = value.to_bytes(width, "little")
    return content


TEXTS = [
    *(
        b"null",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"1e300",
        b"9" * 20,
        b"9" * 5000,
        b"true",
        b'""',
        b"[]",
        b"{}",
        b'{"a": 1}',
    ),
    *(b'"../../../evil"', b'"/dev/zero"', b'"\\u001b[2J"', b'"\\ud800"', b"[" * 200 + b"]" * 200, b"[" * 100_000),
    *(b"[1099511627776, 1099511627776]", b"18446744073709551616", b"1000000000000"),
]


def retold(rng, content):
    """A number, string or list of JSON or of a Python literal in the file becomes another."""
    places = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"\n]{0,200}"|\[[^\[\]]{0,200}\]|\([^()]{0,200}\)', content))
    if not places:
        return flipped(rng, content)
    place = places[rng.integers(len(places))]
    return content[: place.start()] + TEXTS[rng.integers(len(TEXTS))] + content[place.end() :]


DAMAGES = (flipped, cut, inserted, removed, swapped, blown_up, retold, retold)
VALUES = [
    *(
        None,
        True,
        -1,
        0,
        2**40,
        2**53 + 1,
        2**70,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../../../evil",
        "/evil",
        "\x1b[2J",
    ),
    *([], {}, [2**40] * 3, [-1, 4], ["../evil"], {"../evil": 1}, "y" * 100_000, [[[[]]]], [1e999], 10**400),
]


def changed(rng, tree):
    """A tree of JSON with one value or name changed, added or taken out, by itself perhaps a small matter."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.12:
        return VALUES[rng.integers(len(VALUES))]
    names = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    name = names[rng.integers(len(names))]
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    what = rng.random()
    if what < 0.08:
        del copy[name]
    elif what < 0.16 and isinstance(copy, dict):
        copy[["../../../evil", "", "evil", "a/../../b", "\x1b[2J"][rng.integers(5)]] = copy.pop(name)
    else:
        copy[name] = changed(rng, copy[name])
    return copy


def forge_step(rng, folder):
    """Changes the record of a checkpoint and gives it the digest that it then has."""
    path = max(folder.glob("[0-9]")) / "_CHECKPOINT_METADATA"
    told = json.loads(path.read_text())
    record = told["custom_metadata"]["sora_jax"]
    name = ["items", "meta"][rng.integers(2)]
    record = changed(rng, record) if rng.random() < 0.1 else record | {name: changed(rng, record[name])}
    sum_ = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    told["custom_metadata"] = {"sora_jax": record, "sha256": sum_}
    path.write_text(json.dumps(told))


def forge_weights(rng, folder):
    import safetensors.numpy

    path = folder / "model.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    told = json.dumps(changed(rng, json.loads(metadata["record"])))
    forged = metadata | {"record": told, "sha256": hashlib.sha256(told.encode()).hexdigest()}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, forged)


def forge_config(rng, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(changed(rng, json.loads(path.read_text()))))


# Of kinds with checks that anyone can make, how they are made.
FORGE = {"checkpoint": forge_step, "claims": forge_step, "export": forge_weights, "config": forge_config}
# Those whose checks find any damage, so that what is read is what was written. The others' values are right or wrong alike.
CHECKED = {"torch zip", "npz", "captions", "latents", "checkpoint", "export"}


def damage(rng, folder, kind):
    """Damages one file of a folder, twice perhaps; returns how."""
    if kind in FORGE and rng.random() < (0.9 if kind == "claims" else 0.5):
        FORGE[kind](rng, folder)
        return "forged"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if kind == "checkpoint":  # the newest step, of which the older is the spare
        files = [path for path in files if path.relative_to(folder).parts[0] == "2"]
    path, how = files[rng.integers(len(files))], []
    content = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 3)):
        if content:
            how.append(DAMAGES[rng.integers(len(DAMAGES))])
            content = bytearray(how[-1](rng, content))
    path.write_bytes(content)
    return f"{path.name} {' and '.join(each.__name__ for each in how)}"


class Trial:
    """Files that are read, what came of it, and whether all stayed in their folders."""

    def __init__(self, home, good):
        (home / "a" / "b").mkdir(parents=True)
        self.home, self.good, self.place = home, good, home / "a" / "b"
        self.witness, self.canary = home / "witness", home / "canary"
        self.canary.write_text('{"kind": "train", "step": 1}\nhalf a line')
        self.child, self.faults, self.counts = Child(home.parent / "stderr.txt"), [], {}
        self.whole = {name: self.child.ask([name, str(self.copy(name, name))]) for name in good}
        assert all(told["outcome"] == "read" for name, told in self.whole.items() if name != "lock"), self.whole
        self.base = max(told["peak"] for told in self.whole.values())
        self.child.ask("bound")
        self.slowest, self.peak = 0.0, self.base

    def copy(self, name, case):
        folder = self.place / case.replace(" ", "_")
        shutil.copytree(self.good[name], folder)
        return folder

    def read(self, name, folder, how, must_refuse=False):
        alive = self.child.process is not None
        told = self.child.ask([name, str(folder)])
        if not alive:
            self.child.ask("bound")
        count = self.counts.setdefault(name, {"tried": 0, "refused": 0})
        count["tried"] += 1
        count["refused"] += told["outcome"] == "refused"
        self.slowest, self.peak = max(self.slowest, told["seconds"]), max(self.peak, told["peak"])
        wrong = told["outcome"] == "broken" or told["seconds"] > SECONDS or (must_refuse and told["outcome"] == "read")
        if name in CHECKED and told["outcome"] == "read" and how != "forged":
            wrong |= told["digest"] != self.whole[name]["digest"]
        if not wrong and "error" in told:
            wrong = len(told["error"]) > 4000
        if outside := self.outside(folder):
            wrong, told["outside"] = True, outside
        if wrong:
            self.faults.append(f"{name}, {how} ({folder}): {told}")
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def outside(self, folder):
        """What is where nothing should be."""
        found = [path for path in self.home.iterdir() if path.name not in ("a", "canary")]
        found += [path for path in (self.home / "a").iterdir() if path.name != "b"]
        found += [path for path in self.place.iterdir() if path != folder and path not in self.kept]
        return [str(path) for path in found] + ["canary"] * (self.canary.read_text()[-4:] != "line")

    @property
    def kept(self):
        return {self.place / name.replace(" ", "_") for name in self.good} | {
            Path(line.partition("(")[2].partition(")")[0]) for line in self.faults
        }


@pytest.fixture(scope="module")
def trial(tmp_path_factory, good):
    trial = Trial(tmp_path_factory.mktemp("trial"), good)
    yield trial
    trial.child.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_as_written_or_refused(kind, trial, times, figures):
    tries = times(KINDS[kind], 10 * KINDS[kind])
    before = len(trial.faults)
    for number in range(tries):
        rng = np.random.default_rng((list(KINDS).index(kind), number))
        folder = trial.copy(kind, f"{kind} {number}")
        trial.read(kind, folder, damage(rng, folder, kind))
    figures(
        f"hostile files: {kind}",
        **trial.counts[kind],
        slowest_seconds=round(trial.slowest, 2),
        peak_megabytes=(trial.peak - trial.base) // 2**20,
    )
    assert not trial.faults[before:], "\n".join(trial.faults[before:][:5])
    if kind in CHECKED:
        assert trial.counts[kind]["refused"] > 0.2 * tries or kind == "checkpoint"


# Made to do harm -----------------------------------------------------------------------------------------------------


def npy(shape, dtype="<f4", content=b"", version=1):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + content


def zipped(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def claim_size(path, size):
    """Rewrites the unfolded size of the first entry, in both of its headers."""
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(mark) + place
        content[start : start + 4] = struct.pack("<I", size)
    path.write_bytes(content)


def object_array(witness):
    file = io.BytesIO()
    np.save(file, np.array([Harm(witness)], dtype=object), allow_pickle=True)
    return file.getvalue()


def tensors_header(entries):
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head


def rewrite_zarr(folder, **changes):
    """Lets an array of the newest step claim another shape, with all of the store's own checks right."""
    import tensorstore

    where = str(max(folder.glob("[0-9]")) / "ema") + "/"
    base = {"driver": "file", "path": where}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    told = json.loads(store[b"blocks.kernel/zarr.json"])
    if chunk := changes.pop("chunk", None):
        told["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    store[b"blocks.kernel/zarr.json"] = json.dumps(told | changes).encode()


def forge(folder, change):
    path = max(folder.glob("[0-9]")) / "_CHECKPOINT_METADATA"
    told = json.loads(path.read_text())
    record = told["custom_metadata"]["sora_jax"]
    change(record)
    told["custom_metadata"]["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(told))


def forge_record(folder, **changes):
    import safetensors.numpy

    path = folder / "model.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    told = json.dumps(json.loads(metadata["record"]) | changes)
    forged = metadata | {"record": told, "sha256": hashlib.sha256(told.encode()).hexdigest()}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, forged)


def metadata_of(folder):
    return max(folder.glob("[0-9]")) / "_CHECKPOINT_METADATA"


def sparse(path, size):
    path.touch()
    os.truncate(path, size)


def nested(path):
    path.write_bytes(b"[" * 1_000_000)


MANY = {f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(70_000)}
SHAPES = ("(1099511627776,)", "(2147483648, 2147483648, 2147483648)", "(-1,)", "(True,)", "(0, 99999999999999999999)")

# (kind, name) -> what is done to a good folder. All must be refused, but where the file is only a cache or a log.
HARM = {
    ("npz", "an archive that unfolds beyond its cap"): lambda f, w: claim_size(f / "i3d.npz", 2**31),
    ("npz", "an archive that unfolds beyond what it claims"): lambda f, w: (
        zipped(f / "i3d.npz", {"a.npy": npy("(8388608,)", "<f4", bytes(2**25))}),
        claim_size(f / "i3d.npz", 120),
    ),
    ("npz", "a pickled object"): lambda f, w: zipped(f / "i3d.npz", {"a.npy": object_array(w)}),
    ("npz", "an entry that leaves the folder"): lambda f, w: zipped(f / "i3d.npz", {"../../evil": b"evil"}),
    ("npz", "a compression that takes memory"): lambda f, w: zipped(
        f / "i3d.npz", {"a.npy": npy("(1,)")}, zipfile.ZIP_LZMA
    ),
    ("npz", "a hundred thousand entries"): lambda f, w: (f / "i3d.npz").write_bytes(
        b"PK\x01\x02" * 100_000 + b"PK\x05\x06" + bytes(18)
    ),
    **{
        ("npz", f"an array of {shape}"): lambda f, w, shape=shape: zipped(f / "i3d.npz", {"a.npy": npy(shape)})
        for shape in SHAPES
    },
    ("npz", "a header of nested brackets"): lambda f, w: zipped(f / "i3d.npz", {"a.npy": npy("(" * 9000)}),
    ("captions", "a pickled object"): lambda f, w: zipped(
        f / "captions.npz",
        dict.fromkeys([f"{name}.npy" for name in ("captions", "encoder", "states", "offsets")], object_array(w)),
    ),
    ("judged", "a pickled object"): lambda f, w: zipped(f / "judged.npz", {"video_0.npy": object_array(w)}),
    ("judged", "scores that nest"): lambda f, w: nested(f / "judged.json"),
    **{
        ("latents", f"{name} with a pickled object"): lambda f, w, name=name: (f / f"{name}.npy").write_bytes(
            object_array(w)
        )
        for name in ("mean", "std", "shapes", "fps", "ids", "caption_ids", "checks", "to_and_fro")
    },
    **{
        ("latents", f"shapes of {shape}"): lambda f, w, shape=shape: np.save(
            f / "shapes.npy", np.array([shape] * 4, np.int64)
        )
        for shape in ((2**21,) * 3, (-1, 2, 2), (2**62, 4, 1), (0, 0, 0), (1, 2))
    },
    ("latents", "values of a terabyte"): lambda f, w: (
        np.save(f / "shapes.npy", np.array([(2**20, 2**10, 2**8)] * 4, np.int64)),
        (f / "mean.npy").write_bytes(npy(f"({2**40}, 4)", "<f2")),
        (f / "std.npy").write_bytes(npy(f"({2**40}, 4)", "<f2")),
    ),
    ("latents", "an array of a terabyte"): lambda f, w: (f / "ids.npy").write_bytes(npy(f"({2**40},)", "<i8")),
    ("latents", "captions that nest"): lambda f, w: nested(f / "store.json"),
    ("torch zip", "a pickle that is a program"): lambda f, w: (f / "net.pth").write_bytes(
        pickle.dumps({"a": Harm(w)}, 2)
    ),
    ("torch zip", "a program in an archive"): lambda f, w: zipped(
        f / "net.pth", {"net/data.pkl": pickle.dumps({"a": Harm(w)}, 2)}, zipfile.ZIP_STORED
    ),
    ("torch zip", "more than is read"): lambda f, w: sparse(f / "net.pth", 2**40),
    ("safetensors", "a header of exabytes"): lambda f, w: (f / "i3d.safetensors").write_bytes(
        struct.pack("<Q", 2**62) + b"{}"
    ),
    ("safetensors", "a header of 99 megabytes"): lambda f, w: (f / "i3d.safetensors").write_bytes(
        struct.pack("<Q", 99_000_000) + b" " * 99_000_000
    ),
    ("safetensors", "seventy thousand tensors"): lambda f, w: (f / "i3d.safetensors").write_bytes(tensors_header(MANY)),
    ("safetensors", "a tensor of exabytes"): lambda f, w: (f / "i3d.safetensors").write_bytes(
        tensors_header({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}})
    ),
    ("checkpoint", "metadata without end"): lambda f, w: (
        shutil.rmtree(f / "1"),
        metadata_of(f).unlink(),
        os.symlink("/dev/zero", metadata_of(f)),
    ),
    **{
        ("checkpoint", f"{what} for {name}"): lambda f, w, name=name, make=make: (
            shutil.rmtree(f / "1"),
            (f / "2" / name).unlink(),
            make(f / "2" / name),
        )
        for what, make in {
            "what never ends": lambda path: os.symlink("/dev/zero", path),
            "a pipe": os.mkfifo,
            "gigabytes": lambda path: sparse(path, 2**36),
        }.items()
        for name in ("SHA256SUMS", "ema/_METADATA")
        if (what, name) != ("gigabytes", "ema/_METADATA")
    },
    ("checkpoint", "a link to everything"): lambda f, w: (
        shutil.rmtree(f / "1"),
        os.symlink("/", f / "2" / "ema" / "everything"),
    ),
    ("checkpoint", "metadata of gigabytes"): lambda f, w: (shutil.rmtree(f / "1"), sparse(metadata_of(f), 2**34)),
    ("checkpoint", "metadata that nests"): lambda f, w: (shutil.rmtree(f / "1"), nested(metadata_of(f))),
    ("checkpoint", "a tree that nests"): lambda f, w: (shutil.rmtree(f / "1"), nested(f / "2" / "ema" / "_METADATA")),
    ("checkpoint", "an array stored as of exabytes"): lambda f, w: (
        shutil.rmtree(f / "1"),
        rewrite_zarr(f, shape=[2**30, 2**30]),
    ),
    ("checkpoint", "a part of terabytes"): lambda f, w: (
        shutil.rmtree(f / "1"),
        rewrite_zarr(f, chunk=[6 * 2**20, 8 * 2**20]),
    ),
    **{
        ("checkpoint", f"a record with {name}"): lambda f, w, change=change: (shutil.rmtree(f / "1"), forge(f, change))
        for name, change in {
            "an array of exabytes": lambda record: record["items"]["ema"].update(
                {"blocks/kernel": ["float32", [2**30] * 2, 0, 0]}
            ),
            "an array of terabytes": lambda record: record["items"]["ema"].update(
                {"blocks/kernel": ["float32", [2**40], 0, 0]}
            ),
            "a shape below zero": lambda record: record["items"]["ema"].update({"scale": ["float64", [-3], 0, 0]}),
            "an object": lambda record: record["items"]["ema"].update({"scale": ["object", [3], 0, 0]}),
            "a path out of the folder": lambda record: record["items"]["ema"].update(
                {"../../x": ["float32", [3], 0, 0]}
            ),
            "no meta": lambda record: record.pop("meta"),
            "a million arrays": lambda record: record["items"].update(
                more={f"a{number}": ["int8", [], 0, 0] for number in range(200_000)}
            ),
        }.items()
    },
    **{
        ("export", f"a record of step {step!r}"): lambda f, w, step=step: forge_record(f, step=step)
        for step in ("../../../evil", "../evil", -1, 1.5, None, True, 2**70 * 1.0)
    },
    ("export", "a config of nothing"): lambda f, w: forge_record(f, meta={"config": {"task": "vae"}}),
    ("config", "a config that nests"): lambda f, w: nested(f / "config.json"),
    ("metrics", "a line without end"): lambda f, w: (f / "metrics.jsonl").write_bytes(b"9" * 2**24),
    ("metrics", "lines that nest"): lambda f, w: (f / "metrics.jsonl").write_bytes((b"[" * 100_000 + b"\n") * 20),
    ("metrics", "a file elsewhere in its place"): lambda f, w: (
        (f / "metrics.jsonl").unlink(),
        os.symlink(w.parent / "canary", f / "metrics.jsonl"),
    ),
    ("lock", "a lock without end"): lambda f, w: ((f / "lock").unlink(), os.symlink("/dev/zero", f / "lock")),
    ("lock", "a pipe for a lock"): lambda f, w: ((f / "lock").unlink(), os.mkfifo(f / "lock")),
    ("prompts", "prompts without end"): lambda f, w: (
        (f / "prompts.txt").unlink(),
        os.symlink("/dev/zero", f / "prompts.txt"),
    ),
    ("torch zip", "a pipe of weights"): lambda f, w: ((f / "net.pth").unlink(), os.mkfifo(f / "net.pth")),
    ("npz", "a pipe of arrays"): lambda f, w: ((f / "i3d.npz").unlink(), os.mkfifo(f / "i3d.npz")),
    **{
        ("latents", f"a pipe of {name}"): lambda f, w, name=name: ((f / name).unlink(), os.mkfifo(f / name))
        for name in ("shapes.npy", "mean.npy")
    },
}
# Read though damaged: a cache is made anew, and of a log what is left is read.
MADE_ANEW = {"judged", "metrics", "seconds"}


def test_files_made_to_do_harm_do_none(trial, figures):
    before = len(trial.faults)
    for number, ((kind, name), harm) in enumerate(HARM.items()):
        folder = trial.copy(kind, f"harm {number}")
        harm(folder, trial.witness)
        trial.read(kind, folder, name, must_refuse=kind not in MADE_ANEW)
    figures(
        "hostile files: made by hand",
        tried=len(HARM),
        slowest_seconds=round(trial.slowest, 2),
        peak_megabytes=(trial.peak - trial.base) // 2**20,
    )
    assert not trial.faults[before:], "\n".join(trial.faults[before:][:5])


def test_the_pickle_would_do_harm(tmp_path):
    """The same bytes in the loaders that the package does not use leave their mark, so that the test above tests something."""
    pickle.loads(pickle.dumps({"a": Harm(tmp_path / "one")}, 2))
    np.load(io.BytesIO(object_array(tmp_path / "two")), allow_pickle=True)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["config.json", "seconds.json", "judged.json", "metrics.jsonl"])
def test_what_is_written_replaces_a_link_and_does_not_follow_it(name, tmp_path):
    from sora_jax import disk
    from sora_jax.study import judgement, runner
    from sora_jax.train import appended

    victim = tmp_path / "victim"
    victim.write_text("{}\nhalf")
    (tmp_path / "work").mkdir()
    place = tmp_path / "work" / name
    place.symlink_to(victim)
    if name == "metrics.jsonl":
        file = appended.Appended(place, appended.mend(place))
        file.write(b"{}\n")
        file.close()
    elif name == "seconds.json":
        with runner.Clock(place).measure("x"):
            pass
    elif name == "judged.json":
        judgement.write_kept(place.parent, "judged", {}, {}, [])
    else:
        disk.write_atomically(place, b"{}")
    assert victim.read_text() == "{}\nhalf"


if __name__ == "__main__":
    serve()

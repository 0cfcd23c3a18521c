"""Laws of checkpoints: what comes back is what was saved, to the bit, or it is not handed out at all."""

import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax import checkpoint, checkpoint_text, processes, seal

META = {"config": {"model": {"width": 64, "patch": [1, 2, 2]}, "seed": 3}, "total_flops": 1.5e15, "loader": {"at": 7}}
TOOL = Path(__file__).parent.parent / "tools" / "inspect_checkpoint"


def make_params(seed: int = 0):
    kernel = jax.random.normal(jax.random.key(seed), (64, 128))
    return {"blocks": [{"kernel": kernel, "bias": jnp.arange(128, dtype=jnp.bfloat16)}], "scale": jnp.float32(seed)}


def make_items(seed: int = 0):
    params = make_params(seed)
    trained = {"blocks": True, "scale": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trained))
    opt_state = jax.tree.map(lambda x: x + 1, optimizer.init(params))
    return {"params": params, "ema": make_params(seed + 100), "opt_state": opt_state, "rest": {}}


def save(directory, step, items, keep=10, meta=META):
    checkpoint.save(directory, step, items, meta, keep=keep)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(array):
    return np.asarray(array).tobytes()


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b)), jax.tree_util.keystr(path)


def data_file(directory, step, item):
    """The file that holds the values of an item: the largest."""
    return max((Path(directory) / str(step) / item).rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.fixture
def unsealed(monkeypatch):
    """Steps are saved without a seal, as they were before there was one: fingerprints alone must do."""
    monkeypatch.setattr(seal, "possible", lambda root: False)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


# --- Round trip ---


def test_round_trip_is_exact_and_keeps_named_tuples(tmp_path):
    items = make_items()
    save(tmp_path, 7, items)
    restored = checkpoint.restore(tmp_path, abstract(items))
    assert restored.step == 7
    assert restored.meta == META
    assert_same(restored.items, items)
    assert isinstance(restored.items["opt_state"][1].inner_state[0], optax.ScaleByAdamState)


def test_round_trip_of_unusual_leaves(tmp_path):
    rng = np.random.default_rng(0)
    odd = {
        "nan with a payload": np.array([0x7FC12345, 0xFFFFFFFF, 0x80000000], np.uint32).view(np.float32),
        "int64": rng.integers(-(2**62), 2**62, (3, 5)),
        "float64": rng.normal(size=4),
        "bool": jnp.array([True, False, True]),
        "int8": jnp.arange(-3, 4, dtype=jnp.int8),
        "float8": jnp.linspace(-1, 1, 7).astype(jnp.float8_e4m3fn),
        "no values": (jnp.zeros((0, 3)), np.zeros((2, 0), np.int32)),
        "nothing": None,
        "empty": [{}, ()],
        "strided": rng.normal(size=(6, 4))[::2].T,
    }
    items = {"odd": odd, "bare": jnp.arange(5), "without arrays": {"a": None}}
    save(tmp_path, 0, items)
    restored = checkpoint.restore(tmp_path, items).items
    assert_same(restored, items)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(items), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)


def test_restores_onto_another_mesh(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    values = jax.random.normal(jax.random.key(0), (64, 128))
    save(tmp_path, 0, {"params": {"kernel": jax.device_put(values, rows)}})
    wanted = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=columns)
    restored = checkpoint.restore(tmp_path, {"params": {"kernel": wanted}}).items["params"]["kernel"]
    assert restored.sharding == columns
    assert bits(restored) == bits(values)

    odd = jax.ShapeDtypeStruct((63,), jnp.float32, sharding=rows)
    save(tmp_path, 1, {"params": {"kernel": jnp.zeros(63)}})
    with pytest.raises(ValueError, match=r"params/kernel: .*evenly divide"):
        checkpoint.restore(tmp_path, {"params": {"kernel": odd}})


def test_small_arrays_that_all_devices_hold_are_not_cut_up_by_programs(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put({"kernel": np.ones((64, 24), np.float32), "bias": np.ones(40, np.float32)}, everywhere)
    compiled = []

    def note(event, _, **said):
        if "backend_compile" in event:
            compiled.append(said)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        save(tmp_path, 1, {"params": params})
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(compiled) <= 2, compiled  # the fingerprints', where no test before has made them
    assert_same(checkpoint.restore_nested(tmp_path, "params", 1), jax.device_get(params))


def test_reads_only_what_is_asked_for(tmp_path):
    items = make_items()
    save(tmp_path, 0, items)
    for item in ("params", "opt_state"):
        shutil.rmtree(tmp_path / "0" / item)
    like = abstract({"ema": items["ema"], "rest": items["rest"]})
    assert_same(checkpoint.restore(tmp_path, like).items, {"ema": items["ema"], "rest": {}})


def test_restore_nested_needs_no_structure(tmp_path):
    items = make_items()
    save(tmp_path, 0, items)
    nested = checkpoint.restore_nested(tmp_path, "opt_state")
    adam = items["opt_state"][1].inner_state[0]
    kernel = nested["1"]["inner_state"]["0"]["mu"]["blocks"]["0"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    assert bits(kernel) == bits(adam.mu["blocks"][0]["kernel"])
    assert len(jax.tree.leaves(nested)) == len(jax.tree.leaves(items["opt_state"]))
    flip_bit(data_file(tmp_path, 0, "params"))
    with pytest.raises(checkpoint.CorruptCheckpointError, match=r"the file params/.* is not what was saved"):
        checkpoint.restore_nested(tmp_path, "params")


# --- Damage ---


@pytest.mark.parametrize("sealed", [True, False])
def test_flipped_bit_falls_back_to_the_older_step(tmp_path, caplog, request, sealed):
    if not sealed:
        request.getfixturevalue("unsealed")
    older, newer = make_items(1), make_items(2)
    save(tmp_path, 1, older)
    save(tmp_path, 2, newer)
    flip_bit(data_file(tmp_path, 2, "params"))
    with caplog.at_level(logging.WARNING):
        restored = checkpoint.restore(tmp_path, abstract(newer))
    assert restored.step == 1
    assert_same(restored.items, older)
    assert checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / "2.corrupt").is_dir()
    assert ("the file params/" if sealed else "params/blocks/0/kernel") in caplog.text
    assert "using step 1" in caplog.text
    # The run goes on and reaches the same step again, and the disk fails again.
    save(tmp_path, 2, newer)
    flip_bit(data_file(tmp_path, 2, "params"))
    assert checkpoint.restore(tmp_path, abstract(newer)).step == 1
    assert (tmp_path / "2.corrupt-2").is_dir()


def test_damage_without_an_older_good_step_is_an_error_and_moves_nothing(tmp_path):
    items = make_items()
    for step in (1, 2):
        save(tmp_path, step, items)
        flip_bit(data_file(tmp_path, step, "ema"))
    with pytest.raises(checkpoint.CorruptCheckpointError, match=r"(?s)step 2.*ema/.*step 1.*ema/"):
        checkpoint.restore(tmp_path, abstract(items))
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_step_asked_for_by_number_is_not_replaced(tmp_path):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)
    flip_bit(data_file(tmp_path, 2, "ema"))
    with pytest.raises(checkpoint.CorruptCheckpointError, match="ema/"):
        checkpoint.restore(tmp_path, abstract(items), step=2)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_of_several_processes_the_first_says_which_steps_there_are(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, {"params": make_params(step)})
    like = {"params": abstract(make_params())}
    assert checkpoint.restore(tmp_path, like).step == 2
    # Seals are joined, too; the second process, which this one is to be, sees a step more.
    monkeypatch.setattr(processes, "joined", lambda told: {"0": [1], "1": [1, 2]} if told == {"0": [1, 2]} else told)
    assert checkpoint.restore(tmp_path, like).step == 1


def test_damaged_record_falls_back(tmp_path):
    items = make_items()
    save(tmp_path, 1, items, meta={"at": 1})
    save(tmp_path, 2, items, meta={"at": 2})
    file = tmp_path / "2" / "_CHECKPOINT_METADATA"
    # Still JSON, but another model: without the digest this would be an error of the user's.
    file.write_text(file.read_text().replace('["float32", [64, 128]', '["float32", [64, 129]'))
    with pytest.raises(checkpoint.CorruptCheckpointError, match="digest"):
        checkpoint.read_meta(tmp_path, 2)
    assert checkpoint.read_meta(tmp_path) == {"at": 1}
    assert checkpoint.restore(tmp_path, abstract(items)).meta == {"at": 1}
    assert (tmp_path / "2.corrupt").is_dir()


@pytest.fixture
def settle():
    """Orbax leaves reads and coroutines behind when a file cannot be opened; let them end inside the test's filters."""
    yield
    time.sleep(0.1)
    gc.collect()


@pytest.mark.usefixtures("settle", "unsealed")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["values cut short", "no manifest", "no metadata", "no item", "tree not JSON"])
def test_missing_and_short_files_fall_back(tmp_path, damage):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)
    if damage == "values cut short":
        os.truncate(data_file(tmp_path, 2, "params"), 1000)
    elif damage == "no manifest":
        (tmp_path / "2" / "params" / "manifest.ocdbt").unlink()
    elif damage == "no metadata":
        (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    elif damage == "no item":
        shutil.rmtree(tmp_path / "2" / "params")
    elif damage == "tree not JSON":
        (tmp_path / "2" / "params" / "_METADATA").write_text('{"tree_metadata": {')
    restored = checkpoint.restore(tmp_path, abstract(items))
    assert restored.step == 1
    assert_same(restored.items, items)
    assert (tmp_path / "2.corrupt").is_dir()


@pytest.mark.parametrize("damage", ["seal gone", "seal changed", "file not of the step", "file gone", "file changed"])
def test_what_no_array_depends_on_is_sealed_too(tmp_path, damage):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)
    seal, idle = tmp_path / "2" / "SHA256SUMS", tmp_path / "2" / "ema" / "_sharding"
    if damage == "seal gone":
        seal.unlink()
    elif damage == "seal changed":
        seal.write_text(seal.read_text().replace("_METADATA", "_metadata", 1))
    elif damage == "file not of the step":
        (tmp_path / "2" / "ema" / "d" / "stray").touch()
    elif damage == "file gone":
        idle.unlink()
    elif damage == "file changed":
        idle.write_text(idle.read_text() + " ")
    assert len(checkpoint.verify(tmp_path / "2").wrong) == 1
    # What is read apart does not depend on the files of others.
    if damage.startswith("file"):
        assert_same(checkpoint.restore(tmp_path, {"params": items["params"]}, 2).items["params"], items["params"])
    assert checkpoint.restore(tmp_path, abstract(items)).step == 1 and (tmp_path / "2.corrupt").is_dir()


def test_the_seal_is_read_by_coreutils(tmp_path):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    save(tmp_path, 1, make_items())
    check = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "1", check=False).returncode == 0
    flip_bit(data_file(tmp_path, 1, "ema"))
    assert subprocess.run(check, cwd=tmp_path / "1", check=False, capture_output=True).returncode == 1


def test_a_file_that_cannot_be_read_costs_no_checkpoint(tmp_path, monkeypatch):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", fail)
    with pytest.raises(checkpoint.ReadError, match=r"2 cannot be read now .*Input/output error.*nothing was changed"):
        checkpoint.restore(tmp_path, abstract(items))
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "failure",
    [ValueError("RESOURCE_EXHAUSTED: out of memory"), PermissionError("no"), MemoryError(), OSError(5, "EIO")],
)
def test_trouble_that_is_not_the_files_costs_no_checkpoint(tmp_path, monkeypatch, failure):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)

    def fail(*_):
        raise KeyError("Failed to load checkpointable") from failure

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(checkpoint.ReadError, match=f"{type(failure).__name__}.*nothing was changed: free memory"):
        checkpoint.restore(tmp_path, abstract(items))
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "SHA256SUMS"])
def test_a_file_without_the_right_to_read_it_costs_no_checkpoint(tmp_path, monkeypatch, name):
    save(tmp_path, 1, make_items())
    save(tmp_path, 2, make_items())
    read = checkpoint.disk.read_bytes

    def refuse(path, *rest):
        if os.path.basename(path) == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *rest)

    monkeypatch.setattr(checkpoint.disk, "read_bytes", refuse)
    with pytest.raises(checkpoint.ReadError, match=r"Permission denied.*nothing was changed"):
        checkpoint.restore(tmp_path, abstract(make_items()))
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_bug_is_neither_damage_nor_trouble(tmp_path, monkeypatch):
    save(tmp_path, 1, make_items())
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", lambda *_: 1 + None)
    with pytest.raises(TypeError, match="unsupported operand"):
        checkpoint.restore(tmp_path, abstract(make_items()))
    assert checkpoint.steps(tmp_path) == [1]


# --- Requests that do not fit ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {**p, "scale": jnp.zeros(3)},
            r"params/scale: the checkpoint has float32\[\]; float32\[3\] is needed",
        ),
        (lambda p: {**p, "scale": jnp.int32(0)}, r"params/scale: the checkpoint has float32\[\]; int32\[\] is needed"),
        (lambda p: {**p, "shift": jnp.zeros(2)}, r"params/shift: not in the checkpoint; float32\[2\] is needed"),
        (lambda p: {"blocks": p["blocks"]}, r"params/scale: in the checkpoint \(float32\[\]\), but not wanted"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_a_request_that_does_not_fit_names_the_parameter(tmp_path, change, message):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 2, items)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.restore(tmp_path, {"params": change(items["params"])})
    assert not isinstance(caught.value, checkpoint.CorruptCheckpointError)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_what_is_not_there_is_said(tmp_path):
    items = make_items()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.restore(tmp_path / "none", items)
    with pytest.raises(FileNotFoundError, match="holds no steps"):
        checkpoint.restore(tmp_path, items)
    save(tmp_path / "checkpoints", 4, items)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*checkpoints"):
        checkpoint.describe(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no step 5 .* it holds 4"):
        checkpoint.restore(tmp_path / "checkpoints", items, step=5)
    with pytest.raises(ValueError, match="has no item vae; it holds ema, opt_state, params, rest"):
        checkpoint.restore(tmp_path / "checkpoints", {"vae": items["params"]})


@pytest.mark.parametrize(
    ("items", "meta", "message"),
    [
        ({"a": {"x": 3.0}}, {}, r"a/x: float is not an array"),
        ({"a": {"x": jax.eval_shape(lambda: jax.random.key(0))}}, {}, r"a/x: .*key_data"),
        ({"a": {"x": np.ones(2, complex)}}, {}, r"a/x: complex128 cannot be stored"),
        ({"a": {"x/y": np.ones(2), "x": {"y": np.ones(2)}}}, {}, r"a/x/y: two parameters"),
        ({"a": {"x.y": np.ones(2), "x": {"y": np.ones(2)}}}, {}, r"a: two parameters"),
        ({"a": {"x": np.ones(2), "x/y": np.ones(2)}}, {}, r"x/y: its parent 'x' is a parameter"),
        ({"a": {}}, {}, r"nothing to save"),
        ({"a": np.ones(2)}, {"loss": np.float32(1)}, r"meta must be JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, items, meta, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 0, items, meta=meta)
    assert list(tmp_path.iterdir()) == []


# --- Steps ---


def test_keeps_the_newest_and_never_overwrites(tmp_path):
    items = {"params": make_params()}
    assert checkpoint.latest_step(tmp_path / "none") is None
    assert not checkpoint.exists(tmp_path)
    for step in (1, 9, 10):
        save(tmp_path, step, items, keep=2)
    assert checkpoint.steps(tmp_path) == [9, 10]
    assert checkpoint.latest_step(tmp_path) == 10
    assert checkpoint.exists(tmp_path)
    with pytest.raises(ValueError, match="already holds step 10"):
        save(tmp_path, 10, items)
    save(tmp_path, 5, items, keep=1)  # went on from an old step: its own save stays
    assert checkpoint.steps(tmp_path) == [5, 10]


def test_a_killed_save_is_invisible_and_swept_up(tmp_path):
    save(tmp_path, 1, {"params": make_params()})
    killed = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", killed)
    assert checkpoint.latest_step(tmp_path) == 1
    save(tmp_path, 3, {"params": make_params()})
    assert not killed.exists()


def test_half_of_a_deleted_step_has_no_name(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, {"params": make_params()})

    def killed(path):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(checkpoint._root(tmp_path)), "rmtree", killed)
        save(tmp_path, 3, {"params": make_params()}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3] and (tmp_path / "1.part").exists()
    save(tmp_path, 4, {"params": make_params()}, keep=3)
    assert checkpoint.steps(tmp_path) == [2, 3, 4] and not (tmp_path / "1.part").exists()


# --- Look ---


def test_a_digest_tells_steps_by_what_they_hold(tmp_path):
    for directory, items, meta in (("a", make_items(), META), ("b", make_items(), META)):
        save(tmp_path / directory, 1, items, meta=meta)
    assert checkpoint.digest(tmp_path / "a") == checkpoint.digest(tmp_path / "b")
    save(tmp_path / "c", 1, make_items(1))
    save(tmp_path / "d", 1, make_items(), meta=META | {"total_flops": 1.0})
    found = {checkpoint.digest(tmp_path / directory) for directory in "acd"}
    assert len(found) == 3
    save(tmp_path / "a", 2, make_items(1))
    assert checkpoint.digest(tmp_path / "a") not in found - {checkpoint.digest(tmp_path / "c")}
    with pytest.raises(FileNotFoundError):
        checkpoint.digest(tmp_path / "nothing")


def test_verify_names_every_damaged_array_and_no_other(tmp_path):
    save(tmp_path, 1, make_items())
    assert checkpoint.verify(tmp_path) == (str(tmp_path / "1"), 11, True, ())
    flip_bit(data_file(tmp_path, 1, "ema"))
    flip_bit(data_file(tmp_path, 1, "params"))
    verified = checkpoint.verify(tmp_path / "1")
    files = [data_file(tmp_path, 1, item).relative_to(tmp_path / "1") for item in ("ema", "params")]
    assert [line.split(": ")[1].split(" is")[0] for line in verified.wrong] == [
        *(f"the file {file}" for file in files),
        "params/blocks/0/kernel",
        "ema/blocks/0/kernel",
    ]
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("{")
    assert "cannot be read" in checkpoint.verify(tmp_path).wrong[0]


# The first array that cannot be read ends the call, and the next finds orbax's event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_verify_reads_what_plain_orbax_wrote(tmp_path):
    tree = {"a": jnp.ones((300, 400)), "b": jnp.zeros(2)}
    checkpoint.ocp.save(tmp_path / "plain", tree)
    assert checkpoint.verify(tmp_path / "plain") == (str(tmp_path / "plain"), 2, False, ())
    for file in (tmp_path / "plain").rglob("d/*"):
        os.truncate(file, 5)
    assert len(checkpoint.verify(tmp_path / "plain").wrong) == 1


def test_verify_reads_in_parts(tmp_path, monkeypatch):
    read, parts = checkpoint._read_arrays, []
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 40_000)
    monkeypatch.setattr(checkpoint, "_read_arrays", lambda *given: parts.append(given[2]) or read(*given))
    save(tmp_path, 1, make_items())
    sizes = [[x.size * x.dtype.itemsize for flat in part.values() for x in flat.values()] for part in parts]
    assert sum(map(len, sizes)) == 11 and len(sizes) == 4 and max(map(sum, sizes)) <= 40_000


def test_a_step_that_is_not_read_back_as_it_was_costs_no_older_one(tmp_path, monkeypatch):
    items = make_items()
    save(tmp_path, 1, items)
    write = checkpoint.ocp.save_checkpointables

    def write_wrong(*arguments, **settings):
        write(*arguments, **settings)
        flip_bit(data_file(tmp_path, "2.part", "ema"))

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", write_wrong)
    with pytest.raises(checkpoint.SaveError, match=r"step 2 .*ema/blocks/0/kernel.*step 1 is the newest that is whole"):
        save(tmp_path, 2, items, keep=1)
    assert checkpoint.steps(tmp_path) == [1] and (tmp_path / "2.corrupt").is_dir()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("INTERNAL: Error writing file: Disk quota exceeded"),
        RuntimeError("INTERNAL: Error writing file: File too large"),
    ],
)
def test_a_quota_or_a_limit_costs_no_older_step(tmp_path, monkeypatch, failure):
    save(tmp_path, 1, make_items())

    def fail(*_, **__):
        raise ValueError("cannot save") from failure

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", fail)
    with pytest.raises(checkpoint.SaveError, match=r"step 2 could not be saved .*step 1 is the newest that is whole"):
        save(tmp_path, 2, make_items(), keep=1)
    assert checkpoint.steps(tmp_path) == [1] and not checkpoint.verify(tmp_path).wrong


def test_changes_are_told_by_norm_and_by_shape(tmp_path):
    one, other = make_items(), make_items()
    other["ema"]["blocks"][0]["kernel"] = 1.01 * one["ema"]["blocks"][0]["kernel"]
    other["params"]["scale"] = jnp.zeros(3)
    other["new"] = {"x": jnp.ones(2)}
    save(tmp_path / "a", 1, one)
    save(tmp_path / "b", 1, one)
    save(tmp_path / "c", 1, other)
    assert checkpoint.changes(tmp_path / "a", tmp_path / "b") == []
    found = {f"{change.item}/{change.path}": change for change in checkpoint.changes(tmp_path / "a", tmp_path / "c")}
    assert set(found) == {"ema/blocks/0/kernel", "params/scale", "new/x"}
    moved, was = found["ema/blocks/0/kernel"].norms
    assert moved / was == pytest.approx(0.01, rel=1e-4)
    table = checkpoint_text.changes(list(found.values()), depth=1)
    assert "1.00e-02" in table and "[] became [3]" in table and "only in the second" in table


def test_describe_reads_no_arrays(tmp_path):
    items = make_items()
    save(tmp_path, 1, items)
    save(tmp_path, 12, items)
    for file in (tmp_path / "12").rglob("d/*"):
        file.unlink()
    description = checkpoint.describe(tmp_path)
    assert description.step == 12
    assert description.steps == (1, 12)
    assert checkpoint.describe(tmp_path / "12") == description
    assert description.num_parameters("params") == sum(x.size for x in jax.tree.leaves(items["params"])) == 8321
    assert description.num_parameters() == sum(x.size for x in jax.tree.leaves(items))
    assert description.num_bytes() == sum(x.nbytes for x in jax.tree.leaves(items))
    assert checkpoint.ArrayInfo("blocks/0/kernel", (64, 128), "float32") in description.items["params"]
    assert description.items["rest"] == ()
    assert description.meta == checkpoint.read_meta(tmp_path) == checkpoint.read_meta(tmp_path, 1) == META


def test_format_description_sums_modules_and_aligns_columns(tmp_path):
    layers = {str(index): {"w": np.zeros((10, 10), np.float32), "b": np.zeros(10, np.int8)} for index in range(11)}
    save(tmp_path, 1, {"params": {"layers": layers, "scale": np.zeros((), np.float32)}})
    text = checkpoint_text.description(checkpoint.describe(tmp_path), depth=2)
    lines = text.splitlines()
    (layers_row,) = (line for line in lines if line.split()[:1] == ["layers"])
    assert layers_row.split() == ["layers", "1,210", "4.5", "kB"]
    assert [line.split() for line in lines if line.startswith("    9 ")] == [
        ["9", "2", "arrays", "float32,", "int8", "110", "410", "B"]
    ]
    assert text.index("\n    9 ") < text.index("\n    10 ")  # in order of number
    table = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split() == ["total", "1,211", "4.5", "kB"]
    assert "    model:\n      width: 64\n      patch: [1, 2, 2]\n    seed: 3" in text
    assert " w " not in text
    assert text.count("10 x 10") == 0
    assert checkpoint_text.description(checkpoint.describe(tmp_path), depth=None).count("10 x 10") == 11


def test_describes_how_arrays_lay_over_devices(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    lay = {"a/b": (("data", "fsdp"), None), "c": (None, "fsdp"), "d": ()}
    arrays = {
        name: jax.device_put(
            np.ones((8, 4), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        )
        for name, spec in lay.items()
    }
    save(tmp_path, 1, {"params": {"a": {"b": arrays["a/b"]}, "c": arrays["c"], "d": arrays["d"]}})
    description = checkpoint.describe(tmp_path)
    laid = {info.path: info.sharding for info in description.items["params"]}
    assert laid == {"a/b": "data 2 fsdp 4, -", "c": "-, fsdp 4", "d": ""}
    text = checkpoint_text.description(description)
    (row,) = (line for line in text.splitlines() if line.strip().startswith("c "))
    assert "sharding" in text and row.endswith("-, fsdp 4")
    (tmp_path / "1" / "params" / "_sharding").write_text('{"YQ==": "[[[", "b": 3}')
    assert {info.sharding for info in checkpoint.describe(tmp_path).items["params"]} == {""}


def test_a_link_in_place_of_a_file_is_damage_though_it_leads_to_the_same(tmp_path):
    save(tmp_path / "run", 1, make_items())
    file = data_file(tmp_path / "run", 1, "params")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert any(file.name in line for line in checkpoint.verify(tmp_path / "run").wrong)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="params"):
        checkpoint.restore(tmp_path / "run", abstract(make_items()))


def test_describes_what_older_orbax_wrote(tmp_path):
    import orbax.checkpoint as older

    with older.StandardCheckpointer() as writer:
        writer.save(tmp_path / "tree", {"a": {"b": jnp.ones((3, 4))}})
    description = checkpoint.describe(tmp_path / "tree")
    assert description.items == {"state": (checkpoint.ArrayInfo("a/b", (3, 4), "float32"),)}
    assert checkpoint.verify(tmp_path / "tree").wrong == ()
    # Still older ones wrote no file for the whole checkpoint.
    (tmp_path / "tree" / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    assert checkpoint.describe(tmp_path / "tree").items == description.items
    with older.CheckpointManager(tmp_path / "steps") as writer:
        writer.save(2, args=older.args.StandardSave({"a": jnp.ones(3)}))
    (found,) = checkpoint.describe(tmp_path / "steps").items.values()
    assert found == (checkpoint.ArrayInfo("a", (3,), "float32"),)


def test_describes_what_plain_orbax_wrote(tmp_path):
    tree = {"a": [jnp.ones((3, 4))], "b": jnp.zeros(2, jnp.bfloat16)}
    checkpoint.ocp.save(tmp_path / "plain", tree, custom_metadata={"by": "someone"})
    description = checkpoint.describe(tmp_path / "plain")
    assert description.items == {
        "state": (checkpoint.ArrayInfo("a/0", (3, 4), "float32"), checkpoint.ArrayInfo("b", (2,), "bfloat16"))
    }
    assert description.meta == {"by": "someone"}
    assert description.step is None
    checkpoint.ocp.save(tmp_path / "steps" / "3", tree)
    with pytest.raises(ValueError, match="not written by sora_jax"):
        checkpoint.restore(tmp_path / "steps", {"state": tree})


def test_inspect_checkpoint_shows_the_same_and_fails_with_one_sentence(tmp_path):
    save(tmp_path, 1, {"params": make_params()})
    shown = subprocess.run([sys.executable, TOOL, tmp_path, "--depth", "1"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == checkpoint_text.description(checkpoint.describe(tmp_path), depth=1) + "\n"
    missing = subprocess.run([sys.executable, TOOL, tmp_path / "none"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stdout == ""
    assert missing.stderr == f"inspect_checkpoint: no checkpoint: {tmp_path / 'none'} does not exist\n"
    assert os.access(TOOL, os.X_OK)


def test_the_record_is_where_orbax_keeps_custom_metadata(tmp_path):
    """The file is read directly, for speed and without a backend: this notices if orbax moves it."""
    save(tmp_path, 1, {"params": make_params()})
    theirs = checkpoint.ocp.checkpointables_metadata(tmp_path / "1").custom_metadata
    assert theirs["sora_jax"]["meta"] == json.loads(json.dumps(META)) == checkpoint.read_meta(tmp_path)

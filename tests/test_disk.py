"""Laws of files: what is written comes back, and any other content is a value or one kind of error."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sora_jax import disk

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5), inside, max_size=4),
    max_leaves=20,
)
NUMBERS = arrays.arrays(
    st.sampled_from(["float16", "float32", "int64", "uint8", "bool"]),
    arrays.array_shapes(min_dims=0, max_dims=4, max_side=5),
)


@given(JSON)
def test_json_comes_back(value):
    assert disk.parse_json(json.dumps(value).encode(), "here") == value


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_what_is_not_json_is_refused(content):
    try:
        value = disk.parse_json(content, "here")
    except disk.FileError as error:
        assert str(error).startswith("here ")
    else:
        assert value == json.loads(content.decode())


@pytest.mark.parametrize("depth", [1, disk.MAX_JSON_DEPTH - 1, disk.MAX_JSON_DEPTH, 900, 10**6])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(depth, ends):
    text = ends[0] * depth + "1" + ends[1] * depth
    if depth < disk.MAX_JSON_DEPTH:
        disk.parse_json(text, "here")
    else:
        with pytest.raises(disk.FileError, match="here"):
            disk.parse_json(text, "here")


def test_half_characters_are_refused():
    assert disk.parse_json(json.dumps("\U0001f600"), "here") == "\U0001f600"
    with pytest.raises(disk.FileError, match="cannot be read as JSON"):
        disk.parse_json('["\\ud83d"]', "here")


@given(NUMBERS, st.booleans())
def test_arrays_come_back(array, fortran):
    array = np.asfortranarray(array) if fortran else array
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "one.npy", array)
        np.savez_compressed(Path(folder) / "two.npz", a=array, b=array[..., None])
        one, two = disk.read_npy(Path(folder) / "one.npy"), disk.read_npz(Path(folder) / "two.npz", 2**20)
    for found in (one, two["a"], two["b"][..., 0]):
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
    assert list(two) == ["a", "b"]


@given(st.binary(max_size=200), st.integers(0, 200))
def test_what_is_no_array_is_refused(tail, kept):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.npy"
        np.save(path, np.arange(4.0))
        path.write_bytes(path.read_bytes()[:kept] + tail)
        if path.read_bytes()[128:] and kept >= 128 and path.stat().st_size == 160:
            assert disk.read_npy(path).shape == (4,)
        else:
            with pytest.raises(disk.FileError, match=r"one\.npy"):
                disk.read_npy(path)


def test_only_regular_files_within_the_cap_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert disk.read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(disk.FileError, match="has 5 bytes, and at most 4 are read; fetch it again"):
        disk.read_bytes(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "."):
        with pytest.raises(disk.FileError, match="no regular file"):
            disk.read_bytes(tmp_path / name, 2**20)
    with pytest.raises(FileNotFoundError):
        disk.read_bytes(tmp_path / "nothing", 5)


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    disk.write_atomically(path, b"one")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        disk.write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and list(path.parent.iterdir()) == [path]

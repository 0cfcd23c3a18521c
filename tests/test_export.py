"""Laws of export: what comes back is what went out, to the bit; what was changed on the way is found."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from sora_jax import checkpoint, config, export
from sora_jax.generate import pipeline
from sora_jax.train import loop, vae


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vae")
    loop.fit(vae.VAETask(tiny.vae_run(steps=1, log_every=1)), workdir)
    return workdir


@pytest.fixture
def exported(trained, tmp_path):
    export.export_weights(trained, tmp_path / "out")
    return tmp_path / "out"


def test_round_trip_to_the_bit(trained, exported, tmp_path):
    assert export.import_weights(exported, tmp_path / "back") == 1
    assert {change.item for change in checkpoint.changes(trained, tmp_path / "back")} == {
        "params",
        "opt_state",
        "guard",
    }
    before, after = pipeline.load_vae(trained), pipeline.load_vae(tmp_path / "back")
    assert before[0] == after[0]
    assert all(
        np.array_equal(a, b) for a, b in zip(*(np.asarray(list(flat(x[1:]))) for x in (before, after)), strict=True)
    )


def flat(tree):
    import jax

    return (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def test_every_dtype_and_shape_comes_back(tmp_path):
    item = {
        "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "nan": np.float32([np.nan, -0.0, np.inf]),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "deep": {"int": np.arange(4, dtype=np.int32), "bool": np.array([True, False])},
    }
    run = config.to_dict(tiny.vae_run())
    meta = {"config": run, "total_flops": 1.0, "versions": {}, "loader": {"secret": 1}}
    checkpoint.save(tmp_path / "one", 3, {"ema": item, "rest": {"x": jnp.ones(2)}}, meta, keep=1)
    export.export_weights(tmp_path / "one", tmp_path / "out")
    export.import_weights(tmp_path / "out", tmp_path / "two")
    assert not checkpoint.changes(tmp_path / "one", tmp_path / "two")
    back = checkpoint.restore_nested(tmp_path / "two", "ema")
    assert {name: x.dtype for name, x in back.items() if name != "deep"} == {
        n: x.dtype for n, x in item.items() if n != "deep"
    }
    assert back["nan"].tobytes() == item["nan"].tobytes() and back["empty"].shape == (0, 3)
    assert "loader" not in checkpoint.read_meta(tmp_path / "two")


def test_what_is_written(trained, exported):
    assert json.loads((exported / "config.json").read_text()) == checkpoint.read_meta(trained)["config"]
    card = (exported / "README.md").read_text()
    count = checkpoint.describe(trained).num_parameters("ema")
    assert card.startswith("---\nlicense: apache-2.0\n") and f"{count:,} parameters" in card
    assert checkpoint.digest(trained) in card
    with pytest.raises(export.ExportError, match="exists; choose another folder"):
        export.export_weights(trained, exported)


def test_any_flipped_bit_is_found(exported, tmp_path, rng):
    path = exported / export.WEIGHTS
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = [*rng.integers(0, 8 + header, 40), *rng.integers(8 + header, len(content), 40)]
    for number, place in enumerate(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(export.ExportError):
            export.import_weights(exported, tmp_path / f"back{number}")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_cut_file_is_found(exported, tmp_path, length):
    path = exported / export.WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(export.ExportError, match="not a whole safetensors file"):
        export.import_weights(exported, tmp_path / "back")


def test_a_foreign_file_and_a_taken_place_are_refused(trained, exported, tmp_path):
    import safetensors.numpy

    with pytest.raises(export.ExportError, match="holds a checkpoint"):
        export.import_weights(exported, trained)
    (tmp_path / "other").mkdir()
    with pytest.raises(export.ExportError, match="does not exist"):
        export.import_weights(tmp_path / "other", tmp_path / "back")
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "other" / export.WEIGHTS)
    with pytest.raises(export.ExportError, match="was not written by"):
        export.import_weights(tmp_path / "other", tmp_path / "back")

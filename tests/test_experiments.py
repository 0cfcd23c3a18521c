"""Every experiment builds with every argument it offers."""

import importlib
import json
from pathlib import Path

import dit as dit_experiment
import jax
import numpy as np
import pytest
import quickstart
from flax import nnx
from weights import needs_minilm

from sora_jax import config
from sora_jax.data import latents, loader, pack
from sora_jax.data.worlds import captions, world
from sora_jax.models import dit
from sora_jax.train import dit as train_dit

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "parts")


def arguments(name):
    return getattr(importlib.import_module(name), "ARGUMENTS", ("",))


@pytest.mark.parametrize(("name", "arg"), [(name, arg) for name in FILES for arg in arguments(name)])
def test_builds(name, arg):
    assert type(config.from_config_dict(importlib.import_module(name).get_config(arg))) in config.RUNS.values()


@pytest.mark.parametrize("name", FILES)
def test_unknown_arguments_are_told(name):
    with pytest.raises(ValueError, match="is none of"):
        importlib.import_module(name).get_config("no such thing")


def test_only_declarations():
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert "import jax" not in text and "sora_jax import" not in text


def test_the_table_names_every_experiment():
    table = (FOLDER / "README.md").read_text()
    for name in FILES:
        for arg in arguments(name):
            assert f"`{name}.py{':' + arg if arg else ''}`" in table, (name, arg)


def num_parameters(shape):
    shapes = nnx.state(nnx.eval_shape(lambda: dit.DiT(shape, nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("name", "millions"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_sizes_are_those_of_the_paper(name, millions):
    # The paper's counts, of models without cross-attention (4 D^2 a block) and our own inputs.
    shape = config.from_config_dict(dit_experiment.get_config(name)).dit
    cross = shape.blocks * 4 * shape.width**2
    assert (num_parameters(shape) - cross) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("0.7b", 0.65e9, 0.75e9), ("7b", 6.5e9, 7.5e9), ("30b", 28e9, 32e9)]
)
def test_clusters_are_as_large_as_they_say(name, least, most):
    assert least < num_parameters(config.from_config_dict(dit_experiment.get_config(name)).dit) < most


@needs_minilm
@pytest.mark.parametrize("rung", ["1x", "4x", "32x"])
def test_rungs_alone_are_those_of_the_study(rung):
    """Of the frontier that was measured, without the sweep that measured it."""
    of_study = json.loads((FOLDER / "results" / "scaling" / "report.json").read_text())["runs"][rung]
    run = train_dit.resolve(config.from_config_dict(dit_experiment.get_config(rung)))
    assert (run.dit.width, run.dit.blocks, run.loop.steps) == tuple(
        of_study[name] for name in ("width", "blocks", "steps")
    )


def test_the_quickstart_fills_its_rows(tmp_path):
    run = config.from_config_dict(quickstart.get_config("dit"))
    data, stride = run.data.world, (4, 8, 8)

    def made():
        for number in range(4 * run.pack.window):
            scene = world.sample_scene(data, "train", number)
            shape = (1 + (scene.num_frames - 1) // stride[0], scene.height // stride[1], scene.width // stride[2])
            zeros = np.zeros((*shape, 1), np.float32)
            yield latents.Latent(number, zeros, zeros, scene.fps, captions.captions(scene, len(data.sizes) > 1))

    def states(caption):  # as MiniLM counts these captions: a word is a token, and there are two more
        words = caption.replace(".", " .").replace(",", " ,").replace("-", " - ").split()
        return np.zeros((len(words) + 2, 1), np.float32), None

    store = latents.write(tmp_path / "latents", made(), {})
    tokeniser = loader.Tokeniser(run.loader, run.pack, pack.Geometry(run.dit.patch, stride), states, run.seed)
    source, count = loader.batches(store, tokeniser, 1), pack.Count()
    for _ in range(400 // run.pack.rows):
        count.add(next(source)[1])
    assert count.fill >= 0.97 and count.too_long_clips == 0

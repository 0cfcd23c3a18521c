"""Every experiment builds with every argument it offers."""

import importlib
from pathlib import Path

import pytest

from sora_jax import config

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

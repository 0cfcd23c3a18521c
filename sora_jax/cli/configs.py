"""From --config=FILE[:ARG] and --config.KEY=VALUE to a run."""

from __future__ import annotations

import contextlib
import difflib
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli.failures import Failure, errors_for_users
from sora_jax.cli.process import prepare_jax

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from sora_jax.config import Run


def load_run(source: str, overrides: Sequence[str]) -> Run:
    """The run of FILE[:ARG] with '--config.a.b=value' applied. Raises Failure."""
    tree = _load_config(source)
    _override(tree, overrides)
    prepare_jax()
    from sora_jax import config

    with errors_for_users():
        return config.from_config_dict(tree.to_dict())


def _load_config(source: str) -> ConfigDict:
    """What get_config returns. Raises Failure, which names the line, whatever is wrong with the file."""
    from ml_collections import ConfigDict

    name, colon, argument = source.partition(":")
    path = Path(name)
    if not path.is_file() or path.suffix != ".py":
        raise Failure(
            f"--config={source}: {name} is no Python file" if path.exists() else f"config file {name} does not exist"
        )
    with _siblings(path.resolve().parent) as folder:
        try:
            module = _execute(path.resolve())
            tree = module.get_config(*([argument] if colon else []))
        except Exception as error:
            if colon and isinstance(error, KeyError) and error.args == (argument,):
                raise Failure(f"config file {name} has no variant {argument!r}") from error
            raise Failure(f"config file {source} failed with {_told(error, folder)}") from error
    if not isinstance(tree, ConfigDict):
        raise Failure(f"config file {source}: get_config() must return a ConfigDict, not {type(tree).__name__}")
    return tree.lock()


def _execute(path: Path) -> Any:
    loader = importlib.machinery.SourceFileLoader("_sora_jax_config", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[Path]:
    """Lets a config import the files beside it, such as parts, and leaves the modules of this process as they were."""
    names = [path.stem for path in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
                del sys.modules[name]
        sys.modules.update(hidden)


def _told(error: Exception, folder: Path) -> str:
    """'NameError: name 'x' is not defined (parts.py, line 3)'; the line is the last one in the folder of the config."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)
    ]
    # A SyntaxError names its line itself.
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{'' if isinstance(error, SyntaxError) else where}"


def _override(tree: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets keys of the locked tree through ml_collections' flags. Raises Failure for an unknown key or a wrong type."""
    from absl import flags
    from ml_collections import config_flags

    current = {override: _value_at(tree, override) for override in overrides}
    # A FlagValues of its own: absl's global one belongs to whoever imports us.
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", tree, flag_values=values, sys_argv=["sora-jax", *overrides])
        values(["sora-jax", *overrides])
    except flags.IllegalFlagValueError as error:
        refused = next((override for override in overrides if str(error).startswith(f"flag {override}:")), None)
        if refused is None:
            raise Failure(str(error).removeprefix("flag ")) from error
        value = current[refused]
        raise Failure(
            f"{refused}: the value must be of type {type(value).__name__}, such as the file's {value!r}"
        ) from error
    except (flags.Error, LookupError, TypeError, ValueError, AttributeError) as error:
        # Only flags are read here, so whatever is wrong is wrong with them.
        raise Failure(f"{' '.join(overrides)}: {error}") from error


def _value_at(tree: ConfigDict, override: str) -> Any:
    """What the file says of the key of an override. Raises Failure if there is no such key."""
    from ml_collections import ConfigDict

    node, where = tree, "config"
    for key in override.split("=")[0].split(".")[1:]:
        if not isinstance(node, ConfigDict):
            raise Failure(f"{override}: {where} has no keys of its own, its value is {node!r}")
        if key not in node:
            near = difflib.get_close_matches(key, list(node), 1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(node)}"
            raise Failure(f"{override}: {where} has no key {key!r}; {hint}")
        node, where = node[key], f"{where}.{key}"
    if node is None:
        raise Failure(f"{override}: {where} is None in the file and can only be set there")
    if isinstance(node, ConfigDict):
        raise Failure(f"{override}: {where} is a group; set its keys, which are {', '.join(node)}")
    return node

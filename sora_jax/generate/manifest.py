"""The file beside every output that says how it was made, and from which the identical output can be made again.

A manifest holds the orders with their seeds, the checkpoint's fingerprint, the sampler's settings, the versions of what has a
part in the pixels, and the SHA-256 of every input file. One that is read is not trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_jax.generate.requests import Order, RequestError, from_mapping, parse_json, resolve_paths

# The first key of a manifest, by which one is told from other JSON; its value is the version that wrote it.
MARK = "sora_jax_sample"
MAX_FILE_BYTES = 2**24
MAX_ENTRIES = 100_000
# Pixels a pixel, a side.
MOST_SCALE = 1024
# Packages whose versions have a part in the pixels.
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "av")
_BLOCK = 2**20


class ManifestError(RequestError):
    """A manifest that cannot be read, or whose output cannot be made again; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """How files were made. orders have one sample each; inputs maps their paths to SHA-256; files are names beside the manifest.

    settings are the sampler's by name, and scale is how much pixels were enlarged, None as each video's width asks for.
    """

    version: str
    checkpoint: str
    step: int | None
    fingerprint: str
    orders: tuple[Order, ...]
    settings: Mapping[str, bool | int | float | str | list[float] | None]
    scale: int | None
    files: tuple[str, ...]
    inputs: Mapping[str, str]
    versions: Mapping[str, str]
    command: str = ""

    def to_json(self, folder: Path) -> dict[str, Any]:
        """As JSON that lies in `folder`: paths of inputs within it are written relative to it, so that it can be moved."""
        orders = [_map_paths(order, lambda path: _relative(path, folder)) for order in self.orders]
        return {
            MARK: self.version,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "fingerprint": self.fingerprint,
            "orders": [order.given() | {"seed": order.seed} for order in orders],
            "settings": dict(self.settings),
            "scale": self.scale,
            "files": list(self.files),
            "inputs": {_relative(path, folder): digest for path, digest in self.inputs.items()},
            "versions": dict(self.versions),
            "command": self.command,
        }


def versions(device: str) -> dict[str, str]:
    """The versions of Python, PACKAGES and, if it is there, of the text encoder's weights, and what it runs on."""
    from sora_jax.text.encode import MINILM_PACKAGE

    here = {"python": platform.python_version(), "machine": platform.machine(), "device": device}
    here |= {name: importlib.metadata.version(name) for name in PACKAGES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        here[MINILM_PACKAGE] = importlib.metadata.version(MINILM_PACKAGE)
    return here


def digests(orders: Sequence[Order]) -> dict[str, str]:
    """SHA-256 of every input file of orders, by its path. Raises ManifestError for one that cannot be read."""
    paths = {path for order in orders for several in order.paths().values() for path in several}
    return {path: _digest(Path(path), "name an image or a video") for path in sorted(paths)}


def _digest(path: Path, remedy: str) -> str:
    found = hashlib.sha256()
    try:
        if not path.is_file():
            raise ManifestError(f"{path} is not a file that is there; {remedy}")
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    return found.hexdigest()


def check_inputs(manifest: Manifest) -> None:
    """Raises ManifestError if an input is gone or is not what it was."""
    for path, digest in manifest.inputs.items():
        if _digest(Path(path), "put the input back, or change its path in the manifest") != digest:
            raise ManifestError(f"{path} is not the file that the manifest was written for; put that one back")


def check_fingerprint(manifest: Manifest, fingerprint: str) -> None:
    """Raises ManifestError for another checkpoint than the manifest's."""
    if manifest.fingerprint != fingerprint:
        raise ManifestError(
            f"the checkpoint has fingerprint {fingerprint[:16]}, but the manifest is of {manifest.fingerprint[:16]} "
            f"({manifest.checkpoint}, step {manifest.step}); give that one by --checkpoint"
        )


def differences(manifest: Manifest, version: str, here: Mapping[str, str]) -> list[str]:
    """A sentence for every version that is not the manifest's: the output may then differ in its last bits."""
    then, now = {"sora_jax": manifest.version, **manifest.versions}, {"sora_jax": version, **here}
    return [
        f"{name} is {now.get(name, 'not there')}, but the manifest was written with {then.get(name, 'none')}; pixels may differ"
        for name in sorted(then | now)
        if then.get(name) != now.get(name)
    ]


# Reading ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Manifest:
    """A manifest from its file; relative paths of inputs are taken from its folder. Raises ManifestError."""
    try:
        if not path.is_file():
            raise ManifestError(f"{path} is not a file that is there; name a manifest")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}; name a manifest that can be read") from error
    if len(content) > MAX_FILE_BYTES:
        raise ManifestError(
            f"{path} has more than {MAX_FILE_BYTES:,} bytes, as no manifest has; give the .json beside an output"
        )
    try:
        return _parsed(parse_json(content.decode("utf-8"), str(path)), path.absolute().parent)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text, so no manifest; give the .json beside an output") from error
    except RequestError as error:
        message = str(error)
        raise ManifestError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _parsed(tree: Any, folder: Path) -> Manifest:
    if not isinstance(tree, dict) or MARK not in tree:
        raise ManifestError(f"this is no manifest, which begins with {MARK!r}; give the .json beside an output")
    names = {MARK: "version"} | {field.name: field.name for field in dataclasses.fields(Manifest)}
    del names["version"]
    if strange := sorted(set(tree) - set(names)):
        raise ManifestError(
            f"{strange[0][:64]!r} is no key of a manifest; give it as it was written, or use the version that wrote it"
        )
    if missing := [name for name in names if name not in tree]:
        raise ManifestError(
            f"{missing[0]!r} is missing in the manifest; give it as it was written, or use the version that wrote it"
        )
    for name, (words, holds) in _CHECKS.items():
        if not holds(tree[name]):
            raise ManifestError(f"{name} must be {words}, so the manifest was changed; give it as it was written")
    values = {names[name]: value for name, value in tree.items()}
    values["orders"] = tuple(_order(number, given, folder) for number, given in enumerate(tree["orders"], 1))
    values["files"] = tuple(tree["files"])
    values["inputs"] = {str(folder / path): digest for path, digest in tree["inputs"].items()}
    used = {path for order in values["orders"] for several in order.paths().values() for path in several}
    if used != set(values["inputs"]):
        raise ManifestError(
            "inputs are not those of the orders, so the manifest was changed; give it as it was written"
        )
    return Manifest(**values)


def _order(number: int, given: Any, folder: Path) -> Order:
    try:
        return resolve_paths(from_mapping(given), folder)
    except RequestError as error:
        raise ManifestError(f"order {number}: {error}") from error


def _text(longest: int) -> tuple[str, Callable[[Any], bool]]:
    return f"text of up to {longest} characters", lambda value: isinstance(value, str) and len(value) <= longest


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) and len(each) <= 256 for each in value.values())


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(each, int | float) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _plain(name: Any) -> bool:
    """A file's name without a folder: a manifest must not choose where things are written."""
    return isinstance(name, str) and 0 < len(name) <= 255 and name not in (".", "..") and not set(name) & set("/\\\0")


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    MARK: _text(64),
    "checkpoint": _text(4096),
    "step": ("a whole number, or null", lambda value: value is None or _whole(value, 0, 10**12)),
    "fingerprint": _text(256),
    "orders": ("a list of orders", lambda value: isinstance(value, list) and 0 < len(value) <= MAX_ENTRIES),
    "settings": (
        "up to 64 settings with plain values",
        lambda value: (
            isinstance(value, dict) and len(value) <= 64 and all(_is_setting(each) for each in value.values())
        ),
    ),
    "scale": (
        f"a whole number from 1 to {MOST_SCALE}, or null",
        lambda value: value is None or _whole(value, 1, MOST_SCALE),
    ),
    "files": ("a list of file names", lambda value: isinstance(value, list) and all(map(_plain, value))),
    "inputs": (
        "paths with SHA-256",
        lambda value: _texts(value) and all(re.fullmatch("[0-9a-f]{64}", each) for each in value.values()),
    ),
    "versions": ("up to 64 names with versions", lambda value: _texts(value) and len(value) <= 64),
    "command": _text(2**20),
}


def _relative(path: str, folder: Path) -> str:
    absolute = Path(path).absolute()
    return str(absolute.relative_to(folder.absolute())) if absolute.is_relative_to(folder.absolute()) else str(absolute)


def _map_paths(order: Order, turn: Callable[[str], str]) -> Order:
    turned = {
        name: tuple(map(turn, paths)) if isinstance(getattr(order, name), tuple) else turn(paths[0])
        for name, paths in order.paths().items()
    }
    return dataclasses.replace(order, **turned)  # type: ignore[arg-type]

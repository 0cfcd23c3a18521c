"""What a user asks for: orders, from flags or from a request file, checked before anything is loaded.

An Order is JSON-able. At most one of its modes says what the video is made from; every mode becomes a canvas (canvas.py), so
none has a model of its own. Request files are JSON (a list, or one order), JSON lines or YAML, and are not trusted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sora_jax.generate import media

MODES = ("image", "extend", "connect", "loop", "edit", "inpaint", "outpaint", "interpolate")
DIRECTIONS = ("forward", "backward")
# Seeds are int32 on the device.
MAX_SEED = 2**31 - 1
MAX_FILE_BYTES = 2**20
MAX_ORDERS = 1000
MAX_SAMPLES = 1000


class RequestError(ValueError):
    """An order that cannot be made; the message is one sentence that names the key and a remedy."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Pixels, frames and frames a second of a video."""

    height: int
    width: int
    frames: int
    fps: float

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}" + f" at {self.fps:g} fps" * (self.frames > 1)


@dataclasses.dataclass(frozen=True)
class Order:
    """A video to make; None stands for a default. Raises RequestError for what cannot be meant.

    frames (or seconds) is how much is made: of the whole video from text or an image, of what is added by extend, connect and
    loop of a file. height and width are those of the result. Modes, at most one, each with the path of a file:

      image        the first frame
      extend       a video that goes on, forward or backward (direction)
      connect      two videos, and what happens between them
      loop         a video that is led back to its start; true: one that is first made from the prompt, of which
                   the way back knows nothing
      edit         a video that is made anew from noise of this strength, 0 (as it is) to 1 (nothing of it); with a mask, where
                   that is white
      inpaint      a video or image of which a mask's white part is made anew
      outpaint     a video or image that is continued by left, right, top, bottom pixels
      interpolate  a video with `factor` times as many frames, at the strength

    start and end (seconds) take a part of that video; fit says how inputs come to the size; draft makes the video first at this
    share of its size, and then in full from the enlarged draft at the strength. window is how many frames are made at once,
    samples the number of variations, of seeds seed, seed + 1, ...; known_guidance is how much to insist on what is given,
    in every window.
    """

    prompt: str = ""
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    seed: int = 0
    samples: int = 1
    image: str | None = None
    extend: str | None = None
    direction: str | None = None
    connect: tuple[str, str] | None = None
    loop: str | bool | None = None
    edit: str | None = None
    strength: float | None = None
    inpaint: str | None = None
    mask: str | None = None
    outpaint: str | None = None
    left: int | None = None
    right: int | None = None
    top: int | None = None
    bottom: int | None = None
    interpolate: str | None = None
    factor: int | None = None
    draft: float | None = None
    fit: str | None = None
    start: float | None = None
    end: float | None = None
    window: int | None = None
    known_guidance: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                object.__setattr__(self, field.name, _checked(field.name, value, _CHECKS[field.name]))
        _check_modes(self)

    @property
    def mode(self) -> str:
        """'text', or the one mode that is set."""
        return next((name for name in MODES if getattr(self, name) is not None), "text")

    def given(self) -> dict[str, Any]:
        """What was set, as JSON: the fields that are not at their defaults."""
        values = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v, default in values if v != default}

    def paths(self) -> dict[str, tuple[str, ...]]:
        """The input files by key."""
        found = {name: getattr(self, name) for name in _PATHS}
        return {
            name: value if isinstance(value, tuple) else (value,)
            for name, value in found.items()
            if value is not None and value is not True
        }

    def in_short(self) -> str:
        """What tells it from others, in less than a line."""
        return _brief(self.given())

    def variations(self) -> list[Order]:
        """One order a sample, with seeds seed, seed + 1, ..."""
        return [dataclasses.replace(self, seed=self.seed + number, samples=1) for number in range(self.samples)]


# Checks -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Check:
    """What a value must be, in words, and whether it is; turned brings it to the field's type."""

    words: str
    holds: Callable[[Any], bool]
    turned: Callable[[Any], Any] = lambda value: value


def _brief(value: Any) -> str:
    """What came, in less than a line: it may be of any size and depth."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict = 2, 3, 2
    return shown.repr(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    # Halves of characters, which JSON can escape, have no bytes.
    return isinstance(value, str) and len(value) <= 10_000 and _is_unicode(value)


def _is_unicode(value: str) -> bool:
    return value.encode(errors="replace").decode() == value


def _is_path(value: Any) -> bool:
    # A manifest, which is UTF-8, names it.
    return isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value and _is_unicode(value)


def _whole(low: int, high: int) -> _Check:
    return _Check(f"a whole number from {low} to {high}", lambda value: _is_int(value) and low <= value <= high)


def _number(low: float, high: float, open_low: bool = False) -> _Check:
    def holds(value: Any) -> bool:
        real = _is_int(value) or (isinstance(value, float) and math.isfinite(value))
        return real and (low < value if open_low else low <= value) and value <= high

    return _Check(f"a number {'above' if open_low else 'from'} {low:g} to {high:g}", holds, float)


def _one_of(names: Iterable[str]) -> _Check:
    names = tuple(names)
    return _Check(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


_PIXELS = _whole(1, 2**14)
_BORDER = _whole(0, 2**14)
_PATH = _Check("the path of a file as text, in UTF-8", _is_path)
_CHECKS: dict[str, _Check] = {
    "prompt": _Check("text of up to 10000 characters", _is_text),
    "height": _PIXELS,
    "width": _PIXELS,
    "frames": _whole(1, 10**6),
    "seconds": _number(0, 10**5, open_low=True),
    "fps": _number(0.01, 1000),
    "seed": _whole(0, MAX_SEED),
    "samples": _whole(1, MAX_SAMPLES),
    "image": _PATH,
    "extend": _PATH,
    "direction": _one_of(DIRECTIONS),
    "connect": _Check(
        "a list of the paths of two files as text, in UTF-8",
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_path, value)),
        tuple,
    ),
    "loop": _Check("the path of a file as text, in UTF-8, or true", lambda value: value is True or _is_path(value)),
    "edit": _PATH,
    "strength": _number(0, 1),
    "inpaint": _PATH,
    "mask": _PATH,
    "outpaint": _PATH,
    "left": _BORDER,
    "right": _BORDER,
    "top": _BORDER,
    "bottom": _BORDER,
    "interpolate": _PATH,
    "factor": _whole(2, 16),
    "draft": _Check("a number between 0 and 1", lambda value: isinstance(value, float) and 0 < value < 1),
    "fit": _one_of(media.HOW),
    "start": _number(0, 10**5),
    "end": _number(0, 10**5, open_low=True),
    "window": _whole(1, 10**6),
    "known_guidance": _number(0, 1000),
}
_PATHS = (*MODES, "mask")
_BORDERS = ("left", "right", "top", "bottom")

# Keys that mean something only beside one of these.
_ONLY_WITH = {
    "direction": ("extend",),
    "strength": ("edit", "interpolate", "draft"),
    "mask": ("inpaint", "edit"),
    "factor": ("interpolate",),
    "fit": MODES,
    "start": ("extend", "loop", "edit", "inpaint", "outpaint", "interpolate"),
    "end": ("extend", "loop", "edit", "inpaint", "outpaint", "interpolate"),
    "known_guidance": MODES,
} | {name: ("outpaint",) for name in _BORDERS}
# How much is made is the file's to say.
_NO_FRAMES = ("edit", "inpaint", "outpaint", "interpolate")


def _checked(name: str, value: Any, check: _Check) -> Any:
    if not check.holds(value):
        raise RequestError(f"{name} is {_brief(value)}; it must be {check.words}")
    return check.turned(value)


def _check_modes(order: Order) -> None:
    """Raises RequestError for keys that do not go together."""
    modes = [name for name in MODES if getattr(order, name) is not None]
    if len(modes) > 1:
        raise RequestError(f"{' and '.join(modes)} are ways to make one video; use one of them an order")
    for name, owners in _ONLY_WITH.items():
        if getattr(order, name) is not None and all(getattr(order, owner) is None for owner in owners):
            raise RequestError(f"{name} goes with {' or '.join(owners)}; give one of them, or leave it out")
    if order.mode == "text" and not order.prompt.strip():
        raise RequestError("prompt is empty; say what to show, or give one of " + ", ".join(MODES))
    if order.loop is True and not order.prompt.strip():
        raise RequestError("loop is true, but prompt is empty; say what to show, or give loop the path of a video")
    if order.loop is True and any(getattr(order, name) is not None for name in ("fit", "start", "end")):
        raise RequestError("fit, start and end are for files, but loop is true; leave them out")
    if order.frames is not None and order.seconds is not None:
        raise RequestError("frames and seconds both say how long; give one of them")
    if order.mode in _NO_FRAMES and (order.frames or order.seconds):
        raise RequestError(f"{order.mode} keeps the length of its video; leave frames and seconds out, or use extend")
    if order.inpaint is not None and order.mask is None:
        raise RequestError("inpaint needs a mask; give mask an image or video that is white where to make anew")
    if order.outpaint is not None and not any(getattr(order, name) for name in _BORDERS):
        raise RequestError("outpaint needs pixels to add; give left, right, top or bottom")
    if order.draft is not None and order.mode in ("edit", "interpolate"):
        raise RequestError(f"{order.mode} begins from a whole video, which is its draft; leave draft out")
    if order.start is not None and order.end is not None and order.start >= order.end:
        raise RequestError(f"start {order.start:g} is not before end {order.end:g}; give a part with some length")
    if order.seed + order.samples - 1 > MAX_SEED:
        raise RequestError(
            f"seed {order.seed} with samples {order.samples} goes beyond {MAX_SEED}; choose a smaller seed"
        )


def from_mapping(given: Any) -> Order:
    """The order of a mapping of keys to JSON values. Raises RequestError, for an unknown key with the nearest known one."""
    if not isinstance(given, Mapping):
        raise RequestError(f"an order is a mapping of keys, such as prompt, but this is {_brief(given)}")
    known = [field.name for field in dataclasses.fields(Order)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:64], known, 1)
            raise RequestError(
                f"{_brief(key)} is no key of an order; "
                + (f"did you mean {near[0]}?" if near else f"they are {', '.join(known)}")
            )
        if given[key] is None:
            raise RequestError(f"{key} is empty; give it a value or leave it out")
    return Order(**{name: _checked(name, value, _CHECKS[name]) for name, value in given.items()})


def resolve_paths(order: Order, folder: Path) -> Order:
    """The order with its relative input paths taken from a folder."""

    if not order.paths():
        return order

    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        return value if value is None or value is True else str(folder / value)

    return dataclasses.replace(order, **{name: resolved(getattr(order, name)) for name in _PATHS})


# Request files ------------------------------------------------------------------------------------------------------


def read_orders(path: Path) -> list[Order]:
    """The orders of a .json, .jsonl, .yaml or .yml file; relative paths in it are taken from its folder.

    Raises RequestError, which names the line or entry and the key.
    """
    if path.suffix not in _PARSERS:
        raise RequestError(f"{path}: a request file ends in one of {', '.join(_PARSERS)}")
    text = _text(path)
    orders: list[Order] = []
    for where, given in _PARSERS[path.suffix](path, text):
        if len(orders) == MAX_ORDERS:
            raise RequestError(f"{path} holds more than {MAX_ORDERS} orders; split it")
        try:
            orders.append(resolve_paths(from_mapping(given), path.absolute().parent))
        except RequestError as error:
            raise RequestError(f"{path}, {where}: {error}") from error
    if not orders:
        raise RequestError(f"{path} holds no order; write one, such as {{'prompt': 'a red circle moves left'}}")
    return orders


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise RequestError(f"{path} is not a file that is there; name a request file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise RequestError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; split it")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; name a request file that can be read") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text; save it as such") from error


Entries = Iterator[tuple[str, Any]]


def _entries(tree: Any) -> Entries:
    for number, given in enumerate(tree if isinstance(tree, list) else [tree], 1):
        yield f"entry {number}", given


def _json(path: Path, text: str) -> Entries:
    return _entries(parse_json(text, str(path)))


def _json_lines(path: Path, text: str) -> Entries:
    # Not splitlines, which also breaks at characters that may stand in a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parse_json(line, f"{path}, line {number}")


def _yaml(path: Path, text: str) -> Entries:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_repeated_keys(path, node)
        return _entries([] if node is None else loader.construct_document(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise RequestError(f"{path}{line}: this is no YAML, mend it there: {problem}") from error
    except (RecursionError, ValueError) as error:  # ValueError: dates that do not exist
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: this is no YAML of orders: {_brief(str(error))}") from error


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    """YAML takes the last of repeated keys silently. Looks at orders only, as what is below is refused anyway."""
    for order in getattr(node, "value", []) if getattr(node, "id", "") == "sequence" else [node]:
        if getattr(order, "id", "") == "mapping":
            keys = [str(key.value) for key, _ in order.value]
            if repeated := sorted({key for key in keys if keys.count(key) > 1}):
                line = order.start_mark.line + 1
                raise RequestError(f"{path}: {_brief(repeated[0])} comes twice in the order at line {line}; keep one")


_PARSERS: dict[str, Callable[[Path, str], Entries]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
}


def parse_json(text: str, where: str) -> Any:
    """JSON without repeated keys, NaN and infinity. Raises RequestError, which begins with `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RequestError(f"{where}: {_brief(twice)} comes twice; keep one")
        return found

    def refuse(constant: str) -> Any:
        raise RequestError(f"{where}: {constant} is no JSON; give a finite number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: this is no JSON, mend it there: {error}") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{where}: this is no JSON of orders: {_brief(str(error))}") from error

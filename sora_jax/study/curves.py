"""Curves as small SVG pictures that take their colours from the page around them, or together as one PNG."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SIZE_INCHES = (5.2, 3.0)
RAW_POINTS = 400  # of the faint line; more cannot be seen
SMOOTHING = 1 / 50  # of the curve, the deviation of the mean that smooths it
LOG_X_RATIO, LOG_Y_RATIO = 20.0, 4.0  # from this ratio of largest to smallest on, an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Colours:
    ink: str
    grid: str
    line: str
    point: str


# These stand in the SVG for the page's own, so that one picture serves light and dark.
_STAND_INS = Colours("#010101", "#020202", "#030303", "#040404")
_PAGE_COLOURS = Colours("var(--quiet)", "var(--rule)", "var(--accent)", "var(--warm)")
_ON_WHITE = Colours("#5c6370", "#e3e5e8", "#2f6fde", "#d9730d")
PNG_COLUMNS, PNG_DOTS_PER_INCH = 2, 110

Plot = Callable[[Any, Colours], None]
Lines = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture: a metric of the training lines and one of the evaluation lines over x, 'step' or 'total_flops'."""

    title: str
    x: str
    train: str
    evaluation: str


# A metric that a stage does not log is left out.
PANELS = (
    Panel("loss over compute", "total_flops", "loss", "val_loss"),
    Panel("loss over steps", "step", "loss", "val_loss"),
    Panel("PSNR over steps, dB", "step", "psnr", "psnr"),
)
_X_NAMES = {"total_flops": "training FLOPs so far", "step": "step"}


def draw(stage: str, train: Lines, evaluation: Lines) -> list[tuple[str, str]]:
    """(title, svg) of every panel that these lines have data for. Raises ImportError without matplotlib."""
    drawn = []
    for number, panel in enumerate(PANELS):
        line, points = _series(train, panel.x, panel.train), _series(evaluation, panel.x, panel.evaluation)
        if len(line) + len(points) >= 2:
            drawn.append((panel.title, _svg(panel, line, points, prefix=f"{_identifier(stage)}-{number}-")))
    return drawn


def smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian-weighted mean over neighbours; width is the deviation in points. A constant stays as it is.

    It starts narrow and widens: the steep first descent is signal, and a wide mean would bend it.
    """
    place = np.arange(len(values))
    width_of = np.clip(place / 6, 1e-3, width)
    weight = np.exp(-0.5 * ((place[:, None] - place[None, :]) / width_of[:, None]) ** 2)
    return weight @ values / weight.sum(1)


def _series(lines: Lines, x: str, y: str) -> np.ndarray:
    """(count, 2) of the lines that have both, finite and in order of x."""
    rows = [(line.get(x), line.get(y)) for line in lines]
    kept = [(float(a), float(b)) for a, b in rows if a is not None and b is not None]
    return np.array(sorted(pair for pair in kept if all(map(math.isfinite, pair))), np.float64).reshape(-1, 2)


def _svg(panel: Panel, line: np.ndarray, points: np.ndarray, prefix: str) -> str:
    def plot(axes: Any, colours: Colours) -> None:
        _scale(axes, np.concatenate([line, points]))
        _plot(axes, colours, line, points)
        dress(axes, colours, _X_NAMES[panel.x], panel.x == "total_flops")

    return picture(plot, prefix)


def picture(plot: Plot, prefix: str) -> str:
    """The SVG of what `plot` draws on matplotlib axes; ids start with prefix, so that pictures share a page."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: small, and in the page's own font
        "svg.hashsalt": prefix,
        "font.family": "sans-serif",
        "font.size": 11,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        plot(figure.add_subplot(), _STAND_INS)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), prefix)


def png(plots: Sequence[tuple[str, Plot]]) -> bytes:
    """All plots with their titles on one white sheet. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(PNG_COLUMNS, len(plots))
    rows = -(-len(plots) // columns)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(columns * SIZE_INCHES[0], rows * (SIZE_INCHES[1] + 0.3)), layout="constrained")
        for number, (title, plot) in enumerate(plots):
            axes = figure.add_subplot(rows, columns, number + 1)
            plot(axes, _ON_WHITE)
            axes.set_title(title, color=_ON_WHITE.ink, fontsize=10, loc="left")
        file = io.BytesIO()
        # No version of matplotlib in the file: the same numbers are the same bytes.
        figure.savefig(file, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return file.getvalue()


def _plot(axes: Any, colours: Colours, line: np.ndarray, points: np.ndarray) -> None:
    if len(line):
        raw = line[:: max(1, len(line) // RAW_POINTS)]
        axes.plot(*raw.T, color=colours.line, linewidth=0.8, alpha=0.3)
        fewer = _means(line, RAW_POINTS)
        fewer[:, 1] = smoothed(fewer[:, 1], SMOOTHING * len(fewer))
        axes.plot(*fewer.T, color=colours.line, linewidth=1.8, solid_capstyle="round", label="training")
    if len(points):
        axes.plot(*points.T, "o", color=colours.point, markersize=4.5, markeredgewidth=0, label="held out")


def _means(line: np.ndarray, most: int) -> np.ndarray:
    """Neighbours averaged until at most `most` points are left."""
    parts = np.array_split(line, min(most, len(line)))
    return np.array([part.mean(0) for part in parts])


def _scale(axes: Any, data: np.ndarray) -> None:
    low, high = data.min(0), data.max(0)
    if low[0] > 0 and high[0] / low[0] >= LOG_X_RATIO:
        axes.set_xscale("log")
    # Decibels are logarithms already, and may be negative.
    if low[1] > 0 and high[1] / low[1] >= LOG_Y_RATIO and high[1] < 10:
        axes.set_yscale("log")


def dress(axes: Any, colours: Colours, x_name: str, is_flops: bool) -> None:
    """Quiet axes with a legend."""
    axes.set_xlabel(x_name, color=colours.ink)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.grid)
    axes.grid(axis="y", color=colours.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=colours.ink)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            _sparse_ticks(axis)
        else:
            _prefixed_ticks(axis, is_flops and axis is axes.xaxis)
    axes.legend(frameon=False, labelcolor=colours.ink, loc="best", handlelength=1.2)


def _sparse_ticks(axis: Any) -> None:
    """At most a few labels, as plain numbers with prefixes, whether an axis spans half a decade or six."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    digits = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=digits, numticks=8))
    axis.set_major_formatter(ticker.EngFormatter(sep=" ") if high > 1e3 else ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def _prefixed_ticks(axis: Any, is_flops: bool) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(5))
    if is_flops or axis.get_view_interval()[1] >= 1e4:
        axis.set_major_formatter(ticker.EngFormatter(sep=" "))


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: no headers, ids that no other picture has, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 class="curve" role="img"', svg, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, colour in zip(dataclasses.astuple(_STAND_INS), dataclasses.astuple(_PAGE_COLOURS), strict=True):
        svg = svg.replace(stand_in, colour)
    return re.sub(r">\s+<", "><", svg)


def _identifier(name: str) -> str:
    """Letters, digits and dashes that differ when names differ."""
    return "".join(letter if letter.isascii() and letter.isalnum() else f"-{ord(letter):x}-" for letter in name)

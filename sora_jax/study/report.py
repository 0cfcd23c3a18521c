"""A study as one page that needs nothing beside it: samples, reconstructions, curves, numbers; and the numbers as JSON.

The page is read without a network, in light or dark, on a phone too. Whatever text comes from outside is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import string
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.generate import files
from sora_jax.study import curves, scaling, scaling_curves, scaling_text
from sora_jax.train import progress

STRIP_FRAMES = 13  # of a section's picture
SHEET_COLUMNS = 3  # of samples.png, where there are no rungs
# Small videos are enlarged by the first of these whole numbers that keeps them within the pixels and the bytes.
SCALES = (6, 5, 4, 3, 2, 1)
LONGEST_SIDE = 288  # pixels
MOST_BYTES = 60_000  # of a video or picture: 32 of them make a page of less than 3 MB
SHARP_SIDE = 192  # pixels; what is smaller would look blurred when the browser enlarges it
MOST_PARTS = 5  # of the time, in a headline
DIVIDER = 2  # pixels, even, between an original and its reconstruction
# Keys of numbers that have a place of their own, beside the tables.
_ELSEWHERE = ("title", "created", "machine", "versions", "commands", "runs", "scaling")
_TITLES = {
    "adherence": "Does the video show its prompt?",
    "dit": "Diffusion transformer",
    "packing": "Packing",
    "seconds": "Time",
    "vae": "Video autoencoder",
}
_JUDGED = {
    "all": "Colour, shape and motion right",
    "frames": "Right frames",
    "colour": "Right colour",
    "shape": "Right shape",
    "motion": "Right motion",
    "relation": "Right relation",
    "size": "Right size",
    "background": "Right background",
}
_STAGES = {"vae": "Video autoencoder", "dit": "Diffusion transformer"}


@dataclasses.dataclass(frozen=True)
class Video:
    """A sample. frames_THWC is uint8; expected and read are what it should show and what the reader saw, both in words.

    A difference of the two is pointed out; one that is empty means that nobody looked.
    """

    frames_THWC: np.ndarray
    fps: float
    prompt: str
    seed: int
    expected: str = ""
    read: str = ""

    @property
    def judged(self) -> bool:
        return bool(self.expected and self.read)

    @property
    def as_asked(self) -> bool:
        return _words(self.expected) == _words(self.read)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A clip and its reconstruction, uint8 and of one shape."""

    original_THWC: np.ndarray
    decoded_THWC: np.ndarray
    fps: float
    caption: str


@dataclasses.dataclass(frozen=True)
class Rung:
    """Samples of one run; the rungs of a ladder have the same prompts and seeds in the same order. scores are told beside them."""

    name: str
    samples: Sequence[Video]
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Section:
    """Videos that are not samples of held-out prompts, by what they show; name is that of its picture, without the ending."""

    name: str
    title: str
    words: str
    rungs: Sequence[Rung]


@dataclasses.dataclass(frozen=True)
class Page:
    """What a study has to show. numbers is what report.json says; any part may be missing.

    curves and evaluations map a stage to its lines of metrics.jsonl, see train.progress.read_metrics.
    """

    title: str
    numbers: Mapping[str, Any]
    samples: Sequence[Video]
    pairs: Sequence[Pair]
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
    commands: Sequence[str]
    rungs: Sequence[Rung] = ()
    sections: Sequence[Section] = ()


def write(workdir: str | os.PathLike[str], page: Page) -> Path:
    """Writes report.json, report.html and pictures into workdir, each whole or not at all; returns the path of the page.

    The pictures are samples.png, a sheet of what the page plays, scaling.png, the curves of a study of scaling, and one of
    each section, a strip of frames of each of its rungs.
    Numbers that are not finite become null. Raises TypeError for numbers that JSON cannot say and ValueError for a pair
    of different shapes, both before anything is written.
    """
    workdir = Path(workdir)
    numbers = plain(dict(page.numbers) | {"commands": list(page.commands)})
    content = {
        "report.json": json.dumps(numbers, indent=2, allow_nan=False) + "\n",
        "report.html": render(dataclasses.replace(page, numbers=numbers)),
    }
    pictures = {"samples.png": _sheet(page), "scaling.png": _scaling_png(numbers)}
    pictures |= {f"{section.name}.png": _strips(section) for section in page.sections}
    for name, text in content.items():
        files.write_atomically(workdir / name, text.encode())
    for name, picture in pictures.items():
        if picture is not None:
            files.write_atomically(workdir / name, picture)
    return workdir / "report.html"


def _sheet(page: Page) -> bytes | None:
    """The samples as strips of frames: a row a prompt and a column a rung, or a few columns of samples."""
    if page.rungs:
        rows = zip(*(rung.samples for rung in page.rungs), strict=True)
        shown = [(f"{rung.name}: ", video) for row in rows for rung, video in zip(page.rungs, row, strict=True)]
    else:
        shown = [("", video) for video in page.samples]
    if not shown:
        return None
    labels = [f"{before}{video.prompt}" for before, video in shown]
    columns = len(page.rungs) or SHEET_COLUMNS
    sheet = files.contact_sheet([video.frames_THWC for _, video in shown], labels, columns=columns)
    return files.encode_video(sheet[None], 1.0, "png")


def _strips(section: Section) -> bytes | None:
    """One strip a rung; of rungs that made the same prompts, all that they made, one below the other."""
    made = [rung for rung in section.rungs if rung.samples]
    same = len({tuple((video.prompt, video.seed) for video in rung.samples) for rung in made}) == 1
    each = range(len(made[0].samples)) if same else range(1)
    shown = [(rung.name, rung.samples[number]) for number in each for rung in made]
    if not shown:
        return None
    labels = [f"{name.replace('_', ' ')}: {video.prompt}" for name, video in shown]
    videos = [video.frames_THWC for _, video in shown]
    sheet = files.contact_sheet(videos, labels, frames_per_video=STRIP_FRAMES, scale=2)
    return files.encode_video(sheet[None], 1.0, "png")


def _scaling_png(numbers: Mapping[str, Any]) -> bytes | None:
    plots = _scaling_plots(numbers)
    try:
        return curves.png(plots) if plots else None
    except ImportError:  # the page says so
        return None


def _scaling_plots(numbers: Mapping[str, Any]) -> list[tuple[str, curves.Plot]]:
    """IsoFLOP curves, the law of the loss, models and rates, where runs fix them."""
    runs, found = numbers.get("runs"), numbers.get("scaling")
    if not isinstance(runs, Mapping) or not isinstance(found, Mapping):
        return []
    return scaling_curves.plots(runs, found)


def render(page: Page) -> str:
    """The page as HTML."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    sections = (
        _ladder(page.rungs, page.numbers) if page.rungs else _samples(page.samples),
        *(_told(section) for section in page.sections),
        _scaling(page.numbers),
        _gains(page.numbers),
        _runs(page.numbers),
        _cards(page.numbers),
        _pairs(page.pairs),
        _curves(page.curves, page.evaluations),
        _tables(page.numbers),
        _commands(page.commands),
        _environment(page.numbers),
    )
    return string.Template(template).substitute(
        title=html.escape(page.title), summary=_summary(page), sections="\n".join(filter(None, sections))
    )


def plain(value: Any) -> Any:
    """The value as JSON can say it: numpy becomes Python, what is not finite None. Raises TypeError for the rest."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(f"{value!r} is a {type(value).__name__}; JSON needs numbers, strings, lists and dicts")


# --- sections


def _summary(page: Page) -> str:
    seconds, machine = scaling.value_at(page.numbers, "seconds.total"), page.numbers.get("machine") or {}
    words = "Videos made from text by a video autoencoder and a diffusion transformer"
    if place := _place(machine):
        words += f", trained on {place}"
    if _is_number(seconds):
        words += f": the whole study took {_duration(seconds)}"
    lines = [f"<p>{html.escape(words)}.</p>"]
    if page.numbers.get("created"):
        lines.append(f'<p class="quiet">{html.escape(str(page.numbers["created"]))}</p>')
    return "\n".join(lines)


def _place(machine: Mapping[str, Any]) -> str:
    """'2 CPU cores', or the accelerators."""
    devices, cores = machine.get("devices"), machine.get("cores")
    if devices and devices != "cpu":
        return str(devices)
    return f"{cores} CPU core{'s' * (cores != 1)}" if _is_number(cores) else ""


def _samples(samples: Sequence[Video]) -> str:
    if not samples:
        return ""
    judged = [sample for sample in samples if sample.judged]
    words = "One video per prompt, all started together."
    if judged:
        right = sum(sample.as_asked for sample in judged)
        words += f" {right} of {len(judged)} show what was asked for"
        words += "." if right == len(judged) else '; <i class="dot"></i>under the others stands what was seen instead.'
    aspect = _mat_aspect([sample.frames_THWC for sample in samples])
    grid = "\n".join(_sample(sample, aspect) for sample in samples)
    button = '<button id="toggle" type="button" hidden>Pause</button>'
    return _section("Samples", f'<div class="videos" data-in-step>\n{grid}\n</div>', words, button)


def _told(section: Section) -> str:
    """The videos of every rung of a section, with its scores."""
    parts = []
    for rung in section.rungs:
        aspect = _mat_aspect([video.frames_THWC for video in rung.samples])
        figures = "\n".join(_sample(video, aspect) for video in rung.samples)
        told = ", ".join(f"{html.escape(name.replace('_', ' '))} {value:.3g}" for name, value in rung.scores.items())
        title = f'{html.escape(rung.name.replace("_", " "))} <span class="quiet">{told}</span>'
        parts.append(f'<h3 class="prompt">{title}</h3><div class="videos">\n{figures}\n</div>')
    return _section(html.escape(section.title), "\n".join(parts), html.escape(section.words))


def _ladder(rungs: Sequence[Rung], numbers: Mapping[str, Any]) -> str:
    """A row a prompt, a column a rung, all playing in step. Raises ValueError for rungs of different prompts or seeds."""
    asked = [[(sample.prompt, sample.seed) for sample in rung.samples] for rung in rungs]
    if any(each != asked[0] for each in asked):
        raise ValueError("the rungs of a ladder must show the same prompts and seeds")
    heads = "".join(f"<p><b>{html.escape(rung.name)}</b>{_cost(numbers, rung.name)}</p>" for rung in rungs)
    parts = [f'<div class="rungs">{heads}</div>']
    for number, (prompt, seed) in enumerate(asked[0]):
        row = [rung.samples[number] for rung in rungs]
        aspect = _mat_aspect([sample.frames_THWC for sample in row])
        figures = "".join(_sample(sample, aspect, labelled=False) for sample in row)
        title = f'{html.escape(prompt)} <span class="quiet">seed {seed}</span>'
        parts.append(f'<h3 class="prompt">{title}</h3><div class="rungs">{figures}</div>')
    words = "The same prompt and seed, with more and more compute from left to right."
    if _is_number(cost := scaling.value_at(numbers, "vae.flops")):
        words += f" Costs are of the transformers; the video autoencoder that they share took {progress.si(float(cost))}FLOP more."
    button = '<button id="toggle" type="button" hidden>Pause</button>'
    style = f' style="--rungs:{len(rungs)}"'
    return _section(
        "More compute, better videos", f"<div{style} data-in-step>" + "\n".join(parts) + "</div>", words, button
    )


def _cost(numbers: Mapping[str, Any], name: str) -> str:
    runs = numbers.get("runs")
    run = runs.get(name) if isinstance(runs, Mapping) else None
    if not isinstance(run, Mapping) or not _is_number(run.get("flops")):
        return ""
    words = [f"{progress.si(float(run['flops']))}FLOP"]
    if _is_number(scaling.value_at(run, "adherence.all")):
        words.append(f"{100 * run['adherence']['all']:.0f}\u00a0% have colour, shape and motion right")
    return f'<span class="quiet"> {html.escape(", ".join(words))}</span>'


def _scaling(numbers: Mapping[str, Any]) -> str:
    """What the runs say together: in words, as a table, and drawn."""
    found = numbers.get("scaling")
    if not isinstance(found, Mapping):
        return ""
    words = "".join(f"<p>{html.escape(each)}</p>" for each in scaling_text.sentences(found))
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in scaling_text.rungs(found)
    )
    titles = ("", "FLOP", "measured", "law", "is off by", "law of the best", "is off by", "")
    head = "".join(f"<th>{title}</th>" for title in titles)
    table = (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>' if rows else ""
    )
    body = words + table + _drawn(numbers)
    return _section("Laws", body) if body else ""


def _drawn(numbers: Mapping[str, Any]) -> str:
    try:
        drawn = [
            (title, curves.picture(plot, f"scaling-{number}-"))
            for number, (title, plot) in enumerate(_scaling_plots(numbers))
        ]
    except ImportError:  # _curves says so
        return ""
    figures = "".join(f'<figure><p class="quiet">{title}</p>{svg}</figure>' for title, svg in drawn)
    return f'<div class="curves">{figures}</div>' if figures else ""


def _gains(numbers: Mapping[str, Any]) -> str:
    """Rungs with mean and deviation over seeds, and between two rungs how many deviations the step is."""
    found = scaling.value_at(numbers, "scaling.ladder")
    if not isinstance(found, Mapping) or len(found["rungs"]) < 2:
        return ""
    metrics = [each for each in _RUN_COLUMNS if any(each[1] in rung for rung in found["rungs"].values())]

    def spread(value: Any, show: Callable[[Any], str]) -> str:
        if not isinstance(value, Mapping):
            return ""
        deviation = value.get("deviation")
        return show(value["mean"]) + (f" \u00b1 {show(deviation)}" if _is_number(deviation) else "")

    def step(value: Any, show: Callable[[Any], str]) -> str:
        if not isinstance(value, Mapping):
            return ""
        sign, many = "+" if value["gain"] >= 0 else "\u2212", value.get("in_deviations")
        return f"{sign}{show(abs(value['gain']))}" + (f" ({many:.1f} deviations)" if _is_number(many) else "")

    rows = []
    steps = iter(found["steps"].items())
    for name, rung in found["rungs"].items():
        cells = "".join(f"<td>{spread(rung.get(path), show)}</td>" for _, path, show in metrics)
        rows.append(f"<tr><th>{html.escape(name)}</th><td>{rung['seeds']}</td>{cells}</tr>")
        if following := next(steps, None):
            title, gains = following
            cells = "".join(f"<td>{step(gains.get(path), show)}</td>" for _, path, show in metrics)
            rows.append(f'<tr class="quiet"><th>{html.escape(title)}</th><td></td>{cells}</tr>')
    head = "<th></th><th>seeds</th>" + "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in metrics)
    words = "Mean over seeds \u00b1 standard deviation; a step is better where it is positive."
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("Rungs", table, words)


# Columns of the table of runs: title, where a run's numbers have it, and how it is shown.
_RUN_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", lambda value: f"{value:,.0f}"),
    ("steps", "steps", lambda value: f"{value:,.0f}"),
    ("FLOP", "flops", lambda value: progress.si(float(value)).strip()),
    ("optimizer\u2019s", "optimizer_flops", lambda value: progress.si(float(value)).strip()),
    ("time", "seconds", lambda value: progress.clock(float(value))),
    ("held-out loss", "val_loss", lambda value: f"{value:.4f}"),
    ("of who knows the clip", "val_loss_floor", lambda value: f"{value:.4f}"),
    ("of who knows nothing", "val_loss_ceiling", lambda value: f"{value:.4f}"),
    *(
        (_JUDGED[name].removeprefix("Right "), f"adherence.{name}", lambda value: f"{100 * value:.0f}\u00a0%")
        for name in _JUDGED
    ),
    ("Frechet distance from real clips", "frechet.distance", lambda value: f"{value:.1f}"),
    ("of real clips through the VAE", "frechet.reconstructions", lambda value: f"{value:.1f}"),
    ("of other real clips", "frechet.floor", lambda value: f"{value:.1f}"),
    ("of noise through the VAE", "frechet.ceiling", lambda value: f"{value:.1f}"),
    ("from real clips through the VAE", "frechet_latent.distance", lambda value: f"{value:.1f}"),
    ("of others of them", "frechet_latent.floor", lambda value: f"{value:.1f}"),
)


def _runs(numbers: Mapping[str, Any]) -> str:
    """A row a run; columns that no run has a number for are left out."""
    runs = numbers.get("runs")
    if not isinstance(runs, Mapping):
        return ""
    found = [
        (title, [scaling.value_at(run, path) for run in runs.values()], show) for title, path, show in _RUN_COLUMNS
    ]
    columns = [(title, values, show) for title, values, show in found if any(map(_is_number, values))]
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in columns)
    rows = []
    for number, name in enumerate(runs):
        cells = [(show(values[number]) if _is_number(values[number]) else "") for _, values, show in columns]
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return _section("Runs", table)


def _sample(sample: Video, aspect: float, labelled: bool = True) -> str:
    words = f'{html.escape(sample.prompt)}<span class="quiet">seed {sample.seed}</span>' if labelled else ""
    if sample.judged and not sample.as_asked:
        words += f'<span class="misread">seen: {_marked(sample.read, sample.expected)}</span>'
    media = _media(sample.frames_THWC, sample.fps, sample.prompt)
    return f"<figure>{_mat(media, sample.frames_THWC, aspect)}<figcaption>{words}</figcaption></figure>"


def _marked(read: str, expected: str) -> str:
    """What was read, with the words marked that were not expected."""
    wanted = set(_words(expected))
    words = [(html.escape(word), word.casefold().strip(",.;") in wanted) for word in read.split()]
    return " ".join(word if known else f"<mark>{word}</mark>" for word, known in words)


def _pairs(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    joined = [_joined(pair) for pair in pairs]
    aspect = _mat_aspect(joined)
    figures = []
    for pair, frames_THWC in zip(pairs, joined, strict=True):
        # Both halves are one video, so that they cannot drift apart; the bar hides the pixels between.
        width = frames_THWC.shape[2]
        bar = f'<i style="left:{50 - 50 * DIVIDER / width:.3f}%;width:{100 * DIVIDER / width:.3f}%"></i>'
        media = _media(frames_THWC, pair.fps, f"original and reconstruction: {pair.caption}") + bar
        caption = f"<figcaption>{html.escape(pair.caption)}</figcaption>"
        figures.append(f"<figure>{_mat(media, frames_THWC, aspect)}{caption}</figure>")
    words = "Left the original, right what the autoencoder makes of it: samples cannot be sharper than this."
    return _section("Reconstructions", '<div class="pairs">\n' + "\n".join(figures) + "\n</div>", words)


def _joined(pair: Pair) -> np.ndarray:
    one, other = pair.original_THWC, pair.decoded_THWC
    if one.shape != other.shape:
        raise ValueError(f"the pair {pair.caption!r} has shapes {one.shape} and {other.shape}; crop them to one")
    # The bar covers the divider; of the colours beside it, so that no player blurs another across the edge.
    half = DIVIDER // 2
    return np.concatenate([one, *[one[:, :, -1:]] * half, *[other[:, :, :1]] * half, other], axis=2)


def _cards(numbers: Mapping[str, Any]) -> str:
    cards = [_gauge_card(label, numbers, name) for name, label in _JUDGED.items()]
    seconds = scaling.value_at(numbers, "seconds.total")
    cards += [
        _card("Reconstruction", scaling.value_at(numbers, "vae.psnr"), _decibels, _attributes(numbers)),
        _card("Held-out flow loss", scaling.value_at(numbers, "dit.val_loss"), _loss, _of_model(numbers)),
        _card("Compute", numbers.get("total_flops"), _flop, _speed(numbers)),
        _card("Time", seconds, _clock, _shares(numbers)),
    ]
    count = scaling.value_at(numbers, "adherence.count")
    words = f"A reader that knows no prompt looked at {count:,.0f} samples." if _is_number(count) else ""
    if words and numbers.get("adherence_floor") and numbers.get("adherence_ceiling"):
        words += " Floor: the same samples held against each other\u2019s prompts."
        words += " Ceiling: real clips after the autoencoder."
    body = "\n".join(filter(None, cards))
    return _section("Headlines", f'<div class="cards">\n{body}\n</div>', words) if body else ""


def _card(label: str, value: Any, show: Callable[[int | float], tuple[str, str]], under: str) -> str:
    """A number with its unit, and a line of small print; nothing if there is no number."""
    if not _is_number(value):
        return ""
    number, unit = (html.escape(part) for part in show(value))
    small = f" <small>{unit}</small>" if unit else ""
    note = f'<p class="quiet">{html.escape(under)}</p>' if under else ""
    return f'<div class="card"><p class="quiet">{html.escape(label)}</p><b>{number}{small}</b>{note}</div>'


def _gauge_card(label: str, numbers: Mapping[str, Any], name: str) -> str:
    """A part of one with its floor and ceiling on one line."""
    value = scaling.value_at(numbers, f"adherence.{name}")
    if not _is_number(value):
        return ""
    bounds = {bound: scaling.value_at(numbers, f"adherence_{bound}.{name}") for bound in ("floor", "ceiling")}
    known = {bound: at for bound, at in bounds.items() if _is_number(at)}
    ticks = "".join(f'<u style="left:{_percent_css(at)}"></u>' for at in known.values())
    words = "".join(f"<span>{bound} {100 * at:.0f}\u00a0%</span>" for bound, at in known.items())
    return (
        f'<div class="card"><p class="quiet">{html.escape(label)}</p><b>{100 * value:.0f} <small>%</small></b>'
        f'<div class="gauge"><i style="width:{_percent_css(value)}"></i>{ticks}</div>'
        f'<div class="bounds quiet">{words}</div></div>'
    )


def _curves(train: Mapping[str, Any], evaluations: Mapping[str, Any]) -> str:
    parts = []
    try:
        for stage in dict.fromkeys([*train, *evaluations]):
            drawn = curves.draw(stage, train.get(stage, ()), evaluations.get(stage, ()))
            figures = "".join(f'<figure><p class="quiet">{title}</p>{svg}</figure>' for title, svg in drawn)
            if figures:
                title = html.escape(_STAGES.get(stage, stage))
                parts.append(f'<h3>{title}</h3>\n<div class="curves">{figures}</div>')
    except ImportError as error:  # a training is not lost for want of its picture
        reason = html.escape(str(error))
        return _section("Training", f'<p class="quiet">No curves: {reason}; run pip install matplotlib.</p>')
    return _section("Training", "\n".join(parts)) if parts else ""


def _tables(numbers: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in numbers.items() if key not in _ELSEWHERE}
    single = {key: value for key, value in shown.items() if not isinstance(value, Mapping)}
    tables = [_table("Run", {"": single})] if single else []
    for key, value in shown.items():
        base = key.removesuffix("_floor").removesuffix("_ceiling")
        if isinstance(value, Mapping) and (base == key or base not in shown):
            columns = {"": value} | {
                suffix: shown[f"{key}_{suffix}"]
                for suffix in ("floor", "ceiling")
                if isinstance(shown.get(f"{key}_{suffix}"), Mapping)
            }
            tables.append(_table(_TITLES.get(key, key), columns))
    return _section("All numbers", '<div class="tables">\n' + "\n".join(tables) + "\n</div>") if tables else ""


def _table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per leaf of any column; nested dicts are flattened."""
    flat = [dict(_leaves(column)) for column in columns.values()]
    rows = []
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        values = (_value(f"{title} {path}", leaves[path]) if path in leaves else "" for leaves in flat)
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        rows.append(f"<tr><th>{html.escape(path.replace('_', ' '))}</th>{cells}</tr>")
    names = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    head = f"<thead><tr><th></th>{names}</tr></thead>" if len(columns) > 1 else ""
    return f"<div><h3>{html.escape(title)}</h3><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "\n".join(html.escape(command) for command in commands)
    return _section("Made with", f"<pre>{lines}</pre>")


def _environment(numbers: Mapping[str, Any]) -> str:
    parts = {"Machine": numbers.get("machine"), "Versions": numbers.get("versions")}
    tables = [_table(title, {"": part}) for title, part in parts.items() if isinstance(part, Mapping) and part]
    return _section("Machine and versions", '<div class="tables">\n' + "\n".join(tables) + "\n</div>") if tables else ""


def _section(title: str, body: str, words: str = "", extra: str = "") -> str:
    intro = f"<p>{words}</p>" if words else ""
    return f'<section><div class="head"><h2>{title}</h2>{intro}{extra}</div>\n{body}\n</section>'


# --- pictures


def _media(frames_THWC: np.ndarray, fps: float, label: str) -> str:
    """A video, or a picture if there is one frame, with its bytes inside."""
    is_image, label = len(frames_THWC) == 1, html.escape(label)
    content, side = _encode(frames_THWC, fps, "png" if is_image else "mp4")
    look = ' class="pixels"' if side < SHARP_SIDE else ""
    if is_image:
        return f'<img src="{files.data_uri(content, "image/png")}" alt="{label}"{look}>'
    source = files.data_uri(content, "video/mp4")
    return f'<video src="{source}" aria-label="{label}"{look} autoplay muted loop playsinline></video>'


def _encode(frames_THWC: np.ndarray, fps: float, format: str) -> tuple[bytes, int]:
    """The file's bytes and its longer side in pixels; noise, which no codec likes, is enlarged less."""
    longest = max(frames_THWC.shape[1:3])
    for scale in SCALES:
        if scale == 1 or scale * longest <= LONGEST_SIDE:
            content = files.encode_video(frames_THWC, fps, format, scale)
            if len(content) <= MOST_BYTES:
                break
    return content, scale * longest


def _mat(media: str, frames_THWC: np.ndarray, aspect: float) -> str:
    """The picture as large as it fits on a mat whose opening is of the aspect that a grid shares."""
    height, width = frames_THWC.shape[1:3]
    share = min(1.0, width / height / aspect)
    frame = f'<div class="frame" style="width:{100 * share:.2f}%;aspect-ratio:{width}/{height}">{media}</div>'
    return f'<div class="mat"><div class="opening" style="aspect-ratio:{aspect:.4f}">{frame}</div></div>'


def _mat_aspect(videos: Sequence[np.ndarray]) -> float:
    """Width over height of the box that holds each video at its native size."""
    return max(video.shape[2] for video in videos) / max(video.shape[1] for video in videos)


# --- words


def _value(path: str, value: Any) -> str:
    """A number as one reads it; its name tells its unit."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not _is_number(value):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if "flops" in path:
        return f"{progress.si(float(value))}FLOP"
    if path.startswith(_TITLES["seconds"]) or "seconds" in path:
        return progress.clock(float(value)) if value >= 60 else f"{value:.3g} s"
    if _is_part(path, value):
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _is_part(path: str, value: int | float) -> bool:
    """Whether the value is a part of one."""
    judged = path.startswith(_TITLES["adherence"]) and "count" not in path
    return 0 <= value <= 1 and (judged or "attributes" in path or path.endswith("fill"))


def _leaves(value: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, each in value.items():
        here = f"{path} {key}".strip()
        found += _leaves(each, here) if isinstance(each, Mapping) else [(here, each)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(text: str) -> list[str]:
    return [word.strip(",.;") for word in text.casefold().split()]


def _percent_css(part: int | float) -> str:
    return f"{100 * min(max(part, 0.0), 1.0):.1f}%"


def _decibels(psnr: int | float) -> tuple[str, str]:
    return f"{psnr:.1f}", "dB PSNR"


def _loss(loss: int | float) -> tuple[str, str]:
    return f"{loss:.4f}", ""


def _flop(flops: int | float) -> tuple[str, str]:
    number, _, prefix = progress.si(float(flops)).partition(" ")
    return number, f"{prefix}FLOP"


def _clock(seconds: int | float) -> tuple[str, str]:
    return progress.clock(float(seconds)), ""


def _attributes(numbers: Mapping[str, Any]) -> str:
    """What reconstructions keep: 'keeps colour 100 %, shape 97 %'."""
    kept = scaling.value_at(numbers, "vae.attributes")
    parts = kept.items() if isinstance(kept, Mapping) else ()
    words = ", ".join(f"{name} {100 * part:.0f}\u00a0%" for name, part in parts if _is_number(part))
    return f"keeps {words}" if words else ""


def _of_model(numbers: Mapping[str, Any]) -> str:
    """'0.02 for who knows the clip, 1.40 for who knows nothing · 1.2 M parameters'."""
    floor, ceiling, count = (
        scaling.value_at(numbers, f"dit.{name}") for name in ("val_loss_floor", "val_loss_ceiling", "parameters")
    )
    words = []
    if _is_number(floor) and _is_number(ceiling):
        words.append(f"{floor:.2f} for who knows the clip, {ceiling:.2f} for who knows nothing")
    if _is_number(count):
        words.append(f"{progress.si(float(count)).strip()} parameters")
    return " \u00b7 ".join(words)


def _speed(numbers: Mapping[str, Any]) -> str:
    flops, seconds = numbers.get("total_flops"), scaling.value_at(numbers, "seconds.total")
    known = _is_number(flops) and _is_number(seconds) and seconds > 0
    return f"{progress.si(float(flops / seconds))}FLOP/s over the whole time; optimizers come on top" if known else ""


def _shares(numbers: Mapping[str, Any]) -> str:
    """'vae 1:20 · dit 8:03'; of many parts the longest and how many others there are. The table has all."""
    seconds = numbers.get("seconds")
    every = seconds.items() if isinstance(seconds, Mapping) else ()
    parts = {str(name): float(each) for name, each in every if name != "total" and _is_number(each)}
    longest = sorted(parts, key=lambda name: -parts[name])[:MOST_PARTS]
    told = [f"{name} {progress.clock(each)}" for name, each in parts.items() if name in longest]
    return " · ".join(told + [f"{len(parts) - len(told)} more"] * (len(parts) > len(told)))


def _duration(seconds: int | float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

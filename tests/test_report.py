"""Laws of the report: the numbers are told exactly, nothing outside is needed, and no text becomes markup."""

import base64
import collections
import dataclasses
import html.parser
import io
import json
import math
import sys
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest

from sora_jax.study import curves, report

NASTY = "a <script>alert(\"1\")</script> & a 'red' circle</figure>"
FILES = ["report.html", "report.json"]
PICTURES = ["samples.png"]


def make_video(num_frames=5, height=32, width=48):
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.float64)
    disc = np.exp(-((x - 8 - 6 * t) ** 2 + (y - height / 2) ** 2) / 80)
    return np.round(60 + 180 * disc[..., None] * np.array([1.0, 0.6, 0.3])).astype(np.uint8)


def make_lines(steps, **values):
    return [{"step": step, "total_flops": 1e9 * step} | {k: v(step) for k, v in values.items()} for step in steps]


def make_page(**parts):
    video = make_video()
    complete = {
        "title": "Moving & <small> shapes",
        "numbers": {
            "title": "Moving & <small> shapes",
            "machine": {"cpu": "<b>fast</b>", "cores": 2},
            "seconds": {"vae": 61.5, "total": 100.25},
            "total_flops": 1.23456789e13,
            "dit": {"val_loss": 0.62345, "val_loss_floor": 0.0212, "val_loss_ceiling": 1.6466, "parameters": 1_234_567},
            "adherence": {"colour": 0.123456789, "all": 0.5, "count": 128},
            "adherence_floor": {"colour": 0.1, "all": 0.01, "count": 128},
            "adherence_ceiling": {"colour": 1.0, "all": 0.9, "count": 128},
        },
        "samples": [
            report.Video(video, 8.0, NASTY, 11, expected="red circle, left", read="red circle, left"),
            report.Video(make_video(9, 48, 32), 8.0, "it grows", 12, expected="red circle, left", read="red <b>, up"),
            report.Video(make_video(1), 8.0, "an image", 13),
        ],
        "pairs": [report.Pair(video, video[::-1], 8.0, "<i>a pair</i>")],
        "curves": {
            "vae": make_lines(range(10, 500, 10), loss=lambda step: 3 / step, psnr=lambda step: step**0.5),
            "dit": make_lines(range(10, 500, 10), loss=lambda step: 9 / step if step > 50 else math.nan),
        },
        "evaluations": {"dit": make_lines((100, 200), val_loss=lambda step: 9 / step)},
        "commands": ["sora-jax study --config=a.py && echo '<done>'"],
    }
    return report.Page(**(complete | parts))


EMPTY = {"numbers": {}, "samples": (), "pairs": (), "curves": {}, "evaluations": {}, "commands": ()}


class Reader(html.parser.HTMLParser):
    """What a browser finds: tags, attributes, and the text inside some tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = collections.Counter(), [], []
        self.texts = collections.defaultdict(list)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("figcaption", "h1", "pre", "mark", "td", "h2"):
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data

    def all(self, *names):
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def page():
    return make_page()


@pytest.fixture(scope="module")
def workdir(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "new"
    assert report.write(path, page) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def seen(workdir):
    return Reader((workdir / "report.html").read_text(encoding="utf-8"))


def test_json_equals_the_numbers(page, workdir):
    assert json.loads((workdir / "report.json").read_text()) == page.numbers | {"commands": page.commands}
    assert sorted(path.name for path in workdir.iterdir()) == FILES + PICTURES


def test_the_sheet_shows_every_sample(page, workdir):
    height, width, _ = iio.imread(workdir / "samples.png").shape
    # Three samples side by side, each of four frames at most.
    assert width >= 4 * 48 + 4 * 32 + 48 and height >= 48
    assert (workdir / "samples.png").stat().st_size < 1e6


def test_json_is_valid_whatever_the_numbers(tmp_path):
    numbers = {
        "loss": math.nan,
        "list": [math.inf, 1, (2.5,)],
        "numpy": {"scalar": np.float32(0.5), "integer": np.int64(7), "array": np.array([1.0, -np.inf])},
        "flag": True,
        "none": None,
    }
    report.write(tmp_path, make_page(**EMPTY | {"numbers": numbers}))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse) == {
        "loss": None,
        "list": [None, 1, [2.5]],
        "numpy": {"scalar": 0.5, "integer": 7, "array": [1.0, None]},
        "flag": True,
        "none": None,
        "commands": [],
    }


def test_text_stays_text(page, seen):
    assert (seen.tags["script"], seen.tags["b"]) == (1, 5)  # the numbers of five cards
    assert seen.tags["figure"] == len(page.samples) + len(page.pairs) + 5
    captions = seen.texts["figcaption"]
    for sample, caption in zip(page.samples, captions, strict=False):
        assert caption.startswith(f"{sample.prompt}seed {sample.seed}")
    assert captions[3] == "<i>a pair</i>"
    assert seen.texts["h1"] == [page.title]
    assert seen.texts["pre"] == ["\n".join(page.commands)]
    assert "<b>fast</b>" in seen.texts["td"]


def test_nothing_outside_is_needed(workdir, seen):
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert not any(part in text for part in ("http://", "https://", "@import", "<?xml", "xmlns", "$"))
    assert text.lower().count("<!doctype") == 1
    for source in seen.all("src", "href", "xlink:href", "poster", "srcset", "action"):
        assert source.startswith(("data:", "#"))
    assert "link" not in seen.tags and "iframe" not in seen.tags


def test_media_show_the_frames(page, seen):
    assert (seen.tags["video"], seen.tags["img"]) == (3, 1)
    sources = [value for tag, name, value in seen.attributes if (tag, name) == ("video", "src")]
    for source, video in zip(sources, [sample.frames_THWC for sample in page.samples[:2]], strict=False):
        head, content = source.split(",")
        assert head == "data:video/mp4;base64"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        scale = decoded.shape[1] // video.shape[1]
        assert scale >= 4 and decoded.shape == (len(video), scale * video.shape[1], scale * video.shape[2], 3)
        middle = decoded[:, scale // 2 :: scale, scale // 2 :: scale].astype(np.float64)
        assert np.abs(middle - video).mean() < 2 < np.abs(middle[1:] - video[:-1]).mean()


@pytest.mark.parametrize("name", ["autoplay", "muted", "loop", "playsinline"])
def test_videos_play_by_themselves(seen, name):
    assert sum((tag, attribute) == ("video", name) for tag, attribute, _ in seen.attributes) == seen.tags["video"]


def test_only_what_was_read_otherwise_is_marked(seen):
    assert seen.texts["mark"] == ["<b>,", "up"]
    assert ["seen:" in caption for caption in seen.texts["figcaption"]] == [False, True, False, False]


def test_pairs_are_side_by_side(page):
    pair = page.pairs[0]
    joined = report._joined(pair)
    np.testing.assert_array_equal(joined[:, :, :48], pair.original_THWC)
    np.testing.assert_array_equal(joined[:, :, -48:], pair.decoded_THWC)


def test_pictures_do_not_share_ids(seen):
    ids = seen.all("id")
    assert len(set(ids)) == len(ids)
    wanted = {value[1:] for value in seen.all("xlink:href", "href")}
    wanted |= {value[5:-1] for value in seen.all("clip-path") if value.startswith("url(#")}
    assert wanted and wanted <= set(ids)
    assert seen.tags["svg"] == 5  # loss over FLOPs and steps of two stages, PSNR of one


def test_curves_of_too_little_are_left_out():
    lines = make_lines((1, 2, 3), loss=lambda step: math.nan, psnr=lambda step: None)
    assert curves.draw("vae", lines, lines) == []


def test_smoothing_keeps_lines_and_averages_noise():
    line = np.linspace(3, 5, 200)
    np.testing.assert_allclose(curves.smoothed(line, 4.0)[20:-20], line[20:-20], atol=1e-9)
    np.testing.assert_allclose(curves.smoothed(np.full(50, 7.0), 4.0), 7.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert curves.smoothed(noise, 8.0)[50:].std() < noise.std() / 3


@pytest.mark.parametrize("missing", [*EMPTY, None])
def test_any_part_may_be_missing(missing):
    parts = EMPTY if missing is None else {missing: EMPTY[missing]}
    seen = Reader(report.render(make_page(**parts)))
    assert seen.tags["h1"] == 1
    if missing is None:
        assert seen.tags["section"] == 0
    assert ("Samples" in seen.texts["h2"]) == (missing not in ("samples", None))


def test_a_page_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.write(tmp_path, make_page()).read_text()
    assert "pip install matplotlib" in text and "<svg" not in text


def test_what_cannot_be_written_leaves_the_old_report(tmp_path, monkeypatch):
    report.write(tmp_path, make_page(**EMPTY))
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with pytest.raises(TypeError, match="object"):
        report.write(tmp_path, make_page(numbers={"a": object()}))
    with pytest.raises(ValueError, match="the pair 'c'"):
        report.write(tmp_path, make_page(pairs=[report.Pair(make_video(5), make_video(4), 8.0, "c")]))

    usual = Path.open

    class Full:
        """A file of which only half is written."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError("no space left")

    def full_disk(path, mode="r", *rest, **more):
        file = usual(path, mode, *rest, **more)
        return Full(file) if "x" in mode or "w" in mode else file

    monkeypatch.setattr("pathlib.Path.open", full_disk)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path, make_page())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_page_is_small():
    """24 samples and 8 pairs are to stay below 3 MB; here an eighth of them, noisy as no sample should be."""
    rng = np.random.default_rng(0)
    clean = make_video(17).astype(np.float64)
    noisy = [np.clip(clean + rng.normal(0, 6, clean.shape), 0, 255).astype(np.uint8) for _ in range(2)]
    samples = [report.Video(noisy[0], 8.0, "a prompt", seed) for seed in range(3)]
    pairs = [report.Pair(*noisy, 8.0, "a caption")]
    without = len(report.render(make_page(**EMPTY)))
    media = len(report.render(make_page(**EMPTY | {"samples": samples, "pairs": pairs}))) - without
    assert 8 * media + without + 100_000 < 3e6  # with room for curves


def make_ladder(*names, seeds=(3, 4)):
    return [
        report.Rung(name, [report.Video(make_video(), 8.0, NASTY, seed, "a circle", f"a {name}") for seed in seeds])
        for name in names
    ]


def test_of_many_stages_the_headline_tells_the_longest():
    seconds = {f"run {number}": 60.0 * number for number in range(1, 10)}
    page = make_page()
    told = report.render(dataclasses.replace(page, numbers={"seconds": seconds | {"total": 2700.0}}))
    card = told[told.index("45:00") :].split("</div>")[0]
    assert "run 5 05:00 · run 6 06:00 · run 7 07:00 · run 8 08:00 · run 9 09:00 · 4 more" in card
    few = report.render(dataclasses.replace(page, numbers={"seconds": {"vae": 60.0, "total": 61.0}}))
    assert "vae 01:00" in few and "more<" not in few


def test_a_ladder_shows_every_prompt_on_every_rung():
    runs = {"1x": {"flops": 2e12, "adherence": {"all": 0.25}}, "32x <b>": {"flops": 64e12}}
    page = make_page(rungs=make_ladder(*runs), numbers={"runs": runs})
    reader = Reader(report.render(page))
    assert reader.tags["video"] == 2 * 2 + 1  # and the pair
    text = report.render(page)
    assert text.index(">1x<") < text.index("32x &lt;b&gt;") and "25\u00a0% have colour, shape and motion right" in text
    assert "2 TFLOP" in text and "64 TFLOP" in text
    table = text[text.index(">Runs<") :]
    assert "<th>32x &lt;b&gt;</th><td>64 T</td><td></td>" in table  # no adherence is no number


def test_a_ladder_has_a_sheet_with_a_column_a_rung(tmp_path):
    sizes = {}
    for names in (("1x",), ("1x", "4x", "32x")):
        report.write(tmp_path, make_page(rungs=make_ladder(*names)))
        sizes[len(names)] = iio.imread(tmp_path / "samples.png").shape
    assert sizes[3][0] == sizes[1][0] and sizes[3][1] > 2.9 * sizes[1][1]


def test_rungs_of_other_seeds_are_refused():
    one, _ = make_ladder("1x", "4x")
    (other,) = make_ladder("4x", seeds=(3, 5))
    with pytest.raises(ValueError, match="the same prompts and seeds"):
        report.render(make_page(rungs=[one, other]))


def test_a_section_shows_its_videos_with_their_scores_and_has_a_picture(tmp_path):
    rungs = [report.Rung(name, [report.Video(make_video(), 8.0, NASTY, 3)] * 2, {"kept_<b>": 0.25}) for name in "ab"]
    section = report.Section("prompting", "Prompted <i>", "In every way.", rungs)
    page = make_page(sections=[section])
    text = report.render(page)
    assert Reader(text).tags["video"] == Reader(report.render(make_page())).tags["video"] + 4
    assert "kept &lt;b&gt; 0.25" in text and "Prompted <i>" not in text
    # What is compared plays in step; what is shown by itself goes round by itself, as a loop must.
    told = text[text.index("kept &lt;b&gt;") :]
    assert text.count("data-in-step>") == 1 and "data-in-step>" not in told and told.count('<div class="videos">') == 2
    heights = []
    for prompt in (NASTY, "another"):  # one strip a rung, or all of them where the prompts are the same
        rungs[1] = dataclasses.replace(rungs[1], samples=[report.Video(make_video(), 8.0, prompt, 3)] * 2)
        report.write(tmp_path, make_page(sections=[report.Section("prompting", "Prompted", "In every way.", rungs)]))
        heights.append(iio.imread(tmp_path / "prompting.png").shape[0])
    assert heights[1] > 2 * 32 and heights[0] > 1.9 * heights[1]


def test_the_loss_stands_between_its_bounds(workdir):
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert "0.02 for who knows the clip, 1.65 for who knows nothing \u00b7 1.23 M parameters" in text

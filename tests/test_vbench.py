"""Laws of the export for VBench: what VBench would read is what was made, and no name leaves its folder."""

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest

from sora_jax.evaluate import vbench
from sora_jax.generate import files

PLAIN = "A 3D model of a 1800s victorian house."
UGLY = [
    "../../etc/passwd",
    "/absolute",
    "..",
    ".hidden",
    "-rf *",
    "a\\b",
    "two\nlines\0",
    "half \ud83d",
    "long " * 100,
    "日本" * 100,
    "é" * 250,
]


def make_video(prompt: str, index: int) -> np.ndarray:
    """Four frames of one grey level that tells the video from the others."""
    return np.full((4, 16, 24, 3), 10 * index + 50 * (len(prompt) % 4), np.uint8)


def samples_of(prompts):
    for number, prompt in enumerate(prompts):
        seeds = [100 * number + index for index in range(5)]
        yield vbench.Samples(prompt, [make_video(prompt, index) for index in range(5)], seeds)


def write_nothing(path, frames_THWC, fps):
    path.write_bytes(b"")


def read_as_suite(videos: Path, prompt: str) -> list[Path]:
    """The files that VBench looks for when it judges a prompt of its own."""
    return [videos / f"{prompt}-{index}.mp4" for index in range(5)]


def read_as_custom_input(videos: Path, prompt_file: Path) -> dict[Path, str]:
    """Prompts of all files, as VBench joins its --prompt_file with the folder; every file must be there."""
    prompts = {videos / name: prompt for name, prompt in json.loads(prompt_file.read_text()).items()}
    assert set(prompts) == set(videos.iterdir())
    return prompts


def decode(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), fps


def test_round_trip(tmp_path):
    prompts = [PLAIN, "a cat", "in the style of a/b"]
    videos = vbench.export(tmp_path, samples_of(prompts), 8.0, files.write_video, {})
    for prompt in prompts[:2]:
        for index, path in enumerate(read_as_suite(videos, prompt)):
            frames, fps = decode(path)
            assert (frames.shape, fps) == ((4, 16, 24, 3), 8.0)
            assert np.abs(frames.astype(int) - make_video(prompt, index)).max() <= 3
            # VBench's rule for the prompt of a file, where no prompt file is given.
            assert re.sub(r"-\d+$", "", path.stem) == prompt
    read = read_as_custom_input(videos, tmp_path / "prompts.json")
    assert sorted(read.values()) == sorted(prompts * 5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["fps"] == 8.0
    for entry in manifest["videos"]:
        assert read[videos / entry["file"]] == entry["prompt"]
        assert entry["seed"] == 100 * prompts.index(entry["prompt"]) + entry["index"]
        expected = make_video(entry["prompt"], entry["index"])
        assert entry["shape"] == list(expected.shape)
        assert np.abs(decode(videos / entry["file"])[0].astype(int) - expected).max() <= 3
        assert entry["found_by_suite"] == (entry["prompt"] != "in the style of a/b")


def test_any_prompt_becomes_a_file_of_its_own_in_the_folder(tmp_path):
    alike = ["a/b", "a\\b", "a_b", "long " * 101, "c" * 300, "c" * 301]
    prompts = list(dict.fromkeys([*UGLY, *alike]))
    videos = vbench.export(tmp_path / "out", samples_of(prompts), 8.0, write_nothing, {})
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(everything) == 5 * len(prompts) + 2
    assert sum(path.parent == videos for path in everything) == 5 * len(prompts)
    for path in videos.iterdir():
        assert len(path.name.encode()) <= vbench.MAX_NAME_BYTES
        assert path.name.isprintable()
        assert path.name[0] not in ".-"
    read = read_as_custom_input(videos, tmp_path / "out" / "prompts.json")
    assert sorted(read.values()) == sorted(prompts * 5)


def test_prompts_that_can_be_names_are_kept_to_the_letter():
    longest = "x" * (vbench.MAX_NAME_BYTES - len("-9999.mp4"))
    for prompt in (PLAIN, "a cat: \"one\", 'two'?", "Ukiyo-e ", "naïve 猫", "ends-3", longest):
        assert vbench.file_stem(prompt) == prompt
    assert vbench.file_stem(longest + "x") != longest + "x"


def test_longest_name_can_be_written(tmp_path):
    for prompt in ("x" * 234, "é" * 250):
        path = tmp_path / f"{vbench.file_stem(prompt)}-0.mp4"
        files.write_video(path, make_video(prompt, 0), 8.0)
        assert path.stat().st_size > 0


def test_more_than_five_are_taken(tmp_path):
    many = vbench.Samples(PLAIN, [make_video(PLAIN, index % 5) for index in range(25)], range(25))
    videos = vbench.export(tmp_path, [many], 8.0, write_nothing, {})
    assert {path.name for path in videos.iterdir()} == {f"{PLAIN}-{index}.mp4" for index in range(25)}


def test_refusals(tmp_path):
    video = make_video("a", 0)
    with pytest.raises(ValueError, match="4 videos of 'a'; VBench needs 5"):
        vbench.Samples("a", [video] * 4, range(5))
    with pytest.raises(ValueError, match="6 seeds of 'a'"):
        vbench.Samples("a", [video] * 5, range(6))
    with pytest.raises(ValueError, match="prompt is empty"):
        vbench.Samples(" ", [video] * 5, range(5))
    with pytest.raises(ValueError, match="'a' comes twice"):
        vbench.export(tmp_path / "twice", samples_of(["a", "b", "a"]), 8.0, write_nothing, {})
    assert not (tmp_path / "twice" / "manifest.json").exists()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        vbench.export(tmp_path / "twice", samples_of(["a"]), 8.0, write_nothing, {})
    with pytest.raises(ValueError, match="no samples"):
        vbench.export(tmp_path / "none", [], 8.0, write_nothing, {})

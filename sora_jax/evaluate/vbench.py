"""Videos as VBench reads them (Huang et al., arXiv:2311.17982), for users who have it: five samples of every prompt or more.

    folder/videos/{prompt}-{index}.mp4     and nothing else: VBench takes any file there for a video
    folder/prompts.json                    {file name: prompt}, VBench's --prompt_file
    folder/manifest.json                   seeds and sizes, and whether VBench's own prompt suite finds a file

Then, with VBench installed, for prompts of its suite (prompts/all_dimension.txt) and for any others:

    vbench evaluate --videos_path folder/videos --dimension $DIMENSION
    vbench evaluate --videos_path folder/videos --dimension $DIMENSION --mode=custom_input --prompt_file folder/prompts.json

Its dimension temporal_flickering asks for 25 samples of every prompt, as it judges those alone in which little moves.
VBench judges videos under 5 seconds; from 5 seconds on it asks for VBench-Long, which reads the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import disk

SAMPLES_PER_PROMPT = 5  # at least
# Filesystems take 255; a writer puts up to 13 more around the name of a file that is not whole yet.
MAX_NAME_BYTES = 240
_SUFFIX = ".mp4"
# Separators, control characters, halves of characters, and what makes a name hidden or looks like a flag.
_UNSAFE = re.compile("[/\\\\\x00-\x1f\x7f\ud800-\udfff]|^[.-]")


@dataclasses.dataclass(frozen=True)
class Samples:
    """The videos of a prompt, five or more, uint8 (T, H, W, 3), with the seed of each.

    VBench asks for seeds that are random, not picked, and on record. Raises ValueError for fewer, for more of one than of the
    other, or an empty prompt.
    """

    prompt: str
    videos: Sequence[np.ndarray]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("a prompt is empty; VBench names videos by their prompts: leave it out")
        if len(self.videos) < SAMPLES_PER_PROMPT:
            raise ValueError(
                f"{len(self.videos)} videos of {self.prompt!r}; VBench needs {SAMPLES_PER_PROMPT} a prompt or more"
            )
        if len(self.seeds) != len(self.videos):
            raise ValueError(f"{len(self.seeds)} seeds of {self.prompt!r} for {len(self.videos)} videos; give one each")


def export(
    folder: str | Path,
    samples: Iterable[Samples],
    fps: float,
    write_video: Callable[[Path, np.ndarray, float], None],
    made_by: Mapping[str, Any],
) -> Path:
    """Writes the videos of all prompts with prompts.json and, last, manifest.json, which begins with made_by; returns the folder
    of the videos.

    samples may be a generator: one prompt's videos are held at a time. write_video(path, frames_THWC, fps) writes an
    .mp4; generate.files.write_video does. Raises FileExistsError if the folder of the videos holds anything, as VBench
    would read that too, and ValueError if a prompt comes twice or none comes.
    """
    folder, videos = Path(folder), new_folder(folder)
    videos.mkdir(parents=True, exist_ok=True)
    prompts: dict[str, str] = {}
    entries = []
    for each in samples:
        stem = file_stem(each.prompt)
        for index, (frames_THWC, seed) in enumerate(zip(each.videos, each.seeds, strict=True)):
            name = f"{stem}-{index}{_SUFFIX}"
            if name in prompts:
                raise ValueError(f"prompt {each.prompt!r} comes twice; give all its samples at once")
            write_video(videos / name, frames_THWC, fps)
            prompts[name] = each.prompt
            entries.append(
                {
                    "file": name,
                    "prompt": each.prompt,
                    "index": index,
                    "seed": int(seed),
                    "shape": list(frames_THWC.shape),
                    "found_by_suite": stem == each.prompt,
                }
            )
    if not entries:
        raise ValueError("there are no samples to export; give at least one prompt")
    # Plain ASCII: VBench reads the file in whatever encoding its machine has.
    disk.write_atomically(folder / "prompts.json", json.dumps(prompts, indent=2).encode("ascii"))
    manifest = {**made_by, "fps": fps, "videos": entries}
    disk.write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2).encode("ascii"))
    return videos


def new_folder(folder: str | Path) -> Path:
    """Where the videos go. Raises FileExistsError if that holds anything, as VBench would read it too."""
    videos = Path(folder) / "videos"
    if videos.exists() and (not videos.is_dir() or any(videos.iterdir())):
        raise FileExistsError(f"{videos} is not an empty folder, and VBench would judge what it holds; give a new one")
    return videos


def file_stem(prompt: str) -> str:
    """The prompt itself if {prompt}-{index}.mp4 is a safe file name, for VBench's suite looks for exactly that.

    Else, a stem that stays in its folder and fits a filesystem, with eight digits of the prompt's hash, so that no two
    prompts share it; VBench reads such a prompt from prompts.json.
    """
    longest = MAX_NAME_BYTES - len(f"-9999{_SUFFIX}")
    safe = _UNSAFE.sub("_", prompt)
    if safe == prompt and len(safe.encode()) <= longest:
        return prompt
    mark = f"~{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return safe.encode()[: longest - len(mark)].decode(errors="ignore") + mark

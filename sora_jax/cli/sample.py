"""The verb sample."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sora_jax
from sora_jax.cli import trained
from sora_jax.cli.failures import Failure, errors_for_users, errors_of_writing, make_folder
from sora_jax.cli.flags import MAX_SEED, SHOWN_WIDTH
from sora_jax.cli.trained import SAMPLER_FLAGS

if TYPE_CHECKING:
    import numpy as np

    from sora_jax.data.worlds.world import WorldConfig
    from sora_jax.diffusion.sampler import SamplerConfig
    from sora_jax.generate import manifest, requests
    from sora_jax.generate.pipeline import Pipeline

SUFFIXES = (".mp4", ".gif", ".png")
SHEET_FRAMES = 8
# Prompts whose videos for VBench are held at a time.
VBENCH_PROMPTS = 8
MAX_PROMPT_BYTES = 2**26
# Flags that are keys of an order.
_ORDER_FLAGS = (
    *("height", "width", "frames", "seconds", "fps", "samples", "start", "end", "window", "fit", "known_guidance"),
    *("image", "extend", "direction", "connect", "loop", "edit", "strength", "inpaint", "mask"),
    *("outpaint", "left", "right", "top", "bottom", "interpolate", "factor", "draft"),
)
# Those of them that VBench's videos cannot have.
_BEYOND_SIZE = tuple(name for name in _ORDER_FLAGS if name not in ("height", "width", "frames", "fps", "samples"))


@dataclasses.dataclass(frozen=True)
class Video:
    """One video to make and the file it goes to."""

    prompt: str
    seed: int
    path: Path


def sample(arguments: argparse.Namespace) -> None:
    """Makes what is asked for and writes it with a manifest."""
    # Everything that can be refused without the model is refused before it is loaded.
    sources = [
        name for name in ("prompt", "prompts_file", "requests", "manifest") if getattr(arguments, name) is not None
    ]
    if len(sources) > 1:
        raise Failure(f"--{sources[0]} and --{sources[1]} both say what to make; give one of them")
    if arguments.manifest is None and arguments.checkpoint is None:
        raise Failure("nothing says which model; give --checkpoint, the work dir of a trained diffusion transformer")
    if arguments.vbench is not None:
        _refuse_flags(arguments, "VBench's videos are made from prompts alone", *_BEYOND_SIZE)
        _sample_for_vbench(arguments, _prompts(arguments))
        return
    from sora_jax.generate import manifest

    kept = None
    with errors_for_users(ValueError):
        if arguments.manifest is not None:
            _refuse_flags(arguments, "--manifest says it all", "seed", *_ORDER_FLAGS, *SAMPLER_FLAGS, "scale")
            kept = manifest.read(arguments.manifest)
            manifest.check_inputs(kept)
            orders = list(kept.orders)
        else:
            orders = [variation for order in _orders(arguments) for variation in order.variations()]
        inputs = manifest.digests(orders)
    _refuse_place(arguments.out, arguments.outdir)
    again = _replaced(arguments, kept) if kept else []
    told = _manifest_path(arguments.out, arguments.outdir)
    source = arguments.checkpoint or Path(kept.checkpoint)  # type: ignore[union-attr]
    if arguments.checkpoint is None and not source.exists():
        raise Failure(f"{arguments.manifest} is of {source}, which is not there; say where it is by --checkpoint")
    if kept and kept.step is not None and (source / str(kept.step)).is_dir():
        source = source / str(kept.step)  # it may have trained on
    pipeline, (workdir, step), settings = _loaded(source, arguments)
    from sora_jax import checkpoint, config, disk

    fingerprint = checkpoint.digest(workdir, step)
    versions = manifest.versions(_device())
    if kept:
        with errors_for_users(ValueError):
            manifest.check_fingerprint(kept, fingerprint)
            settings = config.sampler_config(kept.settings)
        for line in manifest.differences(kept, sora_jax.__version__, versions):
            logging.warning("%s", line)
    world = pipeline.run.data.world
    with errors_for_users(ValueError):
        jobs = pipeline.prepare(orders)
    stills = [job.size.frames == 1 for job in jobs]
    videos = again or arrange(orders, stills, arguments.out, arguments.outdir)
    if replaced := {video.path.resolve() for video in videos} & {Path(path).resolve() for path in inputs}:
        raise Failure(f"{replaced.pop()} is an input, which the output would replace; choose another name")
    if arguments.out is not None and told.exists():
        with errors_for_users(ValueError):
            beside = [told.with_name(name) for name in manifest.read(told).files]
        if others := [path for path in beside if path.suffix != arguments.out.suffix and path.exists()]:
            raise Failure(f"{told} says how {others[0]} was made and would be replaced; choose another name")
    for line in dict.fromkeys(line for job in jobs for line in job.told):
        logging.info("%s", line)
    for size in dict.fromkeys(job.size for job in jobs):
        warn_of(size, world)
    make_folder(told.parent)
    trained.tell_mesh(pipeline)
    sizes = ", ".join(dict.fromkeys(str(job.size) for job in jobs))
    logging.info("sampling %d of %s", len(jobs), sizes)
    made = pipeline.make(jobs, settings)
    scale = kept.scale if kept else arguments.scale or math.ceil(SHOWN_WIDTH / max(job.size.width for job in jobs))
    with errors_of_writing(told):
        _write(videos, made, [job.size.fps for job in jobs], scale)
        found = manifest.Manifest(
            version=sora_jax.__version__,
            checkpoint=str(workdir.absolute()),
            step=step,
            fingerprint=fingerprint,
            orders=tuple(orders),
            settings=json.loads(json.dumps(dataclasses.asdict(settings))),
            scale=scale,
            files=tuple(video.path.name for video in videos),
            inputs=inputs,
            versions=versions,
            command=arguments.command,
        )
        content = json.dumps(found.to_json(told.parent), indent=2, ensure_ascii=False)
        disk.write_atomically(told, content.encode())
    for video, order in zip(videos, orders, strict=True):
        print(f"{video.path}  seed {video.seed}  {video.prompt or order.mode}")


def _loaded(source: Path, arguments: argparse.Namespace) -> tuple[Pipeline, tuple[Path, int | None], SamplerConfig]:
    """The model with its work dir and step, and the sampler that the flags ask for."""
    pipeline, place = trained.load(source, arguments.mesh)
    return pipeline, place, trained.settings(pipeline, arguments)


def size_of(arguments: argparse.Namespace, usual: requests.Size) -> requests.Size:
    """The size of the flags, and where there is none, the usual one."""
    given = {name: getattr(arguments, name) for name in ("height", "width", "frames", "fps")}
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def warn_of(size: requests.Size, world: WorldConfig) -> None:
    """Warns of a size that can be made but was not trained on."""
    known = (size.height, size.width) in world.clip_sizes and size.frames <= max(world.frame_counts)
    if known and (size.frames == 1 or size.fps in world.fps):
        return
    sizes, rates = ", ".join(f"{h}x{w}" for h, w in world.clip_sizes), ", ".join(f"{rate:g}" for rate in world.fps)
    logging.warning(
        "%s is not what the checkpoint was trained on, expect less of it; that was %s, up to %d frames, at %s fps",
        size, sizes, max(world.frame_counts), rates,
    )  # fmt: skip


def _refuse_flags(arguments: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise Failure(f"{why}; leave --{name} out")


def _orders(arguments: argparse.Namespace) -> list[requests.Order]:
    """The orders of a request file or of the flags. Raises ValueError for what cannot be meant."""
    from sora_jax.generate import requests

    if arguments.requests is not None:
        _refuse_flags(arguments, "the request file says it", "seed", *_ORDER_FLAGS)
        return requests.read_orders(arguments.requests)
    given = {name: value for name in _ORDER_FLAGS if (value := getattr(arguments, name)) is not None}
    prompted = arguments.prompt is not None or arguments.prompts_file is not None
    if not prompted and not any(name in given for name in requests.MODES):
        raise Failure(
            "nothing says what to make; give --prompt, --prompts_file, --requests, --manifest or an image or a video"
        )
    prompts = _prompts(arguments) if prompted else [""]
    return [requests.from_mapping({"prompt": prompt, "seed": arguments.seed or 0} | given) for prompt in prompts]


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Prompts without outer spaces, and without the blank lines of a file. Raises Failure for an empty one or none."""
    file = arguments.prompts_file
    if file is None:
        if arguments.prompt is None:
            raise Failure("nothing says what to show; give --prompt or --prompts_file")
        prompts = [prompt.strip() for prompt in arguments.prompt]
        if not all(prompts):
            raise Failure("--prompt is empty; say what to show, such as --prompt='a red circle moves left'")
        return prompts
    try:
        # A pipe will do, so there may be no size to ask for.
        content = _first_bytes(file, MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise Failure(f"--prompts_file={file} has more than {MAX_PROMPT_BYTES} bytes; split it")
        prompts = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except OSError as error:
        raise Failure(f"cannot read --prompts_file={file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Failure(f"--prompts_file={file} is not UTF-8 text") from error
    if not prompts:
        raise Failure(f"--prompts_file={file} holds no prompt; write one per line")
    return prompts


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _replaced(arguments: argparse.Namespace, kept: manifest.Manifest) -> list[Video]:
    """The files of a manifest at their new place."""
    names = list(kept.files)
    if len(names) != len(kept.orders):
        raise Failure(f"{arguments.manifest} names {len(names)} files for {len(kept.orders)} videos; it was changed")
    if arguments.outdir is not None:
        paths = [arguments.outdir / name for name in names]
    elif len(set(names)) == 1 and Path(names[0]).suffix == arguments.out.suffix:
        paths = [arguments.out] * len(names)
    else:
        raise Failure(
            f"{arguments.manifest} is of {', '.join(dict.fromkeys(names))}; give --outdir, or --out of that kind"
        )
    return [Video(order.prompt, order.seed, path) for order, path in zip(kept.orders, paths, strict=True)]


def _device() -> str:
    """What the pixels are computed on."""
    import jax

    return f"{jax.devices()[0].device_kind} x {jax.device_count()}"


def _refuse_place(out: Path | None, outdir: Path | None) -> None:
    """Raises Failure for a place that cannot be written to."""
    if outdir is not None and outdir.exists() and not outdir.is_dir():
        raise Failure(f"--outdir={outdir} is a file; name a folder")
    if out is not None and out.suffix not in SUFFIXES:
        raise Failure(f"--out={out}: the file must end in one of {', '.join(SUFFIXES)}")
    if out is not None and out.is_dir():
        raise Failure(f"--out={out} is a folder; name a file in it, or give --outdir")


def arrange(
    orders: Sequence[requests.Order], stills: Sequence[bool], out: Path | None, outdir: Path | None
) -> list[Video]:
    """Where every order goes: to `out` if there is one or a sheet, else to out-0, out-1, ...; in outdir to 000.mp4, or 000.png
    of one frame, and so on."""
    if out is None:
        assert outdir is not None
        paths = [outdir / f"{number:03d}{'.png' if still else '.mp4'}" for number, still in enumerate(stills)]
    else:
        several = len(orders) > 1 and out.suffix != ".png"
        paths = [out.with_stem(f"{out.stem}-{number}") if several else out for number in range(len(orders))]
    return [Video(order.prompt, order.seed, path) for order, path in zip(orders, paths, strict=True)]


def _write(videos: Sequence[Video], made: Sequence[np.ndarray], fps: Sequence[float], scale: int) -> None:
    """One file a video, or all on one sheet where they share a file."""
    from sora_jax.generate import files

    if len({video.path for video in videos}) < len(videos):
        labels = [f"{video.prompt} (seed {video.seed})" for video in videos]
        sheet = files.contact_sheet(made, labels, frames_per_video=SHEET_FRAMES, scale=scale)
        files.write_image(videos[0].path, sheet)
        return
    for video, frames, rate in zip(videos, made, fps, strict=True):
        files.write_video(video.path, frames, rate, scale)


def _manifest_path(out: Path | None, outdir: Path | None) -> Path:
    """Where the manifest goes. Raises Failure if another file is there, such as the config.json of a run."""
    path = out.with_suffix(".json") if out is not None else outdir / "manifest.json"  # type: ignore[operator]
    start = b'{\n  "sora_jax_sample"'
    if path.exists() and (not path.is_file() or _first_bytes(path, len(start)) != start):
        raise Failure(f"{path} is no manifest, which would replace it; choose another name")
    return path


def _sample_for_vbench(arguments: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Five videos of every prompt, a few prompts at a time, in the folder that VBench reads."""
    from sora_jax.evaluate import vbench

    count, folder = vbench.SAMPLES_PER_PROMPT, arguments.vbench
    if arguments.samples not in (None, count):
        raise Failure(
            f"--samples={arguments.samples}: VBench takes {count} videos of every prompt; leave --samples out"
        )
    if repeated := sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
        raise Failure(f"prompt {repeated[0]!r} comes twice; VBench names videos by their prompts")
    with errors_for_users(FileExistsError):
        vbench.new_folder(folder)
    seeds = _seeds(arguments.seed or 0, count)
    pipeline, _, settings = _loaded(arguments.checkpoint, arguments)
    from sora_jax.data import pack
    from sora_jax.generate import files
    from sora_jax.generate.pipeline import Request

    size = size_of(arguments, pipeline.usual_size)
    with errors_for_users(ValueError):  # a size that cannot be made
        shape = pipeline.vae_config.latent_shape(size.frames, size.height, size.width)
        pack.grid_shape(shape, pipeline.run.dit.patch)
    warn_of(size, pipeline.run.data.world)
    trained.tell_mesh(pipeline)
    logging.info("sampling %d of %s", len(prompts) * count, size)

    def samples() -> Iterator[vbench.Samples]:
        for start in range(0, len(prompts), VBENCH_PROMPTS):
            chosen = prompts[start : start + VBENCH_PROMPTS]
            requests = [Request(prompt, **dataclasses.asdict(size), seed=seed) for prompt in chosen for seed in seeds]
            made = pipeline.sample(requests, settings)
            for number, prompt in enumerate(chosen):
                yield vbench.Samples(prompt, made[number * count : (number + 1) * count], seeds)
            logging.info("%d of %d prompts", start + len(chosen), len(prompts))

    def write_video(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
        files.write_video(path, frames_THWC, fps, arguments.scale or 1)

    with errors_of_writing(folder):
        print(vbench.export(folder, samples(), size.fps, write_video))


def _seeds(first: int, count: int) -> list[int]:
    if first + count - 1 > MAX_SEED:
        raise Failure(f"--seed={first} with --samples={count} goes beyond {MAX_SEED}; choose a smaller seed")
    return list(range(first, first + count))

"""The verb sample, with its flags."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sora_jax
from sora_jax.cli import asked, flags, trained, vbench
from sora_jax.cli.failures import LOST, Failure, errors_for_users, errors_of_writing, make_folder
from sora_jax.cli.process import meeting
from sora_jax.cli.trained import SAMPLER_FLAGS

if TYPE_CHECKING:
    import numpy as np

    from sora_jax.generate import manifest, requests
    from sora_jax.generate.canvas import Job, Result

# Videos are enlarged to about this width unless --scale says otherwise: 32 pixels are hard to watch.
SHOWN_WIDTH = 256
# Pixels down or across, beyond which h264 has no video.
MOST_SIDE = 2**14
SUFFIXES = (".mp4", ".gif", ".png")
SHEET_FRAMES = 8
# Keys of an order that VBench's videos cannot have.
_BEYOND_SIZE = tuple(name for name in asked.ORDER_FLAGS if name not in ("height", "width", "frames", "fps", "samples"))


def add_sample(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "sample",
        sample,
        "make images and videos from text, images and videos with a trained model",
        "Make images and videos with a trained diffusion transformer: from text, and from images and videos, which are animated,\n"
        "extended, connected, looped, edited, painted in or around, or slowed down. A JSON file beside the output tells how it\n"
        "was made, and --manifest makes the same files from it again.",
        """examples:
  sora-jax sample --checkpoint=runs/quickstart/dit --prompt="a red circle moves left" --out=red.mp4
  sora-jax sample --checkpoint=runs/quickstart/dit --prompt="a blue star grows" --frames=1 --seed=3 --out=star.png
  sora-jax sample --checkpoint=runs/prompting/dit --prompt="a blue star moves up" --image=star.png --out=up.mp4
  sora-jax sample --checkpoint=runs/prompting/dit --prompt="..." --extend=up.mp4 --direction=backward --seconds=4 --out=more.mp4
  sora-jax sample --checkpoint=runs/prompting/dit --requests=requests.yaml --outdir=out
  sora-jax sample --manifest=out/manifest.json
  sora-jax sample --checkpoint=runs/quickstart/dit --prompts_file=prompts.txt --vbench=vbench
  sora-jax sample --checkpoint=/shared/dit --prompt="..." --out=/shared/a.mp4 --mesh=fsdp=8 --distributed""",
    )
    flags.add_checkpoint(parser, ", but with --manifest the step that it names")
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; repeatable (default: none)")
    what.add_argument(
        "--prompts_file", type=flags.path, metavar="FILE", help="file with one prompt per line (default: none)"
    )
    what.add_argument(
        "--requests",
        type=flags.path,
        metavar="FILE",
        help="JSON, JSON lines or YAML file of requests; their keys are prompt, seed, samples, the flags under size, from an image "
        "or a video and beside these, and README.md shows one (default: none)",
    )
    what.add_argument(
        "--manifest", type=flags.path, metavar="FILE", help="a manifest, whose files are made again (default: none)"
    )
    out = parser.add_mutually_exclusive_group()
    out.add_argument(
        "--out",
        type=flags.path,
        metavar="FILE",
        help="file to write (required, or --outdir, --vbench or --manifest): .mp4 or .gif, which several videos turn into FILE-0, "
        "FILE-1, ...; or .png, frames side by side, all videos on one sheet",
    )
    out.add_argument(
        "--outdir",
        type=flags.path,
        metavar="DIR",
        help="folder to write to: 000.mp4, 001.png, ... and manifest.json (required, or --out or --vbench; with --manifest by "
        "default the folder NAME-again beside it)",
    )
    out.add_argument(
        "--vbench",
        type=flags.path,
        metavar="DIR",
        help="new folder for five videos of every prompt, or --samples, as VBench reads them (required, or --out or --outdir)",
    )
    size = parser.add_argument_group("size")
    size.add_argument(
        "--height",
        type=flags.count,
        metavar="PIXELS",
        help="height of the result (default: of the first size that was trained on; with a file, unless --height or --width is "
        "given, of the one whose shape is nearest to the file's; plus what --outpaint adds)",
    )
    size.add_argument(
        "--width", type=flags.count, metavar="PIXELS", help="width of the result (default: as --height's)"
    )
    size.add_argument(
        "--frames",
        type=flags.count,
        metavar="N",
        help="number of frames, 1 for an image, or how many are added to a video (default: of the longest clips that were "
        "trained on; what is added, half of them)",
    )
    size.add_argument("--seconds", type=float, metavar="X", help="the same in seconds (default: --frames)")
    size.add_argument(
        "--fps",
        type=flags.rate,
        metavar="X",
        help="frames per second (default: the first rate that was trained on; of --interpolate the file's times --factor)",
    )
    size.add_argument(
        "--window",
        type=flags.count,
        metavar="N",
        help="frames that are made at once; longer videos are made piece by piece, each from the end of the one before "
        "(default: of the longest clips that were trained on)",
    )
    parser.add_argument("--seed", type=flags.seed, metavar="N", help="seed of a prompt's first sample (default: 0)")
    parser.add_argument(
        "--samples",
        type=flags.count,
        metavar="N",
        help="videos per prompt, of seeds --seed, --seed + 1, ... (default: 1; for --vbench 5, the fewest, of which "
        "temporal_flickering needs 25)",
    )
    _add_modes(parser)
    flags.add_sampler(parser)
    flags.add_processes(
        parser,
        "The same command on every machine, with files that all of them see; the first writes. Where one dies the others stop\n"
        f"within seconds with exit code {LOST}.",
    )
    parser.add_argument(
        "--scale",
        type=flags.count,
        metavar="N",
        help=f"enlarge every pixel to N x N (default: what makes a video at least {SHOWN_WIDTH} pixels wide; "
        "for --vbench 1)",
    )


def _add_modes(parser: flags.Parser) -> None:
    """What a video is made from beside text."""
    modes = parser.add_argument_group(
        "from an image or a video", "one of these; none of them is a model or a sampler of its own"
    )
    files = {
        "image": "an image that is the first frame",
        "extend": "a video that goes on; see --direction, --frames, --seconds",
        "edit": "a video that is made anew after the prompt, from this much noise: see --strength",
        "inpaint": "a video or image of which the white part of --mask is made anew",
        "outpaint": "a video or image that is continued by --left, --right, --top, --bottom pixels",
        "interpolate": "a video that gets --factor times as many frames",
    }
    for name, words in files.items():
        modes.add_argument(f"--{name}", metavar="FILE", help=f"{words} (default: none)")
    modes.add_argument(
        "--connect", nargs=2, metavar="FILE", help="two videos, and what happens between them (default: none)"
    )
    modes.add_argument(
        "--loop",
        nargs="?",
        const=True,
        type=lambda text: True if text == "true" else text,
        metavar="FILE",
        help="a video that is led back to its start; without FILE one that is made from the prompt, of which the way back knows "
        "nothing (default: none)",
    )
    beside = parser.add_argument_group("beside these")
    beside.add_argument(
        "--direction", choices=("forward", "backward"), help="where --extend goes on (default: forward)"
    )
    beside.add_argument(
        "--mask",
        metavar="FILE",
        help="image or video for --inpaint and --edit, white where to make anew (default: none)",
    )
    beside.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="how much noise --edit, --interpolate and --draft begin with, 0 = as it is, 1 = nothing of it (default: 0.6)",
    )
    for name in ("left", "right", "top", "bottom"):
        beside.add_argument(f"--{name}", type=flags.pixels, metavar="PIXELS", help="for --outpaint (default: 0)")
    beside.add_argument("--factor", type=flags.count, metavar="N", help="for --interpolate (default: 2)")
    beside.add_argument(
        "--draft",
        type=float,
        metavar="X",
        help="make the video at about this share of its size first, as the seed makes it there, and then in full from it "
        "(default: no draft; one is written to NAME-draft, but beside no sheet)",
    )
    beside.add_argument("--fit", choices=("crop", "letterbox"), help="how inputs come to the size (default: crop)")
    beside.add_argument("--start", type=float, metavar="SECONDS", help="where the video begins to be used (default: 0)")
    beside.add_argument("--end", type=float, metavar="SECONDS", help="where it ends to be used (default: its end)")
    beside.add_argument(
        "--known_guidance",
        type=float,
        metavar="X",
        help="how much to insist on what is given, 1 = no guidance (default: the checkpoint's config.sampler.known_guidance, "
        "but at most 1 in windows of a long video that only go on from what was made, and 1.5 where --loop leads back)",
    )


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
    if arguments.out is arguments.outdir is arguments.vbench is None:
        if arguments.manifest is None:
            raise Failure("nothing says where to write; give --out, --outdir or --vbench")
        arguments.outdir = arguments.manifest.with_name(f"{arguments.manifest.stem}-again")
    if arguments.vbench is not None:
        asked.refuse_flags(arguments, "VBench's videos are made from prompts alone", *_BEYOND_SIZE)
    with meeting(arguments):
        if arguments.vbench is not None:
            vbench.sample_for_vbench(arguments, asked.prompts_of(arguments))
        else:
            _make(arguments)


def _make(arguments: argparse.Namespace) -> None:
    from sora_jax.generate import manifest

    kept = None
    with errors_for_users(ValueError):
        if arguments.manifest is not None:
            asked.refuse_flags(arguments, "--manifest says it all", "seed", *asked.ORDER_FLAGS, *SAMPLER_FLAGS, "scale")
            kept = manifest.read(arguments.manifest)
            manifest.check_inputs(kept)
            orders = list(kept.orders)
        else:
            orders = [variation for order in asked.orders_of(arguments) for variation in order.variations()]
        inputs = manifest.digests(orders)
    if (arguments.scale or 1) > manifest.MOST_SCALE:
        raise Failure(f"--scale={arguments.scale}: the most is {manifest.MOST_SCALE}; enlarge with a video tool")
    _refuse_place(arguments.out, arguments.outdir)
    again = _replaced(arguments, kept) if kept else []
    told = _manifest_path(arguments.out, arguments.outdir)
    source = arguments.checkpoint or Path(kept.checkpoint)  # type: ignore[union-attr]
    if arguments.checkpoint is None and not source.exists():
        raise Failure(f"{arguments.manifest} is of {source}, which is not there; say where it is by --checkpoint")
    if kept and kept.step is not None and (source / str(kept.step)).is_dir():
        source = source / str(kept.step)  # it may have trained on
    pipeline, (workdir, step), settings = trained.load_with(source, arguments)
    from sora_jax import checkpoint, config, disk, processes

    fingerprint = checkpoint.digest(workdir, step)
    versions = manifest.versions(trained.device(pipeline))
    if kept:
        with errors_for_users(ValueError):
            manifest.check_fingerprint(kept, fingerprint)
            settings = config.sampler_config(kept.settings)
        for line in manifest.differences(kept, sora_jax.__version__, versions):
            logging.warning("%s", line)
    world = pipeline.run.data.world
    with errors_for_users(ValueError):
        jobs = pipeline.prepare(orders)
    scale = kept.scale if kept else arguments.scale
    for size in dict.fromkeys(job.size for job in jobs):
        side = max(size.height, size.width)
        if side * _enlarged(scale, size.width) > MOST_SIDE:
            raise Failure(
                f"{side} pixels enlarged {_enlarged(scale, size.width)} times are more than the {MOST_SIDE} that a video has; "
                f"give --scale={MOST_SIDE // side} or less"
            )
    stills = [job.size.frames == 1 for job in jobs]
    videos = again or arrange(orders, stills, arguments.out, arguments.outdir)
    written = [video.path for video in videos]
    if not _is_sheet(videos):  # which shows no drafts
        written += [_draft_path(video.path) for video, job in zip(videos, jobs, strict=True) if job.draft is not None]
    if replaced := {path.resolve() for path in written} & {Path(path).resolve() for path in inputs}:
        raise Failure(f"{replaced.pop()} is an input, which the output would replace; choose another name")
    told_of = _told_of(told)
    for path in written:
        if path.exists() and path.name in told_of:
            raise Failure(
                f"{path} would be replaced, and {told_of[path.name]} says how it was made; choose another name"
            )
    if told.exists():
        try:
            beside = [told.with_name(name) for name in manifest.read(told).files]
        except ValueError as error:
            raise Failure(
                f"{told} would be replaced, but what it tells of is unclear ({error}); delete it, or choose another name"
            ) from error
        if others := [path for path in beside if path.exists() and path not in {video.path for video in videos}]:
            raise Failure(f"{told} says how {others[0]} was made and would be replaced; choose another name")
    for line in dict.fromkeys(line for job in jobs for line in job.told):
        logging.info("%s", line)
    # Of what is made in windows the model makes a window at once.
    for size in dict.fromkeys(dataclasses.replace(job.size, frames=job.most_frames) for job in jobs):
        asked.warn_of(size, world)
    asked.warn_of_given(jobs, pipeline.run)
    make_folder(told.parent)
    with errors_of_writing(told), tempfile.TemporaryFile(dir=told.parent):
        pass  # before anything is made for it
    trained.tell_mesh(pipeline)
    sizes = ", ".join(dict.fromkeys(str(job.size) for job in jobs))
    logging.info("sampling %d of %s", len(jobs), sizes)
    processes.meet()  # the others have looked, too, at what is replaced from now on
    first = processes.is_first()
    with errors_of_writing(told):
        if first and told != arguments.manifest:
            told.unlink(missing_ok=True)  # it tells of files that are replaced one by one from now on
        making = pipeline.making(jobs, settings)
        if not first:
            collections.deque(making, maxlen=0)  # made together, written by the first
            return
        measured = _write(videos, jobs, making, scale)
        found = manifest.Manifest(
            version=sora_jax.__version__,
            checkpoint=str(workdir.absolute()),
            step=step,
            fingerprint=fingerprint,
            orders=tuple(_sized(order, job.size) for order, job in zip(orders, jobs, strict=True)),
            settings=json.loads(json.dumps(dataclasses.asdict(settings))),
            scale=scale,
            files=tuple(video.path.name for video in videos),
            inputs=inputs,
            versions=versions,
            command=arguments.command,
        )
        content = json.dumps(found.to_json(told.parent), indent=2, ensure_ascii=False)
        disk.write_atomically(told, content.encode())
    for video, order, words in zip(videos, orders, measured, strict=True):
        print(f"{video.path}  seed {video.seed}  {video.prompt or order.mode}{words}")


def _sized(order: requests.Order, size: requests.Size) -> requests.Order:
    """With its height and width, whatever they are by default where the manifest is read."""
    return dataclasses.replace(order, height=size.height, width=size.width)


def _replaced(arguments: argparse.Namespace, kept: manifest.Manifest) -> list[Video]:
    """The files of a manifest at their new place."""
    names = list(kept.files)
    if len(names) != len(kept.orders):
        raise Failure(
            f"{arguments.manifest} names {len(names)} files for {len(kept.orders)} videos, so it was changed; "
            "give it as it was written"
        )
    if arguments.outdir is not None:
        paths = [arguments.outdir / name for name in names]
    elif len(set(names)) == 1 and Path(names[0]).suffix == arguments.out.suffix:
        paths = [arguments.out] * len(names)
    else:
        one = ", or --out of that kind" if len(set(names)) == 1 else ""
        raise Failure(f"{arguments.manifest} is of {', '.join(dict.fromkeys(names))}; give --outdir{one}")
    return [Video(order.prompt, order.seed, path) for order, path in zip(kept.orders, paths, strict=True)]


def _refuse_place(out: Path | None, outdir: Path | None) -> None:
    """Raises Failure for a place that cannot be written to."""
    if outdir is not None and outdir.exists() and not outdir.is_dir():
        raise Failure(f"--outdir={outdir} is a file; name a folder")
    if out is not None and out.suffix not in SUFFIXES:
        raise Failure(f"--out={out}: the file must end in one of {', '.join(SUFFIXES)}")
    if out is not None and "\\" in out.name:
        raise Failure(f"--out={out}: a manifest names no file with a backslash; choose another name")
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


def _write(
    videos: Sequence[Video], jobs: Sequence[Job], making: Iterable[tuple[int, Result]], scale: int | None
) -> list[str]:
    """One file a video, written as soon as it is made, or all on one sheet where they share a file; a draft goes to NAME-draft.
    Returns what was measured of each."""
    from sora_jax.generate import files

    measured = [""] * len(videos)
    kept: dict[int, np.ndarray] = {}
    sheet = _is_sheet(videos)
    for number, (frames, draft) in making:
        video, rate = videos[number], jobs[number].size.fps
        measured[number] = _measured(jobs[number], frames)
        if sheet:
            kept[number] = frames
            continue
        files.write_video(video.path, frames, rate, _enlarged(scale, frames.shape[2]))
        if draft is not None:
            # As large as the video that is made from it, about.
            files.write_video(_draft_path(video.path), draft, rate, _enlarged(scale, draft.shape[2]))
    if sheet:
        labels = [f"{video.prompt} (seed {video.seed})" for video in videos]
        shown = files.contact_sheet(
            [kept[number] for number in range(len(videos))],
            labels,
            frames_per_video=SHEET_FRAMES,
            scale=_enlarged(scale, max(job.size.width for job in jobs)),
        )
        files.write_image(videos[0].path, shown)
    return measured


def _enlarged(scale: int | None, width: int) -> int:
    """How many times a video of this width is enlarged, where the user may have said it."""
    return scale or math.ceil(SHOWN_WIDTH / width)


def _is_sheet(videos: Sequence[Video]) -> bool:
    """Whether all share a file."""
    return len({video.path for video in videos}) < len(videos)


def _told_of(but: Path) -> dict[str, Path]:
    """The names that other manifests in a manifest's folder tell of, each with its manifest."""
    from sora_jax.generate import manifest

    found: dict[str, Path] = {}
    for other in sorted(but.parent.glob("*.json")):
        if other != but and _is_manifest(other):
            with contextlib.suppress(ValueError):  # damaged, and tells of nothing
                found |= dict.fromkeys(manifest.read(other).files, other)
    return found


def _is_manifest(path: Path) -> bool:
    """Whether a file begins as a manifest does."""
    start = b'{\n  "sora_jax_sample"'
    return path.is_file() and asked.first_bytes(path, len(start)) == start


def _draft_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-draft")


def _measured(job: Job, frames: np.ndarray) -> str:
    """What a user would look at first where a video is made of parts: how much changes where they meet."""
    from sora_jax.evaluate import continuity

    words = []
    if job.timeline.loop:
        words.append(f"closes with {continuity.loop_change(frames):.2f} of the usual change")
    if seams := job.timeline.seams:
        words.append(f"changes at seams by at most {continuity.seam_change(frames, seams):.2f} of the usual")
    return f"  ({'; '.join(words)})" if words else ""


def _manifest_path(out: Path | None, outdir: Path | None) -> Path:
    """Where the manifest goes. Raises Failure if another file is there, such as the config.json of a run."""
    path = out.with_suffix(".json") if out is not None else outdir / "manifest.json"  # type: ignore[operator]
    if path.exists() and not _is_manifest(path):
        raise Failure(f"{path} is no manifest, which would replace it; choose another name")
    return path

"""All flags of all verbs. Nothing heavy is imported: help and refusals come at once."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import sora_jax
from sora_jax.cli.failures import Failure

LOST = 75  # processes.LOST, known here without jax
# Videos are enlarged to about this width unless --scale says otherwise: 32 pixels are hard to watch.
SHOWN_WIDTH = 256
# What faulthandler still counts, and more than anyone waits.
LONGEST_SECONDS = 1e6
# Seeds are int32 on the device.
MAX_SEED = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one sentence and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; see {self.prog} --help", prog=self.prog)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a verb, with verb, parser, overrides (['--config.a.b=value']) and command."""
    arguments, rest = make_parser().parse_known_args(argv)
    arguments.command = shlex.join(["sora-jax", *argv])
    arguments.overrides, strays = _overrides(rest) if "config" in arguments else ([], rest)
    if strays:
        near = difflib.get_close_matches(strays[0].split("=")[0], [f"--{name}" for name in vars(arguments)], 1)
        arguments.parser.error(f"unknown argument {strays[0]!r}{f', did you mean {near[0]}?' if near else ''}")
    return arguments


def _overrides(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides, what is none): '--config.a=1', '--config.a 1', and '--config.a' or '--noconfig.a' for a bool."""
    overrides: list[str] = []
    strays: list[str] = []
    for argument in rest:
        if argument.startswith(("--config.", "--noconfig.")):
            overrides.append(argument)
        elif overrides and not strays and "=" not in overrides[-1] and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
        else:
            strays.append(argument)
    return overrides, strays


def make_parser() -> Parser:
    parser = Parser(
        prog="sora-jax",
        description="Train a small Sora, measure it, and sample videos from text.",
        epilog="""examples:
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart
  sora-jax sample --checkpoint=runs/quickstart/dit --prompt="a red circle moves left" --out=red.mp4
  sora-jax VERB --help

environment:
  SORA_JAX_CACHE  folder of compiled programs (default: ~/.cache/sora_jax/xla); JAX's own JAX_* variables come first""",
    )
    parser.add_argument(
        "--version", action="version", version=f"sora_jax {sora_jax.__version__}", help="print the version"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, title="verbs")
    for add in (
        _add_train,
        _add_study,
        _add_plan,
        _add_sample,
        _add_caption,
        _add_evaluate,
        _add_inspect,
        _add_export,
        _add_import,
    ):
        add(verbs)
    return parser


def _add_verb(verbs: Any, name: str, summary: str, description: str, epilog: str) -> Parser:
    parser = verbs.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(verb=name, parser=parser)
    return parser


def _add_run_flags(parser: Parser) -> None:
    _add_config_flag(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=_path,
        metavar="DIR",
        help="folder for checkpoints, metrics and samples (required); resumed from if it holds a checkpoint",
    )


def _add_config_flag(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="Python file whose get_config(), or get_config(ARG), returns the whole config (required)",
    )
    # argparse never meets this flag, it is one for every key of the file; here it is for the help alone.
    group = parser.add_argument_group("config keys")
    group.description = (
        "--config.KEY=VALUE sets a key of that file, such as --config.loop.steps=500 or\n"
        "--config.vae_train.crop='(9, 32, 32)'; repeatable (default: what the file says)"
    )


def _add_checkpoint(parser: Parser, instead: str = "") -> None:
    """instead: what else may say it."""
    parser.add_argument(
        "--checkpoint",
        required=not instead,
        type=_path,
        metavar="DIR",
        help=f"work dir of a trained diffusion transformer, or one step in it (required{instead})",
    )


def _add_sampler(parser: Parser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="how much to insist on the prompt, 1 = no guidance; where video goes on from given video at most "
        "config.sampler.guidance_going_on (default: the checkpoint's config.sampler.guidance)",
    )
    parser.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help="steps of the sampler (default: the checkpoint's config.sampler.steps)",
    )
    parser.add_argument(
        "--method",
        choices=("euler", "heun"),
        help="how a step is made; heun evaluates the model twice (default: the checkpoint's config.sampler.method)",
    )
    for name, kind, metavar, words in (
        ("guidance_going_on", float, "X", "most guidance of what goes on from more than one given frame"),
        ("guidance_interval", _interval, "LOW,HIGH", "times, 0 (data) to 1 (noise), at which there is guidance"),
        ("guidance_rescale", float, "X", "how much of the contrast that guidance adds is taken back, 0 to 1"),
        ("shift", float, "X", "above 1 spends more of the steps near noise, as larger videos need"),
        ("restart", float, "X", "share of the steps that is taken once more, from what was made and new noise"),
        ("base_tokens", int, "N", "tokens of the clip that shift is for; larger ones are shifted more, 0 = all alike"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=f"{words} (default: the checkpoint's config.sampler.{name})"
        )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        default={},
        metavar="AXIS=N,...",
        help="devices along data, fsdp, tensor and sequence, such as fsdp=4,tensor=2 (default: all along data)",
    )


def _add_train(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "train",
        "train one stage: the VAE, the diffusion transformer or the captioner",
        "Train one stage: the VAE, the diffusion transformer or the captioner.\n"
        "The same command again resumes from the newest checkpoint.",
        """examples:
  sora-jax train --config=experiments/quickstart.py:vae --workdir=runs/vae
  sora-jax train --config=experiments/quickstart.py:dit --config.vae_checkpoint=runs/vae --workdir=runs/dit
  sora-jax train --config=experiments/quickstart.py:vae --config.loop.steps=50 --workdir=runs/short
  sora-jax train --config=experiments/dit.py:full --workdir=/shared/dit --coordinator=host0:8476 --processes=2 --process=0""",
    )
    _add_run_flags(parser)
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="N:M",
        help="write a profile of steps N to M into DIR/profile; SIGUSR1 asks for one of the next 5 steps (default: only by signal)",
    )
    parser.add_argument(
        "--hang_seconds",
        type=_seconds,
        default=600.0,
        metavar="X",
        help="where no step, evaluation or save finishes for so long, show the stacks of all threads, also in DIR/stacks.txt, and "
        "go on; 0 = never; SIGUSR2 shows them at once (default: %(default)g)",
    )
    group = parser.add_argument_group(
        "several processes",
        "The same command on every machine, with a --workdir that all of them see. Where one dies the others stop within\n"
        f"seconds with exit code {LOST}; started again they resume.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the first process listens (default: one process)"
    )
    group.add_argument("--processes", type=_count, metavar="N", help="how many there are (required with --coordinator)")
    group.add_argument(
        "--process", type=int, metavar="I", help="which one this is, from 0 (required with --coordinator)"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes by the environment: Slurm, Open MPI, a TPU pod, Kubernetes or JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID (default: one process)",
    )


def _add_study(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "study",
        "train several stages, measure them and write a report",
        "Train the stages of a study in order, measure the result and write DIR/report.html and DIR/report.json.\n"
        "The same command again resumes.",
        """examples:
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart
  sora-jax study --config=experiments/quickstart.py --config.stages.dit.loop.steps=400 --workdir=runs/short
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart --dry_run""",
    )
    _add_run_flags(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print size, steps, FLOPs and about the time of every stage, refuse what cannot work, and train nothing "
        "(default: train)",
    )


def _add_sample(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "sample",
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
  sora-jax sample --manifest=out/manifest.json --outdir=again
  sora-jax sample --checkpoint=runs/quickstart/dit --prompts_file=prompts.txt --vbench=vbench""",
    )
    _add_checkpoint(parser, ", but with --manifest the step that it names")
    asked = parser.add_argument_group("what to make")
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; repeatable (default: none)")
    asked.add_argument(
        "--prompts_file", type=_path, metavar="FILE", help="file with one prompt per line (default: none)"
    )
    asked.add_argument(
        "--requests",
        type=_path,
        metavar="FILE",
        help="JSON, JSON lines or YAML file of requests, whose keys are the names of these flags (default: none)",
    )
    asked.add_argument(
        "--manifest", type=_path, metavar="FILE", help="a manifest, whose files are made again (default: none)"
    )
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument(
        "--out",
        type=_path,
        metavar="FILE",
        help="file to write (required, or --outdir or --vbench): .mp4 or .gif, which several videos turn into FILE-0, FILE-1, ...; "
        "or .png, frames side by side, all videos on one sheet",
    )
    out.add_argument(
        "--outdir",
        type=_path,
        metavar="DIR",
        help="folder to write to, for --requests and --manifest: 000.mp4, 001.png, ... and manifest.json (required, or --out)",
    )
    out.add_argument(
        "--vbench",
        type=_path,
        metavar="DIR",
        help="new folder for five videos of every prompt as VBench reads them (required, or --out)",
    )
    size = parser.add_argument_group("size")
    size.add_argument(
        "--height", type=_count, metavar="PIXELS", help="height (default: of the first size that was trained on)"
    )
    size.add_argument(
        "--width", type=_count, metavar="PIXELS", help="width (default: of the first size that was trained on)"
    )
    size.add_argument(
        "--frames",
        type=_count,
        metavar="N",
        help="number of frames, 1 for an image, or how many are added to a video (default: of the longest clips that were "
        "trained on; what is added, half of them)",
    )
    size.add_argument("--seconds", type=float, metavar="X", help="the same in seconds (default: --frames)")
    size.add_argument(
        "--fps", type=_rate, metavar="X", help="frames per second (default: the first rate that was trained on)"
    )
    size.add_argument(
        "--window",
        type=_count,
        metavar="N",
        help="frames that are made at once; longer videos are made piece by piece, each from the end of the one before "
        "(default: of the longest clips that were trained on)",
    )
    parser.add_argument("--seed", type=_seed, metavar="N", help="seed of a prompt's first sample (default: 0)")
    parser.add_argument(
        "--samples",
        type=_count,
        metavar="N",
        help="videos per prompt, of seeds --seed, --seed + 1, ... (default: 1, for --vbench the 5 that it needs)",
    )
    _add_modes(parser)
    _add_sampler(parser)
    parser.add_argument(
        "--scale",
        type=_count,
        metavar="N",
        help=f"enlarge every pixel to N x N (default: what makes a video at least {SHOWN_WIDTH} pixels wide; "
        "for --vbench 1)",
    )


def _add_modes(parser: Parser) -> None:
    """What a video is made from beside text."""
    modes = parser.add_argument_group(
        "from an image or a video", "one of the first eight; none of them is a model or a sampler of its own"
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
        beside.add_argument(f"--{name}", type=_count, metavar="PIXELS", help="for --outpaint (default: 0)")
    beside.add_argument("--factor", type=_count, metavar="N", help="for --interpolate (default: 2)")
    beside.add_argument(
        "--draft",
        type=float,
        metavar="X",
        help="make the video at this share of its size first, and then in full from it (default: no draft)",
    )
    beside.add_argument("--fit", choices=("crop", "letterbox"), help="how inputs come to the size (default: crop)")
    beside.add_argument("--start", type=float, metavar="SECONDS", help="where the video begins to be used (default: 0)")
    beside.add_argument("--end", type=float, metavar="SECONDS", help="where it ends to be used (default: its end)")
    beside.add_argument(
        "--known_guidance",
        type=float,
        metavar="X",
        help="how much to insist on what is given, 1 = no guidance (default: the checkpoint's config.sampler.known_guidance, "
        "and 1 in windows of a long video that only go on from what was made)",
    )


def _add_plan(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "plan",
        "tell what a run needs on hardware that is not there",
        "Compile the real training step of a diffusion transformer, or its sampler, for a topology, on any machine, and tell\n"
        "its memory, collectives, time by a roofline, and what the whole run takes. TPUs need libtpu: pip install -e '.[tpu]'.",
        """examples:
  sora-jax plan --config=experiments/dit.py:7b --topology=v5p:4x4x8 --vae=experiments/vae.py:video
  sora-jax plan --config=experiments/dit.py:0.7b --topology=v5e:2x4 --vae=experiments/vae.py:video --search=6
  sora-jax plan --config=experiments/dit.py:7b --topology=v5p:4x4x8 --vae=experiments/vae.py:video --sampler
  sora-jax plan --config=experiments/dit.py:compact --topology=cpu:8 --vae=experiments/vae.py:compact --config.pack.rows=8""",
    )
    _add_config_flag(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="v4, v5e, v5p, v6e with a shape, h100:NODESxGPUS or cpu:N (required)",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE[:ARG]",
        help="config of the VAE that will be trained (default: that of the checkpoint at config.vae_checkpoint)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--search",
        type=_count,
        metavar="N",
        help="compile and rank the N most promising meshes, remat policies, batches and rows (default: the config's alone)",
    )
    what.add_argument(
        "--sampler",
        action="store_true",
        help="plan the sampling of the config's longest clips, without text encoder and VAE (default: plan training)",
    )
    parser.add_argument("--out", type=_path, metavar="FILE", help="write the numbers as JSON (default: only print)")
    parser.add_argument("--page", type=_path, metavar="FILE", help="write a page of HTML (default: none)")


def _add_evaluate(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "evaluate",
        "measure how well a trained model does what it is told",
        "Sample held-out prompts from a trained diffusion transformer and measure them: adherence by attribute with its\n"
        "floor and ceiling; where its weights are installed the Frechet distance FD-MobileNetV2 of samples without\n"
        "guidance, from real clips and from real clips through the VAE; and with the weights of I3D the true FVD.",
        """examples:
  sora-jax evaluate --checkpoint=runs/quickstart/dit
  sora-jax evaluate --checkpoint=runs/quickstart/dit --prompts=2048 --out=scores.json
  sora-jax evaluate --checkpoint=runs/quickstart/dit --i3d_weights=rgb_imagenet.pt""",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--prompts", type=_count, default=512, metavar="N", help="held-out prompts to sample (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of the first prompt's sample (default: %(default)s)"
    )
    _add_sampler(parser)
    parser.add_argument(
        "--i3d_weights",
        type=_path,
        metavar="FILE",
        help="I3D of Kinetics-400 as .pt, .pth, .safetensors or .npz with the names of its PyTorch port (default: no FVD)",
    )
    parser.add_argument(
        "--fvd_videos",
        type=_count,
        metavar="N",
        help="videos a side for FVD; other numbers than the published one are biased and named (default: 2048)",
    )
    parser.add_argument("--out", type=_path, metavar="FILE", help="JSON file to write (default: only print)")


def _add_caption(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "caption",
        "say in words what videos and images show",
        "Write a caption of each file with a trained captioner, one a line. Files of any size are fitted to whole cells of the\n"
        "model's VAE (told).",
        """examples:
  sora-jax train --config=experiments/captioner.py --workdir=runs/captioner
  sora-jax caption clip.mp4 picture.png --checkpoint=runs/captioner
  sora-jax caption clips/*.mp4 --checkpoint=runs/captioner --out=captions.json""",
    )
    parser.add_argument("files", type=_path, nargs="+", metavar="FILE", help="videos or images (required)")
    parser.add_argument(
        "--checkpoint",
        type=_path,
        required=True,
        metavar="DIR",
        help="work dir of a trained captioner, or one step in it (required)",
    )
    parser.add_argument("--out", type=_path, metavar="FILE", help="JSON file of captions by file (default: only print)")


def _add_export(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "export",
        "write averaged weights as safetensors",
        "Write the averaged weights of a checkpoint as model.safetensors, with config.json and a model card (README.md).",
        """examples:
  sora-jax export runs/quickstart/dit --out=red-circles
  sora-jax import red-circles --workdir=runs/red-circles""",
    )
    parser.add_argument("path", metavar="PATH", help="a work dir, for its newest step, or one step in it (required)")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="folder to make (required)")


def _add_import(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "import",
        "make a checkpoint of exported weights",
        "Make a checkpoint of what `sora-jax export` wrote, to sample and evaluate; it cannot be trained on.\n"
        "Every array is held against its fingerprint.",
        """examples:
  sora-jax import red-circles --workdir=runs/red-circles""",
    )
    parser.add_argument("folder", type=_path, metavar="DIR", help="folder that export made (required)")
    parser.add_argument(
        "--workdir", type=_path, required=True, metavar="DIR", help="where the checkpoint goes (required)"
    )


def _add_inspect(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "inspect",
        "show what a checkpoint holds",
        "Show a checkpoint's step, arrays (shapes, dtypes, counts) and config, verify it, or compare it with another.\n"
        "Takes no accelerator, and without --verify and --diff reads no array.",
        """examples:
  sora-jax inspect runs/quickstart/dit
  sora-jax inspect runs/quickstart/dit/1600 --depth=-1
  sora-jax inspect runs/quickstart/vae --json | jq .num_parameters
  sora-jax inspect runs/quickstart/dit --verify
  sora-jax inspect runs/a --diff=runs/b --depth=3""",
    )
    parser.add_argument("path", metavar="PATH", help="a work dir, for its newest step, or one step in it (required)")
    parser.add_argument(
        "--depth",
        type=int,
        default=2,
        metavar="N",
        help="levels of modules that get a row of their own, -1 for every array (default: %(default)s)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--json", action="store_true", help="print all of it, every array, as JSON (default: a page of text)"
    )
    what.add_argument(
        "--verify",
        action="store_true",
        help="read every array and hold it against its fingerprint; exits with 1 if one differs (default: read none)",
    )
    what.add_argument(
        "--diff",
        metavar="OTHER",
        help="show what changed from PATH to OTHER: meta, and arrays by norm (default: show PATH)",
    )


def _path(text: str) -> Path:
    # A Path of gs://bucket would be a folder of this machine by the name of gs:.
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address; mount what is there (gcsfuse, NFS) and give a path, for a work dir one that all processes see"
        )
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 0..{MAX_SEED}")
    return int(text)


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    with contextlib.suppress(ValueError):
        return float(low), float(high)
    raise argparse.ArgumentTypeError(f"{text!r} is no interval of times, such as 0.1,0.8")


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a first and a last step, counted from 1, such as 10:14")
    if int(last) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} holds no step: the first comes after the last")
    return int(first), int(last)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= LONGEST_SECONDS:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds in 0..{LONGEST_SECONDS:g}")


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not axis or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not an axis with its size, such as fsdp=4")
        sizes[axis] = int(size)
    return sizes

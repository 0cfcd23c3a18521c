"""The command sora-jax: train, study, sample, evaluate, inspect, export, import. The one module with flags.

Nothing heavy is imported before a verb needs it: help and refusals come at once. What a user can get wrong ends in one
sentence and exit code 2, what a run can (divergence, a damaged checkpoint) in one sentence and 1, an interrupt in one
and 130; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import sora_jax

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from sora_jax.checkpoint import Description
    from sora_jax.config import CaptionerRun, DiTRun, Run, VAERun
    from sora_jax.data.worlds.world import WorldConfig
    from sora_jax.diffusion.sampler import SamplerConfig
    from sora_jax.generate import manifest, requests
    from sora_jax.generate.pipeline import Pipeline

USER_ERROR, RUN_ERROR, INTERRUPTED, TERMINATED = 2, 1, 130, 143
LOST = 75  # processes.LOST, known here without jax
SUFFIXES = (".mp4", ".gif", ".png")
# Videos are enlarged to about this width unless --scale says otherwise: 32 pixels are hard to watch.
SHOWN_WIDTH = 256
SHEET_FRAMES = 8
# Prompts whose videos for VBench are held at a time.
VBENCH_PROMPTS = 8
# What faulthandler still counts, and more than anyone waits.
LONGEST_SECONDS = 1e6
# Seeds are int32 on the device.
MAX_SEED = 2**31 - 1
MAX_PROMPT_BYTES = 2**26


class Failure(Exception):
    """A sentence for the user and its exit code; prog is the command that refuses, if not the running one."""

    def __init__(self, message: object, code: int = USER_ERROR, prog: str | None = None) -> None:
        # What a file says of itself may be in it, and could steer a terminal.
        super().__init__("".join(each if each.isprintable() else "?" for each in " ".join(str(message).split())))
        self.code, self.prog = code, prog


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Without argv it is the whole process, of sys.argv."""
    if argv is not None:
        return _run(argv)
    try:
        code = _run(sys.argv[1:])
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = RUN_ERROR
    if code in (INTERRUPTED, TERMINATED) or (code and _one_of_several()):
        # Saves are atomic, so nothing is lost; but orbax's threads would wait minutes for one that was cut short, and jax for
        # the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _one_of_several() -> bool:
    processes = sys.modules.get("sora_jax.processes")
    return processes is not None and processes.several()


def _run(argv: Sequence[str]) -> int:
    prog = "sora-jax"
    try:
        arguments = parse(argv)
        prog = arguments.parser.prog
        with _logging_to_stderr():
            arguments.verb(arguments)
    except Failure as failure:
        print(f"{failure.prog or prog}: error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print(f"{prog}: error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough; Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUN_ERROR
    except SystemExit as exit:  # --help and --version
        return int(exit.code or 0)
    return 0


# Flags --------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one sentence and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; see {self.prog} --help", prog=self.prog)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a verb, with verb (its function), parser, overrides (['--config.a.b=value']) and command."""
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


def _add_verb(verbs: Any, name: str, verb: Any, summary: str, description: str, epilog: str) -> Parser:
    parser = verbs.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(verb=verb, parser=parser)
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
        train,
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
        study,
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
        plan,
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
        evaluate,
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
        caption,
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
        export,
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
        import_,
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
        inspect,
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


# Process -------------------------------------------------------------------------------------------------------------


def prepare_jax() -> None:
    """Sets what jax and XLA read from the environment when they are imported; what the user has set stays.

    The huge pages of glibc (GLIBC_TUNABLES) cannot be set here: they must be there before the process starts.
    """
    # Warnings and chatter of XLA's C++ side are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Compiled programs are kept between processes: 2.5 s for a training step become 0.1 s. By default jax would keep
    # only those that took a second, and small models are made of many that took less.
    cache = Path(os.environ.get("SORA_JAX_CACHE") or Path.home() / ".cache" / "sora_jax" / "xla")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written: slower, but no reason to stop
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


class _Plain(logging.Formatter):
    """Messages alone; warnings and worse say so."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Shows what sora_jax logs from INFO on, and what libraries log from WARNING on."""
    ours = str(Path(sora_jax.__file__).parent)

    def told(record: logging.LogRecord) -> bool:
        """Orbax's threads log, with tracebacks, what its call raises, too, and we say in a sentence."""
        return bool(record.exc_info) and "orbax" in record.pathname

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())

    def shown(record: logging.LogRecord) -> bool:
        # By file: parts of sora_jax and of the libraries share the root logger, and absl's is shared by orbax and grain.
        if record.levelno >= logging.WARNING:
            return record.pathname.startswith(ours) or not told(record)
        # What all processes do, the first one says.
        processes = sys.modules.get("sora_jax.processes")
        first = processes is None or not processes.several() or processes.is_first()
        return first and record.pathname.startswith(ours)

    handler.addFilter(shown)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def _errors_for_users(*kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions whose messages are written for users into a Failure.

    These are ConfigError, MeshError, a checkpoint that is damaged, of another model or cannot be read, another file that is
    none, a missing one, and `kinds`. ValueError may be one of them only around code that validates what the user gave: anywhere
    else it is a bug.
    """
    from sora_jax import checkpoint, config, disk, sharding

    refused: tuple[type[Exception], ...] = (
        config.ConfigError,
        sharding.MeshError,
        disk.FileError,
        checkpoint.MismatchError,
        *kinds,
    )

    try:
        yield
    except (checkpoint.CorruptCheckpointError, checkpoint.ReadError) as error:
        raise Failure(error, RUN_ERROR) from error
    except FileNotFoundError as error:
        # Our own have a sentence, the system's an errno: a file that we should have made ourselves.
        if error.errno is not None:
            raise
        raise Failure(error) from error
    except refused as error:
        raise Failure(error) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot make the folder {folder}: {error.strerror}") from error


def _refuse_file(path: str | Path) -> None:
    if os.path.isfile(path):
        raise Failure(f"{path} is a file, not a checkpoint; give a work dir, or a step in one")


# Configs -------------------------------------------------------------------------------------------------------------


def load_run(source: str, overrides: Sequence[str]) -> Run:
    """The run of FILE[:ARG] with '--config.a.b=value' applied. Raises Failure."""
    tree = _load_config(source)
    _override(tree, overrides)
    prepare_jax()
    from sora_jax import config

    with _errors_for_users():
        return config.from_config_dict(tree.to_dict())


def _load_config(source: str) -> ConfigDict:
    """What get_config returns. Raises Failure, which names the line, whatever is wrong with the file."""
    from ml_collections import ConfigDict

    name, colon, argument = source.partition(":")
    path = Path(name)
    if not path.is_file() or path.suffix != ".py":
        raise Failure(
            f"--config={source}: {name} is no Python file" if path.exists() else f"config file {name} does not exist"
        )
    with _siblings(path.resolve().parent) as folder:
        try:
            module = _execute(path.resolve())
            tree = module.get_config(*([argument] if colon else []))
        except Exception as error:
            if colon and isinstance(error, KeyError) and error.args == (argument,):
                raise Failure(f"config file {name} has no variant {argument!r}") from error
            raise Failure(f"config file {source} failed with {_told(error, folder)}") from error
    if not isinstance(tree, ConfigDict):
        raise Failure(f"config file {source}: get_config() must return a ConfigDict, not {type(tree).__name__}")
    return tree.lock()


def _execute(path: Path) -> Any:
    loader = importlib.machinery.SourceFileLoader("_sora_jax_config", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[Path]:
    """Lets a config import the files beside it, such as parts, and leaves the modules of this process as they were."""
    names = [path.stem for path in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
                del sys.modules[name]
        sys.modules.update(hidden)


def _told(error: Exception, folder: Path) -> str:
    """'NameError: name 'x' is not defined (parts.py, line 3)'; the line is the last one in the folder of the config."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)
    ]
    # A SyntaxError names its line itself.
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{'' if isinstance(error, SyntaxError) else where}"


def _override(tree: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets keys of the locked tree through ml_collections' flags. Raises Failure for an unknown key or a wrong type."""
    from absl import flags
    from ml_collections import config_flags

    current = {override: _value_at(tree, override) for override in overrides}
    # A FlagValues of its own: absl's global one belongs to whoever imports us.
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", tree, flag_values=values, sys_argv=["sora-jax", *overrides])
        values(["sora-jax", *overrides])
    except flags.IllegalFlagValueError as error:
        refused = next((override for override in overrides if str(error).startswith(f"flag {override}:")), None)
        if refused is None:
            raise Failure(str(error).removeprefix("flag ")) from error
        value = current[refused]
        raise Failure(
            f"{refused}: the value must be of type {type(value).__name__}, such as the file's {value!r}"
        ) from error
    except (flags.Error, LookupError, TypeError, ValueError, AttributeError) as error:
        # Only flags are read here, so whatever is wrong is wrong with them.
        raise Failure(f"{' '.join(overrides)}: {error}") from error


def _value_at(tree: ConfigDict, override: str) -> Any:
    """What the file says of the key of an override. Raises Failure if there is no such key."""
    from ml_collections import ConfigDict

    node, where = tree, "config"
    for key in override.split("=")[0].split(".")[1:]:
        if not isinstance(node, ConfigDict):
            raise Failure(f"{override}: {where} has no keys of its own, its value is {node!r}")
        if key not in node:
            near = difflib.get_close_matches(key, list(node), 1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(node)}"
            raise Failure(f"{override}: {where} has no key {key!r}; {hint}")
        node, where = node[key], f"{where}.{key}"
    if node is None:
        raise Failure(f"{override}: {where} is None in the file and can only be set there")
    if isinstance(node, ConfigDict):
        raise Failure(f"{override}: {where} is a group; set its keys, which are {', '.join(node)}")
    return node


# Verbs ---------------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Trains the stage of --config in --workdir, or goes on with it."""
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import checkpoint, config, processes, signals
    from sora_jax.data import loader
    from sora_jax.train import loop, watch

    if isinstance(run, config.StudyRun):
        name = arguments.config.partition(":")[0]
        raise Failure(
            f"{arguments.config} is a study; use sora-jax study, or train a stage: {_variants(name, run.stages)}"
        )
    if arguments.profile and arguments.profile[0] > run.loop.steps:
        first, last = arguments.profile
        raise Failure(f"--profile={first}:{last} begins after the run's last step, {run.loop.steps}")
    options = watch.Options(arguments.profile, arguments.hang_seconds)
    _make_folder(arguments.workdir)
    try:
        with _meeting(arguments), signals.handled():
            task = _task(run, arguments.workdir)
            with _errors_for_users():
                loop.fit(task, arguments.workdir, options)
    except (loop.DivergedError, checkpoint.SaveError, loader.LoaderError) as error:
        raise Failure(error, RUN_ERROR) from error
    except KeyboardInterrupt as interrupt:
        step = checkpoint.latest_step(arguments.workdir)
        kept = "nothing was saved yet, the same command starts anew"
        raise Failure(
            f"{_interrupted(interrupt)}; {kept if step is None else f'the same command resumes from step {step}'}",
            getattr(interrupt, "code", INTERRUPTED),
        ) from None
    if processes.is_first():
        print(f"trained: {arguments.workdir}")


def _interrupted(error: KeyboardInterrupt) -> str:
    """'stopped by SIGTERM', or 'interrupted' where signals were not handled."""
    return str(error) or "interrupted"


@contextlib.contextmanager
def _meeting(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a run, if the flags say that there are any, and leaves them in order."""
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if given == (None, None, None) and not arguments.distributed:
        yield
        return
    if None in given and not arguments.distributed:
        raise Failure("--coordinator, --processes and --process go together; or give --distributed")
    from sora_jax import processes, signals

    try:
        processes.start(*given)
    except (RuntimeError, ValueError) as error:
        raise Failure(f"the processes did not meet: {error}", RUN_ERROR) from error
    try:
        yield
    except signals.Stopped:
        # This process ends without jax's own leave-taking, which ends the others' if it comes first.
        processes.leave(together=True)
        raise
    processes.leave()


def _task(run: VAERun | DiTRun | CaptionerRun, workdir: Path) -> Any:
    """The task of a run; refuses a mesh that the devices do not fill and a VAE that is not there."""
    from sora_jax import checkpoint, config, sharding
    from sora_jax.train import captioner, dit, vae

    with _errors_for_users():
        sharding.make_mesh(run.mesh)
    with _errors_for_users(ValueError):
        if not isinstance(run, config.VAERun):
            _refuse_file(run.vae_checkpoint)
            checkpoint.read_meta(run.vae_checkpoint)
    with _errors_for_users():
        if isinstance(run, config.VAERun):
            return vae.VAETask(run)
        return dit.DiTTask(run, workdir) if isinstance(run, config.DiTRun) else captioner.CaptionerTask(run, workdir)


def _variants(name: str, stages: Iterable[str]) -> str:
    return " or ".join(f"--config={name}:{stage}" for stage in stages)


def study(arguments: argparse.Namespace) -> None:
    """Trains the stages of --config in --workdir, or goes on with them, and writes the report."""
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import checkpoint, config, signals
    from sora_jax.data import loader
    from sora_jax.train import loop

    if not isinstance(run, config.StudyRun):
        raise Failure(f"{arguments.config} is a single stage, not a study; use sora-jax train")
    from sora_jax.study import dry_run, runner

    with _errors_for_users():
        stages = dry_run.plan(run)
    if arguments.dry_run:
        print(dry_run.table(stages, dry_run.matmul_speed()))
        return
    _make_folder(arguments.workdir)
    try:
        with _errors_for_users(), signals.handled():
            runner.run(run, arguments.workdir, arguments.command)
    except (loop.DivergedError, checkpoint.SaveError, loader.LoaderError) as error:
        raise Failure(error, RUN_ERROR) from error
    except KeyboardInterrupt as interrupt:
        message = f"{_interrupted(interrupt)}; the same command goes on from the newest checkpoint of each stage"
        raise Failure(message, getattr(interrupt, "code", INTERRUPTED)) from None


@dataclasses.dataclass(frozen=True)
class Video:
    """One video to make and the file it goes to."""

    prompt: str
    seed: int
    path: Path


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
    with _errors_for_users(ValueError):
        if arguments.manifest is not None:
            _refuse_flags(arguments, "--manifest says it all", "seed", *_ORDER_FLAGS, *_SAMPLER_FLAGS, "scale")
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
        with _errors_for_users(ValueError):
            manifest.check_fingerprint(kept, fingerprint)
            settings = config.sampler_config(kept.settings)
        for line in manifest.differences(kept, sora_jax.__version__, versions):
            logging.warning("%s", line)
    world = pipeline.run.data.world
    with _errors_for_users(ValueError):
        jobs = pipeline.prepare(orders)
    stills = [job.size.frames == 1 for job in jobs]
    videos = again or arrange(orders, stills, arguments.out, arguments.outdir)
    if replaced := {video.path.resolve() for video in videos} & {Path(path).resolve() for path in inputs}:
        raise Failure(f"{replaced.pop()} is an input, which the output would replace; choose another name")
    if arguments.out is not None and told.exists():
        with _errors_for_users(ValueError):
            beside = [told.with_name(name) for name in manifest.read(told).files]
        if others := [path for path in beside if path.suffix != arguments.out.suffix and path.exists()]:
            raise Failure(f"{told} says how {others[0]} was made and would be replaced; choose another name")
    for line in dict.fromkeys(line for job in jobs for line in job.told):
        logging.info("%s", line)
    for size in dict.fromkeys(job.size for job in jobs):
        warn_of(size, world)
    _make_folder(told.parent)
    _tell_mesh(pipeline)
    sizes = ", ".join(dict.fromkeys(str(job.size) for job in jobs))
    logging.info("sampling %d of %s", len(jobs), sizes)
    made = pipeline.make(jobs, settings)
    scale = kept.scale if kept else arguments.scale or math.ceil(SHOWN_WIDTH / max(job.size.width for job in jobs))
    with _errors_of_writing(told):
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


# Flags that are keys of an order.
_ORDER_FLAGS = (
    *(
        "height",
        "width",
        "frames",
        "seconds",
        "fps",
        "samples",
        "image",
        "extend",
        "direction",
        "connect",
        "loop",
        "edit",
    ),
    *(
        "strength",
        "inpaint",
        "mask",
        "outpaint",
        "left",
        "right",
        "top",
        "bottom",
        "interpolate",
        "factor",
        "draft",
        "fit",
    ),
    *("start", "end", "window", "known_guidance"),
)
# Those of them that VBench's videos cannot have.
_BEYOND_SIZE = tuple(name for name in _ORDER_FLAGS if name not in ("height", "width", "frames", "fps", "samples"))
# Flags that are keys of the sampler.
_SAMPLER_FLAGS = (
    "guidance",
    "steps",
    "method",
    "guidance_going_on",
    "guidance_interval",
    "guidance_rescale",
    "shift",
    "restart",
    "base_tokens",
)


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
    with _errors_for_users(FileExistsError):
        vbench.new_folder(folder)
    seeds = _seeds(arguments.seed or 0, count)
    pipeline, _, settings = _loaded(arguments.checkpoint, arguments)
    from sora_jax.data import pack
    from sora_jax.generate import files
    from sora_jax.generate.pipeline import Request

    size = size_of(arguments, pipeline.usual_size)
    with _errors_for_users(ValueError):  # a size that cannot be made
        shape = pipeline.vae_config.latent_shape(size.frames, size.height, size.width)
        pack.grid_shape(shape, pipeline.run.dit.patch)
    warn_of(size, pipeline.run.data.world)
    _tell_mesh(pipeline)
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

    with _errors_of_writing(folder):
        print(vbench.export(folder, samples(), size.fps, write_video))


def _loaded(source: Path, arguments: argparse.Namespace) -> tuple[Pipeline, tuple[Path, int | None], SamplerConfig]:
    """The model with its work dir and step, and the sampler that the flags ask for."""
    pipeline, place = _load(source, arguments.mesh)
    return pipeline, place, _settings(pipeline, arguments)


@contextlib.contextmanager
def _errors_of_writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot write {error.filename or path}: {error.strerror}", RUN_ERROR) from error


def _seeds(first: int, count: int) -> list[int]:
    if first + count - 1 > MAX_SEED:
        raise Failure(f"--seed={first} with --samples={count} goes beyond {MAX_SEED}; choose a smaller seed")
    return list(range(first, first + count))


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a run needs on a topology."""
    kind, _, devices = arguments.topology.partition(":")
    if kind == "cpu" and devices.isdecimal():
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", devices)
    # Nothing is computed: no chip of this machine is claimed.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import config
    from sora_jax.generate import files, pipeline
    from sora_jax.plan import page, roofline, search, text, topology
    from sora_jax.train import dit

    if not isinstance(run, config.DiTRun):
        raise Failure(f"{arguments.config} is no diffusion transformer; plans are of those")
    with _errors_for_users(ValueError):
        if arguments.vae is None:
            _refuse_file(run.vae_checkpoint)
            network = pipeline.load_vae_config(Path(run.vae_checkpoint))
        else:
            other = load_run(arguments.vae, [])
            if not isinstance(other, config.VAERun):
                raise Failure(f"--vae={arguments.vae} is no VAE")
            network = other.vae
        where = topology.target(arguments.topology)
        run = dit.resolve(run)
        if arguments.sampler:
            numbers = roofline.plan_sampler(run, network, where)
        elif arguments.search is None:
            numbers = roofline.plan(run, network, where)
        else:
            ranked = search.search(run, network, where, arguments.search)
            if not ranked:
                raise Failure("no mesh, remat policy and batch size works; see the reasons above")
            print(text.ranking(ranked), end="\n\n")
            numbers = ranked[0]
    print(text.table(numbers))
    for path, content in (
        (arguments.out, lambda: json.dumps(numbers | {"command": arguments.command}, indent=2) + "\n"),
        (arguments.page, lambda: page.page(numbers, arguments.command)),
    ):
        if path is not None:
            with _errors_of_writing(path):
                files.write_atomically(path, content().encode())
    if not numbers["verdict"]["fits"]:
        raise Failure(f"the {'sampler' if arguments.sampler else 'run'} does not fit this topology", RUN_ERROR)


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the scores of a trained model, and writes them as JSON."""
    if arguments.fvd_videos is not None and arguments.i3d_weights is None:
        raise Failure("--fvd_videos is for FVD; give --i3d_weights too")
    if arguments.out is not None and arguments.out.is_dir():
        raise Failure(f"--out={arguments.out} is a folder; name a file in it")
    pipeline, (_, step) = _load(arguments.checkpoint, arguments.mesh)
    settings = _settings(pipeline, arguments)
    from sora_jax.evaluate import fvd
    from sora_jax.generate import files
    from sora_jax.study import judgement

    with _errors_for_users(ValueError):
        scores = judgement.evaluate(
            pipeline,
            settings,
            arguments.prompts,
            arguments.seed,
            arguments.i3d_weights,
            arguments.fvd_videos or fvd.NUM_VIDEOS,
        )
    _tell_mesh(pipeline)
    print(judgement.table(scores))
    if arguments.out is not None:
        found = {
            "checkpoint": str(arguments.checkpoint.absolute()),
            "step": step,
            "command": arguments.command,
            "sampler": dataclasses.asdict(settings),
        } | scores
        with _errors_of_writing(arguments.out):
            files.write_atomically(arguments.out, (json.dumps(found, indent=2) + "\n").encode())


def caption(arguments: argparse.Namespace) -> None:
    """Prints captions of files, and writes them as JSON."""
    if arguments.out is not None and arguments.out.is_dir():
        raise Failure(f"--out={arguments.out} is a folder; name a file in it")
    prepare_jax()
    from sora_jax import disk
    from sora_jax.generate import describe

    with _errors_for_users(ValueError):
        made = describe.load(*_parted(arguments.checkpoint))
        videos = [made.read(path) for path in arguments.files]
        for line in dict.fromkeys(line for video in videos for line in video.told):
            logging.info("%s", line)
        said = made.describe([video.frames_THWC for video in videos], [video.fps or 1.0 for video in videos])
    for path, text in zip(arguments.files, said, strict=True):
        print(f"{path}  {text}")
    if arguments.out is not None:
        content = {str(path): text for path, text in zip(arguments.files, said, strict=True)}
        with _errors_of_writing(arguments.out):
            disk.write_atomically(arguments.out, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


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


def _parted(path: Path) -> tuple[Path, int | None]:
    """The work dir and the step of a path to either; None is the newest step."""
    from sora_jax import checkpoint

    _refuse_file(path)
    if path.name.isdecimal() and int(path.name) in checkpoint.steps(path.parent):
        return path.parent, int(path.name)
    return path, None


def _load(path: Path, mesh: Mapping[str, int]) -> tuple[Pipeline, tuple[Path, int | None]]:
    """The pipeline of a work dir, or of a step in one, on a mesh of these sizes, and its work dir and step."""
    prepare_jax()
    from sora_jax import checkpoint, sharding
    from sora_jax.generate import pipeline

    path, step = _parted(path)
    with _errors_for_users(ValueError):  # a checkpoint that sora_jax did not write
        checkpoint.read_meta(path, step)
    if strange := set(mesh) - set(sharding.AXES):
        raise Failure(f"--mesh has no axis {strange.pop()!r}; its axes are {', '.join(sharding.AXES)}")
    with _errors_for_users(ValueError):  # a mesh that the devices or the model do not divide over
        devices = sharding.make_mesh(sharding.MeshConfig(**mesh))
        loaded = pipeline.load(path, step, devices)
    # Only now: loading passes over a newest step that is damaged, and renames it.
    return loaded, (path, checkpoint.latest_step(path) if step is None else step)


def _tell_mesh(pipeline: Pipeline) -> None:
    """Which devices work, where there are several."""
    if pipeline.mesh is not None and pipeline.mesh.size > 1:
        from sora_jax import sharding

        logging.info("on %d devices: %s", pipeline.mesh.size, sharding.in_words(pipeline.mesh.shape))


def _settings(pipeline: Pipeline, arguments: argparse.Namespace) -> SamplerConfig:
    """The run's sampler with the flags that were given. Raises Failure for bad ones."""
    given = {name: getattr(arguments, name) for name in _SAMPLER_FLAGS}
    with _errors_for_users(ValueError):
        return dataclasses.replace(
            pipeline.run.sampler, **{name: value for name, value in given.items() if value is not None}
        )


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


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def export(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint's averaged weights for others."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import export as exporting
    from sora_jax.train import progress

    _refuse_file(arguments.path)
    with _errors_for_users(ValueError):
        evaluations = progress.read_metrics(Path(arguments.path), "eval")
        found = {
            name: x for name, x in (evaluations or [{}])[-1].items() if name not in ("kind", "step", "total_flops")
        }
        sizes = exporting.export_weights(Path(arguments.path), arguments.out, found)
    print(f"{arguments.out}: {sizes['ema']:,} parameters in {exporting.WEIGHTS}; the model card is README.md")


def import_(arguments: argparse.Namespace) -> None:
    """Makes a checkpoint of exported weights."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import checkpoint
    from sora_jax import export as exporting
    from sora_jax.train import lock

    _make_folder(arguments.workdir)
    try:
        with _errors_for_users(ValueError), lock.locked(arguments.workdir):
            step = exporting.import_weights(arguments.folder, arguments.workdir)
    except checkpoint.SaveError as error:
        raise Failure(error, RUN_ERROR) from error
    print(f"{arguments.workdir}: step {step}, whole; sample with --checkpoint={arguments.workdir}")


def inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds, whether it is whole, or how it differs from another."""
    # A look at a checkpoint must not claim the chips of the run that writes it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import checkpoint, config

    depth = None if arguments.depth < 0 else arguments.depth
    _refuse_file(arguments.path)
    if arguments.verify:
        with _errors_for_users(ValueError):
            verified = checkpoint.verify(arguments.path)
        if verified.wrong:
            raise Failure(f"{verified.path} is damaged: {'; '.join(verified.wrong)}", RUN_ERROR)
        how = (
            "are what was saved"
            if verified.fingerprints
            else "can be read; it has no fingerprints to hold them against"
        )
        print(f"{verified.path}: all {verified.num_arrays} arrays {how}")
        return
    with _errors_for_users(ValueError):
        description = checkpoint.describe(arguments.path)
    if arguments.diff is not None:
        _refuse_file(arguments.diff)
        with _errors_for_users(ValueError):
            other = checkpoint.describe(arguments.diff)
            found = checkpoint.changes(arguments.path, arguments.diff)
        for line in config.differences(description.meta, other.meta):
            print(line)
        print(checkpoint.format_changes(found, depth))
        return
    metrics = _metrics(description)
    if not arguments.json:
        print(checkpoint.format_description(description, depth))
        for kind, last in metrics.items():
            print(f"\n{kind} metrics at step {last['step']:,}")
            print("\n".join(f"  {name}: {value:.6g}" for name, value in last.items() if isinstance(value, float)))
        return
    counts = {name: description.num_parameters(name) for name in description.items}
    print(json.dumps(dataclasses.asdict(description) | {"num_parameters": counts, "metrics": metrics}, indent=2))


def _metrics(description: Description) -> dict[str, dict[str, Any]]:
    """The last lines that the run wrote up to this step, by kind; none of a checkpoint that is not in a work dir."""
    from sora_jax.train import progress

    if description.step is None or "://" in description.path:
        return {}
    lines = {kind: progress.read_metrics(Path(description.path).parent, kind) for kind in ("train", "eval")}
    upto = {kind: [line for line in some if line["step"] <= description.step] for kind, some in lines.items()}
    return {kind: some[-1] for kind, some in upto.items() if some}


if __name__ == "__main__":
    sys.exit(run())

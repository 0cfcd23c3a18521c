"""How flags are read, and those that several verbs have. Nothing heavy is imported: help and refusals come at once."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sora_jax.cli.failures import Failure

# Seeds are int32 on the device.
MAX_SEED = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one sentence and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; see {self.prog} --help", prog=self.prog)


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a verb, with verb (its function), parser, overrides (['--config.a.b=value']) and command."""
    arguments, rest = parser.parse_known_args(argv)
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


def add_verb(verbs: Any, name: str, verb: Any, summary: str, description: str, epilog: str) -> Parser:
    parser = verbs.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(verb=verb, parser=parser)
    return parser


def add_run_flags(parser: Parser) -> None:
    add_config_flag(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=path,
        metavar="DIR",
        help="folder for checkpoints, metrics and samples (required); resumed from if it holds a checkpoint",
    )


def add_config_flag(parser: Parser) -> None:
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


def add_checkpoint(parser: Parser, instead: str = "") -> None:
    """instead: what else may say it."""
    parser.add_argument(
        "--checkpoint",
        required=not instead,
        type=path,
        metavar="DIR",
        help=f"work dir of a trained diffusion transformer, or one step in it (required{instead})",
    )


def add_sampler(parser: Parser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="how much to insist on the prompt, 1 = no guidance; where more than a first frame is given at most "
        "--guidance_going_on (default: the checkpoint's config.sampler.guidance)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        metavar="N",
        help="steps of the sampler (default: the checkpoint's config.sampler.steps)",
    )
    parser.add_argument(
        "--method",
        choices=("euler", "heun"),
        help="how a step is made; heun evaluates the model twice (default: the checkpoint's config.sampler.method)",
    )
    for name, kind, metavar, words in (
        (
            "guidance_going_on",
            float,
            "X",
            "most guidance of what is extended, led back, connected, painted or filled in",
        ),
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


def add_processes(parser: Parser, description: str) -> None:
    group = parser.add_argument_group("several processes", description)
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the first process listens (default: one process)"
    )
    group.add_argument("--processes", type=count, metavar="N", help="how many there are (required with --coordinator)")
    group.add_argument(
        "--process", type=int, metavar="I", help="which one this is, from 0 (required with --coordinator)"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes by the environment: Slurm, Open MPI, a TPU pod, Kubernetes or JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID (default: one process)",
    )


def path(text: str) -> Path:
    # A Path of gs://bucket would be a folder of this machine by the name of gs:.
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address; mount what is there (gcsfuse, NFS) and give a path, for a work dir one that all processes see"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, which manifests are; give it another name") from error
    return Path(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def pixels(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 0..{MAX_SEED}")
    return int(text)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    with contextlib.suppress(ValueError):
        return float(low), float(high)
    raise argparse.ArgumentTypeError(f"{text!r} is no interval of times, such as 0.1,0.8")


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not axis or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not an axis with its size, such as fsdp=4")
        sizes[axis] = int(size)
    return sizes

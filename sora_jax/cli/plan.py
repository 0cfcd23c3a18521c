"""The verb plan, with its flags."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli import flags
from sora_jax.cli.configs import load_run
from sora_jax.cli.failures import RUN_ERROR, Failure, errors_for_users, errors_of_writing, refuse_file

if TYPE_CHECKING:
    from sora_jax.config import DiTRun
    from sora_jax.models.vae import VAEConfig


def add_plan(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "plan",
        plan,
        "tell what a run needs on hardware that is not there",
        "Compile the real training step of a diffusion transformer, or its sampler, for a topology, on any machine, and tell\n"
        "its memory, collectives, time by a roofline, and what the whole run takes. TPUs need libtpu, pip install -e '.[tpu]',\n"
        "and GPUs CUDA's compiler, '.[cuda12]'.",
        """examples:
  sora-jax plan --config=experiments/dit.py:7b --topology=v5p:4x4x8 --vae=experiments/vae.py:video
  sora-jax plan --config=experiments/dit.py:0.7b --topology=v5e:2x4 --vae=experiments/vae.py:video --search=6
  sora-jax plan --config=experiments/dit.py:7b --topology=v5p:4x4x8 --vae=experiments/vae.py:video --sampler
  sora-jax plan --config=experiments/dit.py:compact --topology=cpu:8 --vae=experiments/vae.py:compact --config.pack.rows=8""",
    )
    flags.add_config_flag(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="v4, v5e, v5p, v6e with a shape, h100:NODESxGPUS or cpu:N (required)",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE[:ARG]",
        help="config of the VAE that will be trained (default: that of the checkpoint at config.vae_checkpoint; where there is no "
        "runs/vae-NAME yet that of vae.py:NAME beside the config, which is told)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--search",
        type=flags.count,
        metavar="N",
        help="compile and rank the N most promising meshes, remat policies, batches and rows (default: the config's alone)",
    )
    what.add_argument(
        "--sampler",
        action="store_true",
        help="plan the sampling of the config's longest clips, without text encoder and VAE (default: plan training)",
    )
    parser.add_argument(
        "--out", type=flags.path, metavar="FILE", help="write the numbers as JSON (default: only print)"
    )
    parser.add_argument("--page", type=flags.path, metavar="FILE", help="write a page of HTML (default: none)")


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a run needs on a topology."""
    kind, _, devices = arguments.topology.partition(":")
    if kind == "cpu" and devices.replace("x", "").isdecimal():
        count = math.prod(int(each) for each in devices.split("x") if each)
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(1, count)))
    # Nothing is computed: no chip of this machine is claimed.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run = load_run(arguments.config, arguments.overrides)
    from sora_jax import config
    from sora_jax.generate import files
    from sora_jax.plan import page, roofline, search, text, topology
    from sora_jax.train import dit

    if not isinstance(run, config.DiTRun):
        raise Failure(f"{arguments.config} is no diffusion transformer; plans are of those")
    with errors_for_users(ValueError):
        network = _network(arguments, run)
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
            with errors_of_writing(path):
                files.write_atomically(path, content().encode())
    if not numbers["verdict"]["fits"]:
        raise Failure(f"the {'sampler' if arguments.sampler else 'run'} does not fit this topology", RUN_ERROR)


def _network(arguments: argparse.Namespace, run: DiTRun) -> VAEConfig:
    """The shape of the run's VAE: of --vae, of its checkpoint, or where there is none yet of the config that would train it."""
    from sora_jax import config
    from sora_jax.generate import pipeline

    if arguments.vae is not None:
        other = load_run(arguments.vae, [])
        if not isinstance(other, config.VAERun):
            raise Failure(f"--vae={arguments.vae} is no VAE")
        return other.vae
    refuse_file(run.vae_checkpoint)
    try:
        return pipeline.load_vae_config(Path(run.vae_checkpoint))
    except FileNotFoundError as error:
        if error.errno is not None:
            raise
        kind, _, name = Path(run.vae_checkpoint).name.partition("-")
        beside = Path(arguments.config.partition(":")[0]).with_name("vae.py")
        if kind == "vae" and name and beside.is_file():
            logging.info("%s is not there; the VAE is planned as %s:%s has it", run.vae_checkpoint, beside, name)
            other = load_run(f"{beside}:{name}", [])
            if isinstance(other, config.VAERun):
                return other.vae
        raise Failure(
            f"{error}; a plan needs the VAE's shape alone: give its config, such as --vae=experiments/vae.py:video"
        ) from error

"""The verb plan."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from sora_jax.cli.configs import load_run
from sora_jax.cli.failures import RUN_ERROR, Failure, errors_for_users, errors_of_writing, refuse_file


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
    with errors_for_users(ValueError):
        if arguments.vae is None:
            refuse_file(run.vae_checkpoint)
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
            with errors_of_writing(path):
                files.write_atomically(path, content().encode())
    if not numbers["verdict"]["fits"]:
        raise Failure(f"the {'sampler' if arguments.sampler else 'run'} does not fit this topology", RUN_ERROR)

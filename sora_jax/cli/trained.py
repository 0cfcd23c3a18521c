"""Trained models by their paths, on the mesh and with the sampler of the flags."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sora_jax.cli.failures import Failure, errors_for_users, refuse_file
from sora_jax.cli.process import prepare_jax

if TYPE_CHECKING:
    from sora_jax.diffusion.sampler import SamplerConfig
    from sora_jax.generate.pipeline import Pipeline

# Flags that are keys of the sampler.
SAMPLER_FLAGS = (
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


def parted(path: Path) -> tuple[Path, int | None]:
    """The work dir and the step of a path to either; None is the newest step."""
    from sora_jax import checkpoint

    refuse_file(path)
    if path.name.isdecimal() and int(path.name) in checkpoint.steps(path.parent):
        return path.parent, int(path.name)
    return path, None


def load(path: Path, mesh: Mapping[str, int]) -> tuple[Pipeline, tuple[Path, int | None]]:
    """The pipeline of a work dir, or of a step in one, on a mesh of these sizes, and its work dir and step."""
    prepare_jax()
    from sora_jax import checkpoint, sharding
    from sora_jax.generate import pipeline

    path, step = parted(path)
    with errors_for_users(ValueError):  # a checkpoint that sora_jax did not write
        checkpoint.read_meta(path, step)
    if strange := set(mesh) - set(sharding.AXES):
        raise Failure(f"--mesh has no axis {strange.pop()!r}; its axes are {', '.join(sharding.AXES)}")
    with errors_for_users(ValueError):  # a mesh that the devices or the model do not divide over
        devices = sharding.make_mesh(sharding.MeshConfig(**mesh))
        loaded = pipeline.load(path, step, devices)
    # Only now: loading passes over a newest step that is damaged, and renames it.
    return loaded, (path, checkpoint.latest_step(path) if step is None else step)


def mesh_in_words(pipeline: Pipeline) -> str:
    """Which devices work, where there are several, else nothing."""
    if pipeline.mesh is None or pipeline.mesh.size == 1:
        return ""
    from sora_jax import sharding

    return f"on {pipeline.mesh.size} devices: {sharding.in_words(pipeline.mesh.shape)}"


def device(pipeline: Pipeline) -> str:
    """What the pixels are computed on, and over which mesh."""
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind} x {jax.device_count()}" + (f", {words}" if (words := mesh_in_words(pipeline)) else "")


def tell_mesh(pipeline: Pipeline) -> None:
    if words := mesh_in_words(pipeline):
        logging.info("%s", words)


def load_with(source: Path, arguments: argparse.Namespace) -> tuple[Pipeline, tuple[Path, int | None], SamplerConfig]:
    """The model with its work dir and step, and its sampler with the flags that were given. Raises Failure for bad ones, before
    the model is loaded."""
    prepare_jax()
    from sora_jax.diffusion.sampler import SamplerConfig

    given = {name: value for name in SAMPLER_FLAGS if (value := getattr(arguments, name)) is not None}
    with errors_for_users(ValueError):
        SamplerConfig(**given)
    pipeline, place = load(source, arguments.mesh)
    return pipeline, place, dataclasses.replace(pipeline.run.sampler, **given)

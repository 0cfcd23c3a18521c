"""Hardware that need not be there: chips, their peaks, and devices to compile for."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from sora_jax import sharding
from sora_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip: GiB of main memory, bfloat16 FLOP/s, bytes/s of main memory, and bytes/s that it sends along one axis
    of its interconnect, both ways of a ring together."""

    memory: float
    flops: float
    bandwidth: float
    link: float


SOURCE = (
    "Google Cloud documentation of TPU versions; Austin et al., How to Scale Your Model (jax-ml.github.io/scaling-book), "
    "chapter 2"
)
CHIPS = {
    "v4": Chip(32, 275e12, 1.23e12, 9.0e10),
    "v5e": Chip(16, 197e12, 0.82e12, 9.0e10),
    "v5p": Chip(95, 459e12, 2.77e12, 1.8e11),
    "v6e": Chip(32, 918e12, 1.64e12, 1.8e11),
}
WORKER = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. chip is None for simulated CPU devices, of which no time is foretold."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def target(name: str) -> Target:
    """'v5p:4x4x8', 'v5e:2x4', 'v6e:8x8' or 'cpu:8'. Raises ConfigError for what is unknown or cannot be compiled for here."""
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or kind not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"topology {name!r} is none of {', '.join(CHIPS)} or cpu with a shape, such as v5p:4x4x8 or cpu:8"
        )
    if kind == "cpu":
        if len(jax.devices("cpu")) < int(shape):
            raise ConfigError(
                f"topology {name}: this process has {len(jax.devices('cpu'))} CPU devices; set JAX_NUM_CPU_DEVICES={shape}"
            )
        return Target(name, jax.devices("cpu")[: int(shape)], None)
    # libtpu looks for the machine's own chips unless it is told what it is.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": WORKER[kind],
    }.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:
        if "libtpu" in str(error) or "No module" in str(error) or "not found" in str(error).lower():
            raise ConfigError(f"topology {name} needs libtpu to compile for it: pip install -e '.[tpu]'") from error
        raise ConfigError(f"topology {name}: {str(error).splitlines()[0]}") from error
    return Target(name, found.devices, CHIPS[kind])


def mesh_on(devices: Sequence[Any], config: sharding.MeshConfig) -> Mesh:
    """The config's mesh laid over devices as their network lies. Raises ValueError if the sizes do not fit."""
    shape = sharding.mesh_shape(config, len(devices))
    if devices[0].platform == "cpu":
        return sharding.make_mesh(config, list(devices))
    laid = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(laid, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))

"""Hardware that need not be there: chips, their peaks, and devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from sora_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip: GiB of main memory that its compiler has for a program, bfloat16 FLOP/s, bytes/s of main memory, bytes/s
    that it sends along one axis of its interconnect, both ways of a ring together, and bytes/s to or from its host's memory. usable
    is the share of its memory that jax takes unless told otherwise."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    host: float
    usable: float = 1.0


SOURCE = (
    "Google Cloud documentation of TPU versions; Austin et al., How to Scale Your Model (jax-ml.github.io/scaling-book), "
    "chapter 2; NVIDIA H100 data sheet (SXM, dense bfloat16, NVLink, PCIe)"
)
CHIPS = {
    "v4": Chip(32, 275e12, 1.23e12, 9.0e10, 1.5e10),
    "v5e": Chip(15.75, 197e12, 0.82e12, 9.0e10, 1.5e10),
    "v5p": Chip(95, 459e12, 2.77e12, 1.8e11, 1.5e10),
    "v6e": Chip(31.25, 918e12, 1.64e12, 1.8e11, 1.5e10),
    "h100": Chip(79.14, 989e12, 3.35e12, 4.5e11, 6.4e10, usable=0.75),
}
# The environment's word on the share of a GPU's memory that jax takes.
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Several nodes of GPUs are joined by 400 Gb/s a GPU. That all that is sent goes through there is the cautious assumption.
BETWEEN_NODES = 5.0e10
# What the compiler asks of a GPU, as an XLA GpuTargetConfigProto: NVIDIA's CUDA programming guide, compute capability 9.0.
GPU = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84978434048
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Of the tori that chips are joined in.
AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# Chips of an axis that is closed to a ring: a whole pod's side where they are joined along two axes, cubes along three.
RING, CUBE = 16, 4
WORKER = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. chip is None for simulated CPU devices, of which no time is foretold; torus has the chips along each
    axis that TPUs are joined in."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    torus: tuple[int, ...] = ()

    def rate(self, mesh: Mesh, axes: str) -> float:
        """Bytes/s that a chip sends in a collective over mesh axes, 'data+fsdp' (How to Scale Your Model, chapter 2).

        What goes along several axes of the torus goes along all at once, if its chips are all of a box; otherwise it is as slow as
        along the slowest.
        """
        assert self.chip is not None
        if not self.torus:
            return self.chip.link
        group = tuple(slice(None) if name in axes.split("+") else 0 for name in mesh.axis_names)
        places = np.array([device.coords[: len(self.torus)] for device in mesh.devices[group].flat])
        cubes = all(side % CUBE == 0 for side in self.torus)
        sides = [sorted(set(along.tolist())) for along in places.T]
        ways = [
            _ways(side, count, cubes if len(self.torus) == 3 else count % RING == 0)
            for side, count in zip(sides, self.torus, strict=True)
            if len(side) > 1
        ]
        box = len(places) == math.prod(map(len, sides))
        return (sum(ways) if box else min(ways)) * self.chip.link / 2 if ways else self.chip.link


def _ways(places: Sequence[int], count: int, ring: bool) -> float:
    """In how many directions at once chips at these places of `count` in a row, or on a ring, send to each other, where as many
    share a link as there are others between them."""
    stride = max(after - before for before, after in itertools.pairwise(places))
    return (2 if ring and stride * len(places) == count else 1) / stride


def target(name: str) -> Target:
    """'v5p:4x4x8', 'v5e:2x4', 'v6e:8x8', 'h100:1x8' (nodes x GPUs) or 'cpu:8'.

    Raises ConfigError for what is unknown or cannot be compiled for here.
    """
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or kind not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"topology {name!r} is none of {', '.join(CHIPS)} or cpu with a shape, such as v5p:4x4x8 or cpu:8"
        )
    if kind in AXES and shape.count("x") + 1 != AXES[kind]:
        example = "2x4" if AXES[kind] == 2 else "4x4x8"
        raise ConfigError(f"topology {name}: chips of {kind} are joined along {AXES[kind]} axes; say {kind}:{example}")
    if kind == "cpu":
        count = math.prod(map(int, shape.split("x")))
        if len(jax.devices("cpu")) < count:
            raise ConfigError(
                f"topology {name}: this process has {len(jax.devices('cpu'))} CPU devices; set JAX_NUM_CPU_DEVICES={count}"
            )
        return Target(name, jax.devices("cpu")[:count], None)
    return _gpus(name, shape) if kind == "h100" else _tpus(name, kind)


def _tpus(name: str, kind: str) -> Target:
    # libtpu looks for the machine's own chips unless it is told what it is.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": WORKER[kind],
    }.items():
        os.environ.setdefault(key, value)
    # Both cores of a v4 are one device of jax, as those of a v5p are without being asked.
    more: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if name.partition(":")[2] == "1x1":
        more["chips_per_host_bounds"] = [1, 1, 1]  # a machine with one chip, which libtpu takes for one of four
    devices = _described(name, "libtpu", "tpu", topology_name=name, platform="tpu", **more)
    return Target(name, devices, CHIPS[kind], tuple(map(int, name.partition(":")[2].split("x"))))


def _gpus(name: str, shape: str) -> Target:
    nodes, _, each = shape.rpartition("x")
    if "x" in nodes:
        raise ConfigError(f"topology {name}: a shape of GPUs is nodes x GPUs of a node, such as h100:2x8")
    # The compiler of CUDA's programs is a package of its own; XLA looks elsewhere.
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations if package and package.submodule_search_locations else ():
        if (Path(folder) / "cuda_nvcc").is_dir() and "xla_gpu_cuda_data_dir" not in os.environ.get("XLA_FLAGS", ""):
            flag = f"--xla_gpu_cuda_data_dir={Path(folder) / 'cuda_nvcc'}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    layout = f"1x{nodes or 1}x{each}"
    devices = _described(name, "jax_plugins", "cuda12", platform="cuda", target_config=GPU, topology=layout)
    chip = CHIPS["h100"]
    if said := os.environ.get(FRACTION):
        try:
            chip = dataclasses.replace(chip, usable=float(said))
        except ValueError as error:
            raise ConfigError(f"{FRACTION} is {said!r}; it must be a share, such as 0.9") from error
    return Target(name, devices, chip if int(nodes or 1) == 1 else dataclasses.replace(chip, link=BETWEEN_NODES))


def _described(name: str, package: str, extra: str, **description: Any) -> Sequence[Any]:
    """The devices of a described topology. Raises ConfigError if the compiler for it is missing or refuses it."""
    try:
        return topologies.get_topology_desc(**description).devices
    except Exception as error:
        missing = importlib.util.find_spec(package) is None
        remedy = f"its compiler is not installed: pip install -e '.[{extra}]'; " if missing else ""
        raise ConfigError(f"topology {name}: {remedy}{str(error).splitlines()[0]}") from error

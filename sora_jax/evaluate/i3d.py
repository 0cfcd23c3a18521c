"""I3D, the network whose logits FVD compares: Inception-v1 inflated to 3-D (Carreira & Zisserman, arXiv:1705.07750).

A pure function of params, a dict from the names of units in the weight files to their arrays; x_BthwD is a grid of D
channels. The weights are the user's: `load_weights` reads the state dicts of the PyTorch port of I3D. Two are common.
i3d_pretrained_400.pt was converted from TensorFlow Hub's i3d-kinetics-400, the module that FVD was published with;
rgb_imagenet.pt is the training that began with ImageNet, so its distances are on a scale of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax
from jaxtyping import Float

from sora_jax import disk
from sora_jax.evaluate import torch_file

Params = Mapping[str, Mapping[str, Array]]
Triple = tuple[int, int, int]

NUM_CLASSES = 400  # of Kinetics-400
CELL = (8, 32, 32)  # frames and pixels a cell of the last grid
GRID = (2, 7, 7)  # cells that the last pool averages
BATCH_NORM_EPSILON = 1e-3
LOGITS = "logits"

# Widths of a module's branches: 1x1x1; 1x1x1 then 3x3x3; the same, narrower; pool then 1x1x1. They are those of the image
# network (arXiv:1409.4842, table 1), which calls the modules 3a, 3b, 4a and so on.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


# The network ---------------------------------------------------------------------------------------------------------


def logits(params: Params, clips_BTHWC: Float[Array, "B T H W 3"]) -> Float[Array, "B 400"]:
    """Kinetics-400 logits of RGB clips in [-1, 1], averaged over time: the layer that FVD compares, before any softmax.

    T is 9 frames or more, H and W 193 to 224 pixels; FVD takes 16 x 224 x 224. Raises ValueError for other sizes.
    """
    grid = tuple(-(-size // cell) for size, cell in zip(clips_BTHWC.shape[1:4], CELL, strict=True))
    if grid[0] < GRID[0] or grid[1:] != GRID[1:]:
        raise ValueError(
            f"I3D got clips of {clips_BTHWC.shape[1:4]}; it reads 9 or more frames of 193 to 224 pixels a side: "
            "resize to 224 x 224"
        )
    # The pool's windows of two grid steps overlap, so that the middle of a long clip counts twice.
    steps_BtD = features(params, clips_BTHWC).mean((2, 3))
    pooled_BD = ((steps_BtD[:, :-1] + steps_BtD[:, 1:]) / 2).mean(1)
    last = params[LOGITS]
    return jnp.matmul(pooled_BD, last["kernel"], precision=lax.Precision.HIGHEST) + last["bias"]


def features(params: Params, clips_BTHWC: Float[Array, "B T H W 3"]) -> Float[Array, "B t h w 1024"]:
    """The last grid before pooling, of clips of any size: a cell for 8 frames x 32 x 32 pixels, or for a part of that."""
    x = unit(params["Conv3d_1a_7x7"], clips_BTHWC, stride=2)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(params["Conv3d_2b_1x1"], x)
    x = unit(params["Conv3d_2c_3x3"], x)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = mixed(params, "Mixed_3b", x)
    x = mixed(params, "Mixed_3c", x)
    x = max_pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
        x = mixed(params, name, x)
    x = max_pool(x, (2, 2, 2), (2, 2, 2))
    x = mixed(params, "Mixed_5b", x)
    return mixed(params, "Mixed_5c", x)


def mixed(params: Params, name: str, x_BthwD: Array) -> Array:
    """An Inception module: four branches of one grid, side by side in the channels."""
    branches = [
        unit(params[f"{name}.b0"], x_BthwD),
        unit(params[f"{name}.b1b"], unit(params[f"{name}.b1a"], x_BthwD)),
        unit(params[f"{name}.b2b"], unit(params[f"{name}.b2a"], x_BthwD)),
        unit(params[f"{name}.b3b"], max_pool(x_BthwD, (3, 3, 3), (1, 1, 1))),
    ]
    return jnp.concatenate(branches, axis=-1)


def unit(weights: Mapping[str, Array], x_BthwD: Array, stride: int = 1) -> Array:
    """'Same' convolution without bias, batch norm in inference form (a scale and a shift a channel), ReLU."""
    y_BthwD = convolve(x_BthwD, weights["kernel"], stride)
    return jax.nn.relu(y_BthwD * weights["scale"] + weights["shift"])


def convolve(
    x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw ti o"], stride: int
) -> Float[Array, "B t2 h2 w2 o"]:
    """3-D convolution with TensorFlow's 'same' padding, whose odd zero stands behind.

    The kernel's frames (t) stand in its input channels, as the clip's do: a convolution in two dimensions is exact, and on
    the CPU the first layer takes a fifth of the time of one in three.
    """
    batch, length, _, _, inputs = x.shape
    kernel_frames = kernel.shape[2] // inputs
    ((before, after),) = lax.padtype_to_pads((length,), (kernel_frames,), (stride,), "SAME")
    x = jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))
    last = x.shape[1] - kernel_frames
    stacked = jnp.concatenate([x[:, i : i + last + 1 : stride] for i in range(kernel_frames)], axis=-1)
    y = lax.conv_general_dilated(
        rearrange(stacked, "b t h w i -> (b t) h w i"),
        kernel,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,  # a metric should not depend on the chip
    )
    return rearrange(y, "(b t) h w o -> b t h w o", b=batch)


def max_pool(x_BthwD: Array, window: Triple, stride: Triple) -> Array:
    """Greatest value of each window, with 'same' padding that never wins.

    The PyTorch port pads with zeros; as every pool here follows a ReLU, both give the same.
    """
    return lax.reduce_window(x_BthwD, -jnp.inf, lax.max, (1, *window, 1), (1, *stride, 1), "SAME")


# Weights -------------------------------------------------------------------------------------------------------------


def load_weights(path: str | Path) -> Params:
    """Parameters from a state dict of the PyTorch port of I3D: .pt or .pth, .safetensors or .npz with the same names.

    Raises FileNotFoundError if there is no such file, and ValueError, naming the tensors, if it is not an I3D for RGB
    and 400 classes or was never trained.
    """
    return from_state_dict(_read(Path(path)), str(path))


def from_state_dict(tensors: Mapping[str, np.ndarray], source: str) -> Params:
    """Parameters from the tensors of the PyTorch port, such as Mixed_3b.b1a.bn.running_mean; source is for messages.

    Raises ValueError if tensors are missing, left over, misshaped, or those of a network that was never trained.
    """
    # A count of training steps, which only newer files have.
    given = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    _check(given, source)
    params: dict[str, Mapping[str, Array]] = {}
    for name in _units():
        kernel = given[f"{name}.conv3d.weight"].astype(np.float32)
        if name == LOGITS:
            kernel_io = rearrange(kernel, "o i 1 1 1 -> i o")
            arrays = {"kernel": kernel_io, "bias": given[f"{name}.conv3d.bias"].astype(np.float32)}
        else:
            norm = {part: given[f"{name}.bn.{part}"].astype(np.float64) for part in _NORM}
            scale = norm["weight"] / np.sqrt(norm["running_var"] + BATCH_NORM_EPSILON)
            arrays = {
                "kernel": rearrange(kernel, "o i t h w -> h w (t i) o"),
                "scale": scale.astype(np.float32),
                "shift": (norm["bias"] - norm["running_mean"] * scale).astype(np.float32),
            }
        params[name] = jax.tree.map(jnp.asarray, arrays)
    return params


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PyTorch port: what a file of weights must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (kernel, inputs, outputs) in _units().items():
        shapes[f"{name}.conv3d.weight"] = (outputs, inputs, *kernel)
        if name == LOGITS:
            shapes[f"{name}.conv3d.bias"] = (outputs,)
        else:
            shapes |= {f"{name}.bn.{part}": (outputs,) for part in _NORM}
    return shapes


_NORM = ("weight", "bias", "running_mean", "running_var")


def _units() -> dict[str, tuple[Triple, int, int]]:
    """Kernel (frames, height, width), inputs and outputs of every convolution, in order."""
    point, cube = (1, 1, 1), (3, 3, 3)
    units: dict[str, tuple[Triple, int, int]] = {
        "Conv3d_1a_7x7": ((7, 7, 7), 3, 64),
        "Conv3d_2b_1x1": (point, 64, 64),
        "Conv3d_2c_3x3": (cube, 64, 192),
    }
    inputs = 192
    for name, (b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        units |= {
            f"{name}.b0": (point, inputs, b0),
            f"{name}.b1a": (point, inputs, b1a),
            f"{name}.b1b": (cube, b1a, b1b),
            f"{name}.b2a": (point, inputs, b2a),
            f"{name}.b2b": (cube, b2a, b2b),
            f"{name}.b3b": (point, inputs, b3b),
        }
        inputs = b0 + b1b + b2b + b3b
    return units | {LOGITS: (point, inputs, NUM_CLASSES)}


def _read(path: Path) -> Mapping[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; FVD needs the weights of I3D: bring i3d_pretrained_400.pt or rgb_imagenet.pt"
        )
    if path.suffix == ".npz":
        return disk.read_npz(path, torch_file.MAX_FILE_BYTES)
    if path.suffix == ".safetensors":
        return disk.read_safetensors(path, torch_file.MAX_FILE_BYTES)[0]
    return torch_file.read_state_dict(path)


def _check(given: Mapping[str, np.ndarray], source: str) -> None:
    wanted = tensor_shapes()
    faults = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "misshaped": [
            f"{name} {tuple(given[name].shape)} instead of {shape}"
            for name, shape in wanted.items()
            if name in given and tuple(given[name].shape) != shape
        ],
    }
    found = "; ".join(f"{fault} {_some(names)}" for fault, names in faults.items() if names)
    if not found and not any(given[name].any() for name in wanted if name.endswith("running_mean")):
        found = "all running means are 0, so it was never trained"
    if found:
        raise ValueError(
            f"{source} is not an I3D for RGB and {NUM_CLASSES} classes: {found}; "
            "use i3d_pretrained_400.pt or rgb_imagenet.pt of the PyTorch port of I3D"
        )


def _some(names: list[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")

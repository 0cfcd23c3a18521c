"""MobileNetV2: equal to torch, to torchvision's numbers and to a block in plain loops; frames do not see each other."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import needs_mobilenet

from sora_jax.evaluate import mobilenet, torch_file


@pytest.fixture(scope="module")
def weights():
    return mobilenet.load()


def features_of(weights, frames_NHWC):
    return np.stack(list(mobilenet.stream(weights, [frames_NHWC])))


def frames_of(rng, num_frames, height, width):
    """Noise and a coarse pattern: what a picture has of both kinds of detail."""
    coarse = rng.integers(0, 200, (num_frames, height // 8 + 1, width // 8 + 1, 3))
    coarse = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)


# Parity --------------------------------------------------------------------------------------------------------------


def torch_network(torch):
    """MobileNetV2 in torch, after table 2 of the paper, under torchvision's names."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1, groups=1):
        kernel = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return nn.Sequential(kernel, nn.BatchNorm2d(outputs), nn.ReLU6())

    class Residual(nn.Module):
        def __init__(self, inputs, outputs, stride, expansion):
            super().__init__()
            wide = inputs * expansion
            layers = [conv(wide, wide, 3, stride, wide), nn.Conv2d(wide, outputs, 1, bias=False)]
            expand = [conv(inputs, wide, 1)] if expansion > 1 else []
            self.conv = nn.Sequential(*expand, *layers, nn.BatchNorm2d(outputs))
            self.adds = stride == 1 and inputs == outputs

        def forward(self, x):
            return x + self.conv(x) if self.adds else self.conv(x)

    layers, inputs = [conv(3, 32, 3, stride=2)], 32
    table = "1 16 1 1, 6 24 2 2, 6 32 3 2, 6 64 4 2, 6 96 3 1, 6 160 3 2, 6 320 1 1"
    for expansion, outputs, blocks, stride in (map(int, row.split()) for row in table.split(",")):
        for block in range(blocks):
            layers.append(Residual(inputs, outputs, stride if block == 0 else 1, expansion))
            inputs = outputs
    network = nn.Module()
    network.features = nn.Sequential(*layers, conv(inputs, 1280, 1))
    return network.eval()


def torch_features(torch, network, frames):
    normal = (torch.tensor(np.array(frames)) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        return network.features(normal.permute(0, 3, 1, 2)).mean((2, 3)).numpy()


def test_equals_torch_with_random_weights(rng):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch_network(torch)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.2, 0.4)  # less, and rounding grows from layer to layer
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    weights = mobilenet.from_torch({name: each.numpy() for name, each in network.state_dict().items()})
    frames = jnp.asarray(mobilenet.resize(frames_of(rng, 3, 96, 96)))
    wanted = torch_features(torch, network, frames)
    assert wanted.std(0).max() > 0.05  # from frame to frame
    np.testing.assert_allclose(jax.jit(mobilenet.network)(weights, frames), wanted, atol=1e-4 * np.abs(wanted).max())


@needs_mobilenet
def test_equals_torch_with_the_published_weights(weights, rng):
    torch = pytest.importorskip("torch")
    network = torch_network(torch)
    state = torch.load(mobilenet.find_weights(), weights_only=True)
    network.load_state_dict({name: each for name, each in state.items() if "classifier" not in name})
    frames_NHWC = frames_of(rng, 20, 64, 48)
    resized = jax.image.resize(frames_NHWC / np.float32(255), (20, 96, 96, 3), "linear", antialias=True)
    wanted = torch_features(torch, network, resized)
    np.testing.assert_allclose(features_of(weights, frames_NHWC), wanted, atol=1e-4 * np.abs(wanted).max(), rtol=1e-3)


@needs_mobilenet
def test_numbers_of_torchvision(weights):
    """Of torchvision 0.28's own mobilenet_v2 with these weights, on a pattern anyone can make again."""
    y, x = np.mgrid[:96, :96]
    frame_HWC = np.stack([x * 5 % 256, y * 3 % 256, x * y // 7 % 256], -1).astype(np.uint8)
    (features,) = features_of(weights, frame_HWC[None])
    wanted = {1107: 5.05845, 539: 3.89153, 1147: 3.88238, 501: 3.669, 1211: 3.66688, 314: 3.5965}
    assert set(np.argsort(-features)[:6].tolist()) == set(wanted)
    np.testing.assert_allclose(features[list(wanted)], list(wanted.values()), rtol=1e-4)
    np.testing.assert_allclose([features.sum(), np.linalg.norm(features)], [658.085, 31.4397], rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "outputs"), [((4, 6), 1, 3), ((4, 6), 1, 5), ((4, 6), 2, 3), ((3, 5), 2, 4)]
)
def test_a_block_equals_plain_loops(size, stride, outputs, rng):
    def conv(*shape):
        return mobilenet.Conv(*(jnp.asarray(rng.normal(0, 1, each), jnp.float32) for each in (shape, shape[-1:])))

    block = mobilenet.Block(conv(3, 12), conv(3, 3, 12), conv(12, outputs))
    x_NHWC = rng.normal(0, 1, (2, *size, 3)).astype(np.float32)
    wide = np.clip(x_NHWC @ np.array(block.expand.kernel) + np.array(block.expand.bias), 0, 6)
    height, width = (-(-length // stride) for length in size)
    across = np.zeros((2, height, width, 12)) + np.array(block.depthwise.bias)
    for y, x, dy, dx in np.ndindex(height, width, 3, 3):
        row, column = y * stride + dy - 1, x * stride + dx - 1
        if 0 <= row < size[0] and 0 <= column < size[1]:
            across[:, y, x] += wide[:, row, column] * np.array(block.depthwise.kernel[dy, dx])
    wanted = np.clip(across, 0, 6) @ np.array(block.project.kernel) + np.array(block.project.bias)
    if stride == 1 and outputs == 3:
        wanted = wanted + x_NHWC
    np.testing.assert_allclose(mobilenet.inverted_residual(block, stride, jnp.asarray(x_NHWC)), wanted, atol=2e-5)


# Frames --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (32, 48), (40, 200), (300, 97)])
def test_resize_equals_jax(size, rng):
    frames_NHWC = frames_of(rng, 2, *size)
    wanted = jax.image.resize(frames_NHWC / np.float32(255), (2, 96, 96, 3), "linear", antialias=True)
    np.testing.assert_allclose(mobilenet.resize(frames_NHWC), wanted, atol=1e-5)


@needs_mobilenet
def test_frames_of_many_videos_equal_frames_alone(weights, rng):
    """Whatever shares their batch, and wherever a batch ends."""
    videos = [frames_of(rng, num_frames, height, 40) for num_frames, height in [(1, 32), (19, 48), (3, 32)]]
    together = list(mobilenet.stream(weights, videos))
    alone = [frame for video in videos for frame in features_of(weights, video)]
    one_by_one = [features_of(weights, frame[None])[0] for video in videos for frame in video]
    assert len(together) == 23
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together[::5], one_by_one[::5], atol=1e-4)


def test_one_shape_is_compiled(rng, monkeypatch):
    shapes = set()

    def blind(weights, frames):
        shapes.add(frames.shape)
        return np.zeros((len(frames), mobilenet.WIDTH), np.float32)

    monkeypatch.setattr(mobilenet, "_network", blind)
    videos = [frames_of(rng, num_frames, size, 32) for num_frames, size in [(1, 16), (40, 24), (6, 130)]]
    nothing = mobilenet.Weights(
        mobilenet.Conv(jnp.zeros(1), jnp.zeros(1)), (), mobilenet.Conv(jnp.zeros(1), jnp.zeros(1))
    )
    assert len(list(mobilenet.stream(nothing, videos))) == 47
    assert shapes == {(mobilenet.BATCH, 96, 96, 3)}


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)]
)
def test_other_frames_are_refused(frames):
    with pytest.raises(ValueError, match="give uint8"):
        mobilenet.resize(frames)


# Weights -------------------------------------------------------------------------------------------------------------


def test_absent_weights_are_named(monkeypatch):
    monkeypatch.setattr(mobilenet, "PACKAGE", "no_such_package")
    assert not mobilenet.available()
    with pytest.raises(FileNotFoundError, match=r"no-such-package.*tools/install_weights .*--no-deps"):
        mobilenet.load()


def test_other_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(mobilenet, "find_weights", lambda: tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not the known file"):
        mobilenet.load()


@needs_mobilenet
def test_a_state_dict_of_another_network_is_refused():
    tensors = torch_file.read_state_dict(mobilenet.find_weights())
    wrong = {name: each for name, each in tensors.items() if name != "features.3.conv.2.weight"}
    with pytest.raises(ValueError, match=r"features\.3\.conv\.2\.weight is missing"):
        mobilenet.from_torch(wrong)
    with pytest.raises(ValueError, match=r"of shape \(24, 7, 1, 1\), not of \(24, 144, 1, 1\)"):
        mobilenet.from_torch(wrong | {"features.3.conv.2.weight": np.zeros((24, 7, 1, 1), np.float32)})


@needs_mobilenet
def test_neither_torch_nor_the_package_is_imported():
    code = (
        "import sys, json; from sora_jax.evaluate import mobilenet; mobilenet.load(); print(json.dumps([*sys.modules]))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert "jax" in loaded
    assert not {"torch", mobilenet.PACKAGE} & set(loaded)

"""Laws of I3D: parity with a PyTorch network that shares no code with it, and with slow definitions in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.evaluate import i3d

# Widths of the modules from the paper's figure 3 and GoogLeNet's table 1, and the pools before them; written anew.
PLAN = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "pool_4a": (3, 2),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "pool_5a": (2, 2),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


@functools.cache
def random_state_dict() -> dict[str, np.ndarray]:
    """Tensors under the names of the PyTorch port, of a size that keeps activations near 1; no norm is the identity."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in i3d.tensor_shapes().items():
        if name.endswith("conv3d.weight"):
            tensors[name] = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(("bn.weight", "bn.running_var")):
            tensors[name] = random.uniform(0.5, 1.5, shape)
        else:
            tensors[name] = random.normal(0, 0.2, shape)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def random_clips(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params() -> i3d.Params:
    return i3d.from_state_dict(random_state_dict(), "random")


@pytest.fixture(scope="module")
def torch_network(tmp_path_factory):
    """(network, path of its saved state dict): I3D in PyTorch with random weights, counters of training steps included."""
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional

    def same(x, kernel, stride, value):
        pads = []
        for size, window, step in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
            total = max(window - (size % step or step), 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads, value=value)

    class Unit(nn.Module):
        def __init__(self, inputs, outputs, size, stride=1, last=False):
            super().__init__()
            self.conv3d = nn.Conv3d(inputs, outputs, size, stride, bias=last)
            if not last:
                self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

        def forward(self, x):
            x = self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride, 0.0))
            return F.relu(self.bn(x)) if hasattr(self, "bn") else x

    def pool(x, kernel, stride):
        # Zeros, as the port has it.
        return F.max_pool3d(same(x, kernel, stride, 0.0), kernel, stride)

    class Mixed(nn.Module):
        def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
            super().__init__()
            self.b0, self.b3b = Unit(inputs, b0, 1), Unit(inputs, b3b, 1)
            self.b1a, self.b1b = Unit(inputs, b1a, 1), Unit(b1a, b1b, 3)
            self.b2a, self.b2b = Unit(inputs, b2a, 1), Unit(b2a, b2b, 3)

        def forward(self, x):
            pooled = pool(x, (3, 3, 3), (1, 1, 1))
            return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
            self.Conv3d_2b_1x1 = Unit(64, 64, 1)
            self.Conv3d_2c_3x3 = Unit(64, 192, 3)
            width = 192
            for name, numbers in PLAN.items():
                if name.startswith("Mixed"):
                    self.add_module(name, Mixed(width, *numbers))
                    width = numbers[0] + numbers[2] + numbers[4] + numbers[5]
            self.logits = Unit(width, 400, 1, last=True)

        def features(self, x):
            x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
            x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
            for name, numbers in PLAN.items():
                x = getattr(self, name)(x) if name.startswith("Mixed") else pool(x, numbers[:1] * 3, numbers[1:] * 3)
            return x

        def forward(self, x):
            return self.logits(F.avg_pool3d(self.features(x), (2, 7, 7), stride=1)).squeeze((3, 4)).mean(2)

    network = Network().eval()
    random = {name: torch.from_numpy(value) for name, value in random_state_dict().items()}
    network.load_state_dict(network.state_dict() | random)
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.save(network.state_dict(), path)
    return network, path


def run_torch(function, clips):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return function(torch.from_numpy(clips).movedim(-1, 1)).numpy()


def compiled(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})  # halves what compiling costs


def relative_error(found, wanted) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# Parity with PyTorch -------------------------------------------------------------------------------------------------


def test_logits_equal_pytorch(torch_network):
    """Odd and even sizes on the way down."""
    network, path = torch_network
    clips = random_clips(1, 9, 193, 200)
    found = compiled(i3d.logits)(i3d.load_weights(path), clips)
    wanted = run_torch(network, clips)
    assert found.shape == wanted.shape == (1, 400)
    assert np.std(wanted) > 0.1
    assert relative_error(found, wanted) < 1e-5


def test_features_equal_pytorch(torch_network):
    """Two clips, and sizes that are whole cells, less, and a little more."""
    network, path = torch_network
    clips = random_clips(2, 16, 65, 50)
    found = compiled(i3d.features)(i3d.load_weights(path), clips)
    wanted = np.moveaxis(run_torch(network.features, clips), 1, -1)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < 1e-5


# Slow definitions ----------------------------------------------------------------------------------------------------


def windows(size: int, kernel: int, stride: int):
    """(output, tap, input) of 'same' padding on one axis as TensorFlow's guide defines it, without inputs outside."""
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    for output, tap in itertools.product(range(outputs), range(kernel)):
        place = output * stride + tap - before
        if 0 <= place < size:
            yield output, tap, place


def each_window(x_BthwD, kernel, stride):
    """(outputs, taps, inputs) along t, h and w, with the grid of outputs."""
    grid = tuple(-(-size // step) for size, step in zip(x_BthwD.shape[1:4], stride, strict=True))
    axes = [list(windows(*each)) for each in zip(x_BthwD.shape[1:4], kernel, stride, strict=True)]
    return grid, [tuple(zip(*each, strict=True)) for each in itertools.product(*axes)]


ODD = [(5, 7, 6), (4, 8, 8), (1, 5, 9), (7, 3, 4)]


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (3, 2), (1, 1), (2, 2)])
def test_convolution_is_its_definition(rng, size, kernel, stride):
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    weights = rng.normal(size=(kernel, kernel, kernel, 3, 4)).astype(np.float32)
    grid, taps = each_window(x, (kernel,) * 3, (stride,) * 3)
    wanted = np.zeros((2, *grid, 4))
    for output, tap, place in taps:
        wanted[:, *output] += x[:, *place] @ weights[tap]
    folded = np.moveaxis(weights, 0, 2).reshape(kernel, kernel, kernel * 3, 4)
    np.testing.assert_allclose(i3d.convolve(jnp.asarray(x), jnp.asarray(folded), stride), wanted, atol=2e-4)


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(
    ("window", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
def test_max_pool_is_its_definition(rng, size, window, stride):
    x = rng.normal(-5, 1, size=(2, *size, 3)).astype(np.float32)  # padding with zeros would win
    grid, taps = each_window(x, window, stride)
    wanted = np.full((2, *grid, 3), -np.inf, np.float32)
    for output, _, place in taps:
        wanted[:, *output] = np.maximum(wanted[:, *output], x[:, *place])
    np.testing.assert_array_equal(i3d.max_pool(jnp.asarray(x), window, stride), wanted)


def test_a_unit_is_batch_norm_of_a_convolution(params, rng):
    """On a 1x1x1 unit, where the convolution is a matrix product."""
    tensors = {name.removeprefix("Mixed_3b.b0."): value for name, value in random_state_dict().items()}
    x = rng.normal(size=(1, 2, 3, 3, 192)).astype(np.float32)
    y = x @ tensors["conv3d.weight"][:, :, 0, 0, 0].T
    normal = (y - tensors["bn.running_mean"]) / np.sqrt(tensors["bn.running_var"] + 1e-3)
    wanted = np.maximum(normal * tensors["bn.weight"] + tensors["bn.bias"], 0)
    np.testing.assert_allclose(i3d.unit(params["Mixed_3b.b0"], jnp.asarray(x)), wanted, atol=1e-5)


def test_last_pool_averages_windows_of_two_cells(params, monkeypatch, rng):
    """On a long clip every window of two steps and 7 x 7 cells counts the same, and logits are averaged over windows."""
    grid = rng.normal(size=(2, 5, 7, 7, 1024)).astype(np.float32)
    monkeypatch.setattr(i3d, "features", lambda params, clips: jnp.asarray(grid))
    tensors = random_state_dict()
    weight, bias = tensors["logits.conv3d.weight"][:, :, 0, 0, 0], tensors["logits.conv3d.bias"]
    wanted = np.mean([grid[:, t : t + 2].mean((1, 2, 3)) @ weight.T + bias for t in range(4)], axis=0)
    np.testing.assert_allclose(i3d.logits(params, jnp.zeros((2, 40, 224, 224, 3))), wanted, atol=1e-5)


def test_size_is_that_of_the_paper():
    """Table 1 of arXiv:1705.07750 says 12 million parameters, of which statistics are none."""
    trained = [np.prod(shape) for name, shape in i3d.tensor_shapes().items() if "running" not in name]
    assert round(sum(trained) / 1e6, 1) == 12.7


# Files and refusals --------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_params(params, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    np.savez(tmp_path / "i3d.npz", **random_state_dict())
    safetensors.save_file(random_state_dict(), tmp_path / "i3d.safetensors")
    for path in (tmp_path / "i3d.npz", tmp_path / "i3d.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, i3d.load_weights(path), params)


def test_old_files_of_pytorch_give_the_same_params(params, torch_network, tmp_path):
    """rgb_imagenet.pt is of 2017: the container before torch 1.6, and no counters of training steps."""
    torch = pytest.importorskip("torch")
    state = {name: value for name, value in torch_network[0].state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "old.pt", torch_network[1]):
        jax.tree.map(np.testing.assert_array_equal, i3d.load_weights(path), params)


def test_wrong_tensors_are_named(tmp_path):
    tensors = dict(random_state_dict())
    kernel = tensors.pop("Mixed_4c.b1b.conv3d.weight")
    tensors["Mixed_4c.b1b.conv.weight"] = kernel
    tensors["logits.conv3d.bias"] = np.zeros(600, np.float32)
    np.savez(tmp_path / "bad.npz", **tensors)
    with pytest.raises(ValueError) as error:
        i3d.load_weights(tmp_path / "bad.npz")
    for part in (
        "bad.npz is not an I3D for RGB and 400 classes",
        "missing Mixed_4c.b1b.conv3d.weight;",
        "unexpected Mixed_4c.b1b.conv.weight;",
        "misshaped logits.conv3d.bias (600,) instead of (400,);",
        "use i3d_pretrained_400.pt",
    ):
        assert part in str(error.value)


def test_a_flood_of_wrong_tensors_is_cut():
    with pytest.raises(
        ValueError, match=r"missing Conv3d_1a_7x7\.conv3d\.weight, \S+, \S+ and 284 more; unexpected x;"
    ):
        i3d.from_state_dict({"x": np.zeros(1)}, "other")


def test_untrained_weights_are_refused():
    tensors = {name: value * ("running_mean" not in name) for name, value in random_state_dict().items()}
    with pytest.raises(ValueError, match="never trained"):
        i3d.from_state_dict(tensors, "fresh")


def test_files_that_are_not_there_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bring i3d_pretrained_400\.pt or rgb_imagenet\.pt"):
        i3d.load_weights(tmp_path / "none.pt")
    pytest.importorskip("safetensors")
    for name in ("cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\3\4 not whole")
        with pytest.raises(ValueError, match=f"{name} is not a whole"):
            i3d.load_weights(tmp_path / name)


@pytest.mark.parametrize("size", [(8, 224, 224), (16, 192, 224), (16, 224, 225)])
def test_clips_of_other_sizes_are_refused(params, size):
    with pytest.raises(ValueError, match="resize to 224 x 224"):
        i3d.logits(params, jnp.zeros((1, *size, 3)))

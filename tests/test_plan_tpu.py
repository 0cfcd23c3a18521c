"""A step of 1 B parameters, compiled for TPUs that are not there. Skipped where libtpu is not to be found (tools/test gets it)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Beside the other packages rather than among them: with libtpu installed jax looks for a TPU at every start.
LIBTPU = Path(sys.prefix) / "libtpu"
COMMAND = [
    "plan", "--config=experiments/dit.py:0.7b", "--vae=experiments/vae.py:video", "--topology=v5p:2x2x2",
    "--config.dit.width=1792", "--config.dit.heads=14", "--config.text.encoder=minilm", "--config.pack.row_tokens=8192",
    "--config.data.world.frame_counts=(1, 17)", "--config.data.world.frame_sizes=((256, 256), (256, 448))",
]  # fmt: skip
GIB = 2**30


needs_libtpu = pytest.mark.skipif(
    not (LIBTPU.is_dir() or importlib.util.find_spec("libtpu")), reason="libtpu is not installed"
)
COUNT = """
import sys
from sora_jax.plan import topology
target = topology.target(sys.argv[1])
print(len(target.devices), target.devices[0].device_kind)
"""


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v4:2x2x2", "8 TPU v4"),
        ("v5e:2x4", "8 TPU v5 lite"),
        ("v5e:1x1", "1 TPU v5 lite"),
        ("v5p:2x2x2", "8 TPU v5"),
        ("v6e:2x4", "8 TPU v6 lite"),
        ("v6e:1x1", "1 TPU v6 lite"),
    ],
)
def test_a_chip_is_a_device(name, told):
    environment = os.environ | {"PYTHONPATH": str(LIBTPU), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, name], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == told, done.stderr


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": str(LIBTPU),
        # A third of the time of the default, by which memory is 3 % more; kernels and collectives are the same.
        "JAX_OPTIMIZATION_LEVEL": "O0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "sora_jax.main", *COMMAND, f"--out={out}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@needs_libtpu
def test_a_billion_parameters_fit_as_measured(numbers):
    memory, count = numbers["memory"], numbers["model"]["parameters"]
    assert count > 1e9 and numbers["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    # float32 weights, their average and two moments, over the four chips of fsdp, but for the vectors.
    for name, times in (("parameters", 1), ("ema", 1), ("optimizer", 2)):
        assert memory[name] == pytest.approx(times * 4 * count / 4, rel=0.01)
    # A block keeps its input, in float32, and what both attentions gave, in bfloat16, with a logarithm a head.
    kept = 1792 * 4 + 2 * (1792 * 2 + 14 * 4)
    assert memory["activations"] == pytest.approx(14 * 8192 * kept, rel=0.01)
    assert 9 * GIB < memory["total"] < 11 * GIB and numbers["verdict"]["fits"]


@needs_libtpu
def test_attention_is_the_kernel_of_tpus(numbers):
    """Forward once, and both halves of backward, of tokens among themselves and with their captions, in 14 blocks."""
    kernels = {name.split("_segmented")[0]: times for name, times in numbers["kernels"].items()}
    assert kernels == {"splash_mha_fwd": 28, "splash_mha_dq": 28, "splash_mha_dkv": 28}


@needs_libtpu
def test_weights_are_gathered_and_gradients_scattered_block_by_block(numbers):
    found = {(each["kind"], each["axes"]): each for each in numbers["collectives"]}
    count = numbers["model"]["parameters"]
    gathered, scattered, reduced = (
        found[key]["bytes"] for key in (("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "data"))
    )
    # A chip sends its quarter to three others: of bfloat16 weights forward, again, and backward, at most all of them in float32.
    assert 2 * count * 3 / 4 * 2 < gathered < 3 * count * 3 / 4 * 4
    assert 2 * count * 3 / 4 <= scattered < 1.2 * 4 * count * 3 / 4
    # Of two, each sends its own quarter's gradients once.
    assert 2 * count / 4 <= reduced < 1.2 * 4 * count / 4
    assert not any("tensor" in axes or "sequence" in axes for _, axes in found)
    assert "unknown_loops" not in numbers

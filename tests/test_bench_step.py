"""The PyTorch model that a step is timed against is our model."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.models import dit
from sora_jax.structs import Layout

TOOL = Path(__file__).parent.parent / "tools" / "bench_step.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_step", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WIDTH", 96)
    monkeypatch.setattr(module, "BLOCKS", 2)
    monkeypatch.setattr(module, "HEADS", 2)
    return module


@pytest.mark.parametrize("shape", ["256", "4x250", "0x256", "4x-8", "4x256x2"])
def test_shapes_are_checked_before_anything_is_timed(bench, monkeypatch, capsys, shape):
    monkeypatch.setattr("sys.argv", ["bench_step.py", f"--shapes={shape}"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "is not ROWSxTOKENS with a multiple of 8 tokens" in capsys.readouterr().err


def test_a_contender_that_cannot_run_is_named(bench, monkeypatch):
    """Such as PyTorch where it is not installed."""
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--contenders", "torch f32", "--shapes=1x8"])
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="torch f32 ended before its first step"):
        bench.main()


def test_the_same_weights_give_the_same_output_in_pytorch(bench):
    torch = pytest.importorskip("torch")
    data, weights = bench.arrays(2, 64), bench.weights()
    graphdef = nnx.split(dit.DiT(bench.ours(), nnx.Rngs(0)), nnx.Param)[0]
    layout = Layout(
        segment_BN=jnp.asarray(data["segment"]),
        slot_BN=jnp.asarray(data["segment"] - 1),
        position_BN3=jnp.asarray(data["position"]),
        slot_segment_BS=jnp.asarray(data["slot_segment"]),
        extent_BS3=jnp.asarray(data["extent"]),
        text_segment_BL=jnp.asarray(data["text_segment"]),
        text_BLM=jnp.asarray(data["text"]),
    )
    ours = nnx.merge(graphdef, weights)(jnp.asarray(data["noisy"]), jnp.asarray(data["time"]), layout)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in bench.leaves(weights).items()}
    with torch.no_grad():
        theirs = bench.torch_dit(tensors, {name: torch.from_numpy(x) for name, x in data.items()}).numpy()
    assert np.abs(theirs).max() > 0.1 and np.allclose(ours, theirs, atol=2e-5)


def test_a_table_shows_the_ceiling_that_a_share_is_of(bench):
    useful, _ = bench.flops(2, 64)
    result = {"seconds": 0.5, "fastest": 0.4, "matmul": 8 * useful, "loss": 1.0}
    heads, (_, *values) = (line.split() for line in bench.table("2x64", {"ours": result}).splitlines()[1:])
    assert "matmul" in heads
    assert values[-4:] == [f"{2 * useful / 1e9:.1f}", f"{8 * useful / 1e9:.1f}", "25.0%", "1.00000"]

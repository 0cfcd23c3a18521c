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

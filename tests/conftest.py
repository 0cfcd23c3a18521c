"""Eight simulated devices for every test; jaxtyping's shapes are checked as the code runs."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("sora_jax", "typecheck.checked")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# Tests compile the same small programs again and again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)

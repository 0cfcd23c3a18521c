"""Eight simulated devices for every test; jaxtyping's shapes are checked as the code runs."""

import json
import os

import xla

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {xla.flags()}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("sora_jax", "typecheck.checked")

import sys  # noqa: E402
import unittest.mock  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Tests compile the same small programs again and again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

# The same examples in every run, so that what passes here passes there.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("same")

# Minutes each: begun last, they would keep one worker busy while the others wait.
SLOW = (
    "test_kills",
    "test_damage",
    "test_processes",
    "test_lost_process",
    "test_runner",
    "test_sharding",
    "test_plan_tpu",
    "test_optimizer",
    "test_loop",
    "test_plan",
)


def pytest_addoption(parser):
    parser.addoption("--faults-long", action="store_true", help="try each fault of tests/faults ten times as often")
    parser.addoption(
        "--faults-figures", default=".pytest_cache/faults.json", help="file for what tests/faults counted (JSON)"
    )


def pytest_xdist_auto_num_workers():
    """One more than there are cores: a worker whose test waits for processes that it started leaves its core to another."""
    return (os.cpu_count() or 1) + 1


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        Path(session.config.getoption("--faults-figures")).unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter, config):
    path = Path(config.getoption("--faults-figures"))
    if path.exists():
        for name, numbers in json.loads(path.read_text()).items():
            told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
            terminalreporter.write_line(f"{name}: {told}")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path):
    """What a verb sets for its process must not outlive a test, nor touch the user's cache."""
    with unittest.mock.patch.dict(os.environ, SORA_JAX_CACHE=str(tmp_path / "cache")):
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the user's own comes first
        yield


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)

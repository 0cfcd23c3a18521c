"""Where the faults of a session are counted: each test records figures, which are kept as JSON and shown at the end."""

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# For the processes that the tests start, too.
PATHS = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "experiments")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def figures(request):
    """record(name, **numbers) adds to the file of --faults-figures."""
    path = Path(request.config.getoption("--faults-figures"))
    path.parent.mkdir(parents=True, exist_ok=True)

    def record(name, **numbers):
        with path.open("a+") as file:  # several workers of pytest write to it
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            file.truncate(0)
            file.write(json.dumps((json.loads(content) if content else {}) | {name: numbers}, indent=2))

    return record


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    import child

    return child.Runs(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def times(request):
    """How often a fault is tried: times(usual, long)."""
    return lambda usual, long: long if request.config.getoption("--faults-long") else usual


@pytest.fixture(scope="session")
def straight(runs, tmp_path_factory):
    """The checkpoint of a run that was left alone, after any number of steps."""
    made = {}

    def after(steps):
        if steps not in made:
            workdir = tmp_path_factory.mktemp("straight") / str(steps)
            made[steps] = runs.reach(steps, workdir, save_every=steps, log_every=steps)
        return made[steps]

    return after

"""One writer a work dir: a living holder is refused to others, one that is gone is not."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from sora_jax import config
from sora_jax.train import lock


@pytest.fixture
def other():
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def held(folder, host, pid, started, age=0.0):
    path = folder / lock.NAME
    path.write_text(json.dumps({"host": host, "pid": pid, "started": started}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_living_holder_is_named(tmp_path, other):
    held(tmp_path, socket.gethostname(), other.pid, lock._started(other.pid), age=1e6)
    with (
        pytest.raises(config.ConfigError, match=f"process {other.pid} on {socket.gethostname()}"),
        lock.locked(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


@pytest.mark.parametrize("started", ["ended", "another with its number"])
def test_a_holder_that_is_gone_is_replaced(tmp_path, other, started, caplog):
    since = lock._started(other.pid)
    if started == "ended":
        other.kill()
        other.wait()
    else:
        since -= 1
    held(tmp_path, socket.gethostname(), other.pid, since)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert "taken over" in caplog.text and not list(tmp_path.iterdir())


def test_another_host_is_believed_while_it_touches_its_lock(tmp_path):
    held(tmp_path, "elsewhere", 1, 1, age=lock.STALE / 2)
    with pytest.raises(config.ConfigError, match="process 1 on elsewhere"), lock.locked(tmp_path):
        pass
    held(tmp_path, "elsewhere", 1, 1, age=lock.STALE * 2)
    with lock.locked(tmp_path):
        pass
    (tmp_path / lock.NAME).write_text("half")
    with pytest.raises(config.ConfigError, match="remove"), lock.locked(tmp_path):
        pass


def test_a_holder_touches_its_lock_and_lets_go_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH", 0.02)
    with pytest.raises(KeyError), lock.locked(tmp_path):
        path = tmp_path / lock.NAME
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
        with pytest.raises(config.ConfigError, match=f"process {os.getpid()}"), lock.locked(tmp_path):
            pass
        raise KeyError
    assert not list(tmp_path.iterdir())
    with lock.locked(tmp_path):
        pass

"""One work dir, one writer: a file in it names the process that writes there.

The holder touches the file every few seconds. A lock is stale, and taken over, if its process is gone from this host, or if its
host has not touched it for STALE seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sora_jax import disk, processes
from sora_jax.checkpoint import SaveError
from sora_jax.config import ConfigError

NAME = "lock"
TOUCH = 10.0  # seconds
STALE = 120.0
MAX_BYTES = 2**16


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a work dir; of several processes of one run the first does.

    Raises ConfigError if another run holds it, disk.FileError if what is in its place is no file of ours, SaveError if the
    work dir cannot be written.
    """
    if not processes.is_first():
        yield
        return
    path = workdir / NAME
    try:
        _take(path)
    except OSError as error:
        raise SaveError(
            f"{workdir} cannot be written: {error.strerror}; free space or mend the disk, and run again"
        ) from error
    ended = threading.Event()
    touching = threading.Thread(target=_touch, args=(path, ended), name="lock", daemon=True)
    touching.start()
    try:
        yield
    finally:
        ended.set()
        touching.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _take(path: Path) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    # Linked to its name when it is whole: nobody reads half of it, and of two only one succeeds.
    whole = path.with_name(f"{NAME}.{mine['host']}.{mine['pid']}")
    try:
        whole.write_text(json.dumps(mine))
        while True:
            try:
                os.link(whole, path)
                return
            except FileExistsError:
                _clear(path)
    finally:
        whole.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Removes a stale lock. Raises ConfigError for one that is held."""
    try:
        content, age = disk.read_bytes(path, MAX_BYTES, f"remove it if no run writes to {path.parent}"), _age(path)
    except FileNotFoundError:
        return
    try:
        holder = disk.parse_json(content, path)
        host, pid, started = holder["host"], holder["pid"], holder["started"]
        if not isinstance(host, str) or type(pid) is not int or not 0 < pid < 2**31:
            raise ValueError("no process")
    except (ValueError, KeyError, TypeError):
        host, pid, started = "?", -1, None
    gone = _started(pid) != started if host == socket.gethostname() else age > STALE
    if not gone:
        raise ConfigError(
            f"{path.parent} is being written by process {pid} on {host}; wait for it, stop it, or choose another --workdir "
            f"(if there is no such process, remove {path})"
        )
    # Renamed first: of two processes that find it stale, one alone removes it, and never the other's new one.
    aside = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.stale")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_bytes() != content:
            aside.rename(path)
            return
        aside.unlink()
        logging.warning("%s was left by process %d on %s, which is gone; taken over", path, pid, host)


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    probe = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.clock")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def _started(pid: int) -> Any:
    """What tells a process from a later one with its number: when it began, in ticks since boot; None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass
    if Path("/proc/self/stat").exists() or pid < 0:
        return None
    try:  # no /proc, as on macOS: that it lives must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH):
        with contextlib.suppress(OSError):
            os.utime(path)

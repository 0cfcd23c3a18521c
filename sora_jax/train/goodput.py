"""Where the time of a run goes, how even its steps are, and what memory it takes.

Steps are only dispatched by the host and computed by the devices later; nothing here waits for them. The time of a step is
therefore the time that went into nothing else, and the sum of all causes is the wall time, to the nanosecond.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.train import progress

# Causes and what they are called at the end of a run. 'lost' are steps that were done before, in a process that was ended
# before it saved them; 'start' lasts until the first step is compiled. Only 'step' is productive.
CAUSES = {
    "step": "steps",
    "lost": "steps done again",
    "data": "waiting for data",
    "evaluate": "evaluation",
    "sample": "samples",
    "save": "saves",
    "profile": "profiles",
    "start": "start",
}
PERCENTILES = (50, 90, 99)
# Of /proc/self/status, in kB.
STATUS = {"VmRSS": "memory/host", "VmHWM": "memory/host_peak"}


class Account:
    """Wall time by cause, since it was made. For one thread. Time within nested causes belongs to the inner one."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock, self._causes = clock, ["start"]
        self._spent = dict.fromkeys(CAUSES, 0)
        self._since = clock()

    def turn(self, cause: str) -> None:
        """From now on, what is in nothing else is `cause`."""
        self._settle()
        self._causes[0] = cause

    @contextlib.contextmanager
    def of(self, cause: str) -> Iterator[None]:
        self._settle()
        self._causes.append(cause)
        try:
            yield
        finally:
            self._settle()
            self._causes.pop()

    def spent(self) -> dict[str, int]:
        """Nanoseconds by cause up to now."""
        self._settle()
        return dict(self._spent)

    def _settle(self) -> None:
        now = self._clock()
        self._spent[self._causes[-1]] += now - self._since
        self._since = now


class Laps:
    """Seconds of each step since the last log line, as the host saw them: steps and their data, without all else.

    As steps are computed later than they are dispatched, this is the pace of the loop, not of the devices: the step before a
    log line, which waits for the devices, can hold the time of those before it.
    """

    def __init__(self, account: Account) -> None:
        self._account, self._last, self._seconds = account, 0, list[float]()

    def begin(self) -> None:
        """What was before, such as the compilation of the first step, is part of none."""
        self._last = self._running()

    def step(self) -> None:
        now = self._running()
        self._seconds.append((now - self._last) / 1e9)
        self._last = now

    def close(self) -> list[float]:
        """The seconds of every step, the last one up to now; then it starts anew."""
        now = self._running()
        if self._seconds:
            self._seconds[-1] += (now - self._last) / 1e9
            self._last = now
        seconds, self._seconds = self._seconds, []
        return seconds

    def _running(self) -> int:
        spent = self._account.spent()
        return spent["step"] + spent["lost"] + spent["data"]


def share(spent: Mapping[str, int]) -> float:
    """The productive part of all time, 0 to 1."""
    return spent["step"] / max(1, sum(spent.values()))


def line(spent: Mapping[str, int]) -> dict[str, float]:
    return {f"time/{cause}": value / 1e9 for cause, value in spent.items()} | {"goodput": share(spent)}


def sentence(spent: Mapping[str, int]) -> str:
    """'goodput 83 % of 12:34: steps 10:26, start 00:40, saves 00:20', without what took less than half a second."""
    ordered = sorted(CAUSES, key=lambda cause: -spent[cause])
    words = [f"{CAUSES[cause]} {progress.clock(spent[cause] / 1e9)}" for cause in ordered if spent[cause] >= 5e8]
    whole = f"goodput {100 * share(spent):.0f} % of {progress.clock(sum(spent.values()) / 1e9)}"
    return f"{whole}: {', '.join(words)}" if words else whole


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of the times of steps; nothing if there are none."""
    if not seconds:
        return {}
    found = np.percentile(seconds, PERCENTILES)
    names = [f"step_seconds/p{rank}" for rank in PERCENTILES]
    return dict(zip(names, found.tolist(), strict=True)) | {"step_seconds/max": max(seconds)}


def memory() -> dict[str, float]:
    """Bytes of this process on the host, and of its fullest device where the backend tells."""
    found = {}
    status = Path("/proc/self/status")
    if status.exists():
        rows = dict(row.split(":", 1) for row in status.read_text().splitlines() if ":" in row)
        found = {name: 1024.0 * int(rows[key].split()[0]) for key, name in STATUS.items() if key in rows}
    else:  # macOS, which counts bytes
        unit = 1.0 if sys.platform == "darwin" else 1024.0
        found["memory/host_peak"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    devices = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for key, name in (("bytes_in_use", "memory/device"), ("peak_bytes_in_use", "memory/device_peak")):
        if values := [float(stats[key]) for stats in devices if key in stats]:
            found[name] = max(values)
    return found

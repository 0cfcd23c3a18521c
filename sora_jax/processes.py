"""Several processes of one program, each with its own devices: how they meet, what they agree on, and what ends them.

One process is the rule, and then nothing here does anything. With several, every process runs the same program on its part of
the same arrays; the first alone writes logs and metrics. A process that dies leaves the others waiting in a collective for
ever, so each watches the others' heartbeats and leaves with LOST when one stops: what started them starts them again, and they
go on from the newest checkpoint. One that says why it ends takes the others along with its own exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# Exit code of a process that lost another: EX_TEMPFAIL of sysexits.h, try again.
LOST = 75
BEAT = 1.0  # seconds between heartbeats
PATIENCE = 10.0  # seconds without one after which a process is lost
MEETING = 300  # seconds for all to be there
# jax's own watch ends a process with a core dump; it is for what this one cannot see.
JAX_PATIENCE = 30
LONGEST_WAIT = 24 * 3600.0  # seconds for what the first process does while the others wait

Value = TypeVar("Value")
_watch: _Watch | None = None
_meetings = 0
_alone = False  # within first_then_all, of which this process is the first


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins `count` processes as number `index` at the coordinator's host:port, and begins to watch the others.

    What is None is found out by jax, from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, Open MPI, a TPU
    pod or Kubernetes. Must come before anything else asks for devices. Raises RuntimeError if they do not meet, and ValueError for
    an address or numbers by which they cannot.
    """
    global _watch

    def number(given: int | None, variable: str) -> int | None:
        if given is not None or variable not in os.environ:
            return given
        if not os.environ[variable].isdecimal():
            raise ValueError(f"{variable} is {os.environ[variable]!r}; it must be a whole number")
        return int(os.environ[variable])

    # jax reads the address from the environment by itself, but not the numbers.
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = number(count, "JAX_NUM_PROCESSES"), number(index, "JAX_PROCESS_ID")
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"the coordinator {address!r} has no port; give HOST:PORT, such as localhost:1234")
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"process {index} is none of {count}; they are numbered from 0 to {count - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=JAX_PATIENCE,
            initialization_timeout=MEETING,
            shutdown_timeout_seconds=JAX_PATIENCE,
        )
    except ValueError as error:
        raise ValueError(
            f"nothing says where and how many the others are ({error}); give --coordinator, --processes and --process"
        ) from error
    if jax.process_count() > 1:
        if not is_first():
            ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
        _watch = _Watch(jax.process_index(), jax.process_count())
        _watch.start()


def check_alike(told: str) -> None:
    """Raises ValueError in a process that was told something else than the first: each would wait for what others never do."""
    if _watch is None:
        return
    if is_first():
        _client().key_value_set("sora_jax/told", told)
    elif _client().blocking_key_value_get("sora_jax/told", 1000 * MEETING) != told:
        raise ValueError("this one was given other flags than the first; give all the same, but for --process")


def is_first() -> bool:
    return jax.process_index() == 0


def several() -> bool:
    """Whether this process has met others."""
    return _watch is not None


def leave(together: bool = False) -> None:
    """Every process at its end: the others must not take it for lost. together: wait until all are there."""
    if _watch is not None:
        _watch.stop()
        if together:
            jax.distributed.shutdown()


def ask_to_stop(number: int) -> None:
    """Asks all processes to stop for a signal that this one got. Called by a signal handler."""
    if _watch is not None:
        _watch.asked = number


def stepping(number: int | None) -> None:
    """From now on this process makes steps, of which `number` are done; None: no more."""
    if _watch is not None:
        _watch.stepping(number)


def stop_after(number: int) -> int | None:
    """The signal for which all processes stop after step `number`; None if they go on. Each must ask before each step."""
    return None if _watch is None else _watch.stop_after(number)


def fail(code: int) -> None:
    """Lets the others end with the code of this process, which ends now: nothing that only it said is mended by starting again."""
    if _watch is not None and _watch.is_alive():
        with contextlib.suppress(Exception):  # the coordinator may be gone by now
            _client().key_value_set(f"sora_jax/failed/{jax.process_index()}", str(code))
        _linger()


def blame(error: BaseException) -> None:
    """Ends this process as lost if its error came of another's end; returns if it is this one's own.

    A collective fails as soon as the connection to a process that died is closed; only after PATIENCE do heartbeats say so.
    """
    if _watch is not None:
        logging.error("%.200r; looking whether another process is lost", error)
        _watch.join(PATIENCE + 3 * BEAT)


def lost(reason: object) -> None:
    """Ends this process at once, as others that are gone cannot be waited for."""
    logging.error("%s; start all processes again (training goes on from its newest checkpoint)", reason)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """jax's runtime aborts by itself, at times before the watch has seen it, when the first process and with it the coordinator
    are gone. Python's own handlers do not run then: an abort ends a process before the interpreter's next turn."""
    os.write(
        2, b"the runtime aborted (see above), as it does when the first process is gone; start all processes again\n"
    )
    os._exit(LOST)


def first_then_all(action: Callable[[], Value]) -> Value:
    """action in the first process, then in the others: for what is made once, on a disk that all see, and then found.

    Nothing in it may wait for the others, who wait for it.
    """
    global _alone
    if is_first():
        _alone = True
        try:
            value = action()
        finally:
            _alone = False
        meet()
        return value
    meet()
    return action()


def meet() -> None:
    """Waits until all processes are here. Raises RuntimeError where the others wait for what this one does."""
    global _meetings
    if _alone:
        raise RuntimeError("the first process would meet the others, who wait for what it does now")
    if jax.process_count() > 1:
        _meetings += 1
        _client().wait_at_barrier(f"sora_jax/meeting/{_meetings}", int(1000 * LONGEST_WAIT))


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers of the same names added up over all processes."""
    if jax.process_count() == 1:
        return dict(numbers)
    names = sorted(numbers)
    values = np.array([numbers[name] for name in names], np.float64)
    # As bits: jax would round float64.
    bits = multihost_utils.process_allgather(values.view(np.uint32), tiled=False)
    total = np.ascontiguousarray(bits, np.uint32).view(np.float64).sum(0)
    return dict(zip(names, total.tolist(), strict=True))


def on_any(flag: bool) -> bool:
    """Whether it holds on any process. All processes call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def joined(tree: Any) -> Any:
    """JSON dicts of all processes as one; where two say something of one key, the later process is believed."""
    if jax.process_count() == 1:
        return tree
    text = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(text)], np.int32), tiled=False))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    every = np.asarray(multihost_utils.process_allgather(padded, tiled=False))
    found = [json.loads(each[:length].tobytes()) for each, length in zip(every, lengths, strict=True)]
    result = found[0]
    for other in found[1:]:
        result = _merged(result, other)
    return result


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {key: _merged(one[key], value) if key in one else value for key, value in other.items()}
    return other


def _client() -> Any:
    return jax._src.distributed.global_state.client  # type: ignore[attr-defined]


def _linger() -> None:
    """The first process holds what all of them tell each other, and so gives the others the time to read it."""
    if is_first():
        time.sleep(3 * BEAT)


class _Watch(threading.Thread):
    """Tells the others each second that this process lives, looks whether they do, and agrees with them on where to stop.

    When one is asked to stop, each tells how many steps it has begun and begins none beyond that before all have told; then all
    go on to the most that any has begun, as a step that one has begun waits for all.
    """

    def __init__(self, index: int, count: int) -> None:
        super().__init__(name="heartbeats", daemon=True)
        self.index, self.others = index, [other for other in range(count) if other != index]
        self.asked: int | None = None  # the signal that this process got
        self._stopped = threading.Event()
        self._turn = threading.Condition()
        self._begun: int | None = None
        self._told = False
        self._agreed: tuple[int, int] | None = None  # after which step, and the signal

    def run(self) -> None:
        client, number = _client(), 0
        seen = {other: ("", time.monotonic()) for other in self.others}
        while not self._stopped.wait(BEAT):
            number += 1
            try:
                client.key_value_set(f"sora_jax/beat/{self.index}", str(number), allow_overwrite=True)
                beats = {key.rpartition("/")[2]: value for key, value in client.key_value_dir_get("sora_jax/beat/")}
                failed = client.key_value_dir_get("sora_jax/failed/")
                self._agree(client)
            except Exception as error:  # the coordinator is gone, and with it the first process
                if self.asked is not None:
                    os._exit(128 + self.asked)
                if not self._stopped.is_set():
                    lost(
                        f"process {self.index}: the first process cannot be reached ({str(error).splitlines()[0][:120]})"
                    )
                return
            for key, code in failed:
                if (other := int(key.rpartition("/")[2])) != self.index:
                    os.write(2, f"process {self.index}: process {other} ended with {code}, as it said\n".encode())
                    _linger()
                    os._exit(int(code))
            for other, (last, since) in seen.items():
                beat = beats.get(str(other), "")
                if beat != last:
                    seen[other] = beat, time.monotonic()
                elif beat not in ("", "left") and time.monotonic() - since > PATIENCE:
                    lost(f"process {self.index}: process {other} has given no sign of life for {PATIENCE:.0f} s")

    def _agree(self, client: Any) -> None:
        if self._agreed is not None:
            return
        if self.asked is not None:
            client.key_value_set("sora_jax/stop/signal", str(self.asked), allow_overwrite=True)
        told = {key.rpartition("/")[2]: int(value) for key, value in client.key_value_dir_get("sora_jax/stop/")}
        number = told.pop("signal", None)
        if number is None:
            return
        with self._turn:
            if self._begun is None:
                # Between stages nothing is lost; and what another process waits for can hold the main thread for long.
                os.write(2, f"process {self.index}: stopped by {signal.Signals(number).name}\n".encode())
                _linger()
                os._exit(128 + number)
            if not self._told:
                self._told, told[str(self.index)] = True, self._begun
                client.key_value_set(f"sora_jax/stop/{self.index}", str(self._begun), allow_overwrite=True)
            if len(told) == len(self.others) + 1:
                self._agreed = max(told.values()), number
                self._turn.notify_all()

    def stepping(self, number: int | None) -> None:
        with self._turn:
            self._begun = number

    def stop_after(self, number: int) -> int | None:
        with self._turn:
            if not self._told:
                self._begun = number + 1
                return None
            self._turn.wait_for(lambda: self._agreed is not None)
            last, asked = self._agreed  # type: ignore[misc]
            return asked if number >= last else None

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        _client().key_value_set(f"sora_jax/beat/{self.index}", "left", allow_overwrite=True)

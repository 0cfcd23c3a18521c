"""How a run is told to stop: the first SIGTERM or SIGINT lets it save, the second ends it at once.

Of several processes all stop after the same step, whichever of them was told (processes.Watch).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from sora_jax import processes

NUMBERS = (signal.SIGINT, signal.SIGTERM)
_asked: int | None = None
_held = False


class Stopped(KeyboardInterrupt):
    """A signal ended the run in order; code is what the process should exit with, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """While inside, signals stop the run in order. Only the main thread may handle signals; in others nothing happens."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = None
    before = {number: signal.signal(number, _handle) for number in NUMBERS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_count, args=(reader,), daemon=True, name="signals").start()
    told = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        _asked = None
        signal.set_wakeup_fd(told)
        os.close(writer)
        for number, handler in before.items():
            # What was not set from Python, as jax's own for SIGTERM, cannot be set again from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _count(reader: int) -> None:
    """Ends the process at the second signal, also while the main thread is in a compilation or waits for other processes, where
    Python handles none."""
    asked = 0
    while number := os.read(reader, 1):
        asked += number[0] in NUMBERS
        if asked == 2:
            _end(number[0])
    os.close(reader)


def _end(number: int) -> NoReturn:
    _say(b"stopped at once\n")
    os._exit(128 + number)


def _handle(number: int, _: FrameType | None) -> None:
    global _asked
    if _asked is not None:  # the second: _count ends the process
        return
    _asked = number
    processes.ask_to_stop(number)
    if _held:
        _say(b"stopping after this step, then saving; once more to stop at once\n")
    elif processes.several():
        _say(b"stopping all processes; once more to stop this one at once\n")
    else:
        raise Stopped(number)


def _say(line: bytes) -> None:
    # Straight to the file: the signal may have come in the middle of a print.
    os.write(2, line)


@contextlib.contextmanager
def held(number: int) -> Iterator[None]:
    """While inside, from step `number` on, a signal waits until stop_after is asked."""
    global _held
    _held = True
    processes.stepping(number)
    try:
        yield
    finally:
        _held = False
        processes.stepping(None)


@contextlib.contextmanager
def abandonable() -> Iterator[None]:
    """While inside, within held, what is done may be left at once, with Stopped. Several processes finish it together."""
    global _held
    if _asked is not None and not processes.several():
        raise Stopped(_asked)
    before, _held = _held, False
    try:
        yield
    finally:
        _held = before


def stop_after(number: int) -> Stopped | None:
    """What to raise, after saving, if step `number` is to be the last; all processes must ask before each step."""
    asked = processes.stop_after(number) if processes.several() else _asked
    return None if asked is None else Stopped(asked)

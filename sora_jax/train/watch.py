"""What watches a run from its side: the account of its time, profiles of steps, and the stacks of one that hangs.

SIGUSR1 asks the first process for a profile of the next steps, SIGUSR2 any process for the stacks of its threads, at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from sora_jax import processes
from sora_jax.train import goodput, progress

PROFILED_STEPS = 5  # by SIGUSR1
POLL = 0.5  # seconds between looks for new stacks
TIMEOUT = "Timeout"  # how faulthandler's stacks of a hang begin
GRACE = 30.0  # seconds after which the interpreter is taken to be stuck

Outcome = TypeVar("Outcome")


@dataclasses.dataclass(frozen=True)
class Options:
    """profile: first and last step of a profile, from 1. hang_seconds: without a step for so long, stacks are shown; 0: never."""

    profile: tuple[int, int] | None
    hang_seconds: float


USUAL = Options(profile=None, hang_seconds=600.0)


class Watch:
    """Of one run in one process. done: steps up to this one were done before; done again, they are lost time."""

    def __init__(self, workdir: Path, options: Options, done: int) -> None:
        self.account = goodput.Account()
        self.profile = Profile(workdir / "profile", options.profile)
        self.stacks = Stacks(workdir, options.hang_seconds)
        self._laps, self._done, self._begun = goodput.Laps(self.account), done, False

    @contextlib.contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """What is done inside is counted as `cause`, one of goodput.CAUSES."""
        # Waiting for data is no sign of life.
        living = self.stacks.alive if cause != "data" else lambda: None
        living()
        with self.account.of(cause):
            self.stacks.doing = cause
            try:
                yield
            finally:
                self.stacks.doing = "step"
        living()

    def step(self, number: int, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """function(*arguments), which is step `number`."""
        cause = "lost" if number <= self._done else "step"
        if self._begun:
            self.account.turn(cause)
        else:
            self.stacks.alive()
        with self.account.of("profile"):
            self.profile.before(number)
        with self.profile.annotated(number):
            outcome = function(*arguments)
        if self._begun:
            self._laps.step()
        else:
            self.account.turn(cause)
            self._laps.begin()
        if self.profile.ends_with(number):
            jax.block_until_ready(outcome)
            with self.account.of("profile"):
                self.profile.stop(number)
        self._begun, self._done, self.stacks.number = True, max(self._done, number), number
        self.stacks.alive()
        return outcome

    def line(self) -> dict[str, float]:
        """For the log: seconds by cause since this process began the run, percentiles of the steps since the last line, memory."""
        spent, laps = self.account.spent(), self._laps.close()
        return goodput.line(spent) | goodput.percentiles(laps) | goodput.memory()

    def close(self) -> None:
        self.profile.stop(self.stacks.number)
        if self._begun and processes.is_first():
            logging.info(goodput.sentence(self.account.spent()))


@contextlib.contextmanager
def watched(workdir: Path, options: Options) -> Iterator[Watch]:
    """While inside, the run in workdir is watched."""
    watch = Watch(workdir, options, progress.last_step(workdir))
    with watch.stacks.shown(), watch.profile.on_signal():
        try:
            yield watch
        finally:
            watch.close()


class Profile:
    """Traces of jax.profiler, by the first of several processes: on one host they would write to the same file."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self.folder, self._steps = folder, steps
        self._asked = False
        self._running: tuple[int, int] | None = None

    @contextlib.contextmanager
    def on_signal(self) -> Iterator[None]:
        """While inside, SIGUSR1 asks for a profile. Only the main thread may handle signals; in others nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if before is None else before)

    def _ask(self, *_: Any) -> None:
        # Straight to the file: the signal may have come in the middle of a print.
        if processes.is_first():
            self._asked = True
            os.write(2, f"a profile of the next {PROFILED_STEPS} steps\n".encode())

    def before(self, number: int) -> None:
        """Starts a profile if one is due with step `number`."""
        if not processes.is_first() or self._running:
            return
        if self._asked:
            self._asked, steps = False, (number, number + PROFILED_STEPS - 1)
        elif self._steps and number >= self._steps[0]:
            steps, self._steps = (number, self._steps[1]), None
            if number > steps[1]:
                logging.warning("no profile: the run goes on from step %d, after the steps to profile", number - 1)
                return
        else:
            return
        with self._going_on():
            jax.profiler.start_trace(self.folder)
            self._running = steps

    def annotated(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Marks step `number` in a profile that runs."""
        if self._running is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def ends_with(self, number: int) -> bool:
        return self._running is not None and number >= self._running[1]

    def stop(self, number: int) -> None:
        """Ends a profile that runs; `number` is its last step."""
        if self._running is None:
            return
        (first, _), self._running = self._running, None
        with self._going_on():
            jax.profiler.stop_trace()
            logging.info(
                "profile of steps %d to %d in %s; open the newest *.trace.json.gz there in https://ui.perfetto.dev, or all with "
                "pip install xprof && xprof --logdir=%s",
                first,
                number,
                self.folder,
                self.folder,
            )

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """No run ends for a profile that fails, such as on a full disk or beside another profiler."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            logging.error("no profile in %s: %s", self.folder, str(error).partition("\n")[0])


class Stacks:
    """The stacks of all threads, on stderr and in stacks.txt, when nothing has finished for `seconds`, and by SIGUSR2.

    A thread writes them to the file and shows what is new there. If the interpreter is stuck, so that no thread has its turn,
    faulthandler writes them without it, GRACE seconds later: earlier, it could meet frames that come and go, which ends the
    process. The process goes on. Of several processes each but the first has a file with its number.
    """

    def __init__(self, workdir: Path, seconds: float) -> None:
        index = jax.process_index()
        self.path = workdir / (f"stacks-{index}.txt" if index else "stacks.txt")
        self.seconds, self.number, self.doing = seconds, 0, "start"
        self._file: Any = None
        self._due = math.inf

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While inside, stacks are shown; hangs are those of the thread that enters."""
        try:
            self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            logging.error("no stacks will be shown: cannot write %s: %s", self.path, error.strerror)
            yield
            return
        self._seen = self._size()
        ended = threading.Event()
        showing = threading.Thread(target=self._show_new, args=(ended,), name="stacks", daemon=True)
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True, chain=False)
        self.alive()
        showing.start()
        try:
            yield
        finally:
            ended.set()
            showing.join()  # first, as it may start the time anew
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR2)
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                if not self.path.stat().st_size:
                    self.path.unlink()

    def alive(self) -> None:
        """Something has finished or begun: the time to the next stacks starts anew."""
        if self._file is not None and self.seconds:
            self._due = time.monotonic() + self.seconds
            faulthandler.dump_traceback_later(self.seconds + GRACE, repeat=True, file=self._file)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _show_new(self, ended: threading.Event) -> None:
        while not ended.wait(min(POLL, max(0.0, self._due - time.monotonic()))):
            if time.monotonic() >= self._due:
                self._file.write(f"{TIMEOUT} after {self.seconds:g} s\n".encode())
                faulthandler.dump_traceback(self._file, all_threads=True)
                self.alive()
            self._show()
        self._show()

    def _show(self) -> None:
        size = self._size()
        if size <= self._seen:
            return
        text = os.pread(self._file.fileno(), size - self._seen, self._seen).decode(errors="replace")
        self._seen = size
        why = f"nothing has finished for {self.seconds:g} s" if text.startswith(TIMEOUT) else "asked by SIGUSR2"
        logging.warning(
            "%s, after step %d (%s); all threads, also in %s:\n%s", why, self.number, self.doing, self.path, text
        )

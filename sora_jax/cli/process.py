"""What a command sets of its process before it begins: the environment of jax, the others that it meets, what is shown of logs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import sora_jax
from sora_jax.cli.failures import RUN_ERROR, Failure


def prepare_jax() -> None:
    """Sets what jax and XLA read from the environment when they are imported; what the user has set stays.

    The huge pages of glibc (GLIBC_TUNABLES) cannot be set here: they must be there before the process starts.
    """
    # Warnings and chatter of XLA's C++ side are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Compiled programs are kept between processes: 2.5 s for a training step become 0.1 s. By default jax would keep
    # only those that took a second, and small models are made of many that took less.
    cache = Path(os.environ.get("SORA_JAX_CACHE") or Path.home() / ".cache" / "sora_jax" / "xla")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written: slower, but no reason to stop
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@contextlib.contextmanager
def meeting(arguments: argparse.Namespace) -> Iterator[bool]:
    """Joins the other processes of a command, if the flags of flags.add_processes say that there are any, and leaves them in
    order; gives whether it did. A signal to one then stops all. Must come before anything else asks for devices.
    """
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if given == (None, None, None) and not arguments.distributed:
        yield False
        return
    if None in given and not arguments.distributed:
        raise Failure("--coordinator, --processes and --process go together; or give --distributed")
    prepare_jax()
    from sora_jax import processes, signals

    try:
        processes.start(*given)
        processes.check_alike(_alike(arguments))
    except ValueError as error:
        raise Failure(error) from error
    except RuntimeError as error:
        raise Failure(f"the processes did not meet: {error}", RUN_ERROR) from error
    try:
        with signals.handled():
            yield True
            processes.meet()  # the first may have to write for longer than jax waits for it
    except signals.Stopped:
        # This process ends without jax's own leave-taking, which ends the others' if it comes first.
        processes.leave(together=True)
        raise
    processes.leave()


def _alike(arguments: argparse.Namespace) -> str:
    """What all processes of a command are told alike."""
    own = ("process", "coordinator", "command", "parser", "verb")
    return repr({name: value for name, value in vars(arguments).items() if name not in own})


class _Plain(logging.Formatter):
    """Messages alone; warnings and worse say so."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Shows what sora_jax logs from INFO on, and what libraries log from WARNING on."""
    ours = str(Path(sora_jax.__file__).parent)

    def told(record: logging.LogRecord) -> bool:
        """Orbax's threads log, with tracebacks, what its call raises, too, and we say in a sentence."""
        return bool(record.exc_info) and "orbax" in record.pathname

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())

    def shown(record: logging.LogRecord) -> bool:
        # By file: parts of sora_jax and of the libraries share the root logger, and absl's is shared by orbax and grain.
        if record.levelno >= logging.WARNING:
            return record.pathname.startswith(ours) or not told(record)
        # What all processes do, the first one says.
        processes = sys.modules.get("sora_jax.processes")
        first = processes is None or not processes.several() or processes.is_first()
        return first and record.pathname.startswith(ours)

    handler.addFilter(shown)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)

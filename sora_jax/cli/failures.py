"""What ends a command in one sentence: a Failure with its exit code, and which exceptions become one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

USER_ERROR, RUN_ERROR, INTERRUPTED, TERMINATED = 2, 1, 130, 143
LOST = 75  # processes.LOST, known here without jax


class Failure(Exception):
    """A sentence for the user and its exit code; prog is the command that refuses, if not the running one."""

    def __init__(self, message: object, code: int = USER_ERROR, prog: str | None = None) -> None:
        # What a file says of itself may be in it, and could steer a terminal.
        super().__init__("".join(each if each.isprintable() else "?" for each in " ".join(str(message).split())))
        self.code, self.prog = code, prog


@contextlib.contextmanager
def errors_for_users(*kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions whose messages are written for users into a Failure.

    These are ConfigError, MeshError, a checkpoint that is damaged, of another model or cannot be read, another file that is
    none, a missing one, and `kinds`. ValueError may be one of them only around code that validates what the user gave: anywhere
    else it is a bug.
    """
    from sora_jax import checkpoint, config, disk, sharding

    refused: tuple[type[Exception], ...] = (
        config.ConfigError,
        sharding.MeshError,
        disk.FileError,
        checkpoint.MismatchError,
        *kinds,
    )

    try:
        yield
    except (checkpoint.CorruptCheckpointError, checkpoint.ReadError) as error:
        raise Failure(error, RUN_ERROR) from error
    except FileNotFoundError as error:
        # Our own have a sentence, the system's an errno: a file that we should have made ourselves.
        if error.errno is not None:
            raise
        raise Failure(error) from error
    except refused as error:
        raise Failure(error) from error


@contextlib.contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot write {error.filename or path}: {error.strerror}", RUN_ERROR) from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot make the folder {folder}: {error.strerror}") from error


def refuse_file(path: str | Path) -> None:
    if os.path.isfile(path):
        raise Failure(f"{path} is a file, not a checkpoint; give a work dir, or a step in one")

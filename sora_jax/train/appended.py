"""Files that grow by whole records while a run goes on, and that a full disk neither damages nor ends the run with."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from pathlib import Path

from sora_jax import disk

# Records that wait for a disk that is full; of more than these the oldest are lost.
MOST_WAITING = 10_000
MAX_LINE_BYTES = 2**20


class Appended:
    """A file to which records are appended, each whole or not at all.

    A write that fails is told once; its record waits and is tried again with the next one. `first` is written before all.
    A link in its place is not followed.
    """

    def __init__(self, path: Path, first: bytes = b"") -> None:
        self.path, self.failed = path, 0
        self._waiting = deque([first] if first else [], MOST_WAITING)
        self._file: int | None = None

    def write(self, record: bytes) -> None:
        self._waiting.append(record)
        self._flush()

    def _flush(self) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            _write_whole(self._file, b"".join(self._waiting))
        except OSError as error:
            if not self.failed:
                logging.error(
                    "cannot write %s: %s; the run goes on, and what was to be written waits", self.path, error.strerror
                )
            self.failed += 1
            return
        if self.failed:
            logging.warning("%s is written again, after %d writes that failed", self.path, self.failed)
        self.failed = 0
        self._waiting.clear()

    def close(self) -> None:
        """Tries once more what waits. Never raises OSError."""
        if self._waiting:
            self._flush()
        if self._waiting:
            logging.error("%s lacks its last %d records, which could not be written", self.path, len(self._waiting))
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _write_whole(file: int, content: bytes) -> None:
    """All of content, or, with OSError, nothing: a part that a full disk still took is cut off again."""
    written = 0
    try:
        while written < len(content):
            written += os.write(file, content[written:])
    except OSError:
        if written:
            os.ftruncate(file, os.fstat(file).st_size - written)
        raise


def mend(path: Path) -> bytes:
    """Makes a file of JSON lines end in a whole line; returns what has to be written to it before the next.

    A process that is killed while it writes leaves half a line, which is removed, or a whole one without its newline.
    """
    if path.is_symlink() or not path.is_file():
        return b""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE_BYTES))
        tail = file.read(MAX_LINE_BYTES)
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return b""
    with contextlib.suppress(disk.FileError):
        disk.parse_json(last, path)
        return b"\n"
    if len(last) == MAX_LINE_BYTES:
        return b"\n"  # no line of ours, and not ours to remove
    logging.warning("%s ended in half a line, which is removed", path)
    os.truncate(path, size - len(last))
    return b""

"""The seal of a folder: SHA256SUMS, the digest of every file in it, written last. Any byte that changes later is found.

In the format of coreutils: `sha256sum --check SHA256SUMS` in the folder does what `broken` does.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sora_jax import disk, processes

FILE = "SHA256SUMS"
_FAILED = "cannot be read: "
_READERS = 8  # threads that digest files
_MAX_BYTES = 2**25  # of a seal


def possible(root: epath.Path) -> bool:
    """In an object store nothing is renamed at once, and others would see a step that has no seal yet."""
    return "://" not in os.fspath(root)


def write(place: epath.Path, final: epath.Path) -> None:
    """Writes the seal of a step whose files are all there, and gives the step its name. All processes call it."""
    # Of the first process's list, as in broken.
    names = processes.joined({"all": _files(place)} if processes.is_first() else {})["all"]
    digests = _digests(place, names, to_disk=True)
    failed = None
    if processes.is_first():
        body = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        try:
            with open(place / FILE, "w") as file:
                file.write(_head(body) + body)
                file.flush()
                _to_disk(file.fileno())
            place.rename(final)
            # What a directory lists is on the disk, too, before older steps go.
            for directory in (final.parent, *(path for path, _, _ in os.walk(final))):
                _sync_directory(directory)
        except OSError as error:
            failed = error
    if processes.on_any(failed is not None):
        raise failed or OSError(f"the first process could not seal {place}")


def _head(body: str) -> str:
    """The first line, a comment to coreutils."""
    return f"# sha256 of the lines below: {hashlib.sha256(body.encode()).hexdigest()}\n"


def broken(directory: epath.Path, others: Collection[str] = ()) -> list[str]:
    """What is not as the seal says, of all files but those in folders of these other names; a line each, nothing if all is well.

    Several processes share the reading. Raises OSError if a file cannot be read, which says nothing about what is in it.
    """
    # What the first process finds there counts for all: they must read the same files, and a shared disk may tell each its own.
    told = _listed(directory, others) if processes.is_first() else {}
    told = processes.joined(told)
    found = _digests(directory, list(told["sealed"]))
    return told["wrong"] + [
        f"the file {name} is not what was saved" for name in sorted(found) if found[name] != told["sealed"][name]
    ]


def _listed(directory: epath.Path, others: Collection[str]) -> dict[str, Any]:
    """The digests that the seal has of files that are there, and in words what is missing or not of the step."""

    def asked(name: str) -> bool:
        return name != FILE and name.split("/")[0] not in others

    try:
        seal = disk.read_bytes(directory / FILE, _MAX_BYTES)
        head, _, body = seal.decode().partition("\n")
    except FileNotFoundError:
        return {"sealed": {}, "wrong": [f"the file {FILE} is missing"]}
    except (disk.FileError, UnicodeDecodeError):
        head, body = "", ""
    if f"{head}\n" != _head(body):
        return {"sealed": {}, "wrong": [f"the file {FILE} is not what was saved"]}
    lines = (line.partition("  ") for line in body.splitlines())
    sealed = {name: digest for digest, _, name in lines if asked(name)}
    present = [name for name in _files(directory) if asked(name)]
    return {
        "sealed": {name: sealed[name] for name in present if name in sealed},
        "wrong": [
            *(f"the file {name} is missing" for name in sorted(sealed.keys() - set(present))),
            *(f"the file {name} is not of this step; remove it" for name in sorted(set(present) - sealed.keys())),
        ],
    }


def _files(directory: epath.Path) -> list[str]:
    """All files below a directory by their paths in it, the largest first. Links to directories are files here: they lead out
    of it."""
    sizes = {}
    for parent, below, names in os.walk(directory):
        for name in (*names, *(each for each in below if os.path.islink(os.path.join(parent, each)))):
            path = os.path.join(parent, name)
            sizes[os.path.relpath(path, directory).replace(os.sep, "/")] = os.lstat(path).st_size
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _digests(directory: epath.Path, names: Sequence[str], *, to_disk: bool = False) -> dict[str, str]:
    """The sha256 of files, of which each process reads its part; "" of one that is gone, a link or no regular file.

    to_disk: what the system has not written yet is written first.
    """

    def digest(name: str) -> str:
        if os.path.islink(directory / name):
            return ""
        try:
            with disk.open_file(Path(directory / name), disk.ANY_SIZE) as file:
                if to_disk:
                    _to_disk(file.fileno())
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, disk.FileError):
            return ""
        except OSError as error:  # told to all, as all wait for each other
            return f"{_FAILED}{name}: {error!r}"

    own = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_READERS) as pool:
        found = processes.joined(dict(zip(own, pool.map(digest, own), strict=True)))
    if failed := next((value for value in found.values() if value.startswith(_FAILED)), None):
        raise OSError(failed.removeprefix(_FAILED))
    return found


def _to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that has no such thing
            raise


def _sync_directory(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _to_disk(descriptor)
    finally:
        os.close(descriptor)

"""Files: those that others may have written are read within caps or refused in one sentence, ours are written beside and renamed.

Nothing here can run what a file says, and no size that a file claims is allocated before it was held against what the file
has. numpy only: loader workers read with it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MAX_JSON_DEPTH = (
    64  # the parser's own limit, about 1000, is an error of another kind, and not that of what walks the values
)
MAX_JSON_BYTES = 2**24  # 20 times that in memory, if it is made of empty lists
MAX_ENTRIES = 2**16  # of an archive or of safetensors: each costs memory before anything of it is read
MAX_HEADER_BYTES = 2**24  # of safetensors
ANY_SIZE = 2**63
AGAIN = "fetch it again"


class FileError(ValueError):
    """A file that is not what it should be: the message names it, what came and the remedy."""


# Read ----------------------------------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike[str], most: int, remedy: str = AGAIN) -> bytes:
    """The content of a file. Raises FileError if it is no regular file or has more than `most` bytes, OSError as open does."""
    with open_file(Path(path), most, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:
        raise FileError(f"{path} grows while it is read; {remedy}")
    return content


def open_file(path: Path, most: int, remedy: str = AGAIN) -> io.BufferedIOBase:
    """A file to read. Raises FileError if it is no regular file or has more than `most` bytes, OSError as open does."""
    # Without waiting: the end of a pipe that nobody writes to would be waited for for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is no regular file; {remedy}")
    file = os.fdopen(descriptor, "rb")
    if found.st_size > most:
        file.close()
        raise FileError(f"{path} has {found.st_size} bytes, and at most {most} are read; {remedy}")
    return file


def read_json(path: str | os.PathLike[str], remedy: str = AGAIN, most: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises FileError as parse_json and read_bytes do, OSError as open does."""
    return parse_json(read_bytes(path, most, remedy), path, remedy)


def parse_json(content: bytes | str, path: object, remedy: str = AGAIN) -> Any:
    """The value of JSON that stood in `path`. Raises FileError for what is not JSON, is nested too deeply or is no Unicode.

    NaN and Infinity, which Python writes, are read.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be shown, hashed or written again
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON ({_words(error)}); {remedy}") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            return value
    raise FileError(f"{path} is JSON nested deeper than {MAX_JSON_DEPTH}; {remedy}")


def _children(node: dict | list) -> Any:
    return node.values() if isinstance(node, dict) else node


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def read_npy(path: str | os.PathLike[str], remedy: str = AGAIN) -> np.ndarray:
    """The numbers of an .npy file, which has exactly as many as it says. Raises FileError, OSError as open does."""
    with open_file(Path(path), ANY_SIZE, remedy) as file:
        count = os.fstat(file.fileno()).st_size
        return _array(file, count, str(path), remedy)


_MAX_NPY_HEADER = 2**12
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-zA-Z]\d{1,3})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n"
)


def npy_header(file: io.BufferedIOBase, name: str, remedy: str = AGAIN) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) an .npy file claims; leaves it at its values. Raises FileError if it is none of numbers."""
    try:
        version = np.lib.format.read_magic(file)
        length = int.from_bytes(file.read({(1, 0): 2, (2, 0): 4}[version]), "little")
        # By its one form and not by Python's parser, as numpy does: that one can be made to fall by what it is given.
        found = _NPY_HEADER.fullmatch(file.read(length).decode("latin-1") if length <= _MAX_NPY_HEADER else "")
        if found is None:
            raise ValueError("its header is none that numpy writes")
        dtype, fortran = np.dtype(found[1]), found[2] == "True"
        shape = tuple(int(size) for size in found[3].replace(",", " ").split())
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{name} is no array file ({_words(error)}); {remedy}") from error
    if dtype.kind not in "biuf":
        raise FileError(f"{name} holds {str(dtype)[:100]}, not numbers; {remedy}")
    return shape, fortran, dtype


def _array(file: io.BufferedIOBase, num_bytes: int, name: str, remedy: str) -> np.ndarray:
    shape, fortran, dtype = npy_header(file, name, remedy)
    if math.prod(shape) * dtype.itemsize != (left := num_bytes - file.tell()):
        raise FileError(f"{name} claims {dtype}{str(list(shape))[:100]} and has {left} bytes of values; {remedy}")
    content = file.read()
    try:
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy(order="K")
    except ValueError as error:  # shorter than its size was, or with more axes than numpy has
        raise FileError(f"{name} is not a whole array ({_words(error)}); {remedy}") from error


def read_npz(path: str | os.PathLike[str], most: int, remedy: str = AGAIN) -> dict[str, np.ndarray]:
    """The arrays of numbers of an .npz file by name, of at most `most` bytes, as a file and in memory.

    Raises FileError, OSError as open does.
    """
    # In memory, where what unfolds is known before it does: an entry never gives more than it has declared.
    content = read_bytes(path, most, remedy)
    try:
        check_archive(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            told = content[content.rfind(b"PK\x05\x06") + 10 :][:2]
            if int.from_bytes(told, "little") not in (len(entries), 2**16 - 1):
                raise FileError(f"{path} lists {len(entries)} entries and claims others; {remedy}")
            claimed = sum(entry.file_size for entry in entries)
            if claimed > most:
                raise FileError(f"{path} unfolds to {claimed} bytes, and at most {most} are read; {remedy}")
            arrays: dict[str, np.ndarray] = {}
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename or name in arrays:
                    raise FileError(f"{path} has an entry {entry.filename[:100]!r} that is none of its own; {remedy}")
                if entry.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):  # others take memory as they like
                    raise FileError(f"{name[:100]!r} in {path} is compressed as numpy never does; {remedy}")
                inside = archive.read(entry)
                arrays[name] = _array(io.BytesIO(inside), len(inside), f"{name[:100]!r} in {path}", remedy)
            return arrays
    except FileError:
        raise
    except (*ARCHIVE_ERRORS, KeyError) as error:
        raise FileError(f"{path} is not a whole .npz file ({_words(error)}); {remedy}") from error


# zipfile has a type of its own for each way in which an archive can be damaged.
ARCHIVE_ERRORS = (ValueError, RuntimeError, EOFError, OverflowError, zipfile.BadZipFile, zlib.error)


def check_archive(content: bytes) -> None:
    """Raises FileError for a zip archive of so many entries that their list alone would fill the memory."""
    if content.count(b"PK\x01\x02") > MAX_ENTRIES:
        raise FileError(f"it is an archive of more than {MAX_ENTRIES} entries")


def read_safetensors(
    path: str | os.PathLike[str], most: int | None = None, remedy: str = AGAIN
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file, of at most `most` bytes if that is given.

    Raises FileError for one that is damaged, not whole or has an immense header, OSError as open does.
    """
    import safetensors
    import safetensors.numpy

    with open_file(Path(path), ANY_SIZE if most is None else most, remedy) as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if length > MAX_HEADER_BYTES or header.count(b"data_offsets") > MAX_ENTRIES:
        raise FileError(
            f"{path} is not a whole safetensors file, or has a header of more than {MAX_HEADER_BYTES} bytes or "
            f"{MAX_ENTRIES} tensors; {remedy}"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
        return safetensors.numpy.load_file(path), metadata
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{path} is not a whole safetensors file ({_words(error)}); {remedy}") from error


# Write ---------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none: written beside, then renamed. A link of that name is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

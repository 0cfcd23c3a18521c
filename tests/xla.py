"""What makes XLA compile the small programs of tests faster, here and in the processes that tests start."""

import functools
import importlib.util
import mmap
from pathlib import Path


@functools.cache
def flags():
    """For XLA_FLAGS. Most of the time of the tests goes into compiling small programs, which need not be fast."""
    chosen = ["--xla_backend_optimization_level=0"]
    # Each fusion through MLIR takes half of a compilation, and a program that threads compile in parts a quarter more than a
    # whole one where all are small. Neither changes a sum: which threads an operation has would.
    for name, value in {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}.items():
        if _is_known(name):
            chosen.append(f"--{name}={value}")
    return " ".join(chosen)


def _is_known(flag):
    """Whether this version of XLA has a flag: one that it does not know ends the process.

    A flag's name is a string by itself; within others, as in that of names that are not to be used again, it may outlive the flag.
    """
    folder = Path(importlib.util.find_spec("jaxlib").origin).parent
    for library in sorted(folder.glob("*.so"), key=lambda path: -path.stat().st_size)[:2]:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\0" + flag.encode() + b"\0") >= 0:
                return True
    return False

"""The command sora-jax: its flags are in cli/flags.py, what its verbs do beside it.

Nothing heavy is imported before a verb needs it: help and refusals come at once. What a user can get wrong ends in one
sentence and exit code 2, what a run can (divergence, a damaged checkpoint) in one sentence and 1, an interrupt in one
and 130; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from sora_jax.cli import flags
from sora_jax.cli.failures import INTERRUPTED, RUN_ERROR, TERMINATED, Failure
from sora_jax.cli.process import logging_to_stderr

# Module and function of every verb, imported when it is asked for.
VERBS = {
    "train": ("train", "train"),
    "study": ("train", "study"),
    "plan": ("plan", "plan"),
    "sample": ("sample", "sample"),
    "caption": ("evaluate", "caption"),
    "evaluate": ("evaluate", "evaluate"),
    "inspect": ("checkpoints", "inspect"),
    "export": ("checkpoints", "export"),
    "import": ("checkpoints", "import_"),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Without argv it is the whole process, of sys.argv."""
    if argv is not None:
        return _run(argv)
    try:
        code = _run(sys.argv[1:])
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = RUN_ERROR
    if code in (INTERRUPTED, TERMINATED) or (code and _one_of_several()):
        # Saves are atomic, so nothing is lost; but orbax's threads would wait minutes for one that was cut short, and jax for
        # the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _one_of_several() -> bool:
    processes = sys.modules.get("sora_jax.processes")
    return processes is not None and processes.several()


def _run(argv: Sequence[str]) -> int:
    prog = "sora-jax"
    try:
        arguments = flags.parse(argv)
        prog = arguments.parser.prog
        with logging_to_stderr():
            _function_of(arguments.verb)(arguments)
    except Failure as failure:
        print(f"{failure.prog or prog}: error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print(f"{prog}: error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough; Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUN_ERROR
    except SystemExit as exit:  # --help and --version
        return int(exit.code or 0)
    return 0


def _function_of(verb: str) -> Callable[[argparse.Namespace], None]:
    module, function = VERBS[verb]
    return getattr(importlib.import_module(f"sora_jax.cli.{module}"), function)


if __name__ == "__main__":
    sys.exit(run())

"""The command sora-jax: each verb and its flags are in cli/.

Nothing heavy is imported before a verb needs it: help and refusals come at once. What a user can get wrong ends in one
sentence and exit code 2, what a run can (divergence, a damaged checkpoint) in one sentence and 1, an interrupt in one
and 130 or 143, a lost process in one and 75; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import sora_jax
from sora_jax.cli import checkpoints, evaluate, flags, plan, sample, train
from sora_jax.cli.failures import INTERRUPTED, RUN_ERROR, TERMINATED, Failure
from sora_jax.cli.process import logging_to_stderr


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Without argv it is the whole process, of sys.argv."""
    if argv is not None:
        return _run(argv)
    try:
        code = _run(sys.argv[1:])
    except Exception as error:
        if not _one_of_several():
            raise
        from sora_jax import processes

        processes.blame(error)
        traceback.print_exc()
        code = RUN_ERROR
    if code in (INTERRUPTED, TERMINATED) or (code and _one_of_several()):
        if _one_of_several():
            from sora_jax import processes

            processes.fail(code)
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
        arguments = flags.parse(make_parser(), argv)
        prog = arguments.parser.prog
        with logging_to_stderr():
            arguments.verb(arguments)
    except Failure as failure:
        print(f"{failure.prog or prog}: error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt as interrupt:
        print(f"{prog}: error: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return getattr(interrupt, "code", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough; Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUN_ERROR
    except SystemExit as exit:  # --help and --version
        return int(exit.code or 0)
    return 0


def make_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="sora-jax",
        description="Train a small Sora, measure it, and sample videos from text.",
        epilog="""examples:
  sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart
  sora-jax sample --checkpoint=runs/quickstart/dit --prompt="a red circle moves left" --out=red.mp4
  sora-jax VERB --help

environment:
  SORA_JAX_CACHE  folder of compiled programs (default: ~/.cache/sora_jax/xla); JAX's own JAX_* variables come first""",
    )
    parser.add_argument(
        "--version", action="version", version=f"sora_jax {sora_jax.__version__}", help="print the version"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, title="verbs")
    for add in (
        train.add_train,
        train.add_study,
        plan.add_plan,
        sample.add_sample,
        evaluate.add_caption,
        evaluate.add_evaluate,
        checkpoints.add_inspect,
        checkpoints.add_export,
        checkpoints.add_import,
    ):
        add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(run())

"""The verbs inspect, export and import, with their flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli import flags
from sora_jax.cli.failures import RUN_ERROR, Failure, errors_for_users, make_folder, refuse_file
from sora_jax.cli.process import prepare_jax

if TYPE_CHECKING:
    from sora_jax.checkpoint import Description


def add_inspect(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "inspect",
        inspect,
        "show what a checkpoint holds",
        "Show a checkpoint's step, arrays (shapes, dtypes, counts) and config, verify it, or compare it with another.\n"
        "Takes no accelerator, and without --verify and --diff reads no array.",
        """examples:
  sora-jax inspect runs/quickstart/dit
  sora-jax inspect runs/quickstart/dit/1600 --depth=-1
  sora-jax inspect runs/quickstart/vae --json | jq .num_parameters
  sora-jax inspect runs/quickstart/dit --verify
  sora-jax inspect runs/a --diff=runs/b --depth=3""",
    )
    parser.add_argument("path", metavar="PATH", help="a work dir, for its newest step, or one step in it (required)")
    parser.add_argument(
        "--depth",
        type=int,
        default=2,
        metavar="N",
        help="levels of modules that get a row of their own, -1 for every array (default: %(default)s)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--json", action="store_true", help="print all of it, every array, as JSON (default: a page of text)"
    )
    what.add_argument(
        "--verify",
        action="store_true",
        help="read every array and hold it against its fingerprint; exits with 1 if one differs (default: read none)",
    )
    what.add_argument(
        "--diff",
        metavar="OTHER",
        help="show what changed from PATH to OTHER: meta, and arrays by norm (default: show PATH)",
    )


def add_export(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "export",
        export,
        "write averaged weights as safetensors",
        "Write the averaged weights of a checkpoint as model.safetensors, with config.json and a model card (README.md).",
        """examples:
  sora-jax export runs/quickstart/dit --out=red-circles
  sora-jax import red-circles --workdir=runs/red-circles""",
    )
    parser.add_argument("path", metavar="PATH", help="a work dir, for its newest step, or one step in it (required)")
    parser.add_argument("--out", type=flags.path, required=True, metavar="DIR", help="folder to make (required)")


def add_import(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "import",
        import_,
        "make a checkpoint of exported weights",
        "Make a checkpoint of what `sora-jax export` wrote, to sample and evaluate; it cannot be trained on.\n"
        "Every array is held against its fingerprint.",
        """examples:
  sora-jax import red-circles --workdir=runs/red-circles""",
    )
    parser.add_argument("folder", type=flags.path, metavar="DIR", help="folder that export made (required)")
    parser.add_argument(
        "--workdir", type=flags.path, required=True, metavar="DIR", help="where the checkpoint goes (required)"
    )


def inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds, whether it is whole, or how it differs from another."""
    # A look at a checkpoint must not claim the chips of the run that writes it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import checkpoint, checkpoint_text, config

    depth = None if arguments.depth < 0 else arguments.depth
    refuse_file(arguments.path)
    if arguments.verify:
        with errors_for_users(ValueError):
            verified = checkpoint.verify(arguments.path)
        if verified.wrong:
            raise Failure(f"{verified.path} is damaged: {'; '.join(verified.wrong)}", RUN_ERROR)
        how = (
            "are what was saved"
            if verified.fingerprints
            else "can be read; it has no fingerprints to hold them against"
        )
        print(f"{verified.path}: all {verified.num_arrays} arrays {how}")
        return
    with errors_for_users(ValueError):
        description = checkpoint.describe(arguments.path)
    if arguments.diff is not None:
        refuse_file(arguments.diff)
        with errors_for_users(ValueError):
            other = checkpoint.describe(arguments.diff)
            found = checkpoint.changes(arguments.path, arguments.diff)
        for line in config.differences(description.meta, other.meta):
            print(line)
        print(checkpoint_text.changes(found, depth))
        return
    metrics = _metrics(description)
    if not arguments.json:
        print(checkpoint_text.description(description, depth))
        for kind, last in metrics.items():
            print(f"\n{kind} metrics at step {last['step']:,}")
            print("\n".join(f"  {name}: {value:.6g}" for name, value in last.items() if isinstance(value, float)))
        return
    counts = {name: description.num_parameters(name) for name in description.items}
    print(json.dumps(dataclasses.asdict(description) | {"num_parameters": counts, "metrics": metrics}, indent=2))


def _metrics(description: Description) -> dict[str, dict[str, Any]]:
    """The last lines that the run wrote up to this step, by kind; none of a checkpoint that is not in a work dir."""
    from sora_jax.train import progress

    if description.step is None or "://" in description.path:
        return {}
    lines = {kind: progress.read_metrics(Path(description.path).parent, kind) for kind in ("train", "eval")}
    upto = {kind: [line for line in some if line["step"] <= description.step] for kind, some in lines.items()}
    return {kind: some[-1] for kind, some in upto.items() if some}


def export(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint's averaged weights for others."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import export as exporting
    from sora_jax.train import progress

    refuse_file(arguments.path)
    with errors_for_users(ValueError):
        evaluations = progress.read_metrics(Path(arguments.path), "eval")
        found = {
            name: x for name, x in (evaluations or [{}])[-1].items() if name not in ("kind", "step", "total_flops")
        }
        sizes = exporting.export_weights(Path(arguments.path), arguments.out, found)
    print(f"{arguments.out}: {sizes['ema']:,} parameters in {exporting.WEIGHTS}; the model card is README.md")


def import_(arguments: argparse.Namespace) -> None:
    """Makes a checkpoint of exported weights."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import checkpoint
    from sora_jax import export as exporting
    from sora_jax.train import lock

    make_folder(arguments.workdir)
    try:
        with errors_for_users(ValueError), lock.locked(arguments.workdir):
            step = exporting.import_weights(arguments.folder, arguments.workdir)
    except checkpoint.SaveError as error:
        raise Failure(error, RUN_ERROR) from error
    print(f"{arguments.workdir}: step {step}, whole; sample with --checkpoint={arguments.workdir}")

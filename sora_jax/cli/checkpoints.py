"""The verbs inspect, export and import."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.cli.failures import RUN_ERROR, Failure, errors_for_users, make_folder, refuse_file
from sora_jax.cli.process import prepare_jax

if TYPE_CHECKING:
    from sora_jax.checkpoint import Description


def inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds, whether it is whole, or how it differs from another."""
    # A look at a checkpoint must not claim the chips of the run that writes it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    from sora_jax import checkpoint, config

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
        print(checkpoint.format_changes(found, depth))
        return
    metrics = _metrics(description)
    if not arguments.json:
        print(checkpoint.format_description(description, depth))
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

"""Weights for others: the averaged weights of a checkpoint as one safetensors file with a model card, and back, to the bit.

The file has every array that sampling needs, under "ITEM/path", and in its metadata a record (config, dtypes, shapes,
fingerprints) with a digest: what comes back is what went out, or an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax import checkpoint, config, disk, fingerprints

WEIGHTS = "model.safetensors"
ITEMS = ("ema", "rest")
# Of a checkpoint's meta, what says how to go on with the run.
OF_THE_RUN = ("loader", "seconds", "judged", "rollbacks")


class ExportError(disk.FileError):
    """Files that are not, or not any more, what export_weights wrote; or a place that is taken."""


class Kind(NamedTuple):
    """What a card says of the models of a task: their name, tags and task as hubs name these, and how they are used."""

    name: str
    tags: str
    pipeline: str = ""
    use: str = ""


KINDS = {
    "vae": Kind("video VAE", "video, vae"),
    "dit": Kind(
        "text-to-video diffusion transformer",
        "text-to-video, diffusion",
        "text-to-video",
        'sample {} --prompt="a red circle moves left" --out=red.mp4',
    ),
    "captioner": Kind("video captioner", "video-text-to-text, captioning", "video-text-to-text", "caption {} clip.mp4"),
}


def export_weights(path: Path, out: Path, evaluation: Mapping[str, float] | None = None) -> dict[str, int]:
    """Writes the newest good step of a work dir to the folder `out`: model.safetensors, config.json and README.md.

    evaluation is what the card says of quality. Returns the number of values by item. The folder appears when it is whole.
    Raises ExportError if it is there already, ConfigError if the checkpoint has no config of ours, and as checkpoint.restore.
    """
    import safetensors.numpy

    out = Path(out)
    if out.exists():
        raise ExportError(f"{out} exists; choose another folder or remove it")
    described = checkpoint.describe(path)
    home, step = Path(described.path).parent, described.step
    meta = {name: value for name, value in checkpoint.read_meta(home, step).items() if name not in OF_THE_RUN}
    config.from_stored(meta.get("config"))  # of another's checkpoint no card can be written
    arrays = {f"{item}/{name}": x for item in ITEMS for name, x in _flat(checkpoint.restore_nested(home, item, step))}
    record = {
        "step": step,
        "meta": meta,
        "source": checkpoint.digest(home),
        "arrays": {name: _described(x, found) for (name, x), found in _with_prints(arrays)},
    }
    told = json.dumps(record, sort_keys=True)
    metadata = {"format": "sora_jax", "record": told, "sha256": hashlib.sha256(told.encode()).hexdigest()}
    sizes = {item: sum(x.size for name, x in arrays.items() if name.startswith(f"{item}/")) for item in ITEMS}
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    safetensors.numpy.save_file(
        {name: np.asarray(x, order="C") for name, x in arrays.items()}, partial / WEIGHTS, metadata
    )
    (partial / "config.json").write_text(json.dumps(meta["config"], indent=2))
    (partial / "README.md").write_text(card(record, sizes["ema"], evaluation or {}, out.name))
    os.replace(partial, out)
    return sizes


def import_weights(folder: Path, workdir: Path) -> int:
    """Makes a checkpoint in workdir of what export_weights wrote; returns its step.

    It can be sampled and evaluated, but not trained on: optimizer and loader were not exported. Raises ExportError if the
    file is not what was written, or workdir holds a checkpoint.
    """
    if checkpoint.steps(workdir):
        raise ExportError(f"{workdir} holds a checkpoint; choose another folder")
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ExportError(f"{path} does not exist; give the folder that `sora-jax export` wrote")
    try:
        arrays, metadata = disk.read_safetensors(path)
    except disk.FileError as error:
        raise ExportError(str(error)) from error
    told = metadata.get("record", "")
    if metadata.get("format") != "sora_jax":
        raise ExportError(f"{path} was not written by `sora-jax export`")
    if hashlib.sha256(told.encode()).hexdigest() != metadata.get("sha256"):
        raise ExportError(f"the metadata of {path} is not what was written; fetch it again")
    record = _record(path, told)
    found = {name: _described(x, prints) for (name, x), prints in _with_prints(arrays)}
    if wrong := [name for name in {**record["arrays"], **found} if record["arrays"].get(name) != found.get(name)]:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise ExportError(f"{path}: {wrong[0]}{more} is not what was written; fetch it again")
    items = {
        item: {n.removeprefix(f"{item}/"): x for n, x in arrays.items() if n.startswith(f"{item}/")} for item in ITEMS
    }
    checkpoint.save(workdir, record["step"], items, record["meta"] | {"imported_from": record["source"]}, keep=1)
    return record["step"]


def _record(path: Path, told: str) -> dict[str, Any]:
    """The record in a file of weights, whose digest anyone can make. Raises ExportError unless it describes a run of ours."""
    try:
        record = disk.parse_json(told, f"the record of {path}")
        step, meta, source = record["step"], record["meta"], record["source"]
        if type(step) is not int or step < 0 or not isinstance(meta, dict) or not isinstance(source, str):
            raise ExportError(f"{path} names no step, meta and source; fetch it again")
        if not isinstance(record["arrays"], dict):
            raise ExportError(f"{path} describes no arrays; fetch it again")
        config.from_stored(meta.get("config"))
    except (LookupError, TypeError) as error:
        raise ExportError(f"the record of {path} lacks {error}; fetch it again") from error
    except disk.FileError as error:
        raise ExportError(str(error)) from error
    except config.ConfigError as error:
        raise ExportError(f"{path} has no config that can be run: {error}") from error
    return record


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, np.ndarray]]:
    found: list[tuple[str, np.ndarray]] = []
    for name, node in tree.items():
        found += (
            _flat(node, f"{prefix}{name}/") if isinstance(node, Mapping) else [(f"{prefix}{name}", np.asarray(node))]
        )
    return found


def _with_prints(arrays: Mapping[str, np.ndarray]) -> Any:
    return zip(arrays.items(), fingerprints.of(arrays).values(), strict=True)


def _described(x: np.ndarray, prints: tuple[int, int]) -> list[Any]:
    return [str(x.dtype), list(x.shape), *prints]


def _versions(meta: Mapping[str, Any]) -> dict[str, str]:
    """As far as they are words without spaces, since a card says what it is told."""
    told = meta.get("versions")
    return (
        {key: x for key, x in told.items() if isinstance(x, str) and not set(key + x) & set(" \n<>")}
        if isinstance(told, dict)
        else {}
    )


def _listed(values: Any) -> str:
    distinct = sorted({tuple(x) if isinstance(x, list) else x for x in values})
    return ", ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in distinct)


def card(record: Mapping[str, Any], parameters: int, evaluation: Mapping[str, float], name: str) -> str:
    """The model card, as hubs of models read it: front matter, then what it is, how it was made and how to use it."""
    meta = record["meta"]
    run = meta["config"]
    kind = KINDS[run["task"]]
    world = run["data"]["world"]
    pipeline = [f"pipeline_tag: {kind.pipeline}"] if kind.pipeline else []
    scores = [f"| {key} | {value:.4g} |" for key, value in evaluation.items() if not key.endswith("_count")]
    lines = [
        *("---", "license: apache-2.0", "library_name: sora_jax", f"tags: [{kind.tags}, jax]", *pipeline, "---", ""),
        *(f"# {name}", "", f"A {kind.name} of {parameters:,} parameters (averaged over training), by sora_jax.", ""),
        *(
            "## Training",
            "",
            f"- step {record['step']}, {config.stored_number(meta, 'total_flops', name):.3g} training FLOPs in all",
        ),
        f"- data: a procedural world of moving shapes, {run['data']['train_clips']} clips of "
        f"{_listed(world['frame_counts'])} frames of {_listed(world['frame_sizes'])} pixels (height, width)"
        + ", of which the middle square" * bool(world.get("square"))
        + f", {world['to_and_fro']:.0%} of the videos played to and fro" * bool(world.get("to_and_fro")),
        "- versions: " + ", ".join(f"{key} {value}" for key, value in _versions(meta).items()),
        *(f"- digest of the checkpoint: `{record['source']}`", "- all settings: config.json", ""),
        *(("## Held-out clips", "", "| measure | value |", "| --- | --- |", *scores, "") if scores else ()),
        *(
            "## Use",
            "",
            f"    sora-jax import {name} --workdir=runs/{name}",
            *([f"    sora-jax {kind.use.format(f'--checkpoint=runs/{name}')}"] if kind.use else []),
            "",
        ),
        *("## Limits", "", "It knows the world it was trained on and nothing else; it is no model of real video.", ""),
    ]
    return "\n".join(lines)

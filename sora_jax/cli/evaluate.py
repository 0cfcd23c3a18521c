"""The verbs evaluate and caption."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging

from sora_jax.cli import trained
from sora_jax.cli.failures import Failure, errors_for_users, errors_of_writing
from sora_jax.cli.process import prepare_jax


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the scores of a trained model, and writes them as JSON."""
    if arguments.fvd_videos is not None and arguments.i3d_weights is None:
        raise Failure("--fvd_videos is for FVD; give --i3d_weights too")
    if arguments.out is not None and arguments.out.is_dir():
        raise Failure(f"--out={arguments.out} is a folder; name a file in it")
    pipeline, (_, step) = trained.load(arguments.checkpoint, arguments.mesh)
    settings = trained.settings(pipeline, arguments)
    from sora_jax.evaluate import fvd
    from sora_jax.generate import files
    from sora_jax.study import judgement

    with errors_for_users(ValueError):
        scores = judgement.evaluate(
            pipeline,
            settings,
            arguments.prompts,
            arguments.seed,
            arguments.i3d_weights,
            arguments.fvd_videos or fvd.NUM_VIDEOS,
        )
    trained.tell_mesh(pipeline)
    print(judgement.table(scores))
    if arguments.out is not None:
        found = {
            "checkpoint": str(arguments.checkpoint.absolute()),
            "step": step,
            "command": arguments.command,
            "sampler": dataclasses.asdict(settings),
        } | scores
        with errors_of_writing(arguments.out):
            files.write_atomically(arguments.out, (json.dumps(found, indent=2) + "\n").encode())


def caption(arguments: argparse.Namespace) -> None:
    """Prints captions of files, and writes them as JSON."""
    if arguments.out is not None and arguments.out.is_dir():
        raise Failure(f"--out={arguments.out} is a folder; name a file in it")
    prepare_jax()
    from sora_jax import disk
    from sora_jax.generate import describe

    with errors_for_users(ValueError):
        made = describe.load(*trained.parted(arguments.checkpoint))
        videos = [made.read(path) for path in arguments.files]
        for line in dict.fromkeys(line for video in videos for line in video.told):
            logging.info("%s", line)
        said = made.describe([video.frames_THWC for video in videos], [video.fps or 1.0 for video in videos])
    for path, text in zip(arguments.files, said, strict=True):
        print(f"{path}  {text}")
    if arguments.out is not None:
        content = {str(path): text for path, text in zip(arguments.files, said, strict=True)}
        with errors_of_writing(arguments.out):
            disk.write_atomically(arguments.out, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

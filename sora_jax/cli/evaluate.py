"""The verbs evaluate and caption, with their flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from typing import Any

from sora_jax.cli import flags, trained
from sora_jax.cli.failures import LOST, Failure, errors_for_users, errors_of_writing
from sora_jax.cli.process import meeting, prepare_jax


def add_evaluate(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "evaluate",
        evaluate,
        "measure how well a trained model does what it is told",
        "Sample held-out prompts from a trained diffusion transformer and measure them: adherence by attribute with its\n"
        "floor and ceiling; where its weights are installed the Frechet distance FD-MobileNetV2 of samples without\n"
        "guidance, from real clips and from real clips through the VAE; and with the weights of I3D the true FVD.",
        """examples:
  sora-jax evaluate --checkpoint=runs/quickstart/dit
  sora-jax evaluate --checkpoint=runs/quickstart/dit --prompts=2048 --out=scores.json
  sora-jax evaluate --checkpoint=runs/quickstart/dit --i3d_weights=i3d_pretrained_400.pt""",
    )
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--prompts",
        type=flags.count,
        default=512,
        metavar="N",
        help="held-out prompts to sample (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=flags.seed,
        default=0,
        metavar="N",
        help="seed of the first prompt's sample (default: %(default)s)",
    )
    flags.add_sampler(parser)
    parser.add_argument(
        "--i3d_weights",
        type=flags.path,
        metavar="FILE",
        help="I3D of Kinetics-400 as .pt, .pth, .safetensors or .npz with the names of its PyTorch port (default: no FVD)",
    )
    parser.add_argument(
        "--fvd_videos",
        type=flags.count,
        metavar="N",
        help="videos a side for FVD; other numbers than the published one are biased and named (default: 2048)",
    )
    flags.add_processes(
        parser,
        "The same command on every machine, with files that all of them see; the first prints and writes. Where one dies the\n"
        f"others stop within seconds with exit code {LOST}.",
    )
    parser.add_argument("--out", type=flags.path, metavar="FILE", help="JSON file to write (default: only print)")


def add_caption(verbs: Any) -> None:
    parser = flags.add_verb(
        verbs,
        "caption",
        caption,
        "say in words what videos and images show",
        "Write a caption of each file with a trained captioner, one a line. Files of any size are fitted to whole cells of the\n"
        "model's VAE (told).",
        """examples:
  sora-jax train --config=experiments/captioner.py --workdir=runs/captioner
  sora-jax caption clip.mp4 picture.png --checkpoint=runs/captioner
  sora-jax caption clips/*.mp4 --checkpoint=runs/captioner --out=captions.json""",
    )
    parser.add_argument("files", type=flags.path, nargs="+", metavar="FILE", help="videos or images (required)")
    parser.add_argument(
        "--checkpoint",
        type=flags.path,
        required=True,
        metavar="DIR",
        help="work dir of a trained captioner, or one step in it (required)",
    )
    parser.add_argument(
        "--out", type=flags.path, metavar="FILE", help="JSON file of captions by file (default: only print)"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the scores of a trained model, and writes them as JSON."""
    if arguments.fvd_videos is not None and arguments.i3d_weights is None:
        raise Failure("--fvd_videos is for FVD; give --i3d_weights too")
    if arguments.out is not None and arguments.out.is_dir():
        raise Failure(f"--out={arguments.out} is a folder; name a file in it")
    samples = max(arguments.prompts, arguments.fvd_videos or 0)
    if arguments.seed + samples - 1 > flags.MAX_SEED:
        raise Failure(
            f"--seed={arguments.seed} with {samples} samples goes beyond {flags.MAX_SEED}; choose a smaller seed"
        )
    with meeting(arguments):
        _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    pipeline, (folder, step), settings = trained.load_with(arguments.checkpoint, arguments)
    from sora_jax import checkpoint, processes
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
    if not processes.is_first():
        return
    print(judgement.table(scores))
    if arguments.out is not None:
        found = {
            "checkpoint": str(arguments.checkpoint.absolute()),
            "step": step,
            "total_flops": checkpoint.read_meta(folder, step).get("total_flops"),
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

"""What flags ask for: orders, prompts and sizes."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sora_jax.cli.failures import Failure

if TYPE_CHECKING:
    from sora_jax.config import DiTRun
    from sora_jax.data.worlds.world import WorldConfig
    from sora_jax.generate import canvas, requests

MAX_PROMPT_BYTES = 2**26
# Flags that are keys of an order.
ORDER_FLAGS = (
    *("height", "width", "frames", "seconds", "fps", "samples", "start", "end", "window", "fit", "known_guidance"),
    *("image", "extend", "direction", "connect", "loop", "edit", "strength", "inpaint", "mask"),
    *("outpaint", "left", "right", "top", "bottom", "interpolate", "factor", "draft"),
)


def orders_of(arguments: argparse.Namespace) -> list[requests.Order]:
    """The orders of a request file or of the flags. Raises ValueError for what cannot be meant."""
    from sora_jax.generate import requests

    if arguments.requests is not None:
        refuse_flags(arguments, "the request file says it", "seed", *ORDER_FLAGS)
        return requests.read_orders(arguments.requests)
    given = {name: value for name in ORDER_FLAGS if (value := getattr(arguments, name)) is not None}
    prompted = arguments.prompt is not None or arguments.prompts_file is not None
    if not prompted and not any(name in given for name in requests.MODES):
        raise Failure(
            "nothing says what to make; give --prompt, --prompts_file, --requests, --manifest or an image or a video"
        )
    prompts = prompts_of(arguments) if prompted else [""]
    return [requests.from_mapping({"prompt": prompt, "seed": arguments.seed or 0} | given) for prompt in prompts]


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """Prompts without outer spaces, and without the blank lines of a file. Raises Failure for an empty one or none."""
    file = arguments.prompts_file
    if file is None:
        if arguments.prompt is None:
            raise Failure("nothing says what to show; give --prompt or --prompts_file")
        prompts = [prompt.strip() for prompt in arguments.prompt]
        if not all(prompts):
            raise Failure(
                "--prompt is empty; say what to show, such as --prompt='a red circle moves left', or of an image or a video "
                "leave --prompt out"
            )
        return prompts
    try:
        # A pipe will do, so there may be no size to ask for.
        content = first_bytes(file, MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise Failure(f"--prompts_file={file} has more than {MAX_PROMPT_BYTES} bytes; split it")
        # Ends of lines alone end a prompt, not all that Unicode counts among them.
        prompts = [line.strip() for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise Failure(f"cannot read --prompts_file={file}: {error.strerror}; name a file that can be read") from error
    except UnicodeDecodeError as error:
        raise Failure(f"--prompts_file={file} is not UTF-8 text; save it as such") from error
    if not prompts:
        raise Failure(f"--prompts_file={file} holds no prompt; write one per line")
    return prompts


def refuse_flags(arguments: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise Failure(f"{why}; leave --{name} out")


def size_of(arguments: argparse.Namespace, usual: requests.Size) -> requests.Size:
    """The size of the flags, and where there is none, the usual one."""
    given = {name: getattr(arguments, name) for name in ("height", "width", "frames", "fps")}
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def warn_of(size: requests.Size, world: WorldConfig) -> None:
    """Warns of a size that can be made but was not trained on."""
    known = (size.height, size.width) in world.clip_sizes and size.frames <= max(world.frame_counts)
    if known and (size.frames == 1 or size.fps in world.fps):
        return
    sizes, rates = ", ".join(f"{h}x{w}" for h, w in world.clip_sizes), ", ".join(f"{rate:g}" for rate in world.fps)
    logging.warning(
        "%s is not what the checkpoint was trained on, expect less of it; that was %s, up to %d frames, at %s fps",
        size, sizes, max(world.frame_counts), rates,
    )  # fmt: skip


def warn_of_given(jobs: Iterable[canvas.Job], run: DiTRun) -> None:
    """Warns of jobs that go on from something, of a model that was trained from text alone."""
    if any(job.goes_on for job in jobs) and not (run.loader.known.gives or run.data.world.to_and_fro):
        logging.warning(
            "this checkpoint was trained from text alone, so what is made may not go with what is there already; one trained with "
            "masks (loader.known), as by experiments/prompting.py, goes on from it"
        )


def first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)

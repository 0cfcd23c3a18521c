"""Native frames against squares: one model sees whole frames of any aspect, the other their middle squares, resized and of
one length, as was done before.

sora-jax study --config=experiments/native_vs_crop.py --workdir=runs/native_vs_crop
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("",)
DIT_STEPS = 1700


def get_config(arg: str = "") -> ConfigDict:
    """One VAE and two DiTs of the same size, rows and steps, and so of the same compute."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    vae = parts.vae_run(world(square=False), parts.VAE_STEPS)
    runs = {name: parts.dit_run(world(name == "square"), DIT_STEPS, "vae") for name in ("native", "square")}
    # As many tokens a step, a clip a row: of rows of 144 tokens nearly half would be padding.
    runs["square"].pack.update(rows=18, row_tokens=80)
    return parts.study("Native frames against squares", dict(vae=vae), dict(framing=runs), prompts=256)


def world(square: bool) -> ConfigDict:
    """Clips as they are, or as they were made fit before: the middle square, in one size and one length."""
    world = parts.compact_world()
    if square:
        world.square, world.frame_counts = True, (17,)
    return world

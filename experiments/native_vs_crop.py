"""Native frames against squares: one model sees whole frames of any aspect, the other their middle squares, as was done before.

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
    stages = {"vae": parts.vae_run(world(square=False), parts.VAE_STEPS)}
    for name, square in {"native": False, "square": True}.items():
        stages[name] = parts.dit_run(world(square), DIT_STEPS, vae_checkpoint="vae")
        stages[name].loop.save_every = 500
    study = parts.study("Native frames against squares", stages, prompts=256)
    study.groups = ConfigDict(dict(framing=("native", "square")))
    return study


def world(square: bool) -> ConfigDict:
    """Clips of one length, since what was cut to squares was cut to a length, too."""
    world = parts.compact_world()
    world.frame_counts = (1, 17)
    world.square = square
    return world

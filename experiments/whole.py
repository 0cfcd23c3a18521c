"""The whole world in clips of up to 17 frames: a VAE for small things and a small DiT, on the way to a ladder there.

sora-jax study --config=experiments/whole.py --workdir=runs/whole
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "vae", "dit")
# Small frames teach much for few tokens: a size is drawn by the inverse square of its latent cells.
CELLS_OF_SMALLEST = 16
# Training FLOPs of the DiT.
BUDGET = 9e13


def get_config(arg: str = "") -> ConfigDict:
    """'' is the study; 'vae' and 'dit' are its stages, to be trained alone."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    stages = {"vae": vae(), "dit": dit()}
    if arg:
        stages["dit"].vae_checkpoint = "runs/whole/vae"
        return stages[arg]
    return parts.study("The whole world", stages)


def world() -> ConfigDict:
    world = parts.full_world()
    world.frame_counts, world.fps = (1, 9, 17), (4.0, 8.0)
    return world


def vae() -> ConfigDict:
    """On small scenes, half of them pairs: what a VAE loses first are things of a few pixels."""
    small = world()
    small.frame_sizes, small.two_things_fraction = ((32, 32), (48, 48)), 0.5
    run = parts.joining_vae_run(small, steps=4000)
    run.data.train_clips, run.vae.widths, run.vae.channels, run.vae_train.batch = 8192, (48, 160), 32, 8
    return run


def dit() -> ConfigDict:
    run = parts.dit_run(world(), steps=1, vae_checkpoint="vae")
    run.data.world.frame_size_weights = tuple(
        (CELLS_OF_SMALLEST / (height // 8 * (width // 8))) ** 2 for height, width in run.data.world.frame_sizes
    )
    run.data.train_clips, run.data.heldout_clips = 16384, 512
    run.dit.width, run.dit.heads, run.dit.channels = 144, 3, 32
    # The longest clip: 17 frames of 96x64 are 5 x 12 x 8 tokens.
    run.pack.update(rows=2, row_tokens=480, row_slots=24, row_text=240, window=512)
    run.flow.mean = 0.6
    run.flow.posterior, run.flow.emphasis = 0.0, 1.0
    run.sampler.guidance, run.sampler.shift = 3.0, 3.0
    run.compute.budget = BUDGET
    run.loop.log_every, run.loop.save_every = 50, 500
    return run

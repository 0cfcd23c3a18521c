"""How many pixels should a token be? One budget spent on tokens of three sizes, things in circles among what is asked for.

sora-jax study --config=experiments/tokens.py --workdir=runs/tokens
sora-jax study --config=experiments/tokens.py:pairs --workdir=runs/tokens-pairs
"""

import parts
from ml_collections import ConfigDict

# Pixels of a token in (frames, height, width): 4x8x8; 2x8x8, of a VAE of its own; and 4x16x16, as patches of 2x2 latents.
ARGUMENTS = ("", "pairs", "patches")
# Training FLOPs of the DiT.
BUDGET = 3e13


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    world = parts.compact_world()
    world.motions, world.frame_counts = ("still", *parts.DIRECTIONS, "orbit"), (17,)
    vae = parts.joining_vae_run(world, steps=1500)
    run = parts.dit_run(world, steps=1, vae_checkpoint="vae")
    run.data.train_clips = 16384
    run.dit.width, run.dit.heads = 128, 4
    run.pack.update(row_tokens=160, row_text=96)
    run.flow.posterior, run.flow.emphasis, run.sampler.guidance = 0.0, 1.0, 3.0
    run.compute.budget, run.loop.save_every = BUDGET, 500
    if arg == "pairs":
        vae.vae.folds, vae.vae.channels = ((1, 4, 4), (2, 2, 2)), 16
        run.dit.channels = 16
        run.pack.update(rows=6, row_tokens=264)
    if arg == "patches":
        # A velocity of so many values is hardly learned.
        run.dit.patch, run.dit.predict = (1, 2, 2), "clean"
        run.pack.update(rows=5, row_slots=24, row_text=320)
    return parts.study("The size of a token", {"vae": vae, "dit": run}, prompts=192)

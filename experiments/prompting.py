"""Prompting with images and videos: one model that fills in whatever is missing, and what each way of prompting reaches.

sora-jax study --config=experiments/prompting.py --workdir=runs/prompting
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "vae", "dit")
# Many times the quickstart's: a VAE that is stopped early shows one place in all frames of a group, and then jumps.
VAE_STEPS, DIT_STEPS = 6000, 16000
# Motions that can go on for ever are among them, to be extended and looped.
MOTIONS = ("still", *parts.DIRECTIONS, "orbit")


def get_config(arg: str = "") -> ConfigDict:
    """'' is the study; 'vae' and 'dit' are its stages, to be trained alone."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    vae = vae_run()
    stages = {"vae": vae, "dit": dit()}
    if arg:
        stages["dit"].vae_checkpoint = "runs/prompting/vae"
        return stages[arg]
    study = parts.study("Prompting with anything", dict(vae=vae), dict(prompting=dict(dit=stages["dit"])), prompts=96)
    # Prompts and noise that no setting was chosen by; those of seeds 0 to 3 were.
    study.seed = 4
    return study


def world() -> ConfigDict:
    world = parts.compact_world()
    world.motions = MOTIONS
    # What moves one way never comes back by itself; to close a loop, something has to have shown how.
    world.to_and_fro = 0.2
    return world


def vae_run() -> ConfigDict:
    return parts.smooth_vae_run(world(), steps=VAE_STEPS)


def dit() -> ConfigDict:
    """A wider model than the quickstart's, with masks: half of the clips, and a quarter of the videos, are from text alone."""
    run = parts.dit_run(world(), steps=DIT_STEPS, vae_checkpoint="vae")
    # At 144 it learnt no more: 1500 steps on top of 12000 changed its loss by 0.2 %.
    run.dit.width, run.dit.heads = 192, 4
    run.pack.rows, run.optimizer.rate = 10, 0.014
    run.loader.known.update(
        first_frame=0.12,
        first_frames=0.12,
        last_frames=0.16,
        both_ends=0.1,
        some_frames=0.05,
        box=0.08,
        less_noise=0.03,
    )
    # Nothing is as clean when it was made a moment ago as when it was encoded.
    run.flow.known_noise = 0.2
    # Groups of frames differ by their noise: by that of the posterior, and by what is most of a picture and little of the loss.
    run.flow.posterior, run.flow.emphasis = 0.0, 1.0
    # Frames are asked for that are longer than those of training.
    run.loader.squeezed = 0.15
    run.sampler.guidance, run.sampler.known_guidance = 3.0, 2.0
    # What is made meets what is given more exactly.
    run.sampler.restart = 0.5
    # A clip of which a part is known has two slots.
    run.pack.row_slots = 14
    # Of half as many it learns the clips themselves.
    run.data.train_clips = 8192
    run.loop.save_every = 500
    return run

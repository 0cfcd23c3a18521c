"""Frames made together against frames made one after the other, over lengths far beyond those of training.

sora-jax study --config=experiments/rollout.py --workdir=runs/rollout
"""

import parts
import prompting
from ml_collections import ConfigDict

ARGUMENTS = ("",)
DIT_STEPS = 1700


def get_config(arg: str = "") -> ConfigDict:
    """One VAE and two DiTs of the same size, rows and steps, and so of the same compute."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    stages = {"vae": parts.vae_run(prompting.world(), prompting.VAE_STEPS)}
    for name in ("together", "one_by_one"):
        run = parts.dit_run(prompting.world(), DIT_STEPS, vae_checkpoint="vae")
        # What ends early is short, so that a row has more clips; a clip of which a part is known has two slots.
        run.pack.update(row_slots=24, row_text=160)
        run.loop.save_every = 500
        stages[name] = run
    stages["together"].loader.known.first_frames = 0.5
    stages["one_by_one"].loader.known.next_frame = 1.0
    study = parts.study("Together against one after the other", stages, prompts=128)
    study.groups = ConfigDict(dict(rollout=("together", "one_by_one")))
    return study

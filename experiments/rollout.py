"""Frames made together against frames made one after the other, over lengths far beyond those of training.

sora-jax study --config=experiments/rollout.py --workdir=runs/rollout
"""

import parts
import prompting
from ml_collections import ConfigDict

ARGUMENTS = ("",)
DIT_STEPS = 4000


def get_config(arg: str = "") -> ConfigDict:
    """One VAE and two DiTs of the same size, rows and steps, and so of the same compute."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    world = prompting.world()
    world.to_and_fro = 0.0
    # The page's samples and headlines are of the last one: one that was taught to make whole videos.
    runs = {name: parts.dit_run(world, DIT_STEPS, "vae") for name in ("one_by_one", "together")}
    for run in runs.values():
        # What ends early is short, so that a row has more clips; a clip of which a part is known has two slots.
        run.pack.update(row_slots=24, row_text=160)
        run.flow.posterior, run.flow.emphasis = 0.0, 1.0
        run.sampler.guidance = 3.0
    runs["together"].loader.known.first_frames = 0.5
    runs["one_by_one"].loader.known.next_frame = 1.0
    return parts.study(
        "Together against one after the other", dict(vae=prompting.vae_run()), dict(rollout=runs), prompts=96
    )

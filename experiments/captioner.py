"""A captioner on the latents of the quickstart's VAE: it learns to describe clips, whose combinations it has never seen.

sora-jax train --config=experiments/captioner.py --workdir=runs/captioner
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "short")
STEPS = 1500


def get_config(arg: str = "") -> ConfigDict:
    """'' writes descriptions that leave nothing out, as a generator is best trained on; 'short' what people write."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    run = parts.captioner_run(parts.compact_world(), STEPS, vae_checkpoint="runs/quickstart/vae")
    run.loader.long_captions = 0.0 if arg == "short" else 1.0
    return run

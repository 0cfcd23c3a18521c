"""The whole path in minutes on two cores: a VAE, a diffusion transformer on its latents, samples and a report.

sora-jax study --config=experiments/quickstart.py --workdir=runs/quickstart
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "vae", "dit")


def get_config(arg: str = "") -> ConfigDict:
    """'' is the study; 'vae' and 'dit' are its stages, to be trained alone."""
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    vae = parts.vae_run(parts.compact_world(), steps=parts.VAE_STEPS)
    dit = parts.compact_dit_run("vae")
    stages = {"vae": vae, "dit": dit}
    if arg:
        dit.vae_checkpoint = "runs/quickstart/vae"
        return stages[arg]
    return parts.study("sora_jax quickstart", stages, prompts=256)

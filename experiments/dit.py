"""Diffusion transformers on the latents of a trained VAE.

sora-jax train --config=experiments/dit.py:full --config.vae_checkpoint=runs/vae-full --workdir=runs/dit-full
"""

import parts
from ml_collections import ConfigDict

# Width, blocks, heads; "/2" halves the latent grid in height and width. Toy sizes for a CPU; those of Table 1 of the DiT
# paper (arXiv:2212.09748); a 7B class.
TOYS = {"XXS": (64, 4, 2), "XS": (128, 4, 4), "T": (192, 6, 6)}
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "7B": (4096, 28, 32),
}
LADDER = {f"{multiplier}x": multiplier for multiplier in parts.RUNGS}
ARGUMENTS = ("compact", "full", *LADDER, *(f"{name}/{patch}" for name in (*TOYS, *SIZES) for patch in (1, 2)))


def get_config(arg: str = "compact") -> ConfigDict:
    """'compact' is the quickstart's, 'full' a small one for the whole world.

    '1x', '4x' and '32x' spend multiples of one budget on the compact world, along the frontier (see scaling.py).
    'XXS/1' to 'T/2' are toys for a CPU, 'S/1' to '7B/2' sizes for accelerators.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    if arg == "compact":
        return parts.dit_run(parts.compact_world(), steps=parts.DIT_STEPS, vae_checkpoint="runs/vae")
    if arg in LADDER:
        run = parts.rung(LADDER[arg], "frontier")
        run.vae_checkpoint = "runs/vae"
        return run
    run = parts.dit_run(parts.full_world(), steps=6000, vae_checkpoint="runs/vae-full")
    run.data.train_clips, run.data.heldout_clips = 16384, 512
    # The longest clip: 33 frames of 96x64 are 9 x 12 x 8 tokens; known first frames teach to extend and to animate.
    run.pack.update(rows=2, row_tokens=896, row_slots=64, row_text=512)
    run.loader.known_frames = 0.1
    run.loop.save_every = run.loop.evaluate_every = run.loop.sample_every = 1000
    if arg == "full":
        run.dit.width, run.dit.heads, run.dit.remat = 128, 2, "full"
        return run
    name, patch = arg.split("/")
    run.dit.width, run.dit.blocks, run.dit.heads = (TOYS | SIZES)[name]
    run.dit.patch = (1, int(patch), int(patch))
    if name in TOYS:
        return run
    run.dit.dtype, run.dit.remat = "bfloat16", "full"
    run.pack.update(rows=64, row_tokens=1024, window=1024)
    run.loop.steps, run.loop.ema = 400_000, 0.9999
    run.optimizer.rate, run.optimizer.adam_rate, run.optimizer.warmup_steps = 0.01, 1e-3, 2000
    return run

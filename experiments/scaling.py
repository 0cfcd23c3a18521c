"""1x / 4x / 32x: the same system with more and more compute, and the laws that foretell it.

sora-jax study --config=experiments/scaling.py --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py --workdir=runs/scaling --dry_run
"""

import parts
from ml_collections import ConfigDict

BASE = 2.0e12  # FLOPs of 1x, training steps of the DiT alone
RUNGS = (1, 4, 32)
# Width, blocks and heads of the isoflop sweep, and its budgets as multiples of BASE: none beyond 4x.
SIZES = ((48, 2, 1), (72, 3, 2), (96, 4, 2), (144, 6, 3))
SWEPT = (0.5, 1, 2, 4)


def dit(multiplier: float, width: int, blocks: int, heads: int, along: str) -> ConfigDict:
    run = parts.dit_run(parts.compact_world(), steps=1, vae_checkpoint="vae")
    # Steps follow from the budget.
    run.data.heldout_clips = 512
    run.dit.width, run.dit.blocks, run.dit.heads = width, blocks, heads
    run.compute = ConfigDict(dict(budget=BASE, multiplier=float(multiplier), along=along, exponent=0.5))
    return run


def get_config(arg: str = "") -> ConfigDict:
    """A sweep of sizes at equal budgets, then a ladder along the frontier that the sweep found."""
    if arg:
        raise ValueError(f"{arg!r} is none of the arguments: there are none")
    sweep = {
        f"iso_{width}x{blocks}_{number}": dit(multiplier, width, blocks, heads, "steps")
        for number, multiplier in enumerate(SWEPT)
        for width, blocks, heads in SIZES
    }
    ladder = {f"{rung}x": dit(rung, 96, 4, 2, "frontier") for rung in RUNGS}
    stages = dict(vae=parts.vae_run(parts.compact_world(), steps=parts.VAE_STEPS)) | sweep | ladder
    return ConfigDict(
        dict(
            task="study",
            title="More compute, better videos",
            order=tuple(stages),
            stages=stages,
            groups=dict(isoflop=tuple(sweep), ladder=tuple(ladder)),
            prompts=512,
            shown=6,
            seed=0,
        )
    )

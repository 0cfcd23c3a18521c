"""1x / 4x / 32x: the same system with more and more compute, and the laws that foretell it.

sora-jax study --config=experiments/scaling.py --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py --workdir=runs/scaling --dry_run
"""

import parts
from ml_collections import ConfigDict

# Width, blocks and heads of the isoflop sweep, and its budgets as multiples of 1x: none beyond 4x.
SIZES = ((48, 2, 1), (72, 3, 2), (96, 4, 2), (144, 6, 3))
SWEPT = (0.5, 1, 2, 4)


def get_config(arg: str = "") -> ConfigDict:
    """A sweep of sizes at equal budgets, then a ladder along the frontier that the sweep found."""
    if arg:
        raise ValueError(f"{arg!r} is none of the arguments: there are none")
    sweep = {
        f"iso_{width}x{blocks}_{number}": parts.rung(multiplier, "steps", width, blocks, heads)
        for number, multiplier in enumerate(SWEPT)
        for width, blocks, heads in SIZES
    }
    ladder = {f"{multiplier}x": parts.rung(multiplier, "frontier") for multiplier in parts.RUNGS}
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

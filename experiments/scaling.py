"""1x / 4x / 32x: the same system with more and more compute, and the laws that foretell it.

sora-jax study --config=experiments/scaling.py --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py --workdir=runs/scaling --dry_run
sora-jax study --config=experiments/scaling.py:seeds --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py:ladder --workdir=runs/ladder
sora-jax study --config=experiments/scaling.py:models --workdir=runs/models
sora-jax study --config=experiments/scaling.py:rates --workdir=runs/rates
sora-jax study --config=experiments/scaling.py:all --workdir=runs/scaling
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "ladder", "seeds", "models", "rates", "all")
# Budgets of the isoflop sweep as multiples of 1x, none beyond 4x, and the width, blocks and heads of the models around the
# best of each: most that are too large or too small for a budget would say nothing of its bottom.
SIZES = ((24, 1, 1), (36, 2, 2), (48, 2, 2), (60, 3, 3), (72, 3, 3), (84, 4, 3), (96, 4, 4))
SWEPT = {0.5: SIZES[:4], 1: SIZES[1:5], 2: SIZES[2:6], 4: SIZES[2:]}
# The models whose Frechet distances are compared.
MODELS = ((48, 2, 1), (72, 3, 2), (96, 4, 2))
# Patches and, for each, tokens, slots and text tokens of a row: every patch has about the same clips in a step.
PATCHES = (((1, 1, 1), (144, 9, 80)), ((1, 1, 2), (72, 6, 56)), ((1, 2, 2), (36, 4, 40)))
MODEL_STEPS = 2000
# Seeds of the ladder in 'seeds', and of every rate in 'rates'.
SEEDS = 3
# Widths with their heads, and rates as multiples of the ladder's, of both optimizers.
WIDTHS = ((32, 1), (64, 2), (128, 4))
RATES = (0.25, 0.5, 1, 2, 4, 8)
RATE_STEPS = 600


def get_config(arg: str = "") -> ConfigDict:
    """'' is a sweep of sizes at equal budgets, then a ladder along the frontier that the sweep found.

    'seeds' is the same with the ladder from three seeds; in the work dir of '' it trains only what is missing there.
    'ladder' is one seed of the ladder without the sweep, its models as large as the last sweep says; in a work dir of its own,
    as a sweep may find others.
    'models' are nine, of three sizes and three patches, at equal steps: does the Frechet distance follow the FLOPs?
    'rates' are three widths at six rates each, from three seeds: is one rate the best for all?
    'all' is all of it, on one page; like 'seeds' it trains only what is missing in its work dir.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    groups = dict(isoflop=sweep(), ladder=ladder(1 if arg in ("", "ladder") else SEEDS), models=models(), rates=rates())
    if arg != "all":
        groups = {name: groups[name] for name in ((arg,) if arg in groups else ("isoflop", "ladder"))}
    return parts.study("More compute, better videos", {"vae": parts.ladder_vae_run()}, groups, shown=6)


def sweep() -> dict[str, ConfigDict]:
    return {
        f"iso_{width}x{blocks}_{number}": parts.rung(multiplier, "steps", width, blocks, heads)
        for number, (multiplier, sizes) in enumerate(SWEPT.items())
        for width, blocks, heads in sizes
    }


def ladder(seeds: int) -> dict[str, ConfigDict]:
    """The rungs from the first seed, then from the others."""
    found = {}
    for seed in range(seeds):
        for multiplier in parts.RUNGS:
            run = parts.rung(multiplier, "frontier")
            run.seed = seed
            found[f"{multiplier}x_seed{seed}" if seed else f"{multiplier}x"] = run
    return found


def models() -> dict[str, ConfigDict]:
    found = {}
    for width, blocks, heads in MODELS:
        for patch, (row_tokens, row_slots, row_text) in PATCHES:
            run = steps_of(MODEL_STEPS, width, blocks, heads)
            # Of large patches a velocity is not learned (README.md); to compare, all predict the same.
            run.dit.patch, run.dit.predict = patch, "clean"
            run.pack.update(row_tokens=row_tokens, row_slots=row_slots, row_text=row_text)
            found[f"{width}x{blocks}_{'x'.join(map(str, patch))}"] = run
    return found


def rates() -> dict[str, ConfigDict]:
    """Three seeds: between those of one rate small models differ by more than between rates next to each other."""
    found = {}
    for seed in range(SEEDS):
        for width, heads in WIDTHS:
            for number, multiple in enumerate(RATES):
                run = steps_of(RATE_STEPS, width, 3, heads)
                run.seed = seed
                run.optimizer.rate *= multiple
                run.optimizer.adam_rate *= multiple
                found[f"{width}_rate{number}_seed{seed}" if seed else f"{width}_rate{number}"] = run
    return found


def steps_of(steps: int, width: int, blocks: int, heads: int) -> ConfigDict:
    """The ladder's DiT, of another size, for a number of steps."""
    run = parts.rung(1, "steps", width, blocks, heads)
    run.loop.steps, run.compute.budget = steps, 0.0
    return run

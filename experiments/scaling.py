"""1x / 4x / 32x: the same system with more and more compute, and the laws that foretell it.

sora-jax study --config=experiments/scaling.py --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py --workdir=runs/scaling --dry_run
sora-jax study --config=experiments/scaling.py:seeds --workdir=runs/scaling
sora-jax study --config=experiments/scaling.py:sharp --workdir=runs/sharp
sora-jax study --config=experiments/scaling.py:models --workdir=runs/models
sora-jax study --config=experiments/scaling.py:rates --workdir=runs/rates
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("", "seeds", "sharp", "models", "rates")
# Budgets of the isoflop sweep as multiples of 1x, none beyond 4x, and the width, blocks and heads of the models around the
# best of each: most that are too large or too small for a budget would say nothing of its bottom.
SIZES = ((36, 2, 2), (48, 2, 2), (60, 2, 2), (72, 3, 2), (84, 3, 3), (96, 4, 3))
SWEPT = {0.5: SIZES[:4], 1: SIZES[1:5], 2: SIZES[1:5], 4: SIZES[2:]}
# The same of 'sharp', of the shapes and heads that its ladder grows through.
SHARP_SIZES = ((24, 1, 1), (36, 2, 2), (48, 2, 2), (60, 3, 3), (72, 3, 3), (84, 4, 3), (96, 4, 4))
SHARP_SWEPT = {0.5: SHARP_SIZES[:4], 1: SHARP_SIZES[1:5], 2: SHARP_SIZES[2:6], 4: SHARP_SIZES[2:]}
SHARP_VAE_STEPS = 3000
# The models whose Frechet distances are compared.
MODELS = ((48, 2, 1), (72, 3, 2), (96, 4, 2))
# Patches and, for each, tokens, slots and text tokens of a row: every patch has the same clips in a step.
PATCHES = (((1, 1, 1), (144, 9, 80)), ((1, 1, 2), (72, 6, 56)), ((1, 2, 2), (36, 4, 40)))
MODEL_STEPS = 1000
# Seeds of the ladder in 'seeds'.
SEEDS = 3
# Widths with their heads, and rates as multiples of the ladder's, of both optimizers.
WIDTHS = ((32, 1), (64, 2), (128, 4))
RATES = (0.25, 0.5, 1, 2, 4)
RATE_STEPS = 300


def get_config(arg: str = "") -> ConfigDict:
    """'' is a sweep of sizes at equal budgets, then a ladder along the frontier that the sweep found.

    'seeds' is the same with the ladder from three seeds; in the work dir of '' it trains only what is missing there.
    'sharp' is a sweep and a ladder on a VAE that is sharper and its posterior's means, of many steps of few clips.
    'models' are nine, of three sizes and three patches, at equal steps: does the Frechet distance follow the FLOPs?
    'rates' are three widths at five rates each: is one rate the best for all?
    """
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    if arg == "sharp":
        return sharp()
    if arg == "models":
        return study(dict(models=models()))
    if arg == "rates":
        return study(dict(rates=rates()))
    return study(dict(isoflop=sweep(SWEPT), ladder=ladder(SEEDS if arg == "seeds" else 1)))


def sweep(swept: dict[float, tuple[tuple[int, int, int], ...]]) -> dict[str, ConfigDict]:
    return {
        f"iso_{width}x{blocks}_{number}": parts.rung(multiplier, "steps", width, blocks, heads)
        for number, (multiplier, sizes) in enumerate(swept.items())
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


def sharp() -> ConfigDict:
    """As '', but for the VAE, its posterior's noise, the sizes, the clips a step, the rate and the guidance."""
    rungs = {f"{multiplier}x": parts.rung(multiplier, "frontier", width=48) for multiplier in parts.RUNGS}
    swept = sweep(SHARP_SWEPT)
    for run in (*swept.values(), *rungs.values()):
        run.flow.posterior, run.sampler.guidance = 0.0, 3.0
        # Many steps of few clips.
        run.pack.rows, run.optimizer.rate = 3, 0.02
        run.loop.log_every, run.loop.save_every = 100, 1000
    vae = parts.joining_vae_run(parts.compact_world(), SHARP_VAE_STEPS)
    return study(dict(isoflop=swept, ladder=rungs), vae)


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
    found = {}
    for width, heads in WIDTHS:
        for number, multiple in enumerate(RATES):
            run = steps_of(RATE_STEPS, width, 3, heads)
            run.optimizer.rate *= multiple
            run.optimizer.adam_rate *= multiple
            found[f"{width}_rate{number}"] = run
    return found


def steps_of(steps: int, width: int, blocks: int, heads: int) -> ConfigDict:
    """A DiT on the compact world for a number of steps."""
    run = parts.rung(1, "steps", width, blocks, heads)
    run.compute.budget, run.loop.steps = 0.0, steps
    return run


def study(groups: dict[str, dict[str, ConfigDict]], vae: ConfigDict | None = None) -> ConfigDict:
    """The quickstart's VAE, or another, then the runs of all groups."""
    vae = vae or parts.vae_run(parts.compact_world(), steps=parts.VAE_STEPS)
    return parts.study("More compute, better videos", {"vae": vae}, groups, shown=6)

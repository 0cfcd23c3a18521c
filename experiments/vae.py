"""Video VAEs, trained alone.

sora-jax train --config=experiments/vae.py:full --workdir=runs/vae-full
"""

import parts
from ml_collections import ConfigDict

ARGUMENTS = ("compact", "sharp", "full", "video")


def get_config(arg: str = "compact") -> ConfigDict:
    """'compact' is the quickstart's, 'sharp' the ladder's (scaling.py); 'full' learns the whole world.

    'video' is the three-level network for real footage.
    """
    if arg == "compact":
        return parts.vae_run(parts.compact_world(), steps=parts.VAE_STEPS)
    if arg == "sharp":
        return parts.ladder_vae_run()
    if arg == "full":
        run = parts.vae_run(parts.full_world(), steps=3000)
        run.vae.widths = (192,)
        run.loop.save_every = run.loop.evaluate_every = run.loop.sample_every = 500
        return run
    if arg == "video":
        run = parts.vae_run(parts.full_world(), steps=100_000)
        run.vae = ConfigDict(
            dict(
                folds=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
                widths=(128, 256, 512),
                blocks=(2, 2, 4),
                kernel=(3, 3, 3),
                encoder_frames=3,
                channels=16,
                remat=True,
            )
        )
        run.loop.save_every = run.loop.evaluate_every = run.loop.sample_every = 2000
        return run
    raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")

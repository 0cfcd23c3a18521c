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
}
# What clusters are planned for: width, blocks, heads; rows and tokens of a row; the mesh, of a v5e:2x4, a
# v5p:4x4x8 and a v5p:8x8x16.
CLUSTERS = {
    "0.7b": ((1536, 14, 12), (8, 20480), (2, 4, 1, 1)),
    "7b": ((3584, 25, 28), (128, 40960), (8, 16, 1, 1)),
    "30b": ((6144, 36, 48), (256, 65536), (8, 32, 1, 4)),
}
LADDER = {f"{multiplier}x": multiplier for multiplier in parts.RUNGS}
ARGUMENTS = (
    "compact",
    "full",
    *LADDER,
    *CLUSTERS,
    *(f"{name}/{patch}" for name in (*TOYS, *SIZES) for patch in (1, 2)),
)


def get_config(arg: str = "compact") -> ConfigDict:
    """'compact' is the quickstart's, 'full' a small one for the whole world.

    '1x', '4x' and '32x' spend multiples of one budget on the compact world, on vae.py:sharp, with models as large as the frontier
    says that scaling.py has measured.
    'XXS/1' to 'T/2' are toys for a CPU, 'S/1' to 'XL/2' sizes for accelerators; '0.7b', '7b' and '30b' are for clusters and
    long videos of up to 768x768 in patches of 1x2x2, to be looked at with sora-jax plan first.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f"{arg!r} is none of {', '.join(ARGUMENTS)}")
    if arg in CLUSTERS:
        return cluster(*CLUSTERS[arg])
    if arg == "compact":
        return parts.compact_dit_run("runs/vae")
    if arg in LADDER:
        run = parts.rung(LADDER[arg], "frontier")
        run.vae_checkpoint = "runs/vae-sharp"
        return run
    run = parts.dit_run(parts.full_world(), steps=6000, vae_checkpoint="runs/vae-full")
    run.data.train_clips, run.data.heldout_clips = 16384, 512
    # The longest clip: 33 frames of 96x64 are 9 x 12 x 8 tokens; known first frames teach to extend and to animate.
    run.pack.update(rows=2, row_tokens=896, row_slots=64, row_text=512)
    run.loader.known.first_frames = 0.1
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


def cluster(size: tuple[int, ...], rows: tuple[int, int], mesh: tuple[int, ...]) -> ConfigDict:
    """A large DiT on native sizes up to 768x768 and four seconds, in the latents of vae.py:video."""
    run = parts.dit_run(parts.full_world(), steps=200_000, vae_checkpoint="runs/vae-video")
    world = run.data.world
    world.frame_sizes = ((256, 256), (256, 448), (448, 256), (512, 512), (480, 832), (832, 480), (768, 768))
    world.frame_counts, world.fps = (1, 17, 33, 65) if rows[1] > 20480 else (1, 17, 33), (8.0, 16.0)
    if rows[1] <= 20480:
        world.frame_sizes = world.frame_sizes[:4]
    run.data.train_clips, run.data.heldout_clips = 10_000_000, 2048
    run.dit.width, run.dit.blocks, run.dit.heads = size
    run.dit.patch, run.dit.channels, run.dit.dtype, run.dit.remat = (1, 2, 2), 16, "bfloat16", "attention"
    run.pack.update(rows=rows[0], row_tokens=rows[1], row_slots=128, row_text=2048, window=1024)
    run.loader.known.first_frames = 0.1
    run.loader.update(workers=4, lanes=rows[0] // 4)
    run.optimizer = ConfigDict(
        dict(
            name="adamw",
            # That of a width of 96: at 1536 blocks move by 1.5e-4, at 6144 by 3.8e-5.
            rate=2.4e-3,
            adam_rate=2.4e-3,
            warmup_steps=2000,
            decay="cosine",
            weight_decay=0.01,
            clip_norm=1.0,
        )
    )
    run.loop.update(ema=0.9999, log_every=100, save_every=1000, evaluate_every=5000, sample_every=5000)
    run.mesh.update(dict(zip(("data", "fsdp", "tensor", "sequence"), mesh, strict=True)))
    return run

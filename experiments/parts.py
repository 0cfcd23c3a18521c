"""Complete declarations that experiments are put together from. Plain ml_collections: no jax, no models.

Every key of a run stands here, so that every key can be set on the command line.
"""

from ml_collections import ConfigDict

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down")
DIAGONALS = ("up-left", "up-right", "down-left", "down-right")

# Steps of the quickstart's stages.
VAE_STEPS = 450
DIT_STEPS = 3400

# The ladder: FLOPs of the training steps of its first rung, and its rungs as multiples.
BASE_FLOPS = 1.25e12
RUNGS = (1, 4, 32)
LADDER_VAE_STEPS = 3000
# How a step's cost grows with these multiples along the frontier that scaling.py found (results/scaling); it finds its own.
FRONTIER = {4: 0.853, 32: 0.666}


def compact_world() -> ConfigDict:
    """What a small model learns in minutes: one large thing, four directions, three backgrounds, three sizes."""
    return ConfigDict(
        dict(
            colours=COLOURS,
            shapes=SHAPES,
            sizes=("large",),
            motions=("still", *DIRECTIONS, "grow"),
            backgrounds=("white", "gray", "black"),
            frame_sizes=((32, 32), (48, 32), (32, 48)),
            frame_size_weights=(),
            frame_counts=(1, 9, 17),
            frame_count_weights=(),
            fps=(5.0,),
            two_things_fraction=0.0,
            holdout_fraction=0.15,
            square=False,
            to_and_fro=0.0,
            seed=0,
        ),
        convert_dict=True,
    )


def full_world() -> ConfigDict:
    """Everything the worlds can show."""
    world = compact_world()
    world.sizes = ("small", "large")
    world.motions = ("still", *DIRECTIONS, *DIAGONALS, "orbit", "bounce", "grow", "shrink")
    world.backgrounds = ("white", "light gray", "gray", "dark gray", "black", "gradient", "checkered")
    world.frame_sizes = ((32, 32), (48, 32), (32, 48), (48, 48), (64, 48), (48, 64), (64, 64), (96, 64), (64, 96))
    world.frame_counts = (1, 5, 9, 13, 17, 25, 33)
    world.fps = (4.0, 8.0, 12.0, 16.0)
    world.two_things_fraction = 0.3
    return world


def data(world: ConfigDict, train_clips: int, heldout_clips: int) -> ConfigDict:
    return ConfigDict(dict(world=world, train_clips=train_clips, heldout_clips=heldout_clips))


def mesh() -> ConfigDict:
    """One axis over all devices; an axis of 0 takes what the others leave."""
    return ConfigDict(dict(data=0, fsdp=1, tensor=1, sequence=1))


def mesh_of_few_rows() -> ConfigDict:
    """All devices share the tokens of every row, as there may be fewer rows than devices."""
    return ConfigDict(dict(data=1, fsdp=1, tensor=1, sequence=0))


def muon(rate: float, adam_rate: float, warmup_steps: int = 20) -> ConfigDict:
    return ConfigDict(
        dict(
            name="muon",
            rate=rate,
            adam_rate=adam_rate,
            warmup_steps=warmup_steps,
            decay="linear",
            weight_decay=0.0,
            clip_norm=1.0,
        )
    )


def loop(
    steps: int, log_every: int = 20, save_every: int = 0, evaluate_every: int = 0, sample_every: int = 0
) -> ConfigDict:
    return ConfigDict(
        dict(
            steps=steps,
            log_every=log_every,
            save_every=save_every,
            evaluate_every=evaluate_every,
            sample_every=sample_every,
            keep=2,
            ema=0.99,
            max_bad_steps=50,
            max_failed_saves=0,
            spike_factor=10.0,
            rollbacks=0,
        )
    )


def known() -> ConfigDict:
    """Nothing is given: text alone."""
    kinds = (
        "first_frame",
        "first_frames",
        "last_frames",
        "both_ends",
        "some_frames",
        "box",
        "less_noise",
        "next_frame",
    )
    return ConfigDict(dict.fromkeys(kinds, 0.0))


def loader(long_captions: float, caption_dropout: float) -> ConfigDict:
    return ConfigDict(
        dict(
            long_captions=long_captions,
            caption_dropout=caption_dropout,
            known=known(),
            squeezed=0.0,
            workers=0,
            lanes=1,
            patience=120.0,
            skip_quota=0.01,
        )
    )


def sampler() -> ConfigDict:
    return ConfigDict(
        dict(
            steps=16,
            method="euler",
            guidance=5.0,
            shift=1.0,
            base_tokens=0,
            guidance_interval=(0.0, 1.0),
            guidance_rescale=0.0,
            known_guidance=1.0,
            guidance_going_on=2.0,
            restart=0.0,
        )
    )


def vae_run(world: ConfigDict, steps: int) -> ConfigDict:
    """A VAE at latent resolution for small pictures."""
    world = world.copy_and_resolve_references()
    # Shorter clips are beginnings of longer ones, and the network is causal: the longest teach all.
    world.frame_counts = (17,)
    return ConfigDict(
        dict(
            task="vae",
            seed=0,
            data=data(world, train_clips=4096, heldout_clips=128),
            vae=dict(
                folds=((4, 8, 8),),
                widths=(128,),
                blocks=(2,),
                kernel=(2, 3, 3),
                encoder_frames=2,
                channels=24,
                remat=False,
            ),
            vae_train=dict(batch=16, crop=(17, 32, 32), reconstruction="l2", kl_weight=1e-4, half_size_weight=0.0),
            optimizer=muon(0.02, 2e-3),
            loop=loop(steps),
            mesh=mesh(),
        )
    )


def joining_vae_run(world: ConfigDict, steps: int) -> ConfigDict:
    """A VAE whose parts of a video go together: groups are encoded by themselves and decoded at the full frame rate."""
    run = vae_run(world, steps)
    run.vae.encoder_frames = 1
    run.vae.folds, run.vae.widths, run.vae.blocks = ((1, 4, 4), (4, 2, 2)), (32, 128), (1, 2)
    run.loop.save_every = 500
    return run


def smooth_vae_run(world: ConfigDict, steps: int) -> ConfigDict:
    """A VAE whose latents a small transformer learns sooner: frames are encoded one by one, and four of them are then one linear
    map, and latents of half the size are pictures of half the size."""
    run = joining_vae_run(world, steps)
    run.vae.folds, run.vae.widths, run.vae.blocks = ((1, 4, 4), (1, 2, 2), (4, 1, 1)), (32, 64, 96), (1, 2, 0)
    run.vae_train.half_size_weight = 0.25
    return run


def dit_run(world: ConfigDict, steps: int, vae_checkpoint: str) -> ConfigDict:
    """A small diffusion transformer on packed rows."""
    return ConfigDict(
        dict(
            task="dit",
            seed=0,
            vae_checkpoint=vae_checkpoint,
            data=data(world, train_clips=4096, heldout_clips=256),
            text=dict(
                encoder="auto",
                max_tokens=64,
                scratch=dict(
                    vocab_size=2048, width=128, layers=2, heads=4, mlp_width=256, max_tokens=64, dtype="float32"
                ),
            ),
            dit=dict(
                width=96,
                blocks=4,
                heads=2,
                patch=(1, 1, 1),
                channels=24,
                mlp_ratio=4,
                text_width=384,
                wavelengths=((0.6, 16.0), (16.0, 128.0), (16.0, 128.0)),
                dtype="float32",
                remat="none",
                predict="velocity",
                attention="auto",
                text=None,
            ),
            pack=dict(rows=10, row_tokens=144, row_slots=9, row_text=80, window=256, drop_rate=0.0, drop_repeats=0.0),
            loader=loader(long_captions=0.2, caption_dropout=0.1),
            flow=dict(mean=0.4, std=1.0, shift=1.0, known_noise=0.0, posterior=1.0, emphasis=0.0),
            sampler=sampler(),
            optimizer=muon(0.014, 3e-3),
            loop=loop(steps),
            compute=dict(budget=0.0, multiplier=1.0, along="steps", exponent=0.5),
            mesh=mesh(),
        )
    )


def compact_dit_run(vae_checkpoint: str) -> ConfigDict:
    """The quickstart's DiT: many steps of few clips."""
    run = dit_run(compact_world(), DIT_STEPS, vae_checkpoint)
    run.dit.heads, run.pack.rows, run.optimizer.rate, run.loop.log_every = 4, 4, 0.02, 50
    run.mesh = mesh_of_few_rows()
    return run


def captioner_run(world: ConfigDict, steps: int, vae_checkpoint: str) -> ConfigDict:
    """A small captioner on packed rows, with room for descriptions."""
    return ConfigDict(
        dict(
            task="captioner",
            seed=0,
            vae_checkpoint=vae_checkpoint,
            data=data(world, train_clips=4096, heldout_clips=256),
            captioner=dict(
                width=96,
                blocks=3,
                text_blocks=2,
                heads=2,
                words=256,
                max_tokens=64,
                patch=(1, 1, 1),
                channels=24,
                mlp_ratio=4,
                wavelengths=((0.6, 16.0), (16.0, 128.0), (16.0, 128.0)),
                dtype="float32",
                attention="auto",
            ),
            pack=dict(rows=10, row_tokens=144, row_slots=9, row_text=200, window=256, drop_rate=0.0, drop_repeats=0.0),
            loader=loader(long_captions=1.0, caption_dropout=0.0),
            optimizer=muon(0.014, 3e-3),
            loop=loop(steps),
            mesh=mesh(),
        )
    )


def study(
    title: str,
    stages: dict[str, ConfigDict],
    groups: dict[str, dict[str, ConfigDict]] | None = None,
    prompts: int = 512,
    shown: int = 24,
) -> ConfigDict:
    """Stages in order, then the runs of the groups, all judged on the same held-out prompts."""
    groups = groups or {}
    for runs in groups.values():
        stages = stages | runs
    return ConfigDict(
        dict(
            task="study",
            title=title,
            order=tuple(stages),
            stages=stages,
            groups={name: tuple(runs) for name, runs in groups.items()},
            prompts=prompts,
            shown=shown,
            seed=0,
        )
    )


def ladder_vae_run() -> ConfigDict:
    """The ladder's VAE."""
    return joining_vae_run(compact_world(), LADDER_VAE_STEPS)


def rung(multiplier: float, along: str, width: int = 48, blocks: int = 2, heads: int = 2) -> ConfigDict:
    """A DiT on the compact world with a budget in FLOPs, from which its steps follow: many steps of few clips, on the means of
    the VAE's posterior."""
    run = dit_run(compact_world(), steps=1, vae_checkpoint="vae")
    run.data.heldout_clips = 512
    run.dit.width, run.dit.blocks, run.dit.heads = width, blocks, heads
    run.pack.rows, run.optimizer.rate, run.mesh = 3, 0.02, mesh_of_few_rows()
    run.flow.posterior, run.sampler.guidance = 0.0, 3.0
    run.loop.log_every, run.loop.save_every = 100, 1000
    exponent = FRONTIER.get(multiplier, 0.5) if along == "frontier" else 0.5
    run.compute = ConfigDict(dict(budget=BASE_FLOPS, multiplier=float(multiplier), along=along, exponent=exponent))
    return run

"""Analytic FLOPs against XLA's own count on small models without loops, and what follows from them."""

import dataclasses
import functools

import captioner as captioner_experiment
import dit as dit_experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quickstart
from flax import nnx

from sora_jax import compute, config
from sora_jax.config import VAETrainConfig
from sora_jax.data import pack
from sora_jax.diffusion import sampler
from sora_jax.generate import pipeline
from sora_jax.models import captioner, dit, text_encoder, vae
from sora_jax.structs import Layout
from sora_jax.train import vae as train_vae

# Wide, so that elementwise work, which XLA counts and we do not, is below a hundredth of it. One block and one layer, as XLA
# counts the body of a scan once; deeper ones are unrolled.
TEXT = text_encoder.TextEncoderConfig(
    vocab_size=64, width=256, layers=1, heads=4, mlp_width=512, max_tokens=64, dtype="float32"
)
DIT = dit.DiTConfig(width=512, blocks=1, heads=4, channels=32, text_width=256)
B, N, S, L = 2, 128, 4, 64
SWITCHES = {
    "plain": {},
    "mlp": {"mlp_ratio": 2},
    "patch": {"patch": (1, 2, 2)},
    "text": {"text": TEXT},
    "bfloat16": {"dtype": "bfloat16"},
    "remat dots": {"remat": "dots"},
    "remat attention": {"remat": "attention"},
    "remat full": {"remat": "full"},
    "heads": {"heads": 8},
    "clean": {"predict": "clean"},
    "depth": {"blocks": 3, "text": dataclasses.replace(TEXT, layers=2)},
}
VAES = {
    "latent resolution": vae.VAEConfig(widths=(256,), blocks=(2,)),
    "remat": vae.VAEConfig(widths=(256,), blocks=(1,), remat=True),
    "three levels": vae.VAEConfig(
        folds=((1, 2, 2), (2, 2, 2), (2, 2, 2)), widths=(64, 128, 256), blocks=(1, 1, 1), kernel=(3, 3, 3), channels=8
    ),
    "groups by themselves": vae.VAEConfig(
        folds=((1, 8, 8), (4, 1, 1)), widths=(64, 128), blocks=(1, 2), kernel=(3, 3, 3), encoder_frames=1, channels=8
    ),
}


def captioner_run():
    return config.from_config_dict(captioner_experiment.get_config(""))


def counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def unrolled(monkeypatch):
    """Blocks one after the other: of a loop XLA counts the body once."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))


@pytest.mark.parametrize("switch", SWITCHES)
def test_dit_against_xla(switch, monkeypatch):
    config = dataclasses.replace(DIT, **SWITCHES[switch])
    if config.blocks > 1:
        unrolled(monkeypatch)
    ids, text_ids, P = shape(B, N, dtype=jnp.int32), shape(B, L, dtype=jnp.int32), config.patch_dim
    states = {"text_token_BL": text_ids} if config.text else {"text_BLM": shape(B, L, 256)}
    layout = Layout(ids, ids, shape(B, N, 3), shape(B, S, dtype=jnp.int32), shape(B, S, 3), text_ids, **states)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, nnx.Rngs(0))), nnx.Param)

    def forward(p, *arguments):
        return nnx.merge(graphdef, p)(*arguments)

    def loss(p, *arguments):
        return jnp.sum(jnp.square(forward(p, *arguments)))

    arguments = params, shape(B, N, P), shape(B, S), layout
    step = compute.Step(tuple(compute.dit(config, B, N, S, L)))
    assert step.forward == pytest.approx(counted(forward, *arguments), rel=0.02)
    assert step.executed == pytest.approx(counted(jax.value_and_grad(loss), *arguments), rel=0.02)


def test_captioner_against_xla(monkeypatch):
    unrolled(monkeypatch)
    config = dataclasses.replace(captioner_run().captioner, width=512, heads=4, blocks=3, text_blocks=2, words=512)
    ids, text_ids = shape(B, N, dtype=jnp.int32), shape(B, L, dtype=jnp.int32)
    slots = shape(B, S, dtype=jnp.int32)
    layout = Layout(ids, ids, shape(B, N, 3), slots, shape(B, S, 3), text_ids, text_token_BL=text_ids)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: captioner.Captioner(config, nnx.Rngs(0))), nnx.Param)

    def forward(p, patch_BNP, layout):
        model = nnx.merge(graphdef, p)
        return model.say(model.see(patch_BNP, layout), layout.text_token_BL, layout)

    def loss(p, *arguments):
        return jnp.sum(jnp.square(forward(p, *arguments)))

    arguments = params, shape(B, N, config.patch_dim), layout
    step = compute.Step(tuple(compute.captioner(config, B, N, L)))
    assert step.forward == pytest.approx(counted(forward, *arguments), rel=0.02)
    assert step.total == pytest.approx(counted(jax.value_and_grad(loss), *arguments), rel=0.02)
    packing = dataclasses.replace(captioner_run().pack, rows=B, row_tokens=N, row_text=L)
    assert compute.captioner_step(config, packing) == step


def test_a_sampler_against_xla():
    """One evaluation, with and without prompt: of several XLA makes once what is the same in all, the keys of captions."""
    packing = pack.PackConfig(rows=B, row_tokens=N, row_slots=S, row_text=L, window=2)
    settings = sampler.SamplerConfig(steps=1, method="euler", guidance=3.0)
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(dit.DiT(DIT, nnx.Rngs(0)), nnx.Param)))
    row = pack.empty_row(packing, DIT.patch_dim, DIT.text_width)
    batch = jax.tree.map(lambda x: shape(B, *x.shape, dtype=x.dtype), row)
    inputs = params, batch, batch.layout, batch.clip_BS, batch.ceiling_BS
    found = counted(functools.partial(pipeline.denoiser(DIT), settings=settings), *inputs)
    assert compute.sampling(DIT, packing, settings) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", VAES)
def test_vae_against_xla(name):
    config = VAES[name]
    graphdef, params, rest = vae.split(nnx.eval_shape(lambda: vae.VAE(config, nnx.Rngs(0))))

    def loss(p, r, frames):
        model = nnx.merge(graphdef, p, r)
        posterior = model.encode(frames)
        return jnp.sum(jnp.square(model.decode(posterior.mean + posterior.std) - frames))

    arguments = params, rest, shape(2, 9, 64, 64, 3)
    step = compute.vae_step(config, VAETrainConfig(2, (9, 64, 64), "l2", 1e-4, half_size_weight=0.0))
    assert step.forward == pytest.approx(counted(loss, *arguments), rel=0.02)
    assert step.executed == pytest.approx(counted(jax.value_and_grad(loss), *arguments), rel=0.02)


@pytest.mark.parametrize("half_size_weight", [0.0, 0.25])
def test_training_a_vae_against_xla(half_size_weight):
    tree = quickstart.get_config("vae")
    tree.vae.widths, tree.vae_train.half_size_weight = (256,), half_size_weight
    task = train_vae.VAETask(config.from_config_dict(tree))
    params, rest = jax.eval_shape(task.init, jax.random.key(0))
    frames = shape(tree.vae_train.batch, *tree.vae_train.crop, 3, dtype=jnp.uint8)
    step = jax.value_and_grad(task.loss, has_aux=True)
    found = counted(step, params, rest, frames, jax.eval_shape(jax.random.key, 0))
    assert task.flops_per_step == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", VAES)
def test_encoding_against_xla(name):
    config = VAES[name]
    graphdef, params, rest = vae.split(nnx.eval_shape(lambda: vae.VAE(config, nnx.Rngs(0))))

    def encode(p, r, frames):
        return nnx.merge(graphdef, p, r).encode(frames).mean

    found = counted(encode, params, rest, shape(3, 9, 64, 32, 3))
    latents = config.latent_shape(9, 64, 32)[:3]
    # Means alone are kept, deviations are not asked for.
    left_out = 3 * np.prod(latents) * 2 * config.widths[-1] * config.channels
    assert compute.encoding(config, [latents] * 3) - left_out == pytest.approx(found, rel=0.02)
    others = [(1, 8, 8), latents, (1, 8, 8)]
    parts = sum(compute.encoding(config, [each]) for each in others)
    assert compute.encoding(config, others) == pytest.approx(parts)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_taps_are_those_inside(kernel):
    for size in (1, 2, 7):
        inside = np.convolve(np.ones(size), np.ones(kernel)).astype(int)
        start = kernel // 2
        assert compute.taps(size, kernel) == inside[start : start + size].sum()


def test_parts_sum_to_the_whole():
    packing = pack.PackConfig(rows=4, row_tokens=64, row_slots=8, row_text=32, window=8)
    one = compute.dit_step(dataclasses.replace(DIT, text=TEXT), packing)
    assert sum(one.by_part().values()) == pytest.approx(one.total)
    assert one.executed == one.total  # nothing is recomputed without remat


def test_useful_attention_is_that_within_segments(rng):
    def tokens(number, count):
        zeros = np.zeros((count, 4), np.float32)
        return pack.Tokens(
            zeros, zeros, np.zeros((count, 3), np.float32), np.arange(count), np.zeros(count, bool), 1.0, np.zeros(3),
            number, 0, np.zeros((3, 8), np.float32), None,
        )  # fmt: skip

    packing = pack.PackConfig(rows=1, row_tokens=32, row_slots=8, row_text=16, window=8)
    _, count = pack.pack_rows([tokens(0, 8), tokens(1, 16), tokens(2, 8)], packing, rng)
    assert (count.pairs, count.text_pairs) == (8 * 8 + 16 * 16 + 8 * 8, 3 * 32)
    executed = compute.dit_step(DIT, packing)
    useful = compute.dit_step(DIT, packing, count.pairs, count.text_pairs)
    saved = 3 * 2 * 2 * 512 * (32 * 32 - count.pairs + 32 * 16 - count.text_pairs)
    assert executed.total - useful.total == pytest.approx(saved)


def quickstart_run(**settings):
    run = config.from_config_dict(quickstart.get_config("dit"))
    return dataclasses.replace(run, compute=config.ComputeConfig(**{**dataclasses.asdict(run.compute), **settings}))


def cost(run):
    return run.loop.steps * compute.dit_step(run.dit, run.pack).total


@pytest.mark.parametrize("along", config.ALONG)
@pytest.mark.parametrize("multiplier", [0.25, 1.0, 4.0, 32.0])
def test_every_run_spends_its_budget(along, multiplier):
    base = quickstart_run()
    run = compute.scaled(quickstart_run(multiplier=multiplier, along=along))
    assert cost(run) == pytest.approx(multiplier * cost(base), rel=0.01)
    assert compute.scaled(run) == run
    assert 2 / 3 < (run.dit.width / run.dit.heads) / (base.dit.width / base.dit.heads) < 3 / 2


@pytest.mark.parametrize("factor", [2.13, 6.6, 32.0])
@pytest.mark.parametrize(("width", "blocks", "heads"), [(48, 2, 1), (72, 3, 2), (96, 4, 2), (384, 12, 6)])
def test_a_grown_model_costs_what_was_asked_for_and_keeps_its_shape(width, blocks, heads, factor):
    base = quickstart_run()
    base = dataclasses.replace(base, dit=dataclasses.replace(base.dit, width=width, blocks=blocks, heads=heads))
    model = compute.grown(base, factor)
    # Toys have few sizes to choose from.
    assert compute.dit_step(model, base.pack).total / compute.dit_step(base.dit, base.pack).total == pytest.approx(
        factor, rel=0.12
    )
    assert (model.blocks / blocks) / (model.width / width) == pytest.approx(1, abs=0.21)
    if heads >= compute.WIDTH_STEPS:
        assert model.width // model.heads == width // heads


def test_what_grows_is_what_was_asked_for():
    base = quickstart_run()
    steps, model, frontier = (
        compute.scaled(quickstart_run(multiplier=32.0, along=along)) for along in ("steps", "model", "frontier")
    )
    assert steps.dit == base.dit and steps.loop.steps == pytest.approx(32 * base.loop.steps, abs=1)
    assert model.loop.steps == pytest.approx(base.loop.steps, rel=0.25)
    assert model.dit.width > base.dit.width and model.dit.blocks > base.dit.blocks
    assert (
        base.loop.steps < frontier.loop.steps < steps.loop.steps
        and base.dit.width < frontier.dit.width < model.dit.width
    )


def test_the_largest_models_grow_too():
    """What would be beyond any machine is not among what they may become."""
    base = config.from_config_dict(dit_experiment.get_config("XL/2"))
    more = dataclasses.replace(base, compute=dataclasses.replace(base.compute, multiplier=32.0, along="model"))
    grown = compute.scaled(more)
    assert cost(grown) == pytest.approx(32 * cost(base), rel=0.01) and grown.dit.width > 2 * base.dit.width


def test_a_budget_is_an_amount_of_flops():
    assert cost(compute.scaled(quickstart_run(budget=1e13))) == pytest.approx(1e13, rel=0.01)
    assert cost(compute.scaled(quickstart_run(budget=1e13, multiplier=4.0))) == pytest.approx(4e13, rel=0.01)
    with pytest.raises(config.ConfigError, match=r"raise compute\.budget"):
        compute.scaled(quickstart_run(budget=1e9))

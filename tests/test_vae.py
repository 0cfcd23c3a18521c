"""Laws of the video VAE: causal, streaming = whole, images are one-frame videos, sizes are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from sora_jax.models import vae
from sora_jax.train import vae as train_vae

SMALL = {
    "latent resolution": vae.VAEConfig(widths=(16,), blocks=(2,), channels=4),
    "three levels": vae.VAEConfig(
        folds=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        widths=(8, 8, 16),
        blocks=(1, 1, 1),
        kernel=(3, 3, 3),
        encoder_frames=3,
        channels=4,
        remat=True,
    ),
    "groups by themselves": vae.VAEConfig(
        folds=((1, 8, 8), (4, 1, 1)), widths=(8, 16), blocks=(1, 1), encoder_frames=1, channels=4
    ),
}


def randomised(model):
    """Zero-initialised convolutions would hide what their inputs are."""
    graphdef, params, rest = vae.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), rest)


@pytest.fixture(params=SMALL, scope="module")
def model(request):
    return randomised(vae.VAE(SMALL[request.param], nnx.Rngs(0)))


@pytest.fixture(scope="module")
def frames():
    return jax.random.uniform(jax.random.key(0), (2, 17, 16, 24, 3), minval=-1, maxval=1)


def test_shapes(model, frames):
    posterior = model.encode(frames)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 2, 3, 4)
    assert model.decode(posterior.mean).shape == frames.shape


def test_latents_see_no_later_frame(model, frames):
    before = model.encode(frames).mean
    changed = model.encode(frames.at[:, 9:].set(0.5)).mean
    assert np.array_equal(before[:, :3], changed[:, :3])
    assert not np.allclose(before[:, 3], changed[:, 3])


def test_what_came_before_tells_in_latents_unless_groups_are_encoded_by_themselves(model, frames):
    before = model.encode(frames).mean
    changed = model.encode(frames.at[:, :9].set(0.5)).mean
    assert not np.allclose(before[:, 2], changed[:, 2])
    assert np.array_equal(before[:, 3:], changed[:, 3:]) == (model.config.encoder_frames == 1)


def test_decoded_frames_see_no_later_latent(model):
    latent = jax.random.normal(jax.random.key(2), (1, 4, 2, 2, 4))
    before, changed = model.decode(latent), model.decode(latent.at[:, 2:].set(1.0))
    assert np.array_equal(before[:, :5], changed[:, :5])
    assert not np.allclose(before[:, 5:9], changed[:, 5:9])


def test_an_image_is_the_first_frame(model, frames):
    assert np.allclose(model.encode(frames[:, :1]).mean, model.encode(frames).mean[:, :1], atol=1e-5)


@pytest.mark.parametrize("chunks", [(1, 4, 4, 8), (5, 12), (9, 4, 4)])
def test_streaming_encoder_equals_whole(model, frames, chunks):
    pasts, parts, start = None, [], 0
    for length in chunks:
        posterior, pasts = model.encode_chunk(frames[:, start : start + length], pasts)
        parts.append(posterior)
        start += length
    whole = model.encode(frames)
    assert np.abs(jnp.concatenate([p.mean for p in parts], 1) - whole.mean).max() <= 1e-5
    assert np.abs(jnp.concatenate([p.logvar for p in parts], 1) - whole.logvar).max() <= 1e-5


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_streaming_decoder_equals_whole(model, chunks):
    latent = jax.random.normal(jax.random.key(3), (2, 5, 2, 2, 4))
    pasts, parts, start = None, [], 0
    for length in chunks:
        decoded, pasts = model.decode_chunk(latent[:, start : start + length], pasts)
        parts.append(decoded)
        start += length
    assert np.abs(jnp.concatenate(parts, 1) - model.decode(latent)).max() <= 1e-5


@pytest.fixture(scope="module")
def measured():
    """A VAE whose latents differ in size by direction, with statistics measured on them; and those latents."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    mean = (rng.normal(size=(20_000, 4)) * np.array([10.0, 1.0, 0.3, 1e-4]) @ turn + 2).astype(np.float32)
    std = np.full_like(mean, 0.01)
    model = vae.VAE(SMALL["latent resolution"], nnx.Rngs(0))
    for name, value in vae.latent_statistics(mean, std**2).items():
        getattr(model, name)[...] = jnp.asarray(value)
    return model, vae.Posterior(*(jnp.asarray(x).reshape(20, 10, 10, 10, 4) for x in (mean, np.log(std**2))))


def test_normalisation_is_undone(measured):
    model, posterior = measured
    assert np.allclose(model.denormalise(model.normalise(posterior)[0]), posterior.mean, atol=1e-4)


def test_normalised_latents_are_uncorrelated(measured):
    model, posterior = measured
    mean, std = (np.reshape(x, (-1, 4)) for x in model.normalise(posterior))
    covariance = np.cov(mean.T) + np.diag(np.mean(np.square(std), 0))
    variance = np.diag(covariance)
    assert np.allclose(covariance, np.diag(variance), atol=2e-3)
    assert np.allclose(mean.mean(0), 0, atol=1e-3) and variance.mean() == pytest.approx(1, abs=1e-3)


def test_an_axis_that_carries_nothing_is_not_blown_up(measured):
    model, posterior = measured
    mean, std = (np.reshape(x, (-1, 4)) for x in model.normalise(posterior))
    assert np.square(std).mean(0).max() < 1e-3  # the posterior's noise, on any axis
    assert mean.std(0).min() < 1e-2


def test_a_posterior_is_as_wide_along_its_axes_as_sampling_says(measured):
    model, posterior = measured
    drawn = posterior.mean[:1, :1, :1, :1] + posterior.std * jax.random.normal(jax.random.key(0), posterior.std.shape)
    sampled = model.normalise(vae.Posterior(drawn, jnp.zeros_like(drawn)))[0].std((0, 1, 2, 3))
    assert np.allclose(sampled, model.normalise(posterior)[1][0, 0, 0, 0], rtol=0.05)


def test_kl_against_numerical_integration():
    mean, logvar = 0.7, -0.9
    x = np.linspace(-12, 12, 200001)
    density = np.exp(-((x - mean) ** 2) / (2 * np.exp(logvar))) / np.sqrt(2 * np.pi * np.exp(logvar))
    log_ratio = -((x - mean) ** 2) / (2 * np.exp(logvar)) - logvar / 2 + x**2 / 2
    assert vae.Posterior(jnp.float32(mean), jnp.float32(logvar)).kl() == pytest.approx(
        np.trapezoid(density * log_ratio, x), rel=1e-4
    )


@pytest.mark.parametrize(
    ("size", "words"), [((16, 16, 16), "1 \\+ 4k"), ((17, 12, 16), "multiple of 8"), ((17, 16, 0), "multiple")]
)
def test_sizes_that_do_not_fit_are_told(size, words):
    with pytest.raises(ValueError, match=words):
        vae.VAEConfig().latent_shape(*size)


def test_stride_follows_the_folds():
    assert SMALL["three levels"].stride == (4, 8, 8) == SMALL["latent resolution"].stride
    other = dataclasses.replace(SMALL["latent resolution"], folds=((2, 4, 4),))
    assert other.stride == (2, 4, 4) and other.latent_shape(5, 8, 8)[:3] == (3, 2, 2)


def test_configs_check_themselves():
    with pytest.raises(ValueError, match="one entry per level"):
        vae.VAEConfig(widths=(8, 8))
    with pytest.raises(ValueError, match="odd"):
        vae.VAEConfig(kernel=(2, 4, 3))


# Training -----------------------------------------------------------------------------------------------------------


def losses(weight):
    """Terms of a tiny run's loss on one batch."""
    run = tiny.vae_run()
    run = dataclasses.replace(run, vae_train=dataclasses.replace(run.vae_train, half_size_weight=weight))
    task = train_vae.VAETask(run)
    params, rest = task.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    frames = jax.random.randint(jax.random.key(1), (2, 5, 32, 32, 3), 0, 256).astype(jnp.uint8)
    (total, terms), grads = jax.value_and_grad(task.loss, has_aux=True)(params, rest, frames, jax.random.key(2))
    return task, (params, rest, frames), float(total), terms, grads


def test_latents_of_half_the_size_are_to_decode_to_pictures_of_half_the_size():
    task, (params, rest, frames), total, terms, grads = losses(0.5)
    model = nnx.merge(task.graphdef, params, rest)
    clean = np.asarray(frames, np.float32) / 127.5 - 1
    posterior = model.encode(jnp.asarray(clean))
    latent = posterior.mean + posterior.std * jax.random.normal(jax.random.key(2), posterior.mean.shape)
    small = [np.asarray(x)[:, :, i::2, j::2] for x in (clean, latent) for i in (0, 1) for j in (0, 1)]
    picture, cells = np.mean(small[:4], 0), np.mean(small[4:], 0)
    error = np.mean(np.square(np.asarray(model.decode(jnp.asarray(cells))) - picture))
    assert float(terms["half_size"]) == pytest.approx(0.5 * error, rel=1e-5)
    _, _, without, others, plain = losses(0.0)
    assert "half_size" not in others and total == pytest.approx(without + 0.5 * error, rel=1e-5)
    # It teaches the encoder as well: what is averaged is its own.
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), grads["encoder"], plain["encoder"])
    assert max(jax.tree.leaves(changed)) > 1e-4


def test_latents_that_cannot_be_halved_are_refused_with_what_can():
    run = tiny.vae_run()
    halved = dataclasses.replace(run.vae_train, half_size_weight=0.25)
    assert dataclasses.replace(run, vae_train=halved)
    odd = dataclasses.replace(halved, crop=(5, 24, 32))
    with pytest.raises(ValueError, match=r"has 3x4 latents.*crop a multiple of 16x16 pixels, or set it to 0"):
        dataclasses.replace(run, vae_train=odd)
    assert dataclasses.replace(run, vae_train=dataclasses.replace(odd, half_size_weight=0.0))

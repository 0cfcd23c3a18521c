"""Laws of the diffusion transformer: segments do not see each other, slots carry noise levels, positions are relative."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import within

from sora_jax.models import dit, text_encoder
from sora_jax.structs import Layout

CONFIG = dit.DiTConfig(width=48, blocks=2, heads=2, channels=4, text_width=6)
B, N, S, L = 2, 12, 4, 6


@pytest.fixture
def layout(rng):
    segment = np.array([[1] * 5 + [2] * 5 + [0] * 2] * B, np.int32)
    return Layout(
        segment_BN=jnp.asarray(segment),
        # Segment 1 has two slots: its first two tokens are known.
        slot_BN=jnp.asarray(np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]] * B, np.int32)),
        position_BN3=jnp.asarray(rng.uniform(0, 2, (B, N, 3)) * [1, 16, 16], jnp.float32),
        slot_segment_BS=jnp.asarray(np.array([[1, 1, 2, 0]] * B, np.int32)),
        extent_BS3=jnp.asarray(np.array([[[2.0, 32, 32]] * S] * B, np.float32)),
        text_segment_BL=jnp.asarray(np.array([[1, 1, 2, 2, 2, 0]] * B, np.int32)),
        text_BLM=jnp.asarray(rng.standard_normal((B, L, 6)), jnp.float32),
    )


def randomised(config):
    model = dit.DiT(config, nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def model():
    return randomised(CONFIG)


@pytest.fixture
def noisy(rng):
    return jnp.asarray(rng.standard_normal((B, N, 4)), jnp.float32)


TIME = jnp.asarray([[0.0, 0.6, 0.3, 0.0]] * B)


def moved(before, after, tokens):
    """Whether the outputs of these tokens changed."""
    return bool(jnp.abs(before - after)[:, tokens].max() > 1e-4)


FIRST, SECOND = slice(0, 5), slice(5, 10)


def test_a_new_model_predicts_zero(noisy, layout):
    assert np.all(dit.DiT(CONFIG, nnx.Rngs(0))(noisy, TIME, layout) == 0)


def test_segments_do_not_see_each_other(model, noisy, layout):
    before = model(noisy, TIME, layout)
    after = model(noisy.at[:, 7].add(1.0), TIME, layout)
    assert moved(before, after, SECOND) and not moved(before, after, FIRST)


def test_text_reaches_its_own_clip_alone(model, noisy, layout):
    before = model(noisy, TIME, layout)
    after = model(noisy, TIME, layout._replace(text_BLM=layout.text_BLM.at[:, 3].add(1.0)))
    assert moved(before, after, SECOND) and not moved(before, after, FIRST)


def test_the_order_of_words_is_seen_through_their_states_only(model, noisy, layout):
    swapped = layout.text_BLM.at[:, jnp.array([2, 4])].set(layout.text_BLM[:, jnp.array([4, 2])])
    assert np.allclose(model(noisy, TIME, layout), model(noisy, TIME, layout._replace(text_BLM=swapped)), atol=1e-5)


def test_a_slot_s_time_reaches_its_clip_alone(model, noisy, layout):
    before = model(noisy, TIME, layout)
    after = model(noisy, TIME.at[:, 1].set(0.9), layout)
    assert moved(before, after, FIRST) and not moved(before, after, SECOND)
    unused = model(noisy, TIME.at[:, 3].set(0.9), layout)
    assert np.array_equal(before, unused)


def test_two_slots_of_one_time_are_one_slot(model, noisy, layout):
    one_slot = layout._replace(slot_BN=jnp.where(layout.slot_BN == 1, 0, layout.slot_BN))
    time = TIME.at[:, :2].set(0.6)
    assert np.allclose(model(noisy, time, layout), model(noisy, time, one_slot), atol=1e-5)


def test_order_of_tokens_in_a_row_does_not_matter(model, noisy, layout):
    order = jnp.asarray(np.random.default_rng(1).permutation(N))
    per_token = {name: getattr(layout, name)[:, order] for name in ("segment_BN", "slot_BN", "position_BN3")}
    shuffled = model(noisy[:, order], TIME, layout._replace(**per_token))
    valid = np.asarray(layout.segment_BN[0, order]) > 0
    assert np.allclose(model(noisy, TIME, layout)[:, order][:, valid], shuffled[:, valid], atol=1e-5)


@pytest.mark.parametrize("remat", [name for name in dit.REMAT if name != "none"])
def test_remat_changes_nothing(noisy, layout, remat):
    def gradient(config):
        graphdef, params = nnx.split(randomised(config), nnx.Param)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(noisy, TIME, layout)))))(params)

    plain, again = gradient(CONFIG), gradient(dataclasses.replace(CONFIG, remat=remat))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("remat", "loops"), [("none", 2), ("dots", 2), ("attention", 2), ("full", 4)])
def test_what_attention_gave_is_kept_with_the_products(noisy, layout, remat, loops):
    """Attention in blocks is a loop, and another backward, of tokens among themselves and with captions."""
    config = dataclasses.replace(CONFIG, remat=remat, attention="blockwise")
    graphdef, params = nnx.split(dit.DiT(config, nnx.Rngs(0)))

    def loss(params):
        return nnx.merge(graphdef, params)(noisy, TIME, layout).sum()

    program = jax.make_jaxpr(jax.grad(loss))(params)
    backward = [each for each in within(program) if each.primitive.name == "scan" and each.params["reverse"]]
    names = [each.primitive.name for scan in backward for each in within(scan.params["jaxpr"])]
    assert names.count("while") == loops


def test_bfloat16_is_close_and_returns_float32(model, noisy, layout):
    out = randomised(dataclasses.replace(CONFIG, dtype="bfloat16"))(noisy, TIME, layout)
    exact = model(noisy, TIME, layout)
    assert out.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2))
    assert 0 < error < 0.03


def test_an_encoder_trained_with_the_model_gets_gradients(noisy, layout):
    text = text_encoder.TextEncoderConfig(
        vocab_size=32, width=12, layers=1, heads=2, mlp_width=16, max_tokens=8, dtype="float32"
    )
    model = randomised(dataclasses.replace(CONFIG, text_width=12, text=text))
    layout = layout._replace(text_BLM=None, text_token_BL=jnp.asarray([[1, 2, 1, 3, 4, 0]] * B, jnp.int32))
    graphdef, params = nnx.split(model, nnx.Param)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(noisy, TIME, layout))))(params)
    embedding = nnx.to_pure_dict(grads)["text"]["token"]["embedding"]
    assert np.all(np.abs(embedding[1:5]).max(-1) > 0) and np.all(embedding[5:] == 0)


def test_missing_text_is_told(model, noisy, layout):
    with pytest.raises(ValueError, match="text_BLM"):
        model(noisy, TIME, layout._replace(text_BLM=None))


def test_configs_check_themselves():
    with pytest.raises(ValueError, match=r"multiple of dit\.heads"):
        dataclasses.replace(CONFIG, heads=5)
    with pytest.raises(ValueError, match="use fewer heads"):
        dataclasses.replace(CONFIG, heads=8)
    with pytest.raises(ValueError, match="remat"):
        dataclasses.replace(CONFIG, remat="some")


def test_velocity_of_clean_patches(layout, noisy):
    time = jnp.asarray([[0.05, 0.6, 0.3, 0.0]] * B)
    clean = randomised(CONFIG)(noisy, time, layout)
    velocity = randomised(dataclasses.replace(CONFIG, predict="clean"))(noisy, time, layout)
    time_BN1 = jnp.take_along_axis(time, layout.slot_BN, axis=1)[..., None]
    # The same weights: what one gives as velocity the other means as the end of the path at time 0.
    assert np.allclose(noisy - time_BN1 * velocity, clean, atol=1e-5)


def test_velocity_of_clean_patches_is_finite_where_nothing_is_noise(layout, noisy):
    model = randomised(dataclasses.replace(CONFIG, predict="clean"))
    assert jnp.isfinite(model(noisy, jnp.zeros((B, S)), layout)).all()


def test_unknown_prediction():
    with pytest.raises(ValueError, match="neither velocity nor clean"):
        dataclasses.replace(CONFIG, predict="noise")

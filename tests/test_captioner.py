"""Laws of the captioner: a word knows those before it and its own clip alone, and what is written is what is likeliest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from sora_jax import config
from sora_jax.models import captioner
from sora_jax.structs import Layout

CONFIG = dataclasses.replace(
    tiny.captioner_run("none").captioner, text_blocks=2, words=20, max_tokens=5, channels=4, mlp_ratio=2
)
B, N, L = 2, 12, 12
FIRST, SECOND = slice(0, 5), slice(5, 10)  # words of the row's two clips


@pytest.fixture(scope="module")
def model():
    graphdef, params = nnx.split(captioner.Captioner(CONFIG, nnx.Rngs(0)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.fixture
def layout(rng):
    return Layout(
        segment_BN=jnp.asarray(np.array([[1] * 6 + [2] * 4 + [0] * 2] * B, np.int32)),
        slot_BN=jnp.zeros((B, N), jnp.int32),
        position_BN3=jnp.asarray(rng.uniform(0, 2, (B, N, 3)) * [1, 16, 16], jnp.float32),
        slot_segment_BS=jnp.asarray(np.array([[1, 2]] * B, np.int32)),
        extent_BS3=jnp.ones((B, 2, 3), jnp.float32),
        text_segment_BL=jnp.asarray(np.array([[1] * 5 + [2] * 5 + [0] * 2] * B, np.int32)),
        text_token_BL=jnp.asarray(np.array([[1, 7, 8, 9, 2, 1, 5, 6, 7, 2, 0, 0]] * B, np.int32)),
    )


@pytest.fixture
def patches(rng):
    return jnp.asarray(rng.standard_normal((B, N, 4)), jnp.float32)


def logits(model, patches, layout, token_BL):
    return model.say(model.see(patches, layout), token_BL, layout)


def moved(before, after, words):
    return bool(jnp.abs(before - after)[:, words].max() > 1e-4)


def test_a_word_knows_those_before_it_alone(model, layout, patches):
    before = logits(model, patches, layout, layout.text_token_BL)
    after = logits(model, patches, layout, layout.text_token_BL.at[:, 2].set(11))
    assert not moved(before, after, slice(0, 2)) and moved(before, after, slice(2, 5))
    assert not moved(before, after, SECOND)


def test_a_word_knows_its_own_clip_alone(model, layout, patches):
    before = logits(model, patches, layout, layout.text_token_BL)
    after = logits(model, patches.at[:, 7].add(1.0), layout, layout.text_token_BL)
    assert not moved(before, after, FIRST) and moved(before, after, SECOND)
    padding = logits(model, patches.at[:, 10:].add(1.0), layout, layout.text_token_BL.at[:, 10:].set(3))
    assert not moved(before, padding, slice(0, 10))


def test_all_patches_of_a_clip_are_seen_wherever_they_are_known_to_be(model, layout, patches):
    before = logits(model, patches, layout, layout.text_token_BL)
    turned = layout._replace(position_BN3=layout.position_BN3.at[:, :6, 1].add(jnp.arange(6.0) * 8))
    assert moved(before, logits(model, patches, turned, layout.text_token_BL), FIRST)
    for patch in range(6):
        assert moved(before, logits(model, patches.at[:, patch].add(1.0), layout, layout.text_token_BL), FIRST)


def test_loss_is_of_each_word_after_its_own_captions_first(layout, rng):
    logits_BLV = jnp.asarray(rng.standard_normal((B, L, 20)), jnp.float32)
    value, words = captioner.loss(logits_BLV, layout.text_token_BL, layout.text_segment_BL)
    chances = np.asarray(jax.nn.log_softmax(logits_BLV), np.float64)
    ids = np.asarray(layout.text_token_BL)
    wanted = [chances[b, at, ids[b, at + 1]] for b in range(B) for at in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert words == len(wanted)
    assert float(value) == pytest.approx(-np.mean(wanted), rel=1e-5)


def test_a_row_that_is_full_to_its_end_has_no_word_after_the_last(rng):
    logits_BLV = jnp.asarray(rng.standard_normal((1, 4, 20)), jnp.float32)
    _, words = captioner.loss(logits_BLV, jnp.asarray([[1, 5, 6, 2]]), jnp.ones((1, 4), jnp.int32))
    assert words == 3


def test_rows_of_padding_cost_nothing():
    value, words = captioner.loss(jnp.zeros((1, 4, 20)), jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32))
    assert value == 0 and words == 0


def test_what_is_written_is_the_likeliest_that_may_be_said(model, layout, patches):
    sayable_V = np.arange(20) >= 2
    segment_BS = jnp.asarray([[1, 2, 0]] * B)
    written = captioner.write(model, patches, layout, segment_BS, 1, 2, sayable_V)
    assert written.shape == (B, 3, 5) and (written[..., 0] == 1).all()
    # Each word by itself, from those before it, without keys that were kept.
    token_BL = jnp.concatenate([written[:, 0], written[:, 1], jnp.zeros((B, 2), jnp.int32)], 1)
    best = jnp.argmax(jnp.where(sayable_V, logits(model, patches, layout, token_BL), -jnp.inf), -1)
    for clip in range(2):
        for place in range(1, 5):
            stopped = written[:, clip, place - 1] == 2
            assert jnp.where(
                stopped, written[:, clip, place] == 2, written[:, clip, place] == best[:, 5 * clip + place - 1]
            ).all()
    assert len(set(np.asarray(written[:, :2, 1:]).ravel().tolist())) > 2
    other = captioner.write(model, patches, layout, segment_BS, 1, 2, sayable_V & (np.arange(20) != written[0, 0, 1]))
    assert other[0, 0, 1] != written[0, 0, 1]


def test_writing_ends_with_the_last_stop(model, layout, patches):
    only = np.arange(20) == 2
    assert (captioner.write(model, patches, layout, jnp.asarray([[1, 2]] * B), 1, 2, only)[..., 1:] == 2).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"width": 0}, "positive"),
        ({"width": 2**20}, "beyond any machine"),
        ({"words": 2**40}, "beyond any language"),
        ({"heads": 3}, "multiple"),
        ({"wavelengths": ((1.0, 2.0),)}, "wavelengths"),
        ({"attention": "fast"}, "none of"),
        ({"dtype": "int8"}, "neither"),
        ({"heads": 4}, "head dim 8"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(CONFIG, **change)


def test_a_captioner_is_given_whole_clips_and_captions():
    import captioner as experiment

    tree = experiment.get_config("").to_dict()
    for change, word in (
        ({"loader": tree["loader"] | {"caption_dropout": 0.1}}, "caption_dropout"),
        ({"loader": tree["loader"] | {"known": tree["loader"]["known"] | {"box": 0.1}}}, "known"),
        ({"pack": tree["pack"] | {"row_text": 20}}, "row_text"),
        ({"vae_checkpoint": ""}, "vae_checkpoint"),
    ):
        with pytest.raises(config.ConfigError, match=word):
            config.from_config_dict(tree | change)
    tree["data"]["world"]["to_and_fro"] = 0.1
    with pytest.raises(config.ConfigError, match="to_and_fro"):
        config.from_config_dict(tree)

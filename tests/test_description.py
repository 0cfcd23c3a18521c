"""What captions say is read as it was written, of every caption of every world."""

import dataclasses

import parts
import pytest

from sora_jax import config
from sora_jax.data.worlds import captions, world
from sora_jax.evaluate import description

WORLDS = {
    name: config.from_config_dict(parts.vae_run(make(), 1)).data.world
    for name, make in {"compact": parts.compact_world, "full": parts.full_world}.items()
}
WORLDS = {name: dataclasses.replace(each, frame_counts=(1, 17)) for name, each in WORLDS.items()}


def scenes(name, count):
    return [world.sample_scene(WORLDS[name], "heldout", number) for number in range(count)]


@pytest.mark.parametrize("name", WORLDS)
def test_every_caption_tells_the_truth(name):
    for scene in scenes(name, 300):
        for text in captions.captions(scene, size_words=len(WORLDS[name].sizes) > 1):
            assert description.told(text) == description.truth(scene), text


def test_each_attribute_is_judged_by_itself():
    (scene,) = [each for each in scenes("compact", 40) if each.things[0].motion == "left" and not each.is_image][:1]
    thing = scene.things[0]
    right = captions.prompt(scene)
    wrong = {
        "colour": right.replace(thing.colour, "red" if thing.colour != "red" else "blue"),
        "shape": right.replace(thing.shape, "star" if thing.shape != "star" else "circle"),
        "motion": right.replace("left", "right"),
        "background": right.replace(scene.background, "white" if scene.background != "white" else "black"),
    }
    assert all(description.score([right], [scene]).values())
    for name, text in wrong.items():
        found = description.score([text], [scene])
        assert {key for key, value in found.items() if value < 1} == {name, "all", "word_for_word"}, text
    assert description.score(["a cat"], [scene])["all"] == 0


def test_an_order_of_words_that_no_caption_has_is_right_but_not_word_for_word():
    scene = next(each for each in scenes("compact", 40) if not each.is_image)
    found = description.score([captions.prompt(scene) + "."], [scene])
    assert found["all"] == 1 and found["word_for_word"] == 0


def test_the_floor_is_that_of_other_clips_captions():
    some = scenes("compact", 200)
    found = description.judge([captions.prompt(scene) for scene in some], some, seed=0)
    assert found["all"] == found["word_for_word"] == 1
    assert found["floor/all"] < 0.05 and 0.02 < found["floor/colour"] < 0.3

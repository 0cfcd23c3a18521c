"""from_config_dict: complete, typed, checked; and the way back."""

import json

import pytest
import quickstart
from ml_collections import ConfigDict

from sora_jax import config


def tree(**changes):
    found = quickstart.get_config("dit").to_dict()
    for path, value in changes.items():
        *parts, last = path.split("__")
        node = found
        for part in parts:
            node = node[part]
        node[last] = value
    return found


def test_round_trip_through_json():
    for arg in ("", "vae", "dit"):
        run = config.from_config_dict(quickstart.get_config(arg))
        assert config.from_config_dict(json.loads(config.to_json(run))) == run


def test_config_dicts_and_dicts_are_the_same():
    assert config.from_config_dict(ConfigDict(tree())) == config.from_config_dict(tree())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dit__widht": 3}, "config.dit has no key 'widht'"),
        ({"dit__width": "wide"}, "config.dit.width is 'wide'; it must be of type int"),
        ({"dit__width": 127}, "multiple of dit.heads"),
        ({"seed": True}, "config.seed is True"),
        ({"pack__rows": 1.5}, "config.pack.rows is 1.5"),
        ({"dit__patch": (1, 2)}, "must have 3 entries"),
        ({"dit__patch": 3}, "must be a tuple"),
        ({"data__world": 3}, "must hold the keys of WorldConfig"),
        ({"task": "gan"}, "config.task is 'gan'"),
        ({"vae_checkpoint": ""}, "vae_checkpoint is empty"),
        ({"optimizer__name": "lion"}, "optimizer.name 'lion'"),
    ],
)
def test_what_is_wrong_is_named(changes, words):
    with pytest.raises(config.ConfigError, match="config") as caught:
        config.from_config_dict(tree(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_keys_are_named():
    broken = tree()
    del broken["flow"]["shift"]
    with pytest.raises(config.ConfigError, match=r"config\.flow lacks the key 'shift'"):
        config.from_config_dict(broken)


def test_an_int_may_stand_for_a_float_and_a_list_for_a_tuple():
    run = config.from_config_dict(tree(flow__shift=2, dit__patch=[1, 1, 1]))
    assert run.flow.shift == 2.0 and isinstance(run.flow.shift, float) and run.dit.patch == (1, 1, 1)


def test_a_crop_must_fit_the_world():
    broken = quickstart.get_config("vae").to_dict()
    broken["vae_train"]["crop"] = (17, 64, 64)
    with pytest.raises(config.ConfigError, match="crop less"):
        config.from_config_dict(broken)


def test_a_study_orders_its_stages():
    broken = quickstart.get_config().to_dict()
    broken["order"] = ("dit",)
    with pytest.raises(config.ConfigError, match="order"):
        config.from_config_dict(broken)


def test_differences_name_the_leaves():
    assert config.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_a_config_from_before_a_key_was_added_does_what_it_did():
    tree = quickstart.get_config("dit").to_dict()
    old = config.to_dict(config.from_config_dict(tree))
    assert old["dit"].pop("predict") and old["dit"].pop("attention")
    assert config.from_stored(old) == config.from_config_dict(tree)
    # A config that is written today must have every key.
    with pytest.raises(config.ConfigError, match="lacks the key"):
        config.from_config_dict(old)


def test_a_config_from_before_masks_had_kinds_gives_first_frames():
    old = config.to_dict(config.from_config_dict(tree()))
    del old["loader"]["known"]
    old["loader"]["known_frames"] = 0.25
    found = config.from_stored(old)
    assert found.loader.known == config.KnownConfig(first_frames=0.25)
    assert found == config.from_config_dict(tree(loader__known__first_frames=0.25))

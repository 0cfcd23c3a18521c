"""from_config_dict: complete, typed, checked; and the way back."""

import copy
import json

import pytest
import quickstart
from hypothesis import assume, given
from hypothesis import strategies as st
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
        ({"data__world__frame_counts": (1,), "data__world__frame_count_weights": ()}, "(1,) are images alone"),
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


def test_a_vae_from_before_its_encoder_had_frames_of_its_own_is_built_as_it_was():
    tree = copy.deepcopy(STORED["vae"])
    tree["vae"] |= {"kernel": (3, 3, 3), "encoder_frames": 3}
    old = copy.deepcopy(tree)
    del old["vae"]["encoder_frames"]
    assert config.from_stored(old) == config.from_config_dict(tree)
    assert config.vae_config(old["vae"]) == config.vae_config(tree["vae"])


def test_a_config_from_before_masks_had_kinds_gives_first_frames():
    old = config.to_dict(config.from_config_dict(tree()))
    del old["loader"]["known"]
    old["loader"]["known_frames"] = 0.25
    found = config.from_stored(old)
    assert found.loader.known == config.KnownConfig(first_frames=0.25)
    assert found == config.from_config_dict(tree(loader__known__first_frames=0.25))


# Any config: what is wrong with it is told with its key, and nothing else is raised ---------------------------------

STORED = {task: config.to_dict(config.from_config_dict(quickstart.get_config(task))) for task in ("vae", "dit")}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)


def paths(tree, prefix=()):
    """The path of every key, groups and leaves alike."""
    for name, value in tree.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


PLACES = st.sampled_from([(task, path) for task, tree in STORED.items() for path in paths(tree) if path != ("task",)])


@given(PLACES, ANYTHING)
def test_a_value_of_a_wrong_type_is_named(place, value):
    task, path = place
    broken = copy.deepcopy(STORED[task])
    right = at(broken, path)
    if path[-1] == "text" and path[0] == "dit":
        assume(value is not None)
    # Of the right type it may be refused or not; that is the next test's.
    assume(
        type(value) is not type(right) and not (isinstance(right, float) and type(value) is int and abs(value) < 2**53)
    )
    assume(not (isinstance(right, list) and value == []))
    at(broken, path[:-1])[path[-1]] = value
    with pytest.raises(config.ConfigError) as caught:
        config.from_stored(broken)
    assert f"config.{'.'.join(path)}" in str(caught.value) and len(str(caught.value)) < 2000


@given(PLACES, ANYTHING)
def test_any_value_is_refused_or_comes_back(place, value):
    task, path = place
    changed = copy.deepcopy(STORED[task])
    at(changed, path[:-1])[path[-1]] = value
    try:
        run = config.from_stored(changed)
    except config.ConfigError:
        return
    assert config.from_config_dict(json.loads(config.to_json(run))) == run


@given(PLACES, st.integers(-(2**60), 2**60) | st.sampled_from([0, -1, 1, 2, 2**31, 2**53, 10**12]))
def test_any_number_is_refused_or_comes_back(place, number):
    task, path = place
    changed = copy.deepcopy(STORED[task])
    right = at(changed, path)
    assume(isinstance(right, int | float) and not isinstance(right, bool))
    at(changed, path[:-1])[path[-1]] = number
    try:
        run = config.from_stored(changed)
    except config.ConfigError as error:
        assert path[-1] in str(error) or path[-2] in str(error)
    else:
        assert config.from_config_dict(json.loads(config.to_json(run))) == run


@given(PLACES, st.text(min_size=1, max_size=8), SCALARS)
def test_an_unknown_key_is_named(place, name, value):
    task, path = place
    broken = copy.deepcopy(STORED[task])
    node = at(broken, path[:-1])
    assume(name not in node)
    node[name] = value
    with pytest.raises(config.ConfigError) as caught:
        config.from_config_dict(broken)
    assert f"{'.'.join(('config', *path[:-1]))} has no key {name!r}" in str(caught.value)


@given(PLACES)
def test_a_missing_key_is_named(place):
    task, path = place
    broken = copy.deepcopy(STORED[task])
    del at(broken, path[:-1])[path[-1]]
    with pytest.raises(config.ConfigError) as caught:
        config.from_config_dict(broken)
    assert f"{'.'.join(('config', *path[:-1]))} lacks the key {path[-1]!r}" in str(caught.value)


@given(ANYTHING)
def test_what_is_no_config_is_refused(tree):
    for read in (config.from_config_dict, config.from_stored, config.vae_config):
        with pytest.raises(config.ConfigError):
            read(tree)


def test_what_no_machine_holds_is_refused_before_it_is_built():
    for path, value in (
        (("dit", "width"), 10**12),
        (("dit", "blocks"), 10**9),
        (("dit", "heads"), 0),
        (("sampler", "steps"), 10**9),
        (("loop", "steps"), 1e300),
        (("optimizer", "rate"), float("nan")),
        (("flow", "shift"), float("inf")),
        (("seed",), 10**400),
        (("data", "world", "frame_counts"), [2**40 + 1]),
    ):
        broken = copy.deepcopy(STORED["dit"])
        at(broken, path[:-1])[path[-1]] = value
        with pytest.raises(config.ConfigError, match=path[-1]):
            config.from_stored(broken)
    with pytest.raises(config.ConfigError, match="blocks"):
        config.vae_config(STORED["vae"]["vae"] | {"blocks": [10**9]})

"""What captions say of a world's scenes, read from their words and held against the truth."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sora_jax.data.worlds import captions
from sora_jax.data.worlds.scene import COLOURS, SHAPES, Scene

ATTRIBUTES = ("colour", "shape", "motion", "background")
THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def judge(texts: Sequence[str], scenes: Sequence[Scene], seed: int) -> dict[str, float]:
    """score, and as floor/... that of the same captions dealt to other scenes."""
    order = np.random.default_rng(seed).permutation(len(texts))
    floor = score([texts[number] for number in order], scenes)
    return score(texts, scenes) | {f"floor/{name}": value for name, value in floor.items()}


def score(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of captions that are right in each attribute, in all, and that are, word for word, one of the scene's own.

    Of a scene of several things all must be told, in the order of its own captions. An image shows no motion, and none must
    be told.
    """
    right = [
        [said == shown for said, shown in zip(told(text), truth(scene), strict=True)]
        for text, scene in zip(texts, scenes, strict=True)
    ]
    own = [
        text in (*captions.captions(scene, size_words=True), *captions.captions(scene, size_words=False))
        for text, scene in zip(texts, scenes, strict=True)
    ]
    found = dict(zip(ATTRIBUTES, np.mean(right, axis=0).tolist(), strict=True))
    return found | {"all": float(np.mean(np.all(right, axis=1))), "word_for_word": float(np.mean(own))}


def truth(scene: Scene) -> tuple[tuple[str, ...], ...]:
    """What a caption of the scene must tell, by attribute."""
    things = scene.things
    return (
        tuple(thing.colour for thing in things),
        tuple(thing.shape for thing in things),
        () if scene.is_image else tuple(thing.motion for thing in things),
        (scene.background,),
    )


def told(text: str) -> tuple[tuple[str, ...], ...]:
    """What a caption tells, by attribute; things and motions in the order in which they are told of first."""
    text = text.lower()
    # No two things of a scene have one colour: what is named again is the same thing.
    things = tuple(dict.fromkeys(THING.findall(text)))
    motions = {phrase: name for name, phrases in captions.MOTION_WORDS.items() for phrase in phrases}
    backgrounds = {plain: name for name, plain in captions.BACKGROUND_WORDS.items()}
    backgrounds |= {f"{name} background": name for name in captions.BACKGROUND_WORDS}
    return (
        tuple(colour for colour, _ in things),
        tuple(shape for _, shape in things),
        _named(text, motions),
        _named(text, backgrounds),
    )


def _named(text: str, names: dict[str, str]) -> tuple[str, ...]:
    """The names whose phrases occur, in order; where one phrase is the beginning of another, the longer one."""
    longest_first = sorted(names, key=len, reverse=True)
    return tuple(names[phrase] for phrase in re.findall(rf"\b(?:{'|'.join(longest_first)})\b", text))

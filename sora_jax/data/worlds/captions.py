"""Scenes in words: a few short captions, as people write them, and a few long ones that leave nothing out.

No caption holds a measured quantity, so a world has few distinct captions and the text states of each can be kept.
Short captions name sizes only if size_words is set: a world of one size has nothing to tell.
"""

from __future__ import annotations

from sora_jax.data.worlds.scene import Scene, Thing

SHORT_VARIANTS = 3
LONG_VARIANTS = 2

# motion -> (verb: "a circle ...", participle: "a circle ...", in full: "It ...")
MOTION_WORDS: dict[str, tuple[str, str, str]] = {
    "still": ("stays still", "staying still", "stays still in one place"),
    "right": ("moves right", "moving right", "moves steadily to the right"),
    "left": ("moves left", "moving left", "moves steadily to the left"),
    "up": ("moves up", "moving up", "moves steadily upward"),
    "down": ("moves down", "moving down", "moves steadily downward"),
    "up-right": ("moves up and right", "moving up and right", "moves diagonally up to the right"),
    "up-left": ("moves up and left", "moving up and left", "moves diagonally up to the left"),
    "down-right": ("moves down and right", "moving down and right", "moves diagonally down to the right"),
    "down-left": ("moves down and left", "moving down and left", "moves diagonally down to the left"),
    "orbit": ("moves in a circle", "moving in a circle", "travels clockwise in a circle"),
    "bounce": ("bounces", "bouncing", "bounces up and down"),
    "grow": ("grows", "growing", "grows steadily larger"),
    "shrink": ("shrinks", "shrinking", "shrinks steadily"),
}
RELATION_WORDS: dict[str, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
BACKGROUND_WORDS: dict[str, str] = {
    "white": "a plain white background",
    "light gray": "a plain light gray background",
    "gray": "a plain gray background",
    "dark gray": "a plain dark gray background",
    "black": "a plain black background",
    "gradient": "a gray gradient background",
    "checkered": "a checkered gray background",
}


def prompt(scene: Scene, size_words: bool = True) -> str:
    """The canonical short caption: 'a red circle moves left on a white background'."""
    return short_caption(scene, 0, size_words)


def short_caption(scene: Scene, variant: int, size_words: bool = True) -> str:
    """One of SHORT_VARIANTS sentences or labels; an image names no motion. Raises ValueError for an unknown variant."""
    _check_variant(variant, SHORT_VARIANTS)
    names = _names(scene, size_words)
    things = _arranged(scene, names) if scene.is_image else _doing(scene, names, with_verbs=variant != 2)
    if variant == 1:
        return f"on a {scene.background} background, {things}"
    if variant == 2:
        return f"{things}, {scene.background} background"
    return f"{things}{',' if scene.relation else ''} on a {scene.background} background"


def long_caption(scene: Scene, variant: int) -> str:
    """One of LONG_VARIANTS descriptions of at most 40 words. Raises ValueError for an unknown variant."""
    _check_variant(variant, LONG_VARIANTS)
    background = BACKGROUND_WORDS[scene.background]
    things = _arranged(scene, _names(scene, size_words=True))
    medium = "picture" if scene.is_image else "video"
    if variant == 0:
        return f"A {medium} of {things} on {background}.{_motions(scene)}"
    alone = "" if scene.relation else " Nothing else is in view."
    return f"On {background} there is {things}.{_motions(scene)}{alone}"


def captions(scene: Scene, size_words: bool = True) -> tuple[str, ...]:
    """All captions of a scene, short ones first; captions(scene)[0] is its prompt."""
    short = [short_caption(scene, variant, size_words) for variant in range(SHORT_VARIANTS)]
    return (*short, *(long_caption(scene, variant) for variant in range(LONG_VARIANTS)))


def _doing(scene: Scene, names: list[str], with_verbs: bool) -> str:
    doing = [MOTION_WORDS[thing.motion][0 if with_verbs else 1] for thing in scene.things]
    first = f"{names[0]} {doing[0]}"
    if scene.relation is None:
        return first
    return f"{first}, {RELATION_WORDS[scene.relation]} {names[1]} {'that ' if with_verbs else ''}{doing[1]}"


def _motions(scene: Scene) -> str:
    if scene.is_image:
        return ""
    return "".join(f" The {_kind(scene, thing)} {MOTION_WORDS[thing.motion][2]}." for thing in scene.things)


def _kind(scene: Scene, thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}" if scene.relation else thing.shape


def _arranged(scene: Scene, names: list[str]) -> str:
    return f" {RELATION_WORDS[scene.relation]} ".join(names) if scene.relation else names[0]


def _names(scene: Scene, size_words: bool) -> list[str]:
    names = [f"{thing.size} " * size_words + f"{thing.colour} {thing.shape}" for thing in scene.things]
    return [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]


def _check_variant(variant: int, count: int) -> None:
    if not 0 <= variant < count:
        raise ValueError(f"variant is {variant}; it must be in 0..{count - 1}")

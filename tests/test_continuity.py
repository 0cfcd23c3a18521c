"""Laws of continuity: real clips flow, cuts and losses are seen, places and areas are those of the scene."""

import dataclasses

import numpy as np
import pytest

from sora_jax.data.worlds import clips
from sora_jax.data.worlds.scene import Scene, Thing, track
from sora_jax.evaluate import continuity, reader


def scene(motion="right", frames=17, colour="red", shape="circle", **thing):
    path = dict(centre_y=24.0, centre_x=24.0, travel=14.0, cycles=1) | thing
    return Scene((Thing(colour, shape, "large", motion, 8.0, **path),), None, "gray", 48, 48, frames, 5.0)


def video(*arguments, **changes):
    return clips.render_mixed([scene(*arguments, **changes)])[0]


@pytest.mark.parametrize("motion", ["still", "right", "orbit", "bounce"])
def test_places_and_areas_are_those_of_the_scene(motion):
    asked = scene(motion)
    path = track(asked.things[0], 17)
    assert np.allclose(reader.places(video(motion)), path[:, :2], atol=0.35)
    assert np.allclose(reader.areas(video(motion)), np.pi * path[:, 2] ** 2, rtol=0.08)


def test_nothing_is_nowhere():
    empty = np.full((3, 16, 16, 3), 128, np.uint8)
    assert np.isnan(reader.places(empty)).all() and not reader.areas(empty).any()


@pytest.mark.parametrize("motion", ["still", "right", "orbit"])
def test_real_clips_have_no_seam_and_a_jump_is_one(motion):
    whole = video(motion)
    assert max(continuity.seam(whole, 9).values()) < 1.5
    jumped = np.concatenate([whole[:9], np.roll(whole, 6, axis=2)[9:]])
    assert continuity.seam(jumped, 9)["position"] > 1.5


def test_seams_of_one_video_are_judged_by_its_other_steps():
    whole = video("right", frames=33)
    jumped = np.concatenate([whole[:9], np.roll(whole, 6, axis=2)[9:25], whole[25:]])
    found = continuity.seams(jumped, [9, 17, 25])
    assert [seam["position"] > 1.5 for seam in found] == [True, False, True]
    assert continuity.seams(whole, [9]) == [continuity.seam(whole, 9)]
    # The jumps themselves have no part in what is usual.
    length_T = np.linalg.norm(np.diff(continuity.reader.places(jumped), axis=0), axis=1)
    others = np.delete(length_T, [8, 16, 24]).mean()
    assert found[0]["position"] == pytest.approx(length_T[8] / max(others, continuity.LEAST_STEP))


def test_a_sudden_turn_is_a_change_of_velocity_alone():
    whole = video("right")
    turned = np.concatenate([whole[:9], whole[7::-1]])
    found = continuity.seam(turned, 9)
    assert found["position"] < 1.5 < found["velocity"]


@pytest.mark.parametrize("frames", [[*range(9, 0, -1), *range(8)], [*range(10), *range(8, 1, -1)]])
def test_a_turn_on_either_side_of_the_seam_is_a_change_of_velocity(frames):
    """What was made comes to what was given from where that goes; or goes on for a frame, and then back."""
    found = continuity.seam(video("right")[frames], 9)
    assert found["position"] < 1.5 < found["velocity"]


def test_a_thing_that_is_gone_at_the_seam_is_no_flow():
    whole = video("right").copy()
    whole[9:] = whole[0, 0, 0]
    assert continuity.seam(whole, 9)["position"] == np.inf


def test_a_full_orbit_loops_and_a_path_does_not():
    orbit = video("orbit", frames=33)[:-1]  # its last frame is its first
    assert continuity.loop_change(orbit) < 1.25 < continuity.loop_change(video("right"))


def test_groups_that_stand_and_jump_are_told():
    whole = video("right")
    assert continuity.change_into_groups(whole, 4) == pytest.approx(1, abs=0.1)
    stands = whole[[0, *np.repeat([4, 8, 12, 16], 4)]]  # each group its last frame
    assert continuity.change_into_groups(stands, 4) == pytest.approx(4, abs=0.1)


def test_the_worst_change_finds_a_cut():
    whole = video("right")
    cut = np.concatenate([whole[:8], whole[12:]])
    assert continuity.worst_change(whole) < 2 < continuity.worst_change(cut)


def test_kept_is_the_same_thing_to_the_end():
    whole = video("orbit", frames=65)
    assert continuity.kept(whole, 17)
    other = video("orbit", frames=65, colour="blue")
    assert not continuity.kept(np.concatenate([whole[:40], other[40:]]), 17)
    gone = whole.copy()
    gone[30:40] = gone[0, 0, 0]
    assert not continuity.kept(gone, 17)
    larger = clips.render_mixed(
        [
            dataclasses.replace(
                scene("orbit", frames=65), things=(dataclasses.replace(scene("orbit").things[0], radius=14.0),)
            )
        ]
    )[0]
    assert not continuity.kept(np.concatenate([whole[:40], larger[40:]]), 17)


def test_a_change_at_a_seam_is_held_against_the_others():
    grey = np.array([0, 2, 4, 10, 12, 13, 15], np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (7, 4, 4, 3))
    assert continuity.seam_change(frames, [3]) == pytest.approx(6 / 1.8)
    assert continuity.seam_change(frames, [3, 5]) == pytest.approx(6 / 2)
    assert continuity.seam_change(np.zeros((5, 4, 4, 3), np.uint8), [2]) == 0


def test_the_most_change_is_a_multiple_of_the_mean():
    frames = np.zeros((5, 2, 2, 3), np.uint8)
    frames[1:] += 4
    frames[4:] += 12
    assert continuity.most_change(frames) == pytest.approx(12 / 4)
    # Frames at rest have no mean of their own.
    assert continuity.most_change(frames[:1].repeat(3, 0)) == 0

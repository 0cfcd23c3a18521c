"""Laws of the judge of prompting: a model that shows what was asked for reaches everything, and what is wrong is seen."""

import dataclasses
import types

import numpy as np
import parts
import pytest

from sora_jax import config
from sora_jax.data.worlds import captions, clips
from sora_jax.data.worlds.scene import Scene, Thing
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.evaluate import reader
from sora_jax.generate import pipeline
from sora_jax.study import prompting

COUNT = 12
WORLD = dataclasses.replace(
    config.from_config_dict(parts.dit_run(parts.compact_world(), 1, "vae")).data.world,
    motions=("still", "left", "up", "orbit"),
    frame_sizes=((48, 48),),
)


class Oracle(pipeline.Pipeline):
    """A pipeline with a perfect VAE whose videos are what `answer` says: of a job, or of a request for text alone."""

    def __init__(self, folder):
        known = types.SimpleNamespace(next_frame=0.0)
        loader = types.SimpleNamespace(known=known)
        self.run = types.SimpleNamespace(data=types.SimpleNamespace(world=WORLD), loader=loader)
        self.geometry = types.SimpleNamespace(stride=(4, 8, 8), patch=(1, 1, 1))
        self.codec = types.SimpleNamespace(encode=lambda videos: [(video, None) for video in videos], decode=list)
        self.judge = prompting.Prompting(self, SamplerConfig(), COUNT, 0, folder)
        self.answer = None

    def make(self, jobs, settings):
        videos = [self.answer(number, job) for number, job in enumerate(jobs)]
        sizes = [(job.size.frames, job.size.height, job.size.width) for job in jobs]
        assert [video.shape for video in videos] == [(*size, 3) for size in sizes]
        return videos

    def sample(self, requests, settings):
        if all((request.frames, request.height, request.width) == (17, 48, 48) for request in requests):
            return self.judge.real[: len(requests)]
        return [np.full((request.frames, request.height, request.width, 3), 128, np.uint8) for request in requests]

    def scores(self, mode, answer):
        self.answer = answer
        found, videos = getattr(self.judge, mode)()
        assert len(videos) == (COUNT // 2 if mode == "long" else COUNT)
        # What the page shows of it has a margin, and what was made of a whole video that one to its left.
        beside = 2 if mode.startswith("edit") or mode == "interpolate" else 1
        assert [video.marked().frames_THWC.shape[1:] for video in videos] == [
            (video.frames_THWC.shape[1] + 4, beside * (video.frames_THWC.shape[2] + 4), 3) for video in videos
        ]
        return found


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


def grey(number, job):
    return np.full((job.size.frames, job.size.height, job.size.width, 3), 128, np.uint8)


def recoloured(scene, colour=None):
    (thing,) = scene.things
    other = colour or next(each for each in WORLD.colours if each != thing.colour)
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, colour=other),))


def test_an_image_that_moves_as_prompted_is_told_from_another_thing(oracle):
    real, other = oracle.judge.real, clips.render_mixed([recoloured(scene) for scene in oracle.judge.scenes])
    found = oracle.scores("image", lambda number, job: real[number])
    assert found["identity"] == found["identity_ceiling"] == found["motion"] == 1 and found["given_psnr"] > 60
    assert found["identity_of_frames"] == found["identity_of_frames_ceiling"] == 1
    found = oracle.scores("image", lambda number, job: other[number])
    assert found["identity"] == 0 and found["motion"] == 1
    assert found["given_psnr"] < 30
    assert oracle.scores("image", grey)["identity"] == 0


@pytest.mark.parametrize(("shape", "radius"), [("circle", 6.0), ("star", 5.0)])
def test_two_of_a_thing_are_not_it(shape, radius):
    """Read as one, of its colour and shape, but not in one piece."""
    left = Thing("red", shape, "small", "still", radius, 24.0, 17.0)
    scenes = [Scene((dataclasses.replace(left, centre_x=x),), None, "black", 48, 48, 5, 8.0) for x in (17.0, 31.0)]
    one, other = clips.render_mixed(scenes)
    (reading,) = reader.read_many([np.maximum(one, other)])
    assert [(thing.colour, thing.shape) for thing in reading.things] == [("red", shape)]
    assert prompting._identity([one], scenes[:1], "_now") == {"identity_now": 1, "identity_of_frames_now": 1}
    assert prompting._identity([np.maximum(one, other)], scenes[:1]) == {"identity": 0, "identity_of_frames": 0}


def test_a_prompt_alone_is_judged_by_motion_too(oracle):
    """A thing that comes apart in every third frame is right as a whole, and in two thirds of its frames."""
    judge = oracle.judge
    judge.from_text = [frames_THWC.copy() for frames_THWC in judge.real]
    moving = next(number for number, scene in enumerate(judge.scenes) if scene.things[0].motion != "still")
    motion = judge.scenes[moving].things[0].motion
    of_motion = [scene.things[0].motion for scene in judge.scenes].count(motion)
    found, videos = judge.text()
    assert [video.prompt for video in videos] == [captions.prompt(scene, False) for scene in judge.scenes]
    assert found["all"] == found["frames"] == found[f"frames_{motion}"] == 1
    broken_THWC = judge.from_text[moving]
    broken_THWC[1::3] = np.roll(broken_THWC[1::3], broken_THWC.shape[2] // 2, axis=2)
    whole_THWC = judge.real[moving]
    lost = np.abs(whole_THWC[1::3].astype(int) - whole_THWC[1::3, :1, :1]) > np.abs(
        broken_THWC[1::3].astype(int) - broken_THWC[1::3, :1, :1]
    )
    broken_THWC[1::3] = np.where(lost, whole_THWC[1::3], broken_THWC[1::3])  # the thing at two places
    found, _ = judge.text()
    apart = len(broken_THWC[1::3]) / len(broken_THWC)
    assert found[f"frames_{motion}"] == pytest.approx(1 - apart / of_motion)
    assert found["frames"] == pytest.approx(1 - apart / COUNT)


@pytest.mark.parametrize(("mode", "new"), [("extend_forward", slice(9, None)), ("extend_backward", slice(9))])
def test_a_seam_is_seen_from_both_sides(oracle, mode, new):
    real = oracle.judge.real

    def jumps(number, job):
        video = real[number].copy()
        video[new] = np.roll(video[new], 12, axis=1)
        return video

    found = oracle.scores(mode, lambda number, job: real[number])
    assert found["both"] == found["both_ceiling"] == found["both_of_moving"] == 1
    # A level of one pixel in every other frame is the file's, and this is not.
    assert found["given_psnr"] > 60 < found["given_psnr_least"] and found["given_apart"] == 1
    given = oracle.scores(
        mode, lambda n, job: np.where(job.timeline.given_THW[..., None], job.timeline.frames_THWC, real[n])
    )
    assert given["given_apart"] == 0
    assert found["identity"] == found["motion"] == 1
    jumped = oracle.scores(mode, jumps)
    assert max(jumped["both"], jumped["both_of_moving"]) <= 0.2 and jumped["given_psnr"] > 60
    assert oracle.scores(mode, grey)["given_psnr"] < 20


def test_a_thing_that_is_lost_on_the_way_is_not_kept(oracle):
    def drawn(number, job):
        scene = prompting.of_motions(WORLD, prompting.ENDLESS, COUNT // 2, 17)[number]
        cycles = scene.things[0].cycles * (job.size.frames // 17)
        thing = dataclasses.replace(scene.things[0], cycles=cycles)
        whole = clips.render_mixed([dataclasses.replace(scene, things=(thing,), num_frames=job.size.frames)])[0]
        return np.concatenate([job.timeline.frames_THWC[:9], whole[9:]])

    found = oracle.scores("long", drawn)
    assert found["kept"] == found["kept_of_moving"] == found["identity_at_start"] == found["identity_at_end"] == 1
    assert found["length"] == 137  # of whole groups no fewer than 8 x 17
    assert found["seams_smooth"] > 0.9 and found["given_psnr"] > 60
    assert found["kept_in_every_frame"] == found["identity_at_end_of_moving"] == 1
    blinks = oracle.scores(
        "long", lambda number, job: np.concatenate([(now := drawn(number, job))[:60], grey(number, job)[:3], now[63:]])
    )
    assert blinks["kept"] == 1 and blinks["kept_in_every_frame"] == 0
    held = oracle.scores("long", lambda number, job: np.repeat(drawn(number, job)[:1], 137, 0))
    assert held["kept"] == 1 and held["given_psnr"] < 60
    lost = oracle.scores("long", lambda number, job: np.concatenate([drawn(number, job)[:66], grey(number, job)[66:]]))
    assert lost["kept"] == lost["kept_of_moving"] == lost["identity_at_end"] == 0 and lost["identity_at_start"] == 1


def test_a_loop_closes_and_is_alive(oracle):
    real = oracle.judge.real

    def back_and_forth(number, job):
        return real[number][[*range(9), *range(8, 0, -1)]]

    found = oracle.scores("loop", back_and_forth)
    assert found["closed"] == found["alive"] == found["identity"] == found["smooth_of_moving"] == found["even"] == 1
    assert found["closed_floor"] == oracle.scores("loop", lambda number, job: real[number])["closed"] < 1
    # One that is back at its start by a jump on the way closes, and is seen to jump.
    leaps = oracle.scores("loop", lambda number, job: real[number][[*range(13), 3, 2, 1, 0]])
    assert leaps["closed"] == 1 and leaps["smooth_of_moving"] < 0.5 and leaps["even"] < 0.5
    frozen = oracle.scores("loop", lambda number, job: np.repeat(real[number][:1], 17, 0))
    assert frozen["closed"] == 1 and frozen["alive"] < 1
    of_file = oracle.scores("loop_file", back_and_forth)
    assert of_file["closed"] == of_file["identity"] == of_file["smooth_of_moving"] == 1 and of_file["given_psnr"] > 60
    assert of_file["closed_floor"] < 1 and oracle.scores("loop_file", grey)["given_psnr"] < 20


def test_a_cut_is_no_bridge(oracle):
    def cut(number, job):
        frames_THWC = job.timeline.frames_THWC.copy()
        frames_THWC[9:17] = frames_THWC[8]
        return frames_THWC

    found = oracle.scores("connect", cut)
    assert found["smooth"] == found["smooth_floor"] < 0.5 and found["smooth_ceiling"] == 1
    assert found["given_psnr"] > 60
    assert oracle.scores("connect", grey)["given_psnr"] < 20
    of_others = oracle.scores("connect_others", cut)
    assert of_others["smooth"] == of_others["smooth_floor"] < 0.5 and of_others["given_psnr"] > 60


def test_a_fade_is_smooth_and_no_bridge(oracle):
    def faded(number, job):
        frames_THWC = job.timeline.frames_THWC
        return prompting._faded(frames_THWC[:9], frames_THWC[17:], len(frames_THWC))

    def vanishing(number, job):
        frames_THWC = faded(number, job)
        frames_THWC[9:17] = frames_THWC[0, 0, 0]
        return frames_THWC

    found = oracle.scores("connect", faded)
    assert found["smooth"] == found["smooth_floor_of_fades"] == 1 and found["smooth_and_right"] < 1
    found = oracle.scores("connect", vanishing)
    assert found["identity"] == found["identity_of_frames"] == found["smooth_and_right"] == 0


def test_other_things_are_led_to_with_their_own_prompt(oracle):
    def blended(number, job):
        frames_THWC = job.timeline.frames_THWC
        shown = [reader.read_many([part])[0].things[0] for part in (frames_THWC[:9], frames_THWC[-8:])]
        assert (shown[0].colour, shown[0].shape) != (shown[1].colour, shown[1].shape)
        assert shown[1].colour in job.order.prompt and shown[1].shape in job.order.prompt
        return frames_THWC

    oracle.scores("connect_others", blended)


def test_an_edit_changes_what_was_asked_for_and_leaves_the_place(oracle):
    real = oracle.judge.real

    def as_asked(number, job):
        colour = next(word for word in WORLD.colours if word in job.order.prompt.split())
        assert colour != oracle.judge.scenes[number].things[0].colour
        return clips.render_mixed([recoloured(oracle.judge.scenes[number], colour)])[0]

    def elsewhere(number, job):
        return np.roll(as_asked(number, job), 3, axis=2)

    def for_a_while(number, job):
        return np.concatenate([elsewhere(number, job)[:4], as_asked(number, job)[4:]])

    for mode in ("edit", "edit_masked"):
        found = {answer: oracle.scores(mode, answer) for answer in (as_asked, lambda n, job: real[n], elsewhere, grey)}
        assert [(each["changed"], each["place_kept"]) for each in found.values()] == [(1, 1), (0, 1), (1, 0), (0, 0)]
        away = oracle.scores(mode, for_a_while)
        assert away["place_kept"] == 1 and away["place_kept_always"] == 0
    # Around the box of a mask all is as it was.
    assert found[as_asked]["original_psnr"] > 60 and found[grey]["original_psnr"] < 40


def test_an_edit_of_a_shape_is_read_as_that(oracle):
    real, scenes = oracle.judge.real, oracle.judge.scenes

    def as_asked(number, job):
        (thing,) = scenes[number].things
        shape = next(word for word in job.order.prompt.split() if word in WORLD.shapes)
        assert shape != thing.shape and thing.colour in job.order.prompt
        return clips.render_mixed(
            [dataclasses.replace(scenes[number], things=(dataclasses.replace(thing, shape=shape),))]
        )[0]

    names = ("changed", "identity", "identity_of_frames", "place_kept", "place_kept_always")
    assert oracle.scores("edit_shape", as_asked) == dict.fromkeys(names, 1)
    assert oracle.scores("edit_shape", lambda number, job: real[number])["changed"] == 0


def test_lengths_of_none_of_training_are_asked_for_as_a_user_does(oracle):
    """Between those of clips of 9 and 17 frames, and half as long again; the longer in windows."""
    modes, seen = oracle.judge.modes(), []

    def grey_of(number, job):
        seen.append((job.size.frames, len(job.timeline.windows)))
        return grey(number, job)

    oracle.answer = grey_of
    for name in ("length_between", "length_longer"):
        found, videos = modes[name]()
        assert found["all"] < 0.5 and len(videos) == COUNT
    assert seen == [(13, 1)] * COUNT + [(25, 2)] * COUNT


def test_what_is_not_in_the_middle_comes_back(oracle):
    real = oracle.judge.real

    def middle(number, job):
        assert np.array_equal(~job.timeline.given_THW.all((1, 2)), np.isin(np.arange(17), range(5, 13)))
        return real[number]

    def leaps(number, job):
        return np.where(job.timeline.given_THW[..., None], real[number], np.roll(real[number], 12, axis=1))

    found = oracle.scores("inpaint_time", middle)
    assert found["identity"] == found["place_kept"] == found["seams_smooth"] == 1 and found["given_psnr"] > 60
    jumped = oracle.scores("inpaint_time", leaps)
    assert jumped["seams_smooth"] < 0.3 and jumped["given_psnr"] > 60


def test_variations_are_of_one_prompt_and_differ(oracle):
    scenes = [scene for scene in oracle.judge.scenes[: COUNT // 4] for _ in range(4)]
    drawn = clips.render_mixed(scenes)
    assert oracle.scores("variations", lambda number, job: drawn[number]) == {"adherence_all": 1, "apart": 0}
    moved = oracle.scores("variations", lambda number, job: np.roll(drawn[number], 6 * (number % 4), axis=1))
    assert moved["apart"] > 0.5


def test_what_was_given_has_a_green_margin():
    given_THW = np.zeros((2, 8, 8), bool)
    given_THW[0], given_THW[1, :, :4] = True, True
    marked = prompting.Made(np.zeros((2, 8, 8, 3), np.uint8), 5.0, "", 0, given_THW=given_THW).marked().frames_THWC
    green, grey = ((marked == colour).all(-1) for colour in (prompting.GIVEN, prompting.MADE))
    assert green[0].sum() == green[1].sum() + grey[1].sum() == 12 * 12 - 8 * 8 and not grey[0].any()
    assert green[1, :2, :6].all() and grey[1, :2, 6:].all() and not marked[:, 2:-2, 2:-2].any()
    # What was there stands to the left, given in whole.
    source_THWC = np.full((2, 8, 8, 3), 7, np.uint8)
    edited = prompting.Made(np.zeros((2, 8, 8, 3), np.uint8), 5.0, "", 0, source_THWC=source_THWC).marked().frames_THWC
    assert (edited[:, 2:10, 2:10] == 7).all() and (edited[:, :, 10:12] == prompting.GIVEN).all()
    assert (edited[:, :, 12:14] == prompting.MADE).all() and not edited[:, 2:10, 14:-2].any()


def test_the_other_modes_are_laid_out_and_read(oracle):
    real = oracle.judge.real
    found = oracle.scores("inpaint", lambda number, job: real[number])
    assert found["identity"] == found["place_kept"] == 1 and found["original_psnr"] > 60
    half = oracle.scores("inpaint", lambda number, job: np.where(job.timeline.given_THW[..., None], real[number], 128))
    assert half["place_kept"] < 0.5 and half["original_psnr"] > 60
    exact = oracle.scores("interpolate", lambda number, job: real[number])
    assert exact["identity"] == exact["place_kept_always"] == exact["smooth"] == 1
    assert exact["made_psnr"] == exact["made_psnr_ceiling"] > 60 and exact["original_psnr"] > 60
    blended = oracle.scores("interpolate", lambda number, job: prompting._blended(real[number]))
    assert blended["made_psnr"] == blended["made_psnr_floor"] < 30 and blended["original_psnr"] > 60

    def wider(number, job):
        return np.pad(real[number], ((0, 0), (0, 0), (8, 8), (0, 0)), mode="edge")

    found = oracle.scores("outpaint", wider)
    assert found["identity"] == found["place_kept_always"] == 1 and found["original_psnr"] > 60
    assert oracle.scores("outpaint", grey)["original_psnr"] < 20
    still = oracle.scores("still", lambda number, job: real[number][:1])
    assert still["identity"] == 1 and oracle.scores("still", grey)["identity"] == 0


def test_a_world_without_such_motions_is_refused():
    with pytest.raises(ValueError, match="none of the motions orbit"):
        prompting.of_motions(dataclasses.replace(WORLD, motions=("still", "up")), ("orbit",), 2, 17)


def test_all_modes_are_judged_in_one_go(oracle):
    """Whatever a model makes is judged, and of all modes there are videos for the page."""
    oracle.judge.count, oracle.answer = 2, grey
    oracle.judge.scenes, oracle.judge.real = oracle.judge.scenes[:2], oracle.judge.real[:2]
    oracle.judge.round_trips = oracle.judge.round_trips[:2]
    rungs = list(oracle.judge.judge())
    assert [rung.name for rung in rungs] == list(oracle.judge.modes())
    assert all(len(rung.samples) == rung.scores["count"] and rung.scores["count"] in (1, 2, 4) for rung in rungs)
    assert {"sizes_trained", "sizes_both_sides"} <= {rung.name for rung in rungs}
    assert all(np.isfinite(list(rung.scores.values())).all() for rung in rungs)

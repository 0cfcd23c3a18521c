"""Laws of the judge of prompting: a model that shows what was asked for reaches everything, and what is wrong is seen."""

import dataclasses
import types

import numpy as np
import parts
import pytest

from sora_jax import config
from sora_jax.data.worlds import clips
from sora_jax.diffusion.sampler import SamplerConfig
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
        self.run = types.SimpleNamespace(data=types.SimpleNamespace(world=WORLD))
        self.geometry = types.SimpleNamespace(stride=(4, 8, 8), patch=(1, 1, 1))
        self.codec = types.SimpleNamespace(encode=lambda videos: [(video, None) for video in videos], decode=list)
        self.judge = prompting.Prompting(self, SamplerConfig(), COUNT, 0, folder)
        self.answer = None

    def make(self, jobs, settings):
        videos = [self.answer(number, job) for number, job in enumerate(jobs)]
        assert [video.shape for video in videos] == [(job.size.frames, 48, 48, 3) for job in jobs]
        return videos

    def sample(self, requests, settings):
        return self.judge.real

    def scores(self, mode, answer):
        self.answer = answer
        found, videos = getattr(self.judge, mode)()
        assert len(videos) == (COUNT // 2 if mode == "long" else COUNT)
        return found


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


def grey(number, job):
    return np.full((job.size.frames, 48, 48, 3), 128, np.uint8)


def recoloured(scene, colour=None):
    (thing,) = scene.things
    other = colour or next(each for each in WORLD.colours if each != thing.colour)
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, colour=other),))


def test_an_image_that_moves_as_prompted_is_told_from_another_thing(oracle):
    real, other = oracle.judge.real, clips.render_mixed([recoloured(scene) for scene in oracle.judge.scenes])
    found = oracle.scores("image", lambda number, job: real[number])
    assert found["identity"] == found["identity_ceiling"] == found["motion"] == 1 and found["first_frame_psnr"] > 60
    found = oracle.scores("image", lambda number, job: other[number])
    assert found["identity"] == 0 and found["motion"] == 1
    assert found["first_frame_psnr"] < 30
    assert oracle.scores("image", grey)["identity"] == 0


@pytest.mark.parametrize(("mode", "new"), [("extend_forward", slice(9, None)), ("extend_backward", slice(9))])
def test_a_seam_is_seen_from_both_sides(oracle, mode, new):
    real = oracle.judge.real

    def jumps(number, job):
        video = real[number].copy()
        video[new] = np.roll(video[new], 12, axis=1)
        return video

    found = oracle.scores(mode, lambda number, job: real[number])
    assert found["both"] == found["both_ceiling"] == 1
    assert oracle.scores(mode, jumps)["both"] <= 0.2


def test_a_thing_that_is_lost_on_the_way_is_not_kept(oracle):
    def drawn(number, job):
        scene = prompting.of_motions(WORLD, prompting.ENDLESS, COUNT // 2, 17)[number]
        cycles = scene.things[0].cycles * (job.size.frames // 17)
        thing = dataclasses.replace(scene.things[0], cycles=cycles)
        return clips.render_mixed([dataclasses.replace(scene, things=(thing,), num_frames=job.size.frames)])[0]

    found = oracle.scores("long", drawn)
    assert found["kept"] == 1 and found["frames"] == 133  # the longest of whole groups within 8 x 17
    assert found["seams_smooth"] > 0.9
    assert oracle.scores("long", lambda number, job: np.repeat(drawn(number, job)[:1], 133, 0))["kept"] == 1
    lost = oracle.scores("long", lambda number, job: np.concatenate([drawn(number, job)[:66], grey(number, job)[66:]]))
    assert lost["kept"] == 0


def test_a_loop_closes_and_is_alive(oracle):
    real = oracle.judge.real

    def back_and_forth(number, job):
        return real[number][[*range(9), *range(8, 0, -1)]]

    found = oracle.scores("loop", back_and_forth)
    assert found["closed"] == found["alive"] == found["identity"] == found["smooth_of_moving"] == 1
    assert found["closed_floor"] == oracle.scores("loop", lambda number, job: real[number])["closed"] < 1
    # One that is back at its start by a jump on the way closes, and is seen to jump.
    leaps = oracle.scores("loop", lambda number, job: real[number][[*range(13), 3, 2, 1, 0]])
    assert leaps["closed"] == 1 and leaps["smooth_of_moving"] < 0.5
    frozen = oracle.scores("loop", lambda number, job: np.repeat(real[number][:1], 17, 0))
    assert frozen["closed"] == 1 and frozen["alive"] < 1


def test_a_cut_is_no_bridge(oracle):
    def cut(number, job):
        frames_THWC = job.timeline.frames_THWC.copy()
        frames_THWC[9:17] = frames_THWC[8]
        return frames_THWC

    found = oracle.scores("connect", cut)
    assert found["smooth"] == found["smooth_floor"] < 0.5 and found["smooth_ceiling"] == 1
    assert found["ends_psnr"] > 60
    assert oracle.scores("connect", grey)["ends_psnr"] < 20


def test_an_edit_changes_what_was_asked_for_and_leaves_the_place(oracle):
    real = oracle.judge.real

    def as_asked(number, job):
        colour = next(word for word in WORLD.colours if word in job.order.prompt.split())
        assert colour != oracle.judge.scenes[number].things[0].colour
        return clips.render_mixed([recoloured(oracle.judge.scenes[number], colour)])[0]

    assert oracle.scores("edit", as_asked) == {"changed": 1, "place_kept": 1}
    assert oracle.scores("edit", lambda number, job: real[number]) == {"changed": 0, "place_kept": 1}
    moved = oracle.scores("edit", lambda number, job: np.roll(as_asked(number, job), 3, axis=2))
    assert moved == {"changed": 1, "place_kept": 0}
    assert oracle.scores("edit", grey) == {"changed": 0, "place_kept": 0}


def test_the_other_modes_are_laid_out_and_read(oracle):
    real = oracle.judge.real
    found = oracle.scores("inpaint", lambda number, job: real[number])
    assert found["identity"] == found["place_kept"] == 1 and found["given_psnr"] > 60
    half = oracle.scores("inpaint", lambda number, job: np.where(job.timeline.given_THW[..., None], real[number], 128))
    assert half["place_kept"] < 0.5 and half["given_psnr"] > 60
    assert oracle.scores("interpolate", lambda number, job: real[number]) == {"identity": 1, "place_kept": 1}
    still = oracle.scores("still", lambda number, job: real[number][:1])
    assert still["identity"] == 1 and oracle.scores("still", grey)["identity"] == 0


def test_a_world_without_such_motions_is_refused():
    with pytest.raises(ValueError, match="none of the motions orbit"):
        prompting.of_motions(dataclasses.replace(WORLD, motions=("still", "up")), ("orbit",), 2, 17)

"""Laws of the comparisons with older ways, judged from models that show what they should, or do not."""

import dataclasses

import parts
import pytest
import tiny
from test_prompting import Oracle

from sora_jax import config
from sora_jax.data.worlds import clips, scene
from sora_jax.study import baselines, prompting

COUNT = 8
STUDY = dataclasses.replace(tiny.study(), prompts=COUNT, seed=5)
SIZES = dict(frame_sizes=((32, 48), (48, 32)), frame_counts=(1, 17), motions=("still", "left", "up"))


def model(tmp_path, known=None, **world):
    run = config.from_config_dict(parts.dit_run(parts.compact_world(), 1, "vae"))
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, world=dataclasses.replace(run.data.world, **SIZES | world)),
        loader=dataclasses.replace(run.loader, known=known or run.loader.known),
    )
    made = Oracle(tmp_path)
    made.run = run
    return made


def test_things_that_are_cut_are_told_from_things_that_are_not(tmp_path, monkeypatch):
    native, square = model(tmp_path), model(tmp_path, square=True)
    asked = []

    def shown(cut):
        def sampled(made, settings, scenes, *_):
            asked.append(scenes)
            moved = [
                dataclasses.replace(thing, centre_x=thing.centre_x + 12 * cut)
                for (thing,) in (s.things for s in scenes)
            ]
            return clips.render_mixed(
                [dataclasses.replace(scene, things=(thing,)) for scene, thing in zip(scenes, moved, strict=True)]
            )

        return sampled

    monkeypatch.setattr(baselines.judgement, "sampled", shown(cut=False))
    (whole, *_), (other, *_) = (baselines._framed(STUDY, made, made.run.sampler) for made in (native, square))
    # Both are asked for the same things in the squares that both know.
    assert asked[0] == asked[1] and all((scene.height, scene.width) == (32, 32) for scene in asked[0])
    assert whole["inside"] == whole["whole_videos"] == whole["adherence_all"] == whole["inside_of_real"] == 1
    assert other["inside"] == 1 > other["inside_of_real"]
    assert min(whole["visible"], whole["visible_of_real"], other["visible"]) > 0.98 > other["visible_of_real"]
    monkeypatch.setattr(baselines.judgement, "sampled", shown(cut=True))
    cut = baselines._framed(STUDY, native, native.run.sampler)[0]
    assert cut["inside"] < 0.3 < cut["visible"] < 0.8


def test_how_much_of_a_thing_is_visible_is_its_area_within_the_frame():
    circle = scene.Thing("red", "circle", "large", "still", 8.0, 16.0, 16.0)
    blank = scene.Scene((circle,), None, "white", 32, 32, 5, 8.0)
    shown = {}
    for x in (16.0, 31.0, 100.0):  # whole; an eighth of its width less than half of it; gone
        moved = dataclasses.replace(blank, things=(dataclasses.replace(circle, centre_x=x),))
        shown[x] = baselines._in_sight(clips.render_mixed([moved]), [blank])["visible"]
    assert shown[16.0] > 0.98 and shown[31.0] == pytest.approx(0.58, abs=0.05) and shown[100.0] == 0


@pytest.mark.parametrize("alone", [False, True])
def test_models_roll_out_as_they_were_trained(tmp_path, alone):
    known = config.KnownConfig(next_frame=1.0) if alone else config.KnownConfig(first_frames=0.5)
    made = model(tmp_path, known, motions=("still", "orbit"), frame_sizes=((48, 48),))
    jobs = []

    def answer(number, job):
        jobs.append(job)
        scene = prompting.of_motions(made.run.data.world, prompting.ENDLESS, COUNT, 17)[number]
        (thing,) = scene.things
        thing = dataclasses.replace(thing, cycles=thing.cycles * (job.size.frames // 17))
        video = clips.render_mixed([dataclasses.replace(scene, things=(thing,), num_frames=job.size.frames)])[0]
        video[70:] = 128  # lost on the way
        return video

    made.answer = answer
    shares, videos, _ = baselines._rolled(STUDY, made, made.run.sampler)
    assert len(videos) == COUNT and list(shares) == ["after_17", "after_34", "after_68", "after_133"]
    assert shares["after_17"] == shares["after_34"] == shares["after_68"] == 1 and shares["after_133"] == 0
    for job in jobs:
        made_at_once = {window.last - window.first for window in job.timeline.windows}
        assert (made_at_once == {1, 4}) == alone and job.order.frames == 133

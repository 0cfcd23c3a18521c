"""Laws of the comparisons with older ways, judged from models that show what they should, or do not."""

import dataclasses

import parts
import pytest
import tiny
from test_prompting import Oracle

from sora_jax import config
from sora_jax.data.worlds import clips
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
    monkeypatch.setattr(baselines.judgement, "sampled", shown(cut=True))
    assert baselines._framed(STUDY, native, native.run.sampler)[0]["inside"] < 0.3


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

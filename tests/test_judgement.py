"""Judgement asks for what is held out and holds it against other clips of the same world."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import quickstart
import tiny

from sora_jax import config
from sora_jax.diffusion import sampler
from sora_jax.evaluate import fvd
from sora_jax.generate import pipeline
from sora_jax.study import judgement, report
from sora_jax.train import dit

SETTINGS = sampler.SamplerConfig(steps=2, method="euler", guidance=1.0, shift=1.0)


class Blank(pipeline.Pipeline):
    """Stands for a model: gray videos of the sizes that are asked for."""

    def __init__(self, **world):
        run = config.from_config_dict(quickstart.get_config("dit"))
        data = dataclasses.replace(run.data, world=dataclasses.replace(run.data.world, **world))
        self.run = dataclasses.replace(run, data=data)

    def sample(self, requests, settings):
        self.requests = requests
        return [np.full((each.frames, each.height, each.width, 3), 127, np.uint8) for each in requests]


@pytest.fixture
def compared(monkeypatch):
    """What FVD is asked to compare, in place of an hour of I3D."""
    calls = []

    def fake(real, sets, weights, num_videos):
        calls.append((real, sets, weights, num_videos))
        return {name: fvd.Result(12.5 + len(name), num_videos, "abc") for name in sets}

    monkeypatch.setattr(judgement.fvd, "distances", fake)
    monkeypatch.setattr(judgement, "reconstructed", lambda made, videos: videos)
    monkeypatch.setattr(judgement.i3d, "load_weights", lambda path: None)
    return calls


def test_fvd_compares_held_out_clips_of_16_frames_and_more(compared):
    model = Blank(frame_counts=(1, 9, 17))
    found = judgement.video_distance(model, SETTINGS, Path("weights"), 24, seed=3)
    ((real, sets, weights, count),) = compared
    assert (weights, count, found["value"], found["metric"]) == (Path("weights"), 24, 16.5, "FVD (N=24)")
    assert (found["floor"], found["reconstructions"]) == (17.5, 27.5)
    for videos in (real, *sets.values()):
        assert len(videos) == 24 and all(len(video) >= fvd.NUM_FRAMES for video in videos)
    assert [request.seed for request in model.requests] == list(range(3, 27))
    # Real clips of other scenes than those that were asked for.
    asked = dit.heldout_videos(model.run.data.world, 24, frames=fvd.NUM_FRAMES)
    shown = judgement.clips.render_mixed(asked)
    assert all(np.array_equal(*pair) for pair in zip(shown, sets["reconstructions"], strict=True))
    assert not any(np.array_equal(one, other) for one in (*shown, *sets["floor"]) for other in real)


def test_fvd_of_short_clips_is_refused_before_any_work(compared):
    with pytest.raises(ValueError, match="of 16 frames are needed; the longest clips of this world have 9"):
        judgement.video_distance(Blank(frame_counts=(1, 9)), SETTINGS, Path("weights"), 24, seed=0)
    assert not compared


def test_a_blank_video_shows_nothing_that_was_asked_for(monkeypatch):
    model = Blank()
    monkeypatch.setattr(judgement, "reconstructed", lambda made, videos: videos)
    monkeypatch.setattr(judgement.mobilenet, "available", lambda: False)
    scores = judgement.evaluate(model, SETTINGS, 16, seed=0)
    assert scores["adherence"]["all"] == 0.0 and scores["adherence_ceiling"]["all"] == 1.0
    assert "frechet" not in scores and "fvd" not in scores
    assert "all     0.000     0.000     1.000" in judgement.table(scores)
    # What "all" does not ask for is told beside it.
    for name in ("size", "background"):
        assert scores["adherence"][name] == 0.0 and scores["adherence_ceiling"][name] == 1.0
    with pytest.raises(ValueError, match="at least 2"):
        judgement.evaluate(model, SETTINGS, 1, seed=0)


def test_frechet_distances_are_of_samples_without_guidance(monkeypatch):
    """Real clips through the VAE, here a perfect one, are what samples are held against beside real clips themselves."""

    guidances = []

    class Gray(Blank):
        def sample(self, requests, settings):
            guidances.append(settings.guidance)
            return [video + np.uint8(settings.guidance) for video in super().sample(requests, settings)]

    seen = []

    def features(videos):
        seen.append({int(video.mean()) for video in videos})
        return np.stack([video.astype(np.float32).mean((0, 1, 2)) for video in videos])

    model = Gray()
    monkeypatch.setattr(judgement, "reconstructed", lambda made, videos: [video // 2 for video in videos])
    monkeypatch.setattr(
        judgement, "noise", lambda made, scenes, seed: [np.full((9, 8, 8, 3), 255, np.uint8)] * len(scenes)
    )
    monkeypatch.setattr(judgement.mobilenet, "available", lambda: True)
    monkeypatch.setattr(judgement.frechet, "features", features)
    scores = judgement.evaluate(model, dataclasses.replace(SETTINGS, guidance=5.0), 8, seed=0)
    assert guidances == [5.0, 1.0] and seen[-1] == {128}
    halved = scores["frechet"]["distance"], scores["frechet_latent"]["distance"]
    assert halved[0] != halved[1] and scores["frechet"]["reconstructions"] > scores["frechet"]["floor"]
    assert scores["frechet"]["ceiling"] > max(scores["frechet"]["distance"], scores["frechet"]["reconstructions"])
    assert "without guidance, 8 videos each" in judgement.table(scores)
    # A model without guidance is sampled once.
    judgement.evaluate(model, SETTINGS, 8, seed=0)
    assert guidances == [5.0, 1.0, 1.0]


def test_held_out_videos_are_as_long_as_asked():
    world = Blank(frame_counts=(1, 9, 17)).run.data.world
    assert {scene.num_frames for scene in dit.heldout_videos(world, 20)} == {9, 17}
    assert {scene.num_frames for scene in dit.heldout_videos(world, 20, frames=10)} == {17}
    with pytest.raises(ValueError, match="of 18 frames are needed; the longest clips of this world have 17"):
        dit.heldout_videos(world, 1, frames=18)


def test_rungs_are_judged_once_and_come_back_with_their_videos(tmp_path, monkeypatch, rng, caplog):
    monkeypatch.setattr(judgement.checkpoint, "digest", lambda folder: "x")
    monkeypatch.setattr(judgement.pipeline, "load", lambda folder: object.__new__(pipeline.Pipeline))
    videos = [
        report.Video(rng.integers(0, 256, (3, 8, 8, 3), np.uint8), 5.0, prompt, seed)
        for seed, prompt in enumerate(["a red circle moves left", "", "two words"])
    ]
    made = [
        report.Rung("long", videos[:2], {"kept": 0.5}),
        report.Rung("edit", videos[2:], {"changed": 1.0}),
        report.Rung("sizes", (), {"all": 0.25}),
    ]
    calls, asked_for, stop_before = [], [], ""

    def judge(model, settings, there):
        calls.append(settings)
        for rung in made:
            if rung.name not in there:
                if rung.name == stop_before:
                    raise KeyboardInterrupt
                asked_for.append(rung.name)
                yield rung

    study, folder = tiny.study(), tmp_path / "1x"
    folder.mkdir()

    def once(seed, **sampler):
        stage = study.stages["1x"]
        stage = dataclasses.replace(stage, sampler=dataclasses.replace(stage.sampler, **sampler))
        asked = dataclasses.replace(study, seed=seed, stages=study.stages | {"1x": stage})
        return judgement.once(asked, folder, "prompted", [report], judge)

    for seed in (2, 2, 3):
        found = once(seed)
        assert [(rung.name, dict(rung.scores)) for rung in found] == [(rung.name, rung.scores) for rung in made]
        for one, other in zip(found, made, strict=True):
            for a, b in zip(one.samples, other.samples, strict=True):
                assert np.array_equal(a.frames_THWC, b.frames_THWC)
                assert (a.fps, a.prompt, a.seed) == (b.fps, b.prompt, b.seed)
    assert len(calls) == 2
    # Scores that do not say what the videos are.
    kept = folder / "prompted.json"
    kept.write_text(kept.read_text().replace('"edit/0": "2 5.0 ', '"edit/0": "2 '))
    once(3)
    assert len(calls) == 3 and "judging anew" in caplog.text
    # With another sampler the same checkpoint makes other videos, and the study's is the one that counts.
    once(3, guidance=7.0, guidance_interval=(0.1, 0.9))
    once(3, guidance=7.0, guidance_interval=(0.1, 0.9))
    assert len(calls) == 4 and calls[-1].guidance == 7.0 != calls[0].guidance
    # What was judged before it was stopped is there when it is begun again.
    asked_for.clear()
    stop_before = "sizes"
    with pytest.raises(KeyboardInterrupt):
        once(4)
    stop_before = ""
    assert [rung.name for rung in once(4)] == ["long", "edit", "sizes"] == asked_for
    # Scores that were not written any more, as it was killed, are judged again, and what was before them is not.
    asked_for.clear()
    stop_before = "sizes"
    with pytest.raises(KeyboardInterrupt):
        once(5)
    stop_before = ""
    (folder / "prompted_begun" / "1.json").unlink()
    assert len(once(5)) == 3 and asked_for == ["long", "edit", "edit", "sizes"]
    assert {path.name for path in folder.iterdir()} == {"prompted.json", "prompted.npz"}

"""Laws of sampling: sizes, company, what is given comes back, less noise, guidance. The weights are random ones."""

import dataclasses
from pathlib import Path

import decoding
import jax
import numpy as np
import pytest
import tiny

from sora_jax.data import pack
from sora_jax.generate import pipeline
from sora_jax.generate.known import Known
from sora_jax.text.captions import CaptionText
from sora_jax.train import dit


@pytest.fixture(scope="module")
def sampler():
    run = dit.resolve(tiny.dit_run("nowhere"))
    vae_config = tiny.vae_run().vae
    params, rest = jax.jit(lambda key: pipeline.initial_weights(run, vae_config, key))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    # What starts at zero would leave the prompt and the noise levels unread.
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )
    weights = rest["vae"]
    return pipeline.Pipeline(
        run, vae_config, params, (weights["params"], weights["rest"]), CaptionText(run.text, run.text.encoder)
    )


def request(prompt, seed=0, frames=5, **other):
    return pipeline.Request(prompt, 32, 32, frames, 8.0, seed, **other)


def test_samples_have_the_sizes_asked_for(sampler):
    requests = [
        request("a red circle", frames=1),
        request("a blue star", frames=9),
        pipeline.Request("x", 48, 32, 5, 8.0, 1),
    ]
    videos = sampler.sample(requests, sampler.run.sampler)
    assert [video.shape for video in videos] == [(1, 32, 32, 3), (9, 32, 32, 3), (5, 48, 32, 3)]
    assert all(video.dtype == np.uint8 for video in videos)


def test_the_noise_of_a_prompt_and_seed_is_that_of_every_model(sampler):
    requests = [request("a red circle", seed=5), request("a blue star", seed=6, frames=1)]

    def made(**changes):
        run = dataclasses.replace(sampler.run, dit=dataclasses.replace(sampler.run.dit, **changes))
        params, rest = jax.jit(lambda key: pipeline.initial_weights(run, sampler.vae_config, key))(jax.random.key(7))
        weights = rest["vae"]["params"], rest["vae"]["rest"]
        # A model that is not trained says that nothing moves, so what it makes is the noise that it began with.
        untrained = pipeline.Pipeline(run, sampler.vae_config, params, weights, sampler.text)
        return untrained.sample_latents(requests, run.sampler)

    small, large = made(), made(width=64, heads=4, blocks=3)
    assert all(np.array_equal(one, other) for one, other in zip(small, large, strict=True))
    assert all(np.std(one) == pytest.approx(1, abs=0.2) for one in small)


def test_samples_choose_their_attention_whatever_training_named(sampler):
    """As a run's own samples do, which are made of the model that it trains."""
    model = dataclasses.replace(sampler.run.dit, attention="splash")
    named = pipeline.Pipeline(
        dataclasses.replace(sampler.run, dit=model),
        sampler.vae_config,
        sampler.params,
        sampler.codec._weights,
        sampler.text,
    )
    asked = [request("a red circle", frames=5)]
    one, other = (each.sample_latents(asked, sampler.run.sampler)[0] for each in (sampler, named))
    assert np.array_equal(one, other)


def test_a_sample_does_not_depend_on_its_company(sampler):
    mine = request("a red circle moves left", seed=5)
    alone = sampler.sample_latents([mine], sampler.run.sampler)[0]
    others = [request("a blue star", seed=n, frames=frames) for n, frames in enumerate((1, 9, 5, 1))]
    together = sampler.sample_latents([*others, mine], sampler.run.sampler)[-1]
    assert np.allclose(alone, together, atol=1e-4)
    assert not np.allclose(
        alone, sampler.sample_latents([request("a red circle moves left", seed=6)], sampler.run.sampler)[0]
    )


GIVEN = {
    "image": (slice(0, 1),),
    "end": (slice(5, 9),),
    "part of a group": (slice(0, 3),),
    "box": (slice(0, 9), slice(0, 16), slice(8, 24)),
    "a few pixels": (slice(2, 4), slice(3, 5), slice(3, 5)),
}


def prompted(where, rng, strength=1.0):
    """A request with a part of a random video given."""
    frames = rng.integers(0, 256, (9, 32, 32, 3), np.uint8)
    given = np.zeros(frames.shape[:3], bool)
    given[GIVEN[where]] = True
    return request("a red circle", frames=9, known=Known(frames, given, strength))


@pytest.mark.parametrize("where", GIVEN)
def test_what_is_given_comes_back_as_the_vae_makes_it(sampler, rng, where):
    asked = prompted(where, rng)
    start = sampler.starts([asked])[0]
    latent = sampler.sample_latents([asked], sampler.run.sampler)[0]
    known = start.known_N.reshape(3, 4, 4)
    assert np.array_equal(latent[known], start.clean_thwc[known])
    assert not np.isclose(latent[~known], start.clean_thwc[~known]).any(-1).all()
    made = sampler.sample([asked], sampler.run.sampler)[0]
    given = asked.known.given_THW
    assert np.array_equal(made[given], sampler.codec.decode([start.clean_thwc])[0][given])


def test_the_future_of_an_image_does_not_depend_on_what_the_canvas_holds_there(sampler, rng):
    asked = prompted("image", rng)
    frames = asked.known.frames_THWC.copy()
    frames[1:] = 0
    other = dataclasses.replace(asked, known=dataclasses.replace(asked.known, frames_THWC=frames))
    one, two = (sampler.sample_latents([each], sampler.run.sampler)[0] for each in (asked, other))
    assert np.allclose(one, two, atol=1e-5)


def test_no_strength_leaves_a_video_as_it_is_and_full_strength_forgets_it(sampler, rng):
    canvas = Known(rng.integers(0, 256, (9, 32, 32, 3), np.uint8), np.zeros((9, 32, 32), bool))
    asked = [
        request("a red circle", frames=9, known=dataclasses.replace(canvas, strength=strength))
        for strength in (0.0, 0.5, 1.0)
    ]
    clean = sampler.starts(asked)[0].clean_thwc
    made = sampler.sample_latents([*asked, request("a red circle", frames=9)], sampler.run.sampler)
    off = [float(np.abs(latent - clean).mean()) for latent in made]
    assert off[0] == 0 and 0 < off[1] < off[2] and np.allclose(made[2], made[3], atol=1e-5)


def test_guidance_on_what_is_known_changes_nothing_where_nothing_is(sampler, rng):
    plain = sampler.run.sampler
    insisting = dataclasses.replace(plain, known_guidance=3.0)
    free, asked = request("a red circle", frames=9), prompted("image", rng)
    without, with_it = (sampler.sample_latents([free, asked], settings) for settings in (plain, insisting))
    assert np.allclose(without[0], with_it[0], atol=1e-4)
    assert not np.allclose(without[1], with_it[1], atol=1e-2)


def test_each_request_insists_as_much_as_it_says_in_one_program(sampler, rng):
    settings = sampler.run.sampler
    one = prompted("image", rng)
    asked = [dataclasses.replace(one, known_guidance=most) for most in (None, 1.0, 3.0, 5.0)]
    together = sampler.sample_latents(asked, settings)
    programs = sampler._denoise._cache_size()
    assert np.allclose(together[0], together[1], atol=1e-5)
    for each, most in zip(together[2:], (3.0, 5.0), strict=True):
        assert not np.allclose(each, together[0], atol=1e-2)
        alike = dataclasses.replace(settings, known_guidance=most)
        assert np.allclose(sampler.sample_latents([one] * 4, alike)[0], each, atol=1e-4)
    # A most is for what the settings say, not for what the request says, and it makes no setting larger.
    at_most = [dataclasses.replace(one, most_known_guidance=3.0, known_guidance=said) for said in (None, 5.0)]
    alike = dataclasses.replace(settings, known_guidance=5.0)
    for each, same in zip(sampler.sample_latents(at_most * 2, alike)[:2], together[2:], strict=True):
        assert np.allclose(each, same, atol=1e-4)
    # Other files of requests of these sizes, however much they insist, are the same program.
    assert sampler._denoise._cache_size() == programs
    # None of these insists, which is a program of its own, whether an earlier test has asked for it or not.
    assert np.allclose(sampler.sample_latents(at_most[:1] * 4, settings)[0], together[0], atol=1e-5)


def test_what_has_nothing_given_does_not_pay_for_insisting_on_it(sampler, rng, monkeypatch):
    from sora_jax.generate.requests import Order

    branches = []
    denoise = sampler._denoise
    monkeypatch.setattr(
        sampler,
        "_denoise",
        lambda *rest, settings: (branches.append(settings.branches), denoise(*rest, settings=settings))[1],
    )
    insisting = dataclasses.replace(sampler.run.sampler, guidance=4.0, known_guidance=3.0)
    free, image = request("a red circle", frames=9), prompted("image", rng)
    sampler.sample([free], insisting)
    sampler.generate([Order(prompt="a red circle", frames=5)], insisting)
    assert branches == [2, 2]
    sampler.sample([image], insisting)
    sampler.sample([dataclasses.replace(image, known_guidance=1.0)], insisting)
    assert branches[2:] == [3, 2]
    # Windows that go on from what the one before made do not insist on it; those of a loop, which meet their start, do.
    sampler.generate([Order(prompt="a red circle", frames=9, window=5)], insisting)
    assert set(branches[4:]) == {2}
    del branches[:]
    sampler.generate([Order(prompt="a red circle", frames=8, window=9, loop=True)], insisting)
    assert set(branches) == {3}


def test_an_order_insists_as_it_says_alone_and_in_company(sampler, tmp_path):
    """On what was made before, of an edit in windows, of which no frame is given."""
    from sora_jax.generate import files
    from sora_jax.generate.requests import Order

    rng = np.random.default_rng(0)
    clip = str(tmp_path / "clip.mp4")
    files.write_video(Path(clip), rng.integers(0, 256, (13, 32, 32, 3), np.uint8), sampler.usual_size.fps)
    edit = Order(prompt="a", edit=clip, height=32, width=32, window=9, known_guidance=8.0)
    image = Order(prompt="a", extend=clip, height=32, width=32, frames=4, window=9, known_guidance=3.0)
    plain, alone, together = (
        sampler.generate(orders)[0]
        for orders in ([dataclasses.replace(edit, known_guidance=1.0)], [edit], [edit, image])
    )
    apart = np.abs(alone.astype(int) - together)
    assert apart.max() <= 1 and np.abs(alone.astype(int) - plain).max() > 8


def test_a_wrong_order_of_several_is_named(sampler):
    from sora_jax.generate.requests import Order, RequestError

    good, wrong = Order(prompt="a red circle", frames=5), Order(prompt="a blue star", frames=6)
    with pytest.raises(RequestError, match=r"^in the order .*blue star.*: 6 frames are not"):
        sampler.prepare([good, wrong])
    with pytest.raises(RequestError, match=r"^6 frames are not"):
        sampler.prepare([wrong, dataclasses.replace(wrong, seed=1)])


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (dict(width=64, left=16, right=16), (32, 64)),
        (dict(height=64, top=8, bottom=24), (64, 32)),
        (dict(width=64, left=16, top=8), (56, 64)),
        (dict(left=16, right=16), (32, 64)),
    ],
)
def test_one_side_of_what_is_painted_around_says_the_other(sampler, tmp_path, given, size):
    """The file keeps its shape within the borders, and all of it is there."""
    from sora_jax.generate import files
    from sora_jax.generate.requests import Order

    files.write_video(tmp_path / "clip.mp4", np.full((5, 32, 32, 3), 90, np.uint8), sampler.usual_size.fps)
    (job,) = sampler.prepare([Order(prompt="a", outpaint=str(tmp_path / "clip.mp4"), **given)])
    assert (job.size.height, job.size.width) == size
    assert not any("cut off" in line for line in job.told)


def test_a_request_file_of_many_sizes_and_ways_is_one_program(sampler, tmp_path):
    from sora_jax.generate import files
    from sora_jax.generate.requests import Order

    path = str(tmp_path / "clip.mp4")
    files.write_video(tmp_path / "clip.mp4", np.full((5, 32, 32, 3), 90, np.uint8), sampler.usual_size.fps)
    orders = [
        Order(prompt="a", frames=1),
        Order(prompt="a red circle", height=48, width=32, frames=9, draft=0.5),
        Order(prompt="a", extend=path, frames=4),
        Order(prompt="a", frames=17, window=9),
        Order(prompt="a", frames=8, window=9, loop=True),
        Order(prompt="a blue star", edit=path),
    ]
    before = sampler._denoise._cache_size()
    videos = sampler.generate(orders)
    assert [len(video) for video in videos] == [1, 9, 9, 17, 8, 5] and videos[1].shape == (9, 48, 32, 3)
    assert sampler._denoise._cache_size() - before <= 1
    # As alone, to the last level: windows hand each other frames in whole levels, where a difference of rounding may be one.
    for number in (3, 4):
        (alone,) = sampler.generate([orders[number]])
        assert np.abs(alone.astype(int) - videos[number]).max() <= 1 and np.abs(np.diff(alone, axis=0)).max() > 0


def test_videos_are_handed_on_before_all_are_made(sampler, monkeypatch):
    """A few batches at a time, whatever way each is made, and as they are when all are made together."""
    from sora_jax.generate.requests import Order

    orders = [Order(prompt="a", frames=17 if number == 1 else 5, window=9, seed=number) for number in range(7)]
    jobs, settings = sampler.prepare(orders), sampler.run.sampler
    together = sampler.make(jobs, settings)
    rounds, sample = [], sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda requests, *rest: (rounds.append(len(requests)), sample(requests, *rest))[1]
    )
    monkeypatch.setattr(pipeline, "packing_for", lambda *_: pack.PackConfig(2, 64, 8, 64, window=8))
    monkeypatch.setattr(pipeline, "TOGETHER", 1)
    made = {}
    for number, (frames, _) in sampler.making(jobs, settings):
        made[number] = frames
        # No more than what has been handed on, and its own group, has been begun.
        assert sum(rounds) <= len(made) + 4
    assert len(rounds) >= 3 and sorted(made) == list(range(7))
    for number, video in enumerate(together):
        assert np.abs(made[number].astype(int) - video).max() <= 1


def test_a_longer_video_needs_no_more_memory_than_its_windows(sampler, monkeypatch):
    from sora_jax.generate.requests import Order

    sizes = []

    def seen(of):
        def spy(*values, **settings):
            sizes.append(tuple(np.shape(leaf) for leaf in jax.tree.leaves(values)))
            return of(*values, **settings)

        return spy

    # All that is computed on the device goes through these.
    for holder, name in ((sampler, "_denoise"), (sampler.codec, "_encode_chunk"), (sampler.codec, "_decode_chunk")):
        monkeypatch.setattr(holder, name, seen(getattr(holder, name)))

    def needs(frames):
        del sizes[:]
        (video,) = sampler.generate([Order(prompt="a", frames=frames, window=9)])
        assert len(video) == frames
        return set(sizes)

    assert needs(33) == needs(65)


def test_orders_become_videos_and_their_samples_are_read_once(sampler, tmp_path, monkeypatch):
    from PIL import Image

    from sora_jax.generate import layouts
    from sora_jax.generate.requests import Order

    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "start.png")
    read = []
    prepare = layouts.prepare
    monkeypatch.setattr(layouts, "prepare", lambda order, *rest: (read.append(order), prepare(order, *rest))[1])
    orders = [Order(prompt="a", image=str(tmp_path / "start.png"), seed=4, samples=2), Order(prompt="a", frames=1)]
    videos = sampler.generate(orders)
    assert [video.shape for video in videos] == [(5, 32, 32, 3)] * 2 + [(1, 32, 32, 3)]  # as trained on, where not said
    assert len(read) == 2 and np.array_equal(videos[0][0], videos[1][0]) and not np.array_equal(videos[0], videos[1])
    again = sampler.generate([dataclasses.replace(orders[0], seed=5, samples=1)])
    assert np.abs(again[0].astype(int) - videos[1]).max() <= 1


def test_a_file_is_taken_at_the_shape_of_training_that_is_nearest_to_its_own(sampler, tmp_path, monkeypatch):
    from sora_jax.generate import files
    from sora_jax.generate.requests import Order

    world = dataclasses.replace(sampler.run.data.world, frame_sizes=((32, 32), (48, 32), (32, 48)))
    run = dataclasses.replace(sampler.run, data=dataclasses.replace(sampler.run.data, world=world))
    monkeypatch.setattr(sampler, "run", run)
    path = str(tmp_path / "tall.mp4")
    files.write_video(tmp_path / "tall.mp4", np.zeros((5, 96, 64, 3), np.uint8), 8)  # 48x32, enlarged
    orders = [
        Order(extend=path),
        Order(outpaint=path, left=8, top=16),
        Order(extend=path, width=48),  # the height by the file's shape
        Order(extend=path, height=32),
        Order(prompt="a", loop=True, window=9),
    ]
    sizes = [(job.size.height, job.size.width) for job in sampler.prepare(orders)]
    assert sizes == [(48, 32), (64, 40), (72, 48), (32, 24), (32, 32)]
    assert not any("cut off" in line for line in sampler.prepare(orders[:2])[0].told)


def test_a_row_has_room_for_some_of_the_smallest_not_for_all():
    few = pipeline.packing_for([2000, 1], 10)
    assert few.row_slots == 4 and few.row_text < 200
    many = pipeline.packing_for([2000] + [1] * 500, 10)
    assert many.row_slots == 2 * pipeline.MOST_SHARE and many.row_tokens >= 2000


def test_a_video_that_goes_on_is_guided_less_and_others_are_not(sampler, rng):
    asked = [prompted("image", rng), prompted("end", rng), request("a red circle", frames=9)]

    def made(**changes):
        return sampler.sample_latents(asked, dataclasses.replace(sampler.run.sampler, **changes))

    much, little, mixed = (
        made(guidance=guidance, guidance_going_on=most) for guidance, most in [(5.0, 9.0), (1.5, 9.0), (5.0, 1.5)]
    )
    image, end, text = (
        [np.allclose(one, other, atol=1e-4) for other in (much, little)]
        for one, much, little in zip(mixed, much, little, strict=True)
    )
    assert image == text == [True, False] and end == [False, True]


def test_guidance_outside_of_its_interval_and_full_rescaling(sampler):
    asked = [request("a red circle", frames=9)]

    def made(**changes):
        return sampler.sample_latents(asked, dataclasses.replace(sampler.run.sampler, **changes))[0]

    assert np.allclose(
        made(guidance_interval=(0.0, 0.0), method="euler"), made(guidance=1.0, method="euler"), atol=1e-5
    )
    assert not np.allclose(made(), made(guidance_rescale=1.0), atol=1e-3)


def test_requests_of_all_kinds_in_one_batch_are_as_alone(sampler, rng):
    settings = dataclasses.replace(sampler.run.sampler, guidance_rescale=0.5, known_guidance=2.0, base_tokens=32)
    settings = dataclasses.replace(settings, restart=0.5)
    asked = [prompted(where, rng) for where in GIVEN] + [request("a blue star", seed=1, frames=1)]
    together = sampler.sample_latents(asked, settings)
    for each, found in zip(asked, together, strict=True):
        alone = sampler.sample_latents([each], settings)[0]
        assert np.allclose(alone, found, atol=1e-4)
        one, other = decoding.pixels(sampler.codec, [alone, found])
        assert np.abs(one - other).max() <= 1e-4


def test_steps_taken_once_more_make_all_but_what_is_given_anew(sampler, rng):
    asked = prompted("box", rng)
    once, again, anew = (
        sampler.sample_latents([asked], dataclasses.replace(sampler.run.sampler, restart=restart))[0]
        for restart in (0.0, 0.5, 0.99)
    )
    known = sampler.starts([asked])[0].known_N.reshape(3, 4, 4)
    assert np.array_equal(once[known], again[known])
    assert np.abs(once[~known] - again[~known]).max() > 0.1
    # All steps once more are another sample: the noise is another.
    assert np.abs(once[~known] - anew[~known]).max() > 0.1
    # What is made of a prompt alone, or of a video with noise on it, has nothing given to meet: in company, too.
    noisy = dataclasses.replace(asked.known, given_THW=np.zeros_like(asked.known.given_THW), strength=0.5)
    others = [dataclasses.replace(asked, known=None), dataclasses.replace(asked, known=noisy)]
    made, made_again = (
        sampler.sample_latents([*others, asked], dataclasses.replace(sampler.run.sampler, restart=restart))
        for restart in (0.0, 0.5)
    )
    same = [np.allclose(one, other, atol=1e-5) for one, other in zip(made, made_again, strict=True)]
    assert same == [True, True, False]
    # Of a video that is given and keeps its noise down, the second start has no more noise than the first.
    whole = Known(asked.known.frames_THWC, np.zeros_like(asked.known.given_THW), 0.0)
    canvas = dataclasses.replace(asked, known=whole)
    kept = sampler.sample_latents([canvas], dataclasses.replace(sampler.run.sampler, restart=0.5))[0]
    assert np.allclose(kept, sampler.starts([canvas])[0].clean_thwc, atol=1e-5)


def test_sizes_that_cannot_be_made_are_told(sampler):
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        sampler.sample([request("a red circle", frames=6)], sampler.run.sampler)


def test_what_is_larger_than_all_of_training_lies_within_what_training_reached(sampler):
    wide = pipeline.Request("x", 32, 48, 9, 8.0, 1)  # trained on 32x32
    sampler.text.prepare(["x"])
    usual, larger = (
        sampler._tokens(0, each, sampler.starts([each])[0], each.prompt) for each in (request("x", frames=9), wide)
    )
    assert larger.extent_3.tolist() == usual.extent_3.tolist() == [1.0, 32.0, 32.0]
    across = {tuple(row) for row in np.unique(larger.position_N3[:, 1:], axis=0).tolist()}
    assert sorted({x for _, x in across}) == pytest.approx([32 * (n + 0.5) / 6 for n in range(6)])
    assert {y for y, _ in across} == set(usual.position_N3[:, 1].tolist())
    assert set(larger.position_N3[:, 0].tolist()) == set(usual.position_N3[:, 0].tolist())

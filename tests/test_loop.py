"""Laws of training: resume = uninterrupted to the bit, NaN never reaches parameters, losses fall, what is written is true."""

import dataclasses
import json
import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sora_jax import checkpoint, compute, config, sharding
from sora_jax.data import loader, masks
from sora_jax.data.worlds import clips
from sora_jax.diffusion import flow
from sora_jax.generate import pipeline
from sora_jax.generate.codec import Codec
from sora_jax.structs import Share, TrainState
from sora_jax.train import dit, encode, guard, loop, optimizer, progress, vae


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vae")
    return workdir, loop.fit(vae.VAETask(tiny.vae_run(save_every=2)), workdir)


@pytest.fixture(scope="module")
def trained_dit(trained_vae, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dit")
    return workdir, loop.fit(dit.DiTTask(tiny.dit_run(trained_vae[0], save_every=2), workdir), workdir)


def stop_after(monkeypatch, steps):
    """Break the run right after the save of step `steps`."""
    save = loop._save

    def save_then_stop(task, workdir, state, *rest):
        save(task, workdir, state, *rest)
        if int(state.step) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)


def test_resumed_equals_uninterrupted_vae(trained_vae, tmp_path, monkeypatch):
    task = vae.VAETask(tiny.vae_run(save_every=2))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(task, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2
    assert same(loop.fit(vae.VAETask(task.run), tmp_path), trained_vae[1])


def test_resumed_with_loader_workers_equals_uninterrupted_without_dit(trained_dit, trained_vae, tmp_path, monkeypatch):
    run = tiny.dit_run(trained_vae[0], save_every=2)
    run = dataclasses.replace(run, loader=dataclasses.replace(run.loader, workers=1))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(dit.DiTTask(run, tmp_path), tmp_path)
    assert same(loop.fit(dit.DiTTask(run, tmp_path), tmp_path), trained_dit[1])


def test_the_lines_of_a_resumed_run_are_those_of_an_uninterrupted_one(trained_dit, trained_vae, tmp_path, monkeypatch):
    """Also where it stopped between two of them: what was counted since the last one is in the checkpoint."""
    task = dit.DiTTask(tiny.dit_run(trained_vae[0], save_every=1, log_every=3), trained_dit[0])
    loop.fit(task, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(task, tmp_path / "stopped")
    loop.fit(task, tmp_path / "stopped")
    same = (
        "step",
        "loss",
        "grad_norm",
        "weight",
        "steps",
        "bad_steps",
        "spike_steps",
        "skipped_in_a_row",
        "total_flops",
    )
    whole, stopped = (
        [
            {name: value for name, value in line.items() if name in same or name.startswith("packing/")}
            for line in progress.read_metrics(tmp_path / name, "train")
        ]
        for name in ("whole", "stopped")
    )
    assert [line["steps"] for line in whole] == [3, 1] and whole[0]["packing/tokens"] > 0
    assert stopped == whole and set(same) <= set(whole[0])


@pytest.mark.parametrize(
    "state", [{}, {"steps": 3, "host": {}, "seconds": 0}, {"steps": [{}], "host": {}, "seconds": 0}, []]
)
def test_metrics_that_are_none_are_refused(state):
    with pytest.raises((LookupError, TypeError, ValueError)):
        progress.Window(1.0, 1.0).restore(state)


def test_a_finished_run_is_left_alone_and_its_state_is_not_made_anew(trained_vae, monkeypatch):
    workdir, state = trained_vae
    monkeypatch.delattr(loop, "new_state")
    before = (workdir / "metrics.jsonl").read_text()
    assert same(loop.fit(vae.VAETask(tiny.vae_run(save_every=2)), workdir), state)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_run_traces_its_first_state_once(tmp_path, monkeypatch):
    keys, init = [], vae.VAETask.init
    monkeypatch.setattr(vae.VAETask, "init", lambda task, key: keys.append(key) or init(task, key))
    loop.fit(vae.VAETask(tiny.vae_run(steps=1)), tmp_path)
    # At its end a VAE asks for the statistics that it began with, outside of a trace.
    assert [isinstance(key, jax.core.Tracer) for key in keys] == [True, False]


def test_a_checkpoint_from_before_there_was_a_guard_is_resumed_with_a_fresh_one(trained_vae, tmp_path):
    workdir, state = trained_vae
    items = {name: item for name, item in state._asdict().items() if name not in ("step", "guard")}
    checkpoint.save(tmp_path, int(state.step), items, checkpoint.read_meta(workdir), keep=1)
    resumed = loop.fit(vae.VAETask(tiny.vae_run(save_every=2)), tmp_path)
    assert same(resumed, state._replace(guard=guard.fresh())) and not same(resumed, state)


def test_another_config_is_refused(trained_vae):
    workdir, _ = trained_vae
    changed = dataclasses.replace(tiny.vae_run(save_every=2), seed=1)
    with pytest.raises(config.ConfigError, match="seed: 0 -> 1"):
        loop.fit(vae.VAETask(changed), workdir)


def test_steps_that_a_budget_overrules_are_told(trained_vae, tmp_path, caplog):
    run = tiny.dit_run(trained_vae[0])
    settings = dataclasses.replace(run.compute, budget=10 * compute.dit_step(dit.resolve(run).dit, run.pack).total)
    for steps, told in ((7, True), (1, False), (10, False)):
        caplog.clear()
        asked = dataclasses.replace(run, loop=dataclasses.replace(run.loop, steps=steps), compute=settings)
        assert dit.DiTTask(asked, tmp_path).run.loop.steps == 10
        assert ("compute.budget buys 10 steps, and loop.steps=7 counts for nothing" in caplog.text) == told


def test_a_model_that_does_not_divide_over_the_devices_is_told_before_clips_are_encoded(trained_vae, tmp_path):
    run = tiny.dit_run(trained_vae[0])
    six = dataclasses.replace(run.pack, rows=6)
    for changes, words in (
        ({"mesh": sharding.MeshConfig(1, 1, 8, 1)}, "heads do not divide over 8"),
        ({"mesh": sharding.MeshConfig(1, 8, 1, 1), "pack": six}, "6 rows do not divide over 8"),
    ):
        with pytest.raises(sharding.MeshError, match=words):
            loop.fit(dit.DiTTask(dataclasses.replace(run, **changes), tmp_path / "encoded"), tmp_path / "dit")
    short = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=24))
    with pytest.raises(config.ConfigError, match=r"longest clip has 32 tokens .* raise pack\.row_tokens \(24\)"):
        dit.DiTTask(short, tmp_path / "encoded")
    with pytest.raises(ValueError, match=r"pack\.rows 8 must be a multiple of loader\.lanes 3"):
        dataclasses.replace(run, loader=dataclasses.replace(run.loader, lanes=3))
    assert not (tmp_path / "encoded").exists()


def test_how_a_step_is_computed_is_no_part_of_a_run(trained_dit, trained_vae):
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0], save_every=2)
    other = dataclasses.replace(run, dit=dataclasses.replace(run.dit, remat="attention", attention="reference"))
    assert same(loop.fit(dit.DiTTask(other, workdir), workdir), state)


def test_where_the_vae_lies_is_no_part_of_a_run_but_which_it_is(trained_dit, trained_vae, tmp_path):
    workdir, state = trained_dit
    shutil.copytree(trained_vae[0], tmp_path / "moved")
    moved = dit.DiTTask(tiny.dit_run(tmp_path / "moved", save_every=2), workdir)
    assert same(loop.fit(moved, workdir), state)
    loop.fit(vae.VAETask(dataclasses.replace(tiny.vae_run(save_every=2), seed=1)), tmp_path / "other")
    other = dit.DiTTask(tiny.dit_run(tmp_path / "other", save_every=2), workdir)
    with pytest.raises(config.ConfigError, match=r"another config \(vae_weights: .* undo the change"):
        loop.fit(other, workdir)


def test_what_a_run_leaves(trained_dit, trained_vae):
    workdir, _ = trained_dit
    assert config.from_config_dict(json.loads((workdir / "config.json").read_text())) == config.from_config_dict(
        checkpoint.read_meta(workdir)["config"]
    )
    train = [line for line in tiny.lines(workdir) if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4]
    for line in train:
        assert line["packing/clips"] > 0 and 0 < line["packing/fill"] <= 1 and line["packing/too_long_clips"] == 0
        assert math.isfinite(line["loss"]) and line["total_flops"] > 0
    meta = checkpoint.read_meta(workdir)
    assert train[1]["total_flops"] == meta["total_flops"]
    steps = 4 * compute.dit_step(pipeline.load_run(workdir).dit, pipeline.load_run(workdir).pack).total
    before = checkpoint.read_meta(trained_vae[0])["total_flops"] + meta["encoding_flops"]
    assert meta["flops_before"] == before and meta["encoding_flops"] > 0
    assert meta["total_flops"] == pytest.approx(before + steps)
    assert "val_loss" in [line for line in tiny.lines(workdir) if line["kind"] == "eval"][-1]
    assert (workdir / "samples" / "step_0000004.png").stat().st_size > 100
    assert list((workdir / "tensorboard").iterdir())


def test_clips_are_encoded_in_parts_and_not_again_after_a_stop(trained_dit, trained_vae, tmp_path, monkeypatch):
    task = dit.DiTTask(tiny.dit_run(trained_vae[0]), trained_dit[0])
    codec = Codec(task.vae_config, task.vae_params, task.vae_rest)
    monkeypatch.setattr(encode, "PART_CLIPS", 5)
    asked = []

    def clips_of(world, split, span):
        if span.start == 15 and 15 not in asked:
            asked.append(15)
            raise KeyboardInterrupt
        asked.append(span.start)
        return clips.clips(world, split, span)

    monkeypatch.setattr(encode, "clips", types.SimpleNamespace(clips=clips_of))
    with pytest.raises(KeyboardInterrupt):
        encode.encode_split(tmp_path, task.run.data, "train", codec, "a VAE")
    found = encode.encode_split(tmp_path, task.run.data, "train", codec, "a VAE")
    assert asked == [0, 5, 10, 15, 15, 20]
    assert [path.name for path in tmp_path.iterdir()] == [found.folder.name]
    for number, latent in enumerate(task.stores["train"][n] for n in range(24)):
        assert np.allclose(found[number].mean_thwc, latent.mean_thwc, atol=1e-2) and found[number].id == latent.id
        assert found[number].captions == latent.captions


def test_clips_are_encoded_on_all_devices_of_a_process(trained_dit, trained_vae, tmp_path, monkeypatch):
    task = dit.DiTTask(tiny.dit_run(trained_vae[0]), trained_dit[0])
    over, store = [], task.stores["train"]
    monkeypatch.setattr(encode, "encode_split", lambda *rest: (over.append(sharding.shards("rows")), store)[1])
    encode.encode_all(tmp_path, task.run.data, task.vae_config, task.vae_params, task.vae_rest)
    assert over == [jax.local_device_count()] * 2 and over[0] > 1


def test_clips_are_encoded_in_parts_by_any_number_of_processes(trained_dit, trained_vae, tmp_path, monkeypatch):
    task = dit.DiTTask(tiny.dit_run(trained_vae[0]), trained_dit[0])
    codec = Codec(task.vae_config, task.vae_params, task.vae_rest)
    monkeypatch.setattr(encode, "PART_CLIPS", 5)
    asked = []

    def clips_of(world, split, span):
        asked.append(span)
        return clips.clips(world, split, span)

    def by(process, of):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: of)
        monkeypatch.setattr(encode, "clips", types.SimpleNamespace(clips=clips_of))
        monkeypatch.setattr(encode.processes, "meet", lambda: None)
        asked.clear()
        return encode.encode_split(tmp_path, task.run.data, "train", codec, "a VAE")

    with pytest.raises(FileNotFoundError):  # the first alone cannot join what the second has not made
        by(0, of=2)
    assert [span.start for span in asked] == [0, 10, 20]
    found = by(1, of=2)
    assert [span.start for span in asked] == [5, 15]
    assert [path.name for path in tmp_path.iterdir()] == [found.folder.name]
    for number, latent in enumerate(task.stores["train"][n] for n in range(24)):
        assert np.allclose(found[number].mean_thwc, latent.mean_thwc, atol=1e-2) and found[number].id == latent.id
        assert found[number].captions == latent.captions
    by(0, of=1)
    assert not asked


def test_parts_of_a_store_fit_into_memory():
    config = tiny.vae_run().data.world
    assert encode.part_spans(2500, config) == [range(1024), range(1024, 2048), range(2048, 2500)]
    large = dataclasses.replace(config, frame_sizes=((1024, 2048),), frame_counts=(65,))
    assert encode.part_spans(5, large) == [range(2), range(2, 4), range(4, 5)]


def test_latents_have_unit_variance(trained_vae):
    _, state = trained_vae
    task = vae.VAETask(tiny.vae_run())
    from sora_jax.data.worlds import clips
    from sora_jax.generate.codec import Codec

    some = [clip.frames_THWC for clip in clips.clips(task.run.data.world, "train", range(24))]
    encoded = Codec(task.run.vae, state.ema, state.rest).encode(some)
    values = np.concatenate([mean.reshape(-1, 8) for mean, _ in encoded])
    spread = np.concatenate([std.reshape(-1, 8) for _, std in encoded])
    assert np.allclose(values.mean(0), 0, atol=0.02)
    assert np.allclose(values.var(0) + (spread**2).mean(0), 1, atol=0.05)


def test_known_tokens_and_padding_have_no_loss(trained_dit, trained_vae):
    workdir, state = trained_dit
    task = dit.DiTTask(tiny.dit_run(trained_vae[0]), workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    in_use = batch.layout.slot_segment_BS > 0
    assert (batch.ceiling_BS[in_use] == 0).any() and (batch.layout.segment_BN == 0).any()
    _, metrics = task.loss(state.params, state.rest, batch, jax.random.key(0))
    known = np.take_along_axis(batch.ceiling_BS == 0, batch.layout.slot_BN, 1) & (batch.layout.segment_BN > 0)
    assert metrics["weight"] == (batch.layout.segment_BN > 0).sum() - known.sum()


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_evaluated_is_what_a_model_makes(trained_dit, trained_vae, monkeypatch, alone):
    """Whole clips from nothing, whatever it was given in training; only a model of the next frame alone has those before it."""
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0])
    known = masks.KnownConfig(next_frame=1.0) if alone else masks.KnownConfig(first_frames=0.5)
    task = dit.DiTTask(dataclasses.replace(run, loader=dataclasses.replace(run.loader, known=known)), workdir)
    seen = []

    def fixed(*arguments, batches=loader.fixed_batches):
        for batch, count in batches(*arguments):
            seen.append((batch.ceiling_BS == 0) & (batch.layout.slot_segment_BS > 0))
            yield batch, count

    monkeypatch.setattr(loader, "fixed_batches", fixed)
    assert task.evaluate(state)["val_loss"] > 0
    assert np.any(seen) == alone


def test_noise_on_what_is_known_reaches_nothing_else(trained_dit, trained_vae, monkeypatch):
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0])
    task = dit.DiTTask(dataclasses.replace(run, flow=dataclasses.replace(run.flow, known_noise=0.0)), workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    seen = {}
    for most in (0.0, 0.2):
        noisy = dataclasses.replace(task.run, flow=dataclasses.replace(run.flow, known_noise=most))

        def model(noisy_BNP, time_BS, layout, most=most):
            seen[most] = np.asarray(noisy_BNP), np.asarray(time_BS)
            return jnp.zeros_like(noisy_BNP)

        with monkeypatch.context() as patch:
            patch.setattr(dit.nnx, "merge", lambda graphdef, params, model=model: model)
            dit.Objective(noisy)(state.params, state.rest, batch, jax.random.key(0))
    (clean_BNP, time_BS), (noised_BNP, told_BS) = seen[0.0], seen[0.2]
    assert np.array_equal(time_BS, told_BS)
    known_BN = np.take_along_axis(batch.ceiling_BS == 0, batch.layout.slot_BN, 1) & (batch.layout.segment_BN > 0)
    made_BN = ~known_BN & (batch.layout.segment_BN > 0)
    assert known_BN.any() and np.array_equal(clean_BNP[made_BN], noised_BNP[made_BN])
    levels = {}
    for row, column in np.argwhere(known_BN):
        clip = int(batch.clip_BS[row, batch.layout.slot_BN[row, column]])
        levels.setdefault(clip, []).append((noised_BNP - clean_BNP)[row, column])
    levels = np.array([np.std(each) for each in levels.values()])
    assert levels.max() < 0.3 and levels.max() > 2 * levels.min() > 0  # uniform to 0.2, one for each clip


def test_clips_are_the_posteriors_means_with_a_share_of_its_deviation(trained_dit, trained_vae, monkeypatch):
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0])
    task = dit.DiTTask(run, workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    monkeypatch.setattr(dit.nnx, "merge", lambda graphdef, params: lambda noisy_BNP, *_: noisy_BNP)

    def clean(share):
        config = dataclasses.replace(run.flow, posterior=share, known_noise=0.0)
        objective = dit.Objective(dataclasses.replace(task.run, flow=config))
        seen = []
        monkeypatch.setattr(flow, "velocity", lambda clean_BNP, noise_BNP: seen.append(clean_BNP) or clean_BNP)
        objective(state.params, state.rest, batch, jax.random.key(0))
        return np.asarray(seen[0])

    means, halves, samples = (clean(share) - batch.mean_BNP for share in (0.0, 0.5, 1.0))
    assert not means.any() and np.allclose(2 * halves, samples, atol=1e-5)
    inside = np.asarray(batch.layout.segment_BN > 0)
    assert np.std(samples[inside] / batch.std_BNP[inside]) == pytest.approx(1, abs=0.1)


def test_models_of_all_sizes_are_asked_the_same(trained_dit, trained_vae, monkeypatch):
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0])
    larger = dataclasses.replace(run, dit=dataclasses.replace(run.dit, width=64, heads=4, blocks=3))
    seen = []

    def model(noisy_BNP, time_BS, layout):
        seen.append((noisy_BNP, time_BS, layout))
        return jnp.zeros_like(noisy_BNP)

    monkeypatch.setattr(dit.nnx, "merge", lambda graphdef, params: model)
    for each in (run, larger):
        task = dit.DiTTask(each, workdir)
        batches = task.batches(Share.whole(task.rows))
        for _ in range(2):
            task.loss(None, state.rest, jax.tree.map(jnp.asarray, next(batches)[0]), jax.random.key(0))
    assert same(seen[:2], seen[2:]) and not same(seen[0], seen[1])


def test_who_knows_the_clip_errs_by_the_posteriors_noise_alone(trained_dit, trained_vae):
    workdir, _ = trained_dit
    run = tiny.dit_run(trained_vae[0])
    task = dit.DiTTask(run, workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    time_BS = jnp.full(batch.clip_BS.shape, 0.4)
    found = {}
    for share in (0.0, 1.0):
        objective = dit.Objective(dataclasses.replace(task.run, flow=dataclasses.replace(run.flow, posterior=share)))
        asked = objective.asked(batch, time_BS, jax.random.key(0))
        found[share] = {
            name: float(flow.loss(velocity_BNP, asked.target_BNP, asked.weight_BN)[0])
            for name, velocity_BNP in objective.bounds(batch, asked).items()
        }
    assert found[0.0]["floor"] < 1e-9 < 1e-4 < found[1.0]["floor"] < found[1.0]["ceiling"]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_an_error_counts_by_the_deviation_along_its_axis(trained_dit, trained_vae, monkeypatch, power):
    workdir, state = trained_dit
    run = tiny.dit_run(trained_vae[0])
    task = dit.DiTTask(dataclasses.replace(run, flow=dataclasses.replace(run.flow, emphasis=power)), workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    monkeypatch.setattr(flow, "velocity", lambda clean_BNP, noise_BNP: jnp.zeros_like(clean_BNP))
    std_C = np.asarray(state.rest["vae"]["rest"]["latent_std"])
    assert std_C.max() > 1.1 * std_C.min()
    counts = []
    for channel in range(len(std_C)):
        error_C = 3.0 * jax.nn.one_hot(channel, len(std_C))

        def model(noisy_BNP, time_BS, layout, error_C=error_C):
            return jnp.broadcast_to(error_C, noisy_BNP.shape)

        with monkeypatch.context() as patch:
            patch.setattr(dit.nnx, "merge", lambda graphdef, params, model=model: model)
            counts.append(task.loss(state.params, state.rest, batch, jax.random.key(0))[0])
    expected_C = std_C**power / np.mean(std_C**power)
    assert np.allclose(counts, 9 * expected_C / len(std_C), rtol=1e-4)


def test_the_loss_of_a_clip_does_not_depend_on_its_neighbours(trained_dit, trained_vae):
    workdir, state = trained_dit
    task = dit.DiTTask(tiny.dit_run(trained_vae[0]), workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    batch = jax.tree.map(jnp.asarray, batch)
    whole, metrics = task.loss(state.params, state.rest, batch, jax.random.key(0))
    parts = []
    for row in range(len(batch.mean_BNP)):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        loss, counted = task.loss(state.params, state.rest, alone, jax.random.key(1))
        parts.append((float(loss), float(counted["weight"])))
    assert float(whole) == pytest.approx(sum(a * b for a, b in parts) / float(metrics["weight"]), rel=1e-5)


@pytest.fixture
def toy_step():
    tx = optimizer.make(
        config.OptimizerConfig(
            "adamw", rate=0.1, adam_rate=0.1, warmup_steps=0, decay="constant", weight_decay=0.0, clip_norm=1.0
        ),
        100,
    )
    params = {"w": jnp.ones(3)}

    def loss(params, rest, batch, key):
        return jnp.sum(jnp.square(params["w"] - batch)), {}

    state = TrainState(jnp.int32(0), params, params, {}, tx.init(params), guard.fresh())
    return jax.jit(loop.make_step(loss, tx, 0.9, 0, 10.0)), state


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_bad_steps_change_nothing(toy_step, poison):
    step, state = toy_step
    state, _ = step(state, jnp.zeros(3))
    after, metrics = step(state, jnp.array([0.0, poison, 0.0]))
    assert metrics["bad"] == 1 and metrics["skipped"] == 1 and after.step == state.step + 1
    assert same(after._replace(step=0, guard=0), state._replace(step=0, guard=0))
    recovered, metrics = step(after, jnp.zeros(3))
    assert metrics["bad"] == 0 and not same(recovered.params, after.params)


def test_the_average_follows_the_parameters(toy_step):
    step, state = toy_step
    for _ in range(60):
        state, metrics = step(state, jnp.zeros(3))
    assert metrics["loss"] < 0.1
    assert np.all(np.abs(state.ema["w"]) < 0.5) and not np.array_equal(state.ema["w"], state.params["w"])


def test_a_run_whose_last_judging_fails_is_kept_and_judged_when_it_comes_back(tmp_path, monkeypatch):
    run = tiny.vae_run(steps=2, save_every=0, sample_every=0)

    def sample(task, state, path):
        raise ValueError("no such font")

    with monkeypatch.context() as patch:
        patch.setattr(vae.VAETask, "sample", sample)
        with pytest.raises(ValueError, match="no such font"):
            loop.fit(vae.VAETask(run), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2 and not list(tmp_path.glob("samples/*.png"))
    loop.fit(vae.VAETask(run), tmp_path)
    assert list(tmp_path.glob("samples/*.png")) and len(progress.read_metrics(tmp_path, "eval")) == 1


def test_a_run_that_stays_bad_stops(tmp_path, monkeypatch):
    task = vae.VAETask(tiny.vae_run(steps=6, log_every=1, max_bad_steps=2))
    monkeypatch.setattr(task, "loss", lambda *_: (jnp.float32(jnp.nan), {}))
    with pytest.raises(loop.DivergedError, match="2 steps in a row"):
        loop.fit(task, tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


def test_a_bad_row_is_noticed_though_it_ended_before_the_line_was_due(tmp_path, monkeypatch):
    with pytest.raises(loop.DivergedError, match="2 steps in a row"):
        poisoned_run(monkeypatch, tmp_path, zero=(3, 4), log_every=6)
    poisoned_run(monkeypatch, tmp_path / "single", zero=(3, 5), log_every=6)


class Poisoned:
    """Batches of which some, counted from one, are made zero, for which `poisoned_loss` is NaN, or left out."""

    def __init__(self, source, zero=(), out=()):
        self.source, self.zero, self.out, self.drawn = source, zero, out, 0

    def __next__(self):
        self.drawn += 1
        batch, counts = next(self.source)
        if self.drawn in self.out:
            return next(self)
        return batch * (self.drawn not in self.zero), counts

    def get_state(self):
        return self.source.get_state()

    def set_state(self, state):
        self.source.set_state(state)


def poisoned_run(monkeypatch, workdir, zero=(), out=(), **of_loop):
    usual = {"steps": 6, "log_every": 1, "save_every": 1, "max_bad_steps": 2, "keep": 2}
    task = vae.VAETask(tiny.vae_run(**usual | of_loop))
    batches, loss = task.batches, task.loss

    def poisoned_loss(params, rest, batch, key):
        value, metrics = loss(params, rest, batch, key)
        return jnp.where(batch.any(), value, jnp.nan), metrics

    monkeypatch.setattr(task, "loss", poisoned_loss)
    monkeypatch.setattr(task, "batches", lambda share: Poisoned(batches(share), zero, out))
    return loop.fit(task, workdir)


def test_a_run_goes_back_and_on_with_other_data(tmp_path, monkeypatch):
    went_back = poisoned_run(monkeypatch, tmp_path / "back", zero=(4, 5), rollbacks=1)
    without = poisoned_run(monkeypatch, tmp_path / "without", out=(4, 5))
    assert same(went_back, without)
    assert checkpoint.read_meta(tmp_path / "back")["rollbacks"] == 1
    steps = [(line["step"], line["bad_steps"]) for line in tiny.lines(tmp_path / "back") if line["kind"] == "train"]
    assert steps == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (4, 0), (5, 0), (6, 0)]


def test_a_run_goes_back_as_often_as_it_may(tmp_path, monkeypatch):
    with pytest.raises(loop.DivergedError, match="has gone back 1 times"):
        poisoned_run(monkeypatch, tmp_path, zero=(4, 5, 6, 7), rollbacks=1)
    # What is left is from before anything was skipped.
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_run_that_is_bad_from_the_start_has_nothing_to_go_back_to(tmp_path, monkeypatch):
    with pytest.raises(loop.DivergedError, match="no checkpoint is older"):
        poisoned_run(monkeypatch, tmp_path, zero=(1, 2), rollbacks=1)


def test_a_pipeline_is_loaded_from_what_was_trained(trained_dit):
    workdir, state = trained_dit
    loaded = pipeline.load(workdir)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(state.ema), strict=True)
    )
    asked = [pipeline.Request("a red circle", 32, 32, 5, 8.0, 0)]
    assert loaded.sample(asked, loaded.run.sampler)[0].shape == (5, 32, 32, 3)


def test_a_vae_is_not_a_pipeline(trained_vae):
    with pytest.raises(config.ConfigError, match="give the work dir of a trained DiT"):
        pipeline.load(trained_vae[0])

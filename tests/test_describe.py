"""A trained captioner: what it says of a clip does not depend on the company, and is there again after loading."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny

from sora_jax import checkpoint, config, export, main, sharding
from sora_jax.data.worlds import clips
from sora_jax.generate import describe, files, media
from sora_jax.structs import Share
from sora_jax.text.tokenise import START, STOP, Vocabulary
from sora_jax.train import captioner, loop, vae


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("captioner")
    loop.fit(vae.VAETask(tiny.vae_run()), workdir / "vae")
    # A few steps teach no more than to say something, which is enough.
    state = loop.fit(
        captioner.CaptionerTask(tiny.captioner_run(workdir / "vae", steps=30), workdir / "on"), workdir / "on"
    )
    return workdir / "on", state


@pytest.fixture(scope="module")
def made(trained):
    return describe.load(trained[0])


@pytest.fixture(scope="module")
def videos(made):
    some = clips.clips(made.run.data.world, "train", range(12))
    return [clip.frames_THWC for clip in some]


def test_what_a_run_leaves(trained):
    workdir, _ = trained
    train = [line for line in tiny.lines(workdir) if line["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["packing/too_long_clips"] == 0
    last = [line for line in tiny.lines(workdir) if line["kind"] == "eval"][-1]
    assert {"val_loss", "captions/all", "captions/word_for_word", "captions/floor/all"} <= last.keys()
    assert list((workdir / "samples").glob("*.png"))


def test_captions_choose_their_attention_whatever_training_named(made, videos):
    model = dataclasses.replace(made.run.captioner, attention="splash")
    run = dataclasses.replace(made.run, captioner=model)
    named = describe.Describer(run, made.codec.config, made.params, made.codec._weights, made.vocabulary)
    assert named.describe(videos[:2], [5.0] * 2) == made.describe(videos[:2], [5.0] * 2)


def test_rows_divide_over_a_mesh(made):
    """However few videos there are, as in a run's own samples."""
    assert made._packing([10] * 3).rows < 8
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, sequence=2))):
        packing = made._packing([made.run.pack.row_tokens + 1] * 3)
    assert packing.rows % 4 == packing.row_tokens % 2 == 0


def test_captions_are_of_words_that_were_learned(made, videos):
    said = made.describe(videos, [5.0] * len(videos))
    words = set(made.vocabulary.pieces)
    assert len(said) == len(videos) and any(said)
    for text in said:
        ids = made.vocabulary.tokens([text])[0]
        assert ids[0] == START and set(ids[1:]) <= {STOP, *range(4, 4 + len(words))}


def test_what_is_said_of_a_clip_does_not_depend_on_its_company(made, videos):
    together = made.describe(videos, [5.0] * len(videos))
    assert [made.describe([video], [5.0])[0] for video in videos] == together
    assert made.describe(videos[::-1], [5.0] * len(videos)) == together[::-1]


def test_the_checkpoint_is_all_that_is_needed(trained, made, videos):
    workdir, state = trained
    task = captioner.CaptionerTask(tiny.captioner_run(workdir.parent / "vae", steps=30), workdir)
    weights = state.rest["vae"]
    now = describe.Describer(
        task.run, task.vae_config, state.ema, (weights["params"], weights["rest"]), task.vocabulary
    )
    assert now.describe(videos, [5.0] * len(videos)) == made.describe(videos, [5.0] * len(videos))


def test_training_shuffles_packs_and_hides_nothing(trained):
    workdir, _ = trained
    task = captioner.CaptionerTask(tiny.captioner_run(workdir.parent / "vae"), workdir)
    batch, _ = next(task.batches(Share.whole(task.rows)))
    layout = batch.layout
    assert (layout.segment_BN.max(axis=1) > 1).any()
    for row in range(task.rows):
        for segment in range(1, layout.segment_BN[row].max() + 1):
            ids = layout.text_token_BL[row][layout.text_segment_BL[row] == segment]
            assert ids[0] == START and ids[-1] == STOP
            assert task.vocabulary.text(ids.tolist()).startswith(("A ", "On "))


def test_files_are_read_as_training_clips_were(made, videos, tmp_path):
    video = next(each for each in videos if len(each) == 5)
    files.write_video(tmp_path / "a.gif", np.concatenate([video, video]), 5.0)
    read = made.read(tmp_path / "a.gif")
    assert read.frames_THWC.shape == (5, 32, 32, 3) and read.fps == 5.0
    files.write_image(tmp_path / "b.png", np.zeros((60, 90, 3), np.uint8))
    read = made.read(tmp_path / "b.png")
    assert read.frames_THWC.shape == (1, 32, 32, 3) and "60x90" in read.told[0]
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(media.MediaError, match=r"c\.mp4"):
        made.read(tmp_path / "c.mp4")


def test_a_dit_or_vae_is_no_captioner(trained):
    with pytest.raises(config.ConfigError, match="holds no captioner"):
        describe.load(trained[0].parent / "vae")


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (None, "lists no vocabulary"),
        (["a", 5], "lists no vocabulary"),
        (["a", "a"], "twice"),
        (["two words"], "is no word"),
        ([f"w{number}" for number in range(200)], r"captioner\.words is 128"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(trained, told, word):
    run = config.from_stored(checkpoint.read_meta(trained[0])["config"])
    with pytest.raises(config.ConfigError, match=word):
        describe.stored_vocabulary({"vocabulary": told}, run)


def test_a_vae_of_other_channels_is_told(trained):
    run = tiny.captioner_run(trained[0].parent / "vae")
    changed = config.to_dict(run)
    changed["captioner"]["channels"] = 4
    with pytest.raises(config.ConfigError, match=re.escape("captioner.channels is 4, but the VAE")):
        captioner.CaptionerTask(config.from_config_dict(json.loads(json.dumps(changed))), trained[0])


def test_captions_of_more_words_than_the_model_has_are_told(trained):
    changed = config.to_dict(tiny.captioner_run(trained[0].parent / "vae"))
    changed["captioner"]["words"] = 10
    task = captioner.CaptionerTask(config.from_config_dict(json.loads(json.dumps(changed))), trained[0])
    with pytest.raises(config.ConfigError, match="make it larger"):
        _ = task.vocabulary


def test_weights_are_on_one_device_after_loading(made):
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(made.params)} == {1}
    assert isinstance(made.vocabulary, Vocabulary)


def test_captions_of_files_are_printed_and_written(trained, videos, tmp_path, capsys):
    paths = [tmp_path / "a.png", tmp_path / "b.gif"]
    files.write_image(paths[0], next(each for each in videos if len(each) == 1)[0])
    files.write_video(paths[1], next(each for each in videos if len(each) == 5), 5.0)
    command = ["caption", *map(str, paths), f"--checkpoint={trained[0]}", f"--out={tmp_path / 'said.json'}"]
    assert main.run(command) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert capsys.readouterr().out.splitlines() == [f"{path}  {said[str(path)]}" for path in paths]
    (step,) = checkpoint.steps(trained[0])[-1:]
    assert main.run(["caption", str(paths[0]), f"--checkpoint={trained[0] / str(step)}"]) == 0
    assert capsys.readouterr().out == f"{paths[0]}  {said[str(paths[0])]}\n"
    assert main.run(["caption", "nothing.mp4", f"--checkpoint={trained[0]}"]) == 2
    assert "nothing.mp4" in capsys.readouterr().err
    assert main.run(["caption", str(paths[0]), f"--checkpoint={trained[0].parent / 'vae'}"]) == 2
    assert "holds no captioner" in capsys.readouterr().err


def test_what_was_exported_comes_back(trained, made, videos, tmp_path):
    export.export_weights(trained[0], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A video captioner of" in card and "sora-jax caption --checkpoint=runs/out clip.mp4" in card
    export.import_weights(tmp_path / "out", tmp_path / "back")
    assert describe.load(tmp_path / "back").describe(videos, [5.0] * len(videos)) == made.describe(
        videos, [5.0] * len(videos)
    )

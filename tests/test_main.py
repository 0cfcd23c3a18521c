"""Laws of the command: it refuses in one sentence, starts without jax, resumes, and does what its flags say."""

import argparse
import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import imageio.v3 as iio
import jax
import numpy as np
import prompting
import pytest
import quickstart

from sora_jax import checkpoint, config, main, processes, sharding
from sora_jax.cli import asked, checkpoints, configs, process, sample, vbench
from sora_jax.cli import flags as all_flags
from sora_jax.cli import train as cli_train
from sora_jax.cli import trained as by_path
from sora_jax.data import loader, masks
from sora_jax.evaluate import continuity
from sora_jax.generate import files, layouts, pipeline, requests
from sora_jax.plan import kernels
from sora_jax.study import runner
from sora_jax.train import lock, loop, vae

VERBS = ("train", "study", "plan", "sample", "evaluate", "inspect", "export", "import")

# Two files, as experiments has them, so that the import of the one beside it is part of every test.
PARTS = """
from ml_collections import ConfigDict

WORLD = dict(
    colours=("red", "blue"), shapes=("circle", "square"), sizes=("large",), motions=("left", "right"),
    backgrounds=("white",), frame_sizes=((32, 32),), frame_counts=(5,), frame_size_weights=(), frame_count_weights=(), fps=(8.0,),
    two_things_fraction=0.0, holdout_fraction=0.2, square=False, to_and_fro=0.0, seed=0,
)
DATA = dict(world=WORLD, train_clips=8, heldout_clips=2)
OPTIMIZER = dict(
    name="adamw", rate=1e-3, adam_rate=1e-3, warmup_steps=1, decay="constant", weight_decay=0.0, clip_norm=1.0
)
LOOP = dict(
    steps=2, log_every=1, save_every=0, evaluate_every=0, sample_every=0, keep=1, ema=0.9, max_bad_steps=5, max_failed_saves=0,
    spike_factor=0.0, rollbacks=0,
)
MESH = dict(data=0, fsdp=1, tensor=1, sequence=1)
TEXT = dict(vocab_size=64, width=16, layers=1, heads=2, mlp_width=16, max_tokens=16, dtype="float32")


def vae():
    return ConfigDict(dict(
        task="vae", seed=0, data=DATA, optimizer=OPTIMIZER, loop=LOOP, mesh=MESH,
        vae=dict(folds=((4, 8, 8),), widths=(8,), blocks=(1,), kernel=(2, 3, 3), encoder_frames=2, channels=4, remat=False),
        vae_train=dict(batch=2, crop=(5, 16, 16), reconstruction="l2", kl_weight=1e-4, half_size_weight=0.0),
    ))


KNOWN = dict.fromkeys(
    ("first_frame", "first_frames", "last_frames", "both_ends", "some_frames", "box", "less_noise", "next_frame"), 0.0
)


def dit():
    return ConfigDict(dict(
        task="dit", seed=0, data=DATA, optimizer=OPTIMIZER, loop=LOOP, mesh=MESH, vae_checkpoint="nowhere",
        compute=dict(budget=0.0, multiplier=1.0, along="steps", exponent=0.5),
        text=dict(encoder="scratch", max_tokens=16, scratch=TEXT),
        dit=dict(
            width=16, blocks=1, heads=1, patch=(1, 1, 1), channels=4, mlp_ratio=1, text_width=16, dtype="float32",
            wavelengths=((0.5, 8.0), (16.0, 128.0), (16.0, 128.0)), remat="none", predict="velocity", attention="auto", text=TEXT,
        ),
        pack=dict(rows=2, row_tokens=32, row_slots=8, row_text=64, window=8, drop_rate=0.0, drop_repeats=0.0),
        loader=dict(
            long_captions=0.2, caption_dropout=0.1, known=KNOWN, squeezed=0.0, workers=0, lanes=1, patience=1.0, skip_quota=0.0,
        ),
        flow=dict(mean=0.0, std=1.0, shift=1.0, known_noise=0.0, posterior=1.0, emphasis=0.0),
        sampler=dict(
            steps=2, method="euler", guidance=3.0, shift=1.0, base_tokens=0, guidance_interval=(0.0, 1.0),
            guidance_rescale=0.0, known_guidance=1.0, guidance_going_on=2.0, restart=0.0,
        ),
    ))
"""
# Of PARTS, as JSON.
SAMPLER = {
    "steps": 2, "method": "euler", "guidance": 3.0, "shift": 1.0, "base_tokens": 0, "guidance_interval": [0.0, 1.0],
    "guidance_rescale": 0.0, "known_guidance": 1.0, "guidance_going_on": 2.0, "restart": 0.0,
}  # fmt: skip
TINY = """
import parts
from ml_collections import ConfigDict


def get_config(arg=""):
    stages = {"vae": parts.vae(), "dit": parts.dit()}
    if arg:
        return stages[arg]
    stages["dit"].vae_checkpoint = "vae"
    return ConfigDict(dict(task="study", title="tiny", order=("vae", "dit"), stages=stages, groups={}, prompts=2,
                           shown=1, seed=0))
"""


@pytest.fixture
def tiny(tmp_path):
    """The path of a tiny experiment."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    (folder / "tiny.py").write_text(TINY)
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work dir of a tiny diffusion transformer with random weights, as step 3."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "parts.py").write_text(PARTS)
    (folder / "tiny.py").write_text(TINY)
    with mock.patch.dict(os.environ, SORA_JAX_CACHE=str(folder / "cache")):
        # As of training on TPUs: what samples its checkpoint must not need their kernel.
        run = configs.load_run(f"{folder / 'tiny.py'}:dit", ["--config.dit.attention=splash"])
        stage = configs.load_run(f"{folder / 'tiny.py'}:vae", [])
    # Of the right shapes is enough, and saves compiling their initialisation.
    shapes = jax.eval_shape(lambda: pipeline.initial_weights(run, stage.vae, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params, rest = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, leaf.dtype), shapes)
    meta = {"config": config.to_dict(run), "vae": config.to_dict(stage)["vae"], "total_flops": 5e12}
    checkpoint.save(folder / "dit", 3, {"params": params, "ema": params, "rest": rest}, meta, keep=1)
    return folder / "dit"


def refusal(capsys, *argv, code=2):
    """The one line on stderr with which the command refuses."""
    capsys.readouterr()
    assert main.run([str(argument) for argument in argv]) == code
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    verb = f" {argv[0]}" if argv and argv[0] in VERBS else ""
    assert line.startswith(f"sora-jax{verb}: error: ")
    return line


def in_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_tells_every_flag_and_its_default(verb, capsys):
    assert main.run([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "examples: sora-jax" in shown
    (verbs,) = [a for a in main.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for action in verbs.choices[verb]._actions:
        assert action.help, action.dest
        if action.dest != "help":
            assert "(required" in action.help or "(default" in action.help, action.dest
        assert all(flag in shown for flag in action.option_strings)


def test_help_lists_every_verb(capsys):
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {verb} " in shown for verb in VERBS)


def test_help_and_the_package_import_nothing_heavy():
    heavy = "{'jax', 'numpy', 'flax', 'orbax', 'grain', 'absl', 'ml_collections'} & set(sys.modules)"
    assert in_python(f"import sys, sora_jax; print({heavy})") == "set()\n"
    code = f"import sys\nfrom sora_jax import main\nmain.run(['sample', '--help'])\nmain.run(['x'])\nprint({heavy})"
    assert in_python(code).endswith("\nset()\n")


# Refusals ------------------------------------------------------------------------------------------------------------


def test_unknown_verbs_and_flags_are_refused(tiny, capsys):
    assert "VERB" in refusal(capsys)
    assert "trian" in refusal(capsys, "trian")
    assert "--lr" in refusal(capsys, "train", f"--config={tiny}:vae", "--workdir=x", "--lr=3")
    assert "did you mean --scale?" in refusal(
        capsys, "sample", "--checkpoint=x", "--prompt=x", "--out=x.png", "--scales=3"
    )
    # An abbreviation would be a second name that breaks when a flag is added.
    assert "--config" in refusal(capsys, "train", f"--conf={tiny}:vae", "--workdir=x")
    assert "--config.a=1" in refusal(capsys, "inspect", "x", "--config.a=1")
    assert "stray" in refusal(capsys, "train", f"--config={tiny}:vae", "--workdir=x", "--config.seed=1", "stray")
    # It would become a folder by the name of gs: beside the user.
    assert "'gs://bucket/x' is an address" in refusal(
        capsys, "train", f"--config={tiny}:vae", "--workdir=gs://bucket/x"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.loop.stepz=3", "config.loop has no key 'stepz'; did you mean steps?"),
        ("--config.nothing=3", "config has no key 'nothing'"),
        ("--config.loop.steps.more=3", "config.loop.steps has no keys of its own"),
        ("--config.loop=3", "config.loop is a group"),
        ("--config.loop.steps=abc", "must be of type int, such as the file's 2"),
        ("--config.loop.steps=1.5", "must be of type int"),
        ("--config.vae.remat=maybe", "must be of type bool"),
        ("--config.vae_train.crop=(5,", "must be of type tuple"),
        ("--config.vae_train.crop=(5,16)", "config.vae_train.crop is (5, 16); it must have 3 entries"),
        ("--config.vae_train.crop=(5,16,15)", "width of 8"),
        ("--config.loop.steps=0", "must be at least 1"),
        ("--config.loop.steps", "Missing value"),
        ("--config.mesh.data=3", "does not cover"),
    ],
)
def test_wrong_keys_and_values_are_refused(override, sentence, tiny, tmp_path, capsys):
    assert sentence in refusal(capsys, "train", f"--config={tiny}:vae", f"--workdir={tmp_path / 'run'}", override)
    assert not checkpoint.exists(tmp_path / "run")


def test_config_files_that_cannot_be_used_are_refused(tiny, tmp_path, capsys):
    def refuse(source, verb="train"):
        return refusal(capsys, verb, f"--config={source}", f"--workdir={tmp_path / 'run'}")

    assert "nowhere.py does not exist" in refuse(tmp_path / "nowhere.py")
    assert "no Python file" in refuse(tmp_path)
    assert "no variant 'vea'" in refuse(f"{tiny}:vea")
    assert "use sora-jax study" in refuse(tiny)
    assert "use sora-jax train" in refuse(f"{tiny}:vae", "study")
    broken = tiny.with_name("broken.py")
    for text, sentence in (
        ("x = \n", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import parts\nparts.nothing\n", "has no attribute 'nothing' (broken.py, line 2)"),
        ("import missing_part\n", "No module named 'missing_part' (broken.py, line 1)"),
        ("", "no attribute 'get_config'"),
        ("def get_config():\n    return None\n", "must return a ConfigDict, not NoneType"),
        ("import parts\ndef get_config():\n    return parts.ConfigDict(dict(task='gan'))\n", "config.task is 'gan'"),
    ):
        broken.write_text(text)
        # Else a file of the same second and size would be taken from the cache of compiled modules.
        with mock.patch.object(sys, "dont_write_bytecode", True):
            assert sentence in refuse(broken)


def test_missing_checkpoints_are_refused(tiny, trained, tmp_path, capsys):
    one = ("--prompt=a red circle", f"--out={tmp_path / 'a.png'}")
    assert "does not exist" in refusal(capsys, "sample", f"--checkpoint={tmp_path / 'no'}", *one)
    assert f"did you mean {trained}?" in refusal(capsys, "sample", f"--checkpoint={trained.parent}", *one)
    assert "is a file" in refusal(capsys, "sample", f"--checkpoint={tiny}", *one)
    assert "does not exist" in refusal(capsys, "inspect", tmp_path / "no")
    assert "is a file" in refusal(capsys, "inspect", tiny)
    # The VAE that a diffusion transformer needs.
    assert "nowhere does not exist" in refusal(capsys, "train", f"--config={tiny}:dit", f"--workdir={tmp_path / 'run'}")


def test_prompts_sizes_and_files_are_checked(trained, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"un c\xe9rcle")
    (tmp_path / "config.json").write_text("{}")

    def refuse(*argv, prompt="--prompt=x", out="a.png", folder=trained):
        return refusal(capsys, "sample", f"--checkpoint={folder}", prompt, f"--out={tmp_path / out}", *argv)

    # With a checkpoint that is not there: all of these are refused before one is looked for.
    missing = tmp_path / "missing"
    assert "--prompt is empty" in refuse(prompt="--prompt=", folder=missing)
    assert "--prompt is empty" in refuse("--prompt=  ", folder=missing)
    assert "is not UTF-8" in refuse(out="caf\udce9.png", folder=missing)
    assert "holds no prompt" in refuse(prompt=f"--prompts_file={tmp_path / 'blank.txt'}", folder=missing)
    assert "not UTF-8" in refuse(prompt=f"--prompts_file={tmp_path / 'latin.txt'}", folder=missing)
    assert "cannot read" in refuse(prompt=f"--prompts_file={tmp_path / 'no.txt'}", folder=missing)
    assert ".mp4, .gif, .png" in refuse(out="a.avi", folder=missing)
    assert ".mp4, .gif, .png" in refuse(out="a", folder=missing)
    assert "choose another name" in refuse(out="config.gif", folder=missing)
    assert "--frames" in refuse("--frames=0", folder=missing)
    assert "--fps" in refuse("--fps=nan", folder=missing)
    assert "--seed" in refuse("--seed=-1", folder=missing)
    assert "smaller seed" in refuse(f"--seed={2**31 - 1}", "--samples=2", folder=missing)
    assert "the most is 1024" in refuse("--scale=1025", folder=missing)
    assert "backslash" in refuse(out="a\\b.png", folder=missing)
    said = refuse(f"--image={tmp_path / 'no.png'}", folder=missing)
    assert "is not a file that is there; name an image or a video" in said and "manifest" not in said
    assert "in UTF-8" in refuse("--image=a\udcff.png", folder=missing)
    assert "give --out, --outdir or --vbench" in refusal(capsys, "sample", f"--checkpoint={missing}", "--prompt=x")
    # The model knows which sizes it can make.
    assert "6 frames are not 1 + 4k; 5 and 9 are the nearest that work" in refuse("--frames=6")
    assert "width 20 is not a multiple of 8; 16 and 24 are the nearest that work" in refuse("--width=20")
    assert "guidance" in refuse("--guidance=-1")
    assert not (tmp_path / "a.png").exists()
    assert (tmp_path / "config.json").read_text() == "{}"


# Configs -------------------------------------------------------------------------------------------------------------


def test_overrides_reach_the_run_in_every_spelling(tiny):
    def load(*overrides):
        arguments = all_flags.parse(
            main.make_parser(), ["train", "--config", f"{tiny}:vae", "--workdir", "x", *overrides]
        )
        assert arguments.workdir == Path("x")
        return configs.load_run(arguments.config, arguments.overrides)

    plain = load()
    assert config.differences(config.to_dict(plain), config.to_dict(load())) == []
    changed = load(
        "--config.loop.steps=7",
        "--config.optimizer.rate",
        "0.5",
        "--config.vae.remat",
        "--config.vae_train.crop=(1, 8, 8)",
    )
    assert config.differences(config.to_dict(plain), config.to_dict(changed)) == [
        "loop.steps: 2 -> 7",
        "optimizer.rate: 0.001 -> 0.5",
        "vae.remat: False -> True",
        "vae_train.crop: [5, 16, 16] -> [1, 8, 8]",
    ]
    assert not load("--config.vae.remat", "false").vae.remat
    assert not load("--config.vae.remat=true", "--noconfig.vae.remat").vae.remat
    study = configs.load_run(str(tiny), ["--config.stages.dit.loop.steps=9"])
    assert (study.stages["dit"].loop.steps, study.stages["vae"].loop.steps) == (9, 2)


def test_a_config_leaves_nothing_behind(tiny, tmp_path):
    """Two folders may each have their parts, and so may who calls."""
    path = list(sys.path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "parts.py").write_text(PARTS.replace("widths=(8,)", "widths=(16,)"))
    (other / "tiny.py").write_text(TINY)
    with mock.patch.dict(sys.modules, parts=main):
        assert configs.load_run(f"{tiny}:vae", []).vae.widths == (8,)
        assert configs.load_run(f"{other / 'tiny.py'}:vae", []).vae.widths == (16,)
        assert sys.modules["parts"] is main
    assert sys.path == path


# Training ------------------------------------------------------------------------------------------------------------


def test_train_fits_the_task_of_the_config_in_the_workdir(tiny, tmp_path, capsys):
    workdir = tmp_path / "new" / "run"
    with mock.patch.object(loop, "fit") as fit:
        flags = ["--config.seed=5", "--profile=1:2", "--hang_seconds=7"]
        assert main.run(["train", f"--config={tiny}:vae", f"--workdir={workdir}", *flags]) == 0
    ((task, folder, options),) = [call.args for call in fit.call_args_list]
    assert isinstance(task, vae.VAETask) and task.run == configs.load_run(f"{tiny}:vae", ["--config.seed=5"])
    assert folder == workdir and workdir.is_dir()
    assert (options.profile, options.hang_seconds) == ((1, 2), 7.0)
    assert capsys.readouterr().out == f"trained: {workdir}\n"
    late = [f"--config={tiny}:vae", f"--workdir={tmp_path}", "--profile=100:101"]
    assert "begins after the run's last step" in refusal(capsys, "train", *late)


@pytest.fixture
def one_device(monkeypatch):
    """Its rows are too few for eight."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


def test_study_runs_the_config_in_the_workdir_and_knows_its_command(tiny, tmp_path, one_device):
    command = ["study", f"--config={tiny}", f"--workdir={tmp_path / 'a b'}", "--config.prompts", "3"]
    with mock.patch.object(runner, "run") as start:
        assert main.run(command) == 0
    ((run, folder, words),) = [call.args for call in start.call_args_list]
    assert (run.prompts, folder) == (3, tmp_path / "a b")
    assert shlex.split(words) == ["sora-jax", *command]


def test_a_study_that_does_not_divide_over_the_devices_is_refused(tiny, tmp_path, capsys):
    sentence = refusal(capsys, "study", f"--config={tiny}", f"--workdir={tmp_path / 'new'}")
    assert "stage vae: 2 rows do not divide over 8 devices" in sentence and not (tmp_path / "new").exists()


def test_a_dry_run_prints_the_plan_and_makes_nothing(tiny, tmp_path, capsys, one_device):
    command = ["study", f"--config={tiny}", f"--workdir={tmp_path / 'new'}", "--dry_run"]
    assert main.run(command) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:4] == ["stage", "vae", "dit", "all"]
    assert not (tmp_path / "new").exists()
    sentence = refusal(capsys, *command, "--config.stages.dit.pack.row_tokens=8")
    assert "raise pack.row_tokens" in sentence
    sentence = refusal(capsys, *command, "--config.stages.dit.dit.attention=splash")
    assert "stage dit: dit.attention=splash is no kernel of a cpu" in sentence


def test_a_process_of_several_says_who_it_is(tiny, tmp_path, capsys):
    command = ["train", f"--config={tiny}:vae", f"--workdir={tmp_path}"]
    sentence = refusal(capsys, *command, "--coordinator=localhost:1", "--processes=2")
    assert "--coordinator, --processes and --process go together; or give --distributed" in sentence
    flags = ["--coordinator=localhost:1", "--processes=2", "--process=1"]
    with (
        mock.patch.object(processes, "start") as start,
        mock.patch.object(processes, "leave") as leave,
        mock.patch.object(loop, "fit"),
    ):
        assert main.run([*command, *flags]) == 0 and main.run([*command, "--distributed"]) == 0
        assert [call.args for call in start.call_args_list] == [("localhost:1", 2, 1), (None, None, None)]
        assert leave.call_count == 2
    with mock.patch.object(processes, "start", side_effect=RuntimeError("timed\nout")):
        assert "the processes did not meet: timed out" in refusal(capsys, *command, "--distributed", code=1)


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ({"coordinator": "localhost", "processes": 1, "process": 0}, {}, "'localhost' has no port; give HOST:PORT"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, {}, "process 2 is none of 2"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "localhost"}, "'localhost' has no port"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number"),
        ({}, {}, "give --coordinator, --processes and --process"),
    ],
)
def test_what_processes_cannot_meet_by_is_refused(tiny, tmp_path, capsys, monkeypatch, flags, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax.distributed.initialize", mock.Mock(side_effect=ValueError("coordinator_address?")))
    asked = [f"--{name}={value}" for name, value in flags.items()] or ["--distributed"]
    assert sentence in refusal(capsys, "train", f"--config={tiny}:vae", f"--workdir={tmp_path}", *asked)


def test_a_failing_process_of_several_does_not_wait_for_the_others(tiny, tmp_path):
    """jax would, at the end of Python; here it ends at once, with its error told."""
    code = f"""
import sys
from unittest import mock
from sora_jax import main, processes
from sora_jax.train import loop
sys.argv = ["sora-jax", "train", "--config={tiny}:vae", "--workdir={tmp_path}"]
import atexit
atexit.register(lambda: print("waited"))
with mock.patch.object(processes, "several", lambda: True), mock.patch.object(loop, "fit", side_effect=ERROR):
    sys.exit(main.run())
"""
    for error, told in (
        ("ValueError('shapes differ')", "ValueError: shapes differ"),
        ("loop.DivergedError('nan')", "error: nan"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("ERROR", error)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and told in done.stderr and "waited" not in done.stdout, done.stderr


def test_a_plan_is_printed_and_written(tiny, tmp_path, capsys):
    out, shown = tmp_path / "plan.json", tmp_path / "plan.html"
    command = ["plan", f"--config={tiny}:dit", f"--vae={tiny}:vae", "--topology=cpu:2"]
    assert main.run([*command, f"--out={out}", f"--page={shown}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cpu:2: 2 chips as data 2") and "memory of a chip:" in text and "fits: " in text
    numbers = json.loads(out.read_text())
    assert numbers["topology"] == "cpu:2" and shlex.split(numbers["command"])[1:5] == command
    assert "<title>Plan</title>" in shown.read_text()


def test_plans_that_cannot_be_made_are_refused(tiny, capsys):
    command = ["plan", f"--config={tiny}:dit", f"--vae={tiny}:vae"]
    assert "none of v4" in refusal(capsys, *command, "--topology=v9:2x2")
    assert "none of v4" in refusal(capsys, *command, "--topology=cpu:")
    missing = refusal(capsys, *command[:2], "--topology=cpu:2", "--config.vae_checkpoint=runs/nowhere")
    assert "runs/nowhere does not exist" in missing and "--vae=" in missing
    assert "is no VAE" in refusal(capsys, *command[:2], f"--vae={tiny}:dit", "--topology=cpu:2")
    # Of a VAE that is yet to be trained the config beside has the shape, if it trains one of that name.
    shutil.copy(tiny, tiny.with_name("vae.py"))
    for name, told in (("dit", "runs/vae-dit does not exist"), ("vae", "raise pack.row_tokens")):
        flags = [f"--config.vae_checkpoint=runs/vae-{name}", "--config.pack.row_tokens=8"]
        assert main.run([*command[:2], "--topology=cpu:2", *flags]) == 2
        said = capsys.readouterr().err.splitlines()
        assert told in said[-1] and "the VAE is planned as" in said[0]
    assert "is no diffusion transformer" in refusal(
        capsys, "plan", f"--config={tiny}:vae", f"--vae={tiny}:vae", "--topology=cpu:2"
    )
    assert "raise pack.row_tokens" in refusal(capsys, *command, "--topology=cpu:2", "--config.pack.row_tokens=8")
    with mock.patch.object(jax.stages.Lowered, "compile", side_effect=jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")):
        assert main.run([*command, "--topology=cpu:2"]) == 1
    assert "the run does not fit this topology" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "nothing was saved yet"),
        (loop.DivergedError("not finite for 5 steps"), 1, "not finite for 5 steps"),
        (checkpoint.CorruptCheckpointError("two bits\nflipped"), 1, "two bits flipped"),
        (checkpoint.ReadError("3 cannot be read now"), 1, "3 cannot be read now"),
        (checkpoint.MismatchError("does not fit this model"), 2, "does not fit this model"),
        (loader.LoaderError("x holds no clips"), 1, "x holds no clips"),
        (FileNotFoundError("no checkpoint: x"), 2, "no checkpoint: x"),
    ],
)
def test_what_stops_a_run_is_told_in_one_line(error, code, sentence, tiny, tmp_path, capsys):
    with mock.patch.object(loop, "fit", side_effect=error):
        line = refusal(capsys, "train", f"--config={tiny}:vae", f"--workdir={tmp_path}", code=code)
    assert sentence in line


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("x"), FileNotFoundError(2, "gone", "x")])
def test_bugs_keep_their_traceback(error, tiny, tmp_path):
    with mock.patch.object(loop, "fit", side_effect=error), pytest.raises(type(error)) as caught:
        main.run(["train", f"--config={tiny}:vae", f"--workdir={tmp_path}"])
    assert caught.value is error


def test_an_interrupt_tells_where_the_run_resumes(tiny, trained, capsys):
    with mock.patch.object(loop, "fit", side_effect=KeyboardInterrupt):
        line = refusal(capsys, "train", f"--config={tiny}:vae", f"--workdir={trained}", code=130)
    assert "resumes from step 3" in line


def test_an_interrupted_process_ends_at_once():
    """Threads of a save that was cut short must not hold it."""
    code = """
import sys, threading, time
from sora_jax import main
from sora_jax.cli import checkpoints
def verb(arguments):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise KeyboardInterrupt
checkpoints.inspect = verb
sys.argv = ["sora-jax", "inspect", "x"]
sys.exit(main.run())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "sora-jax inspect: error: interrupted\n")


# Sampling and looking ------------------------------------------------------------------------------------------------


def test_a_prompt_of_a_file_is_a_line_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa red circle\r\nsecond\u2028half\n\n".encode())
    arguments = argparse.Namespace(prompt=None, prompts_file=tmp_path / "a.txt")
    assert asked.prompts_of(arguments) == ["a red circle", "second\u2028half"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_made(trained, tmp_path, capsys):
    loaded = by_path.load(trained / "3", {})
    flags = [f"--checkpoint={trained}", "--prompt=a", "--height=8", "--width=8", "--steps=1"]
    with (
        mock.patch.object(by_path, "load", return_value=loaded),
        mock.patch.object(loaded[0], "making", side_effect=AssertionError),
        mock.patch("tempfile.TemporaryFile", side_effect=OSError(30, "Read-only file system")),
    ):
        assert main.run(["sample", *flags, f"--out={tmp_path / 'x.mp4'}"]) == 1
    assert "Read-only" in capsys.readouterr().err


def test_sample_writes_what_the_flags_say(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \n")
    out = tmp_path / "new" / "v.gif"
    place = f"--checkpoint={trained}"
    flags = ["--height=8", "--width=16", "--frames=5", "--fps=4", "--samples=2", "--seed=7", "--steps=1"]
    flags += [f"--prompts_file={prompts}"]
    loaded = by_path.load(trained / "3", {})
    # Loaded once, so that the programs of the first command serve the others.
    with mock.patch.object(by_path, "load", return_value=loaded):
        assert main.run(["sample", f"--checkpoint={trained}", f"--out={out}", *flags]) == 0
        printed = capsys.readouterr().out.splitlines()
        # 16 pixels wide are enlarged to the 256 that can be watched, or as told; a manifest may be replaced.
        videos = [iio.imread(out.with_name(f"v-{number}.gif")) for number in range(4)]
        assert main.run(["sample", f"--checkpoint={trained}", f"--out={out}", "--scale=1", *flags]) == 0
        small = iio.imread(out.with_name("v-0.gif"))
        sheet = tmp_path / "sheet.png"
        assert main.run(["sample", f"--checkpoint={trained}", f"--out={sheet}", "--scale=2", *flags]) == 0
        told = refusal(capsys, "sample", place, f"--out={out.with_suffix('.png')}", *flags)
        assert "v.json says how" in told and "v-0.gif was made" in told
    wanted = [("a red circle", 7), ("a red circle", 8), ("a blue square", 7), ("a blue square", 8)]
    assert printed == [f"{out.with_name(f'v-{i}.gif')}  seed {seed}  {text}" for i, (text, seed) in enumerate(wanted)]
    assert [video.shape for video in videos] == [(5, 128, 256, 3)] * 4
    assert not np.array_equal(videos[0], videos[1])
    assert np.array_equal(small, videos[0][:, ::16, ::16])

    manifest = json.loads(out.with_suffix(".json").read_text())
    assert [(order["prompt"], order["seed"]) for order in manifest["orders"]] == wanted
    assert manifest["step"] == 3
    # What is not given comes from the run.
    assert manifest["settings"] == SAMPLER | {"steps": 1}

    height, width, _ = iio.imread(sheet).shape
    assert width >= 5 * 32 and height >= 4 * 16
    assert sorted(path.name for path in tmp_path.glob("sheet*")) == ["sheet.json", "sheet.png"]


def test_a_manifest_makes_the_same_files_again(trained, tmp_path, capsys, caplog):
    image = tmp_path / "start.png"
    iio.imwrite(image, np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    requests = tmp_path / "requests.yaml"
    requests.write_text(
        "- {prompt: a red circle, frames: 1, height: 8, width: 8}\n"
        "- {prompt: a red circle, image: start.png, frames: 5, height: 8, width: 8, samples: 2, known_guidance: 2}\n"
        "- {prompt: a blue square, extend: start.png, frames: 9, window: 5}\n"
    )
    checkpoint = f"--checkpoint={trained}"
    loaded = by_path.load(trained / "3", {})
    with mock.patch.object(by_path, "load", return_value=loaded):
        assert (
            main.run(["sample", checkpoint, f"--requests={requests}", f"--outdir={tmp_path / 'one'}", "--steps=1"]) == 0
        )
        names = ["000.png", "001.mp4", "002.mp4", "003.mp4", "manifest.json"]
        assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
        assert [iio.imread(tmp_path / "one" / name).shape[0] for name in names[1:4]] == [5, 5, 10]
        # Each as wide as can be watched, whatever the others' widths: 8 and 32 pixels.
        assert {iio.imread(tmp_path / "one" / name).shape[-2] for name in names[:4]} == {256}
        fewer = refusal(capsys, "sample", checkpoint, "--prompt=x", f"--outdir={tmp_path / 'one'}")
        assert "says how" in fewer and "000.png was made" in fewer
        kept = f"--manifest={tmp_path / 'one' / 'manifest.json'}"
        told = json.loads((tmp_path / "one" / "manifest.json").read_text())["orders"]
        assert [(order["height"], order["width"]) for order in told] == [(8, 8)] * 3 + [(32, 32)]
        # The manifest says which model, too.
        assert main.run(["sample", kept, f"--outdir={tmp_path / 'two'}"]) == 0
        assert by_path.load.call_args.args[0] == trained / "3"
        # As long as nothing says where, it goes beside the manifest.
        assert main.run(["sample", checkpoint, kept]) == 0
        for name in names[:-1]:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "one" / "manifest-again" / name).read_bytes()
        assert "leave --seed out" in refusal(capsys, "sample", kept, "--outdir=x", "--seed=3")
        assert "is no interval" in refusal(capsys, "sample", checkpoint, "--out=x.mp4", "--guidance_interval=0.5")
        moved = json.loads((tmp_path / "one" / "manifest.json").read_text()) | {"checkpoint": "/not/there"}
        (tmp_path / "one" / "moved.json").write_text(json.dumps(moved))
        assert "say where it is by --checkpoint" in refusal(
            capsys, "sample", f"--manifest={tmp_path / 'one' / 'moved.json'}", "--outdir=x"
        )
        assert "leave --steps out" in refusal(capsys, "sample", checkpoint, kept, "--outdir=x", "--steps=3")
        told = refusal(capsys, "sample", checkpoint, kept, "--out=x.mp4")
        assert "give --outdir" in told and "--out of that kind" not in told
        image.write_bytes(image.read_bytes() + b"\0")
        assert "not the file that the manifest" in refusal(capsys, "sample", checkpoint, kept, "--outdir=x")


def test_a_manifest_tells_of_no_file_that_was_half_replaced(trained, tmp_path, capsys):
    """Files are written one by one; where that ends early the manifest of those before is gone, unless it is what makes them."""
    out, kept = tmp_path / "x.mp4", tmp_path / "x.json"
    flags = [f"--checkpoint={trained}", "--prompt=a", "--height=8", "--width=8", "--steps=1", f"--out={out}"]
    full = mock.patch.object(files, "write_video", side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(by_path, "load", return_value=by_path.load(trained / "3", {})):
        assert main.run(["sample", *flags]) == 0 and kept.exists()
        with full:
            for again, left in (([f"--manifest={kept}", f"--out={out}"], True), ([*flags, "--seed=1"], False)):
                assert main.run(["sample", *again]) == 1 and kept.exists() == left
                assert "No space left" in capsys.readouterr().err


def test_what_is_given_by_flags_is_the_first_frame_or_the_end(trained, tmp_path, capsys):
    video = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    iio.imwrite(tmp_path / "clip.gif", video, duration=200, loop=0)
    flags = [f"--checkpoint={trained}", "--prompt=a red circle", "--height=8", "--width=8", "--fps=5", "--steps=1"]
    loaded = by_path.load(trained / "3", {})
    made, told = {}, {}
    with (
        mock.patch.object(by_path, "load", return_value=loaded),
        mock.patch.object(files, "write_video", lambda path, frames, *_: made.update({path.stem: frames})),
    ):
        for name, more in {
            "forward": [f"--extend={tmp_path / 'clip.gif'}", "--frames=4", "--window=9"],
            "backward": [f"--extend={tmp_path / 'clip.gif'}", "--direction=backward", "--frames=4", "--window=9"],
            "loop": [f"--loop={tmp_path / 'clip.gif'}", "--frames=4", "--window=9"],
            "endless": ["--loop=true", "--frames=8", "--window=9"],
            "small": ["--draft=0.5", "--height=16", "--width=16", "--frames=5"],
        }.items():
            capsys.readouterr()
            assert main.run(["sample", *flags, *more, f"--out={tmp_path / name}.mp4"]) == 0
            told[name] = capsys.readouterr().out
        # A draft's file may be another video's.
        plain = ["--height=16", "--width=16", "--frames=5", f"--out={tmp_path / 'big-draft.mp4'}"]
        assert main.run(["sample", *flags, *plain]) == 0
        (tmp_path / "big-draft.mp4").touch()
        told_of = refusal(capsys, "sample", *flags, *plain[:-1], "--draft=0.5", f"--out={tmp_path / 'big.mp4'}")
        assert "big-draft.mp4 would be replaced" in told_of and "big-draft.json says how" in told_of
        # And so may any other that a manifest tells of.
        several = ["--height=16", "--width=16", "--frames=5", "--samples=2", f"--out={tmp_path / 'two.mp4'}"]
        assert main.run(["sample", *flags, *several]) == 0
        (tmp_path / "two-1.mp4").touch()
        told_of = refusal(capsys, "sample", *flags, *plain[:-1], f"--out={tmp_path / 'two-1.mp4'}")
        assert "two-1.mp4 would be replaced" in told_of and "two.json says how" in told_of
        (tmp_path / "two.json").write_text('{\n  "sora_jax_sample": "')
        assert "two.json would be replaced, but what it tells of is unclear" in refusal(
            capsys, "sample", *flags, *several
        )
        wide = ["--height=64", "--width=64", "--frames=5", f"--out={tmp_path / 'wide.mp4'}", "--scale=257"]
        assert "give --scale=256 or less" in refusal(capsys, "sample", *flags, *wide)
        for name in ("big-draft", "two-0", "two-1"):
            del made[name]
        here = str(tmp_path / "clip.gif")
        assert "is an input, which the output would replace" in refusal(
            capsys, "sample", *flags, f"--extend={here}", "--frames=4", f"--out={here}"
        )
        assert "is not a file that is there" in refusal(capsys, "sample", *flags, f"--extend={here}4", "--out=x.mp4")
    sizes = {name: frames.shape[:2] for name, frames in made.items()}
    assert sizes == {"forward": (9, 8), "backward": (9, 8), "loop": (9, 8), "endless": (8, 8)} | {
        "small": (5, 16), "small-draft": (5, 8)
    }  # fmt: skip
    # Where a video was put together, and where it closes, is told with how much changes there.
    for name, seam in (("forward", 5), ("backward", 4)):
        assert (
            f"(changes at seams by at most {continuity.seam_change(made[name], [seam]):.2f} of the usual)" in told[name]
        )
    assert f"(closes with {continuity.loop_change(made['endless']):.2f} of the usual change" in told["endless"]
    assert "(" not in told["small"].removeprefix(str(tmp_path))
    # The clip comes back as its round trip wherever it stands.
    assert np.array_equal(made["forward"][:5], made["backward"][4:]) and np.array_equal(
        made["forward"][:5], made["loop"][:5]
    )


def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    flags = ["--checkpoint=nowhere", f"--out={tmp_path / 'x.mp4'}"]
    with mock.patch.object(by_path, "load", None):
        assert "nothing says what to make" in refusal(capsys, "sample", *flags)
        assert "both say what to make" in refusal(capsys, "sample", *flags, "--prompt=a", "--requests=b.yaml")
        assert "image and edit are ways to make one video" in refusal(
            capsys, "sample", *flags, "--prompt=a", "--image=a.png", "--edit=b.mp4"
        )
        assert "mask goes with inpaint or edit" in refusal(capsys, "sample", *flags, "--prompt=a", "--mask=a.png")
        assert "strength is 2.0" in refusal(capsys, "sample", *flags, "--edit=a.mp4", "--strength=2")
        assert "leave --seed out" in refusal(capsys, "sample", *flags, "--requests=a.yaml", "--seed=2")
        assert "give --checkpoint" in refusal(capsys, "sample", *flags[1:], "--prompt=a")


def test_vbench_finds_five_videos_of_every_prompt(trained, tmp_path, capsys, monkeypatch):
    written, write = {}, files.write_video

    def write_and_keep(path, frames, *rest):
        written[path] = np.asarray(frames, int)
        write(path, frames, *rest)

    monkeypatch.setattr(files, "write_video", write_and_keep)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na red square\n")
    out = tmp_path / "vbench"
    flags = [f"--checkpoint={trained}", f"--prompts_file={prompts}", "--steps=1", "--seed=7", "--frames=5"]
    loaded = by_path.load(trained / "3", {})
    with mock.patch.object(by_path, "load", return_value=loaded), mock.patch.object(vbench, "VBENCH_PROMPTS", 2):
        assert main.run(["sample", f"--vbench={out}", *flags]) == 0
        assert capsys.readouterr().out == f"{out / 'videos'}\n"
        assert "not an empty folder" in refusal(capsys, "sample", f"--vbench={out}", *flags)
        odd = refusal(capsys, "sample", f"--vbench={tmp_path / 'odd'}", *flags[:-1], "--frames=6", "--height=33")
        assert "32 and 40 are the nearest that work" in odd and "5 and 9 are the nearest that work" in odd
        # The same seeds make the same videos in the other way of writing them.
        assert main.run(["sample", f"--out={tmp_path / 'v.mp4'}", "--samples=5", "--scale=1", *flags]) == 0
    names = [f"{prompt}-{index}.mp4" for prompt in prompts.read_text().splitlines() for index in range(5)]
    assert sorted(path.name for path in (out / "videos").iterdir()) == sorted(names)
    for number, name in enumerate(names):
        # Packed with others, what falls between two levels of 255 may fall to the other side.
        apart = np.abs(written[out / "videos" / name] - written[tmp_path / f"v-{number}.mp4"])
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
    told = json.loads((out / "manifest.json").read_text())
    assert [video["seed"] for video in told["videos"]][:5] == [7, 8, 9, 10, 11]
    # What it takes to make them again.
    assert told["fingerprint"] == checkpoint.digest(trained, 3) and told["step"] == 3
    assert told["settings"]["steps"] == 1 and "jax" in told["versions"] and "--vbench=" in told["command"]


def test_a_mesh_that_cannot_be_is_told(trained, tmp_path, capsys):
    def told(mesh):
        flags = [f"--checkpoint={trained}", "--prompt=a", f"--out={tmp_path / 'a.png'}", f"--mesh={mesh}"]
        return refusal(capsys, "sample", *flags)

    assert "'fsdp' is not an axis with its size, such as fsdp=4" in told("fsdp")
    assert "'fsdp=0' is not an axis" in told("fsdp=0") and "is not an axis" in told("data=2,data=4")
    assert "--mesh has no axis 'pipe'; its axes are data, fsdp, tensor, sequence" in told("pipe=2")
    assert "choose sizes whose product is 8" in told("fsdp=3")
    assert "1 heads do not divide over 8 devices" in told("data=1,tensor=8")


def test_vbench_is_refused_before_the_model_is_loaded(trained, tmp_path, capsys):
    flags = [f"--checkpoint={trained}", f"--vbench={tmp_path / 'new'}", "--prompt=a"]
    with mock.patch.object(by_path, "load", None):
        assert "leave --samples out" in refusal(capsys, "sample", "--samples=4", *flags)
        assert "leave --image out" in refusal(capsys, "sample", "--image=a.png", *flags)
        assert "'a' comes twice" in refusal(capsys, "sample", "--prompt=a", *flags)
        assert f"beyond {all_flags.MAX_SEED}" in refusal(capsys, "sample", f"--seed={all_flags.MAX_SEED}", *flags)
        assert "not allowed with" in refusal(capsys, "sample", "--out=a.mp4", *flags)


def test_evaluate_prints_and_writes_the_scores(trained, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    loaded = by_path.load(trained, {})
    with mock.patch.object(by_path, "load", return_value=loaded):
        assert (
            main.run(["evaluate", f"--checkpoint={trained}", "--prompts=4", "--seed=5", "--guidance=1", f"--out={out}"])
            == 0
        )
        scores = json.loads(out.read_text())
        shown = capsys.readouterr().out
        weights = tmp_path / "i3d.pt"
        flags = ["evaluate", f"--checkpoint={trained}"]
        assert "videos of 16 frames are needed" in refusal(capsys, *flags, f"--i3d_weights={weights}")
        assert "at least 2" in refusal(capsys, *flags, "--prompts=1")
    assert "give --i3d_weights too" in refusal(capsys, *flags, "--fvd_videos=9")
    assert "choose a smaller seed" in refusal(capsys, *flags, f"--seed={2**31 - 4}", "--prompts=5")
    assert scores["adherence"]["count"] == 4 and scores["step"] == 3
    assert scores["sampler"] == SAMPLER | {"guidance": 1.0}
    assert scores["total_flops"] == 5e12
    for name in ("adherence", "adherence_floor", "adherence_ceiling"):
        assert f"{scores[name]['shape']:.3f}" in shown


@pytest.mark.parametrize("stage", ["dit", "captioner"])
def test_a_kernel_of_other_chips_is_refused_before_training(capsys, tmp_path, stage):
    flags = [
        f"--config={Path(__file__).with_name('tiny.py')}:{stage}",
        f"--workdir={tmp_path}",
        f"--config.{stage}.attention=splash",
    ]
    told = refusal(capsys, "train", *flags, f"--config.vae_checkpoint={tmp_path}")
    assert f"{stage}.attention=splash is no kernel of a cpu: set {stage}.attention=auto" in told


def test_attention_without_its_kernel_is_told_before_training(caplog, monkeypatch):
    run = config.from_config_dict(quickstart.get_config("dit"))
    run = dataclasses.replace(run, mesh=sharding.MeshConfig(data=1, fsdp=1, tensor=1, sequence=8))
    long = dataclasses.replace(run, pack=dataclasses.replace(run.pack, row_tokens=8 * 1000, row_text=512))
    cli_train._check_kernels({"stage short: ": run, "stage long: ": long})
    assert not caplog.records  # a CPU has none
    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.SPLASH)
    cli_train._check_kernels({"stage short: ": run, "stage long: ": long})
    assert caplog.text.count("stage long: no splash kernel for attention among a row's tokens") == 1


def test_sizes_come_from_what_was_trained_on(caplog):
    world = config.from_config_dict(quickstart.get_config("dit")).data.world

    def size_of(**given):
        names = dict.fromkeys(("height", "width", "frames", "fps"))
        return asked.size_of(argparse.Namespace(**names | given), requests.Size(32, 32, 17, 5.0))

    assert size_of() == requests.Size(32, 32, 17, 5.0)
    assert size_of(height=48, frames=9) == requests.Size(48, 32, 9, 5.0)
    assert size_of(frames=1, fps=25.0) == requests.Size(32, 32, 1, 25.0)
    for usual in ({}, {"height": 48, "frames": 9}, {"frames": 1, "fps": 25.0}):  # an image has no rate
        asked.warn_of(size_of(**usual), world)
    assert not caplog.records
    for number, unusual in enumerate(({"height": 64}, {"frames": 33}, {"fps": 8.0}), 1):
        asked.warn_of(size_of(**unusual), world)
        assert len(caplog.records) == number and "not what the checkpoint was trained on" in caplog.text


def test_who_goes_on_with_a_model_of_text_alone_is_warned(caplog):
    size, grid = requests.Size(32, 32, 17, 5.0), layouts.Grid((4, 8, 8))
    text, loop = (
        layouts.prepare(order, size, grid)
        for order in (requests.Order(prompt="x"), requests.Order(prompt="x", loop=True))
    )
    long = layouts.prepare(requests.Order(prompt="x", frames=33), size, grid)
    alone = config.from_config_dict(quickstart.get_config("dit"))
    masked = config.from_config_dict(prompting.get_config("dit"))
    asked.warn_of_given([text], alone)
    asked.warn_of_given([text, loop, long], masked)
    assert not caplog.records
    noised = dataclasses.replace(alone.loader, known=masks.KnownConfig(less_noise=0.5))  # nothing is given by it
    for number, (job, run) in enumerate(
        ((loop, alone), (long, alone), (loop, dataclasses.replace(alone, loader=noised))), 1
    ):
        asked.warn_of_given([text, job], run)
        assert len(caplog.records) == number and "trained from text alone" in caplog.text


def test_one_video_keeps_its_name_and_several_are_numbered():
    one, other = (requests.Order(prompt=prompt, seed=3) for prompt in "xy")

    def names(out=None, outdir=None):
        return [video.path.name for video in sample.arrange([one, other], [False, True], out, outdir)]

    assert sample.arrange([one], [False], Path("a/b.mp4"), None) == [sample.Video("x", 3, Path("a/b.mp4"))]
    assert names(out=Path("b.mp4")) == ["b-0.mp4", "b-1.mp4"]
    assert names(out=Path("b.png")) == ["b.png", "b.png"]
    assert names(outdir=Path("c")) == ["000.mp4", "001.png"]


def test_inspect_shows_text_or_json(trained, capsys):
    assert main.run(["inspect", str(trained)]) == 0
    page = capsys.readouterr().out
    assert "step        3" in page and "total_flops" in page and "metrics" not in page
    assert main.run(["inspect", str(trained), "--depth", "-1"]) == 0
    assert len(capsys.readouterr().out) > len(page)
    assert main.run(["inspect", str(trained / "3"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    count = sum(math.prod(array["shape"]) for array in found["items"]["ema"])
    assert found["num_parameters"]["ema"] == count > 0
    assert found["meta"]["config"]["task"] == "dit"


def test_inspect_tells_the_metrics_up_to_its_step(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    lines = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 4)] + [
        {"kind": "eval", "step": 3, "val_loss": 0.25}
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main.run(["inspect", str(copy)]) == 0
    page = capsys.readouterr().out
    assert "train metrics at step 2\n  loss: 0.5\n" in page and "eval metrics at step 3\n  val_loss: 0.25\n" in page
    assert main.run(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["train"]["step"] == 2


def test_what_was_exported_comes_back(trained, tmp_path, capsys):
    assert main.run(["export", str(trained), f"--out={tmp_path / 'out'}"]) == 0
    assert "parameters in model.safetensors" in capsys.readouterr().out
    assert "exists" in refusal(capsys, "export", trained, f"--out={tmp_path / 'out'}")
    assert main.run(["import", str(tmp_path / "out"), f"--workdir={tmp_path / 'back'}"]) == 0
    assert main.run(["inspect", str(tmp_path / "back"), "--verify"]) == 0
    assert "arrays are what was saved" in capsys.readouterr().out
    assert "holds a checkpoint" in refusal(capsys, "import", tmp_path / "out", f"--workdir={tmp_path / 'back'}")
    with lock.locked(tmp_path):  # of a run that is about to write there
        assert str(os.getpid()) in refusal(capsys, "import", tmp_path / "out", f"--workdir={tmp_path}")


def test_inspect_verifies_and_compares(trained, tmp_path, capsys):
    assert main.run(["inspect", str(trained), "--verify"]) == 0
    assert "arrays are what was saved" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert main.run(["inspect", str(trained), f"--diff={copy}"]) == 0
    assert capsys.readouterr().out == "no array differs\n"
    data = max((copy / "3").glob("**/d/*"), key=lambda path: path.stat().st_size)
    bits = bytearray(data.read_bytes())
    bits[len(bits) // 2] ^= 4
    data.write_bytes(bits)
    assert f"{copy / '3'} is damaged" in refusal(capsys, "inspect", copy, "--verify", code=1)


# Process -------------------------------------------------------------------------------------------------------------


def test_the_environment_of_the_user_comes_first(tmp_path):
    with mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR="mine", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3"):
        process.prepare_jax()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
        assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"
    process.prepare_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()


def test_jax_keeps_small_programs_in_our_cache(tmp_path):
    """jax reads what prepare_jax sets: a trivial program is on disk afterwards."""
    in_python("from sora_jax.cli import process\nprocess.prepare_jax()\nimport jax\njax.jit(lambda x: x + 1)(1)")
    assert list((tmp_path / "cache").iterdir())


def test_only_our_chatter_is_shown(capsys):
    def chatter(arguments):
        logging.getLogger("orbax").info("theirs")
        logging.getLogger("orbax").warning("trouble")
        # What a thread of orbax's logs, and its call raises.
        raised = {"msg": "raised", "levelno": logging.ERROR, "levelname": "ERROR", "pathname": "/orbax/checkpoint/x.py"}
        logging.getLogger("absl").handle(
            logging.makeLogRecord(raised | {"exc_info": (OSError, OSError(28, "full"), None)})
        )
        # As sora_jax itself logs: a record made in one of its files.
        record = logging.makeLogRecord(
            {"msg": "ours", "levelno": logging.INFO, "levelname": "INFO", "pathname": main.__file__}
        )
        logging.getLogger().handle(record)

    handlers = list(logging.getLogger().handlers)
    with mock.patch.object(checkpoints, "inspect", chatter):
        assert main.run(["inspect", "x"]) == 0
    assert capsys.readouterr().err.splitlines() == ["warning: trouble", "ours"]
    assert logging.getLogger().handlers == handlers
    # What all of several processes do, the first one says; what troubles one of them, that one.
    for first, shown in ((True, ["warning: trouble", "ours"]), (False, ["warning: trouble"])):
        with (
            mock.patch.object(checkpoints, "inspect", chatter),
            mock.patch.object(processes, "several", lambda: True),
            mock.patch.object(processes, "is_first", lambda first=first: first),
        ):
            assert main.run(["inspect", "x"]) == 0
        assert capsys.readouterr().err.splitlines() == shown

"""Runs small enough for tests, in worlds of one frame size; also a config file: --config=tests/tiny.py:vae."""

import dataclasses
import json

import captioner
import quickstart
from ml_collections import ConfigDict

from sora_jax import config

MESH = {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
# Of transformers, their own: what rounding does to a run grows with the rate, and laws bound it on every processor. At 0.014 twenty
# steps on one and on two devices were 1.2e-6 apart on one of two kinds of processor, at this rate 5e-7.
RATE = 0.007


def _world(tree):
    tree["frame_sizes"], tree["frame_counts"], tree["frame_count_weights"] = ((32, 32),), (1, 5), ()
    tree["holdout_fraction"] = 0.2


def get_config(arg):
    """The tree of a run on all devices: 'vae', 'dit' or 'captioner'."""
    tree = {"vae": _vae, "dit": _dit, "captioner": _captioner}[arg]()
    return ConfigDict(tree | {"mesh": {"data": 0, "fsdp": 1, "tensor": 1, "sequence": 1}})


def vae_run(**loop):
    return _run(_vae(), loop)


def dit_run(vae_checkpoint, **loop):
    return _run(_dit() | {"vae_checkpoint": str(vae_checkpoint)}, loop)


def captioner_run(vae_checkpoint, **loop):
    return _run(_captioner() | {"vae_checkpoint": str(vae_checkpoint)}, loop)


def _run(tree, loop):
    tree["loop"] |= loop
    return config.from_config_dict(tree)


def _vae():
    tree = quickstart.get_config("vae").to_dict()
    _world(tree["data"]["world"])
    tree["data"]["world"]["frame_counts"] = (5,)
    tree["data"] |= {"train_clips": 24, "heldout_clips": 4}
    tree["vae"] |= {"widths": (16,), "blocks": (1,), "channels": 8}
    tree["vae_train"] |= {"batch": 8, "crop": (5, 32, 32)}
    tree["loop"] |= {"steps": 4, "log_every": 2}
    tree["mesh"] = MESH
    return tree


def _dit():
    tree = quickstart.get_config("dit").to_dict()
    _world(tree["data"]["world"])
    tree["data"] |= {"train_clips": 24, "heldout_clips": 4}
    tree["text"] |= {"encoder": "scratch"}
    tree["text"]["scratch"] |= {"vocab_size": 256, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    tree["dit"] |= {"width": 32, "blocks": 2, "heads": 2, "channels": 8}
    tree["pack"] |= {"rows": 8, "row_tokens": 40, "row_slots": 8, "row_text": 128, "window": 24}
    tree["loader"]["known"] |= {"first_frames": 0.5, "box": 0.2, "less_noise": 0.2}
    tree["flow"] |= {"known_noise": 0.1}
    tree["sampler"] |= {"steps": 2}
    tree["optimizer"] |= {"rate": RATE}
    tree["loop"] |= {"steps": 4, "log_every": 2}
    tree["mesh"] = MESH
    return tree


def _captioner():
    tree = captioner.get_config("").to_dict()
    _world(tree["data"]["world"])
    tree["data"] |= {"train_clips": 24, "heldout_clips": 4}
    tree["optimizer"] |= {"rate": RATE}
    tree["captioner"] |= {"width": 32, "blocks": 2, "text_blocks": 1, "words": 128, "max_tokens": 40, "channels": 8}
    tree["pack"] |= {"rows": 8, "row_tokens": 40, "row_slots": 4, "row_text": 80, "window": 24}
    tree["loop"] |= {"steps": 4, "log_every": 2}
    tree["mesh"] = MESH
    return tree


def study(**loop):
    """A VAE and a ladder of two rungs, on all devices."""
    everywhere = config.from_config_dict(get_config("vae")).mesh
    vae, dit = (dataclasses.replace(run, mesh=everywhere) for run in (vae_run(**loop), dit_run("vae", **loop)))
    rungs = {
        name: dataclasses.replace(dit, compute=config.ComputeConfig(0.0, multiplier, "steps", 0.5))
        for name, multiplier in {"1x": 1.0, "4x": 4.0}.items()
    }
    stages = {"vae": vae} | rungs
    groups = dict.fromkeys(("ladder", "isoflop", "models", "rates", "framing", "rollout"), tuple(rungs))
    return config.StudyRun("tiny", tuple(stages), stages, groups, prompts=4, shown=2, seed=3)


def with_loop(run, **changes):
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, **changes))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

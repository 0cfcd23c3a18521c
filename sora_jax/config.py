"""The whole of a run as frozen dataclasses, and from_config_dict, the only bridge from ml_collections.

Every key must be given: below this module nothing has a default. The dataclasses of the parts stand beside the parts; the
ones that belong to no single part stand here. The resolved config is plain JSON in the work dir and in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from sora_jax.data.loader import LoaderConfig, check_lanes
from sora_jax.data.masks import KnownConfig
from sora_jax.data.pack import PackConfig
from sora_jax.data.worlds.world import WorldConfig
from sora_jax.diffusion.flow import TimeConfig
from sora_jax.diffusion.sampler import SamplerConfig
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.vae import VAEConfig
from sora_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A procedural world, how many of its clips are drawn for training, and how many held-out ones for validation."""

    world: WorldConfig
    train_clips: int
    heldout_clips: int

    def __post_init__(self) -> None:
        if self.train_clips < 1 or self.heldout_clips < 1:
            raise ValueError(
                f"data: train_clips {self.train_clips} and heldout_clips {self.heldout_clips} must be positive"
            )
        if not self.world.holdout_fraction:
            raise ValueError(
                "data.world.holdout_fraction is 0, but runs are judged on what is held out; set it above 0"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """'muon' for hidden matrices (Adam for the rest) or 'adamw' for all; rates rise over warmup_steps and then decay.

    decay is 'linear' (to zero), 'cosine' or 'constant'. adam_rate is the rate of what muon does not take.
    """

    name: str
    rate: float
    adam_rate: float
    warmup_steps: int
    decay: str
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise ValueError(f"optimizer.name {self.name!r} is neither 'muon' nor 'adamw'")
        if self.decay not in ("linear", "cosine", "constant"):
            raise ValueError(f"optimizer.decay {self.decay!r} is none of linear, cosine, constant")
        if (
            self.rate <= 0
            or self.adam_rate <= 0
            or self.clip_norm <= 0
            or self.warmup_steps < 0
            or self.weight_decay < 0
        ):
            raise ValueError(
                "optimizer: rates and clip_norm must be positive, warmup_steps and weight_decay not negative"
            )


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of a run and how often it logs, saves, evaluates and draws samples (in steps; 0 = only at the end).

    ema is the decay of the averaged weights at full length of its window; keep is how many checkpoints stay. A step whose loss
    or gradient is not finite, or whose gradient is spike_factor times what is usual (train/guard.py; 0 = never), is skipped.
    When the last max_bad_steps before a log line were, a run goes back to the newest checkpoint from before them, with other
    data to come, as often as `rollbacks` says, and then stops. It also stops when more than max_failed_saves checkpoints in a
    row could not be written.
    """

    steps: int
    log_every: int
    save_every: int
    evaluate_every: int
    sample_every: int
    keep: int
    ema: float
    max_bad_steps: int
    max_failed_saves: int
    spike_factor: float
    rollbacks: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1 or self.keep < 1 or self.max_bad_steps < 1:
            raise ValueError("loop: steps, log_every, keep and max_bad_steps must be at least 1")
        if (
            min(self.save_every, self.evaluate_every, self.sample_every, self.max_failed_saves, self.rollbacks) < 0
            or not 0 <= self.ema < 1
        ):
            raise ValueError(
                "loop: save_every, evaluate_every, sample_every, max_failed_saves and rollbacks must not be negative "
                "and ema in [0, 1)"
            )
        if self.spike_factor != 0 and self.spike_factor <= 1:
            raise ValueError(
                f"loop.spike_factor {self.spike_factor} must be above 1, since it multiplies the usual norm, or 0 for off"
            )


@dataclasses.dataclass(frozen=True)
class VAETrainConfig:
    """Batches of crops (frames, height, width) and the weights of the loss terms.

    reconstruction is 'l1', 'l2' or 'huber'; perceptual and adversarial terms are added by train.vae.TERMS. half_size_weight is
    that of the squared error of pictures of half the height and width, decoded from latents averaged over 2x2 cells, so that
    what is fine in latents is what is fine in pictures (scale equivariance, arXiv:2502.14831); 0 leaves it out.
    """

    batch: int
    crop: tuple[int, int, int]
    reconstruction: str
    kl_weight: float
    half_size_weight: float

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.crop) < 1 or min(self.kl_weight, self.half_size_weight) < 0:
            raise ValueError(
                "vae_train: batch and crop must be positive, and kl_weight and half_size_weight not negative"
            )
        if self.reconstruction not in ("l1", "l2", "huber"):
            raise ValueError(f"vae_train.reconstruction {self.reconstruction!r} is none of l1, l2, huber")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """encoder: 'minilm' (frozen), 'scratch' (trained with the DiT) or 'auto' (minilm where it is installed)."""

    encoder: str
    max_tokens: int
    scratch: TextEncoderConfig

    def __post_init__(self) -> None:
        if self.encoder not in ("minilm", "scratch", "auto"):
            raise ValueError(f"text.encoder {self.encoder!r} is none of minilm, scratch, auto")
        if not 2 <= self.max_tokens <= self.scratch.max_tokens:
            raise ValueError(
                f"text.max_tokens {self.max_tokens} must be in 2..text.scratch.max_tokens ({self.scratch.max_tokens})"
            )


ALONG = ("steps", "model", "frontier")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """What a DiT's training steps may cost in all: `multiplier` times `budget` FLOPs; compute.scaled turns it into a run.

    budget 0 is what loop.steps of the model as written cost. The multiplier is spent along 'steps' (the model as written,
    longer), 'model' (as many steps, wider and deeper) or 'frontier' (both: the model's FLOPs grow as multiplier ** exponent).
    """

    budget: float
    multiplier: float
    along: str
    exponent: float

    def __post_init__(self) -> None:
        if self.along not in ALONG:
            raise ValueError(f"compute.along {self.along!r} is none of {', '.join(ALONG)}")
        if self.budget < 0 or self.multiplier <= 0 or not 0 <= self.exponent <= 1:
            raise ValueError("compute: budget must not be negative, multiplier positive and exponent in [0, 1]")


@dataclasses.dataclass(frozen=True)
class VAERun:
    """Training the video VAE. shape is its architecture."""

    seed: int
    data: DataConfig
    vae: VAEConfig
    vae_train: VAETrainConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        crop, world = self.vae_train.crop, self.data.world
        self.vae.latent_shape(*crop)
        smallest = (min(world.frame_counts), *(min(size[axis] for size in world.clip_sizes) for axis in range(2)))
        if any(need > have for need, have in zip(crop, smallest, strict=True)):
            raise ValueError(f"vae_train.crop {crop} is larger than the world's smallest clip {smallest}; crop less")
        _, *cells, _ = self.vae.latent_shape(*crop)
        if self.vae_train.half_size_weight and any(count % 2 for count in cells):
            raise ValueError(
                f"vae_train.crop {crop} has {cells[0]}x{cells[1]} latents, which vae_train.half_size_weight halves; "
                f"crop a multiple of {2 * self.vae.stride[1]}x{2 * self.vae.stride[2]} pixels, or set it to 0"
            )


@dataclasses.dataclass(frozen=True)
class DiTRun:
    """Training the diffusion transformer on the latents of the VAE at vae_checkpoint (a work dir or its checkpoints)."""

    seed: int
    vae_checkpoint: str
    data: DataConfig
    text: TextConfig
    dit: DiTConfig
    pack: PackConfig
    loader: LoaderConfig
    flow: TimeConfig
    sampler: SamplerConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    compute: ComputeConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        _check_vae(self.vae_checkpoint)
        check_lanes(self.pack, self.loader)
        if max(self.data.world.frame_counts) < 2:
            raise ValueError(
                f"data.world.frame_counts {self.data.world.frame_counts} are images alone; what is sampled is judged by how it "
                "moves, too: add a count of 5 or more"
            )


@dataclasses.dataclass(frozen=True)
class CaptionerRun:
    """Training the captioner on the latents of the VAE at vae_checkpoint. loader.long_captions is the share of descriptive
    captions among those that it learns to write."""

    seed: int
    vae_checkpoint: str
    data: DataConfig
    captioner: CaptionerConfig
    pack: PackConfig
    loader: LoaderConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        _check_vae(self.vae_checkpoint)
        check_lanes(self.pack, self.loader)
        if self.loader.caption_dropout or any(dataclasses.asdict(self.loader.known).values()):
            raise ValueError(
                "a captioner is given all of a clip and says all of its caption: loader.caption_dropout and the "
                "shares of loader.known must be 0"
            )
        if self.data.world.to_and_fro:
            raise ValueError(
                "captions do not tell of clips that are played to and fro: data.world.to_and_fro must be 0"
            )
        if self.captioner.max_tokens > self.pack.row_text:
            raise ValueError(
                f"captioner.max_tokens {self.captioner.max_tokens} must not exceed pack.row_text {self.pack.row_text}"
            )


def _check_vae(checkpoint: str) -> None:
    if not checkpoint:
        raise ValueError("vae_checkpoint is empty; give the work dir of a trained VAE with --config.vae_checkpoint=DIR")


MAX_INT = 2**53
MAX_SHOWN = 200

GROUPS = ("ladder", "isoflop", "models", "rates", "prompting", "framing", "rollout")


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """Several stages (VAERun or DiTRun), trained in `order`, and what is measured at the end.

    A DiT whose vae_checkpoint is the name of a stage works with that stage's VAE. groups names the DiT stages that belong
    together: 'ladder', the same with more and more compute, shown side by side, where runs that differ in nothing but their
    seed are one rung; 'isoflop', models of several sizes at several budgets, to which the laws of study/laws.py are fitted;
    'models', several sizes and patches at equal steps; 'rates', several widths, each at several rates; 'prompting', models that are
    prompted with images and videos in every way (study/prompting.py); 'framing', models of clips of native and of square frames;
    'rollout', models that make frames together and one after the other (study/baselines.py). Of the ladder and the models all are
    sampled, without either the last DiT: on `prompts` held-out prompts, of which the report shows `shown`.
    """

    title: str
    order: tuple[str, ...]
    stages: dict[str, Any]
    groups: dict[str, Any]
    prompts: int
    shown: int
    seed: int

    def __post_init__(self) -> None:
        # JSON gives lists.
        if not all(
            isinstance(members, list | tuple) and all(isinstance(each, str) for each in members)
            for members in self.groups.values()
        ):
            raise ValueError("groups must hold lists of the names of stages")
        object.__setattr__(self, "groups", {name: tuple(members) for name, members in self.groups.items()})
        if not self.stages or sorted(self.order) != sorted(self.stages):
            raise ValueError(f"order {self.order} must name each of the stages once: {', '.join(self.stages)}")
        if others := [name for name, stage in self.stages.items() if not isinstance(stage, VAERun | DiTRun)]:
            raise ValueError(f"stage {others[0]} is of a kind that a study does not train; it trains VAEs and DiTs")
        for name, members in self.groups.items():
            if name not in GROUPS:
                raise ValueError(f"groups has no key {name!r}; its keys are {', '.join(GROUPS)}")
            strangers = [each for each in members if not isinstance(self.stages.get(each), DiTRun)]
            if strangers or not members:
                raise ValueError(f"groups.{name} must name DiT stages, not {', '.join(strangers) or 'nothing'}")
        if self.prompts < 1 or not 0 <= self.shown <= self.prompts:
            raise ValueError(f"prompts {self.prompts} must be positive and shown {self.shown} no more than that")
        if self.seed < 0 or self.seed + self.prompts > 2**31:
            raise ValueError(
                f"seed {self.seed} and those of the {self.prompts} prompts after it must be in 0..{2**31 - 1}"
            )
        if self.prompts < 2 and {"ladder", "models"} & set(self.groups):
            raise ValueError(
                "prompts is 1; a ladder and models are also judged as sets of videos, which have 2 or more"
            )
        if len({self.stages[name].data.world for name in self.groups.get("ladder", ())}) > 1:
            raise ValueError(
                "stages of groups.ladder show the same prompts side by side: their data.world must be the same"
            )


RUNS = {"vae": VAERun, "dit": DiTRun, "captioner": CaptionerRun, "study": StudyRun}
Run = VAERun | DiTRun | CaptionerRun | StudyRun


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key."""


def from_config_dict(tree: Any) -> Run:
    """The frozen run of a ConfigDict (or of plain dicts, such as resolved JSON).

    tree["task"] names the kind of run. Raises ConfigError for an unknown or missing key, a wrong type or a value that the
    dataclass of the part refuses.
    """
    tree = plain(tree)
    if not isinstance(tree, dict):
        raise ConfigError(f"config is {_shown(tree)}; it must hold task and the keys of a run")
    task = tree.pop("task", None)
    if not isinstance(task, str) or task not in RUNS:
        raise ConfigError(f"config.task is {_shown(task)}; it must be one of {', '.join(RUNS)}")
    if task == "study":
        stages = tree.get("stages") or {}
        if not isinstance(stages, dict) or any(
            isinstance(each, dict) and each.get("task") == "study" for each in stages.values()
        ):
            raise ConfigError(
                f"config.stages is {_shown(stages)}; it must hold stages by name, none of which is a study"
            )
        stages = {name: from_config_dict(stage) for name, stage in stages.items()}
        return _checked(StudyRun, tree | {"stages": stages}, "config")
    return _checked(RUNS[task], tree, "config")


# Keys that configs did not always have, with what was done before.
LOOP_ADDED = {"loop.max_failed_saves": 0, "loop.spike_factor": 0.0, "loop.rollbacks": 0}
WORLD_ADDED = {"data.world.square": False, "data.world.to_and_fro": 0.0}
ADDED: dict[str, dict[str, Any]] = {
    "vae": LOOP_ADDED | WORLD_ADDED | {"vae_train.half_size_weight": 0.0},
    "dit": LOOP_ADDED
    | WORLD_ADDED
    | {"dit.predict": "velocity", "dit.attention": "auto", "loader.lanes": 1}
    | {"loader.patience": 0.0, "loader.skip_quota": 0.0, "loader.known.next_frame": 0.0}
    | {"loader.squeezed": 0.0, "flow.posterior": 1.0, "flow.emphasis": 0.0}
    | {"flow.known_noise": 0.0, "sampler.base_tokens": 0, "sampler.guidance_interval": (0.0, 1.0)}
    | {"sampler.guidance_rescale": 0.0, "sampler.known_guidance": 1.0, "sampler.guidance_going_on": 2.0}
    | {"sampler.restart": 0.0},
}
NOTHING_KNOWN = dataclasses.asdict(KnownConfig())


def from_stored(tree: Any) -> Run:
    """The run of a config that was stored with a checkpoint, perhaps before all of today's keys were there."""
    tree = plain(tree)
    task = tree.get("task") if isinstance(tree, dict) else None
    loading = tree.get("loader") if isinstance(tree, dict) else None
    if isinstance(loading, dict) and "known_frames" in loading:
        loading["known"] = NOTHING_KNOWN | {"first_frames": loading.pop("known_frames")}
    if task == "vae" and "vae" in tree:
        tree["vae"] = _with_encoder_frames(tree["vae"])
    for path, value in ADDED.get(task, {}).items() if isinstance(task, str) else ():
        *parts, key = path.split(".")
        part = tree
        for name in parts:
            part = part.get(name) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.setdefault(key, value)
    return from_config_dict(tree)


def to_dict(run: Any) -> dict[str, Any]:
    """Plain dicts, the inverse of from_config_dict; json.dumps of it is the resolved config."""

    def convert(value: Any) -> Any:
        if type(value) in RUNS.values():
            return to_dict(value)
        if dataclasses.is_dataclass(value):
            return {field.name: convert(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, tuple) else value

    task = next(name for name, kind in RUNS.items() if type(run) is kind)
    return {"task": task} | {field.name: convert(getattr(run, field.name)) for field in dataclasses.fields(run)}


def to_json(run: Run) -> str:
    return json.dumps(to_dict(run), indent=2)


def plain(tree: Any) -> Any:
    """ConfigDicts and mappings as dicts, all the way down."""
    if hasattr(tree, "to_dict"):
        tree = tree.to_dict()
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return tree


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """'key: old -> new' for every leaf that differs between two resolved configs."""
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{where}{key}.")
        elif before != after:
            found.append(f"{where}{key}: {before!r} -> {after!r}")
    return found


def _checked(kind: Any, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind`, every field given and of its type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {_shown(values)}; it must hold the keys of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown, missing = [k for k in values if k not in names], [n for n in names if n not in values]
    if unknown or missing:
        problem = f"has no key {_shown(unknown[0])}" if unknown else f"lacks the key {missing[0]!r}"
        raise ConfigError(f"{where} {problem}; its keys are {', '.join(names)}")
    fields = {name: _typed(hints[name], values[name], f"{where}.{name}") for name in names}
    try:
        return kind(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    """value as the type of hint; an int may stand for a float and a list for a tuple."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _checked(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {_shown(value)}; it must be a tuple")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{where} is {_shown(value)}; it must have {len(arguments)} entries")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _typed(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_shown(value)}; it must hold values by name")
        return dict(value)
    # What is larger than this no device counts, and no sum of it is exact.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INT:
        raise ConfigError(f"{where} is {_shown(value)}; it must be between -{MAX_INT} and {MAX_INT}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {_shown(value)}; it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; it must be finite")
    return value


def _shown(value: Any) -> str:
    """A value for a sentence, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        text = f"a {type(value).__name__} of {value.bit_length()} bits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def sampler_config(tree: Any) -> SamplerConfig:
    """The sampler's settings from JSON, as a manifest keeps them. Raises ConfigError."""
    return _checked(SamplerConfig, tree, "sampler")


def vae_config(tree: Any) -> VAEConfig:
    """The VAE's architecture from JSON, as a DiT's checkpoint keeps it. Raises ConfigError."""
    return _checked(VAEConfig, _with_encoder_frames(tree), "vae")


def _with_encoder_frames(tree: Any) -> Any:
    """A stored VAE's keys: once the encoder's kernel had as many frames as the decoder's, and one was named for both."""
    kernel = tree.get("kernel") if isinstance(tree, dict) else None
    return {"encoder_frames": kernel[0]} | tree if isinstance(kernel, list | tuple) and kernel else tree


def stored_number(meta: Mapping[str, Any], name: str, where: object) -> float:
    """A number of a checkpoint's meta. Raises ConfigError if it is none."""
    value = meta.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} of the checkpoint in {where} is {_shown(value)}; it must be a number from 0 on")
    return float(value)

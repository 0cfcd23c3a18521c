"""The task of training the diffusion transformer."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Float

from sora_jax import compute, config, processes, sharding
from sora_jax.config import DiTRun
from sora_jax.data import latents, loader, masks, pack
from sora_jax.data.worlds import captions, world
from sora_jax.diffusion import flow
from sora_jax.evaluate import validation
from sora_jax.generate import files, pipeline
from sora_jax.models import dit
from sora_jax.models.vae import VAEConfig
from sora_jax.nn.layers import abstract, parameters
from sora_jax.structs import PackedBatch, Share, TrainState
from sora_jax.text import encode as text_encode
from sora_jax.text.captions import CaptionText
from sora_jax.train.on_latents import Counted, OnLatents

SHOWN_PROMPTS = 8
# Keys of the independent draws of a clip.
TIME, LATENT, NOISE, VALIDATION, LEVEL, ON_KNOWN = range(6)
GOLDEN = 0.6180339887


def resolve(run: DiTRun) -> DiTRun:
    """The run with everything decided that the config leaves open: the text encoder, then steps and model from the budget."""
    return compute.scaled(with_encoder(run))


def with_encoder(run: DiTRun) -> DiTRun:
    """The run with the text encoder 'auto' become what is installed, and a model that takes its states."""
    encoder = text_encode.resolve(run.text.encoder)
    scratch = encoder == "scratch"
    model = dataclasses.replace(
        run.dit,
        text=run.text.scratch if scratch else None,
        text_width=run.text.scratch.width if scratch else text_encode.text_encoder.MINILM.width,
    )
    return dataclasses.replace(run, text=dataclasses.replace(run.text, encoder=encoder), dit=model)


def longest_clip(run: DiTRun, network: VAEConfig) -> tuple[int, tuple[int, int, int]]:
    """(tokens, (frames, height, width)) of the longest clip of the run's world.

    Raises ConfigError if no row can hold it, or one of which a part is known, as it would be left out.
    """
    world = run.data.world
    tokens, size = max(
        (math.prod(pack.grid_shape(network.latent_shape(frames, *size), run.dit.patch)), (frames, *size))
        for frames in world.frame_counts
        for size in world.clip_sizes
    )
    if tokens > run.pack.row_tokens:
        raise config.ConfigError(
            f"the world's longest clip has {tokens} tokens and would be left out; "
            f"raise pack.row_tokens ({run.pack.row_tokens}) or make clips shorter or smaller"
        )
    if run.pack.row_slots < 2 and run.loader.known.gives:
        raise config.ConfigError("a clip of which a part is known has two slots; raise pack.row_slots (1) to 2 or more")
    return tokens, size


class Asked(NamedTuple):
    """Points of the flow's path and the velocities there. weight is 1 of the tokens that count: those to be made."""

    noisy_BNP: Float[Array, "B N P"]
    time_BS: Float[Array, "B S"]
    target_BNP: Float[Array, "B N P"]
    weight_BN: Float[Array, "B N"]


class Objective:
    """What a DiT of a run is trained on: the flow-matching loss of packed rows on unknown tokens."""

    def __init__(self, run: DiTRun) -> None:
        self.run = run
        self.graphdef = nnx.split(abstract(dit.DiT, run.dit), nnx.Param)[0]

    def __call__(self, params: Any, rest: Any, batch: PackedBatch, key: Array) -> tuple[Array, dict[str, Array]]:
        """The loss of a training step, as loop.Loss.

        Times and noise are keyed by (seed, clip, draw) rather than by the step's key: neither mesh nor packing nor the number
        of hosts changes what a clip is trained on.
        """
        root = jax.random.key(self.run.seed)
        normal_BS = flow.slot_normal(jax.random.fold_in(root, TIME), batch.clip_BS, batch.draw_BS)
        asked = self.asked(batch, flow.times(normal_BS, self.run.flow), root, self.run.flow.known_noise)
        predicted_BNP = self.predicted(params, batch, asked)
        emphasis_P = self._emphasis(rest, batch.mean_BNP.shape[-1])
        loss, _ = flow.loss(emphasis_P * predicted_BNP, emphasis_P * asked.target_BNP, asked.weight_BN)
        return loss, {"weight": asked.weight_BN.sum()}

    def predicted(self, params: Any, batch: PackedBatch, asked: Asked) -> Array:
        """The model's velocities (B, N, P)."""
        return nnx.merge(self.graphdef, params)(asked.noisy_BNP, asked.time_BS, batch.layout)

    def asked(self, batch: PackedBatch, time_BS: Array, root: Array, known_noise: float = 0.0) -> Asked:
        """What a model of a batch is asked at these times, which a slot's ceiling lowers. known_noise is as in flow.TimeConfig."""
        layout = batch.layout
        clip_BN = flow.spread(batch.clip_BS, layout.slot_BN)
        draw_BN = flow.spread(batch.draw_BS, layout.slot_BN)
        patch_dim = batch.mean_BNP.shape[-1]

        def draw(purpose: int) -> Array:
            noise_BNP = flow.token_noise(jax.random.fold_in(root, purpose), clip_BN, draw_BN, batch.index_BN, patch_dim)
            # For the same reason as in nn.layers.whole: a patch is whole on a device.
            return sharding.constrain(noise_BNP, "rows", "tokens", "none")

        clean_BNP, noise_BNP = batch.mean_BNP, draw(NOISE)
        if self.run.flow.posterior:
            clean_BNP = clean_BNP + self.run.flow.posterior * batch.std_BNP * draw(LATENT)
        time_BS = batch.ceiling_BS * time_BS
        time_BN, ceiling_BN = (flow.spread(x_BS, layout.slot_BN) for x_BS in (time_BS, batch.ceiling_BS))
        if known_noise:
            normal_BS = flow.slot_normal(jax.random.fold_in(root, LEVEL), batch.clip_BS, batch.draw_BS)
            level_BN = known_noise * flow.spread(ndtr(normal_BS), layout.slot_BN) * (ceiling_BN == 0)
            clean_BNP = clean_BNP + level_BN[..., None] * draw(ON_KNOWN)
        return Asked(
            noisy_BNP=flow.corrupt(clean_BNP, noise_BNP, time_BN),
            time_BS=time_BS,
            target_BNP=flow.velocity(clean_BNP, noise_BNP),
            weight_BN=((layout.segment_BN > 0) & (ceiling_BN > 0)).astype(jnp.float32),
        )

    def bounds(self, batch: PackedBatch, asked: Asked) -> dict[str, Array]:
        """Velocities (B, N, P) between which a model's are good. 'floor' are those of who knows the clip and all of it but what of
        its posterior's noise is trained on; 'ceiling' those of who knows only that latents have a deviation of one."""
        time_BN = flow.spread(asked.time_BS, batch.layout.slot_BN)
        known = {"floor": (batch.mean_BNP, self.run.flow.posterior * batch.std_BNP), "ceiling": (0.0, 1.0)}
        return {
            name: flow.velocity_of_gaussian(asked.noisy_BNP, mean, std, time_BN) for name, (mean, std) in known.items()
        }

    def _emphasis(self, rest: Any, patch_dim: int) -> Array | float:
        """What errors are multiplied by, (P,): their squares as flow.TimeConfig's emphasis says, with a mean of 1."""
        if not self.run.flow.emphasis:
            return 1.0
        weight_C = rest["vae"]["rest"]["latent_std"] ** self.run.flow.emphasis
        return jnp.tile(jnp.sqrt(weight_C / weight_C.mean()), patch_dim // len(weight_C))


class DiTTask(OnLatents):
    """loop.Task of a DiTRun. Encodes the world's clips and captions into `encoded` before the first step."""

    run: DiTRun

    def __init__(self, run: DiTRun, encoded: Path) -> None:
        asked, run = run, resolve(run)
        if asked.compute.budget and asked.loop.steps not in (1, run.loop.steps):
            logging.warning(
                "compute.budget buys %d steps, and loop.steps=%d counts for nothing; set compute.budget=0 to train so many",
                run.loop.steps, asked.loop.steps,
            )  # fmt: skip
        super().__init__(run, encoded, "dit", compute.dit_step(run.dit, run.pack).total, Objective(run))
        self.sizes["heads"] = run.dit.common_heads
        longest_clip(run, self.vae_config)  # refused before all clips are encoded

    # Data ------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def text(self) -> CaptionText:
        text = CaptionText(self.run.text, self.run.text.encoder, self.encoded / "captions.npz")
        captions = self._captions  # which all processes make together, and not the first alone
        processes.first_then_all(lambda: text.prepare(captions))
        return text

    @functools.cached_property
    def _captions(self) -> list[str]:
        return ["", *latents.unique_captions(list(self.stores.values()))]

    def _caption_flops(self) -> float:
        if self.text.width is None:  # learned, and so a part of every step
            return 0.0
        tokens = sum(len(states_LM) for states_LM, _ in map(self.text, self._captions) if states_LM is not None)
        rows = math.ceil(tokens / text_encode.ROW_TOKENS)
        products = compute.text_encoder(text_encode.text_encoder.MINILM, rows, text_encode.ROW_TOKENS)
        return sum(each.flops for each in products)

    def _tokeniser(self, packing: pack.PackConfig, settings: loader.LoaderConfig) -> loader.Tokeniser:
        return loader.Tokeniser(settings, packing, self.geometry, self.text, self.run.seed)

    def batches(self, share: Share) -> Iterator[tuple[PackedBatch, dict[str, float]]]:
        tokeniser = self._tokeniser(self.run.pack, self.run.loader)
        return Counted(loader.batches(self.stores["train"], tokeniser, self.text.width, share))

    # Loss ------------------------------------------------------------------------------------------------------------

    def init(self, key: Array) -> tuple[Any, Any]:
        return parameters(dit.DiT(self.run.dit, nnx.Rngs(key))), {
            "vae": {"params": self.vae_params, "rest": self.vae_rest}
        }

    # Judgement -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _slot_errors(self) -> Any:
        """(time, tokens, squared errors of the model, and of the loss's floor and ceiling) of every slot of a batch."""

        def one(params: Any, batch: PackedBatch) -> tuple[Array, ...]:
            # Stratified: clip ids walk through the quantiles of the training times.
            quantile_BS = ((batch.clip_BS + 0.5) * GOLDEN) % 1.0
            root = jax.random.fold_in(jax.random.key(0), VALIDATION)
            time_BS = flow.times(ndtri(quantile_BS), self.run.flow)
            asked = self.objective.asked(batch, time_BS, root)
            bounds = self.objective.bounds(batch, asked)
            predictions = self.objective.predicted(params, batch, asked), *(bounds[name] for name in validation.BOUNDS)
            errors = [flow.loss(each, asked.target_BNP, asked.weight_BN)[1] * asked.weight_BN for each in predictions]
            slots_BNS = jax.nn.one_hot(batch.layout.slot_BN, batch.clip_BS.shape[1])
            sums = [jnp.einsum("bn,bns->bs", x_BN, slots_BNS) for x_BN in (asked.weight_BN, *errors)]
            return sharding.everywhere((time_BS, *sums))

        return jax.jit(one)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Flow loss of the averaged weights on held-out clips: fixed noise, stratified times, prompts always given, and of a model
        of the next frame alone, all before that frame."""
        next_frame = float(self.run.loader.known.next_frame == 1)
        plain = loader.LoaderConfig(0.0, 0.0, known=masks.KnownConfig(next_frame=next_frame))
        packing = dataclasses.replace(self.run.pack, drop_rate=0.0, drop_repeats=0.0)
        store, (st, sh, sw) = self.stores["heldout"], self.vae_config.stride
        shapes = dict(zip(store.ids.tolist(), store.shapes.tolist(), strict=True))
        found: list[tuple[float, ...]] = []
        sizes: list[tuple[int, ...]] = []
        for batch, _ in loader.fixed_batches(store, self._tokeniser(packing, plain), self.text.width):
            slots = zip(
                batch.clip_BS.ravel().tolist(),
                *(np.ravel(x).tolist() for x in jax.device_get(self._slot_errors(state.ema, batch))),
                strict=True,
            )
            for clip, time, tokens, *errors in slots:
                if tokens:
                    t, h, w = shapes[clip]
                    found.append((time, tokens, *errors))
                    sizes.append((1 + (t - 1) * st, h * sh, w * sw))
        time_n, tokens_n, error_n, *bounds = np.array(found, np.float64).T
        of_bounds = dict(zip(validation.BOUNDS, bounds, strict=True))
        return validation.scores(validation.Errors(error_n, tokens_n, time_n, sizes, of_bounds))

    def sample(self, state: TrainState, path: Path) -> None:
        """A contact sheet of held-out prompts, always the same prompts and seeds."""
        scenes = heldout_videos(self.run.data.world, SHOWN_PROMPTS)
        sizes = len(self.run.data.world.sizes) > 1
        prompts = [captions.prompt(scene, sizes) for scene in scenes]
        requests = [
            request_of(scene, prompt, seed) for seed, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True))
        ]
        made = self.pipeline(state).sample(requests, self.run.sampler)
        if processes.is_first():
            files.write_image(path, files.contact_sheet(made, labels=prompts))

    def pipeline(self, state: TrainState) -> pipeline.Pipeline:
        weights = state.rest["vae"]
        text = CaptionText(self.run.text, self.run.text.encoder, self.encoded / "captions.npz")
        return pipeline.Pipeline(self.run, self.vae_config, state.ema, (weights["params"], weights["rest"]), text)


def heldout_videos(config: world.WorldConfig, count: int, start: int = 0, frames: int = 2) -> list[Any]:
    """The first `count` held-out scenes from `start` on of at least `frames` frames: a single one shows no motion.

    Raises ValueError if the world has no clips that long.
    """
    if max(config.frame_counts) < frames:
        raise ValueError(
            f"videos of {frames} frames are needed; the longest clips of this world have {max(config.frame_counts)}: "
            "train on longer ones"
        )
    found: list[Any] = []
    index = start
    while len(found) < count:
        scene = world.sample_scene(config, "heldout", index)
        index += 1
        if scene.num_frames >= frames:
            found.append(scene)
    return found


def request_of(scene: Any, prompt: str, seed: int) -> pipeline.Request:
    """The request that asks for what a scene shows."""
    return pipeline.Request(prompt, scene.height, scene.width, scene.num_frames, scene.fps, seed)

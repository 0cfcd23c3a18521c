"""From requests to videos: text states, noise keyed by seed, packed rows, the sampler, the VAE's decoder.

Every mode of prompting is the same call: known latents are held at time 0 while the rest is denoised.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sora_jax import checkpoint, config, sharding
from sora_jax.config import DiTRun
from sora_jax.data import pack
from sora_jax.diffusion import flow, sampler
from sora_jax.generate.codec import Codec
from sora_jax.models import dit, vae
from sora_jax.nn import attention, kernels
from sora_jax.structs import Layout, PackedBatch
from sora_jax.text.captions import CaptionText

# The root of sampling noise: with it and a request's seed, its noise is the same in every model and every packing.
NOISE_KEY = 0
# Rows are as long as the longest clip needs, in steps of this, so that few lengths compile.
ROW_STEP = 32
# Tokens that are denoised together, where rows are split over devices on each of them.
BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to make: frames must be 1 + 4k and sizes multiples of 8 (for a 4x8x8 VAE). known_thwc gives the first latents."""

    prompt: str
    height: int
    width: int
    frames: int
    fps: float
    seed: int
    known_thwc: np.ndarray | None = None


class Pipeline:
    """A trained model, ready to sample, on a mesh, or on that of the context. The run's text encoder is resolved."""

    def __init__(
        self,
        run: DiTRun,
        vae_config: vae.VAEConfig,
        params: Any,
        vae_weights: tuple[Any, Any],
        text: CaptionText,
        mesh: Mesh | None = None,
    ) -> None:
        self.run, self.params, self.text, self.mesh = run, params, text, mesh
        self.codec = Codec(vae_config, *vae_weights)
        self.geometry = pack.Geometry(run.dit.patch, vae_config.stride)
        self.vae_config = vae_config
        self._denoise = jax.jit(denoiser(run.dit), static_argnames="settings")

    def sample(self, requests: Sequence[Request], settings: sampler.SamplerConfig) -> list[np.ndarray]:
        """uint8 videos (T, H, W, 3), in order. Raises ValueError for sizes the model cannot make."""
        latents = self.sample_latents(requests, settings)
        with self._on_mesh():
            return self.codec.decode(latents)

    def sample_latents(self, requests: Sequence[Request], settings: sampler.SamplerConfig) -> list[np.ndarray]:
        """Normalised latents (t, h, w, c), in order."""
        self.text.prepare(["", *(request.prompt for request in requests)])
        clips = [self._tokens(number, request, request.prompt) for number, request in enumerate(requests)]
        unprompted = [self._tokens(number, request, "") for number, request in enumerate(requests)]
        with self._on_mesh():
            patches = self._denoised(clips, unprompted, [request.seed for request in requests], settings)
        shapes = [self._latent_shape(request) for request in requests]
        return [pack.unpatchify(patches[i], shape, self.geometry.patch) for i, shape in enumerate(shapes)]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _denoised(
        self,
        clips: Sequence[pack.Tokens],
        unprompted: Sequence[pack.Tokens],
        seeds: Sequence[int],
        settings: sampler.SamplerConfig,
    ) -> dict[int, np.ndarray]:
        """Clean patches (n, P) of every clip."""
        packing = packing_for([len(clip.index_N) for clip in clips], max(clip.num_text for clip in clips))
        rows, _ = pack.pack_rows(clips, packing, np.random.default_rng(0))

        def batch_of(rows: Sequence[Sequence[pack.Tokens]]) -> PackedBatch:
            return pack.stack([pack.fill_row(row, packing, self.run.dit.patch_dim, self.text.width) for row in rows])

        found: dict[int, np.ndarray] = {}
        for start in range(0, len(rows), packing.rows):
            some = rows[start : start + packing.rows]
            some = some + [[]] * (packing.rows - len(some))
            batch, blind = batch_of(some), batch_of([[unprompted[clip.clip] for clip in row] for row in some])
            seed_BS = np.asarray(seeds, np.int32)[batch.clip_BS]
            clean = self._denoise(self.params, batch, blind.layout, seed_BS, settings=settings)
            found |= pack.unpack(np.asarray(clean), batch)
        return found

    def _latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        return self.vae_config.latent_shape(request.frames, request.height, request.width)

    def _tokens(self, number: int, request: Request, prompt: str) -> pack.Tokens:
        shape = self._latent_shape(request)
        t, h, w = pack.grid_shape(shape, self.geometry.patch)
        clean = np.zeros(shape, np.float32)
        known = np.zeros(t * h * w, bool)
        if request.known_thwc is not None:
            clean[: len(request.known_thwc)] = request.known_thwc
            known[: len(request.known_thwc) // self.geometry.patch[0] * h * w] = True
        text_LM, text_token_L = self.text(prompt)
        return pack.Tokens(
            mean_NP=pack.patchify(clean, self.geometry.patch),
            std_NP=np.zeros((t * h * w, self.run.dit.patch_dim), np.float32),
            position_N3=pack.positions(shape, self.geometry, request.fps),
            index_N=np.arange(t * h * w, dtype=np.int32),
            known_N=known,
            extent_3=pack.extent(shape, self.geometry, request.fps),
            clip=number,
            draw=0,
            text_LM=text_LM,
            text_token_L=text_token_L,
        )


def packing_for(tokens: Sequence[int], most_text: int) -> pack.PackConfig:
    """Rows for clips of so many tokens, on the mesh of the context: no longer than the longest clip needs, and as many at a time
    as BATCH_TOKENS allows."""
    # Kernels of long rows take tokens, and the text's too, in steps of their own.
    step = ROW_STEP if max(tokens) ** 2 <= attention.SHORT else kernels.SPLASH_LANES
    longest = _up(max(tokens), step * sharding.shards("tokens"))
    share = max(1, longest // min(tokens))
    over = sharding.shards("rows")
    rows = max(1, min(over * BATCH_TOKENS // longest, -(-sum(tokens) // longest)))
    return pack.PackConfig(
        rows=_up(rows, over),
        row_tokens=longest,
        row_slots=2 * share,
        row_text=_up(most_text * share, step),
        window=len(tokens),
    )


def denoiser(config: dit.DiTConfig) -> Callable[..., jax.Array]:
    """denoise(params, batch, blind, seed_BS, settings) -> clean patches (B, N, P): a whole batch from its noise, one program.

    blind is the batch's layout without prompts, seed_BS a seed for every slot; known slots are held at time 0.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, nnx.Rngs(0))), nnx.Param)[0]

    def denoise(
        params: Any, batch: PackedBatch, blind: Layout, seed_BS: jax.Array, settings: sampler.SamplerConfig
    ) -> jax.Array:
        model = nnx.merge(graphdef, params)
        layout = batch.layout
        seed_BN = spread_slots(seed_BS, layout.slot_BN)
        known_BN = spread_slots(batch.known_BS, layout.slot_BN) & (layout.segment_BN > 0)
        noise_BNP = flow.token_noise(
            jax.random.key(NOISE_KEY), seed_BN, jnp.zeros_like(seed_BN), batch.index_BN, batch.mean_BNP.shape[-1]
        )
        # With and without prompt in one batch: one program, and guidance needs both at every step.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), layout, blind)

        def velocity(noisy_BNP: jax.Array, time: jax.Array) -> jax.Array:
            time_BS = jnp.where(batch.known_BS, 0.0, time)
            if settings.guidance == 1:
                return model(noisy_BNP, time_BS, layout)
            twice = model(jnp.concatenate([noisy_BNP] * 2), jnp.concatenate([time_BS] * 2), both)
            conditional, unconditional = jnp.split(twice, 2)
            return sampler.guided(conditional, unconditional, settings.guidance)

        return sharding.everywhere(sampler.sample(velocity, noise_BNP, settings, known_BN, batch.mean_BNP))

    return denoise


def spread_slots(x_BS: Any, slot_BN: Any) -> Any:
    """A slot's value for each of its tokens."""
    return jnp.take_along_axis(x_BS, slot_BN, axis=1)


def load_run(path: Path, step: int | None = None) -> DiTRun:
    """The resolved config of a DiT's work dir. Raises FileNotFoundError or ConfigError."""
    meta = checkpoint.read_meta(path, step)
    run = config.from_stored(meta.get("config"))
    if not isinstance(run, DiTRun):
        raise config.ConfigError(
            f"{path} holds a {meta['config']['task']} checkpoint; give the work dir of a trained DiT"
        )
    return run


def load(path: Path, step: int | None = None, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline of a DiT's work dir, from its averaged weights; the VAE's weights are in the same checkpoint.

    Without a mesh it runs on one device. Raises FileNotFoundError if there is no checkpoint, ConfigError if it is not one of a
    DiT, and ValueError if the model does not divide over the mesh.
    """
    run = load_run(path, step)
    vae_config = config.vae_config(checkpoint.read_meta(path, step).get("vae"))
    like = jax.eval_shape(lambda: initial_weights(run, vae_config, jax.random.key(0)))
    mesh = mesh or sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    whole = sharding.replicated(mesh)
    placed = sharding.parameter_shardings(like[0], mesh), jax.tree.map(lambda _: whole, like[1])
    like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, placed)
    items = checkpoint.restore(path, {"ema": like[0], "rest": like[1]}, step).items
    weights = items["rest"]["vae"]
    return Pipeline(
        run,
        vae_config,
        items["ema"],
        (weights["params"], weights["rest"]),
        CaptionText(run.text, run.text.encoder),
        mesh,
    )


def initial_weights(run: DiTRun, vae_config: vae.VAEConfig, key: jax.Array) -> tuple[Any, Any]:
    """(params, rest) of a DiT run: the transformer's parameters, and the VAE it works with, which it does not train."""
    _, params = nnx.split(dit.DiT(run.dit, nnx.Rngs(key)), nnx.Param)
    _, vae_params, vae_rest = vae.split(vae.VAE(vae_config, nnx.Rngs(key)))
    rest = {"vae": {"params": nnx.to_pure_dict(vae_params), "rest": nnx.to_pure_dict(vae_rest)}}
    return nnx.to_pure_dict(params), rest


def load_vae_config(path: Path) -> vae.VAEConfig:
    """The architecture of the VAE in a work dir. Raises FileNotFoundError or ConfigError."""
    told = checkpoint.read_meta(path).get("config")
    if not isinstance(told, dict) or told.get("task") != "vae":
        raise config.ConfigError(f"{path} holds no VAE checkpoint; give the work dir of a trained VAE")
    # Its architecture alone: how it was trained may be told otherwise by now.
    return config.vae_config(told.get("vae"))


def load_vae(path: Path) -> tuple[vae.VAEConfig, Any, Any]:
    """(config, averaged params, rest) of a VAE's work dir. Raises FileNotFoundError or ConfigError."""
    shape = load_vae_config(path)
    like = jax.eval_shape(lambda: tuple(nnx.to_pure_dict(part) for part in vae.split(vae.VAE(shape, nnx.Rngs(0)))[1:]))
    items = checkpoint.restore(path, {"ema": like[0], "rest": like[1]}).items
    return shape, jax.device_get(items["ema"]), jax.device_get(items["rest"])


def _up(value: int, step: int) -> int:
    return -(-value // step) * step

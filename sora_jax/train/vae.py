"""The task of training the video VAE."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jax import Array
from jaxtyping import Float

from sora_jax import compute, processes, sharding
from sora_jax.config import VAERun, VAETrainConfig
from sora_jax.data.worlds import clips, world
from sora_jax.evaluate import continuity, reader, reconstruction
from sora_jax.generate import codec, files
from sora_jax.models import vae
from sora_jax.nn.layers import abstract
from sora_jax.structs import Clip, Share, TrainState

# Clips whose latents give the statistics that normalise them.
STATISTICS_CLIPS = 256
SHOWN_CLIPS = 8


def reconstruction_error(clean: Array, decoded: Array, kind: str) -> Array:
    """Mean error per value; huber is a smooth l1 that stays l2 below a hundredth of the range."""
    difference = decoded - clean
    if kind == "l1":
        return jnp.mean(jnp.abs(difference))
    if kind == "l2":
        return jnp.mean(jnp.square(difference))
    return jnp.mean(jnp.sqrt(jnp.square(difference) + 1e-4) - 1e-2)


def half_size(x: Float[Array, "B T H W C"]) -> Float[Array, "B T H/2 W/2 C"]:
    """Means over 2x2 places."""
    return reduce(x, "b t (h fh) (w fw) c -> b t h w c", "mean", fh=2, fw=2)


# name -> term(clean, decoded, posterior, config), weight included. A perceptual or adversarial term is one more entry.
Term = Callable[[Array, Array, vae.Posterior, VAETrainConfig], Array]
TERMS: dict[str, Term] = {
    "reconstruction": lambda clean, decoded, _, config: reconstruction_error(clean, decoded, config.reconstruction),
    "kl": lambda _, __, posterior, config: config.kl_weight * jnp.mean(posterior.kl()),
}


@dataclasses.dataclass
class VAETask:
    """loop.Task of a VAERun."""

    run: VAERun

    def __post_init__(self) -> None:
        settings = self.run.vae_train
        self.unit = "clips"
        self.units_per_step = float(settings.batch)
        self.rows = settings.batch
        self.sizes: dict[str, int] = {}
        self.flops_per_step = compute.vae_step(self.run.vae, settings).total
        self.graphdef = vae.split(abstract(vae.VAE, self.run.vae))[0]

    def flops_before(self) -> float:
        return 0.0

    def meta(self) -> dict[str, Any]:
        return {}

    def init(self, key: Array) -> tuple[Any, Any]:
        _, params, rest = vae.split(vae.VAE(self.run.vae, nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def loss(self, params: Any, rest: Any, frames: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(self.graphdef, params, rest)
        clean = sharding.constrain(codec.to_unit(frames), "rows", "none", "none", "none", "none")
        posterior = model.encode(clean)
        latent = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
        decoded = model.decode(latent)
        settings = self.run.vae_train
        terms = {name: term(clean, decoded, posterior, settings) for name, term in TERMS.items()}
        if settings.half_size_weight:
            error = reconstruction_error(half_size(clean), model.decode(half_size(latent)), "l2")
            terms["half_size"] = settings.half_size_weight * error
        mse = jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - clean))
        return sum(terms.values(), jnp.float32(0)), terms | {"psnr": reconstruction.psnr_of_mse(mse)}

    def batches(self, share: Share) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
        """Crops of training clips, uint8 (B, T, H, W, 3), with get_state and set_state; of a batch this process's share."""
        settings, data = self.run.vae_train, self.run.data
        dataset = (
            grain.MapDataset.range(data.train_clips)
            .seed(self.run.seed)
            .shuffle()
            .repeat()
            .batch(settings.batch)
            .map_with_index(functools.partial(self._crops, share))
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))
        )
        return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))

    def _crops(self, share: Share, index: int, ids: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        rng = np.random.default_rng((self.run.seed, index))
        # What is drawn for a clip is drawn for those before it too, so that parts are parts of the same batch.
        scenes = [world.sample_scene(self.run.data.world, "train", number) for number in ids.tolist()]
        corners = [
            corner((scene.num_frames, scene.height, scene.width), self.run.vae_train.crop, rng) for scene in scenes
        ]
        found = clips.clips(self.run.data.world, "train", ids[list(share.rows)].tolist())
        own = [corners[number] for number in share.rows]
        size = self.run.vae_train.crop
        return np.stack([crop(clip.frames_THWC, size, at) for clip, at in zip(found, own, strict=True)]), {}

    @functools.cached_property
    def heldout(self) -> list[Clip]:
        data = self.run.data
        return list(clips.clips(data.world, "heldout", range(data.heldout_clips)))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """PSNR in dB, the change into groups of frames, and attributes read from reconstructions of held-out clips, whole and at
        native size."""
        decoded = self._reconstruct(state, self.heldout)
        original = [clip.frames_THWC for clip in self.heldout]
        found = {"psnr": reconstruction.psnr(original, decoded)}
        group, moving = self.run.vae.stride[0], [(frames != frames[0]).any() for frames in original]
        if group > 1 and any(moving):
            into = [continuity.change_into_groups(frames, group) for frames in itertools.compress(decoded, moving)]
            found["into_groups"] = float(np.mean(into))
        read = reader.score(decoded, [clip.scene for clip in self.heldout])
        return found | {f"attributes/{name}": value for name, value in read.items()}

    def _reconstruct(self, state: TrainState, some: list[Clip]) -> list[np.ndarray]:
        network = codec.Codec(self.run.vae, state.ema, state.rest)
        return network.decode([mean for mean, _ in network.encode([clip.frames_THWC for clip in some])])

    def sample(self, state: TrainState, path: Path) -> None:
        """A contact sheet: each held-out clip above its reconstruction."""
        some = self.heldout[:SHOWN_CLIPS]
        pairs = zip((clip.frames_THWC for clip in some), self._reconstruct(state, some), strict=True)
        if processes.is_first():
            files.write_image(
                path, files.contact_sheet([video for pair in pairs for video in pair], frames_per_video=5)
            )

    def finish(self, state: TrainState) -> TrainState:
        """Measure the statistics that normalise the latents, so that diffusion sees unit variance along every axis."""
        data = self.run.data
        some = clips.clips(data.world, "train", range(min(STATISTICS_CLIPS, data.train_clips)))
        # Encoded in the VAE's own units: as an untrained VAE normalises, which is not at all.
        plain = self.init(jax.random.key(0))[1]
        encoded = codec.Codec(self.run.vae, state.ema, plain).encode([clip.frames_THWC for clip in some])
        means = np.concatenate([mean.reshape(-1, mean.shape[-1]) for mean, _ in encoded])
        variances = np.concatenate([std.reshape(-1, std.shape[-1]) ** 2 for _, std in encoded])
        rest = vae.latent_statistics(means, variances)
        return state._replace(rest=jax.device_put(rest, jax.tree.map(lambda leaf: leaf.sharding, state.rest)))


def corner(shape: tuple[int, int, int], size: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a random window of `size` in a clip. Raises ValueError for a clip smaller than the window."""
    if any(have < need for have, need in zip(shape, size, strict=True)):
        raise ValueError(f"a clip of {shape} is smaller than vae_train.crop {size}; crop less or draw larger clips")
    top, left = (int(rng.integers(have - need + 1)) for have, need in zip(shape[1:], size[1:], strict=True))
    return top, left


def crop(frames_THWC: np.ndarray, size: tuple[int, int, int], at: tuple[int, int]) -> np.ndarray:
    """A window from the clip's first frames on."""
    (T, H, W), (top, left) = size, at
    return frames_THWC[:T, top : top + H, left : left + W]

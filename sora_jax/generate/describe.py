"""A trained captioner as a function from videos to captions: many clips of any size, packed together into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sora_jax import checkpoint, config, sharding
from sora_jax.config import CaptionerRun
from sora_jax.data import pack
from sora_jax.generate import media
from sora_jax.generate.codec import Codec
from sora_jax.generate.pipeline import beside, restored
from sora_jax.models import captioner, vae
from sora_jax.nn.layers import abstract
from sora_jax.text import tokenise


class Describer:
    """Writes captions with a captioner of a run and its vocabulary. vae_weights are (params, rest)."""

    def __init__(
        self,
        run: CaptionerRun,
        vae_config: vae.VAEConfig,
        params: Any,
        vae_weights: tuple[Any, Any],
        vocabulary: tokenise.Vocabulary,
    ) -> None:
        # As of pipeline.anywhere: what training named for its rows and chips need not take these.
        run = dataclasses.replace(run, captioner=dataclasses.replace(run.captioner, attention="auto"))
        self.run, self.vocabulary, self.params = run, vocabulary, params
        self.geometry = pack.Geometry(run.captioner.patch, vae_config.stride)
        self.codec = Codec(vae_config, *vae_weights)
        graphdef, _ = nnx.split(abstract(captioner.Captioner, run.captioner), nnx.Param)
        ids = np.arange(run.captioner.words)
        sayable_V = (ids == tokenise.STOP) | ((ids >= tokenise.FIRST_PIECE) & (ids < len(vocabulary)))

        def write(params: Any, batch: Any) -> Any:
            model, layout = nnx.merge(graphdef, params), batch.layout
            ends = tokenise.START, tokenise.STOP
            written_BST = captioner.write(model, batch.mean_BNP, layout, layout.slot_segment_BS, *ends, sayable_V)
            return sharding.everywhere(written_BST)

        self._write = jax.jit(write)

    def read(self, path: Path, limits: media.Limits = media.LIMITS) -> media.Video:
        """A video or an image as the model was trained to see them: at the size of training whose shape is nearest, at its frame
        rate, and no longer than its longest clips. Raises media.MediaError."""
        world, (st, pt) = self.run.data.world, (self.geometry.stride[0], self.geometry.patch[0])
        fps, longest = world.fps[0], max(world.frame_counts)
        video = media.read(path, fps, part=media.Part(0.0, longest / fps), limits=limits)
        count = len(video.frames_THWC)
        groups = ((min(count, longest) - 1) // st + 1) // pt
        if not groups:
            raise media.MediaError(f"{path} has {count} frames, and this captioner reads {1 + st * (pt - 1)} or more")
        size = media.nearest_shape(world.clip_sizes, video.source_size)
        fitted = media.fit(video.frames_THWC[: 1 + st * (groups * pt - 1)], media.Fit(*size))
        told = [*video.told, *([f"{path.name}: {fitted.told}"] if fitted.told else [])]
        return video._replace(frames_THWC=fitted.frames_THWC, given_HW=fitted.given_HW, told=tuple(told))

    def describe(self, videos: Sequence[np.ndarray], fps: Sequence[float]) -> list[str]:
        """The caption of each video, uint8 (T, H, W, 3). Raises ValueError for sizes that the VAE or the patches do not divide."""
        return self.of_latents([mean for mean, _ in self.codec.encode(videos)], fps)

    def of_latents(self, means: Sequence[np.ndarray], fps: Sequence[float]) -> list[str]:
        """The caption of each normalised latent (t, h, w, c)."""
        tokens = [self._tokens(number, mean, each) for number, (mean, each) in enumerate(zip(means, fps, strict=True))]
        packing = self._packing([len(each.index_N) for each in tokens])
        rows, _ = pack.pack_rows(tokens, packing, np.random.default_rng(0))
        said: list[str] = [""] * len(means)
        for start in range(0, len(rows), packing.rows):
            some = rows[start : start + packing.rows]
            filled = [pack.fill_row(row, packing, self.run.captioner.patch_dim, None) for row in some]
            empty = pack.empty_row(packing, self.run.captioner.patch_dim, None)
            batch = pack.stack(filled + [empty] * (packing.rows - len(some)))
            written_BST = np.asarray(self._write(self.params, batch))
            for row, written_ST in zip(some, written_BST, strict=False):
                for clip, ids in zip(row, written_ST.tolist(), strict=False):
                    said[clip.clip] = self.vocabulary.text(ids)
        return said

    def _packing(self, tokens: Sequence[int]) -> pack.PackConfig:
        """Rows as in training, or as long as the longest clip needs; as many slots as the shortest clip leaves room for; divided
        over the mesh of the context."""
        longest = sharding.padded(max(self.run.pack.row_tokens, *tokens), "tokens")
        slots = min(self.run.pack.row_slots, longest // min(tokens), len(tokens))
        rows = sharding.padded(min(self.run.pack.rows, len(tokens)), "rows")
        return pack.PackConfig(rows, longest, slots, row_text=slots, window=len(tokens))

    def _tokens(self, number: int, mean_thwc: np.ndarray, fps: float) -> pack.Tokens:
        mean_NP = pack.patchify(mean_thwc, self.geometry.patch)
        return pack.Tokens(
            mean_NP=mean_NP,
            std_NP=np.zeros_like(mean_NP),
            position_N3=pack.positions(mean_thwc.shape, self.geometry, fps),
            index_N=np.arange(len(mean_NP), dtype=np.int32),
            known_N=np.ones(len(mean_NP), bool),
            ceiling=0.0,
            extent_3=pack.extent(mean_thwc.shape, self.geometry, fps),
            clip=number,
            draw=0,
            text_LM=None,
            text_token_L=np.array([tokenise.START], np.int32),
        )


def load(path: Path, step: int | None = None) -> Describer:
    """The captioner of a work dir on one device, from its averaged weights; the VAE's weights are in the same checkpoint.

    Raises FileNotFoundError if there is no checkpoint and ConfigError if it is not one of a captioner.
    """
    meta = checkpoint.read_meta(path, step)
    run = config.from_stored(meta.get("config"))
    if not isinstance(run, CaptionerRun):
        raise config.ConfigError(f"{path} holds no captioner; give the work dir of a trained one")
    vae_config, vocabulary = config.vae_config(meta.get("vae")), stored_vocabulary(meta, run)
    here = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    like = beside(abstract(captioner.Captioner, run.captioner), abstract(vae.VAE, vae_config))
    params, weights = restored(path, step, like, here)
    return Describer(run, vae_config, params, weights, vocabulary)


def stored_vocabulary(meta: Mapping[str, Any], run: CaptionerRun) -> tokenise.Vocabulary:
    """The words of a captioner, from its checkpoint. Raises ConfigError if they are none, or more than the model has."""
    told = meta.get("vocabulary")
    if not isinstance(told, list) or not all(isinstance(piece, str) for piece in told):
        raise config.ConfigError("the checkpoint lists no vocabulary; train the captioner anew")
    try:
        vocabulary = tokenise.Vocabulary(tuple(told), run.captioner.max_tokens)
    except ValueError as error:
        raise config.ConfigError(f"the checkpoint's {error}; train the captioner anew") from error
    check_vocabulary(vocabulary, run)
    return vocabulary


def check_vocabulary(vocabulary: tokenise.Vocabulary, run: CaptionerRun) -> None:
    """Raises ConfigError if it has more words than the model."""
    if len(vocabulary) > run.captioner.words:
        raise config.ConfigError(
            f"captions have {len(vocabulary)} words, with those of no word, and captioner.words is {run.captioner.words}; "
            "make it larger"
        )

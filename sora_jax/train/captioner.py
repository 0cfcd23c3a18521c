"""The task of training the captioner on packed rows of latents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from sora_jax import compute, processes, sharding
from sora_jax.config import CaptionerRun
from sora_jax.data import latents, loader
from sora_jax.data.worlds import world
from sora_jax.data.worlds.scene import Scene
from sora_jax.evaluate import description
from sora_jax.generate import describe, files
from sora_jax.models import captioner
from sora_jax.nn.layers import abstract, parameters
from sora_jax.structs import PackedBatch, Share, TrainState
from sora_jax.text.captions import CaptionWords
from sora_jax.text.tokenise import Vocabulary
from sora_jax.train.on_latents import Counted, OnLatents

SHOWN_CLIPS = 8


class Objective:
    """What a captioner of a run is trained on: the cross-entropy of every word, given the clip and the words before."""

    def __init__(self, run: CaptionerRun) -> None:
        self.graphdef = nnx.split(abstract(captioner.Captioner, run.captioner), nnx.Param)[0]

    def __call__(self, params: Any, rest: Any, batch: PackedBatch, key: Array) -> tuple[Array, dict[str, Array]]:
        """As loop.Loss."""
        model, layout = nnx.merge(self.graphdef, params), batch.layout
        logits_BLV = model.say(model.see(batch.mean_BNP, layout), layout.text_token_BL, layout)
        value, words = captioner.loss(logits_BLV, layout.text_token_BL, layout.text_segment_BL)
        return value, {"words": words}


class CaptionerTask(OnLatents):
    """loop.Task of a CaptionerRun. Encodes the world's clips into `encoded` before the first step."""

    run: CaptionerRun

    def __init__(self, run: CaptionerRun, encoded: Path) -> None:
        super().__init__(
            run, encoded, "captioner", compute.captioner_step(run.captioner, run.pack).total, Objective(run)
        )

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"vocabulary": list(self.vocabulary.pieces)}

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The words of the training captions."""
        captions = latents.unique_captions([self.stores["train"]])
        found = Vocabulary.of(captions, self.run.captioner.max_tokens)
        describe.check_vocabulary(found, self.run)
        return found

    @functools.cached_property
    def _tokeniser(self) -> loader.Tokeniser:
        words = CaptionWords(self.vocabulary)
        return loader.Tokeniser(self.run.loader, self.run.pack, self.geometry, words, self.run.seed)

    def batches(self, share: Share) -> Iterator[tuple[PackedBatch, dict[str, float]]]:
        return Counted(loader.batches(self.stores["train"], self._tokeniser, None, share))

    def init(self, key: Array) -> tuple[Any, Any]:
        params = parameters(captioner.Captioner(self.run.captioner, nnx.Rngs(key)))
        return params, {"vae": {"params": self.vae_params, "rest": self.vae_rest}}

    @functools.cached_property
    def _judged(self) -> Any:
        """(mean loss, number of words) of a batch."""

        def one(params: Any, batch: PackedBatch) -> tuple[Array, Array]:
            value, metrics = self.objective(params, None, batch, jax.random.key(0))
            return sharding.everywhere((value, metrics["words"]))

        return jax.jit(one)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Cross-entropy of held-out clips' captions, and what the captions that the model writes of these clips tell."""
        still = dataclasses.replace(
            self._tokeniser, packing=dataclasses.replace(self.run.pack, drop_rate=0.0, drop_repeats=0.0)
        )
        found = [
            tuple(map(float, jax.device_get(self._judged(state.ema, batch))))
            for batch, _ in loader.fixed_batches(self.stores["heldout"], still, None)
        ]
        value_n, words_n = np.array(found).T
        texts, scenes = self._described(state, len(self.stores["heldout"]))
        told = description.judge(texts, scenes, self.run.seed)
        return {"val_loss": float(np.average(value_n, weights=words_n))} | {
            f"captions/{name}": value for name, value in told.items()
        }

    def _described(self, state: TrainState, count: int) -> tuple[list[str], list[Scene]]:
        """Captions of the first held-out clips, and what these show."""
        store, weights = self.stores["heldout"], state.rest["vae"]
        made = describe.Describer(
            self.run, self.vae_config, state.ema, (weights["params"], weights["rest"]), self.vocabulary
        )
        some = [store[number] for number in range(count)]
        scenes = [world.sample_scene(self.run.data.world, "heldout", latent.id) for latent in some]
        return made.of_latents([latent.mean_thwc for latent in some], [latent.fps for latent in some]), scenes

    def sample(self, state: TrainState, path: Path) -> None:
        """A contact sheet: held-out clips, each above the caption that the model writes."""
        from sora_jax.data.worlds import clips

        texts, scenes = self._described(state, min(SHOWN_CLIPS, len(self.stores["heldout"])))
        if processes.is_first():
            files.write_image(path, files.contact_sheet(clips.render_mixed(scenes), labels=texts))

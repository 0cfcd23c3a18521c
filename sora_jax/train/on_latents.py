"""What tasks share that train a model on the latents of a VAE, packed into rows."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jax import Array

from sora_jax import compute, config
from sora_jax.checkpoint import read_meta
from sora_jax.data import latents, pack
from sora_jax.data.worlds import world
from sora_jax.generate import pipeline
from sora_jax.structs import PackedBatch, TrainState
from sora_jax.train.encode import encode_all, fingerprint_of


class OnLatents:
    """The parts of a loop.Task that are alike: the VAE at the run's vae_checkpoint and the stores of its latents, in `encoded`.

    name is the model's key in the run; objective is its loss, as loop.Loss. Raises ConfigError for a VAE of other channels.
    """

    def __init__(self, run: Any, encoded: Path, name: str, flops_per_step: float, objective: Any) -> None:
        self.run, self.encoded, self.objective, self.flops_per_step = run, encoded, objective, flops_per_step
        source, model = Path(run.vae_checkpoint), getattr(run, name)
        self.vae_config, self.vae_params, self.vae_rest = pipeline.load_vae(source)
        if self.vae_config.channels != model.channels:
            raise config.ConfigError(
                f"{name}.channels is {model.channels}, but the VAE at {source} has {self.vae_config.channels} channels"
            )
        self.unit = "tokens"
        self.units_per_step = float(run.pack.rows * run.pack.row_tokens)
        self.rows = run.pack.rows
        self.sizes = {"tokens": run.pack.row_tokens, "heads": model.heads}
        self._vae_flops = config.stored_number(read_meta(source), "total_flops", source)
        self.geometry = pack.Geometry(model.patch, self.vae_config.stride)

    def meta(self) -> dict[str, Any]:
        """What the checkpoints hold of the VAE."""
        return {
            "vae": dataclasses.asdict(self.vae_config),
            "vae_weights": self.vae_weights,
            "encoding_flops": self.encoding_flops,
        }

    def flops_before(self) -> float:
        return self._vae_flops + self.encoding_flops

    @functools.cached_property
    def encoding_flops(self) -> float:
        """What it costs to encode the clips of both splits once, and their captions."""
        shapes = (shape for store in self.stores.values() for shape in store.shapes.tolist())
        return compute.encoding(self.vae_config, shapes) + self._caption_flops()

    def _caption_flops(self) -> float:
        return 0.0

    @functools.cached_property
    def vae_weights(self) -> str:
        return fingerprint_of(self.vae_params)

    @functools.cached_property
    def stores(self) -> dict[world.Split, latents.LatentStore]:
        """The encoded clips of both splits."""
        return encode_all(self.encoded, self.run.data, self.vae_config, self.vae_params, self.vae_rest)

    def loss(self, params: Any, rest: Any, batch: PackedBatch, key: Array) -> tuple[Array, dict[str, Array]]:
        return self.objective(params, rest, batch, key)

    def finish(self, state: TrainState) -> TrainState:
        return state


class Counted:
    """Batches with their pack.Count as metrics; hands state through."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> tuple[PackedBatch, dict[str, float]]:
        batch, count = next(self._source)
        return batch, {f"packing/{name}": float(value) for name, value in dataclasses.asdict(count).items()}

    def get_state(self) -> Any:
        return self._source.get_state()

    def set_state(self, state: Any) -> None:
        self._source.set_state(state)

"""Flow loss on held-out clips, in all, by noise level and by size: where a model is weak, and on what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

# Noise levels are told apart by quarters of [0, 1].
TIME_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
# What a loss is held against: of who knows the clip, and of who knows nothing but how large latents are.
BOUNDS = ("floor", "ceiling")


@dataclasses.dataclass(frozen=True)
class Errors:
    """One entry a clip: squared error summed over its tokens, how many they were, its noise level and its size; and what the
    error would be at some of BOUNDS."""

    error_n: np.ndarray
    tokens_n: np.ndarray
    time_n: np.ndarray
    sizes: Sequence[tuple[int, ...]]
    bounds: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def losses(self, name: str, chosen: np.ndarray | None = None) -> dict[str, float]:
        """Means over the tokens of the chosen clips, or of all: `name` and, of every bound, name_bound."""
        chosen = np.ones(len(self.error_n), bool) if chosen is None else chosen
        tokens = self.tokens_n[chosen].sum()
        errors = {name: self.error_n} | {f"{name}_{bound}": error_n for bound, error_n in self.bounds.items()}
        return {each: float(error_n[chosen].sum() / tokens) for each, error_n in errors.items()}


def scores(errors: Errors) -> dict[str, float]:
    """val_loss; val_loss_time/A-B for noise levels from A to B; val_loss_size/TxHxW; each with its bounds, as val_loss_floor.
    What no clip has is left out."""
    found = errors.losses("val_loss")
    for low, high in itertools.pairwise(TIME_EDGES):
        chosen = (errors.time_n >= low) & (errors.time_n < high)
        if chosen.any():
            found |= errors.losses(f"val_loss_time/{low:.2f}-{high:.2f}", chosen)
    for size in sorted(set(errors.sizes)):
        chosen = np.array([each == size for each in errors.sizes])
        found |= errors.losses(f"val_loss_size/{'x'.join(map(str, size))}", chosen)
    return found

"""Flow loss on held-out clips, in all, by noise level and by size: where a model is weak, and on what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# Noise levels are told apart by quarters of [0, 1].
TIME_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Errors:
    """One entry a clip: squared error summed over its tokens, how many they were, its noise level and its size."""

    error_n: np.ndarray
    tokens_n: np.ndarray
    time_n: np.ndarray
    sizes: Sequence[tuple[int, ...]]

    def loss(self, chosen: np.ndarray | None = None) -> float:
        """Mean over the tokens of the chosen clips, or of all."""
        chosen = np.ones(len(self.error_n), bool) if chosen is None else chosen
        return float(self.error_n[chosen].sum() / self.tokens_n[chosen].sum())


def scores(errors: Errors) -> dict[str, float]:
    """val_loss; val_loss_time/A-B for noise levels from A to B; val_loss_size/TxHxW. What no clip has is left out."""
    found = {"val_loss": errors.loss()}
    for low, high in itertools.pairwise(TIME_EDGES):
        chosen = (errors.time_n >= low) & (errors.time_n < high)
        if chosen.any():
            found[f"val_loss_time/{low:.2f}-{high:.2f}"] = errors.loss(chosen)
    for size in sorted(set(errors.sizes)):
        chosen = np.array([each == size for each in errors.sizes])
        found[f"val_loss_size/{'x'.join(map(str, size))}"] = errors.loss(chosen)
    return found

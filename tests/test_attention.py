"""Attention within segments, against a loop written out in numpy; every backend, on every mesh, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import within

from sora_jax import sharding
from sora_jax.nn import attention as module
from sora_jax.nn import blockwise, kernels
from sora_jax.nn.attention import attention

B, N, M, K, E = 2, 7, 5, 3, 4
Q_SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 3, 3, 3]], np.int32)
K_SEGMENT = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 3, 3]], np.int32)


def inputs(rng):
    return (jnp.asarray(rng.standard_normal((B, length, K, E)), jnp.float32) for length in (N, M, M))


def written_out(q, k, v):
    out = np.zeros((B, N, K, E))
    for b in range(B):
        for n in range(N):
            keys = [m for m in range(M) if K_SEGMENT[b, m] == Q_SEGMENT[b, n]]
            for head in range(K):
                logits = np.array([np.dot(q[b, n, head], k[b, m, head]) / np.sqrt(E) for m in keys], np.float64)
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[b, n, head] = sum(w * v[b, m, head] for w, m in zip(weights, keys, strict=True))
    return out


def test_against_a_loop(rng):
    q, k, v = inputs(rng)
    out = attention(q, k, v, jnp.asarray(Q_SEGMENT), jnp.asarray(K_SEGMENT))
    assert np.allclose(out, written_out(*map(np.asarray, (q, k, v))), atol=1e-5)


def test_large_logits_stay_finite(rng):
    q, k, v = inputs(rng)
    out, grads = jax.value_and_grad(
        lambda q: attention(q * 1e4, k, v, jnp.asarray(Q_SEGMENT), jnp.asarray(K_SEGMENT)).sum()
    )(q)
    assert np.isfinite(out) and np.all(np.isfinite(grads))


def test_a_query_without_keys_is_finite(rng):
    q, k, v = inputs(rng)
    out = attention(q, k, v, jnp.full((B, N), 9, jnp.int32), jnp.asarray(K_SEGMENT))
    assert np.all(np.isfinite(out))


def test_gradients_stay_in_the_segment(rng):
    q, k, v = inputs(rng)
    segments = jnp.asarray(Q_SEGMENT), jnp.asarray(K_SEGMENT)
    grads = jax.grad(lambda v: attention(q, k, v, *segments)[0, :3].sum())(v)
    assert np.all(grads[0, 2:] == 0) and np.all(grads[1] == 0) and np.all(np.abs(grads[0, :2]) > 0)


MESHES = {
    "one device": (1, 1, 1, 1),
    "rows": (2, 2, 1, 1),
    "heads": (1, 2, 4, 1),
    "tokens": (1, 1, 1, 4),
    "rows and tokens": (2, 2, 1, 2),
    "heads and tokens": (2, 1, 2, 2),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels of accelerators, run by the interpreter."""
    for name in module.KERNELS:
        monkeypatch.setitem(module.KERNELS, name, functools.partial(getattr(kernels, name), interpret=True))


def long_rows(rng, rows=4, tokens=256, heads=4, size=16):
    """Queries, keys, values, segments and a weight of every output that is not padding."""
    q, k, v, weight = (jnp.asarray(rng.standard_normal((rows, tokens, heads, size)), jnp.float32) for _ in range(4))
    segment = jnp.asarray(np.sort(rng.integers(0, 6, (rows, tokens))), jnp.int32)
    return (q, k, v), segment, weight * (segment > 0)[..., None, None]


def value_and_grads(function, inputs, weight):
    return jax.jit(jax.value_and_grad(lambda qkv: (function(*qkv) * weight).sum()))(inputs)


@pytest.mark.parametrize("backend", module.BACKENDS[1:])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_backend_is_the_reference_forward_and_backward(rng, interpreted, backend, mesh):
    inputs, segment, weight = long_rows(rng)
    value, grads = value_and_grads(lambda *qkv: module.reference(*qkv, segment, segment), inputs, weight)
    devices = jax.devices()[: int(np.prod(MESHES[mesh]))]
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*MESHES[mesh]), devices)):
        found, found_grads = value_and_grads(
            lambda *qkv: attention(*qkv, segment, segment, backend=backend), inputs, weight
        )
    assert found == pytest.approx(float(value), abs=1e-4)
    for one, other in zip(grads, found_grads, strict=True):
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("backend", ["blockwise", *module.KERNELS])
@pytest.mark.parametrize("mesh", ["one device", "tokens"])
def test_what_it_gave_can_be_kept_for_the_backward_pass(rng, interpreted, backend, mesh):
    """With a policy that keeps it nothing runs forward again; with one that keeps nothing, all does."""
    inputs, segment, weight = long_rows(rng)
    devices = jax.devices()[: int(np.prod(MESHES[mesh]))]
    counts = []
    for policy in (
        jax.checkpoint_policies.everything_saveable,
        jax.checkpoint_policies.save_only_these_names(blockwise.KEPT),
        jax.checkpoint_policies.nothing_saveable,
    ):

        def block(qkv, _, policy=policy):
            return jax.checkpoint(
                lambda qkv: (attention(*qkv, segment, segment, backend=backend), *qkv[1:]), policy=policy
            )(qkv), None

        def loss(qkv, block=block):
            return (jax.lax.scan(block, qkv, None, length=2)[0][0] * weight).sum()

        with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*MESHES[mesh]), devices)):
            program = jax.make_jaxpr(jax.grad(loss))(inputs)
        (backward,) = (each for each in program.eqns if each.primitive.name == "scan" and each.params["reverse"])
        names = [each.primitive.name for each in within(backward.params["jaxpr"])]
        counts.append(names.count("while" if backend == "blockwise" else "pallas_call"))
    assert 0 < counts[0] == counts[1] < counts[2]


def test_memory_of_a_device_falls_with_the_devices_that_share_a_row():
    """By the compiler's account of a gradient: halved by twice as many devices. A ring has one copy of keys and values, and of
    their gradients, on the way, so its first doubling saves less."""

    def size(n):
        mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, n), jax.devices()[:n])
        placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
        inputs = [jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.float32, sharding=placed)] * 3
        segment = jax.ShapeDtypeStruct((1, 16384), jnp.int32, sharding=placed)
        with jax.set_mesh(mesh):
            gradient = jax.jit(
                jax.grad(lambda x, s: jnp.sum(jnp.square(attention(*x, s, s, backend="blockwise")))),
            )
            found = gradient.lower(inputs, segment).compile().memory_analysis()
        return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes

    one, two, four, eight = map(size, (1, 2, 4, 8))
    assert two < one / 1.35 and four < two / 1.85 and eight < four / 1.8


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("mesh", ["one device", "heads and tokens"])
def test_captions_that_every_device_has_whole(rng, interpreted, mesh, backend):
    (q, _, _), segment, weight = long_rows(rng)
    k, v = (jnp.asarray(rng.standard_normal((4, 40, 4, 16)), jnp.float32) for _ in range(2))
    text = jnp.asarray(np.sort(rng.integers(1, 6, (4, 40))), jnp.int32)
    weight = weight * (segment[:, :, None] == text[:, None]).any(-1)[..., None, None]
    value, grads = value_and_grads(lambda *qkv: module.reference(*qkv, segment, text), (q, k, v), weight)
    devices = jax.devices()[: int(np.prod(MESHES[mesh]))]
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*MESHES[mesh]), devices)):
        found, found_grads = value_and_grads(
            lambda *qkv: attention(*qkv, segment, text, backend=backend, keys="none"), (q, k, v), weight
        )
    assert found == pytest.approx(float(value), abs=1e-4)
    for one, other in zip(grads, found_grads, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_backends_are_chosen_by_platform_and_size():
    assert {module.chosen(name, 144, 144, 4) for name in ("cpu", "gpu", "tpu")} == {"reference"}
    for keys in (4096, 256):
        assert [module.chosen(name, 4096, keys, 4) for name in ("cpu", "gpu", "tpu")] == [
            "blockwise",
            "triton",
            "splash",
        ]
    # A kernel that cannot take the sizes is not chosen.
    assert module.chosen("tpu", 4100, 4100, 4) == "blockwise" and module.chosen("gpu", 4100, 4100, 4) == "triton"
    assert {module.chosen(name, 1024, 1024, 3, split=4) for name in ("gpu", "tpu")} == {"blockwise"}
    assert module.chosen("cpu", 1024, 1024, 4, split=4) == "blockwise"


def test_heads_that_do_not_divide_are_told(rng):
    q, k, v = inputs(rng)
    here = sharding.make_mesh(sharding.MeshConfig(1, 2, 2, 1), jax.devices()[:4])
    with jax.set_mesh(here), pytest.raises(ValueError, match="3 heads do not divide over 2 devices of mesh axes"):
        attention(q, k, v, jnp.asarray(Q_SEGMENT), jnp.asarray(K_SEGMENT), backend="blockwise")


def test_what_a_backend_cannot_take_is_told(rng):
    inputs, segment, _ = long_rows(rng, tokens=250)
    with pytest.raises(ValueError, match="'flash' is none of auto, reference"):
        attention(*inputs, segment, segment, backend="flash")
    with pytest.raises(ValueError, match="multiples of 128 tokens, not 250 and 250"):
        attention(*inputs, segment, segment, backend="splash")
    inputs, segment, _ = long_rows(rng, heads=2)
    with (
        jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(1, 1, 1, 4), jax.devices()[:4])),
        pytest.raises(ValueError, match="2 heads do not divide over 4 devices of mesh axis sequence"),
    ):
        attention(*inputs, segment, segment, backend="splash")

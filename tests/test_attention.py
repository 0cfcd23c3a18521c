"""Attention within segments, against a loop over segments and tokens written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

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

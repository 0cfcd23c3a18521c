"""A fingerprint is one number wherever an array lies, and another as soon as a bit flips or values move."""

import jax
import numpy as np
import pytest

from sora_jax import fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "float8_e4m3fn"])
def test_fingerprint_is_one_number_on_host_and_devices(dtype):
    values = jax.random.uniform(jax.random.key(1), (8, 24, 3), minval=-100, maxval=100).astype(dtype)
    expected = fingerprints.of({"": np.asarray(values)})[""]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = 8 % jax.device_count() == 0
    spec = jax.sharding.PartitionSpec("x") if rows else jax.sharding.PartitionSpec()
    sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
    assert tuple(map(int, fingerprints.on_devices({"x": sharded})["x"])) == expected
    assert fingerprints.of({"": sharded})[""] == expected
    # By the definition, in unbounded integers.
    array = np.asarray(values)
    words = array.reshape(-1).view(f"u{array.itemsize}").astype(object)
    assert expected == (words.sum() % 2**32, (words * np.arange(words.size)).sum() % 2**32)


def test_fingerprint_sees_every_flipped_bit_and_moved_values():
    values = np.random.default_rng(0).normal(size=(70_000,)).astype(np.float32)  # more than one block
    expected = fingerprints.of({"": values})[""]
    assert tuple(map(int, fingerprints.on_devices({"x": values})["x"])) == expected
    for bit in range(0, values.nbytes * 8, 17_001):
        damaged = values.copy()
        damaged.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        assert fingerprints.of({"": damaged})[""] != expected
    moved = values.copy()
    moved[[3, 3 + 2**16]] = moved[[3 + 2**16, 3]]  # the same place in another block
    assert fingerprints.of({"": moved})[""] != expected

"""Marks tests that need weights which are packages of their own; tools/test installs them."""

import pytest

from sora_jax.evaluate import mobilenet
from sora_jax.text import encode

needs_mobilenet = pytest.mark.skipif(not mobilenet.available(), reason=f"no weights; {mobilenet.REMEDY}")
needs_minilm = pytest.mark.skipif(
    bool(encode.missing_for_minilm()), reason=f"MiniLM lacks {encode.missing_for_minilm()}"
)

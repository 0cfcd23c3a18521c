"""Marks tests that need weights which are packages of their own; tools/test installs them."""

import pytest

from sora_jax.evaluate import mobilenet

needs_mobilenet = pytest.mark.skipif(not mobilenet.available(), reason=f"no weights; {mobilenet.REMEDY}")

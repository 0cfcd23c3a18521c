"""Numbers for people."""

import pytest

from sora_jax.train import progress


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23e10, "12.3 G"),
        (999.7e9, "1 T"),
        (999.4e9, "999 G"),
        (-2e3, "-2 k"),
        (999.0, "999 "),
        (0.5, "0.5 "),
        (0, "0 "),
    ],
)
def test_three_digits_and_a_prefix(value, text):
    assert progress.si(value) == text

"""Products have the operands' dtype forward and backward, and the values of einsum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn.products import product

EQUATIONS = ("bnx,xy->bny", "x,xy->y", "bnke,bmke->bknm", "bknm,bmke->bnke", "knm,kne->kme")


def operands(rng, equation):
    sizes = dict(zip("bnmkexy", (2, 12, 10, 3, 8, 16, 24), strict=True))
    terms, out = equation.split("->")
    shapes = [[sizes[letter] for letter in term] for term in (*terms.split(","), out)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_einsum_on_rounded_operands(rng, equation, dtype):
    one, other, weight = operands(rng, equation)

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    with jax.default_matmul_precision("highest"):
        wanted, pull = jax.vjp(lambda a, b: jnp.einsum(equation, a, b), rounded(one), rounded(other))
        gradients = pull(rounded(weight))
    found, pull = jax.vjp(lambda a, b: product(equation, a, b, dtype), one, other)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    for ours, theirs in zip(pull(weight), gradients, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_no_product_of_a_gradient_is_float32(rng, equation):
    """Read from the program as it is given to the compiler: float32 gradients times bfloat16 would be computed in float32."""
    one, other, weight = operands(rng, equation)

    def loss(a, b):
        return jnp.sum(product(equation, a, b, "bfloat16") * weight)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(one, other).as_text()
    dots = re.findall(r"stablehlo\.dot_general[^\n]*: \((tensor<[^>]*>), (tensor<[^>]*>)\) -> (tensor<[^>]*>)", text)
    assert len(dots) == 2  # forward is not needed
    for *given, made in dots:
        assert all("bf16" in each for each in given) and "f32" in made

"""Products of two arrays with operands in a given dtype and float32 results, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from sora_jax import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, one: Array, other: Array, dtype: str | jnp.dtype) -> Array:
    """einsum(equation, one, other) with operands in dtype and a float32 result, for gradients too.

    By itself jax would multiply float32 gradients with operands in dtype, and CPUs and GPUs do that in float32: half as fast,
    or worse. Every letter of an operand must be in the other or in the result.
    """
    return _forward(equation, one, other, dtype)[0]


def _forward(equation: str, one: Array, other: Array, dtype: str | jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    one, other = one.astype(dtype), other.astype(dtype)
    return multiply(equation, one, other), (one, other)


def _backward(equation: str, dtype: str | jnp.dtype, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    one, other = kept
    (a, b), out = _letters(equation)
    gradient = gradient.astype(dtype)
    d_one = multiply(f"{out},{b}->{a}", gradient, other)
    # What is on the left may have to be laid out anew, so it is the smaller.
    if one.size <= gradient.size:
        return d_one, multiply(f"{a},{out}->{b}", one, gradient)
    return d_one, multiply(f"{out},{a}->{b}", gradient, one)


product.defvjp(_forward, _backward)


def multiply(equation: str, one: Array, other: Array) -> Array:
    """einsum(equation, one, other) with a float32 result."""
    (a, b), out = _letters(equation)
    summed = [x for x in a if x in b and x not in out]
    # XLA's CPU backend multiplies bfloat16 fast only if the left operand is summed over its last axes in memory, and not at all if
    # it gives the result another layout, as it would to be spared a transposition.
    as_laid_out = one.dtype == jnp.bfloat16 and sharding.platform() == "cpu"
    if as_laid_out and not a.endswith("".join(summed)):
        # What is to be laid out anew must be made before, or it is made element by element in the new order.
        order = "".join(x for x in a if x not in summed) + "".join(summed)
        one = jax.lax.optimization_barrier(one).transpose([a.index(x) for x in order])
        one, a = with_layout_constraint(one, Layout(tuple(range(one.ndim)))), order
    batch = [x for x in a if x in b and x in out]
    pairs = [([a.index(x) for x in names], [b.index(x) for x in names]) for names in (summed, batch)]
    found = jax.lax.dot_general(one, other, (pairs[0], pairs[1]), preferred_element_type=jnp.float32)
    if as_laid_out:
        found = with_layout_constraint(found, Layout(tuple(range(found.ndim))))
    made = batch + [x for x in a if x not in b] + [x for x in b if x not in a]
    return found.transpose([made.index(x) for x in out])


def _letters(equation: str) -> tuple[list[str], str]:
    operands, out = equation.split("->")
    return operands.split(","), out

"""Traced programs, taken apart."""

import jax


def within(program):
    """All equations of a program that something depends on, and those within theirs. Compilers leave out the others."""
    program = getattr(program, "jaxpr", program)
    needed = {id(each) for each in program.outvars}
    for equation in reversed(program.eqns):
        if needed.isdisjoint(map(id, equation.outvars)):
            continue
        needed.update(map(id, equation.invars))
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from within(value)

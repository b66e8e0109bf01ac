"""Whether a parameter influences a traced array, and whether it does so element by element.

Inside ``jit`` every array is a tracer: a parameter, but also a constant, a subsample of the data, or the limits of a censored
observation. Only the jaxpr shows the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from numpyro.ops.provenance import track_deps_jaxpr

MOVES = frozenset({"moves"})
MIXES = ("dot_general", "conv", "reduce", "cum", "sort", "arg", "scan", "while")  # how the names of primitives begin

Axes = frozenset[tuple[int, int]]  # each as its (negative) number and its size


def influenced(f: Callable[..., list[jax.Array]], movers: Any, fixed: Any) -> list[bool]:
    """For each array of ``f(mark, movers, fixed)``, whether the mark or a tracer in ``movers`` influences it.

    A tracer that f closes over counts as a mover. Arrays that are not traced are passed unchanged, so that Python can branch on them.
    """
    leaves, tree = jax.tree.flatten((movers, fixed))
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
    num_moving = sum(i < len(jax.tree.leaves(movers)) for i in traced)

    def of_tracers(mark: jax.Array, *tracers: jax.Array) -> list[jax.Array]:
        given = list(leaves)
        for i, tracer in zip(traced, tracers, strict=True):
            given[i] = tracer
        return f(mark, *jax.tree.unflatten(tree, given))

    closed = jax.make_jaxpr(of_tracers)(jnp.zeros(()), *(leaves[i] for i in traced))
    jaxpr = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
    inputs = [MOVES if isinstance(const, jax.core.Tracer) else frozenset() for const in closed.consts]
    inputs += [MOVES] * (1 + num_moving) + [frozenset()] * (len(traced) - num_moving)
    return [bool(names) for names in track_deps_jaxpr(jaxpr, inputs)]


def by_element(f: Callable[..., list[jax.Array]], arrays: Any) -> list[Axes]:
    """For each array of ``f(arrays)``, the axes of those among ``arrays`` from which it is computed without a sum over elements."""
    axes = [frozenset((i - leaf.ndim, n) for i, n in enumerate(leaf.shape)) for leaf in jax.tree.leaves(arrays)]
    return _by_element(jax.make_jaxpr(f)(arrays).jaxpr, axes)


def _by_element(jaxpr: Any, inputs: list[Axes]) -> list[Axes]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def axes(variable: Any) -> Axes:
        return frozenset() if isinstance(variable, Literal) else known.get(variable, frozenset())

    outputs: list[Axes]
    for equation in jaxpr.eqns:
        found = [axes(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if equation.primitive.name.startswith(MIXES):
            outputs = [frozenset()] * len(equation.outvars)
        elif inner is not None and len(inner.invars) == len(found):
            outputs = _by_element(inner, found)
        else:
            outputs = [frozenset().union(*found)] * len(equation.outvars)
        for variable, of_output in zip(equation.outvars, outputs, strict=True):  # a smaller array has no number for each element
            known[variable] = frozenset((axis, n) for axis, n in of_output if n <= variable.aval.size)
    return [axes(variable) for variable in jaxpr.outvars]

"""Whether a parameter influences a traced array.

Inside ``jit`` every array is a tracer: a parameter, but also a constant, a subsample of the data, or the limits of a censored
observation. Only the jaxpr shows the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.ops.provenance import track_deps_jaxpr

MOVES = frozenset({"moves"})


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

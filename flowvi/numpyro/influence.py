"""Whether a parameter influences a traced array.

Inside ``jit`` every array is a tracer: the parameters, but also a constant, a subsample of the data, or the limits of a censored
observation. Only the jaxpr tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from numpyro.ops.provenance import track_deps_jaxpr

MOVES = frozenset({"moves"})


def influenced(f: Callable[..., list[jax.Array]], movers: Any, fixed: Any) -> list[bool]:
    """For each array of ``f(movers, fixed)``, whether one of the arrays in ``movers`` influences it.

    A traced array that f closes over counts as a mover. In ``fixed``, only arrays are inputs of the jaxpr; the rest is passed on.
    """
    leaves, tree = jax.tree.flatten(fixed)
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(movers: Any, arrays: list[jax.Array]) -> list[jax.Array]:
        given = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            given[i] = array
        return f(movers, jax.tree.unflatten(tree, given))

    arrays = [leaves[i] for i in traced]
    closed = jax.make_jaxpr(of_arrays)(movers, arrays)
    jaxpr = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
    inputs = [MOVES if isinstance(const, jax.core.Tracer) else frozenset() for const in closed.consts]
    inputs += [MOVES] * len(jax.tree.leaves(movers)) + [frozenset()] * len(arrays)
    return [bool(names) for names in track_deps_jaxpr(jaxpr, inputs)]

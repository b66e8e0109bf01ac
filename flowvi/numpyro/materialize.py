"""Keep XLA from computing a sample again in every loop that reads it.

On CPUs, XLA compiles cheap operations into each loop that reads their result. Much of the random generator would then run once for the
cost, once for the score and once for every derivative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


@custom_vmap
def computed_once(x: jax.Array) -> jax.Array:
    """Return x, computed once and stored.

    XLA does not look into a conditional, and cannot decide one whose condition is behind a barrier.
    """
    return lax.platform_dependent(x, cpu=_through_a_branch, default=_same) if jnp.issubdtype(x.dtype, jnp.floating) else x


@computed_once.def_vmap
def _all_at_once(axis_size: int, in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    return computed_once(x), True


def _through_a_branch(x: jax.Array) -> jax.Array:
    return lax.cond(lax.optimization_barrier(jnp.array(True)), _same, _nan, x)


def _same(x: jax.Array) -> jax.Array:
    return x


def _nan(x: jax.Array) -> jax.Array:
    return jnp.full_like(x, jnp.nan)

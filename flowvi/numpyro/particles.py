"""The uniform numbers of particles that are drawn together."""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import random

from flowvi.numpyro.threefry import unrolled
from flowvi.particles import Particles


class Together(NamedTuple):
    """One of several particles that are drawn together.

    Attributes:
        how: ``"stratified"`` or ``"antithetic"``.
        number: Its number.
        num_particles: How many there are.
        key: A random key that they share.
    """

    how: Particles
    number: jax.Array | int
    num_particles: int
    key: jax.Array

    def uniforms(self, name: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The particle's numbers at a site, each within (0, 1).

        Args:
            name: The site's name.
            key: The particle's own key there.
            shape: The shape of x.
        """
        shared = random.fold_in(unrolled(self.key), crc32(name.encode()))
        if self.how == "antithetic":
            u = random.uniform(random.fold_in(shared, self.number // 2), shape)
            u = jnp.where(self.number % 2 == 0, u, 1 - u)
        else:
            strata = jnp.arange(self.num_particles).reshape((-1, *(1,) * len(shape)))
            strata = jnp.broadcast_to(strata, (self.num_particles, *shape))
            own = random.permutation(shared, strata, axis=0, independent=True)[self.number]
            u = (own + random.uniform(key, shape)) / self.num_particles
        margin = jnp.finfo(u.dtype).epsneg
        return jnp.clip(u, margin, 1 - margin)

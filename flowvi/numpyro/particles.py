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
        num_particles: The number of particles.
        key: A random key that all particles share.
    """

    how: Particles
    number: jax.Array | int
    num_particles: int
    key: jax.Array

    def uniforms(self, name: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The particle's numbers at a site, each within (0, 1).

        Args:
            name: The site's name.
            key: The particle's own key at the site.
            shape: The shape of x.
        """
        shared = random.fold_in(unrolled(self.key), crc32(name.encode()))
        if self.how == "antithetic":
            u = random.uniform(random.fold_in(shared, self.number // 2), shape)
            u = jnp.where(self.number % 2 == 0, u, 1 - u)
        else:
            u = (self._stratum(shared, shape) + random.uniform(key, shape)) / self.num_particles
        margin = jnp.finfo(u.dtype).epsneg
        return jnp.clip(u, margin, 1 - margin)

    def _stratum(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The particle's place in a random permutation of all, one for each element."""
        order, shift = random.split(key)
        numbers = jnp.arange(self.num_particles, dtype=jnp.uint32).reshape((*(1,) * len(shape), self.num_particles))
        width = self.num_particles.bit_length()
        # Random bits on the left, the particle's number on the right: XLA sorts one array faster than two. If the bits are equal, the
        # numbers decide; the random shift still makes every place equally probable.
        mixed = jnp.sort(random.bits(order, (*shape, self.num_particles), jnp.uint32) >> width << width | numbers, -1)
        place = mixed[..., self.number] & (2**width - 1)
        return (place.astype(int) + random.randint(shift, shape, 0, self.num_particles)) % self.num_particles

"""The sampling densities of :mod:`flowvi.proposals` as NumPyro distributions."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import flowvi.ops.jax as ops


class Proposal(dist.Distribution):
    """A density over draws of other distributions and three uniform numbers; see :class:`flowvi.proposals.Density`."""

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("parts",)
    pytree_aux_fields = ("density",)

    def __init__(self, density: Any, *parts: dist.Distribution):
        self.density, self.parts = density, parts
        super().__init__(parts[0].batch_shape, parts[0].event_shape)

    @property
    def support(self):
        return self.parts[-1].support

    def sample(self, key, sample_shape=()):
        shape = sample_shape + self.batch_shape
        key, *keys = jax.random.split(key, len(self.parts) + 1)
        draws = [part.expand(shape).sample(k) for part, k in zip(self.parts, keys, strict=True)]
        uniforms = jax.random.uniform(key, (3, *shape), minval=jnp.finfo(float).tiny)
        return self.density.sample(ops, self.parts, draws, uniforms)

    def log_prob(self, value, intermediates=None):
        return self.density.log_prob(ops, self.parts, value)

"""Proposals that a user would write: the slice-integral densities of a Normal, and their defensive mixture, in both hosts."""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as numpyro_dist
import pyro.distributions as pyro_dist
import torch


def _log_prob(math_, kind, z):
    """Log density of the standardized variable."""
    log_p = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    if kind == "maxwell":
        return log_p + 2 * math_.log(abs(z))
    log_rayleigh = log_p + math_.log(abs(z)) + 0.5 * math.log(math.pi / 2)
    if kind == "rayleigh":
        return log_rayleigh
    return math_.log(0.8 * math_.exp(log_rayleigh) + 0.2 * math_.exp(log_p))


def _standardized(kind, signs, uniforms, normals, choose, sqrt, log, where):
    """Draws of the standardized variable from random signs, uniforms and three Normals."""
    rayleigh = signs * sqrt(-2 * log(uniforms))
    if kind == "maxwell":
        return signs * sqrt((normals**2).sum(0))
    return rayleigh if kind == "rayleigh" else where(choose < 0.8, rayleigh, normals[0])


class NumPyroSlice(numpyro_dist.Distribution):
    arg_constraints = {"loc": numpyro_dist.constraints.real, "scale": numpyro_dist.constraints.positive}
    support = numpyro_dist.constraints.real
    pytree_aux_fields = ("kind",)

    def __init__(self, loc, scale, kind):
        self.loc, self.scale, self.kind = loc, scale, kind
        super().__init__(jnp.shape(loc))

    def sample(self, key, sample_shape=()):
        shape = sample_shape + self.batch_shape
        keys = jax.random.split(key, 4)
        signs = jnp.where(jax.random.bernoulli(keys[0], shape=shape), 1.0, -1.0)
        uniforms, choose = jax.random.uniform(keys[1], shape), jax.random.uniform(keys[3], shape)
        normals = jax.random.normal(keys[2], (3, *shape))
        z = _standardized(self.kind, signs, uniforms, normals, choose, jnp.sqrt, jnp.log, jnp.where)
        return self.loc + self.scale * z

    def log_prob(self, value):
        return _log_prob(jnp, self.kind, (value - self.loc) / self.scale) - jnp.log(self.scale)


class PyroSlice(pyro_dist.TorchDistribution):
    arg_constraints = {"loc": pyro_dist.constraints.real, "scale": pyro_dist.constraints.positive}
    support = pyro_dist.constraints.real

    def __init__(self, loc, scale, kind):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.kind = kind
        super().__init__(self.loc.shape)

    def expand(self, batch_shape, _instance=None):
        return PyroSlice(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.kind)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        shape = sample_shape + self.batch_shape
        signs = torch.where(torch.rand(shape) < 0.5, 1.0, -1.0)
        z = _standardized(
            self.kind, signs, torch.rand(shape), torch.randn((3, *shape)), torch.rand(shape), torch.sqrt, torch.log, torch.where
        )
        return self.loc + self.scale * z

    def log_prob(self, value):
        return _log_prob(torch, self.kind, (value - self.loc) / self.scale) - self.scale.log()


def slice_proposal(h, kind):
    family = NumPyroSlice if h.name == "numpyro" else PyroSlice
    return lambda p: family(p.loc, p.scale, kind)

"""What :func:`flowvi.check_estimator` asks of NumPyro."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.distribution import validation_enabled

import flowvi.ops.jax as ops
from flowvi.numpyro.distributions import NumPyroTarget as Target
from flowvi.numpyro.distributions import unwrap

__all__ = ["Distribution", "Target", "array", "jacobian", "lengths", "means", "ops", "path", "precise", "sample", "unwrap", "values"]

lengths = (64, 512)  # JAX compiles once for each
Distribution = dist.Distribution


@contextmanager
def precise() -> Iterator[None]:
    """Double precision, and the host's own validation off."""
    with jax.enable_x64(True), validation_enabled(False):
        yield


def array(x: Any) -> jax.Array:
    return jnp.asarray(x)


def jacobian(f: Callable[..., list[jax.Array]], size: int) -> Callable[..., list[np.ndarray]]:
    """The derivatives of the arrays ``f(eta, *arrays)`` in eta at 0 (last axis), as a function of the arrays: forward mode."""

    @jax.jit
    def run(*arrays: jax.Array) -> list[jax.Array]:
        def along(e: jax.Array) -> list[jax.Array]:
            return jax.jvp(lambda eta: f(eta, *arrays), (jnp.zeros(size),), (e,))[1]

        return jax.vmap(along, out_axes=-1)(jnp.eye(size))

    return lambda *arrays: [np.asarray(derivative) for derivative in run(*arrays)]


def values(f: Callable[..., list[jax.Array]], size: int) -> Callable[..., list[np.ndarray]]:
    """The arrays ``f(eta, *arrays)`` at 0, with an eta that is live."""
    run = jax.jit(f)
    return lambda *arrays: [np.asarray(a) for a in run(jnp.zeros(size), *arrays)]


def means(f: Callable[[jax.Array, range], jax.Array], size: int, chunks: int) -> np.ndarray:
    """The derivatives of ``f(eta, chunks)``, whose second axis are chunks: all of them at once."""
    return jacobian(lambda eta: [f(eta, range(chunks))], size)()[0]


def sample(target: Any, q: Any, seed: int) -> jax.Array:
    """Draws of x, of the full shape, from p or from an expanded proposal, as flowvi draws them."""
    return target.sample(q, jax.random.key(seed))


def path(fn: Any, seed: int) -> jax.Array:
    """A draw by the host's own sampler, with its derivative."""
    return fn(rng_key=jax.random.key(seed), sample_shape=())

"""What :mod:`flowvi.plot` draws, read off an estimator at a NumPyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import flowvi.ops.jax as ops
from flowvi.estimators import Estimator, attach
from flowvi.numpyro.distributions import NumPyroTarget, propose
from flowvi.plot import At


def at(move: Callable[[Any], Any], estimator: Estimator, x: np.ndarray, t: float, f: Callable[[Any], Any], seed: int) -> At:
    """See :class:`flowvi.plot.At`. Where the estimator is the host's own sampler, x are that many of its draws."""
    served = _served(move(t), estimator)

    def run(t):
        p, target = _site(move(t), served, len(x))
        if served.uses_sampler:
            value, score, log_weight = p(rng_key=jax.random.key(seed)), None, None
        else:
            draw = attach(ops, target, served, target.pull(jnp.asarray(x, float)))
            value, score, log_weight = draw.value, draw.score, draw.log_weight
        none = jnp.zeros(len(x))
        score, log_weight = (none if a is None else a for a in (score, log_weight))
        return (f(value), score), (value, jnp.exp(log_weight))

    (phi, _), (slope, psi), (value, weight) = jax.jvp(run, (jnp.asarray(t, float),), (jnp.ones(()),), has_aux=True)
    return At(served.uses_sampler, *map(np.asarray, (value, phi, slope, psi, weight)))


def sample(p: dist.Distribution, estimator: Estimator, num: int, seed: int) -> np.ndarray:
    """Draws from the estimator's proposal."""
    served = _served(p, estimator)
    _, target = _site(p, served, num)
    return np.asarray(target.push(propose(target, served, jax.random.key(seed))))


def density(p: dist.Distribution, x: np.ndarray) -> np.ndarray:
    return np.exp(np.asarray(p.log_prob(jnp.asarray(x, float))))


def _served(p: dist.Distribution, estimator: Estimator) -> Estimator:
    return estimator.resolve(NumPyroTarget("x", p, enters=True))


def _site(p: dist.Distribution, served: Estimator, num: int) -> tuple[dist.Distribution, NumPyroTarget]:
    """A site of ``num`` independent elements."""
    p = p.expand((num,))
    return p, NumPyroTarget("x", p, served.enters)

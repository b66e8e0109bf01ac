"""The numbers that figures show: what an estimator does at a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flowvi.estimators import Estimator, attach
from flowvi.host import Host
from flowvi.ops import Array

NUM = 2000  # draws that show the field of a host's sampler


class Reading(NamedTuple):
    """What an estimator does at samples x (along axis 0) as its parameter moves.

    Attributes:
        drawn: Whether x are draws of the host's sampler instead of the given points.
        x: The values of the site.
        phi: f(x).
        slope: The derivative of f along the flow: u where f is the identity, u . grad f otherwise.
        psi: The score term.
        weight: p / q.
    """

    drawn: bool
    x: np.ndarray
    phi: np.ndarray
    slope: np.ndarray
    psi: np.ndarray
    weight: np.ndarray

    def at(self, i: np.ndarray) -> Reading:
        """Some of the samples, by index or mask."""
        return Reading(self.drawn, *(a[i] for a in self[1:]))


def _identity(x: Array) -> Array:
    return x


def read(
    host: Host,
    move: Callable[[Array], Any],
    estimator: Estimator,
    x: np.ndarray,
    *,
    t: float = 0.0,
    f: Callable[[Array], Array] = _identity,
    seed: int = 0,
) -> Reading:
    """What an estimator does at ``move(t)``, at x; for the host's own sampler, at as many of its draws."""
    estimator = _resolved(host, move(host.array(t)), estimator)
    if estimator.compares or estimator.biased:
        does = "compares the cost at several values" if estimator.compares else "moves a discrete value"
        raise ValueError(
            f"a picture shows a velocity and a score, but {estimator} {does} and has neither; gradient_report shows its noise."
        )
    zero = host.array(np.zeros(len(x)))

    def run(t: Array) -> tuple[Array, ...]:
        p = move(t).expand((len(x),))
        if estimator.uses_sampler:
            value = host.rsample(p, seed)
            return f(value), zero, value, zero
        target = host.target("x", p, estimator.enters)
        draw = attach(host.ops, target, estimator, target.pull(host.array(x)))
        score, log_weight = (zero if a is None else a for a in (draw.score, draw.log_weight))
        return f(draw.value), score, draw.value, log_weight

    (phi, _, value, log_weight), (slope, psi, _, _) = host.derivative(run, t)
    return Reading(estimator.uses_sampler, value, phi, slope, psi, np.exp(log_weight))


def sample(host: Host, p: Any, estimator: Estimator, num: int, seed: int) -> np.ndarray:
    """Draws from the estimator's proposal."""
    estimator = _resolved(host, p, estimator)
    target = host.target("x", p.expand((num,)), estimator.enters)
    q, _ = estimator.proposal(host.ops, target)
    return host.numpy(target.push(host.sample(target, q, seed)))


def density_at(host: Host, p: Any, x: np.ndarray) -> np.ndarray:
    return np.exp(host.numpy(p.log_prob(host.array(x))))


def weight_at(host: Host, p: Any, estimator: Estimator, x: np.ndarray) -> np.ndarray:
    """The weight p / q at x."""
    return np.ones(len(x)) if estimator.q is None else read(host, lambda t: p, estimator, x).weight


def _resolved(host: Host, p: Any, estimator: Estimator) -> Estimator:
    return estimator.resolve(host.target("x", p, True))

"""Weights of the two neighbours of an integer, with their derivatives, for families in which they have a closed form.

The weight of the cost at k + 1 has the derivative -dF(k) / p(k); the weight of the cost at k - 1 has the derivative dF(k - 1) / p(k).
Both come from summation by parts of sum_k dp(k) phi(k). They are 0 at an end of the support, where there is no neighbour.
"""

from __future__ import annotations

from typing import Any

from flowvi.family import Neighbours
from flowvi.ops import Array, Ops


def _ratio(ops: Ops, live: Array, by: Array) -> Array:
    """A live array divided by a detached one, and 0 where the latter is 0, as a rounded probability may be."""
    by = ops.stop_gradient(by)
    inverse = ops.where(by > 0, 1 / ops.where(by > 0, by, 0 * by + 1), 0 * by)
    return live * inverse


BERNOULLI = Neighbours(
    above=lambda ops, p, k: (1 - k) * _ratio(ops, p.probs, 1 - p.probs),
    below=lambda ops, p, k: -k * _ratio(ops, p.probs, p.probs),
)
BINOMIAL = Neighbours(
    above=lambda ops, p, k: (p.total_count - k) * _ratio(ops, p.probs, 1 - p.probs),
    below=lambda ops, p, k: -k * _ratio(ops, p.probs, p.probs),
)
GEOMETRIC = Neighbours(
    above=lambda ops, p, k: -(k + 1) * _ratio(ops, p.probs, p.probs),
    below=lambda ops, p, k: k * _ratio(ops, p.probs, p.probs * (1 - p.probs)),
)
# from the mean r p / (1 - p), which both hosts have in each parameterisation: dp / (1 - p) = dmean / (mean + r)
NEGATIVE_BINOMIAL = Neighbours(
    above=lambda ops, p, k: (k + p.total_count) * _ratio(ops, p.mean, p.mean + p.total_count),
    below=lambda ops, p, k: -k * _ratio(ops, p.mean, p.mean),
    constant=("total_count",),
)
POISSON = Neighbours(
    above=lambda ops, p, k: p.rate,
    below=lambda ops, p, k: -k * _ratio(ops, p.rate, p.rate),
)


def _categorical_above(ops: Ops, p: Any, k: Array) -> Array:
    below, mass = _below_and_mass(ops, p, k)
    return -_ratio(ops, below + mass, mass)


def _categorical_below(ops: Ops, p: Any, k: Array) -> Array:
    return _ratio(ops, *_below_and_mass(ops, p, k))


def _below_and_mass(ops: Ops, p: Any, k: Array) -> tuple[Array, Array]:
    """F(k - 1) and p(k)."""
    probs = p.probs
    here = ops.eye(probs.shape[-1], probs)[k]
    below = probs.cumsum(-1) - probs
    return ops.where(here, below, 0 * below).sum(-1), ops.where(here, probs, 0 * probs).sum(-1)


def _categorical_next(ops: Ops, p: Any, k: Array, step: int) -> tuple[Array, Array]:
    """The next category of positive probability, or else the one beside k, whose probability may have a derivative."""
    probs = ops.stop_gradient(p.probs)
    number = ops.asarray(range(probs.shape[-1]), k).reshape((*(1,) * k.ndim, -1))
    beyond = (probs > 0) & ((number - k[..., None]) * step > 0)
    count = beyond.cumsum(-1)
    nearest = beyond & (count == (1 if step > 0 else count[..., -1:]))
    exists = count[..., -1] > 0
    beside = ops.where(k == (probs.shape[-1] - 1 if step > 0 else 0), k, k + step)
    return ops.where(exists, ops.where(nearest, number, 0 * number).sum(-1), beside), exists


CATEGORICAL = Neighbours(_categorical_above, _categorical_below, next=_categorical_next)

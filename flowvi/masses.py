"""Probabilities of the values of discrete families, with right derivatives where those of the hosts' log densities fail.

NumPyro's log densities of Bernoulli and Binomial have a wrong derivative at logits of exactly 0, and a logarithm has an infinite
derivative at a probability of 0.
"""

from __future__ import annotations

from typing import Any

from flowvi.ops import Array, Ops


def bernoulli(ops: Ops, p: Any, values: Array) -> Array:
    return ops.where(values == 1, p.probs, 1 - p.probs)


def binomial(ops: Ops, p: Any, values: Array) -> Array:
    probs = p.probs
    fixed = ops.stop_gradient(probs)
    score = (values - p.total_count * fixed) / (fixed * (1 - fixed))
    return ops.stop_gradient(ops.exp(p.log_prob(values))) * (1 + score * (probs - fixed))


def categorical(ops: Ops, p: Any, values: Array) -> Array:
    """The values are the indices in order, or unit vectors in that order."""
    return ops.moveaxis(p.probs, (-1,), (0,))

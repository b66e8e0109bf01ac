"""Probabilities of the values of discrete families, with right derivatives where those of the hosts' log densities fail.

NumPyro's log densities of Bernoulli and Binomial have a wrong derivative at logits of exactly 0, and a logarithm has an infinite
derivative at a probability of 0.
"""

from __future__ import annotations

from typing import Any

from flowvi.ops import Array, Ops


def bernoulli(ops: Ops, p: Any, values: Array) -> Array:
    probs = _over(p.probs, values)
    return ops.where(values == 1, probs, 1 - probs)


def binomial(ops: Ops, p: Any, values: Array) -> Array:
    probs = _over(p.probs, values)
    fixed = ops.stop_gradient(probs)
    mean = _over(p.total_count * ops.stop_gradient(p.probs), values)
    score = (values - mean) / (fixed * (1 - fixed))
    return ops.stop_gradient(ops.exp(p.log_prob(values))) * (1 + score * (probs - fixed))


def _over(a: Any, values: Array) -> Any:
    """An array over the batch of p, with the dims of the values; a number stays one."""
    shape = getattr(a, "shape", ())
    return a.reshape((*(1,) * (values.ndim - len(shape)), *shape)) if shape else a


def categorical(ops: Ops, p: Any, values: Array) -> Array:
    """The values are the indices in order, or unit vectors in that order."""
    return ops.moveaxis(p.probs, (-1,), (0,))

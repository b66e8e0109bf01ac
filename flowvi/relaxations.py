r"""Discrete families as functions of continuous variables, x = H(z), with z = eta plus noise that has no parameters.

For a Bernoulli eta is the logit, the noise Logistic and H(z) = [z > 0]. For categories eta is the vector of log probabilities, the
noise Gumbel and H(z) the category of the largest coordinate. So dz/deta = 1. Given x, z is another function of eta and of uniform
numbers, coordinate by coordinate, with another derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from flowvi.ops import Array, Ops

LEAST = 2.0**-26  # replaces a uniform number that was rounded to 0
IMPOSSIBLE = -80.0  # replaces the log probability of a category of probability 0, whose relaxed value would be infinite


class Relaxation(ABC):
    """A discrete family as a function of a continuous variable z; all arrays have the shape of z."""

    @abstractmethod
    def eta(self, ops: Ops, p: Any, batch_shape: tuple[int, ...]) -> Array:
        """The natural parameters, live, over a batch shape."""

    @abstractmethod
    def hard(self, ops: Ops, x: Array, eta: Array) -> Array:
        """The draw x in floats: 0 or 1, or a unit vector."""

    @abstractmethod
    def soft(self, ops: Ops, z: Array) -> Array:
        """The sigmoid or softmax of z, which relaxes x. That of eta is the vector of probabilities."""

    @abstractmethod
    def moved(self, soft: Array, dz: Array) -> Array:
        """The derivative of ``soft`` along dz."""

    @abstractmethod
    def in_logits(self, g: Array, probs: Array) -> Array:
        """A gradient in eta as a gradient in independent logits."""

    @abstractmethod
    def _given(self, ops: Ops, eta: Array, hard: Array, log_v: Array, log1m_v: Array) -> tuple[Array, Array]:
        """See :meth:`given`, with the logarithms of v and of 1 - v."""

    def given(self, ops: Ops, eta: Array, hard: Array, v: Array) -> tuple[Array, Array]:
        """A draw of z given x, from uniform numbers v between 0 and 1, and its derivative dz/deta. All arguments are detached."""
        v = ops.where(v > 0, v, 0 * v + LEAST)
        return self._given(ops, eta, hard, ops.log(v), ops.log1p(-v))


class Binary(Relaxation):
    """The Bernoulli."""

    def eta(self, ops: Ops, p: Any, batch_shape: tuple[int, ...]) -> Array:
        return ops.broadcast_to(1.0 * p.logits, batch_shape)

    def hard(self, ops: Ops, x: Array, eta: Array) -> Array:
        return ops.asarray(x, eta)

    def soft(self, ops: Ops, z: Array) -> Array:
        return sigmoid(ops, z)

    def moved(self, soft: Array, dz: Array) -> Array:
        return soft * (1 - soft) * dz

    def in_logits(self, g: Array, probs: Array) -> Array:
        return g

    def _given(self, ops: Ops, eta: Array, hard: Array, log_v: Array, log1m_v: Array) -> tuple[Array, Array]:
        sign = 2 * hard - 1
        away = log_v + sign * eta
        return sign * (ops.logaddexp(0 * away, away) - log1m_v), sigmoid(ops, away)


class Categories(Relaxation):
    """Categorical, whose x is an index, and OneHotCategorical."""

    def eta(self, ops: Ops, p: Any, batch_shape: tuple[int, ...]) -> Array:
        eta = ops.log_softmax(1.0 * p.logits, -1)
        eta = ops.where(eta > IMPOSSIBLE, eta, ops.asarray(IMPOSSIBLE, eta))
        return ops.broadcast_to(eta, (*batch_shape, eta.shape[-1]))

    def hard(self, ops: Ops, x: Array, eta: Array) -> Array:
        if x.ndim == eta.ndim:
            return ops.asarray(x, eta)
        here = ops.eye(eta.shape[-1], eta)[x]
        return ops.where(here, 0 * eta + 1, 0 * eta)

    def soft(self, ops: Ops, z: Array) -> Array:
        return ops.exp(ops.log_softmax(z, -1))

    def moved(self, soft: Array, dz: Array) -> Array:
        return soft * (dz - (soft * dz).sum(-1, keepdims=True))

    def in_logits(self, g: Array, probs: Array) -> Array:
        return g - probs * g.sum(-1, keepdims=True)

    def _given(self, ops: Ops, eta: Array, hard: Array, log_v: Array, log1m_v: Array) -> tuple[Array, Array]:
        log_e = ops.log(-log_v)  # of an Exponential
        of_x = (hard * log_e).sum(-1, keepdims=True)
        of_others = log_e - eta
        return -ops.where(hard == 1, log_e, ops.logaddexp(of_others, of_x)), (1 - hard) * sigmoid(ops, of_others - of_x)


def sigmoid(ops: Ops, z: Array) -> Array:
    return 0.5 + 0.5 * ops.tanh(0.5 * z)


BINARY, CATEGORIES = Binary(), Categories()

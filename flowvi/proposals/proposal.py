"""What a proposal is, and the defensive mixture with p."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flowvi.host import host_of
from flowvi.ops import Array, Ops

Proposal = Callable[[Any], Any]


class Density(ABC):
    """A density built from distributions ``parts`` of one host, p first. The host's ``Proposal`` makes it a distribution."""

    @abstractmethod
    def sample(self, ops: Ops, parts: Sequence[Any], draws: Sequence[Array], uniforms: Array) -> Array:
        """A sample, from one draw of each part and three uniform numbers."""

    @abstractmethod
    def log_prob(self, ops: Ops, parts: Sequence[Any], x: Array) -> Array:
        """The normalized log density."""


def named(name: str, q: Proposal) -> Proposal:
    q.__name__ = f"proposals.{name}"
    return q


def refuse(name: str, families: Sequence[str], p: Any) -> NoReturn:
    raise ValueError(f"{name} is for {', '.join(families)}; found {type(p).__name__}. Your own function q(p) works for any family.")


@dataclass(frozen=True)
class _Mixture(Density):
    """(1 - epsilon) q + epsilon p, of parts (p, q)."""

    epsilon: float

    def sample(self, ops, parts, draws, uniforms):
        from_p, from_q = draws
        keep = uniforms[0] < self.epsilon
        return ops.where(keep.reshape((*keep.shape, *(1,) * (from_p.ndim - keep.ndim))), from_p, from_q)

    def log_prob(self, ops, parts, x):
        p, q = parts
        return ops.logaddexp(math.log(self.epsilon) + p.log_prob(x), math.log1p(-self.epsilon) + q.log_prob(x))


def defensive(q: Proposal, epsilon: float = 0.2) -> Proposal:
    r"""The mixture (1 - epsilon) q + epsilon p.

    The weights are below 1 / epsilon. So the second moment of an estimator is at most 1 / epsilon times that at q = p, and the variance
    is finite if it is finite at q = p.

    **Requirements**: a q whose density can be computed at the samples of p.

    Args:
        q: ``q(p) -> distribution``.
        epsilon: The weight of p, between 0 and 1.

    Returns:
        The function q.

    Raises:
        ValueError: ``epsilon`` is not between 0 and 1.

    Example:
        A q that is 0 at the mode, where the weight p / q of the mixture is 1 / epsilon:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import proposals
        >>> p = dist.Normal(0.0, 1.0)
        >>> q = proposals.defensive(proposals.slice_by_height(epsilon=0), epsilon=0.1)(p)
        >>> round(float(jnp.exp(p.log_prob(0.0) - q.log_prob(0.0))), 3)
        10.0

    References:
        Hesterberg 1995; Owen and Zhou 2000.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"defensive: expected an epsilon between 0 and 1, found {epsilon}.")

    def mixture(p: Any) -> Any:
        return host_of(p).proposal(_Mixture(epsilon), p, q(p).expand(p.batch_shape))

    return named(f"defensive({getattr(q, '__name__', q)}, epsilon={epsilon})", mixture)


def perhaps_defensive(name: str, q: Proposal, epsilon: float) -> Proposal:
    """``q``, or its defensive mixture; ``name`` is the beginning of its name, up to the value of epsilon."""
    return named(f"{name}{epsilon})", q if epsilon == 0 else defensive(q, epsilon))

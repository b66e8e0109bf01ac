"""What the biased estimators share: a discrete value that has the derivative of a relaxation."""

from __future__ import annotations

from abc import abstractmethod

from flowvi.estimators.estimator import Draw, Estimator
from flowvi.family import family_of, names
from flowvi.ops import Array, Ops
from flowvi.refusals import RELAXATIONS
from flowvi.relaxations import Relaxation
from flowvi.target import Target


class Relaxed(Estimator):
    """An estimator that gives a discrete value a velocity, as if the cost were defined, and smooth, between the values."""

    enters = False
    biased = True

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        what, relaxation = type(self).__name__, family_of(target.p).relaxation
        if relaxation is None:
            relaxed = names(lambda family: family.relaxation)
            known = ", ".join(name for name in relaxed if not name.startswith("Categorical"))  # whose value is an index
            instead = "LR()" if target.is_discrete() else "RP()"
            target.refuse(
                f"{what} needs a site whose value can be relaxed, expected one of {known}, found {target.family}; use {instead}.",
                RELAXATIONS,
            )
        eta = relaxation.eta(ops, target.p, target.batch_shape)
        if x.ndim < eta.ndim:
            target.refuse(
                f"{what} needs a value that can move, but the value of a {target.family} is an index; use Enumerate() or Surrogate(c), "
                "which take an index, a Bernoulli, or in Pyro a OneHotCategorical.",
                RELAXATIONS,
            )
        fixed = ops.stop_gradient(eta)
        hard = relaxation.hard(ops, x, fixed)
        return Draw(hard + self.velocity(ops, target, relaxation, hard, fixed, ops.tether(eta)))

    @abstractmethod
    def velocity(self, ops: Ops, target: Target, relaxation: Relaxation, hard: Array, eta: Array, deta: Array) -> Array:
        """How the value moves: linear in deta, the tangent of the logits (of categories: the log probabilities) eta."""

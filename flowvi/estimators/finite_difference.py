"""The cost at a neighbouring integer: the discrete form of the pathwise derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowvi.alternatives import Alternatives, Comparison, Lanes, require_lanes
from flowvi.estimators.estimator import Draw, Estimator, refuse_moving_support
from flowvi.family import family_of
from flowvi.ops import Array, Ops, times
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class FiniteDifference(Estimator):
    r"""The GO gradient, a finite difference between neighbouring integers: :math:`E = a(x)\,(\phi(x+1) - \phi(x))`.

    :math:`a(k) = -\nabla_\theta F(k) / p(k)` is the discrete form of the pathwise velocity, and there is no score. At the upper end of
    the support a is 0. The cost is evaluated at one more value. The other draws use the same random numbers. The elements of a plate
    share one run if everything that depends on them stays within the plate, as for :class:`~flowvi.Enumerate`.

    **Requirements**: a distribution of integers whose support does not move: Bernoulli, Binomial, Categorical, Geometric,
    NegativeBinomial (with a constant ``total_count``), Poisson, or any other with a ``cdf`` that is differentiable in the parameters.
    Not inside ``scan`` or ``cond``.

    Args:
        lanes: ``"all"`` gives every element that cannot share a run its own run. ``"random"`` draws one of these runs, with a
            probability in proportion to its weight; this is unbiased.
        downwards: Compare with x - 1: :math:`E = a(x)\,(\phi(x-1) - \phi(x))` with :math:`a(k) = \nabla_\theta F(k-1) / p(k)`.
        share: The blend with the likelihood ratio: u is ``share`` times a, and
            :math:`\psi = (1 - \mathrm{share})\,\nabla_\theta \log p`. It is unbiased for any number but 0.

    Raises:
        TypeError: ``lanes`` is neither ``"all"`` nor ``"random"``, or ``share`` is 0 or not a finite number.
        ValueError: At the first run, naming the site: a distribution that is not on integers, a support that moves with a parameter, a
            cdf that is missing or has no derivative.

    Example:
        The gradient of E[x^2] under a Poisson, in its rate, is the difference 2 x + 1 of neighbouring squares.

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import FiniteDifference
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     k = numpyro.sample("k", dist.Poisson(1.0).mask(False))
        ...     numpyro.factor("cost", k**2)
        >>> def guide():
        ...     numpyro.sample("k", dist.Poisson(numpyro.param("rate", 3.0)).mask(False))
        >>> elbo = TraceFlow_ELBO(default=FiniteDifference())
        >>> gradient = jax.grad(lambda rate, key: -elbo.loss(key, {"rate": rate}, model, guide))
        >>> [float(gradient(3.0, jax.random.key(seed))) for seed in range(4)]
        [13.0, 3.0, 13.0, 7.0]

    References:
        Cong et al. 2019 (GO gradient). Parmas and Sugiyama 2021, eq. 19, with a difference instead of the derivative.
    """

    lanes: Lanes = "all"
    downwards: bool = False
    share: float = 1.0
    enters = False
    compares = True

    def __post_init__(self) -> None:
        require_lanes(self.lanes, "FiniteDifference")
        if not isinstance(self.share, (int, float)) or not math.isfinite(self.share) or self.share == 0:
            raise TypeError(f"FiniteDifference: expected a share that is a finite number and not 0, found {self.share!r}; 0 is LR().")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        _require_integers(target)
        step = -1 if self.downwards else 1
        y, is_possible = self._neighbour(ops, target, x, step)
        at_end = y == x
        weight = self._weight(ops, target, ops.where(at_end, x - step, x))
        weight = ops.broadcast_to(ops.where(at_end, 0 * weight, times(weight, self.share)), x.shape)
        if is_possible is not None:  # at a weight of value 0, a cost that is not finite counts as nothing
            weight = ops.where(is_possible, weight, ops.tether(weight))

        def make(uniforms: Array) -> Alternatives:
            return Alternatives(y[None], weight[None])

        whole = self.share == 1
        comparison = Comparison(make, x, target.event_ndim, target.batch_ndim, 1, lanes=self.lanes, is_whole=whole)
        if whole:
            return Draw(x, comparison=comparison)
        log_prob = target.to_batch(target.p.log_prob(x))
        return Draw(x, (1 - self.share) * log_prob, log_prob=log_prob, comparison=comparison)

    def _neighbour(self, ops: Ops, target: Target, x: Array, step: int) -> tuple[Array, Array | None]:
        """The value with which the cost at x is compared, or x itself at an end of the support; whether its probability is positive."""
        known = family_of(target.p).neighbours
        if known is not None and known.next is not None:
            return known.next(ops, target.p, x, step)
        at_end = x <= target.support.lower if self.downwards else x >= target.support.upper
        return ops.where(at_end, x, x + step), None

    def _weight(self, ops: Ops, target: Target, x: Array) -> Array:
        """The weight of the neighbour with its derivative, at an x that has a neighbour."""
        if (known := family_of(target.p).neighbours) is not None:
            if live := target.live(*known.constant):
                target.refuse(
                    f"FiniteDifference needs a constant {' and '.join(live)} of {target.family}, found one with a gradient; use LR()."
                )
            return known.below(ops, target.p, x) if self.downwards else known.above(ops, target.p, x)
        mass = ops.stop_gradient(ops.exp(target.p0.log_prob(x)))
        if self.downwards:
            return target.cdf(x - 1, target.p, "FiniteDifference", "use LR()") / mass
        return -target.cdf(x, target.p, "FiniteDifference", "use LR()") / mass


def _require_integers(target: Target) -> None:
    if not target.is_discrete():
        target.refuse(
            f"FiniteDifference needs a distribution of integers, but {target.family} is continuous; use RP() or MeasureValued()."
        )
    if target.event_ndim or target.support.kind != "coordinates":
        target.refuse(
            f"FiniteDifference needs a distribution of integers, but the support of {target.family} is {target.support}; use LR()."
        )
    refuse_moving_support(target, "FiniteDifference")

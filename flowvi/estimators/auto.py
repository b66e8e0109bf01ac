"""The default estimator: pathwise where possible, an exact sum where that is cheap, else the likelihood ratio."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.alternatives import Comparison
from flowvi.estimators.enumerate import Enumerate
from flowvi.estimators.estimator import Draw, Estimator
from flowvi.estimators.lr import LR
from flowvi.estimators.rp import RP
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class Auto(Estimator):
    """The default: :class:`RP`, or at a discrete site :class:`Enumerate` where that is cheap, else :class:`LR`.

    * RP if the host's distribution is fully reparameterized with an unbiased derivative.
    * Enumerate at discrete sites with finitely many values, in program order, as long as these sites together add at most two
      evaluations of the program per particle. A Bernoulli adds one, and so does a plate of Bernoullis if each element has its own
      costs. Python must not branch on draws: in NumPyro it cannot, in Pyro ``dependencies="graph"`` finds out. There is no exact sum
      under a Rényi bound or inside ``scan`` or ``cond``.
    * LR everywhere else, with the baseline of the objective.

    ``describe`` shows the choice. It never depends on a draw, so the gradient is unbiased.

    **Requirements**: those of the chosen estimator.

    Raises:
        ValueError: At the first run, naming the site, if no choice is right (a moving support without a reparameterized sampler).

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def program():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("b", dist.Bernoulli(0.3))
        ...     numpyro.sample("k", dist.Poisson(2.0))
        >>> print(TraceFlow_ELBO().describe(program, program))  # with the default estimator Auto()
        site  estimator    given by  distribution    parameters  plates
        x     RP()         default   Normal          loc, scale
        b     Enumerate()  default   BernoulliProbs  probs
        k     LR()         default   Poisson         rate
        2 evaluations of the program per particle

    References:
        Schulman, Heess, Weber and Abbeel 2015.
    """

    def resolve(self, target: Target) -> Estimator:
        if not target.lacks_rsample():
            return RP()
        return _ScoreOrSum() if target.is_discrete() else LR()

    def psi_is_zero(self, target: Target) -> bool:
        return not target.lacks_rsample()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        raise TypeError("Auto is resolved to another estimator before it is attached.")


@dataclass(frozen=True, repr=False)
class _ScoreOrSum(LR):
    """The likelihood ratio. An objective may replace it by the exact sum when it knows how many evaluations the sum takes."""

    def __repr__(self) -> str:
        return repr(LR())

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        def exact() -> Comparison | None:
            try:
                return Enumerate().attach(ops, target, x).comparison
            except ValueError:  # the support is infinite, or not the same for all elements
                return None

        return super().attach(ops, target, x)._replace(instead=exact)

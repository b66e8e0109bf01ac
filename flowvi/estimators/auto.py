"""The default: pathwise where the host's distribution allows it, else the likelihood ratio."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.estimators.estimator import Draw, Estimator
from flowvi.estimators.lr import LR
from flowvi.estimators.rp import RP
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class Auto(Estimator):
    """:class:`RP` where the host's distribution is fully reparameterized with an unbiased derivative, else :class:`LR`; the default.

    **Requirements**: those of the estimator it chooses.

    Raises:
        ValueError: At the first run, naming the site, where neither is right (a moving support without a reparameterized sampler).

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def program():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("k", dist.Poisson(2.0))
        >>> print(TraceFlow_ELBO().describe(program, program))  # with the default estimator Auto()
        site  estimator  given by  distribution  parameters  plates
        x     RP()       default   Normal        loc, scale
        k     LR()       default   Poisson       rate

    References:
        Schulman, Heess, Weber and Abbeel 2015.
    """

    q = None

    def resolve(self, target: Target) -> Estimator:
        return LR() if target.lacks_rsample() else RP()

    def psi_is_zero(self, target: Target) -> bool:
        return not target.lacks_rsample()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        raise TypeError("Auto is resolved to RP or LR before it is attached.")

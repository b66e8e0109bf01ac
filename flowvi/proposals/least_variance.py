"""The density of least variance for one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowvi.family import FAMILIES, Family, Stretch, family_of, names
from flowvi.host import host_of
from flowvi.ops import Array, Ops
from flowvi.proposals.proposal import Density, Proposal, perhaps_defensive
from flowvi.proposals.slices import REACH, bisect, slice_by_height
from flowvi.standardizations import location_scale


@dataclass(frozen=True)
class _OptimalStretch(Density):
    """|d_theta p| of a scale or a rate, over its integral; d_theta F is z f(z) up to a factor and is inverted piece by piece."""

    two_sided: bool
    stretch: Stretch

    def _log_mass(self, ops: Ops, p: Any, log_z: Array) -> Array:
        """The log of z f(z)."""
        z, unit = ops.exp(log_z), self.stretch.unit(p)
        origin = p.loc if self.two_sided else 0.0
        return log_z + p.log_prob(origin + unit * z) + ops.log(unit + 0 * z)

    def _log_peak(self, ops: Ops, p: Any, like: Array) -> Array:
        return ops.log(ops.asarray(self.stretch.peak(p), like) + 0 * like)

    def sample(self, ops, parts, draws, uniforms):
        (p,), (side, inside, v) = parts, uniforms
        start = self._log_peak(ops, p, v)
        goal = self._log_mass(ops, p, start) + ops.log(v)
        far = start + ops.where(inside < 0.5, -REACH + 0 * v, REACH + 0 * v)
        near, far = bisect(ops, lambda log_z: self._log_mass(ops, p, log_z) > goal, start, far)
        z = ops.exp((near + far) / 2)
        if self.two_sided:
            return p.loc + self.stretch.unit(p) * ops.where(side < 0.5, -z, z)
        return self.stretch.unit(p) * z

    def log_prob(self, ops, parts, x):
        (p,) = parts
        z = (abs(x - p.loc) if self.two_sided else x) / self.stretch.unit(p)
        log_total = self._log_mass(ops, p, self._log_peak(ops, p, z)) + math.log(4.0 if self.two_sided else 2.0)
        return p.log_prob(x) + ops.log(abs(self.stretch.balance(ops, p, z))) - log_total


def optimal(parameter: str, epsilon: float = 0.2) -> Proposal:
    r"""The density of LR of least variance for an unknown bounded cost: q = |d_theta p| / integral |d_theta p|.

    For a constant cost, the second moment of LR falls to 0.64 of its value at q = p for the location of a Normal, to 0.47 for its
    scale, and to 0.54 for the rate of an Exponential.

    **Requirements**: ``loc`` or ``scale`` of Normal, Laplace, Logistic, Cauchy and StudentT, ``loc`` of Gumbel, ``scale`` of HalfNormal
    and Weibull, ``rate`` of Exponential, Gamma and InverseGamma. One q is for one parameter: with ``epsilon=0`` it is 0 where the score
    of this parameter is 0, so the variance is infinite for every other parameter and for every pathwise field.

    Args:
        parameter: The name of the parameter.
        epsilon: The weight of p in the mixture, see :func:`defensive`; 0 for the pure density.

    Returns:
        The function q.

    Raises:
        ValueError: At the first run, for another family or parameter.

    Example:
        The second moment at a constant cost, relative to that of LR at q = p:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import LR, plot, proposals
        >>> def moment(estimator):
        ...     return (plot.gradient_samples(dist.Normal(0.0, 1.0), estimator, "scale", lambda x: 1 + 0 * x) ** 2).mean()
        >>> bool(abs(moment(LR(q=proposals.optimal("scale", epsilon=0))) / moment(LR()) - 0.47) < 0.05)
        True

    References:
        Parmas and Sugiyama 2021, section 3 (importance sampling from q proportional to |d_theta p|).
    """

    def q(p: Any) -> Any:
        known = family_of(p)
        if parameter == "loc" and _is_shifted(known):
            return slice_by_height(epsilon=0)(p)
        if known.stretch is not None and parameter == known.stretch.parameter:
            return host_of(p).proposal(_OptimalStretch(known.symmetric, known.stretch), p)
        possible = [f"{name}.loc" for name in names(_is_shifted)]
        possible += [f"{family.name}.{family.stretch.parameter}" for family in FAMILIES.values() if family.stretch is not None]
        raise ValueError(
            f"optimal({parameter!r}) is for {', '.join(possible)}; found {type(p).__name__}. Write your own function q(p)."
        )

    return perhaps_defensive(f"optimal({parameter!r}, epsilon=", q, epsilon)


def _is_shifted(family: Family) -> bool:
    """Whether ``loc`` shifts a density with one peak whose horizontal slices are known."""
    return family.peak is not None and family.standardization is location_scale

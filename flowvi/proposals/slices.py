"""Slice integrals: the ends of the horizontal slices of a density with one peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowvi.family import SkewPeak, SymmetricPeak, family_of, names
from flowvi.host import host_of
from flowvi.ops import Array, Ops
from flowvi.proposals.proposal import Density, Proposal, perhaps_defensive, refuse

REACH = 85.0  # the range of a bisection in log units: in single precision uniform numbers are above exp(-85), and exp(85) is finite
NEAR = 60.0  # the range from the mode towards an end of the support: weights beyond it are below exp(-NEAR)


def bisect(ops: Ops, inside: Callable[[Array], Array], near: Array, far: Array) -> tuple[Array, Array]:
    """A bracket of the point where ``inside`` changes, between ``near``, which is inside, and ``far``, which is not."""

    def halve(bracket):
        near, far = bracket
        middle = (near + far) / 2
        within = inside(middle)
        return ops.where(within, middle, near), ops.where(within, far, middle)

    return ops.iterate(halve, 60, (near, far))


@dataclass(frozen=True)
class _SymmetricSlice(Density):
    """The ends of the horizontal slices of p; the slices are drawn by mass or by height."""

    by: str
    peak: SymmetricPeak

    def sample(self, ops, parts, draws, uniforms):
        (p,), (x,), (height, side, _) = parts, draws, uniforms
        if self.by == "mass":
            height = height * ops.exp(p.log_prob(x) - p.log_prob(p.loc + 0 * x))
        z = self.peak.level(ops, p, height)
        return p.loc + p.scale * ops.where(side < 0.5, -z, z)

    def log_prob(self, ops, parts, x):
        (p,) = parts
        z = abs(x - p.loc) / p.scale
        log_q = p.log_prob(x) + ops.log(self.peak.slope(ops, p, z))
        if self.by == "mass":
            return log_q + ops.log(z)
        return log_q - p.log_prob(p.loc + 0 * x) - ops.log(2 * p.scale)


@dataclass(frozen=True)
class _SkewSlice(Density):
    """The ends of the slices of a density with a peak, found by bisection; the slices are drawn by mass or by height."""

    by: str
    peak: SkewPeak

    @property
    def falls(self) -> bool:
        return self.peak.mode is None

    def sample(self, ops, parts, draws, uniforms):
        (p,), (x,), (height, side, _) = parts, draws, uniforms
        mode = self.mode(ops, p, x)
        level = p.log_prob(x if self.by == "mass" else mode) + ops.log(height)
        return self._end(ops, p, mode, level, side >= (0.0 if self.falls else 0.5))

    def log_prob(self, ops, parts, x):
        (p,) = parts
        mode, falls = self.mode(ops, p, x), self.falls
        level, slope = ops.derivative(p.log_prob, x, live=False)
        log_q = level + ops.log(abs(slope)) + 0 * mode  # NaN without a mode, whatever the host's log_prob gives
        if self.by == "height":
            log_q = log_q - p.log_prob(mode)
        else:
            log_q = log_q + ops.log(abs(x - (mode if falls else self._end(ops, p, mode, level, x < mode))))
        return log_q if falls else log_q - math.log(2.0)

    def mode(self, ops: Ops, p: Any, x: Array) -> Array:
        """The mode, in the shape of x; NaN if there is none inside the support, or if it is too close to an end."""
        if self.peak.mode is None:
            return math.exp(-REACH) + 0 * x
        mode = self.peak.mode(ops, p) + 0 * x
        for name in self.peak.shapes:
            mode = ops.where(getattr(p, name) + 0 * x > 1, mode, math.nan)
        for bound in self.peak.support:
            mode = ops.where(abs(mode - bound) > math.exp(-REACH), mode, math.nan)
        return mode

    def _end(self, ops: Ops, p: Any, mode: Array, level: Array, upper: Array) -> Array:
        """The end where log p is ``level``, by bisection from the end of the support (from the mode if that is infinite)."""
        sides = []
        for bound, sign in zip(self.peak.support, (-1.0, 1.0), strict=True):
            if math.isinf(bound):
                sides.append((mode, sign + 0 * mode, -REACH + 0 * mode, REACH))
            else:
                near = ops.log(abs(bound - mode))
                sides.append((bound + 0 * mode, -sign + 0 * mode, near, ops.where(near > NEAR - REACH, near - NEAR, -REACH + 0 * near)))
        origin, sign, near, far = (ops.where(upper, b + 0 * mode, a + 0 * mode) for a, b in zip(*sides, strict=True))

        def place(log_distance):
            return origin + sign * ops.exp(log_distance)

        def inside(log_distance):
            log_p = p.log_prob(place(log_distance))
            return (log_p > level) & (log_p < math.inf)  # NumPyro's InverseGamma is infinite at 0 in single precision

        return place(bisect(ops, inside, near, far)[0])


def _slice(name: str, by: str, epsilon: float) -> Proposal:
    def q(p: Any) -> Any:
        host, peak = host_of(p), family_of(p).peak
        if peak is None:
            refuse(name, names(lambda family: family.peak), p)
        if isinstance(peak, SymmetricPeak):
            return host.proposal(_SymmetricSlice(by, peak), p)
        density = _SkewSlice(by, peak)
        if peak.mode is not None:
            known = host.ops.all_finite(density.mode(host.ops, p, 0 * peak.mode(host.ops, p)))
            shapes = " and ".join(f"{shape} above 1" for shape in peak.shapes) or "not next to an end"
            host.ops.check(known, f"{name} needs a {type(p).__name__} with a peak inside its support, {shapes}.")
        return host.proposal(density, p)

    return perhaps_defensive(f"{name}(epsilon=", q, epsilon)


def slice_by_mass(epsilon: float = 0.2) -> Proposal:
    r"""The ends of the horizontal slices of p, drawn by mass: q = |p'(x)| width(p(x)) / 2.

    A slice is the set where p exceeds a height; d_loc E[phi] depends only on its ends. For a Normal this is z^2 p, the double-sided
    Maxwell density. If p only decreases, like an Exponential, only one end of a slice moves, and q = |p'| width(p).

    **Requirements**: Normal, Laplace, Logistic, Cauchy, StudentT or Gumbel, for LR in ``loc``. With the default ``epsilon``, for any
    parameter, also LogNormal, InverseGamma, Exponential, HalfNormal, HalfCauchy, and Gamma, Weibull or Beta with a mode inside the
    support. With ``epsilon=0`` q is 0 at the mode: the variance is then finite for LR in a ``loc`` that shifts p (the fourth moment is
    not), and infinite for every other parameter and for every pathwise field. The weight of an event is the product of the weights of
    its coordinates, so use this q for a few coordinates only. In single precision p/q is only as precise as the host's log p, which is
    not enough for a Gamma with a concentration above 1,000.

    Args:
        epsilon: The weight of p in the mixture, see :func:`defensive`; 0 for the pure density.

    Returns:
        The function q.

    Raises:
        ValueError: At the first run, for another family, or without a mode inside the support. Under jit, where parameters are not
            known, the loss is NaN instead.

    Example:
        For a Normal, q / p is z^2, here at z = 2:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import proposals
        >>> p = dist.Normal(0.0, 1.0)
        >>> q = proposals.slice_by_mass(epsilon=0)(p)
        >>> round(float(jnp.exp(q.log_prob(2.0) - p.log_prob(2.0))), 3)
        4.0

    References:
        Parmas and Sugiyama 2021, section 4 and appendix F.
    """
    return _slice("slice_by_mass", "mass", epsilon)


def slice_by_height(epsilon: float = 0.2) -> Proposal:
    r"""The ends of the horizontal slices of p, drawn by height: q = |p'(x)| / (2 max p).

    For a Normal this is |z| p sqrt(pi / 2), the double-sided Rayleigh density. It is the optimal density of LR in ``loc`` for an
    unknown bounded cost, ``optimal("loc")``. If p only decreases, like an Exponential, q = |p'| / max p.

    **Requirements**: those of :func:`slice_by_mass`. With ``epsilon=0`` q is 0 at the mode. For LR in a ``loc`` that shifts p, the
    variance is then finite if it is finite at q = p; for every other parameter and every pathwise field it is infinite. Only for an
    Exponential is q = p.

    Args:
        epsilon: The weight of p in the mixture, see :func:`defensive`; 0 for the pure density.

    Returns:
        The function q.

    Raises:
        ValueError: As for :func:`slice_by_mass`.

    Example:
        For a Normal, q / p is abs(z) sqrt(pi / 2), here at z = 2:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import proposals
        >>> p = dist.Normal(0.0, 1.0)
        >>> q = proposals.slice_by_height(epsilon=0)(p)
        >>> round(float(jnp.exp(q.log_prob(2.0) - p.log_prob(2.0))), 3)
        2.507

    References:
        Parmas and Sugiyama 2021, section 4 and appendix F.
    """
    return _slice("slice_by_height", "height", epsilon)

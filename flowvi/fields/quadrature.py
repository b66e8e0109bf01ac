"""Fields whose derivative of the cdf is an integral: Gamma, Beta and what is made of them, VonMises."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

from flowvi.fields.field import Elementwise, Field, _closed, _of_parts, _parts, _pathwise
from flowvi.fields.scalar import _rate
from flowvi.ops import Array, Ops
from flowvi.target import Tangents


def _quadrature() -> tuple[list[float], list[float]]:
    """Nodes and weights over (0, inf) for integrands that decay exponentially: the double-exponential rule r = exp(t - exp(-t))."""
    step = 0.15
    t = [-3.6 + step * k for k in range(52)]
    nodes = [math.exp(t - math.exp(-t)) for t in t]
    return nodes, [step * r * (1 + math.exp(-t)) for r, t in zip(nodes, t, strict=True)]


NODES, WEIGHTS = _quadrature()


def _outward(ops: Ops, f: Callable[[Array], Array], width: Array) -> Array:
    """The integral over (0, inf) of an f that decays on the scale ``width``; f maps an array with one more axis to the same shape."""
    r = width[..., None] * ops.asarray(NODES, width)
    return width * (f(r) * ops.asarray(WEIGHTS, width)).sum(-1)


def _width(ops: Ops, slope: Array, curvature: Array) -> Array:
    """The scale on which exp(-slope r - curvature r^2 / 2) decays, for a curvature that lasts for lengths of order 1."""
    return 1 / (abs(slope) + ops.where(curvature < 1, curvature, ops.sqrt(ops.where(curvature < 1, 0 * curvature + 1, curvature))))


def _gamma_implicit(ops: Ops, a: Array, y: Array) -> Array:
    """-(dF/da) / p of a Gamma(a, 1) at y, from the nearer end: in log y towards 0, in y towards infinity."""
    a = ops.broadcast_to(a, y.shape)
    below = y < a
    low, high = ops.where(below & (y > 0), y, a), ops.where(below, a, y)  # each branch at a point where it is used
    a_, low_, high_ = a[..., None], low[..., None], high[..., None]
    mean_log = ops.digamma(a_)

    def towards_zero(r: Array) -> Array:
        return (mean_log - ops.log(low_) + r) * ops.exp(-a_ * r - low_ * ops.expm1(-r))

    def towards_infinity(r: Array) -> Array:
        step = ops.log1p(r / high_)
        return (ops.log(high_) + step - mean_log) * ops.exp((a_ - 1) * step - r)

    return ops.where(
        below,
        y * _outward(ops, towards_zero, _width(ops, a - low, low)),
        _outward(ops, towards_infinity, _width(ops, 1 - a / high, a / high**2)),
    )


def _beta_implicit(ops: Ops, a: Array, b: Array, x: Array, one_minus_x: Array) -> Array:
    """-(dF/da) / (p x (1 - x)) of a Beta(a, b) at x, from the nearer end, in log x or log(1 - x)."""
    a, b = ops.broadcast_to(a, x.shape), ops.broadcast_to(b, x.shape)
    below = x * b < one_minus_x * a
    near, far = ops.where(below, a, b), ops.where(below, b, a)
    odds = ops.where(below, x, one_minus_x) / ops.where(below, one_minus_x, x)
    bend = ops.where(far > 1, far - 1, 0 * far) * odds
    near_, far_, odds_, below_ = near[..., None], far[..., None], odds[..., None], below[..., None]
    log_x = ops.log(ops.where(x > 0, x, a))[..., None]  # at x = 0 the field is 0, whatever stands here
    mean_log = (ops.digamma(a) - ops.digamma(a + b))[..., None]

    def integrand(r: Array) -> Array:
        tail = ops.log1p(-odds_ * ops.expm1(-r))
        return (log_x + ops.where(below_, -r, tail) - mean_log) * ops.exp(-near_ * r + (far_ - 1) * tail)

    return ops.where(below, -1 / one_minus_x, 1 / x) * _outward(ops, integrand, _width(ops, near - bend, bend * (1 + odds)))


def gamma_implicit() -> Field:
    r"""u_concentration = -(dF / d concentration) / p and u_rate = -x / rate; psi = 0.

    The derivative of the cdf is an integral of the score from the nearer end of the support, by 52-point double-exponential
    quadrature, held to 1e-8 of the exact one in the tests (torch's own sampler has an approximation).

    **Requirements**: a cost without jumps, and p phi -> 0 at infinity.

    Returns:
        The field of a Gamma.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.gamma_implicit())
        Flow(velocity=gamma_implicit())

    References:
        Figurnov, Mohamed and Mnih 2018; Jankowiak and Obermeyer 2018.
    """

    def u(ops: Ops, x: Array, p: Any) -> Array:
        return _gamma_implicit(ops, p.concentration, x * p.rate) / p.rate

    return _pathwise("gamma_implicit", ("Gamma",), concentration=u, rate=_rate)


def gamma_g_rep() -> Field:
    r"""u_concentration = x [c (log x - m) + psi_1(a)], c = psi_2(a) / (2 psi_1(a)), m = psi_0(a) - log(rate); u_rate = -x / rate.

    The sample of log x, standardized by its mean and standard deviation, is held fixed: generalised reparameterization. psi is not 0;
    the divergence is in closed form, c (log x - m) + psi_1(a) + c.

    **Requirements**: a cost without jumps, and p phi -> 0 at infinity.

    Returns:
        The field of a Gamma.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.gamma_g_rep())
        Flow(velocity=gamma_g_rep())

    References:
        Ruiz, Titsias and Blei 2016 (the generalized reparameterization gradient), section 3.3.
    """

    def stretch(ops: Ops, x: Array, p: Any) -> tuple[Array, Array]:
        variance, c = _g_rep(ops, p.concentration)
        return c * (ops.log(x * p.rate) - ops.digamma(p.concentration)) + variance, c

    def u(ops: Ops, x: Array, p: Any) -> Array:
        return x * stretch(ops, x, p)[0]

    return _closed(
        "gamma_g_rep",
        ("Gamma",),
        concentration=(u, lambda ops, x, p: sum(stretch(ops, x, p))),
        rate=(_rate, lambda ops, x, p: -1 / p.rate + 0 * x),
    )


def _g_rep(ops: Ops, a: Array) -> tuple[Array, Array]:
    """The variance of the log of a Gamma(a, 1), and half the relative derivative of that variance."""
    variance = ops.polygamma(1, a)
    return variance, ops.polygamma(2, a) / (2 * variance)


def gamma_one_moment() -> Field:
    r"""u_concentration = psi_1(a) x and u_rate = -x / rate, with divergences psi_1(a) and -1 / rate.

    Only the mean of log x follows the concentration. psi is not 0, and the variance can exceed that of LR.

    **Requirements**: a cost without jumps, and p phi -> 0 at infinity.

    Returns:
        The field of a Gamma.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.gamma_one_moment())
        Flow(velocity=gamma_one_moment())

    References:
        Ruiz, Titsias and Blei 2016 (the generalized reparameterization gradient), with the first moment only.
    """
    return _closed(
        "gamma_one_moment",
        ("Gamma",),
        concentration=(
            lambda ops, x, p: x * ops.polygamma(1, p.concentration),
            lambda ops, x, p: ops.polygamma(1, p.concentration) + 0 * x,
        ),
        rate=(_rate, lambda ops, x, p: -1 / p.rate + 0 * x),
    )


def beta_implicit() -> Field:
    r"""The field u = -(dF / d theta) / p for concentration1 and concentration0; psi = 0.

    The derivative of the cdf is by quadrature as in :func:`gamma_implicit`.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Beta.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.beta_implicit())
        Flow(velocity=beta_implicit())

    References:
        Figurnov, Mohamed and Mnih 2018; Jankowiak and Obermeyer 2018.
    """

    def u_1(ops: Ops, x: Array, p: Any) -> Array:
        return x * (1 - x) * _beta_implicit(ops, p.concentration1, p.concentration0, x, 1 - x)

    def u_0(ops: Ops, x: Array, p: Any) -> Array:
        return -x * (1 - x) * _beta_implicit(ops, p.concentration0, p.concentration1, 1 - x, x)

    return _pathwise("beta_implicit", ("Beta",), concentration1=u_1, concentration0=u_0)


def beta_g_rep() -> Field:
    r"""u_a = x (1 - x) [psi_1(a) + c (logit x - m)], m = psi_0(a) - psi_0(b), c = psi_2(a) / (2 psi_1(a) + 2 psi_1(b)); likewise u_b.

    Here a = concentration1 and b = concentration0. The sample of logit x, standardized by its mean and standard deviation, is held
    fixed: generalised reparameterization. psi is not 0; the divergence of u_a is (1 - 2x) [...] + c.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Beta.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.beta_g_rep())
        Flow(velocity=beta_g_rep())

    References:
        Ruiz, Titsias and Blei 2016 (the generalized reparameterization gradient), section 3.3.
    """

    def pair(sign: int, name: str) -> tuple[Elementwise, Elementwise]:
        def stretch(ops: Ops, x: Array, p: Any) -> tuple[Array, Array]:
            a, b = p.concentration1, p.concentration0
            own = getattr(p, name)
            c = ops.polygamma(2, own) / (2 * (ops.polygamma(1, a) + ops.polygamma(1, b)))
            logit = ops.log(x) - ops.log1p(-x)
            return sign * ops.polygamma(1, own) + c * (logit - ops.digamma(a) + ops.digamma(b)), c

        def u(ops: Ops, x: Array, p: Any) -> Array:
            return x * (1 - x) * stretch(ops, x, p)[0]

        def divergence(ops: Ops, x: Array, p: Any) -> Array:
            bracket, c = stretch(ops, x, p)
            return (1 - 2 * x) * bracket + c

        return u, divergence

    return _closed("beta_g_rep", ("Beta",), concentration1=pair(1, "concentration1"), concentration0=pair(-1, "concentration0"))


def dirichlet() -> Field:
    r"""u_j = v_j (e_j - x) / (1 - x_j) for concentration j, with v_j the Beta(a_j, sum a - a_j) field at x_j; psi = 0.

    When one concentration moves, its coordinate moves as a Beta and the others keep their proportions: u is tangent
    to the simplex.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Dirichlet.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.dirichlet())
        Flow(velocity=dirichlet())

    References:
        Jankowiak and Obermeyer 2018, section 4.2.
    """

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, d = dtheta.ops, dtheta.of(attrgetter("concentration"))
        if d is None:
            return ops.asarray(0.0, x)
        rest = p.concentration.sum(-1)[..., None] - p.concentration
        pull = d * x * _beta_implicit(ops, p.concentration, rest, x, x.sum(-1)[..., None] - x)
        return pull - x * pull.sum(-1)[..., None]

    return Field(velocity, "pathwise", families=("Dirichlet",), name="dirichlet()")


def student_t() -> Field:
    r"""u_loc = 1, u_scale = (x - loc) / scale and u_df = -(dF / d df) / p, odd about loc; psi = 0.

    The cdf is that of a Beta(1/2, df/2) at t^2 / (df + t^2), whose derivative is by quadrature as in :func:`gamma_implicit`.

    **Requirements**: phi = o(x^df) at infinity; a cost without jumps.

    Returns:
        The field of a StudentT.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.student_t())
        Flow(velocity=student_t())

    References:
        Figurnov, Mohamed and Mnih 2018.
    """

    def u_df(ops: Ops, x: Array, p: Any) -> Array:
        t2 = ((x - p.loc) / p.scale) ** 2
        share = t2 / (p.df + t2)
        half = ops.broadcast_to(ops.asarray(0.5, x), x.shape)
        return (x - p.loc) * (0.5 / p.df - 0.25 * _beta_implicit(ops, p.df / 2, half, p.df / (p.df + t2), share))

    return _pathwise("student_t", ("StudentT",), loc=lambda ops, x, p: 1.0, scale=lambda ops, x, p: (x - p.loc) / p.scale, df=u_df)


def von_mises(cut: float | None = None) -> Field:
    r"""u_loc = 1 and u_concentration = -(dF / d concentration) / p with F counted from the antipode of loc; psi = 0.

    On a circle a field is unique up to a circulation c / p. With a ``cut``, c is such that the field is 0 there:
    u(x) - u(cut) p(cut) / p(x). No mass then crosses the cut, and the cost may jump there.

    **Requirements**: without a cut, a *periodic* cost: the hosts' values jump from pi to -pi, and a cost such as phi(x) = x with them.
    With ``cut=math.pi`` any smooth cost on (-pi, pi). Neither host's sampler has a derivative in the concentration; NumPyro's has
    one in loc, which is right for periodic costs.

    Args:
        cut: The angle at which the field is to be 0.

    Returns:
        The field of a VonMises.

    Example:
        >>> import math
        >>> from flowvi import Flow, fields
        >>> Flow(fields.von_mises(cut=math.pi))
        Flow(velocity=von_mises(cut=3.141592653589793))

    References:
        Figurnov, Mohamed and Mnih 2018, for the concentration. Parmas and Sugiyama 2021, eq. 19.
    """
    u: dict[str, Elementwise] = {"loc": lambda ops, x, p: 1.0, "concentration": _von_mises_concentration}

    def without_flux(u: Elementwise, ops: Ops, x: Array, p: Any) -> Array:
        seam = ops.broadcast_to(ops.asarray(cut, x), x.shape)
        return u(ops, x, p) - u(ops, seam, p) * ops.exp(p.concentration * (ops.cos(seam - p.loc) - ops.cos(x - p.loc)))

    parts = _parts(u if cut is None else {name: partial(without_flux, u_of) for name, u_of in u.items()})
    name = "von_mises()" if cut is None else f"von_mises(cut={cut})"
    return _of_parts(name, ("VonMises",), lambda p: parts, rides=False)


def _von_mises_concentration(ops: Ops, x: Array, p: Any) -> Array:
    """The integral of (cos t - I_1/I_0) exp(k cos t) from |x - loc| to the antipode, over exp(k cos x), by tanh-sinh quadrature."""
    k = ops.broadcast_to(p.concentration, x.shape)
    angle = (x - p.loc + math.pi) % (2 * math.pi) - math.pi
    z = abs(angle)
    length = math.pi - z
    reach = 80 / (k * abs(ops.sin(z)) + 8 * ops.sqrt(k))  # beyond, the integrand is below 1e-16
    length = ops.where(reach < length, reach, length)
    s = length[..., None] * ops.asarray(ARC_NODES, x)
    z_ = z[..., None]
    fall = ops.exp(-2 * k[..., None] * ops.sin(z_ + s / 2) * ops.sin(s / 2))
    integral = length * ((ops.cos(z_ + s) - (ops.i1e(k) / ops.i0e(k))[..., None]) * fall * ops.asarray(ARC_WEIGHTS, x)).sum(-1)
    return ops.where(angle < 0, -integral, integral)


def _tanh_sinh() -> tuple[list[float], list[float]]:
    """Nodes and weights over (0, 1)."""
    step = 0.11
    t = [step * k for k in range(-28, 29)]
    nodes = [1 / (1 + math.exp(-math.pi * math.sinh(t))) for t in t]
    return nodes, [step * math.pi * math.cosh(t) * v * (1 - v) for v, t in zip(nodes, t, strict=True)]


ARC_NODES, ARC_WEIGHTS = _tanh_sinh()

"""Fields of a Gamma, and of its reciprocal."""

from __future__ import annotations

from typing import Any

from flowvi.family import families_with
from flowvi.fields.field import Field, _closed, _pathwise
from flowvi.fields.half_line import integral, width_of
from flowvi.fields.scalar import _rate
from flowvi.ops import Array, Ops


def _gamma_implicit(ops: Ops, a: Array, y: Array) -> Array:
    """-(dF/da) / p of a Gamma(a, 1) at y, integrated from the nearer end: in log y towards 0, in y towards infinity."""
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
        y * integral(ops, towards_zero, width_of(ops, a - low, low)),
        integral(ops, towards_infinity, width_of(ops, 1 - a / high, a / high**2)),
    )


def gamma_implicit() -> Field:
    r"""u_concentration = -(dF / d concentration) / p and u_rate = -x / rate; psi = 0.

    The derivative of the cdf is an integral of the score from the nearer end of the support. It is computed by 52-point
    double-exponential quadrature; the tests check it to 1e-8. (The derivative of torch's own sampler is an approximation.)

    **Requirements**: a cost without jumps, and p phi -> 0 at infinity.

    Returns:
        The field of a Gamma.

    Example:
        E[x] is concentration / rate:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Gamma(2.0, 4.0), Flow(fields.gamma_implicit()), "concentration", lambda x: x)
        >>> bool(abs(samples.mean() - 0.25) < 0.01)
        True

    References:
        Figurnov, Mohamed and Mnih 2018; Jankowiak and Obermeyer 2018.
    """

    def u(ops: Ops, x: Array, p: Any) -> Array:
        return _gamma_implicit(ops, p.concentration, x * p.rate) / p.rate

    return _pathwise("gamma_implicit", families_with(gamma_implicit), concentration=u, rate=_rate)


def gamma_g_rep() -> Field:
    r"""u_concentration = x [c (log x - m) + psi_1(a)], c = psi_2(a) / (2 psi_1(a)), m = psi_0(a) - log(rate); u_rate = -x / rate.

    The field keeps log x, standardized by its mean and standard deviation, fixed (generalised reparameterization). psi is not 0; the
    divergence is c (log x - m) + psi_1(a) + c.

    **Requirements**: a cost without jumps, and p phi -> 0 at infinity.

    Returns:
        The field of a Gamma.

    Example:
        E[x] is concentration / rate:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Gamma(2.0, 4.0), Flow(fields.gamma_g_rep()), "concentration", lambda x: x)
        >>> bool(abs(samples.mean() - 0.25) < 0.01)
        True

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
        families_with(gamma_g_rep),
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
        E[x] is concentration / rate:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Gamma(2.0, 4.0), Flow(fields.gamma_one_moment()), "concentration", lambda x: x)
        >>> bool(abs(samples.mean() - 0.25) < 0.01)
        True

    References:
        Ruiz, Titsias and Blei 2016 (the generalized reparameterization gradient), with the first moment only.
    """
    return _closed(
        "gamma_one_moment",
        families_with(gamma_one_moment),
        concentration=(
            lambda ops, x, p: x * ops.polygamma(1, p.concentration),
            lambda ops, x, p: ops.polygamma(1, p.concentration) + 0 * x,
        ),
        rate=(_rate, lambda ops, x, p: -1 / p.rate + 0 * x),
    )


def inverse_gamma() -> Field:
    r"""u_concentration = (dF_g / d concentration) x^2 / p_g and u_rate = x / rate, with g = 1 / x, a Gamma; psi = 0.

    This is the field of the Gamma, by quadrature as in :func:`gamma_implicit`, mapped to its reciprocal.

    **Requirements**: a cost without jumps, with phi = o(x^concentration) at infinity and p phi -> 0 at 0.

    Returns:
        The field of an InverseGamma.

    Example:
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, check_estimator, fields
        >>> report = check_estimator(dist.InverseGamma(2.5, 1.2), Flow(fields.inverse_gamma()))
        >>> [c.name for c in report.failed]
        []

    References:
        Figurnov, Mohamed and Mnih 2018; Jankowiak and Obermeyer 2018, for the Gamma.
    """

    def u(ops: Ops, x: Array, p: Any) -> Array:
        return -(x**2) * _gamma_implicit(ops, p.concentration, p.rate / x) / p.rate

    return _pathwise("inverse_gamma", families_with(inverse_gamma), concentration=u, rate=lambda ops, x, p: x / p.rate)

"""Fields of scalar families in closed form, parameter by parameter."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from flowvi.family import families_with
from flowvi.fields.field import Elementwise, Field, Part, _of_parts, _parts, _pathwise, _total
from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents


def location_scale() -> Field:
    r"""u_loc = 1 and u_scale = (x - loc) / scale, with divergences 0 and 1 / scale: Normal, Laplace, Logistic, Cauchy, Gumbel; psi = 0.

    **Requirements**: p phi -> 0 at infinity for loc and x p phi -> 0 for scale; a cost without jumps.

    Returns:
        The field, the same as that of the hosts' samplers.

    Example:
        The gradient of E[3 x] in loc is 3 for each sample:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Normal(0.5, 2.0), Flow(fields.location_scale()), "loc", lambda x: 3.0 * x)
        >>> samples[:3].tolist()
        [3.0, 3.0, 3.0]

    References:
        Kingma and Welling 2014. Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise(
        "location_scale", families_with(location_scale), loc=lambda ops, x, p: 1.0, scale=lambda ops, x, p: (x - p.loc) / p.scale
    )


def scale() -> Field:
    r"""u_scale = x / scale, with divergence 1 / scale: HalfNormal and HalfCauchy; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field, the same as that of the hosts' samplers.

    Example:
        E[x] under a HalfNormal is scale (2 / pi)^(1/2):

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.HalfNormal(1.5), Flow(fields.scale()), "scale", lambda x: x)
        >>> bool(abs(samples.mean() - 0.798) < 0.02)
        True

    References:
        Kingma and Welling 2014.
    """
    return _pathwise("scale", families_with(scale), scale=lambda ops, x, p: x / p.scale)


def log_normal() -> Field:
    r"""u_loc = x and u_scale = x (log x - loc) / scale, with divergences 1 and (log x - loc + 1) / scale; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of a LogNormal, the same as that of the hosts' samplers.

    Example:
        The gradient of E[log x] in loc is 1 for each sample:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.LogNormal(0.0, 0.5), Flow(fields.log_normal()), "loc", jnp.log)
        >>> samples[:3].round(4).tolist()
        [1.0, 1.0, 1.0]

    References:
        Kingma and Welling 2014.
    """
    return _pathwise(
        "log_normal", families_with(log_normal), loc=lambda ops, x, p: x, scale=lambda ops, x, p: x * (ops.log(x) - p.loc) / p.scale
    )


def exponential() -> Field:
    r"""u_rate = -x / rate, with divergence -1 / rate; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of an Exponential, the same as that of the hosts' samplers.

    Example:
        E[x] is 1 / rate, with the derivative -1 / rate^2:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Exponential(2.0), Flow(fields.exponential()), "rate", lambda x: x)
        >>> bool(abs(samples.mean() + 0.25) < 0.01)
        True

    References:
        Kingma and Welling 2014.
    """
    return _pathwise("exponential", families_with(exponential), rate=_rate)


def _rate(ops: Ops, x: Array, p: Any) -> Array:
    return -x / p.rate


def weibull() -> Field:
    r"""u_scale = x / scale and u_concentration = -x log(x / scale) / concentration; psi = 0.

    The divergences are 1 / scale and -(log(x / scale) + 1) / concentration.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of a Weibull, the same as that of the hosts' samplers.

    Example:
        E[x^2] at concentration 2 is scale^2:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Weibull(1.5, 2.0), Flow(fields.weibull()), "scale", lambda x: x**2)
        >>> bool(abs(samples.mean() - 3.0) < 0.1)
        True

    References:
        Parmas and Sugiyama 2021, section 2.3, with the inverse of the cdf.
    """
    return _pathwise(
        "weibull",
        families_with(weibull),
        scale=lambda ops, x, p: x / p.scale,
        concentration=lambda ops, x, p: -x * ops.log(x / p.scale) / p.concentration,
    )


def kumaraswamy() -> Field:
    r"""With a = concentration1 and b = concentration0, u_a = -x log(x) / a and u_b = (1 - x^a) log(1 - x^a) / (a b x^(a-1)); psi = 0.

    The divergence of u_a is -(log x + 1) / a.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Kumaraswamy, the same as that of the hosts' samplers.

    Example:
        E[x] at b = 1 is a / (a + 1), with the derivative 1 / (a + 1)^2:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Kumaraswamy(2.0, 1.0), Flow(fields.kumaraswamy()), "concentration1", lambda x: x)
        >>> bool(abs(samples.mean() - 1 / 9) < 0.005)
        True

    References:
        Parmas and Sugiyama 2021, section 2.3, with the inverse of the cdf.
    """

    def u_b(ops: Ops, x: Array, p: Any) -> Array:
        a, b = p.concentration1, p.concentration0
        return (1 - x**a) * ops.log1p(-(x**a)) / (a * b) * x ** (1 - a)

    return _pathwise(
        "kumaraswamy",
        families_with(kumaraswamy),
        concentration1=lambda ops, x, p: -x * ops.log(x) / p.concentration1,
        concentration0=u_b,
    )


def uniform() -> Field:
    r"""u_high = (x - low) / (high - low) and u_low = (high - x) / (high - low), with divergences +-1 / (high - low); psi = 0.

    It moves with both bounds, as LR cannot.

    **Requirements**: a cost without jumps inside.

    Returns:
        The field of a Uniform, the same as that of the hosts' samplers.

    Example:
        E[x] is (low + high) / 2. LR is refused here, since the support moves:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Uniform(0.0, 2.0), Flow(fields.uniform()), "high", lambda x: x)
        >>> bool(abs(samples.mean() - 0.5) < 0.02)
        True

    References:
        Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise(
        "uniform",
        families_with(uniform),
        low=lambda ops, x, p: (p.high - x) / (p.high - p.low),
        high=lambda ops, x, p: (x - p.low) / (p.high - p.low),
    )


def pareto() -> Field:
    r"""u_scale = x / scale and u_alpha = -x log(x / scale) / alpha; psi = 0.

    The divergences are 1 / scale and -(log(x / scale) + 1) / alpha.

    It moves with the lower bound, which is the scale.

    **Requirements**: phi = o(x^alpha / log x) at infinity; a cost without jumps.

    Returns:
        The field of a Pareto, the same as that of the hosts' samplers.

    Example:
        E[x] is alpha scale / (alpha - 1). LR is refused here, since the support moves:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Pareto(2.0, 4.0), Flow(fields.pareto()), "scale", lambda x: x)
        >>> bool(abs(samples.mean() - 4 / 3) < 0.03)
        True

    References:
        Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise(
        "pareto",
        families_with(pareto),
        scale=lambda ops, x, p: x / p.scale,
        alpha=lambda ops, x, p: -x * ops.log(x / p.scale) / p.alpha,
    )


def truncated_normal() -> Field:
    r"""u_loc = 1 - r_low - r_high, u_scale = z - z_low r_low - z_high r_high, u_low = r_low and u_high = r_high; psi = 0.

    Here z = (x - loc) / scale, F is the cdf, n the density of the standard Normal, r_low = (1 - F) n(z_low) / n(z) and r_high = F
    n(z_high) / n(z). The field is 0 at a fixed bound and moves with a bound that moves; u_loc = 1 alone would be biased.

    **Requirements**: NumPyro's ``TruncatedNormal``, on one side or both (Pyro has none); a cost without jumps inside.

    Returns:
        The field of a truncated Normal.

    Raises:
        ValueError: At the first run, naming the site, for a truncated distribution that is not Normal; use ``implicit`` there.

    Example:
        The derivative of E[x] in the lower bound of a standard Normal is 2 / pi at a bound of 0:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> p, flow = dist.TruncatedNormal(0.0, 1.0, low=0.0), Flow(fields.truncated_normal())
        >>> samples = plot.gradient_samples(p, flow, "low", lambda x: x)
        >>> bool(abs(samples.mean() - 0.637) < 0.02)
        True

    References:
        Figurnov, Mohamed and Mnih 2018, with the cdf. Parmas and Sugiyama 2021, eq. 19.
    """

    def between(ops: Ops, low: Array | float, high: Array) -> Array:
        """The Normal probability between two points, from the nearer tail."""
        flip = low + high > 0
        return ops.ndtr(ops.where(flip, -low, high)) - ops.ndtr(ops.where(flip, -high, low))

    def shape(ops: Ops, x: Array, p: Any) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """z, and for each bound of p: z at the bound, and r."""
        normal = p.base_dist
        z = (x - normal.loc) / normal.scale
        low, high = (
            ops.asarray((getattr(p, side) - normal.loc) / normal.scale if hasattr(p, side) else bound, x)
            for side, bound in (("low", -math.inf), ("high", math.inf))
        )
        mass = between(ops, low, high)
        bounds = {side: bound for side, bound in (("low", low), ("high", high)) if hasattr(p, side)}
        share = {"low": lambda: between(ops, z, high) / mass, "high": lambda: between(ops, low, z) / mass}
        return z, bounds, {side: share[side]() * ops.exp((z**2 - bound**2) / 2) for side, bound in bounds.items()}

    def u_loc(ops: Ops, x: Array, p: Any) -> Array:
        _, _, ride = shape(ops, x, p)
        return 1 - _total(ride.values())

    def u_scale(ops: Ops, x: Array, p: Any) -> Array:
        z, bounds, ride = shape(ops, x, p)
        return z - _total(bounds[side] * ride[side] for side in bounds)

    def u_bound(side: str, ops: Ops, x: Array, p: Any) -> Array:
        return shape(ops, x, p)[2][side]

    def parts(p: Any) -> dict[str, Part]:
        if type(p.base_dist).__name__ != "Normal":
            return {}
        u: dict[str, Elementwise] = {"base_dist.loc": u_loc, "base_dist.scale": u_scale}
        return _parts(u | {side: partial(u_bound, side) for side in ("low", "high") if hasattr(p, side)})

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        if not parts(p):
            dtheta.target.refuse(f"the field truncated_normal() is for a truncated Normal; found one of {type(p.base_dist).__name__}.")
        return field.velocity(x, p, dtheta)

    field = _of_parts("truncated_normal()", families_with(truncated_normal), parts)
    return replace(field, velocity=velocity)

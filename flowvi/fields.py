r"""Velocity fields by name, for :class:`flowvi.Flow`: ``Flow(fields.gamma_implicit())``.

A velocity field u says how the samples of p move with its parameters. Most fields here solve the transport equation

    psi = div u + u . grad_x log p + d_theta log p = 0

so that the estimator has no score term (it is *pathwise*, the reparameterization gradient); for the others psi is computed from
the divergence. Each field serves the families that it names, in both hosts and whatever the parameterisation, and acts along
those of their parameters that carry a derivative. Written once over the operations of a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from flowvi.ops import Array, Ops
from flowvi.target import Tangents

Velocity = Callable[[Array, Any, Tangents], Array]
Elementwise = Callable[[Ops, Array, Any], Any]


class Part(NamedTuple):
    """One parameter of a scalar family, a number for each x, and how x moves with it.

    Attributes:
        parameter: ``parameter(p)`` is its value.
        u: ``u(ops, x, p)`` is its velocity, elementwise, a number or an array over x.
    """

    parameter: Callable[[Any], Array]
    u: Elementwise


@dataclass(frozen=True)
class Field:
    r"""A velocity field with what is known of it: ``Flow(Field(velocity, divergence))`` is ``Flow(velocity, divergence=divergence)``.

    u is ``velocity(x, p, dtheta)`` and psi = div u + u . grad log p + d_theta log p, where div u is the ``divergence``.

    **Requirements**: a velocity that is linear in dtheta, with p detached. For a velocity that serves both hosts, ``dtheta.ops`` has
    the functions of the backend, and ``dtheta.of(f)`` the tangent of ``f(p)`` for any function of the parameters.

    Args:
        velocity: ``velocity(x, p, dtheta)``, of the shape of x.
        divergence: ``divergence(x, p, dtheta)`` of batch shape; ``"pathwise"`` declares psi = 0; None: automatic.
        rides: Whether u moves with every bound of the support, so that a support that moves with a live parameter is no bias.
        families: The names of the distributions that it serves; empty for any.
        name: What it is called in messages.
        parts: Of a pathwise field that is elementwise: from p (detached) to the :class:`Part` of each parameter by name, of which u
            is the sum (empty: none for this p); None where it has no such form.

    Example:
        >>> from flowvi import Flow, fields
        >>> def velocity(x, p, dtheta):
        ...     return dtheta.ops.sin(x) * dtheta.loc
        >>> Flow(fields.scaled(0.5, fields.Field(velocity, name="wave")))
        Flow(velocity=scaled(0.5, wave))

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    velocity: Velocity
    divergence: Velocity | str | None = None
    rides: bool = False
    families: tuple[str, ...] = ()
    name: str = ""
    parts: Callable[[Any], Mapping[str, Part]] | None = None

    def __repr__(self) -> str:
        return self.name or f"Field({getattr(self.velocity, '__name__', self.velocity)})"


# ---- combinators


def scaled(a: float | Array, field: Field | Velocity) -> Field:
    r"""``a`` times a field: u = a u', psi = (1 - a) s + a psi', where s is the score.

    For a pathwise field this mixes LR (a = 0) with RP (a = 1); a may lie outside [0, 1].

    **Requirements**: those of the field, and a support that does not move (unless a = 1).

    Args:
        a: A number, or an array that broadcasts to the batch shape of x.
        field: A field or a velocity function.

    Returns:
        The field.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.scaled(0.5, fields.location_scale()))
        Flow(velocity=scaled(0.5, location_scale()))

    References:
        Parmas and Sugiyama 2021, eq. 19 with u = a u_RP.
    """
    field = _as_field(field)

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _per_event(dtheta.ops.asarray(a, x), p) * field.velocity(x, p, dtheta)

    def divergence(x: Array, p: Any, dtheta: Tangents) -> Array:
        return a * _divergence(field, x, p, dtheta)

    return _combined(f"scaled({a}, {field})", velocity, divergence, field)


def masked(m: Callable[[Array, Any], Array], field: Field | Velocity) -> Field:
    r"""A field where ``m(x, p)`` lets it act: u = m(x) u', psi = (1 - m) s + m psi' + u' . grad m.

    With m = 0 at the jumps of the cost, and close to 1 away from them, it is RP where that is right and LR at the jumps. The last
    term belongs to the estimator: without it the mixture of RP and LR is biased.

    **Requirements**: those of the field, a differentiable m and a support that does not move. For a scalar family m is elementwise.

    Args:
        m: ``m(x, p)``, one number for each element of the batch of x.
        field: A field or a velocity function.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site, where m mixes the coordinates of a scalar family.

    Example:
        >>> from flowvi import Flow, fields
        >>> def away_from_zero(x, p):
        ...     return x**2 / (1 + x**2)
        >>> Flow(fields.masked(away_from_zero, fields.location_scale()))
        Flow(velocity=masked(away_from_zero, location_scale()))

    References:
        Parmas and Sugiyama 2021, eq. 19 with u = m(x) u_RP.
    """
    field = _as_field(field)

    def mask(x: Array, p: Any, dtheta: Tangents) -> Array:
        return dtheta.ops.asarray(m(x, p), x) if len(p.event_shape) else _elementwise(m, x, p, dtheta, "the mask")

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _per_event(mask(x, p, dtheta), p) * field.velocity(x, p, dtheta)

    def divergence(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, u = dtheta.ops, field.velocity(x, p, dtheta)
        gradient_term = ops.tether(mask(x + u, p, dtheta))
        return ops.stop_gradient(mask(x, p, dtheta)) * _divergence(field, x, p, dtheta) + gradient_term

    return _combined(f"masked({getattr(m, '__name__', m)}, {field})", velocity, divergence, field)


def summed(*fields: Field | Velocity) -> Field:
    r"""The sum of fields: u = sum_k u_k, psi = s + sum_k (psi_k - s), where s is the score.

    It joins fields of different parameters, or adds one that carries no mass (psi_k = s) to a pathwise one. The average of two pathwise
    fields is ``summed(scaled(0.5, f), scaled(0.5, g))``.

    **Requirements**: those of every field, and a support that does not move.

    Args:
        *fields: Fields or velocity functions.

    Returns:
        The field.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.summed(fields.per_element(loc=lambda x, p: 1.0), fields.per_element(scale=lambda x, p: 0.5 * x)))
        Flow(velocity=summed(per_element(loc), per_element(scale)))

    References:
        Parmas and Sugiyama 2021, eq. 19, which is affine in u.
    """
    parts = [_as_field(field) for field in fields]

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _total(field.velocity(x, p, dtheta) for field in parts)

    def divergence(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _total(_divergence(field, x, p, dtheta) for field in parts)

    return _combined(f"summed({', '.join(map(str, parts))})", velocity, divergence, *parts)


def per_element(**u: Callable[[Array, Any], Array]) -> Field:
    r"""The field of ``Flow(loc=..., scale=...)``, as a value that can be combined: u = sum_i u_i(x, p) dtheta_i.

    psi follows by automatic derivatives.

    **Requirements**: a scalar family (or independent ones), and functions that read x at one coordinate only.

    Args:
        **u: For each parameter by name a function ``u(x, p)``; a parameter that is not named has u = 0, that is LR.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: an unknown parameter, or a function that mixes coordinates.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.scaled(2.0, fields.per_element(loc=lambda x, p: 0.5)))
        Flow(velocity=scaled(2.0, per_element(loc)))

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _total(_elementwise(u_of, x, p, dtheta, f"the velocity of '{name}'") * getattr(dtheta, name) for name, u_of in u.items())

    return Field(velocity, name=f"per_element({', '.join(u)})")


def _elementwise(f: Callable[[Array, Any], Array], x: Array, p: Any, dtheta: Tangents, what: str) -> Array:
    """``f(x, p)`` in the shape of x, refused where it reads x at another coordinate."""

    def in_shape(x: Array, p: Any) -> Array:
        return dtheta.target.in_shape(dtheta.ops, f(x, p), x, what)

    dtheta.target.check_elementwise(dtheta.ops, in_shape, x, what)
    return in_shape(x, p)


def _as_field(field: Field | Velocity) -> Field:
    return field if isinstance(field, Field) else Field(field)


def _combined(name: str, velocity: Velocity, divergence: Velocity, *parts: Field) -> Field:
    """A combination of fields: for the families that all of them serve, with an automatic divergence where every part has one."""
    named = [part.families for part in parts if part.families]
    families = tuple(f for f in named[0] if all(f in other for other in named)) if named else ()
    automatic = all(part.divergence is None for part in parts)
    return Field(velocity, None if automatic else divergence, families=families, name=name)


def _divergence(field: Field, x: Array, p: Any, dtheta: Tangents) -> Array:
    """The divergence; of a pathwise field from its transport equation, - (u . grad log p + d_theta log p)."""
    ops, target = dtheta.ops, dtheta.target
    if callable(field.divergence):
        return field.divergence(x, p, dtheta)
    if field.divergence == "pathwise":
        return -ops.tether(dtheta.p.log_prob(x + field.velocity(x, p, dtheta)))
    divergence = target.divergence(ops, lambda x: target.in_shape(ops, field.velocity(x, p, dtheta), x, f"the velocity of {field}"), x)[
        1
    ]
    return ops.asarray(0.0, x) if divergence is None else divergence


def _per_event(a: Array, p: Any) -> Array:
    """An array over the batch of x, as one over x."""
    return a.reshape((*a.shape, *(1,) * len(p.event_shape))) if a.ndim else a


def _total(terms: Any) -> Array:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


# ---- fields of families, parameter by parameter


def _along(x: Array, p: Any, dtheta: Tangents, parts: Mapping[str, Part]) -> Array:
    """sum_i u_i(x, p) dtheta_i over the parameters of p that move."""
    moving = [(part.u, d) for part in parts.values() if (d := dtheta.of(part.parameter)) is not None]
    return _total(u(dtheta.ops, x, p) * d for u, d in moving) if moving else dtheta.ops.asarray(0.0, x)


def _parts(u: Mapping[str, Elementwise]) -> dict[str, Part]:
    """Parts by the names of attributes of p."""
    return {name: Part(attrgetter(name), u_of) for name, u_of in u.items()}


def _pathwise(name: str, families: Sequence[str], **u: Elementwise) -> Field:
    """The field of scalar families that solves the transport equation, from one u for each parameter."""
    return _of_parts(f"{name}()", families, lambda p: _parts(u))


def _of_parts(name: str, families: Sequence[str], parts: Callable[[Any], Mapping[str, Part]], rides: bool = True) -> Field:
    """The pathwise field that is the sum of its parts."""

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _along(x, p, dtheta, parts(p))

    return Field(velocity, "pathwise", rides=rides, families=tuple(families), name=name, parts=parts)


def _closed(name: str, families: Sequence[str], **u: tuple[Elementwise, Elementwise]) -> Field:
    """A field of scalar families, from u and its divergence for each parameter."""
    velocities, divergences = (_parts({k: pair[i] for k, pair in u.items()}) for i in (0, 1))
    return Field(
        lambda x, p, dtheta: _along(x, p, dtheta, velocities),
        lambda x, p, dtheta: _along(x, p, dtheta, divergences),
        families=tuple(families),
        name=f"{name}()",
    )


LOCATION_SCALE = ("Normal", "Laplace", "Logistic", "Cauchy", "Gumbel")
SYMMETRIC = ("Normal", "Laplace", "Logistic", "Cauchy", "StudentT")


def location_scale() -> Field:
    r"""u_loc = 1 and u_scale = (x - loc) / scale, with divergences 0 and 1 / scale: Normal, Laplace, Logistic, Cauchy, Gumbel; psi = 0.

    **Requirements**: p phi -> 0 at infinity for loc and x p phi -> 0 for scale; a cost without jumps.

    Returns:
        The field, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.location_scale())
        Flow(velocity=location_scale())

    References:
        Kingma and Welling 2014. Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise("location_scale", LOCATION_SCALE, loc=lambda ops, x, p: 1.0, scale=lambda ops, x, p: (x - p.loc) / p.scale)


def scale() -> Field:
    r"""u_scale = x / scale, with divergence 1 / scale: HalfNormal and HalfCauchy; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.scale())
        Flow(velocity=scale())

    References:
        Kingma and Welling 2014.
    """
    return _pathwise("scale", ("HalfNormal", "HalfCauchy"), scale=lambda ops, x, p: x / p.scale)


def log_normal() -> Field:
    r"""u_loc = x and u_scale = x (log x - loc) / scale, with divergences 1 and (log x - loc + 1) / scale; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of a LogNormal, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.log_normal())
        Flow(velocity=log_normal())

    References:
        Kingma and Welling 2014.
    """
    return _pathwise("log_normal", ("LogNormal",), loc=lambda ops, x, p: x, scale=lambda ops, x, p: x * (ops.log(x) - p.loc) / p.scale)


def exponential() -> Field:
    r"""u_rate = -x / rate, with divergence -1 / rate; psi = 0.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of an Exponential, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.exponential())
        Flow(velocity=exponential())

    References:
        Kingma and Welling 2014.
    """
    return _pathwise("exponential", ("Exponential",), rate=_rate)


def _rate(ops: Ops, x: Array, p: Any) -> Array:
    return -x / p.rate


def weibull() -> Field:
    r"""u_scale = x / scale and u_concentration = -x log(x / scale) / concentration; psi = 0.

    The divergences are 1 / scale and -(log(x / scale) + 1) / concentration.

    **Requirements**: x p phi -> 0 at infinity; a cost without jumps.

    Returns:
        The field of a Weibull, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.weibull())
        Flow(velocity=weibull())

    References:
        Parmas and Sugiyama 2021, section 2.3, with the inverse of the cdf.
    """
    return _pathwise(
        "weibull",
        ("Weibull",),
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
        >>> from flowvi import Flow, fields
        >>> Flow(fields.kumaraswamy())
        Flow(velocity=kumaraswamy())

    References:
        Parmas and Sugiyama 2021, section 2.3, with the inverse of the cdf.
    """

    def u_b(ops: Ops, x: Array, p: Any) -> Array:
        a, b = p.concentration1, p.concentration0
        return (1 - x**a) * ops.log1p(-(x**a)) / (a * b) * x ** (1 - a)

    return _pathwise(
        "kumaraswamy",
        ("Kumaraswamy",),
        concentration1=lambda ops, x, p: -x * ops.log(x) / p.concentration1,
        concentration0=u_b,
    )


def uniform() -> Field:
    r"""u_high = (x - low) / (high - low) and u_low = (high - x) / (high - low), with divergences +-1 / (high - low); psi = 0.

    It rides both bounds, which LR cannot.

    **Requirements**: a cost without jumps inside.

    Returns:
        The field of a Uniform, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> fields.uniform().rides
        True

    References:
        Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise(
        "uniform",
        ("Uniform",),
        low=lambda ops, x, p: (p.high - x) / (p.high - p.low),
        high=lambda ops, x, p: (x - p.low) / (p.high - p.low),
    )


def pareto() -> Field:
    r"""u_scale = x / scale and u_alpha = -x log(x / scale) / alpha; psi = 0.

    The divergences are 1 / scale and -(log(x / scale) + 1) / alpha.

    It rides the lower bound, which is the scale.

    **Requirements**: phi = o(x^alpha / log x) at infinity; a cost without jumps.

    Returns:
        The field of a Pareto, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> fields.pareto().rides
        True

    References:
        Parmas and Sugiyama 2021, section 2.3.
    """
    return _pathwise(
        "pareto",
        ("Pareto",),
        scale=lambda ops, x, p: x / p.scale,
        alpha=lambda ops, x, p: -x * ops.log(x / p.scale) / p.alpha,
    )


def truncated_normal() -> Field:
    r"""u_loc = 1 - r_low - r_high, u_scale = z - z_low r_low - z_high r_high, u_low = r_low and u_high = r_high; psi = 0.

    Here z = (x - loc) / scale, F is the cdf, n the density of the standard Normal, r_low = (1 - F) n(z_low) / n(z) and
    r_high = F n(z_high) / n(z). The field is 0 at a bound that stays and rides one that moves; u_loc = 1 alone is biased.

    **Requirements**: NumPyro's ``TruncatedNormal``, on one side or both (Pyro has none); a cost without jumps inside.

    Returns:
        The field of a truncated Normal.

    Raises:
        ValueError: At the first run, naming the site, for another truncated distribution than a Normal; ``implicit`` serves these.

    Example:
        >>> from flowvi import Flow, fields
        >>> fields.truncated_normal().rides
        True

    References:
        Figurnov, Mohamed and Mnih 2018, with the cdf. Parmas and Sugiyama 2021, eq. 19.
    """

    def between(ops: Ops, low: Array | float, high: Array) -> Array:
        """The Normal probability between two points, from the nearer tail."""
        flip = low + high > 0
        return ops.ndtr(ops.where(flip, -low, high)) - ops.ndtr(ops.where(flip, -high, low))

    def shape(ops: Ops, x: Array, p: Any) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """z, and at each bound that p has, z there and r."""
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

    families = ("TwoSidedTruncatedDistribution", "LeftTruncatedDistribution", "RightTruncatedDistribution")
    field = _of_parts("truncated_normal()", families, parts)
    return replace(field, velocity=velocity)


# ---- Gamma, Beta and what is made of them: fields by quadrature


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
    """-(dF/da) / p of a Gamma(a, 1) at y, from the nearer end: in log y towards 0, in y towards infinity. Right to 1e-11."""
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
    """-(dF/da) / (p x (1 - x)) of a Beta(a, b) at x, from the nearer end, in log x or log(1 - x). Right to 1e-11."""
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
    quadrature: right to 1e-11, where the derivative of torch's own sampler is right to 1e-3.

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

    The derivative of the cdf is by quadrature as in :func:`gamma_implicit`, right to 1e-11.

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
    With ``cut=math.pi`` any smooth cost on (-pi, pi). In both hosts neither parameter has a right reparameterized sampler.

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


# ---- fields from the cdf


def implicit() -> Field:
    r"""The general field of a scalar distribution with a cdf F: u = -(d_theta F) / p; psi = 0.

    It is what ``ImplicitRP()`` does, as a field that can be scaled and masked. It is the only pathwise field without flux at the
    ends of the support, and rides the bounds. For univariate mixtures (``MixtureSameFamily``, NumPyro's ``MixtureGeneral``) it moves
    the mixing logits and the components at once; :func:`mixture` serves more dimensions.

    **Requirements**: a cdf that the host can differentiate in the live parameters; a cost without jumps.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: no cdf, or none with a derivative in a live parameter.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.scaled(0.5, fields.implicit()))
        Flow(velocity=scaled(0.5, implicit()))

    References:
        Figurnov, Mohamed and Mnih 2018. Parmas and Sugiyama 2021, section 2.3.
    """

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, cdf = dtheta.ops, dtheta.target.cdf
        right = cdf(x, p) > 0.5
        dcdf = dtheta.of(lambda p: ops.where(right, -_survival(dtheta.target.cdf, x, p), cdf(x, p)))
        return ops.asarray(0.0, x) if dcdf is None else -dcdf / ops.exp(p.log_prob(x))

    return Field(velocity, "pathwise", rides=True, name="implicit()")


def _survival(cdf: Callable[[Array, Any], Array], x: Array, p: Any) -> Array:
    """1 - cdf, for symmetric families (and mixtures of them) without a loss of digits in the right tail."""
    family = type(p).__name__
    if family in SYMMETRIC:
        return cdf(2 * p.loc - x, p)
    if family == "MixtureSameFamily":
        return (_mixing(p).probs * _survival(cdf, x[..., None], _unwrapped(p.component_distribution))).sum(-1)
    return 1 - cdf(x, p)


def mixture(orders: Sequence[Sequence[int]] | None = None, *, components: Field | None = None) -> Field:
    r"""The field of a mixture of product components, in any number of dimensions; psi = 0.

    For mixing logit j it is pi_j sum_k pi_k v_jk, where v_jk carries component k to component j one coordinate after the other,

        v_jk,i = -(F_j,i - F_k,i) (prod_{l before i} p_k,l) (prod_{l after i} p_j,l) / p,

    and for the parameters of component k it is r_k u_k with r_k = pi_k p_k / p. In one dimension v_jk = -(F_j - F_k) / p. The order of
    the coordinates changes the variance only; the average over several orders usually lowers it. Where the orders do not come in pairs,
    one the reverse of the other, so does a constant added to all logits (Pyro's are normalised).

    **Requirements**: ``MixtureSameFamily`` or NumPyro's ``MixtureGeneral`` over scalar components, or over vectors of independent
    coordinates (``to_event(1)``), whose cdf the host has; a cost without jumps.

    Args:
        orders: Orders of the coordinates to average over, such as ``[(0, 1), (1, 0)]``; the default is the given order and its
            reverse.
        components: A pathwise field for the components' own parameters, where the host cannot differentiate their cdf; the default is
            -(d_theta F) / p in each coordinate.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: components that are no products, or that have no cdf.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.mixture(orders=[(0, 1), (1, 0)]))
        Flow(velocity=mixture(orders=[(0, 1), (1, 0)]))

    References:
        Jankowiak and Karaletsos 2019, for pairs of components. Parmas and Sugiyama 2021, eq. 19.
    """
    if components is not None and components.divergence != "pathwise":
        raise TypeError(f"mixture takes a pathwise field for its components; found {components}.")

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops = dtheta.ops
        scalar = len(p.event_shape) == 0
        _require_products(p, dtheta)

        def at_x(f: Callable[[Array, Any], Array], p: Any) -> Array:
            """An elementwise f(x, component), over components and coordinates."""
            if hasattr(p, "component_distribution"):
                a = f(x[..., None] if scalar else x[..., None, :], _unwrapped(p.component_distribution))
            else:
                a = ops.stack([f(x, _unwrapped(part)) for part in p.component_distributions], len(x.shape) - (not scalar))
            return a[..., None] if scalar else a

        cdf = dtheta.target.cdf
        density = at_x(lambda x, part: part.log_prob(x), p)
        log_pi = ops.log_softmax(_mixing(p).logits, -1)
        joint = log_pi + density.sum(-1)
        log_p = p.log_prob(x)[..., None]

        terms = []
        dlogits = dtheta.of(lambda p: _mixing(p).logits)
        if dlogits is not None:
            below, above = at_x(cdf, p), at_x(lambda x, part: _survival(cdf, x, part), p)
            there = range(density.shape[-1])
            each = [
                _telescope(ops, dlogits, log_pi, density, below, above, log_p, order)
                for order in orders or ([there] if len(there) == 1 else [there, there[::-1]])
            ]
            terms.append(_total(each) / len(each))
        if components is not None:
            part = dtheta.within(lambda p: _unwrapped(p.component_distribution))
            if type(part.p).__name__ not in (components.families or [type(part.p).__name__]):
                dtheta.target.refuse(f"the field {components} is for {', '.join(components.families)}; found {type(part.p).__name__}.")
            u = ops.broadcast_to(at_x(lambda x, component: components.velocity(x, component, part), p), density.shape)
            terms.append((ops.exp(joint - log_p)[..., None] * u).sum(-2))
        else:
            dcdf = dtheta.of(lambda p: at_x(cdf, p))
            if dcdf is not None:
                terms.append((ops.exp((joint - log_p)[..., None] - density) * -dcdf).sum(-2))  # far out, density itself is 0
        if not terms:
            return ops.asarray(0.0, x)
        return _total(terms)[..., 0] if scalar else _total(terms)

    def parts(p: Any) -> dict[str, Part]:
        return {} if len(p.event_shape) else _mixture_parts(p, components)

    said = [f"orders={orders}"] * (orders is not None) + [f"components={components}"] * (components is not None)
    families = ("MixtureSameFamily", "MixtureGeneral")
    return Field(velocity, "pathwise", families=families, name=f"mixture({', '.join(said)})", parts=parts)


def _mixture_parts(p: Any, field: Field | None) -> dict[str, Part]:
    """The parts of a scalar mixture of one family: logit k, and the parameters of component k."""
    if not hasattr(p, "component_distribution"):
        return {}
    component = _unwrapped(p.component_distribution)
    field = field or PATHWISE.get(type(component).__name__)
    own = {} if field is None or field.parts is None else field.parts(component)
    if not own:
        return {}

    def components(p: Any) -> Any:
        return _unwrapped(p.component_distribution)

    def of_logit(k: int, ops: Ops, x: Array, p: Any) -> Array:
        """-pi_k (F_k - F) / p, from the nearer tail."""
        pi, x_ = _mixing(p).probs, x[..., None]
        below, above = components(p).cdf(x_), _survival(_cdf, x_, components(p))
        right = (pi * below).sum(-1) > 0.5
        gap = ops.where(right, (pi * above).sum(-1) - above[..., k], below[..., k] - (pi * below).sum(-1))
        return -pi[..., k] * gap / ops.exp(p.log_prob(x))

    def of_component(u: Elementwise, k: int | None, ops: Ops, x: Array, p: Any) -> Array:
        """r_k u_k, or the sum over the components that share a parameter."""
        x_ = x[..., None]
        log_joint = ops.log(_mixing(p).probs) + components(p).log_prob(x_)
        moved = ops.exp(log_joint - p.log_prob(x)[..., None]) * u(ops, x_, components(p))
        return moved.sum(-1) if k is None else moved[..., k]

    def logit(k: int, p: Any) -> Array:
        return _mixing(p).logits[..., k]

    def parameter(part: Part, k: int, p: Any) -> Array:
        value = part.parameter(components(p))
        return value[..., k] if value.ndim else value

    size = _mixing(p).logits.shape[-1]
    parts = {f"logits[{k}]": Part(partial(logit, k), partial(of_logit, k)) for k in range(size)}
    for name, part in own.items():
        shape = part.parameter(component).shape
        if shape and shape[-1] == size:
            each = {f"{name}[{k}]": Part(partial(parameter, part, k), partial(of_component, part.u, k)) for k in range(size)}
        else:
            each = {name: Part(partial(parameter, part, 0), partial(of_component, part.u, None))}
        parts |= each
    return parts


def _cdf(x: Array, p: Any) -> Array:
    return p.cdf(x)


def _telescope(
    ops: Ops,
    dlogits: Array,
    log_pi: Array,
    density: Array,
    below: Array,
    above: Array,
    log_p: Array,
    order: Sequence[int],
) -> Array:
    """sum_jk dlogit_j pi_j pi_k v_jk, with the coordinates in ``order``; densities and cdfs over components and coordinates."""
    order = list(order)
    density, below, above = (a[..., order] for a in (density, below, above))
    before = density.cumsum(-1) - density
    after = density.sum(-1)[..., None] - density.cumsum(-1)
    log_pi = ops.broadcast_to(log_pi, density.shape[:-1])[..., None]
    j, k = (..., slice(None), None, slice(None)), (..., None, slice(None), slice(None))
    weight = ops.exp((log_pi + after)[j] + (log_pi + before)[k] - log_p[..., None, None])
    gap = ops.where(below[j] + below[k] > 1, above[j] - above[k], below[k] - below[j])
    u = (dlogits[..., None, None] * weight * gap).sum(-2).sum(-2)
    return u[..., [order.index(i) for i in range(len(order))]]


def _mixing(p: Any) -> Any:
    """The distribution over components; the hosts name it differently."""
    return p.mixture_distribution if hasattr(p, "mixture_distribution") else p.mixing_distribution


def _unwrapped(p: Any) -> Any:
    """A distribution over the coordinates of an independent or expanded one."""
    while type(p).__name__ in ("Independent", "ExpandedDistribution"):
        p = p.base_dist
    return p


def _require_products(p: Any, dtheta: Tangents) -> None:
    parts = [p.component_distribution] if hasattr(p, "component_distribution") else p.component_distributions
    for part in map(_unwrapped, parts):
        if len(part.event_shape) or len(p.event_shape) > 1:
            dtheta.target.refuse(
                f"the field mixture() needs scalar components or vectors of independent coordinates, found {type(part).__name__} "
                f"with event shape {tuple(p.event_shape)}; use LR()."
            )


# ---- MultivariateNormal

Null = Callable[[Any, Tangents], Array]


def multivariate_normal(null: Null | None = None) -> Field:
    r"""The field u = dloc + dL L^-1 y with y = x - loc and L the Cholesky factor of the covariance, plus A Sigma^-1 y; psi = 0.

    A Sigma^-1 y carries no mass for any antisymmetric A, so that A is free: it changes the variance only.

    **Requirements**: a cost without jumps, and x p phi -> 0 at infinity. Any parameterisation of the host, scale_tril, covariance or
    precision.

    Args:
        null: ``null(p, dtheta)``, a matrix over the event (linear in dtheta), whose antisymmetric part is A.

    Returns:
        The field of a MultivariateNormal; without ``null``, the same as that of the hosts' samplers.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.multivariate_normal())
        Flow(velocity=multivariate_normal())

    References:
        Jankowiak and Obermeyer 2018, section 4.3; Jankowiak and Karaletsos 2019, for the null field.
    """

    def linear(ops: Ops, p: Any, dtril: Array, eps: Array) -> Array:
        return _times(dtril, eps)

    return _multivariate_normal("multivariate_normal", linear, null)


def multivariate_normal_transport(null: Null | None = None) -> Field:
    r"""u_loc = 1 and u = M y with M symmetric and M Sigma + Sigma M = dSigma, the optimal transport field; psi = 0.

    A ``null`` adds A Sigma^-1 y as in :func:`multivariate_normal`. Of the pathwise fields this one has the
    least E|u|^2, often but not always the least variance.

    **Requirements**: a cost without jumps, and x p phi -> 0 at infinity. It needs the eigenvalues of the covariance, O(D^3).

    Args:
        null: ``null(p, dtheta)``, a matrix over the event (linear in dtheta), whose antisymmetric part is A.

    Returns:
        The field of a MultivariateNormal.

    Example:
        >>> from flowvi import Flow, fields
        >>> Flow(fields.multivariate_normal_transport())
        Flow(velocity=multivariate_normal_transport())

    References:
        Jankowiak and Obermeyer 2018, section 4.3.
    """

    def linear(ops: Ops, p: Any, dtril: Array, eps: Array) -> Array:
        half = dtril @ p.scale_tril.mT
        d, v = ops.eigh(p.scale_tril @ p.scale_tril.mT)
        m = v @ ((v.mT @ (half + half.mT) @ v) / (d[..., None, :] + d[..., :, None])) @ v.mT
        return _times(m, _times(p.scale_tril, eps))

    return _multivariate_normal("multivariate_normal_transport", linear, null)


def _multivariate_normal(name: str, linear: Callable[[Ops, Any, Array, Array], Array], null: Null | None) -> Field:
    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, eps = dtheta.ops, dtheta.ops.solve_lower(p.scale_tril, x - p.loc)
        dloc, dtril = (dtheta.of(attrgetter(part)) for part in ("loc", "scale_tril"))
        terms = [] if dloc is None else [dloc]
        terms += [] if dtril is None else [linear(ops, p, dtril, eps)]
        if null is not None:
            a = null(p, dtheta)
            terms.append(_times((a - a.mT) / 2, ops.solve(ops.broadcast_to(p.scale_tril.mT, (*x.shape, x.shape[-1])), eps)))
        return _total(terms) if terms else ops.asarray(0.0, x)

    said = "" if null is None else f"null={getattr(null, '__name__', null)}"
    return Field(velocity, "pathwise", families=("MultivariateNormal",), name=f"{name}({said})")


def _times(a: Array, x: Array) -> Array:
    return (a @ x[..., None])[..., 0]


# ---- the pathwise field of a family

PATHWISE: dict[str, Field] = {
    family: field
    for field in (
        location_scale(),
        scale(),
        log_normal(),
        exponential(),
        weibull(),
        kumaraswamy(),
        uniform(),
        pareto(),
        truncated_normal(),
        gamma_implicit(),
        beta_implicit(),
        student_t(),
        von_mises(),
        mixture(),
        dirichlet(),
        multivariate_normal(),
    )
    for family in field.families
}

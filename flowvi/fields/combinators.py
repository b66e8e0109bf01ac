"""Fields made of fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowvi.fields.field import Field, PerElement, Velocity, _total, at_element, name_of
from flowvi.ops import Array
from flowvi.tangents import Tangents


def scaled(a: float | Array, field: Field | Velocity) -> Field:
    r"""``a`` times a field: u = a u', psi = (1 - a) s + a psi', where s is the score.

    For a pathwise field this mixes LR (a = 0) with RP (a = 1); a may lie outside [0, 1].

    **Requirements**: those of the field, and a support that does not move.

    Args:
        a: A number, or an array that broadcasts to the batch shape of x.
        field: A field or a velocity function.

    Returns:
        The field.

    Example:
        The gradient of E[3 x] in loc, with less and less noise from LR (a = 0) to RP (a = 1):

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def noise(a):
        ...     flow = Flow(fields.scaled(a, fields.location_scale()))
        ...     return plot.gradient_samples(dist.Normal(0.0, 1.0), flow, "loc", lambda x: 3.0 * x).std()
        >>> bool(noise(0.0) > noise(0.5) > noise(1.0))
        True

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
    r"""A field multiplied by a mask ``m(x, p)``: u = m(x) u', psi = (1 - m) s + m psi' + u' . grad m.

    With m = 0 at the jumps of the cost, and close to 1 away from them, a pathwise field acts like LR at the jumps and like RP
    elsewhere. Without the last term the mixture of RP and LR would be biased.

    **Requirements**: those of the field, a differentiable m and a support that does not move. For a scalar family m is elementwise.

    Args:
        m: ``m(x, p)``, a number for each element of the batch of x.
        field: A field or a velocity function.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site, if m mixes the coordinates of a scalar family.

    Example:
        P(x > 0) jumps at 0, where the mask is 0; its derivative in loc is 0.399 at loc = 0:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def away_from_zero(x, p):
        ...     return x**2 / (1 + x**2)
        >>> flow = Flow(fields.masked(away_from_zero, fields.location_scale()))
        >>> samples = plot.gradient_samples(dist.Normal(0.0, 1.0), flow, "loc", lambda x: 1.0 * (x > 0))
        >>> bool(abs(samples.mean() - 0.399) < 0.02)
        True

    References:
        Parmas and Sugiyama 2021, eq. 19 with u = m(x) u_RP.
    """
    field = _as_field(field)

    def mask(x: Array, p: Any, dtheta: Tangents) -> Array:
        return dtheta.ops.asarray(m(x, p), x) if len(p.event_shape) else at_element(m, x, p, dtheta, "the mask")

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _per_event(mask(x, p, dtheta), p) * field.velocity(x, p, dtheta)

    def divergence(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, u = dtheta.ops, field.velocity(x, p, dtheta)
        gradient_term = ops.tether(mask(x + u, p, dtheta))
        return ops.stop_gradient(mask(x, p, dtheta)) * _divergence(field, x, p, dtheta) + gradient_term

    return _combined(f"masked({name_of(m)}, {field})", velocity, divergence, field)


def summed(*fields: Field | Velocity) -> Field:
    r"""The sum of fields: u = sum_k u_k, psi = s + sum_k (psi_k - s), where s is the score.

    It joins fields of different parameters, or adds a field that moves no mass (psi_k = s) to a pathwise one. The average of two
    pathwise fields is ``summed(scaled(0.5, f), scaled(0.5, g))``.

    **Requirements**: those of every field, and a support that does not move.

    Args:
        *fields: Fields or velocity functions.

    Returns:
        The field.

    Example:
        One field for loc and another one for scale. The gradient of E[x^2] in scale is 2 scale:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> field = fields.summed(fields.per_element(loc=lambda x, p: 1.0), fields.per_element(scale=lambda x, p: 0.5 * x))
        >>> samples = plot.gradient_samples(dist.Normal(0.0, 1.5), Flow(field), "scale", lambda x: x**2)
        >>> bool(abs(samples.mean() - 3.0) < 0.3)
        True

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
    r"""The field of ``Flow(loc=..., scale=...)``, for use in combinations: u = sum_i u_i(x, p) dtheta_i.

    psi follows by automatic derivatives. ``Flow(loc=u)`` is ``Flow(per_element(loc=u))``.

    **Requirements**: a scalar family (or independent ones), and functions that read x at one coordinate only.

    Args:
        **u: A function ``u(x, p)`` for each parameter by name. A parameter that is not named has u = 0, which is LR.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: an unknown parameter, or a function that mixes coordinates.

    Example:
        >>> from flowvi import Flow, fields
        >>> def half(x, p):
        ...     return 0.5
        >>> Flow(loc=half) == Flow(fields.per_element(loc=half))
        True

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    elements = PerElement(tuple(u.items()))
    arguments = ", ".join(f"{name}={name_of(u_of)}" for name, u_of in u.items())
    return Field(elements, name=f"fields.per_element({arguments})", elementwise=elements)


def _as_field(field: Field | Velocity) -> Field:
    return field if isinstance(field, Field) else Field(field)


def _combined(name: str, velocity: Velocity, divergence: Velocity, *parts: Field) -> Field:
    """A combination of fields, for the families that all parts accept. Its divergence is automatic if that of every part is."""
    named = [part.families for part in parts if part.families]
    families = tuple(f for f in named[0] if all(f in other for other in named)) if named else ()
    automatic = all(part.divergence is None for part in parts)
    return Field(velocity, None if automatic else divergence, families=families, name=f"fields.{name}")


def _divergence(field: Field, x: Array, p: Any, dtheta: Tangents) -> Array:
    """The divergence; for a pathwise field by its transport equation, - (u . grad log p + d_theta log p)."""
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
    """An array over the batch of x, in a shape that broadcasts to x."""
    return a.reshape((*a.shape, *(1,) * len(p.event_shape))) if a.ndim else a

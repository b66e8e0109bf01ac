"""Velocity fields that can be combined, and fields with a function for each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from flowvi.ops import Array, Ops, times
from flowvi.shapes import broadcasts
from flowvi.tangents import Tangents, unknown_parameter
from flowvi.target import Target

Velocity = Callable[[Array, Any, Tangents], Array]
Elementwise = Callable[[Ops, Array, Any], Any]


class Part(NamedTuple):
    """One parameter of a scalar family, and how x moves with it.

    Attributes:
        parameter: ``parameter(p)`` is its value, a number for each x.
        u: ``u(ops, x, p)`` is its velocity, elementwise: a number or an array over x.
    """

    parameter: Callable[[Any], Array]
    u: Elementwise


@dataclass(frozen=True)
class PerElement:
    """The velocity u = sum_i u_i(x, p) dtheta_i, where each u_i is elementwise in x.

    A combination of fields calls it like any velocity. At a site, :meth:`attach` is faster.

    Attributes:
        u: The functions u_i, each with the name of its parameter.
    """

    u: tuple[tuple[str, Callable[[Array, Any], Array]], ...]

    def __call__(self, x: Array, p: Any, dtheta: Tangents) -> Array:
        """The sum."""
        return _total(at_element(u, x, p, dtheta, f"the velocity of '{name}'") * getattr(dtheta, name) for name, u in self.u)

    def attach(self, ops: Ops, target: Target, x: Array) -> tuple[Array, Array | None]:
        """The velocity, of value 0 and linear in dtheta, and an array whose tangent is the divergence (None for constant fields).

        The divergence of an elementwise u_i is u_i'(x) dtheta_i: the derivative of u_i along dtheta_i.
        """
        if chart := target.chart():
            target.refuse(
                f"a field per parameter cannot stay on a support of lower dimension ({chart}); "
                "use Flow(velocity) with a dx that is tangent to it."
            )
        velocity = divergence = None
        parameters, p0 = target.parameters, target.p0
        for name, u in self.u:
            if name not in parameters:
                target.refuse(unknown_parameter(target.p, name))
            theta = ops.asarray(getattr(target.p, name), x)
            if not broadcasts(theta.shape, x.shape):
                target.refuse(
                    f"parameter '{name}' of shape {tuple(theta.shape)} does not act coordinate by coordinate on x of shape "
                    f"{tuple(x.shape)}; use the general form Flow(velocity)."
                )

            dtheta, at_x = ops.tether(theta), u(x, p0)
            if isinstance(at_x, (int, float)):  # a constant field
                moved = times(dtheta, at_x)
            else:
                what = f"the velocity of '{name}'"
                at_x = target.in_shape(ops, at_x, x, what)
                target.check_elementwise(ops, u, x, what)
                if target.validate and target.first_use:
                    require_finite(ops, target, ops.derivative(partial(_as_array, ops, target, u), x, live=False)[1])
                along = target.in_shape(ops, u(x + dtheta, p0), x, what)
                if target.is_live(at_x):  # u closes over a live parameter, whose derivative is not part of the velocity
                    along, at_x = along - at_x, ops.stop_gradient(at_x)
                divergence = along if divergence is None else divergence + along
                moved = at_x * dtheta
            velocity = moved if velocity is None else velocity + moved
        require_finite(ops, target, velocity)
        return velocity, None if divergence is None else target.sum_event(divergence)


def _as_array(ops: Ops, target: Target, u: Callable[[Array, Any], Array], x: Array) -> Array:
    return ops.asarray(u(x, target.p0), x)


def at_element(f: Callable[[Array, Any], Array], x: Array, p: Any, dtheta: Tangents, what: str) -> Array:
    """``f(x, p)`` in the shape of x; refused if it reads x at another coordinate."""

    def in_shape(x: Array, p: Any) -> Array:
        return dtheta.target.in_shape(dtheta.ops, f(x, p), x, what)

    dtheta.target.check_elementwise(dtheta.ops, in_shape, x, what)
    return in_shape(x, p)


def require_finite(ops: Ops, target: Target, a: Array | None) -> None:
    """Refuse a velocity, a divergence or a slope that is NaN or infinite; None is 0."""
    if target.validate and a is not None:
        target.check(ops, ops.all_finite(a), "the velocity field or its divergence is NaN or infinite at a sample.")


def name_of(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


@dataclass(frozen=True)
class Field:
    r"""A velocity field with its properties: ``Flow(Field(velocity, divergence))`` is ``Flow(velocity, divergence=divergence)``.

    u is ``velocity(x, p, dtheta)`` and psi = div u + u . grad log p + d_theta log p, where div u is the ``divergence``.

    **Requirements**: a velocity that is linear in dtheta, with p detached. For a field that works in both hosts, ``dtheta.ops`` has the
    functions of the backend, and ``dtheta.of(f)`` is the tangent of ``f(p)`` for any function f of the parameters.

    Args:
        velocity: ``velocity(x, p, dtheta)``, of the shape of x.
        divergence: ``divergence(x, p, dtheta)`` of batch shape; ``"pathwise"`` declares psi = 0; None: automatic.
        rides: Whether u moves with every bound of the support. Then a support that moves with a parameter causes no bias.
        families: The names of the families that it accepts; empty for any.
        name: Its name in messages.
        parts: For an elementwise pathwise field, ``parts(p)`` are the :class:`Part` of each parameter by name, whose sum is u (empty if
            there are none for this p). None for any other field.
        elementwise: The functions ``u(x, p)`` of a field that has one for each parameter; None for other fields.

    Example:
        Any field is unbiased, here for the gradient of E[3 x]:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def velocity(x, p, dtheta):
        ...     return dtheta.ops.sin(x) * dtheta.loc
        >>> wave = fields.scaled(0.5, fields.Field(velocity, name="wave"))
        >>> samples = plot.gradient_samples(dist.Normal(0.0, 1.0), Flow(wave), "loc", lambda x: 3.0 * x)
        >>> bool(abs(samples.mean() - 3.0) < 0.2)
        True

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    velocity: Velocity
    divergence: Velocity | Literal["pathwise"] | None = None
    rides: bool = False
    families: tuple[str, ...] = ()
    name: str = ""
    parts: Callable[[Any], Mapping[str, Part]] | None = None
    elementwise: PerElement | None = None

    def __repr__(self) -> str:
        """The field by its name; without one, its velocity and its divergence."""
        arguments = [self.velocity] if self.divergence is None else [self.velocity, self.divergence]
        return self.name or f"Field({', '.join(map(name_of, arguments))})"


# ---- fields of families, parameter by parameter


def _along(x: Array, p: Any, dtheta: Tangents, parts: Mapping[str, Part]) -> Array:
    """sum_i u_i(x, p) dtheta_i over the parameters of p that move."""
    moving = [(part.u, d) for part in parts.values() if (d := dtheta.of(part.parameter)) is not None]
    return _total(u(dtheta.ops, x, p) * d for u, d in moving) if moving else dtheta.ops.asarray(0.0, x)


def _parts(u: Mapping[str, Elementwise]) -> dict[str, Part]:
    """Parts by the names of attributes of p."""
    return {name: Part(attrgetter(name), u_of) for name, u_of in u.items()}


def _pathwise(name: str, families: Sequence[str], **u: Elementwise) -> Field:
    """A field of scalar families that solves the transport equation, from one u for each parameter."""
    return _of_parts(f"{name}()", families, lambda p: _parts(u))


def _of_parts(name: str, families: Sequence[str], parts: Callable[[Any], Mapping[str, Part]], rides: bool = True) -> Field:
    """The pathwise field that is the sum of its parts."""

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        return _along(x, p, dtheta, parts(p))

    return Field(velocity, "pathwise", rides=rides, families=tuple(families), name=f"fields.{name}", parts=parts)


def _closed(name: str, families: Sequence[str], **u: tuple[Elementwise, Elementwise]) -> Field:
    """A field of scalar families, from u and its divergence for each parameter."""
    velocities, divergences = (_parts({k: pair[i] for k, pair in u.items()}) for i in (0, 1))
    return Field(
        lambda x, p, dtheta: _along(x, p, dtheta, velocities),
        lambda x, p, dtheta: _along(x, p, dtheta, divergences),
        families=tuple(families),
        name=f"fields.{name}()",
    )


def _total(terms: Any) -> Array:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first

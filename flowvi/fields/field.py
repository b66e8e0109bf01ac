"""A velocity field as a value, and fields that are given parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents

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


def _total(terms: Any) -> Array:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first

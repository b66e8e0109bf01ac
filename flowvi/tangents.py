"""The tangents of a site's parameters, by which velocity fields are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowvi.ops import Array, Ops


class Tangents:
    """Parameter tangents: ``dtheta.loc`` has value 0 and the derivative of the live parameter ``loc``.

    Attributes:
        ops: The operations of the backend, for velocity fields that work in both hosts.
        target: The site's distribution, a ``Target``.
        p: The distribution (or a part of it, see :meth:`within`) with live parameters.
        p0: The same distribution with detached parameters.
    """

    def __init__(self, ops: Ops, target: Any, part: Callable[[Any], Any] = lambda p: p):
        self.ops: Ops = ops
        self.target: Any = target
        self.p: Any = part(target.p)
        self.p0: Any = part(target.p0)
        self._part = part

    def __getattr__(self, name: str) -> Array:
        if name not in self.p.arg_constraints:
            self.target.refuse(unknown_parameter(self.p, name))
        return self.ops.tether(getattr(self.p, name))

    def of(self, f: Callable[[Any], Array]) -> Array | None:
        """The tangent of ``f(p)``, linear in dtheta for every x that f closes over; None if ``f(p)`` has no derivative."""
        live = f(self.p)
        return self.ops.tether(live - f(self.p0)) if self.target.is_live(live) else None

    def within(self, part: Callable[[Any], Any]) -> Tangents:
        """The tangents of the parameters of a part of p, such as the components of a mixture."""
        return Tangents(self.ops, self.target, lambda p: part(self._part(p)))


def unknown_parameter(p: Any, name: str) -> str:
    names = ", ".join(p.arg_constraints) or "none"
    return f"{type(p).__name__} has no parameter '{name}'; its parameters are: {names}."

r"""Declared jumps of the cost: the surface terms that a pathwise derivative leaves out.

Let the cost jump by :math:`[\phi] = \phi(t^+) - \phi(t^-)` as a scalar x crosses t, and let the jump move with the speed v. A field u
then misses the flux :math:`p(t)\,(u(t) - v)\,[\phi]` of mass through t. Two alternatives, just above and just below t, add this flux.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowvi.alternatives import Alternatives, Comparison
from flowvi.ops import Array, Ops
from flowvi.refusals import JUMPS
from flowvi.surfaces import Surface, surface_comparison
from flowvi.target import Target

Jump = float | Array | Callable[[Any], Array] | Surface
Jumps = Sequence[Jump] | Surface
ULPS = 8  # the distance from t, in units of the last digit of 1 + |t|; even x + 1 > t + 1 then distinguishes the two sides


class JumpsField:
    """The field ``jumps`` of an estimator's dataclass: a tuple, made from any sequence."""

    def __get__(self, estimator: Any, owner: type) -> tuple[Jump, ...]:
        """The jumps of an estimator; for the class itself none, which is the default."""
        return () if estimator is None else vars(estimator)["jumps"]

    def __set__(self, estimator: Any, value: Jumps) -> None:
        """Refuse anything but a sequence or a surface."""
        if isinstance(value, Surface):
            value = (value,)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{type(estimator).__name__}: expected jumps=[t, ...], found {value!r}.")
        for jump in value:
            if not (isinstance(jump, int | float | Surface) or callable(jump) or hasattr(jump, "shape")):
                raise TypeError(
                    f"{type(estimator).__name__}: expected jumps=[t, ...] with numbers, arrays, functions or surfaces, found {jump!r}."
                )
        if len({isinstance(jump, Surface) for jump in value}) > 1:
            raise TypeError(f"{type(estimator).__name__}: expected jumps that are all numbers or all surfaces, found {value!r}.")
        vars(estimator)["jumps"] = tuple(value)


def jump_comparison(ops: Ops, target: Target, x: Array, jumps: tuple[Jump, ...], velocity: Callable[[Array], Array]) -> Comparison:
    """The alternatives above and below each jump.

    Args:
        ops: The operations of the backend.
        target: The site, a scalar family.
        x: The draw.
        jumps: Where the cost jumps: numbers, arrays that broadcast to x, or functions of p (with live parameters); or surfaces.
        velocity: The velocity of the estimator's field at a point, live, with the value 0.
    """
    if surfaces := tuple(jump for jump in jumps if isinstance(jump, Surface)):
        return surface_comparison(ops, target, x, surfaces, velocity)
    if target.event_ndim or target.transforms or target.is_discrete():
        target.refuse(
            f"jumps=... is for a continuous scalar family (or to_event of one), found {target.family}"
            f"{' under a transform' if target.transforms else ''}; use LR(), or a field that is 0 at the jump.",
            JUMPS,
        )

    def make(uniforms: Array) -> Alternatives:
        values: list[Array] = []
        weights: list[Array] = []
        for jump in jumps:
            live = target.in_shape(ops, jump(target.p) if callable(jump) else jump, x, "a jump")
            t = ops.stop_gradient(live)
            inside = ops.exp(target.p0.log_prob(t))
            weight = inside * (velocity(t) - ops.tether(live))
            size = 1 + abs(t)
            step = ULPS * (ops.nextafter(size, float("inf")) - size)
            values += [t + step, t - step]
            weights += [weight, -weight]
        return Alternatives(ops.stack(values, 0), ops.stack(weights, 0))

    return Comparison(make, x, target.event_ndim, target.batch_ndim, 2 * len(jumps), is_whole=False)

"""Integrals over the half-line of functions that decay exponentially, by the double-exponential rule."""

from __future__ import annotations

import math
from collections.abc import Callable

from flowvi.ops import Array, Ops


def _rule() -> tuple[list[float], list[float]]:
    """Nodes and weights over (0, inf) for integrands that decay exponentially: the double-exponential rule r = exp(t - exp(-t))."""
    step = 0.15
    t = [-3.6 + step * k for k in range(52)]
    nodes = [math.exp(t - math.exp(-t)) for t in t]
    return nodes, [step * r * (1 + math.exp(-t)) for r, t in zip(nodes, t, strict=True)]


NODES, WEIGHTS = _rule()


def integral(ops: Ops, f: Callable[[Array], Array], width: Array) -> Array:
    """The integral over (0, inf) of an f that decays on the scale ``width``; f keeps the shape of an array with another axis."""
    last = (*(1,) * width.ndim, len(NODES))
    r = width[..., None] * ops.asarray(NODES, width).reshape(last)
    return width * (f(r) * ops.asarray(WEIGHTS, width).reshape(last)).sum(-1)


def width_of(ops: Ops, slope: Array, curvature: Array) -> Array:
    """The scale on which exp(-slope r - curvature r^2 / 2) decays, for a curvature that lasts for lengths of order 1."""
    return 1 / (abs(slope) + ops.where(curvature < 1, curvature, ops.sqrt(ops.where(curvature < 1, 0 * curvature + 1, curvature))))

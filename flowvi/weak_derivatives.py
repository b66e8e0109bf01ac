"""Weak derivatives: the derivative of a distribution in one parameter as a weighted difference of two distributions to draw from.

Each function returns the values at which the cost is evaluated, computed from the draw x and uniform numbers u, with their weights. A
weight has the right derivative, and a value of about the same size, because a run with a weight of value 0 would never be drawn.
"""

from __future__ import annotations

import math
from typing import Any

from flowvi.family import WeakDerivative
from flowvi.ops import Array, Ops

Weighted = list[tuple[Array, Array]]


def _relative(ops: Ops, parameter: Array) -> Array:
    """1 with the derivative of the parameter's logarithm."""
    return parameter / ops.stop_gradient(parameter)


def _exponential(ops: Ops, u: Array) -> Array:
    """A draw from the standard Exponential."""
    return -ops.log1p(-u)


def _from_loc(ops: Ops, p: Any, x: Array) -> tuple[Array, Array, Array]:
    """loc, scale and the sign of x - loc, detached."""
    loc, scale = ops.stop_gradient(p.loc), ops.stop_gradient(p.scale)
    return loc, scale, ops.where(x < loc, 0 * x - 1, 0 * x + 1)


def _normal_loc(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    loc, scale, _ = _from_loc(ops, p, x)
    distance = scale * ops.sqrt(2 * _exponential(ops, u))
    weight = (1 + ops.tether(p.loc)) / (scale * math.sqrt(2 * math.pi))
    return [(loc + distance, weight), (loc - distance, -weight)]


def _normal_scale(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    """The square of a Maxwell draw is the square of a Normal draw plus twice an Exponential draw."""
    loc, scale, sign = _from_loc(ops, p, x)
    distance = scale * ops.sqrt(((x - loc) / scale) ** 2 + 2 * _exponential(ops, u))
    return [(loc + sign * distance, _relative(ops, p.scale))]


def _laplace_loc(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    loc, scale, sign = _from_loc(ops, p, x)
    return [(2 * loc - x, -sign * (1 + ops.tether(p.loc)) / (2 * scale))]


def _laplace_scale(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    _, scale, sign = _from_loc(ops, p, x)
    return [(x + sign * scale * _exponential(ops, u), _relative(ops, p.scale))]


def _exponential_rate(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    return [(x + _exponential(ops, u) / ops.stop_gradient(p.rate), -_relative(ops, p.rate))]


def _gamma_rate(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    weight = -ops.stop_gradient(p.concentration) * _relative(ops, p.rate)
    return [(x + _exponential(ops, u) / ops.stop_gradient(p.rate), weight)]


def _weibull_scale(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    """(x / scale)^concentration is an Exponential draw."""
    scale, power = ops.stop_gradient(p.scale), ops.stop_gradient(p.concentration)
    y = scale * ((x / scale) ** power + _exponential(ops, u)) ** (1 / power)
    return [(y, power * _relative(ops, p.scale))]


def _poisson_rate(ops: Ops, p: Any, x: Array, u: Array) -> Weighted:
    return [(x + 1, p.rate)]


NORMAL = {"loc": WeakDerivative(_normal_loc, num_values=2), "scale": WeakDerivative(_normal_scale)}
LAPLACE = {"loc": WeakDerivative(_laplace_loc), "scale": WeakDerivative(_laplace_scale)}
EXPONENTIAL = {"rate": WeakDerivative(_exponential_rate)}
GAMMA = {"rate": WeakDerivative(_gamma_rate)}
WEIBULL = {"scale": WeakDerivative(_weibull_scale)}
POISSON = {"rate": WeakDerivative(_poisson_rate)}

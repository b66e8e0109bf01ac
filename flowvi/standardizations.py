"""Standardizations S(x, p) of named families: functions whose law is free of p's parameters and that follow the host's samplers.

Written once over the operations of a backend; both hosts give these families the same names and parameters.
"""

from __future__ import annotations

from flowvi.ops import Array, Ops


def location_scale(ops: Ops, x: Array, p) -> Array:
    return (x - p.loc) / p.scale


def scale(ops: Ops, x: Array, p) -> Array:
    return x / p.scale


def rate(ops: Ops, x: Array, p) -> Array:
    return x * p.rate


def uniform(ops: Ops, x: Array, p) -> Array:
    return (x - p.low) / (p.high - p.low)


def log_normal(ops: Ops, x: Array, p) -> Array:
    return (ops.log(x) - p.loc) / p.scale


def multivariate_normal(ops: Ops, x: Array, p) -> Array:
    return ops.solve_lower(p.scale_tril, x - p.loc)


STANDARDIZATIONS = {
    **dict.fromkeys(("Normal", "Laplace", "Logistic", "Cauchy", "Gumbel", "StudentT"), location_scale),
    **dict.fromkeys(("HalfNormal", "HalfCauchy"), scale),
    "Exponential": rate,
    "Uniform": uniform,
    "LogNormal": log_normal,
    "MultivariateNormal": multivariate_normal,
}

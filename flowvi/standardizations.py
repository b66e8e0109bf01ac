"""Functions S(x, p) that standardize a sample; :mod:`flowvi.families` assigns them to families.

For those above the line, the law of S(x) does not depend on the parameters, and S inverts the host's sampler. For those below it, S(x)
is roughly a standard Normal. Both hosts give these families the same names and parameters.
"""

from __future__ import annotations

from typing import Any

from flowvi.ops import Array, Ops


def location_scale(ops: Ops, x: Array, p: Any) -> Array:
    return (x - p.loc) / p.scale


def scale(ops: Ops, x: Array, p: Any) -> Array:
    return x / p.scale


def rate(ops: Ops, x: Array, p: Any) -> Array:
    return x * p.rate


def uniform(ops: Ops, x: Array, p: Any) -> Array:
    return (x - p.low) / (p.high - p.low)


def log_normal(ops: Ops, x: Array, p: Any) -> Array:
    return (ops.log(x) - p.loc) / p.scale


def multivariate_normal(ops: Ops, x: Array, p: Any) -> Array:
    return ops.solve_lower(p.scale_tril, x - p.loc)


# ---- roughly a standard Normal


def by_moments(ops: Ops, x: Array, p: Any) -> Array:
    return (x - p.mean) / p.variance**0.5


def of_truncated(ops: Ops, x: Array, p: Any) -> Array:
    return location_scale(ops, x, p.base_dist)


def half_normal(ops: Ops, x: Array, p: Any) -> Array:
    return (x / p.scale - 0.8) / 0.6


def half_cauchy(ops: Ops, x: Array, p: Any) -> Array:
    return ops.log(x / p.scale)


def exponential(ops: Ops, x: Array, p: Any) -> Array:
    return _cube_root(x * p.rate, 1.0)


def gamma(ops: Ops, x: Array, p: Any) -> Array:
    return _cube_root(x * p.rate, p.concentration)


def inverse_gamma(ops: Ops, x: Array, p: Any) -> Array:
    return -_cube_root(p.rate / x, p.concentration)


def weibull(ops: Ops, x: Array, p: Any) -> Array:
    return _cube_root((x / p.scale) ** p.concentration, 1.0)


def pareto(ops: Ops, x: Array, p: Any) -> Array:
    return _cube_root(p.alpha * ops.log(x / p.scale), 1.0)


def von_mises(ops: Ops, x: Array, p: Any) -> Array:
    return ops.sin(x - p.loc) * p.concentration**0.5  # periodic, like the cost


def _cube_root(t: Array, concentration: Any) -> Array:
    """A Gamma(concentration, 1), nearly standardized (Wilson and Hilferty 1931)."""
    return 3 * concentration**0.5 * ((t / concentration) ** (1 / 3) - 1) + 1 / (3 * concentration**0.5)

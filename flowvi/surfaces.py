r"""Surfaces in the space of an event across which the cost jumps.

Where the cost jumps by :math:`[\phi]` across the surface g(x; theta) = 0, a field u misses the flux

.. math:: \int p\,\delta(g)\,(u\cdot\nabla g + \partial_\theta g)\,[\phi]\,dx.

One point is drawn on the surface, and two alternatives, one on either side of it, add the flux.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowvi.alternatives import Alternatives, Comparison
from flowvi.ops import Array, Ops
from flowvi.refusals import JUMPS
from flowvi.target import Target

ULPS = 8  # the distance of the alternatives from the surface, per coordinate, in units in the last place of g


class Normals(NamedTuple):
    """The law of the event: x = loc + L z with standard Normals z, detached.

    Attributes:
        loc: The mean, of the shape of x.
        root: Maps a vector z to L z.
        whiten: Maps a vector L z to z.
        covariance: Maps a vector a to L L' a.
    """

    loc: Array
    root: Callable[[Array], Array]
    whiten: Callable[[Array], Array]
    covariance: Callable[[Array], Array]


class Crossing(NamedTuple):
    """One point drawn on a surface g = 0.

    Attributes:
        point: The point, detached.
        inward: The vector along which the alternatives lie; to first order, g grows by 1 along it.
        weight: The density p over the density with which the point was drawn, times the area element of the surface per unit of g.
        normal: The gradient of g in x.
        of_g: The value of g at the point, with the derivatives of its parameters.
        size: The size of the terms of g, for rounding.
    """

    point: Array
    inward: Array
    weight: Array
    normal: Array
    of_g: Array
    size: Array


class Surface(ABC):
    """A surface that ``jumps`` can name: :class:`HalfSpace` and :class:`LevelSet`."""

    def __repr__(self) -> str:
        """The arguments that are given, functions by name."""
        given = ((name, value) for name, value in vars(self).items() if value is not None)
        arguments = (f"{name}={getattr(value, '__name__', repr(value))}" for name, value in given)
        return f"{type(self).__name__}({', '.join(arguments)})"

    @abstractmethod
    def crossing(self, ops: Ops, target: Target, p: Normals, z: Array) -> Crossing:
        """A point on the surface, computed from standard Normals z of the shape of x."""


@dataclass(frozen=True, repr=False)
class HalfSpace(Surface):
    r"""The plane :math:`a\cdot x = t` in the space of an event: the cost jumps where x crosses it.

    For ``jumps`` of :class:`RP`, :class:`ImplicitRP`, :class:`Flow` and :class:`LR`. It takes two more evaluations of the program. For
    each sample, one point y on the plane is drawn, from p given that x lies on the plane. It adds the term
    :math:`p_{a\cdot x}(t)\,(a\cdot u + \partial_\theta (a\cdot y - t))\,[\phi]`, where :math:`p_{a\cdot x}(t)` is the density of a . x
    at t.

    **Requirements**: a MultivariateNormal with a ``scale_tril``, or Normals that are one event by ``to_event(1)``.

    Args:
        normal: The vector a, an array that broadcasts to x, or a function of p (with live parameters).
        offset: The number t, an array with a number for each element of the batch, or a function of p (with live parameters).

    Raises:
        ValueError: At the first run, naming the site: another family, or an event that is not a vector.

    Example:
        The gradient of E[x_1 + x_2 > 1] under two standard Normals, in the first location, is the density of x_1 + x_2 at 1:

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowvi import RP, HalfSpace
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        ...     numpyro.factor("cost", 1.0 * (x.sum() > 1.0))
        >>> def guide():
        ...     numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros(2)), 1.0).to_event(1).mask(False))
        >>> elbo = TraceFlow_ELBO(default=RP(jumps=HalfSpace(jnp.ones(2), 1.0)))
        >>> gradient = jax.grad(lambda loc, key: -elbo.loss(key, {"loc": loc}, model, guide))
        >>> [round(float(gradient(jnp.zeros(2), jax.random.key(seed))[0]), 4) for seed in range(3)]
        [0.2197, 0.2197, 0.2197]

    References:
        Lee, Yu and Yang 2018.
    """

    normal: Array | Callable[[Any], Array]
    offset: float | Array | Callable[[Any], Array] = 0.0

    def crossing(self, ops: Ops, target: Target, p: Normals, z: Array) -> Crossing:
        normal = target.in_shape(ops, evaluated(self.normal, target), z, "the normal of a HalfSpace")
        offset = target.in_shape(ops, evaluated(self.offset, target), z[..., 0], "the offset of a HalfSpace")
        a, t = ops.stop_gradient(normal), ops.stop_gradient(offset)
        across = p.covariance(a)
        variance = (a * across).sum(-1)
        inward = across / variance[..., None]
        anywhere = p.loc + p.root(z)
        y = anywhere + inward * (t - (a * anywhere).sum(-1))[..., None]
        density = ops.exp(-((t - (a * p.loc).sum(-1)) ** 2) / (2 * variance)) / ops.sqrt(2 * math.pi * variance)
        of_g = (y * ops.tether(normal)).sum(-1) - ops.tether(offset)
        return Crossing(y, inward, density, a, of_g, 1 + abs(t) + abs(a * y).sum(-1))


def surface_comparison(
    ops: Ops, target: Target, x: Array, surfaces: tuple[Surface, ...], velocity: Callable[[Array], Array]
) -> Comparison:
    """The alternatives on either side of each surface; see :func:`flowvi.jumps.jump_comparison`."""
    p = _normals(ops, target, x)

    def make(uniforms: Array) -> Alternatives:
        values: list[Array] = []
        weights: list[Array] = []
        for surface, (u, v) in zip(surfaces, uniforms.reshape((len(surfaces), 2, *x.shape)), strict=True):
            z = ops.sqrt(-2 * ops.log1p(-u)) * ops.cos(2 * math.pi * v)
            at = surface.crossing(ops, target, p, z)
            flux = (at.normal * velocity(at.point)).sum(-1) + ops.tether(at.of_g)
            step = ULPS * x.shape[-1] * (ops.nextafter(at.size, float("inf")) - at.size)[..., None] * at.inward
            values += [at.point + step, at.point - step]
            weights += [at.weight * flux, -at.weight * flux]
        return Alternatives(ops.stack(values, 0), ops.stack(weights, 0))

    num_values = 2 * len(surfaces)
    return Comparison(make, x, x.ndim - target.batch_ndim, target.batch_ndim, num_values, num_values, is_whole=False)


def evaluated(value: Any, target: Target) -> Any:
    """An array, or a function of p at its live parameters."""
    return value(target.p) if callable(value) else value


def _normals(ops: Ops, target: Target, x: Array) -> Normals:
    """The law of the site; refuses anything but a vector of Normals."""
    if len(x.shape) - target.batch_ndim != 1 or target.transforms or target.family not in ("Normal", "MultivariateNormal"):
        target.refuse(
            f"surfaces in jumps are for Normal under to_event(1) and for MultivariateNormal, found {target.family}"
            f"{' under a transform' if target.transforms else ''} with {len(x.shape) - target.batch_ndim} event dims; use LR(), or a "
            "number for each element, jumps=[t].",
            JUMPS,
        )
    loc = ops.broadcast_to(ops.stop_gradient(target.p0.loc), x.shape)
    if target.family == "Normal":
        scale = ops.broadcast_to(ops.stop_gradient(target.p0.scale), x.shape)
        return Normals(loc, lambda z: scale * z, lambda v: v / scale, lambda a: scale**2 * a)
    tril = ops.stop_gradient(target.p0.scale_tril)

    def times(matrix: Array, vector: Array) -> Array:
        return (matrix @ vector[..., None])[..., 0]

    return Normals(loc, lambda z: times(tril, z), lambda v: ops.solve_lower(tril, v), lambda a: times(tril, times(tril.mT, a)))

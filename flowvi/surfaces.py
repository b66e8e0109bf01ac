r"""Surfaces in the space of an event across which the cost jumps.

Where the cost jumps by :math:`[\phi]` across the surface g(x; theta) = 0, a field u misses the flux

.. math:: \int p\,\delta(g)\,(u\cdot\nabla g + \partial_\theta g)\,[\phi]\,dx.

One point is drawn on the surface, and two alternatives, one on either side of it, add the flux.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowvi.alternatives import Alternatives, Comparison
from flowvi.ops import Array, Ops
from flowvi.target import Target

ULPS = 8  # for each coordinate: how far from the surface the alternatives are, in units in the last place of g


@dataclass(frozen=True)
class HalfSpace:
    r"""The plane :math:`a\cdot x = t` in the space of an event: the cost jumps where x crosses it.

    For ``jumps`` of :class:`RP`, :class:`ImplicitRP`, :class:`Flow` and :class:`LR`. It takes two more evaluations of the program. One
    boundary point y is drawn for each sample: from p given that it lies on the plane. The term that it adds is
    :math:`p_{a\cdot x}(t)\,(a\cdot u + \partial_\theta (a\cdot y - t))\,[\phi]`, with the density of a . x at t.

    **Requirements**: a MultivariateNormal with a ``scale_tril``, or Normals that are one event by ``to_event(1)``.

    Args:
        normal: The vector a, an array that broadcasts to x, or a function of p (with live parameters).
        offset: The number t, or an array of one for each element of the batch, or a function of p (with live parameters).

    Raises:
        ValueError: At the first run, naming the site: another family, an event that is no vector, or numbers as further jumps.

    Example:
        The gradient of E[x_1 + x_2 > 1] under two standard Normals, in the first location: the density of x_1 + x_2 at 1.

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


def surface_comparison(
    ops: Ops, target: Target, x: Array, surfaces: tuple[HalfSpace, ...], velocity: Callable[[Array], Array]
) -> Comparison:
    """The alternatives on either side of each surface; as :func:`flowvi.jumps.jump_comparison`."""
    root, covariance = _covariance(ops, target, x)
    loc = ops.broadcast_to(ops.stop_gradient(target.p0.loc), x.shape)

    def make(uniforms: Array) -> Alternatives:
        values: list[Array] = []
        weights: list[Array] = []
        for surface, (u, v) in zip(surfaces, uniforms.reshape((len(surfaces), 2, *x.shape)), strict=True):
            normal = target.in_shape(ops, _of(surface.normal, target), x, "the normal of a HalfSpace")
            offset = target.in_shape(ops, _of(surface.offset, target), x[..., 0], "the offset of a HalfSpace")
            a, t = ops.stop_gradient(normal), ops.stop_gradient(offset)
            across = covariance(a)
            variance = (a * across).sum(-1)
            inward = across / variance[..., None]  # moves a . x by 1
            anywhere = loc + root(ops.sqrt(-2 * ops.log1p(-u)) * ops.cos(2 * math.pi * v))
            y = anywhere + inward * (t - (a * anywhere).sum(-1))[..., None]
            density = ops.exp(-((t - (a * loc).sum(-1)) ** 2) / (2 * variance)) / ops.sqrt(2 * math.pi * variance)
            flux = (a * velocity(y) + y * ops.tether(normal)).sum(-1) - ops.tether(offset)
            size = 1 + abs(t) + abs(a * y).sum(-1)
            step = ULPS * x.shape[-1] * (ops.nextafter(size, float("inf")) - size)[..., None] * inward
            values += [y + step, y - step]
            weights += [density * flux, -density * flux]
        return Alternatives(ops.stack(values, 0), ops.stack(weights, 0))

    num_values = 2 * len(surfaces)
    return Comparison(make, x, x.ndim - target.batch_ndim, target.batch_ndim, num_values, num_values, is_whole=False)


def _of(value: Any, target: Target) -> Any:
    return value(target.p) if callable(value) else value


def _covariance(ops: Ops, target: Target, x: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The linear maps of the covariance: its root, from standard Normals to x - loc, and itself."""
    if len(x.shape) - target.batch_ndim != 1 or target.transforms or target.family not in ("Normal", "MultivariateNormal"):
        target.refuse(
            f"jumps=HalfSpace(...) are for Normal under to_event(1) and for MultivariateNormal, found {target.family}"
            f"{' under a transform' if target.transforms else ''} with {len(x.shape) - target.batch_ndim} event dims; use LR(), or a "
            "number for each element, jumps=[t]."
        )
    if target.family == "Normal":
        scale = ops.stop_gradient(target.p0.scale)
        return lambda z: scale * z, lambda a: scale**2 * a
    tril = ops.stop_gradient(target.p0.scale_tril)

    def times(matrix: Array, vector: Array) -> Array:
        return (matrix @ vector[..., None])[..., 0]

    return lambda z: times(tril, z), lambda a: times(tril, times(tril.mT, a))

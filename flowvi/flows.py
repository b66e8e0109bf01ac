"""Flows without an analytic inverse: the density at a fixed value, from the base sample that the forward pass has kept."""

from __future__ import annotations

from flowvi.ops import Array, Ops
from flowvi.target import Target


def held_base(ops: Ops, target: Target, x: Array) -> Array:
    r"""The base sample x, moving so that the value T(x) of the site does not: :math:`dx = -(\partial_x T)^{-1} \partial_\theta T`.

    It is what :math:`T^{-1}(y; \theta)` would be at a fixed y, with its first derivative.

    Args:
        ops: The operations of the backend.
        target: The target of a site, entered, so that its transforms lead from x to y.
        x: The base sample, detached.
    """
    event_ndim = max(transform.domain.event_dim for transform in target.transforms)
    moved = ops.tether(target.push(x))
    if event_ndim == 0:
        _, slope = ops.derivative(target.push, x, live=False)
        return x - moved / slope
    _, slope = ops.jacobian(target.push, x, event_ndim, live=False)
    return x - ops.solve(slope, moved.reshape(slope.shape[:-1])).reshape(x.shape)

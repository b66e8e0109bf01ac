"""Flows without an analytic inverse: the density at a fixed value, from the base sample that the forward pass kept."""

from __future__ import annotations

from flowvi.ops import Array, Ops
from flowvi.target import Target


def held_base(ops: Ops, target: Target, x: Array) -> Array:
    r"""The base sample x, with the derivative that keeps the value T(x) fixed: :math:`dx = -(\partial_x T)^{-1} \partial_\theta T`.

    This is :math:`T^{-1}(y; \theta)` at a fixed y, with its first derivative.

    Args:
        ops: The operations of the backend.
        target: The entered target of a site; its transforms map x to y.
        x: The base sample, detached.
    """
    event_ndim = max(transform.domain.event_dim for transform in target.transforms)
    moved = ops.tether(target.push(x))
    if event_ndim == 0:
        _, slope = ops.derivative(target.push, x, live=False)
        return x - moved / slope
    _, slope = ops.jacobian(target.push, x, event_ndim, live=False)
    return x - ops.solve(slope, moved.reshape(slope.shape[:-1])).reshape(x.shape)

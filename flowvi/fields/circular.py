"""Fields of families on a circle."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from flowvi.family import families_with
from flowvi.fields.field import Elementwise, Field, _of_parts, _parts
from flowvi.ops import Array, Ops


def von_mises(cut: float | None = None) -> Field:
    r"""u_loc = 1 and u_concentration = -(dF / d concentration) / p with F counted from the antipode of loc; psi = 0.

    On a circle a field is unique up to a circulation c / p. With a ``cut``, c is such that the field is 0 there:
    u(x) - u(cut) p(cut) / p(x). No mass then crosses the cut, and the cost may jump there.

    **Requirements**: without a cut, a *periodic* cost: the hosts' values jump from pi to -pi, and so does a cost such as phi(x) = x.
    With ``cut=math.pi``, any smooth cost on (-pi, pi). Neither host's sampler has a derivative in the concentration. NumPyro's has one
    in loc, which is right for periodic costs.

    Args:
        cut: The angle at which the field is 0.

    Returns:
        The field of a VonMises.

    Example:
        E[cos x] is I_1 / I_0, whose derivative at concentration 2 is 0.164:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.VonMises(0.0, 2.0), Flow(fields.von_mises()), "concentration", jnp.cos)
        >>> bool(abs(samples.mean() - 0.164) < 0.01)
        True

    References:
        Figurnov, Mohamed and Mnih 2018, for the concentration. Parmas and Sugiyama 2021, eq. 19.
    """
    u: dict[str, Elementwise] = {"loc": lambda ops, x, p: 1.0, "concentration": _von_mises_concentration}

    def without_flux(u: Elementwise, ops: Ops, x: Array, p: Any) -> Array:
        seam = ops.broadcast_to(ops.asarray(cut, x), x.shape)
        return u(ops, x, p) - u(ops, seam, p) * ops.exp(p.concentration * (ops.cos(seam - p.loc) - ops.cos(x - p.loc)))

    parts = _parts(u if cut is None else {name: partial(without_flux, u_of) for name, u_of in u.items()})
    name = "von_mises()" if cut is None else f"von_mises(cut={cut})"
    return _of_parts(name, families_with(von_mises), lambda p: parts, rides=False)


def _von_mises_concentration(ops: Ops, x: Array, p: Any) -> Array:
    """The integral of (cos t - I_1/I_0) exp(k cos t) from |x - loc| to the antipode, over exp(k cos x), by tanh-sinh quadrature."""
    k = ops.broadcast_to(p.concentration, x.shape)
    angle = (x - p.loc + math.pi) % (2 * math.pi) - math.pi
    z = abs(angle)
    length = math.pi - z
    reach = 80 / (k * abs(ops.sin(z)) + 8 * ops.sqrt(k))  # beyond, the integrand is below 1e-16
    length = ops.where(reach < length, reach, length)
    s = length[..., None] * ops.asarray(ARC_NODES, x)
    z_ = z[..., None]
    fall = ops.exp(-2 * k[..., None] * ops.sin(z_ + s / 2) * ops.sin(s / 2))
    integral = length * ((ops.cos(z_ + s) - (ops.i1e(k) / ops.i0e(k))[..., None]) * fall * ops.asarray(ARC_WEIGHTS, x)).sum(-1)
    return ops.where(angle < 0, -integral, integral)


def _tanh_sinh() -> tuple[list[float], list[float]]:
    """Nodes and weights over (0, 1)."""
    step = 0.11
    t = [step * k for k in range(-28, 29)]
    nodes = [1 / (1 + math.exp(-math.pi * math.sinh(t))) for t in t]
    return nodes, [step * math.pi * math.cosh(t) * v * (1 - v) for v, t in zip(nodes, t, strict=True)]


ARC_NODES, ARC_WEIGHTS = _tanh_sinh()

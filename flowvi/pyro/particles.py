"""The uniform numbers of particles that are drawn together."""

from __future__ import annotations

import torch

from flowvi.particles import Particles


def uniforms(how: Particles, shape: tuple[int, ...], axis: int, like: torch.Tensor) -> torch.Tensor:
    """The numbers of all particles at a site, each within (0, 1).

    Args:
        how: ``"stratified"`` or ``"antithetic"``.
        shape: The shape of x.
        axis: The axis of the particles.
        like: A tensor with the dtype and device of the result.
    """
    num_particles = shape[axis]
    u = torch.rand(shape, dtype=like.dtype, device=like.device)
    if how == "antithetic":
        half = u.narrow(axis, 0, num_particles // 2)
        u = torch.cat([half, 1 - half], axis)
    else:  # in double precision, so that there are no ties
        strata = torch.rand(shape, dtype=torch.float64, device=like.device).argsort(axis)
        u = (strata + u) / num_particles
    margin = torch.finfo(u.dtype).eps / 2
    return u.clamp(margin, 1 - margin)

"""The sampling densities of :mod:`flowvi.proposals` as Pyro distributions."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch.distributions import constraints

import flowvi.ops.torch as ops


class Proposal(dist.TorchDistribution):
    """A density over draws of other distributions and three uniform numbers; see :class:`flowvi.proposals.Density`."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, density: Any, *parts: Any):
        self.density, self.parts = density, parts
        super().__init__(parts[0].batch_shape, parts[0].event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self):
        return self.parts[-1].support

    def expand(self, batch_shape, _instance=None):
        return Proposal(self.density, *(part.expand(batch_shape) for part in self.parts))

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        draws = [part.expand(shape).sample() for part in self.parts]
        uniforms = torch.rand((3, *shape), dtype=draws[0].dtype, device=draws[0].device)
        return self.density.sample(ops, self.parts, draws, uniforms.clamp(min=torch.finfo(uniforms.dtype).tiny))

    def log_prob(self, value):
        return self.density.log_prob(ops, self.parts, value)

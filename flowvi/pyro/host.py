"""Pyro as the core sees it."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch.distributions.kl import kl_divergence

import flowvi.ops.torch
from flowvi.pyro.distributions import WRAPPERS, Estimated, PyroTarget, unwrap
from flowvi.pyro.proposals import Proposal


class PyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "pyro"
    ops = flowvi.ops.torch
    distribution = torch.distributions.Distribution
    target = PyroTarget
    estimated = Estimated
    wrappers = WRAPPERS
    unwrap = staticmethod(unwrap)
    proposal = Proposal
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

    @staticmethod
    def divergence(guide, model):
        try:
            divergence = kl_divergence(guide.fn, model.fn)
        except NotImplementedError:
            return None
        return scale_and_mask(torch.as_tensor(divergence).expand(guide.fn.batch_shape), guide.scale, guide.mask)


HOST = PyroHost()

"""Pyro as the core sees it."""

from __future__ import annotations

import pyro.distributions as dist
import torch

import flowvi.ops.torch
from flowvi.pyro.distributions import PyroTarget
from flowvi.pyro.proposals import Proposal


class PyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "pyro"
    ops = flowvi.ops.torch
    distribution = torch.distributions.Distribution
    target = PyroTarget
    proposal = Proposal
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

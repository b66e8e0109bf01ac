"""NumPyro as the core sees it."""

from __future__ import annotations

import numpyro.distributions as dist

import flowvi.ops.jax
from flowvi.numpyro.distributions import NumPyroTarget
from flowvi.numpyro.proposals import Proposal


class NumPyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "numpyro"
    ops = flowvi.ops.jax
    distribution = dist.Distribution
    target = NumPyroTarget
    proposal = Proposal
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

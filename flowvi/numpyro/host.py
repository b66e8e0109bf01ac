"""NumPyro as the core sees it."""

from __future__ import annotations

import numpyro.distributions as dist
from numpyro.distributions import kl_divergence
from numpyro.distributions.util import scale_and_mask

import flowvi.ops.jax
from flowvi.numpyro.distributions import WRAPPERS, Estimated, NumPyroTarget, unwrap
from flowvi.numpyro.proposals import Proposal


class NumPyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "numpyro"
    ops = flowvi.ops.jax
    distribution = dist.Distribution
    target = NumPyroTarget
    estimated = Estimated
    wrappers = WRAPPERS
    unwrap = staticmethod(unwrap)
    proposal = Proposal
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

    @staticmethod
    def divergence(guide, model):
        try:
            return scale_and_mask(kl_divergence(guide.fn, model.fn), scale=guide.scale)
        except NotImplementedError:
            return None


HOST = NumPyroHost()

r"""Sampling densities by name, for the argument ``q`` of an estimator: ``LR(q=proposals.tempered(2.0))``.

Each is a function q(p) from the site's distribution to a distribution of the same host to sample from; the estimator weighs by
w = p / q. Your own function works as well: ``q=lambda p: dist.Normal(p.loc, 2 * p.scale)``.

The estimate stays unbiased for every q that covers the support of p. Its variance is finite where E_q[(w u . grad phi + w psi phi)^2]
is, as each docstring states in detail. Densities that vanish at the mode are mixed with p by default (*defensive*).
"""

from flowvi.proposals.least_variance import optimal
from flowvi.proposals.proposal import Density, Proposal, defensive
from flowvi.proposals.slices import slice_by_height, slice_by_mass
from flowvi.proposals.wider import student_t, tempered

__all__ = ["Density", "Proposal", "defensive", "optimal", "slice_by_height", "slice_by_mass", "student_t", "tempered"]

r"""Sampling densities by name, for the argument ``q`` of an estimator: ``LR(q=proposals.tempered(2.0))``.

Each is a function q(p) that takes the site's distribution and returns the distribution to sample from, of the same host. The estimator
multiplies by the weight w = p / q. Your own function works as well: ``q=lambda p: dist.Normal(p.loc, 2 * p.scale)``.

The estimate is unbiased for every q that covers the support of p. Its variance is finite if E_q[(w u . grad phi + w psi phi)^2] is;
each docstring has the details. Densities that are 0 at the mode are mixed with p by default (*defensive*).
"""

from flowvi.proposals.least_variance import optimal
from flowvi.proposals.proposal import Density, Proposal, defensive
from flowvi.proposals.slices import slice_by_height, slice_by_mass
from flowvi.proposals.wider import student_t, tempered

__all__ = ["Density", "Proposal", "defensive", "optimal", "slice_by_height", "slice_by_mass", "student_t", "tempered"]

r"""Velocity fields by name, for :class:`flowvi.Flow`: ``Flow(fields.gamma_implicit())``.

A velocity field u says how the samples of p move with its parameters. Most fields here solve the transport equation

    psi = div u + u . grad_x log p + d_theta log p = 0

so the estimator has no score term (it is *pathwise*, the reparameterization gradient). For the others psi is computed from the
divergence. Each docstring names the families of its field, in both hosts and in any parameterisation. A field acts on the parameters
that need a gradient. Fields are written once, with the operations of a backend.
"""

from flowvi.fields.beta import beta_g_rep, beta_implicit, dirichlet, student_t
from flowvi.fields.circular import von_mises
from flowvi.fields.combinators import masked, per_element, scaled, summed
from flowvi.fields.field import Field, Part
from flowvi.fields.gamma import gamma_g_rep, gamma_implicit, gamma_one_moment, inverse_gamma
from flowvi.fields.mixtures import implicit, mixture
from flowvi.fields.multivariate import multivariate_normal, multivariate_normal_transport
from flowvi.fields.scalar import (
    exponential,
    kumaraswamy,
    location_scale,
    log_normal,
    pareto,
    scale,
    truncated_normal,
    uniform,
    weibull,
)

__all__ = [
    "Field",
    "Part",
    "beta_g_rep",
    "beta_implicit",
    "dirichlet",
    "exponential",
    "gamma_g_rep",
    "gamma_implicit",
    "gamma_one_moment",
    "implicit",
    "inverse_gamma",
    "kumaraswamy",
    "location_scale",
    "log_normal",
    "masked",
    "mixture",
    "multivariate_normal",
    "multivariate_normal_transport",
    "pareto",
    "per_element",
    "scale",
    "scaled",
    "student_t",
    "summed",
    "truncated_normal",
    "uniform",
    "von_mises",
    "weibull",
]

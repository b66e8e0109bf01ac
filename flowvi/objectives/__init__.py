"""Objectives: from the records of a run to a loss and a surrogate whose derivative is the estimator."""

from flowvi.objectives.bounds import BoundParticle, bound_of, renyi_bound, shared_plates
from flowvi.objectives.comparison import described
from flowvi.objectives.elbo import Particle, elbo_of, estimate, stack_particles
from flowvi.objectives.options import (
    Gradient,
    LeaveOneOut,
    particle_baseline,
    require_bound_options,
    require_options,
)
from flowvi.objectives.plates import sum_to

__all__ = [
    "BoundParticle",
    "Gradient",
    "LeaveOneOut",
    "Particle",
    "bound_of",
    "described",
    "elbo_of",
    "estimate",
    "particle_baseline",
    "renyi_bound",
    "require_bound_options",
    "require_options",
    "shared_plates",
    "stack_particles",
    "sum_to",
]

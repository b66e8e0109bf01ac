"""Particles that are drawn together, so that the mean over them has less noise.

At an ``RP`` site a particle is a function of uniform numbers, one for each element. The particles' numbers may depend on each other, as
long as each alone has the law that it would have. Every mean over particles then keeps its mean, and so does the gradient.

Scores stay independent: a site with a score is drawn by itself in each particle. Given all jointly drawn numbers, its score has mean 0
whatever the other particles draw, so that the leave-one-out baseline, a function of these, multiplies it without bias.
"""

from __future__ import annotations

from typing import Any, Literal

from flowvi.ops import Array, Ops
from flowvi.target import Target

Particles = Literal["independent", "stratified", "antithetic"]
BY_INVERSE_CDF = frozenset(
    {"Normal", "LogNormal", "Laplace", "Logistic", "Cauchy", "Gumbel", "HalfNormal", "HalfCauchy", "Exponential", "Uniform", "Pareto"}
)
BY_NORMAL_BASE = frozenset({"MultivariateNormal"})


def require_particles(particles: Particles, num_particles: int, vectorized: Any) -> None:
    """Refuse particles that cannot be drawn in this way."""
    if particles not in ("independent", "stratified", "antithetic"):
        raise ValueError(f"particles: expected 'independent', 'stratified' or 'antithetic', found {particles!r}.")
    if particles == "independent":
        return
    if vectorized is not True:
        raise ValueError(
            f"particles={particles!r}: expected vectorize_particles=True, since the particles are drawn at once, found {vectorized!r}."
        )
    if num_particles < 2 or (particles == "antithetic" and num_particles % 2):
        expected = "an even num_particles" if particles == "antithetic" else "at least 2 as num_particles"
        raise ValueError(f"particles={particles!r}: expected {expected}, found {num_particles}.")


def can_be_joint(target: Target) -> bool:
    """Whether the family of a reparameterized site is a function of uniform numbers that both hosts know."""
    return target.family in BY_INVERSE_CDF | BY_NORMAL_BASE


def at_uniforms(ops: Ops, target: Target, u: Array) -> Array:
    """X at uniform numbers of its shape, with the derivative in the parameters at fixed numbers."""
    if target.family in BY_INVERSE_CDF:
        return target.p.icdf(u)
    return target.p.loc + (target.p.scale_tril @ ops.ndtri(u)[..., None])[..., 0]

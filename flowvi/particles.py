"""Particles that are drawn together, so that the mean over them has less noise.

At an ``RP`` site a particle is a function of uniform numbers, one for each element. The numbers of different particles may depend on
each other, as long as each number alone is uniform. Every mean over particles then keeps its expectation, and so does the gradient.

A site with a score is drawn independently in each particle. Given all jointly drawn numbers, its score has mean 0 whatever the other
particles draw. So the score may be multiplied by the leave-one-out baseline, a function of these draws, without bias.

Fixed particles are the same at every step. The loss is then a function of the parameters. Its derivative is the estimate if every
sample is a smooth function of the parameters at fixed random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any, Literal, NoReturn

from flowvi.ops import Array, Ops
from flowvi.refusals import refusal
from flowvi.run import Run
from flowvi.sites import Entropy
from flowvi.target import Target

Particles = Literal["independent", "stratified", "antithetic", "fixed"]
BY_INVERSE_CDF = frozenset(
    {"Normal", "LogNormal", "Laplace", "Logistic", "Cauchy", "Gumbel", "HalfNormal", "HalfCauchy", "Exponential", "Uniform", "Pareto"}
)
BY_NORMAL_BASE = frozenset({"MultivariateNormal"})
SMOOTH = BY_INVERSE_CDF | BY_NORMAL_BASE | {"LowRankMultivariateNormal", "Weibull"}  # their samplers do not reject


def are_together(particles: Particles) -> bool:
    """Whether the particles of a step depend on each other."""
    return particles in ("stratified", "antithetic")


def require_num_particles(num_particles: Any) -> int:
    """The number as an int; anything but a positive integer is refused."""
    try:
        number = index(num_particles)
    except TypeError:
        hint = "; did you mean estimators=...?" if isinstance(num_particles, Mapping) else "."
        raise TypeError(f"num_particles: expected an integer of 1 or more, found {num_particles!r}{hint}") from None
    if number < 1:
        raise ValueError(f"num_particles: expected an integer of 1 or more, found {number}.")
    return number


def require_particles(particles: Particles, num_particles: int, vectorized: Any, entropy: Entropy) -> None:
    """Refuse particles that cannot be drawn in this way."""
    if particles not in ("independent", "stratified", "antithetic", "fixed"):
        raise ValueError(f"particles: expected 'independent', 'stratified', 'antithetic' or 'fixed', found {particles!r}.")
    if particles == "fixed" and entropy == "stl":
        raise ValueError(
            "particles='fixed': expected entropy='full' or 'analytic', found 'stl', under which the gradient is not that of the loss "
            "at fixed draws."
        )
    if not are_together(particles):
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
    """X at given uniform numbers of its shape, with the derivative in the parameters at fixed numbers."""
    if target.family in BY_INVERSE_CDF:
        return target.p.icdf(u)
    return target.p.loc + (target.p.scale_tril @ ops.ndtri(u)[..., None])[..., 0]


def require_fixed(run: Run) -> None:
    """Refuse fixed draws if the gradient is not that of the loss at these draws, or if every step would see the same mini-batch."""
    if run.subsampled:
        raise ValueError(
            f"plate '{next(iter(run.subsampled))}': expected a plate that is not subsampled under particles='fixed', which would draw "
            "the same mini-batch at every step; sum over the whole plate, or pass the data of a batch as arguments."
        )
    for name, site in run.sites.random.items():
        if name in run.draws or not site.estimator.uses_sampler:
            _refuse_fixed(name, f"the gradient of {site.estimator} is right only on average; use RP() here")
        if site.distribution not in SMOOTH:
            known = ", ".join(sorted(SMOOTH))
            _refuse_fixed(name, f"the sampler of {site.distribution} may jump when a parameter changes; use one of {known}")
    for name in run.draws:
        _refuse_fixed(name, "a score is right only on average; use RP() here")


def _refuse_fixed(name: str, message: str) -> NoReturn:
    raise refusal(name, f"particles='fixed' needs the derivative of the loss at fixed draws, but {message}, or choose other particles.")

"""From a tape to the value of an objective and the surrogate whose derivative is the estimator.

The surrogate is the composition rule of several dependent sites, in its form with baselines,

    S = sum_j sg(W_j) f_j + sum_s score_s sg( sum_{j after s} W_j f_j - W_{<=s} b_s ),

with W_j the product of the weights of cost j's ancestors. Plates: a score and a weight meet only costs of their own plate elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from flowvi.ops import Array, Ops
from flowvi.tape import Frame, Site, Tape

Baseline = Literal["loo"] | None


class Credit(NamedTuple):
    """What one site's score is multiplied by; all of one shape, the plates of the site.

    Attributes:
        score: Value 0, tangent psi.
        cost: The weighted costs that depend on the site, detached.
        weight: The weights of the site and its ancestors, multiplied; None where all are 1. It multiplies a baseline.
    """

    score: Array
    cost: Array
    weight: Array | None


class Particle(NamedTuple):
    """One run, reduced: the weighted cost of each statement (a scalar), and the credit of each site that has a score."""

    costs: dict[str, Array]
    credits: dict[str, Credit]


def elbo_particle(ops: Ops, tape: Tape) -> Particle:
    """Reduce one tape: weigh the costs, sum them, and gather for each score those that depend on its site."""
    sites = {site.name: site for site in tape.sites}
    costs: dict[str, Array] = {}
    downstream: dict[str, Array] = {}
    for term in tape.terms:
        cost = term.log_density
        if sites:
            cost = sum_to(cost, term.frames)
            weight = _weight(ops, sites, term.ancestors, term.frames)
            if weight is not None:
                cost = ops.where(weight > 0, weight * cost, ops.stop_gradient(weight))
        for name in term.ancestors & sites.keys():
            if sites[name].draw.score is not None:
                share = sum_to(ops.stop_gradient(cost), term.frames & sites[name].frames)
                downstream[name] = downstream[name] + share if name in downstream else share
        cost = cost.sum()
        costs[term.name] = costs[term.name] + cost if term.name in costs else cost
    return Particle(costs, {name: _credit(ops, sites, sites[name], cost) for name, cost in downstream.items()})


def estimate(particles: Particle, num_particles: int, baseline: Baseline) -> dict[str, Array]:
    """The objective by statement, averaged over particles, with the derivative of the estimator.

    Args:
        particles: With several particles, every array of a credit has them along its first axis; costs may be summed over them.
        num_particles: How many there are.
        baseline: ``"loo"`` subtracts from each cost its mean over the *other* particles.

    Returns:
        One scalar for each statement; their sum has the value of the objective and the derivative of the estimator.
    """
    terms = {name: cost.sum() / num_particles if num_particles > 1 else cost for name, cost in particles.costs.items()}
    for name, (score, cost, weight) in particles.credits.items():
        if baseline == "loo" and num_particles > 1 and cost.shape[0] > 1:
            others = (cost.sum(axis=0, keepdims=True) - cost) / (cost.shape[0] - 1)
            cost = cost - (others if weight is None else weight * others)
        terms[name] = terms[name] + (score * cost).sum() / num_particles
    return terms


def sum_to(x: Array, frames: Iterable[Frame]) -> Array:
    """Sum over every batch dim that is not the dim of one of ``frames``, and drop leading dims of size 1."""
    kept = {frame.dim for frame in frames}
    axes = tuple(dim for dim in range(-x.ndim, 0) if dim not in kept and x.shape[dim] != 1)
    if axes:
        x = x.sum(axis=axes, keepdims=True)
    ones = next((i for i, size in enumerate(x.shape) if size != 1), x.ndim)
    return x.reshape(x.shape[ones:]) if ones else x


def _weight(ops: Ops, sites: dict[str, Site], ancestors: frozenset[str], frames: frozenset[Frame]) -> Array | None:
    """The product of the ancestors' weights over ``frames``: elementwise in shared plates, joint over the others."""
    log_weight = None
    for name in sorted(ancestors & sites.keys()):
        site = sites[name]
        if site.draw.log_weight is not None:
            log_w = sum_to(site.draw.log_weight, site.frames & frames)
            log_weight = log_w if log_weight is None else log_weight + log_w
    return None if log_weight is None else ops.exp(log_weight)


def _credit(ops: Ops, sites: dict[str, Site], site: Site, cost: Array) -> Credit:
    score = sum_to(site.draw.score, site.frames)
    weight = _weight(ops, sites, site.ancestors, site.frames)
    shape = ops.broadcast_shapes(score.shape, cost.shape, *(() if weight is None else (weight.shape,)))
    return Credit(*(None if a is None else ops.broadcast_to(a, shape) for a in (score, cost, weight)))


def require_options(baseline: Baseline, dependencies: str) -> None:
    """Refuse options of an objective that do not exist."""
    if baseline not in ("loo", None):
        raise ValueError(f"baseline: expected 'loo' or None, found {baseline!r}.")
    if dependencies != "plates":
        raise ValueError(f"dependencies: expected 'plates', found {dependencies!r}; other ways to find dependencies are not there yet.")

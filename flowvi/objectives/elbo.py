"""The ELBO: from a tape to its value and the surrogate whose derivative is the estimator.

The surrogate is the composition rule for several dependent sites, with baselines,

    S = sum_j sg(W_j) f_j + tether( sum_s score_s sg( sum_{j after s} W_j f_j - W_{<=s} b_s ) ),

with W_j the product of the weights of cost j's ancestors and b_s a baseline. In plates, a score and a weight multiply costs
element by element in the plates of the :class:`~flowvi.dependence.Ancestor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

from flowvi.baselines import MakeScores, ParticleMean, Score, SiteCosts, make_score
from flowvi.dependence import Ancestor, Frame
from flowvi.host import Host
from flowvi.objectives.comparison import choose, compared
from flowvi.objectives.plates import sum_to
from flowvi.objectives.weights import weigh, weight_of
from flowvi.ops import Array, Ops, total
from flowvi.run import Run, Statement
from flowvi.tape import Rule, Site, Tape, control_terms, record, scored_draws

REASON = "its estimators or its entropy"  # the reason why there is no second derivative


class Particle(NamedTuple):
    """One run, reduced to arrays.

    Attributes:
        costs: The sum of its weighted costs, a scalar; or such a sum for each statement, by name.
        scores: For each site with a score, its records: one, or one for each array of parameters.
    """

    costs: Array | dict[str, Array] | None
    scores: dict[str, tuple[Score, ...]]


def elbo_of(
    host: Host, run: Run, dependencies: Rule, *, by_statement: bool = False, baselines: Mapping[str, MakeScores] | None = None
) -> Particle:
    """Reduce a run to its weighted costs and its scores.

    Args:
        host: The host library.
        run: The run.
        dependencies: How to find which costs depend on which site.
        by_statement: Whether to keep the costs of different statements separate.
        baselines: Baselines that the program annotates, by site; the baseline of an estimator takes precedence.
    """
    ops = host.ops
    if scored_draws(run.draws):
        tape = _without_own_densities(ops, choose(record(run, dependencies), run))
        particle = _of_tape(ops, tape, by_statement, baselines)
        if (contribution := compared(host, run, tape, dependencies)) is not None:
            particle = particle._replace(costs=_plus(particle.costs, contribution))
    else:
        particle = Particle(_unweighted(run, by_statement), {})
    if run.is_pathwise or particle.costs is None:
        return particle
    if isinstance(particle.costs, dict):
        return particle._replace(costs={name: ops.first_order(cost, REASON) for name, cost in particle.costs.items()})
    return particle if particle.scores else particle._replace(costs=ops.first_order(particle.costs, REASON))  # else in `estimate`


def _without_own_densities(ops: Ops, tape: Tape) -> Tape:
    """The tape with detached log densities of the guide at sites whose alternatives are the whole derivative of their law."""
    names = {site.name for site in tape.sites if site.draw.comparison is not None and site.draw.comparison.is_whole}
    if not names:
        return tape
    own = (term.sign < 0 and term.name in names for term in tape.terms)
    terms = [
        term._replace(log_density=ops.stop_gradient(term.log_density)) if detached else term
        for term, detached in zip(tape.terms, own, strict=True)
    ]
    return tape._replace(terms=terms)


def _plus(costs: Any, contribution: Array) -> Any:
    """Add a contribution of value 0 to the costs; in a dict by statement, to the first."""
    if not isinstance(costs, dict):
        return costs + contribution
    first = next(iter(costs))
    return costs | {first: costs[first] + contribution}


def _unweighted(run: Run, by_statement: bool) -> Array | dict[str, Array] | None:
    """The costs of a run in which no site has a score or a weight, and so dependence does not matter."""
    costs = _sums(run.model)
    for name, of_guide in _sums(run.guide).items():
        costs[name] = costs[name] - of_guide if name in costs else -of_guide
    for term in control_terms(run.draws):
        costs[term.name] = costs[term.name] + term.cost.sum() if term.name in costs else term.cost.sum()
    return costs if by_statement else total(list(costs.values())) if costs else None


def _sums(statements: Mapping[str, Statement]) -> dict[str, Array]:
    return {s.name: s.log_density.sum() if s.total is None else s.total for s in statements.values() if s.log_density is not None}


def _of_tape(ops: Ops, tape: Tape, by_statement: bool, baselines: Mapping[str, MakeScores] | None) -> Particle:
    """Weight and sum the costs, and collect for each score the costs that depend on its site."""
    weights = {site.name: site.draw.log_weight for site in tape.sites if site.draw.log_weight is not None}
    groups: dict[tuple, Array] = {}  # costs with the same ancestors, in the same plates, are one cost
    for term in tape.terms:
        log_density = sum_to(term.log_density, term.frames)
        key = (term.name if by_statement else None, term.frames, term.ancestors, log_density.shape)
        if key not in groups:
            groups[key] = log_density if term.sign > 0 else -log_density
        else:
            groups[key] = groups[key] + log_density if term.sign > 0 else groups[key] - log_density
    sums: dict[Any, Array] = {}
    costs: list[_Cost] = []
    for (name, _, ancestors, _), cost in groups.items():
        cost = weigh(ops, weights, ancestors, cost)
        if ancestors:
            costs.append(_Cost(ops.stop_gradient(cost), ancestors))
        cost = cost.sum() if cost.ndim else cost
        sums[name] = sums[name] + cost if name in sums else cost
    scores: dict[str, tuple[Score, ...]] = {}
    for site, cost in _downstream([site for site in tape.sites if site.draw.score is not None], costs):
        score, weight = sum_to(site.draw.score, site.frames), weight_of(ops, weights, site.ancestors)
        if make_scores := site.draw.baseline or (baselines and baselines.get(site.name)):
            num_elements = math.prod(frame.size for frame in site.frames)
            of_site = make_scores(ops, SiteCosts(site.name, score, cost, weight, num_elements, partial(_own_costs, site, costs)))
        else:
            of_site = (make_score(ops, site.name, score, cost, weight),)
        scores[site.name] = of_site
    return Particle(sums if by_statement else sums[None], scores)


class _Cost(NamedTuple):
    """A detached cost, and the sites on which it depends."""

    value: Array
    ancestors: frozenset[Ancestor]


def _own_costs(site: Site, costs: list[_Cost]) -> Array:
    """For each element of the site's plates, the costs that depend only on this element."""
    own = [sum_to(cost.value, site.frames) for cost in costs if Ancestor(site.name, site.frames) in cost.ancestors]
    return total(own) if own else 0.0 * sum_to(site.draw.score, site.frames)


# ---- the costs that depend on a site


def _downstream(scored: list[Site], costs: list[_Cost]) -> Iterator[tuple[Site, Array]]:
    """For each site with a score, the sum of the costs that depend on it, over its own plates.

    Along a chain, the costs of a site are the costs of the next site and a few others, so each sum starts from another sum.
    """
    sums: list[Array] = []
    sites, ancestors = tuple((site.name, site.frames) for site in scored), tuple(cost.ancestors for cost in costs)
    for index, start, added in _plan(sites, ancestors):
        summands = [sum_to(costs[i].value, frames) for i, frames in added]
        sums.append(total(summands if start is None else [sums[start], *summands]))
        yield scored[index], sums[-1]


class _Sum(NamedTuple):
    """How to sum the costs that depend on a site.

    Attributes:
        site: Its index.
        start: The index of the sum from which to start; None for 0.
        added: What to add: costs by index, each with the plates in which it depends on the site element by element.
    """

    site: int
    start: int | None
    added: tuple[tuple[int, frozenset[Frame]], ...]


@lru_cache(maxsize=64)  # the same at every step of most programs
def _plan(scored: tuple[tuple[str, frozenset[Frame]], ...], ancestors: tuple[frozenset[Ancestor], ...]) -> tuple[_Sum, ...]:
    """The sums for all sites, in the order in which they are made."""
    dependents = _dependents(ancestors)
    indices = [i for i, (name, _) in enumerate(scored) if name in dependents]
    last: dict[frozenset[Frame], tuple[int, frozenset[tuple[int, frozenset[Frame]]]]] = {}
    sums: list[_Sum] = []
    for index in sorted(indices, key=lambda i: len(dependents[scored[i][0]])):
        name, frames = scored[index]
        start, summed = last.get(frames, (None, frozenset()))
        if not summed <= dependents[name]:
            start, summed = None, frozenset()
        last[frames] = len(sums), dependents[name]
        sums.append(_Sum(index, start, tuple(sorted(dependents[name] - summed, key=itemgetter(0)))))
    return tuple(sums)


def _dependents(ancestors: tuple[frozenset[Ancestor], ...]) -> dict[str, frozenset[tuple[int, frozenset[Frame]]]]:
    """For each site, the costs of which it is an ancestor, by index, each with the plates of the :class:`Ancestor`."""
    found: dict[str, set[tuple[int, frozenset[Frame]]]] = {}
    for i, sites in enumerate(ancestors):
        costs = {frames: (i, frames) for _, frames in sites}  # one object for all sites: comparing sets of these is then fast
        for name, frames in sites:
            found.setdefault(name, set()).add(costs[frames])
    return {name: frozenset(costs) for name, costs in found.items()}


# ---- all particles


def stack_particles(ops: Ops, particles: list[Particle]) -> Particle:
    """Particles of a loop, stacked along a new first axis. A site is stacked over the particles that ran it. Costs are summed."""
    names = dict.fromkeys(name for particle in particles for name in particle.scores)
    scores = {
        name: tuple(_stacked(ops, same) for same in zip(*(p.scores[name] for p in particles if name in p.scores), strict=True))
        for name in names
    }
    return Particle(total([particle.costs for particle in particles]), scores)


def _stacked(ops: Ops, records: tuple) -> Any:
    """Arrays, or nested records of arrays, stacked along a new first axis."""
    first = records[0]
    if isinstance(first, tuple):
        return type(first)(*(_stacked(ops, field) for field in zip(*records, strict=True)))
    return None if first is None else ops.stack(list(records), 0)


def estimate(ops: Ops, particles: Particle, num_particles: int, baseline: ParticleMean | None) -> Any:
    """The objective, averaged over particles, with the derivatives of the estimator and of the baselines' squared errors.

    Args:
        ops: The operations of the backend.
        particles: With several particles, they are the first axis of every array of a score; costs may be summed over them.
        num_particles: The number of particles.
        baseline: The baseline of scores that have none of their own.

    Returns:
        A scalar. If the costs are given by statement: scalars by statement, whose sum has the value of the objective and the derivative
        of the estimator.
    """
    default = baseline if num_particles > 1 else None
    costs, scores = particles
    terms = {name: [_term(ops, name, score, num_particles, default) for score in of_site] for name, of_site in scores.items()}
    if not isinstance(costs, dict):
        return _average(ops, costs, [term for of_site in terms.values() for term in of_site], num_particles)
    return {name: _average(ops, costs.get(name), terms.get(name, []), num_particles) for name in {**costs, **terms}}


def _term(ops: Ops, name: str, score: Score, num_particles: int, default: ParticleMean | None) -> Array:
    """A scalar whose tangent is the score times its costs minus the baseline; its value has no meaning."""
    baseline = default if score.baseline is None else score.baseline
    term = score.score * score.cost if baseline is None else baseline.term(ops, name, score, num_particles)
    return term.sum() if term.ndim else term


def _average(ops: Ops, cost: Array | None, score_terms: list[Array], num_particles: int) -> Array:
    parts = [] if cost is None else [cost.sum() if cost.ndim else cost]
    if score_terms:
        parts.append(ops.tangent_of(total(score_terms)))
    if not parts:  # a program without a statement
        return 0.0
    average = total(parts) / num_particles if num_particles > 1 else total(parts)
    return ops.first_order(average, REASON) if score_terms else average

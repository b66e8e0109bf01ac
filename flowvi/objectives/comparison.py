"""The terms of sites with alternatives in an ELBO: runs of the program with one site changed, and the differences of the costs.

All elements of a plate change in one run if every later site and cost that depends on the site does so element by element. Otherwise
each element needs its own run, a *lane*. Sites that share no cost share their runs.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import NamedTuple

from flowvi.alternatives import Comparison
from flowvi.assignment import Description
from flowvi.dependence import Ancestor, Frame
from flowvi.entropy import use_closed_forms
from flowvi.estimators import Enumerate
from flowvi.host import Host
from flowvi.objectives.plates import sum_to
from flowvi.objectives.weights import weigh
from flowvi.ops import Array, Ops, total
from flowvi.refusals import refusal
from flowvi.run import Replacement, Run
from flowvi.tape import Ancestors, Rule, Site, Tape, Term, costs, record

FLOOR = 0.01  # the weight of the uniform distribution in the mixture from which a lane is drawn
MAX_RUNS = 2  # the most runs per particle that replace scores, for all sites together


class SitePlan(NamedTuple):
    """The runs that one site takes.

    Attributes:
        name: The site's name.
        comparison: How it compares.
        frames: The plates whose elements change in one run.
        downstream: The sites of the guide whose values depend on it, including itself.
        costs: The costs that depend on it, by the sign and the name of the statement.
        num_lanes: The number of elements that cannot share a run.
        first: The number of its first run.
        num_runs: The number of its runs.
    """

    name: str
    comparison: Comparison
    frames: frozenset[Frame]
    downstream: frozenset[str]
    costs: frozenset[tuple[int, str]]
    num_lanes: int
    first: int
    num_runs: int


def plan(tape: Tape, branches: bool) -> list[SitePlan]:
    """The runs of all sites with alternatives.

    Sites that share no cost share their runs, unless the program ``branches``: then other values may lead to other costs.
    """
    plans = [_plan(tape, site, site.draw.comparison) for site in tape.sites if site.draw.comparison is not None]
    return _placed([one for one in plans if one.costs or branches], share=not branches)


def choose(tape: Tape, run: Run) -> Tape:
    """The tape with a comparison instead of a score at sites that offer both, if few runs are enough.

    The sites are taken in program order, as long as they all take no more than ``MAX_RUNS`` runs together. If the program may branch on
    draws, the choice would depend on the draws and cause a bias, so all sites keep their scores.
    """
    chosen: dict[str, Comparison] = {}
    plans: list[SitePlan] = []
    if run.program.branches or run.many_samples:
        return tape
    for site in tape.sites:
        if site.draw.instead is not None and (comparison := site.draw.instead()) is not None:
            one = _plan(tape, site, comparison)
            if one.costs and _num_runs(_placed([*plans, one], share=True)) <= MAX_RUNS:
                plans.append(one)
                chosen[site.name] = comparison
    if not chosen:
        return tape
    sites = [
        site._replace(draw=site.draw._replace(score=None, baseline=None, comparison=chosen[site.name])) if site.name in chosen else site
        for site in tape.sites
    ]
    return tape._replace(sites=sites)


def _plan(tape: Tape, site: Site, comparison: Comparison) -> SitePlan:
    """The runs that one site takes, by itself."""
    depending, parallel = set(), site.frames
    for term in tape.terms:
        for ancestor in term.ancestors:
            if ancestor.name == site.name:
                depending.add((term.sign, term.name))
                parallel &= ancestor.frames
    downstream = frozenset(name for name, ancestors in tape.draws.items() if site.name in ancestors)
    lanes = math.prod(_lane_sizes(comparison, parallel))
    num_runs = comparison.num_values if comparison.joint else 1 if comparison.lanes == "random" else lanes * comparison.num_values
    return SitePlan(site.name, comparison, parallel, downstream, frozenset(depending), lanes, first=0, num_runs=num_runs)


def _placed(plans: list[SitePlan], share: bool) -> list[SitePlan]:
    """The plans with their first runs. A site joins the first group in which no site shares a cost with it, or starts a new one."""
    groups: list[tuple[set[tuple[int, str]], list[SitePlan]]] = []
    for one in plans:
        for taken, members in groups:  # noqa: B007
            if share and not taken & one.costs:
                break
        else:
            taken, members = set(), []
            groups.append((taken, members))
        taken |= one.costs
        members.append(one)
    placed, first = [], 0
    for _, members in groups:
        placed += [member._replace(first=first) for member in members]
        first += max(member.num_runs for member in members)
    return placed


def described(run: Run, dependencies: Rule) -> Description:
    """The random sites with their estimators, and how often a step runs guide and model for each particle.

    A step runs them once, and once more for each value of a site that needs its own run.
    """
    sites = run.sites.random
    if run.sites.entropy == "analytic":
        sites = {name: site._replace(closed_form=name in run.closed_forms) for name, site in sites.items()}
    if not any(draw.comparison is not None or draw.instead is not None for draw in run.draws.values()):
        return Description(sites.values(), marginalised=run.marginalised)
    tape = choose(record(run, dependencies), run)
    chosen = {s.name for s in tape.sites if s.draw.instead is not None and s.draw.comparison is not None}
    sites = {name: site._replace(estimator=Enumerate()) if name in chosen else site for name, site in sites.items()}
    return Description(sites.values(), 1 + _num_runs(plan(tape, run.program.branches)), run.marginalised)


def _num_runs(plans: list[SitePlan]) -> int:
    return max((one.first + one.num_runs for one in plans), default=0)


def _lane_axes(comparison: Comparison, frames: frozenset[Frame]) -> list[int]:
    """The batch axes of x whose elements cannot share a run."""
    batch = len(comparison.x.shape) - comparison.event_ndim
    parallel = {comparison.batch_ndim + frame.dim for frame in frames}
    return [axis for axis in range(batch) if axis not in parallel and comparison.x.shape[axis] > 1]


def _lane_sizes(comparison: Comparison, frames: frozenset[Frame]) -> list[int]:
    return [comparison.x.shape[axis] for axis in _lane_axes(comparison, frames)]


def compared(host: Host, run: Run, tape: Tape, dependencies: Rule) -> Array | None:
    """A scalar of value 0 whose tangent is the gradient of the sites with alternatives; None if there are none."""
    if not run.program.takes_gradients or not (plans := plan(tape, run.program.branches)):
        return None
    ops, num_runs = host.ops, _num_runs(plans)
    replacements, weights = {}, {}
    for one in plans:
        values, weights[one.name] = _runs(ops, run, one)
        replacements[one.name] = Replacement(values, one.first, num_runs, one.downstream)
    of_model: dict[str, frozenset[Ancestor]] = {}
    of_guide: dict[str, frozenset[Ancestor]] = {}
    for term in tape.terms:  # a control variate has no ancestors; it comes after the statement of the same name
        (of_model if term.sign > 0 else of_guide).setdefault(term.name, term.ancestors)

    def sums(of: Run) -> dict[str, Array]:
        """For each site, the weighted costs of a run that depend on it."""
        if run.closed_forms and of is not run:
            of = use_closed_forms(host, of)
        terms = [_stored(ops, replacements, term) for term in _terms(of, of_model, of_guide, dependencies)]
        log_weights = {name: draw.log_weight for name, draw in of.draws.items() if draw.log_weight is not None}
        return {one.name: ops.stop_gradient(_dependent(ops, one, terms, log_weights, weights[one.name])) for one in plans}

    first, others = sums(run), run.program.variants(run, replacements, num_runs, sums)
    contributions = []
    for one in plans:
        difference = others[one.name][one.first : one.first + one.num_runs] - first[one.name][None]
        weight = weights[one.name]
        shape = (one.num_runs, *(1,) * (weight.ndim - difference.ndim), *difference.shape[1:])
        difference = difference.reshape(shape)
        impossible = (ops.stop_gradient(weight) == 0) & (difference - difference != 0)  # p log p is 0 at p = 0
        contributions.append((weight * ops.stop_gradient(ops.where(impossible, 0 * weight, difference))).sum())
    return ops.tangent_of(total(contributions))


def _terms(of: Run, of_model: Ancestors, of_guide: Ancestors, dependencies: Rule) -> list[Term]:
    """The costs of a run with their ancestors, which are those of the first run unless the program has taken another branch."""
    for program, ancestors in ((of.model, of_model), (of.guide, of_guide)):
        if any(s.log_density is not None and name not in ancestors for name, s in program.items()):
            return record(of, dependencies).terms
    return costs(of, of_model, of_guide)


def _stored(ops: Ops, names: Container[str], term: Term) -> Term:
    """The cost, detached; a cost that depends on several sites is computed once."""
    fixed = ops.stop_gradient(term.log_density)
    several = sum(ancestor.name in names for ancestor in term.ancestors) > 1
    return term._replace(log_density=ops.computed_once(fixed) if several else fixed)


def _dependent(ops: Ops, site: SitePlan, terms: list[Term], log_weights: dict[str, Array], like: Array) -> Array:
    """The weighted costs that depend on a site, over the plates whose elements change in one run."""
    found = []
    for term in terms:
        for ancestor in term.ancestors:
            if ancestor.name == site.name:
                if not site.frames <= ancestor.frames:
                    _refuse_joint_branch(site, term)
                cost = weigh(ops, log_weights, term.ancestors, sum_to(1.0 * term.cost, term.frames))  # a factor may be a boolean
                found.append(sum_to(cost, site.frames))
    sizes = {frame.dim: frame.size for frame in site.frames}
    shape = tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))
    return ops.broadcast_to(total(found) if found else ops.asarray(0.0, like), shape)


def _refuse_joint_branch(site: SitePlan, term: Term):
    raise refusal(
        site.name,
        f"its elements change in one run, but in this run the program takes another branch, whose cost "
        f"'{term.name}' depends on all of them; use torch.where instead of if, or use LR().",
    )


def _runs(ops: Ops, run: Run, site: SitePlan) -> tuple[Array, Array]:
    """The values of a site in each of its runs, and the weight of each, over the plates whose elements change in one run."""
    comparison, x = site.comparison, site.comparison.x
    batch = len(x.shape) - comparison.event_ndim
    extra = 1 if comparison.lanes == "random" else 0
    count = comparison.num_uniforms + extra
    uniforms = run.program.uniforms(run, site.name, (count, *x.shape)) if count else x[None]
    values, weights = comparison.make(uniforms[extra:])
    m = values.shape[0]
    if comparison.joint:
        return values, _over(weights, 1, comparison, site.frames)
    axes = _lane_axes(comparison, site.frames)
    unit = ops.eye(site.num_lanes, x)  # a row for each lane
    lane = unit.reshape((site.num_lanes, *(x.shape[axis] if axis in axes else 1 for axis in range(batch))))
    of_values = lane.reshape((1, *lane.shape, *(1,) * comparison.event_ndim))
    changed = ops.where(of_values, values[:, None], x[None, None]).reshape((m * site.num_lanes, *x.shape))
    zero = 0 * weights[:, None]
    weight = ops.where(lane[None], weights[:, None], zero)
    weight = _over(weight.reshape((m * site.num_lanes, *weight.shape[2:])), 1, comparison, site.frames)
    return (changed, weight) if comparison.lanes == "all" else _one_of(ops, comparison, changed, weight, uniforms[0])


def _over(weight: Array, lead: int, comparison: Comparison, frames: frozenset[Frame]) -> Array:
    """Weights over the batch of the site, from weights over the batch of x: summed over all but the plates that change in one run."""
    parallel = {comparison.batch_ndim + frame.dim for frame in frames}
    axes = tuple(lead + axis for axis in range(comparison.batch_ndim) if axis not in parallel and weight.shape[lead + axis] > 1)
    if axes:
        weight = weight.sum(axis=axes, keepdims=True)
    own = tuple(range(lead + comparison.batch_ndim, weight.ndim))
    return weight.sum(axis=own) if own else weight


def _one_of(ops: Ops, comparison: Comparison, changed: Array, weight: Array, uniform: Array) -> tuple[Array, Array]:
    """One of the runs for each element of the plates, drawn with a probability in proportion to its weight, with its new weight."""
    size = abs(ops.stop_gradient(weight))
    whole = size.sum(0, keepdims=True)
    share = ops.where(whole > 0, size / ops.where(whole > 0, whole, 0 * whole + 1), 0 * size + 1 / size.shape[0])
    share = (1 - FLOOR) * share + FLOOR / size.shape[0]  # a weight of value 0 may have a derivative
    below = share.cumsum(0)
    one = uniform.reshape((*uniform.shape[: comparison.batch_ndim], -1))[..., 0]
    one = one[tuple(slice(None) if n > 1 else slice(0, 1) for n in share.shape[1:])]
    number = (0 * share + 1).cumsum(0) - 1
    passed = ops.where(one[None] >= below[:-1], number[:-1] * 0 + 1, number[:-1] * 0)
    chosen = number == passed.sum(0, keepdims=True)  # exactly one, in spite of rounding
    weight = ops.where(chosen, weight / ops.where(chosen, share, 0 * share + 1), 0 * weight).sum(0)
    over_x = chosen.reshape((*chosen.shape, *(1,) * (changed.ndim - chosen.ndim)))
    return ops.where(over_x, changed, 0 * changed).sum(0)[None], weight[None]

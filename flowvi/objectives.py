"""From a tape to the value of an objective and the surrogate whose derivative is the estimator.

The surrogate is the composition rule of several dependent sites, in its form with baselines,

    S = sum_j sg(W_j) f_j + tether( sum_s score_s sg( sum_{j after s} W_j f_j - W_{<=s} b_s ) ),

with W_j the product of the weights of cost j's ancestors and b_s a baseline. In plates, a score and a weight meet costs
element by element as far as :class:`~flowvi.tape.Ancestor` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from flowvi.dependence import Ancestor, Frame
from flowvi.ops import Array, Ops, total
from flowvi.shapes import broadcasts

LeaveOneOut = Literal["loo"] | None


class Credit(NamedTuple):
    """What one site's score is multiplied by; all of one shape, the plates of the site.

    Attributes:
        score: Its tangent is psi; its value has no meaning.
        cost: The weighted costs that depend on the site, detached.
        weight: The weights of the site and its ancestors, multiplied; None where all are 1. It multiplies a baseline.
        baseline: The site's own baseline, live; None where it is left to the objective.
        square: psi^2, where the baseline is to be the best for this psi; the shape may then have more dims on the right.
    """

    score: Array
    cost: Array
    weight: Array | None
    baseline: Array | None
    square: Array | None = None


class Particle(NamedTuple):
    """One run, reduced: its weighted costs (scalars, by statement or under ``ALL``), and the credits of sites with a score, by name."""

    costs: dict[str, Array]
    credits: dict[str, Credit]


ALL = "all statements"


def elbo_particle(ops: Ops, tape: Any, by_statement: bool = False) -> Particle:
    """Reduce one tape: weigh the costs, sum them, and gather for each score those that depend on its site.

    Args:
        ops: The operations of the backend.
        tape: A run in which some site has a score or a weight.
        by_statement: Whether to keep the costs of each statement apart.
    """
    weights = {site.name: site.draw.log_weight for site in tape.sites if site.draw.log_weight is not None}
    groups: dict[tuple, Array] = {}  # costs that the same sites lead to, in the same plates, are one cost
    for term in tape.terms:
        log_density = sum_to(term.log_density, term.frames)
        key = (term.name if by_statement else ALL, term.frames, term.ancestors, log_density.shape)
        if key not in groups:
            groups[key] = log_density if term.sign > 0 else -log_density
        else:
            groups[key] = groups[key] + log_density if term.sign > 0 else groups[key] - log_density
    costs: dict[str, Array] = {}
    shares: list[_Share] = []
    for (name, _, ancestors, _), cost in groups.items():
        weight = _weight(ops, weights, ancestors)
        if weight is not None:
            cost = ops.where(weight > 0, weight * cost, weight)
        if ancestors:
            shares.append(_Share(ops.stop_gradient(cost), ancestors))
        cost = cost.sum() if cost.ndim else cost
        costs[name] = costs[name] + cost if name in costs else cost
    scored = [site for site in tape.sites if site.draw.score is not None]
    credits: dict[str, Credit] = {}
    for site, cost in _downstream(scored, shares):
        if site.draw.baseline == "optimal":
            credits |= _credits_by_parameter(ops, weights, site, cost)
        else:
            credits[site.name] = _credit(ops, weights, site, cost, shares)
    return Particle(costs, credits)


class _Share(NamedTuple):
    """A detached cost, and the sites that lead to it."""

    cost: Array
    ancestors: frozenset[Ancestor]


def _downstream(scored: list[Any], shares: list[_Share]) -> Iterator[tuple[Any, Array]]:
    """For each site with a score, the sum of the costs to which it leads, over its own plates.

    Along a chain each site leads to the costs of the next one and a few more, so that sums are begun where the last one ended.
    """
    sums: list[Array] = []
    sites, ancestors = tuple((site.name, site.frames) for site in scored), tuple(share.ancestors for share in shares)
    for index, begin, more in _plan(sites, ancestors):
        summands = [sum_to(shares[i].cost, frames) for i, frames in more]
        sums.append(total(summands if begin is None else [sums[begin], *summands]))
        yield scored[index], sums[-1]


class _Sum(NamedTuple):
    """How the sum of the costs to which a site leads is made.

    Attributes:
        site: Its index.
        begin: The index of the sum with which it begins; None for 0.
        more: What is added: shares by index, each with the plates in which it meets the site element by element.
    """

    site: int
    begin: int | None
    more: tuple[tuple[int, frozenset[Frame]], ...]


@lru_cache(maxsize=64)  # the same at every step of most programs
def _plan(scored: tuple[tuple[str, frozenset[Frame]], ...], ancestors: tuple[frozenset[Ancestor], ...]) -> tuple[_Sum, ...]:
    """The sums for all sites, in the order in which they are made."""
    led_to = _led_to(ancestors)
    indices = [i for i, (name, _) in enumerate(scored) if name in led_to]
    last: dict[frozenset[Frame], tuple[int, frozenset[tuple[int, frozenset[Frame]]]]] = {}
    sums: list[_Sum] = []
    for index in sorted(indices, key=lambda i: len(led_to[scored[i][0]])):
        name, frames = scored[index]
        begin, summed = last.get(frames, (None, frozenset()))
        if not summed <= led_to[name]:
            begin, summed = None, frozenset()
        last[frames] = len(sums), led_to[name]
        sums.append(_Sum(index, begin, tuple(sorted(led_to[name] - summed, key=itemgetter(0)))))
    return tuple(sums)


def _led_to(ancestors: tuple[frozenset[Ancestor], ...]) -> dict[str, frozenset[tuple[int, frozenset[Frame]]]]:
    """For each site, the shares of which it is an ancestor, by index, each with the plates in which they meet element by element."""
    found: dict[str, set[tuple[int, frozenset[Frame]]]] = {}
    for i, sites in enumerate(ancestors):
        met = {frames: (i, frames) for _, frames in sites}  # one object for all sites, as sets of these are compared
        for name, frames in sites:
            found.setdefault(name, set()).add(met[frames])
    return {name: frozenset(shares) for name, shares in found.items()}


def estimate(ops: Ops, particles: Particle, num_particles: int, baseline: LeaveOneOut) -> dict[str, Array]:
    """The objective, averaged over particles, with the derivative of the estimator and that of the baselines' squared errors.

    Args:
        ops: The operations of the backend.
        particles: With several particles, every array of a credit has them along its first axis; costs may be summed over them.
        num_particles: How many there are.
        baseline: ``"loo"`` subtracts from each cost its mean over the *other* particles, at sites without a baseline of their own.

    Returns:
        Scalars, by statement or under ``ALL``; their sum has the value of the objective and the derivative of the estimator.
    """
    terms = {name: cost.sum() if cost.ndim else cost for name, cost in particles.costs.items()}
    scores: dict[str, list[Array]] = {}
    for name, credit in particles.credits.items():
        key = name if name in terms else next(iter(terms))
        scores.setdefault(key, []).append(_score_term(ops, name, credit, num_particles, baseline))
    for key, of_statement in scores.items():
        terms[key] = terms[key] + ops.tether(total(of_statement))
    return {name: term / num_particles for name, term in terms.items()} if num_particles > 1 else terms


def _score_term(ops: Ops, name: str, credit: Credit, num_particles: int, baseline: LeaveOneOut) -> Array:
    """A scalar whose tangent is the score times its costs, less the baseline; its value has no meaning."""
    score, cost, weight, own, square = credit
    if square is not None:
        if num_particles == 1:
            raise ValueError(f"site '{name}': baseline='optimal' needs several particles, found 1; use 'plate', a Baseline or None.")
        best = _best_of_others(ops, square, cost, weight)
        return (score * (cost - (best if weight is None else weight * best))).sum()
    if own is not None:
        fitted = own if weight is None else weight * own
        return (score * (cost - ops.stop_gradient(fitted)) - 0.5 * (fitted - cost) ** 2).sum()
    if baseline == "loo" and num_particles > 1 and cost.shape[0] > 1:
        others = (cost.sum(axis=0, keepdims=True) - cost) / (cost.shape[0] - 1)
        cost = cost - (others if weight is None else weight * others)
    term = score * cost
    return term.sum() if term.ndim else term


def _best_of_others(ops: Ops, square: Array, cost: Array, weight: Array | None) -> Array:
    """For each particle, the b of least mean psi^2 (cost - weight b)^2 over the other particles."""
    num_particles = cost.shape[0]
    weighted = square if weight is None else square * weight
    norm = (weighted if weight is None else weighted * weight).reshape((num_particles, -1))
    others = ops.where(ops.eye(num_particles, norm), 0 * norm[:, :1], 0 * norm[:, :1] + 1)
    norm, product = others @ norm, others @ (weighted * cost).reshape((num_particles, -1))
    return ops.where(norm > 0, product / ops.where(norm > 0, norm, 0 * norm + 1), 0 * norm).reshape(cost.shape)


def sum_to(x: Array, frames: Iterable[Frame]) -> Array:
    """Sum over every batch dim that is not the dim of one of ``frames``, and drop leading dims of size 1."""
    axes, shape = _summed(x.shape, frozenset(frames))
    if axes:
        x = x.sum(axis=axes, keepdims=True) if shape else x.sum()
    return x if x.shape == shape else x.reshape(shape)


@lru_cache(maxsize=256)  # the same at every step of most programs
def _summed(shape: tuple[int, ...], frames: frozenset[Frame]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes over which an array of ``shape`` is summed, and the shape that is left."""
    kept = {frame.dim for frame in frames}
    axes = tuple(dim for dim in range(-len(shape), 0) if dim not in kept and shape[dim] != 1)
    left = tuple(shape[dim] if dim in kept else 1 for dim in range(-len(shape), 0))
    ones = next((i for i, size in enumerate(left) if size != 1), len(left))
    return axes, left[ones:]


def _weight(ops: Ops, weights: dict[str, Array], ancestors: frozenset[Ancestor]) -> Array | None:
    """The product of the ancestors' weights: elementwise in the plates in which they are met so, joint over the others."""
    weighted = sorted((ancestor for ancestor in ancestors if ancestor.name in weights), key=itemgetter(0)) if weights else ()
    return ops.exp(sum(sum_to(weights[name], frames) for name, frames in weighted)) if weighted else None


def _credit(ops: Ops, weights: dict[str, Array], site: Any, cost: Array, shares: list[_Share]) -> Credit:
    score = sum_to(site.draw.score, site.frames)
    weight = _weight(ops, weights, site.ancestors)
    if weight is None and site.draw.baseline is None and score.shape == cost.shape:
        return Credit(score, cost, None, None)
    shape = ops.broadcast_shapes(score.shape, cost.shape, *(() if weight is None else (weight.shape,)))
    baseline = site.draw.baseline
    if isinstance(baseline, str):
        baseline = _mean_of_other_elements(site, shares)
    if baseline is not None:
        require_plate_shape(site.name, baseline, shape)
    return Credit(*(None if a is None else ops.broadcast_to(a, shape) for a in (score, cost, weight, baseline)))


def _credits_by_parameter(ops: Ops, weights: dict[str, Array], site: Any, cost: Array) -> dict[str, Credit]:
    """A credit for each array of the site's parameters, over the batch dims of x."""
    weight = _weight(ops, weights, site.ancestors)
    credits = {}
    for i, (score, square) in enumerate(site.draw.by_parameter):
        extra = (1,) * (score.ndim - site.draw.score.ndim)  # type: ignore[union-attr]
        over = [None if a is None else ops.broadcast_to(a.reshape((*a.shape, *extra)), score.shape) for a in (cost, weight)]
        credits[f"{site.name}, parameter {i}"] = Credit(score, over[0], over[1], None, square)
    return credits


def _mean_of_other_elements(site: Any, shares: list[_Share]) -> Array:
    """For each element of the site's plates, the mean of the costs of the other elements, as far as they are theirs alone."""
    own = [sum_to(share.cost, site.frames) for share in shares if Ancestor(site.name, site.frames) in share.ancestors]
    size = math.prod(frame.size for frame in site.frames)
    if size == 1:
        raise ValueError(f"site '{site.name}': baseline='plate' needs a plate of several elements, found none; use the default.")
    of_all = total(own) if own else 0.0 * sum_to(site.draw.score, site.frames)
    return (of_all.sum() - of_all) / (size - 1)


def require_plate_shape(name: str, baseline: Array, shape: tuple[int, ...]) -> None:
    """Refuse a baseline that does not broadcast to the ``shape`` of the site's plates."""
    if not broadcasts(baseline.shape, shape):
        raise ValueError(
            f"site '{name}': a baseline must have the shape of the site's plates or one that broadcasts to it, "
            f"expected {tuple(shape)}, found {tuple(baseline.shape)}."
        )


def require_one_order(guide: list[str], model: list[str]) -> None:
    """Refuse closed-form divergences where the latent sites of guide and model come in different orders.

    The divergence at a site is the expectation over the site given its parents; a parent in the model must not come after it in the
    guide.
    """
    in_guide, in_model = ([name for name in one if name in other] for one, other in ((guide, model), (model, guide)))
    for first, second in zip(in_guide, in_model, strict=True):
        if first != second:
            raise ValueError(
                f"site '{first}': entropy='analytic' needs the latent sites in one order in guide and model, expected {in_model} as in "
                f"the model, found {in_guide}; reorder the guide, or use entropy='full'."
            )


def require_options(entropy: str, baseline: LeaveOneOut, dependencies: str) -> None:
    """Refuse options of an objective that do not exist."""
    for name, found, known in (
        ("entropy", entropy, ("full", "stl", "analytic")),
        ("baseline", baseline, ("loo", None)),
        ("dependencies", dependencies, ("graph", "plates")),
    ):
        if found not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, found {found!r}.")

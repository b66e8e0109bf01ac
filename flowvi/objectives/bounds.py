"""Importance-weighted and Rényi bounds: from the log ratios of several particles to the bound and its derivative.

With r_k the log ratio of the model's and the guide's densities at particle k, the bound is

    L = 1/(1 - alpha) log (1/K) sum_k exp((1 - alpha) r_k),

once for each element of the plates that all statements share (for sequential plates, once for each iteration). Its derivative goes
through every r_k. Sites with a score add sum_k score_k (L - L_{-k}), where L_{-k} is L with the mean of the other log ratios instead of
r_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from flowvi.dependence import Frame
from flowvi.entropy import held_values, stick_the_landing
from flowvi.host import Host
from flowvi.objectives.options import Gradient, LeaveOneOut
from flowvi.objectives.plates import sum_to
from flowvi.ops import Array, Ops, times, total
from flowvi.refusals import refusal
from flowvi.run import Run, Statement
from flowvi.tape import Term, costs

REASON = "its estimators or its gradient"  # the reason why there is no second derivative


class BoundParticle(NamedTuple):
    """One run, reduced to the plates that every statement shares.

    Attributes:
        log_ratio: The log density of the model minus that of the guide, with its derivative.
        score: The sum of the scores of all sites; its value has no meaning. None if no site has a score.
        at_fixed_draws: The part of the log ratio that depends on the parameters at detached draws; None except for ``"dreg"``.
    """

    log_ratio: Array
    score: Array | None
    at_fixed_draws: Array | None


def shared_plates(terms: Iterable[Term], subsampled: Mapping[str, float]) -> tuple[frozenset[Frame], frozenset[str], float]:
    """The plates that all statements share, the sequential ones by name, and the factor by which their subsampling scales costs.

    Raises:
        ValueError: A plate is subsampled, but some statement is outside it.
    """
    stacks = [(term.frames, frozenset(name for name, _ in term.steps)) for term in terms]
    shared, sequential = (frozenset.intersection(*of) for of in zip(*stacks, strict=True)) if stacks else (frozenset(), frozenset())
    if inner := sorted(set(subsampled) - {frame.name for frame in shared} - sequential):
        raise ValueError(
            f"plate '{inner[0]}': an importance-weighted bound can only subsample a plate if every sample statement of model and guide "
            "is inside it; sum over the whole plate, or use TraceFlow_ELBO."
        )
    return shared, sequential, math.prod(subsampled.values())


def bound_of(host: Host, run: Run, gradient: Gradient) -> tuple[BoundParticle, float]:
    """Reduce a run to its log ratio. The second result is the factor of subsampling, by which the bound has to be multiplied.

    Args:
        host: The host library.
        run: The run.
        gradient: ``"dreg"`` takes one more run of guide and model.
    """
    at_fixed_draws = None
    for name in run.sites.biased:
        estimator = run.sites.random[name].estimator
        _refuse(name, f"{estimator} is biased, and its bias under this objective is not known; use LR(), or TraceFlow_ELBO.")
    if gradient == "dreg":
        values = held_values(host, run)
        run = stick_the_landing(host, run, values, "gradient='dreg'")
        again = run.again(values)
        at_fixed_draws = [term for term in costs(again) if term.sign > 0 or term.name not in run.sites.random]
    particle, scale = _bound_particle(host.ops, run, costs(run), at_fixed_draws)
    if run.is_pathwise and gradient == "plain":
        return particle, scale
    return BoundParticle(*(None if a is None else host.ops.first_order(a, REASON) for a in particle)), scale


def _bound_particle(ops: Ops, run: Run, terms: list[Term], at_fixed_draws: list[Term] | None) -> tuple[BoundParticle, float]:
    """Reduce one run. The second result is the factor of subsampling, by which the bound has to be multiplied.

    Args:
        ops: The operations of the backend.
        run: The run.
        terms: Its costs.
        at_fixed_draws: The costs at detached draws, for ``"dreg"``.

    Raises:
        ValueError: Naming the site: a proposal, a control variate, a baseline, or a score under ``"dreg"``.
    """
    for name, draw in run.draws.items():
        if draw.log_weight is not None:
            _refuse(name, "with a proposal q the bound would be multiplied by the joint weight of all particles; use q = p.")
        if draw.control is not None:
            _refuse(name, "a control variate has mean 0 only under an ELBO; use TraceFlow_ELBO, or an estimator that does not learn.")
        if draw.comparison is not None:
            _refuse(
                name,
                "TraceFlow_RenyiELBO takes no estimator that compares the cost at several values, such as Enumerate(); use LR() here, "
                "or TraceFlow_ELBO.",
            )
        if draw.baseline is not None:
            _refuse(name, "the bound has its own baseline, the bound without the particle; remove the baseline of the estimator.")
        if at_fixed_draws is not None and draw.score is not None:
            _refuse(name, "gradient='dreg' needs sites without a score; use RP() or ImplicitRP(), or gradient='plain'.")
    shared, sequential, scale = shared_plates(terms, run.subsampled)
    reduced = [sum_to(term.log_density, shared) for term in terms]
    shape = ops.broadcast_shapes(*(a.shape for a in reduced))

    def step_of(statement: Term | Statement) -> frozenset[tuple[str, int]]:
        return frozenset((name, index) for name, index in statement.steps if name in sequential)

    steps = dict.fromkeys(map(step_of, terms)) if sequential else ()

    def summed(arrays: list[Array], statements: Sequence[Term | Statement]) -> Array | None:
        """The sum of arrays over the shared plates; the iterations of sequential ones are a new axis on the right."""
        if not arrays:
            return None
        if not sequential:
            return ops.broadcast_to(total(arrays), shape)
        zero = 0 * ops.stop_gradient(reduced[0])
        of_steps = [[a for a, of in zip(arrays, statements, strict=True) if step_of(of) == step] or [zero] for step in steps]
        return ops.stack([ops.broadcast_to(total(of_step), shape) for of_step in of_steps], -1)

    log_ratio = summed([a if term.sign > 0 else -a for a, term in zip(reduced, terms, strict=True)], terms)
    scores = {name: draw.score for name, draw in run.draws.items() if draw.score is not None}
    score = summed([sum_to(a, shared) for a in scores.values()], [run.guide[name] for name in scores])
    direct = None
    if at_fixed_draws is not None:
        direct = summed([sum_to(term.cost, shared) for term in at_fixed_draws], at_fixed_draws)
    return BoundParticle(times(log_ratio, 1 / scale), score, None if direct is None else times(direct, 1 / scale)), scale


def renyi_bound(ops: Ops, particles: BoundParticle, alpha: float, baseline: LeaveOneOut) -> Array:
    """The bound for each element of the shared plates, with the derivative of the estimator.

    Args:
        ops: The operations of the backend.
        particles: Every array with the particles along its first axis.
        alpha: The order; 0 is the importance-weighted bound.
        baseline: With ``"loo"``, a particle's score multiplies the bound minus the bound without the particle.
    """
    log_ratio, score, at_fixed_draws = particles
    num_particles = log_ratio.shape[0]

    def bound(log_ratios: Array, axis: int) -> Array:
        return times(ops.logsumexp(times(log_ratios, 1 - alpha), axis) - math.log(num_particles), 1 / (1 - alpha))

    if at_fixed_draws is not None:
        value = ops.stop_gradient(bound(log_ratio, 0))
        w = ops.exp((1 - alpha) * (ops.stop_gradient(log_ratio) - value[None])) / num_particles
        path = ops.tangent_of(log_ratio - at_fixed_draws)
        return value + ((alpha * w + (1 - alpha) * w**2) * path + w * ops.tangent_of(at_fixed_draws)).sum(0)
    value = bound(log_ratio, 0)
    if score is None:
        return value
    signal = ops.stop_gradient(value)[None]  # what each score multiplies
    if baseline == "loo" and num_particles > 1:
        fixed = ops.stop_gradient(log_ratio)
        others = (fixed.sum(0)[None] - fixed) / (num_particles - 1)
        own = ops.eye(num_particles, fixed).reshape((num_particles, num_particles) + (1,) * (fixed.ndim - 1))
        signal = signal - bound(ops.where(own, others[:, None], fixed[None]), 1)
    return value + ops.tangent_of((score * signal).sum(0))


def _refuse(name: str, message: str) -> NoReturn:
    raise refusal(name, message)

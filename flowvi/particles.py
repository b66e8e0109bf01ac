"""From a run to what an objective needs of one particle."""

from __future__ import annotations

from flowvi.bounds import BoundParticle, Gradient, bound_particle
from flowvi.entropy import held_values, stick_the_landing
from flowvi.host import Host
from flowvi.objectives import ALL, Particle, elbo_particle
from flowvi.ops import Array, Ops, total
from flowvi.run import Run, Statement
from flowvi.tape import Dependencies, control_terms, costs, record, scored_draws


def elbo_of(ops: Ops, run: Run, dependencies: Dependencies, *, by_statement: bool = False) -> Particle:
    """Reduce a run to its weighted costs and its scores.

    Args:
        ops: The operations of the backend.
        run: The run.
        dependencies: How to tell which costs depend on which site.
        by_statement: Whether to keep the costs of each statement apart.
    """
    if scored_draws(run.draws):
        particle = elbo_particle(ops, record(run, dependencies), by_statement)
    else:
        particle = Particle(_unweighted(run, by_statement), {})
    if run.draws:
        particle = particle._replace(costs={name: ops.first_order(cost) for name, cost in particle.costs.items()})
    return particle


def _unweighted(run: Run, by_statement: bool) -> dict[str, Array]:
    """The costs where no site has a score or a weight: it does not matter what depends on what."""
    found: dict[str, Array] = {}
    for name in {**run.model, **run.guide}:
        of_model, of_guide = _sum(run.model.get(name)), _sum(run.guide.get(name))
        if of_guide is None and of_model is not None:
            found[name] = of_model
        elif of_guide is not None:
            found[name] = -of_guide if of_model is None else of_model - of_guide
    for term in control_terms(run.draws):
        found[term.name] = found[term.name] + term.cost.sum() if term.name in found else term.cost.sum()
    return found if by_statement or not found else {ALL: total(list(found.values()))}


def _sum(statement: Statement | None) -> Array | None:
    if statement is None or statement.log_density is None:
        return None
    return statement.log_density.sum() if statement.total is None else statement.total


def bound_of(host: Host, run: Run, gradient: Gradient) -> tuple[BoundParticle, float]:
    """Reduce a run to its log ratio; also the factor of subsampling, by which the bound is to be multiplied.

    Args:
        host: The host library.
        run: The run.
        gradient: ``"dreg"`` takes one more run of guide and model.
    """
    held = None
    if gradient == "dreg":
        run = stick_the_landing(host, run, "gradient='dreg'")
        again = run.again(held_values(host, run))
        held = [term for term in costs(again) if term.sign > 0 or term.name not in run.sites.random]
    return bound_particle(host.ops, costs(run), run.draws, held, run.subsampled)

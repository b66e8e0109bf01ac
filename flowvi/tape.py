"""The tape of one run: its costs, and the draws that have a score or a weight, each with what it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, NamedTuple

from flowvi.dependence import Ancestor, Frame, Graph, Node, program_order, scored_ancestors
from flowvi.estimators import Draw
from flowvi.ops import Array
from flowvi.run import Run, Statement

Ancestors = Mapping[str, frozenset[Ancestor]]


class Joint(NamedTuple):
    """Lets every cost count as dependent on every element of some sites: right whatever the program does, but noisy.

    Attributes:
        base: How to find which costs depend on the other sites.
        sites: The names of the sites.
    """

    base: Literal["graph", "plates"]
    sites: frozenset[str]


Dependencies = Literal["graph", "plates"] | Joint


def follows_tensors(dependencies: Dependencies) -> bool:
    """Whether the program has to be followed to find which costs depend on which site."""
    return (dependencies.base if isinstance(dependencies, Joint) else dependencies) == "graph"


class Term(NamedTuple):
    """One cost: the log density of a sample or factor statement, scaled and masked, not yet summed.

    Attributes:
        name: The statement's name.
        frames: Its plates.
        sign: 1 for a statement of the model, -1 for one of the guide.
        log_density: Any batch shape; a batch dim outside every plate is summed before costs are combined.
        ancestors: The random sites with a score or a weight on which the cost depends.
        steps: The iterations of sequential plates in which it is.
    """

    name: str
    frames: frozenset[Frame]
    sign: Literal[1, -1]
    log_density: Array
    ancestors: frozenset[Ancestor]
    steps: frozenset[tuple[str, int]] = frozenset()

    @property
    def cost(self) -> Array:
        return self.log_density if self.sign > 0 else -self.log_density


class Site(NamedTuple):
    """One random choice of the guide whose draw has a score or a weight.

    Attributes:
        name: The site's name.
        frames: Its plates.
        draw: What its estimator attached.
        ancestors: The random sites with a score or a weight on which its draw depends, its own included.
    """

    name: str
    frames: frozenset[Frame]
    draw: Draw
    ancestors: frozenset[Ancestor]


class Tape(NamedTuple):
    """One run: its costs, and the random choices that have a score, a weight or alternatives.

    Attributes:
        terms: The costs.
        sites: The random choices.
        draws: For each unobserved site of the guide, the names of those on which its value depends, its own included.
    """

    terms: list[Term]
    sites: list[Site]
    draws: Mapping[str, frozenset[str]]


def scored_draws(draws: Mapping[str, Draw]) -> dict[str, Draw]:
    """The draws that have a score, a weight or alternatives: those for which dependencies matter."""
    return {
        name: draw
        for name, draw in draws.items()
        if draw.score is not None or draw.log_weight is not None or draw.comparison is not None
    }


def costs(run: Run, of_model: Ancestors | None = None, of_guide: Ancestors | None = None) -> list[Term]:
    """The costs of a run, with the ancestors of each where these are given."""
    return [*_terms(1, run.model, of_model), *_terms(-1, run.guide, of_guide), *control_terms(run.draws)]


def _terms(sign: Literal[1, -1], statements: dict[str, Statement], ancestors: Ancestors | None) -> list[Term]:
    of = ancestors or {}
    return [
        Term(s.name, s.frames, sign, s.log_density, of.get(s.name, frozenset()), s.steps)
        for s in statements.values()
        if s.log_density is not None
    ]


def control_terms(draws: Mapping[str, Draw]) -> list[Term]:
    """The draws' control variates as costs. Their means are 0 whatever happened before: no score or weight multiplies them."""
    controls = [(name, draw.control) for name, draw in draws.items() if draw.control is not None]
    controls += [(name, draw.joint_control(draws)) for name, draw in draws.items() if draw.joint_control is not None]
    return [Term(name, frozenset(), 1, control, frozenset()) for name, control in controls]


def record(run: Run, dependencies: Dependencies) -> Tape:
    """The tape of a run.

    Args:
        run: The run.
        dependencies: ``"graph"``: a statement depends on what it was computed from; ``"plates"``: on all statements before it.
    """
    if isinstance(dependencies, Joint):
        return _jointly(record(run, dependencies.base), dependencies.sites)
    draws = scored_draws(run.draws)
    drawn = frozenset(draws).union(name for name, statement in run.guide.items() if not statement.observed)
    graph = _by_order(run, drawn)
    if dependencies == "graph" and draws and not run.many_samples:
        graph = _by_computation(run, frozenset(draws), drawn, graph)
    if factors := frozenset(name for name in draws if run.guide[name].observed):
        # stands for draws of the guide that have no statement; anything may depend on them
        graph = Graph(*({name: names | factors for name, names in of.items()} for of in graph))
    nodes = _nodes((run.guide[name] for name in run.guide if name in drawn), graph.draws)
    graph = _of_parts(run, graph)
    ancestors = partial(scored_ancestors, draws=nodes, scored=frozenset(draws))
    of_draws, of_model, of_guide = map(
        ancestors, (nodes, _nodes(run.model.values(), graph.model), _nodes(run.guide.values(), graph.guide))
    )
    sites = [Site(name, run.guide[name].frames, draw, of_draws[name]) for name, draw in draws.items()]
    return Tape(costs(run, of_model, of_guide), sites, graph.draws)


def _jointly(tape: Tape, names: frozenset[str]) -> Tape:
    """The tape on which every cost depends on every element of the named sites."""
    joint = frozenset(Ancestor(site.name, frozenset()) for site in tape.sites if site.name in names)

    def widened(ancestors: frozenset[Ancestor]) -> frozenset[Ancestor]:
        return joint.union(ancestor for ancestor in ancestors if ancestor.name not in names)

    return tape._replace(terms=[term._replace(ancestors=widened(term.ancestors)) for term in tape.terms])


def _nodes(statements: Iterable[Statement], ancestors: Mapping[str, frozenset[str]]) -> tuple[Node, ...]:
    return tuple(Node(s.name, s.frames, ancestors[s.name]) for s in statements)


def _by_order(run: Run, drawn: frozenset[str]) -> Graph:
    scans = (frozenset(s.name for s in program.values() if s.in_control_flow) for program in (run.guide, run.model))
    of_guide, of_model = program_order(tuple(run.guide), tuple(run.model), drawn, *scans)
    return _without_closed_forms(run, Graph(of_guide, of_model, of_guide))


def _by_computation(run: Run, scored: frozenset[str], drawn: frozenset[str], order: Graph) -> Graph:
    """The graph of the computation. It cannot see draws inside scan or cond; for these the program order counts."""
    graph = Graph(*({name: names & drawn for name, names in of.items()} for of in run.program.graph(run, scored)))
    inside = frozenset(name for name in drawn if run.guide[name].in_control_flow)
    if inside:
        for of, of_order in zip(graph, order, strict=True):
            for name in of:
                reached = of_order[name] & inside
                of[name] = of[name].union(reached, *(graph.draws[site] for site in reached))
    return _without_closed_forms(run, graph)


def _without_closed_forms(run: Run, graph: Graph) -> Graph:
    """A divergence in closed form is an expectation over its site, so it depends on the parents of the two densities only."""
    if not run.closed_forms:
        return graph
    return graph._replace(model=graph.model | {name: (graph.model[name] | graph.guide[name]) - {name} for name in run.closed_forms})


def _of_parts(run: Run, graph: Graph) -> Graph:
    """A marginal density depends on everything that one of its parts depends on."""
    if not run.marginalised:
        return graph
    marginals = {s.name: frozenset().union(*(graph.model[part] for part in s.parts)) for s in run.model.values() if s.parts}
    return graph._replace(model=graph.model | marginals)

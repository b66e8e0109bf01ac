"""The tape of one run: its costs, and its draws with a score or a weight, each with the sites on which it depends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from flowvi.dependence import Ancestor, Frame, Graph, Node, program_order, scored_ancestors
from flowvi.estimators import Draw
from flowvi.ops import Array
from flowvi.run import Run, Statement

Ancestors = Mapping[str, frozenset[Ancestor]]
Dependencies = Literal["graph", "plates"]


class Joint(NamedTuple):
    """Makes every cost count as dependent on every element of some sites. This is right for every program, but noisy.

    Attributes:
        base: How to find which costs depend on the other sites.
        sites: The names of the sites.
    """

    base: Dependencies
    sites: frozenset[str]


Rule = Dependencies | Joint


def follows_tensors(dependencies: Rule) -> bool:
    """Whether the program has to be followed to find which costs depend on which site."""
    return (dependencies.base if isinstance(dependencies, Joint) else dependencies) == "graph"


class Term(NamedTuple):
    """One cost: the log density of a sample or factor statement, scaled and masked, not yet summed.

    Attributes:
        name: The statement's name.
        frames: Its plates.
        sign: 1 for a statement of the model, -1 for one of the guide.
        log_density: Of any batch shape; a batch dim outside every plate is summed before costs are combined.
        ancestors: The random sites with a score or a weight on which the cost depends.
        steps: The iterations of sequential plates around it.
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
        ancestors: The random sites with a score or a weight on which its draw depends, including itself.
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
        draws: For each unobserved site of the guide, the names of those on which its value depends, including itself.
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
    """The costs of a run, with the ancestors of each if these are given."""
    return [*_terms(1, run.model, of_model), *_terms(-1, run.guide, of_guide), *control_terms(run.draws)]


def _terms(sign: Literal[1, -1], statements: dict[str, Statement], ancestors: Ancestors | None) -> list[Term]:
    of = ancestors or {}
    return [
        Term(s.name, s.frames, sign, s.log_density, of.get(s.name, frozenset()), s.steps)
        for s in statements.values()
        if s.log_density is not None
    ]


def control_terms(draws: Mapping[str, Draw]) -> list[Term]:
    """The draws' control variates as costs. Their mean is 0 given all earlier draws, so no score or weight multiplies them."""
    controls = [(name, draw.control) for name, draw in draws.items() if draw.control is not None]
    controls += [(name, draw.joint_control(draws)) for name, draw in draws.items() if draw.joint_control is not None]
    return [Term(name, frozenset(), 1, control, frozenset()) for name, control in controls]


class Entry(NamedTuple):
    """The fields of a :class:`flowvi.run.Statement` that determine on which sites it depends."""

    name: str
    frames: frozenset[Frame]
    observed: bool
    in_control_flow: bool
    parts: tuple[str, ...]


class Outline(NamedTuple):
    """The part of a run that, besides the computation, determines which costs depend on which site. It rarely changes between steps.

    Attributes:
        guide: The statements of the guide.
        model: The statements of the model.
        scored: The names of the sites with a score, a weight or alternatives.
        closed_forms: Sites whose two log densities have been replaced by minus their divergence in closed form.
    """

    guide: tuple[Entry, ...]
    model: tuple[Entry, ...]
    scored: frozenset[str]
    closed_forms: frozenset[str]


class Ancestry(NamedTuple):
    """The ancestors of everything in a run.

    Attributes:
        draws: For each unobserved site of the guide, the scored sites on which its value depends.
        model: The same for the log density of each statement of the model.
        guide: The same for that of each statement of the guide.
        names: For each unobserved site of the guide, the names of those on which its value depends, including itself.
    """

    draws: Ancestors
    model: Ancestors
    guide: Ancestors
    names: Mapping[str, frozenset[str]]


def record(run: Run, dependencies: Rule) -> Tape:
    """The tape of a run.

    Args:
        run: The run.
        dependencies: ``"graph"``: a statement depends on the sites from which it was computed; ``"plates"``: on all sites before it.
    """
    if isinstance(dependencies, Joint):
        return _jointly(record(run, dependencies.base), dependencies.sites)
    draws = scored_draws(run.draws)
    outline = Outline(_entries(run.guide), _entries(run.model), frozenset(draws), run.closed_forms)
    if dependencies == "graph" and draws and not run.many_samples:
        found = _ancestry(outline, run.program.graph(run, outline.scored))
    else:
        found = _by_order(outline)
    sites = [Site(name, run.guide[name].frames, draw, found.draws[name]) for name, draw in draws.items()]
    return Tape(costs(run, found.model, found.guide), sites, found.names)


def _entries(statements: Mapping[str, Statement]) -> tuple[Entry, ...]:
    return tuple([Entry(s.name, s.frames, s.observed, s.in_control_flow, s.parts) for s in statements.values()])


def _jointly(tape: Tape, names: frozenset[str]) -> Tape:
    """The tape on which every cost depends on every element of the named sites."""
    joint = frozenset(Ancestor(site.name, frozenset()) for site in tape.sites if site.name in names)

    def widened(ancestors: frozenset[Ancestor]) -> frozenset[Ancestor]:
        return joint.union(ancestor for ancestor in ancestors if ancestor.name not in names)

    return tape._replace(terms=[term._replace(ancestors=widened(term.ancestors)) for term in tape.terms])


@lru_cache(maxsize=64)
def _by_order(outline: Outline) -> Ancestry:
    """The ancestors by program order: a statement depends on all sites before it."""
    return _ancestry(outline, None)


def _ancestry(outline: Outline, computed: Graph | None) -> Ancestry:
    """The ancestors by the graph of the computation, or by program order without one."""
    guide, model, scored, closed_forms = outline
    drawn = scored.union(entry.name for entry in guide if not entry.observed)
    scans = (frozenset(entry.name for entry in program if entry.in_control_flow) for program in (guide, model))
    order = program_order(tuple(entry.name for entry in guide), tuple(entry.name for entry in model), drawn, *scans)
    graph = Graph(guide=order[0], model=order[1], draws=order[0])
    if computed is not None:
        graph = _by_computation(computed, graph, guide, drawn)
    graph = _without_closed_forms(graph, closed_forms)
    if factors := frozenset(entry.name for entry in guide if entry.observed and entry.name in scored):
        # such a factor is the density of draws that have no statement; anything may depend on these draws
        graph = Graph(*({name: names | factors for name, names in of.items()} for of in graph))
    nodes = _nodes((entry for entry in guide if entry.name in drawn), graph.draws)
    whole = _of_parts(graph, model)
    of_draws, of_model, of_guide = (
        scored_ancestors(statements, nodes, scored) for statements in (nodes, _nodes(model, whole.model), _nodes(guide, whole.guide))
    )
    return Ancestry(of_draws, of_model, of_guide, graph.draws)


def _nodes(entries: Iterable[Entry], ancestors: Mapping[str, frozenset[str]]) -> tuple[Node, ...]:
    return tuple(Node(entry.name, entry.frames, ancestors[entry.name]) for entry in entries)


def _by_computation(computed: Graph, order: Graph, guide: tuple[Entry, ...], drawn: frozenset[str]) -> Graph:
    """The graph of the computation. It misses draws inside scan or cond; for these, program order is used."""
    graph = Graph(*({name: names & drawn for name, names in of.items()} for of in computed))
    inside = frozenset(entry.name for entry in guide if entry.in_control_flow and entry.name in drawn)
    if inside:
        for of, of_order in zip(graph, order, strict=True):
            for name in of:
                reached = of_order[name] & inside
                of[name] = of[name].union(reached, *(graph.draws[site] for site in reached))
    return graph


def _without_closed_forms(graph: Graph, names: frozenset[str]) -> Graph:
    """A divergence in closed form is an expectation over its site, so it depends only on the parents of the two densities."""
    return graph._replace(model=graph.model | {name: (graph.model[name] | graph.guide[name]) - {name} for name in names})


def _of_parts(graph: Graph, model: tuple[Entry, ...]) -> Graph:
    """A marginal density depends on everything that one of its parts depends on."""
    marginals = {entry.name: frozenset().union(*(graph.model[part] for part in entry.parts)) for entry in model if entry.parts}
    return graph._replace(model=graph.model | marginals)

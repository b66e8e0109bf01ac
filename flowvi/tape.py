"""The records of one run of guide and model: all that an objective needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from flowvi.estimators import Draw
from flowvi.ops import Array


class Frame(NamedTuple):
    """One plate around a statement: a batch dim (negative) that its elements do not share."""

    name: str
    dim: int
    size: int


class Ancestor(NamedTuple):
    """A random site with a score or a weight, as what depends on it sees it.

    Attributes:
        name: The site's name.
        frames: The plates in which each element depends on the site's own element alone; over all others, it depends on all of them.
    """

    name: str
    frames: frozenset[Frame]


Ancestors = Mapping[str, frozenset[Ancestor]] | None


class Term(NamedTuple):
    """One cost: the log density of a sample or factor statement, scaled and masked, not yet summed.

    Attributes:
        name: The statement's name.
        frames: Its plates.
        sign: 1 for a statement of the model, -1 for one of the guide.
        log_density: Any batch shape; a batch dim outside every plate is summed before costs meet.
        ancestors: The random sites on which the cost depends.
    """

    name: str
    frames: frozenset[Frame]
    sign: Literal[1, -1]
    log_density: Array
    ancestors: frozenset[Ancestor]

    @property
    def cost(self) -> Array:
        return self.log_density if self.sign > 0 else -self.log_density


class Site(NamedTuple):
    """One random choice of the guide whose draw has a score or a weight.

    Attributes:
        name: The site's name.
        frames: Its plates.
        draw: What its estimator attached.
        ancestors: The random sites on which its draw depends, its own included.
    """

    name: str
    frames: frozenset[Frame]
    draw: Draw
    ancestors: frozenset[Ancestor]


class Tape(NamedTuple):
    """One run: its costs, and the random choices that have a score or a weight."""

    terms: list[Term]
    sites: list[Site]


def weighty(draws: Mapping[str, Draw]) -> dict[str, Draw]:
    """The draws that have a score or a weight: those for which dependencies matter."""
    return {name: draw for name, draw in draws.items() if draw.score is not None or draw.log_weight is not None}


def control_terms(draws: Mapping[str, Draw]) -> list[Term]:
    """The draws' control variates as costs. Their means are 0 whatever happened before: no score or weight meets them."""
    return [Term(name, frozenset(), 1, draw.control, frozenset()) for name, draw in draws.items() if draw.control is not None]


class Route(NamedTuple):
    """A statement as a way for dependence to take.

    Attributes:
        name: Its name.
        frames: Its plates.
        ancestors: Names of the sites of the guide, of every kind but observed, on which it depends; of a draw, its own included.
    """

    name: str
    frames: frozenset[Frame]
    ancestors: frozenset[str]


@lru_cache(maxsize=64)  # the same at every step of most programs
def meet(statements: tuple[Route, ...], draws: tuple[Route, ...], scored: frozenset[str]) -> dict[str, frozenset[Ancestor]]:
    """For each statement its ancestors that have a score or a weight, each with the plates in which the two meet element by element.

    Elements of a plate are independent, so that these are the plates of both, except one that some site between them is outside of:
    every element leads to such a site, and it leads to every element.

    Args:
        statements: The statements.
        draws: All sites of the guide that are not observed.
        scored: The names of those with a score or a weight.
    """

    def ancestors(statement: Route) -> Iterator[Ancestor]:
        before = [draw for draw in draws if draw.name in statement.ancestors]
        everywhere = statement.frames.intersection(*(draw.frames for draw in before))
        for site in before:
            if site.name in scored:
                frames = statement.frames & site.frames
                if not frames <= everywhere:
                    between = (draw.frames for draw in before if draw is not site and site.name in draw.ancestors)
                    frames = frames.intersection(*between)
                yield Ancestor(site.name, frames)

    return {statement.name: _one_of(frozenset(ancestors(statement))) for statement in statements}


@lru_cache(maxsize=4096)
def _one_of(ancestors: frozenset[Ancestor]) -> frozenset[Ancestor]:
    """One object for all sets that are equal, so that it costs nothing to see that they are."""
    return ancestors


@lru_cache(maxsize=64)  # the same at every step of most programs
def program_order(
    guide: tuple[str, ...],
    model: tuple[str, ...],
    random: frozenset[str],
    guide_scans: frozenset[str] = frozenset(),
    model_scans: frozenset[str] = frozenset(),
) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Ancestors of each cost among the ``random`` sites of the guide, as far as the order of statements tells.

    A cost cannot depend on a site that its program had not reached. The model reaches a site of the guide at its own statement of
    that name, and with it all that the guide had drawn before; auxiliary sites, which the model does not name, count as reached
    before the model begins.

    Args:
        guide: The guide's sample statements, in program order.
        model: The model's.
        random: Sites of the guide.
        guide_scans: Statements of the guide that came out of scan or cond; those in a row may depend on each other in any order.
        model_scans: Statements of the model that did.

    Returns:
        The ancestors by name, for the statements of the guide and for those of the model.
    """
    reached: frozenset[str] = frozenset()
    of_guide: dict[str, frozenset[str]] = {}
    for block in _blocks(guide, guide_scans):
        reached |= frozenset(block) & random
        of_guide |= dict.fromkeys(block, reached)

    unnamed = random.difference(model)
    reached = frozenset().union(*(of_guide[name] for name in guide if name in unnamed))
    of_model: dict[str, frozenset[str]] = {}
    for block in _blocks(model, model_scans):
        reached = reached.union(*(of_guide.get(name, frozenset()) for name in block))
        of_model |= dict.fromkeys(block, reached)
    return of_guide, of_model


def _blocks(names: tuple[str, ...], scans: frozenset[str]) -> list[list[str]]:
    """Names, grouped: those of ``scans`` that are in a row, and each other one by itself."""
    groups: list[list[str]] = []
    for name in names:
        if groups and name in scans and groups[-1][-1] in scans:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups

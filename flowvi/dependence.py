"""Which random sites each statement depends on, and in which plates it depends on them element by element."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Frame(NamedTuple):
    """One plate around a statement: its name, its (negative) batch dim and its size."""

    name: str
    dim: int
    size: int


class Ancestor(NamedTuple):
    """A random site with a score or a weight, as seen from a statement that depends on it.

    Attributes:
        name: The site's name.
        frames: The plates in which an element depends only on the same element of the site; in other plates it depends on all.
    """

    name: str
    frames: frozenset[Frame]


class Node(NamedTuple):
    """A statement as a node of the dependency graph.

    Attributes:
        name: Its name.
        frames: Its plates.
        ancestors: Names of the guide's unobserved sites on which it depends, including its own name if it is such a site.
    """

    name: str
    frames: frozenset[Frame]
    ancestors: frozenset[str]


class Graph(NamedTuple):
    """The names of the guide's unobserved sites on which each statement depends, including its own if it is such a site.

    Attributes:
        guide: For the log density of each statement of the guide.
        model: For the log density of each statement of the model.
        draws: For the value of each unobserved site of the guide.
    """

    guide: dict[str, frozenset[str]]
    model: dict[str, frozenset[str]]
    draws: dict[str, frozenset[str]]


@lru_cache(maxsize=64)  # the same at every step of most programs
def scored_ancestors(statements: tuple[Node, ...], draws: tuple[Node, ...], scored: frozenset[str]) -> dict[str, frozenset[Ancestor]]:
    """For each statement, its ancestors that have a score or a weight, each with the plates in which the dependence is by element.

    Elements of a plate are independent, so these are the plates of both, except a plate if some site between the two is outside it:
    every element of the plate influences this site, and this site influences every element.

    Args:
        statements: The statements.
        draws: All unobserved sites of the guide.
        scored: The names of those with a score or a weight.
    """

    def ancestors(statement: Node) -> Iterator[Ancestor]:
        before = [draw for draw in draws if draw.name in statement.ancestors]
        everywhere = statement.frames.intersection(*(draw.frames for draw in before))
        for site in before:
            if site.name in scored:
                frames = statement.frames & site.frames
                if not frames <= everywhere:
                    between = (draw.frames for draw in before if draw is not site and site.name in draw.ancestors)
                    frames = frames.intersection(*between)
                yield Ancestor(site.name, frames)

    return {statement.name: _interned(frozenset(ancestors(statement))) for statement in statements}


@lru_cache(maxsize=4096)
def _interned(ancestors: frozenset[Ancestor]) -> frozenset[Ancestor]:
    """The same object for equal sets, which makes comparing them free."""
    return ancestors


@lru_cache(maxsize=64)  # the same at every step of most programs
def program_order(
    guide: tuple[str, ...],
    model: tuple[str, ...],
    random: frozenset[str],
    guide_scans: frozenset[str] = frozenset(),
    model_scans: frozenset[str] = frozenset(),
) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """The ``random`` sites of the guide on which each statement may depend, according to the order of statements.

    A statement cannot depend on a site that comes later in its program. The model reaches a site of the guide at the model's statement
    of the same name, and with it everything that the guide drew before. Auxiliary sites, which are not in the model, count as reached
    before the model begins.

    Args:
        guide: The guide's sample statements, in program order.
        model: The model's sample statements, in program order.
        random: Sites of the guide.
        guide_scans: Statements of the guide inside scan or cond; adjacent ones may depend on each other in any order.
        model_scans: Statements of the model inside scan or cond.

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
    """Names in groups: adjacent names of ``scans`` together, every other name alone."""
    groups: list[list[str]] = []
    for name in names:
        if groups and name in scans and groups[-1][-1] in scans:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups

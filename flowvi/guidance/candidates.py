"""The estimators to try at a site. Each has a row, which says at which sites to try it.

A row need not state all requirements: an estimator that refuses the site at its first run is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from flowvi.assignment import Description
from flowvi.estimators import LR, RP, DisARM, Enumerate, Estimator, FiniteDifference, Flow, ImplicitRP, MeasureValued
from flowvi.family import Family, family_of
from flowvi.host import Host
from flowvi.learned.flow import AdaptiveFlow
from flowvi.run import Run

MANY_VALUES = 64  # with more values, neither an exact sum nor DisARM is tried
MANY_COORDINATES = 30  # with more coordinates, the control variate is diagonal


@dataclass(frozen=True)
class GuideSite:
    """A random site of the guide.

    Attributes:
        name: Its name.
        estimator: The estimator that it has without advice.
        target: Its distribution as an estimator sees it.
        plates: The names of its plates.
        in_control_flow: Whether it is inside scan or cond.
        is_annotated: Whether ``estimator`` is an annotation of the program.
    """

    name: str
    estimator: Estimator
    target: Any
    plates: tuple[str, ...]
    in_control_flow: bool = False
    is_annotated: bool = False

    @property
    def family(self) -> Family:
        return family_of(self.target.p)

    @property
    def is_discrete(self) -> bool:
        return self.target.is_discrete()

    @property
    def is_pathwise_in_host(self) -> bool:
        return not self.is_discrete and self.target.lacks_rsample() is None

    @property
    def size(self) -> int:
        """The number of coordinates of its value."""
        return prod((*self.target.batch_shape, *self.target.event_shape))

    @property
    def event_size(self) -> int:
        return prod(self.target.event_shape)

    @cached_property
    def num_values(self) -> int | None:
        """The number of values of a finite support; None for any other one."""
        if not self.is_discrete:
            return None
        try:
            return int(self.target.enumerated_support().shape[0])
        except ValueError:
            return None

    @property
    def kind(self) -> tuple:
        """What sites of one kind share; the best estimator for one of them is likely to be the best for the others."""
        shapes = tuple(self.target.batch_shape), tuple(self.target.event_shape)
        return (self.target.family, tuple(type(t).__name__ for t in self.target.transforms), *shapes, self.plates, repr(self.estimator))

    @property
    def description(self) -> str:
        """What kind of site it is, in words."""
        if self.num_values is not None:
            return f"discrete, {self.num_values} values"
        if self.is_discrete:
            return "discrete, many values"
        return f"continuous, {self.target.family}" + ("" if self.is_pathwise_in_host else " without a reparameterized sampler")


class Row(NamedTuple):
    """A candidate.

    Attributes:
        make: ``make(site, num_particles)`` returns the estimators to try, possibly none.
        in_words: What it is, in words.
    """

    make: Callable[[GuideSite, int], list[Estimator]]
    in_words: str


def _if(condition: bool | None, *estimators: Estimator) -> list[Estimator]:
    return list(estimators) if condition else []


def _fields(site: GuideSite, num_particles: int) -> list[Estimator]:
    """The fields of the family. A pathwise field of a scalar is unique, so it is left out if RP has it already."""
    known = [field() for field in site.family.fields]
    has_rp = site.is_pathwise_in_host and site.target.event_ndim == 0
    return [Flow(field) for field in known if not (has_rp and field.divergence == "pathwise")]


def _sums(site: GuideSite, num_particles: int) -> list[Estimator]:
    if site.num_values is None or site.num_values > MANY_VALUES:
        return []
    return [Enumerate(), *_if(site.size > 1, Enumerate(lanes="random"))]


def _pairs(site: GuideSite, num_particles: int) -> list[Estimator]:
    """One run for all elements at once, where an exact sum takes more than that."""
    if site.num_values is None or site.num_values > MANY_VALUES:
        return []
    return _if((site.num_values - 1) * site.size > 1, DisARM())


def _control_variates(site: GuideSite, num_particles: int) -> list[Estimator]:
    if site.family.name not in ("Normal", "MultivariateNormal"):
        return []
    return [RP(control_variate="quadratic" if site.event_size <= MANY_COORDINATES else "diagonal")]


ROWS: tuple[Row, ...] = (
    Row(lambda site, n: _if(site.is_pathwise_in_host, RP()), "the path of the host's sampler"),
    Row(lambda site, n: [LR()], "the likelihood ratio"),
    Row(_sums, "an exact sum over the values"),
    Row(_fields, "a velocity field of the family"),
    Row(
        lambda site, n: _if(not site.is_discrete and not site.is_pathwise_in_host and site.target.event_ndim == 0, ImplicitRP()),
        "the path that the cdf implies",
    ),
    Row(lambda site, n: _if(site.is_discrete and not site.target.event_ndim, FiniteDifference()), "a difference of neighbours"),
    Row(
        lambda site, n: _if(bool(site.family.weak_derivatives) and not isinstance(site.family.weak_derivatives, str), MeasureValued()),
        "weak derivatives",
    ),
    Row(_pairs, "one antithetic run"),
    Row(lambda site, n: _if(n > 2, LR(baseline="optimal")), "the likelihood ratio with its best baseline"),
    Row(lambda site, n: _if(bool(site.plates) and site.size > 1, LR(baseline="plate")), "the likelihood ratio less the plate's mean"),
    Row(_control_variates, "the host's path less a learned model of the cost"),
    Row(
        lambda site, n: _if(not site.is_discrete and site.target.event_ndim == 0 and site.family.pathwise is not None, AdaptiveFlow()),
        "a learned velocity field",
    ),
)


def guide_sites(host: Host, run: Run, description: Description) -> dict[str, GuideSite]:
    """The random sites of a run's guide, in program order, each with the estimator of the description."""
    return {
        site.name: GuideSite(
            site.name,
            LR() if repr(site.estimator) == repr(LR()) else site.estimator,  # Auto's own LR could become an exact sum
            host.target(site.name, run.guide[site.name].fn, True),
            site.plates,
            run.guide[site.name].in_control_flow,
            site.source != "default",
        )
        for site in description
    }


def candidates(site: GuideSite, num_particles: int) -> dict[Estimator, str]:
    """The estimators to try at a site, each in words; its present estimator comes first."""
    return {site.estimator: in_words(site, num_particles, site.estimator), **dict(_rows(site, num_particles))}


def in_words(site: GuideSite, num_particles: int, estimator: Estimator) -> str:
    """An estimator in words: those of its row, or its repr."""
    return dict(_rows(site, num_particles)).get(estimator, repr(estimator))


def _rows(site: GuideSite, num_particles: int) -> Iterator[tuple[Estimator, str]]:
    for row in ROWS:
        for estimator in row.make(site, num_particles):
            yield estimator, row.in_words


def misses_jumps(estimator: Estimator) -> bool:
    """Whether it moves the site along a path, and so is wrong if the cost jumps or hides its derivative."""
    return not (estimator.compares or isinstance(estimator, LR)) or bool(estimator.jumps)

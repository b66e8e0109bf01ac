"""Whether the estimators are biased on a program: each is compared with a reference that is right for every cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from flowvi.estimators import LR, Estimator
from flowvi.guidance.bench import Bench, Clock, Draw, Setting, parameter_at
from flowvi.guidance.bias import BiasTest, MeanTest
from flowvi.guidance.jumps import Place, reading_elements, where
from flowvi.guidance.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ITSELF = "it is the reference itself"
NO_TIME = "no time; give more seconds"
AT_FAULT = 5.0  # seconds to test again a biased site that comes before another biased site
FIRST_LOOKS = 5.0  # seconds for a first look at all sites, even if the limit is shorter
MEMORY = 300_000  # the number of batches kept, times the number of elements of a gradient
TOLERANCE = 0.02  # the test of a site ends once it would have found a bias of this share of the gradient


@dataclass(frozen=True)
class SiteCheck:
    """What ``check_program`` found at one site.

    Attributes:
        site: The site's name.
        estimator: Its estimator.
        reference: What it was compared with, in words; empty if there was no reference.
        test: The result of the test; None if there was no test.
        biased: Whether its estimator is biased on this program.
        parameter: The parameter whose gradient is most clearly biased.
        place: Where and how the cost violates an assumption of the estimator, if that was found.
        note: Other remarks.
    """

    site: str
    estimator: Estimator
    reference: str = ""
    test: BiasTest | None = None
    biased: bool = False
    parameter: str = ""
    place: Place | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """The result in a word."""
        if self.test is None:
            return "right" if self.note == ITSELF else "not checked"
        return "biased" if self.biased else "no bias found"

    @property
    def remark(self) -> str:
        """Where the bias comes from, or another remark."""
        return str(self.place).format(site=self.site) if self.place is not None else self.note


@dataclass(frozen=True)
class ProgramCheck(Table):
    """What ``check_program`` found; prints as a table.

    Attributes:
        sites: One record for each site.
        confidence: The probability that nothing is reported if every gradient is right.
    """

    sites: tuple[SiteCheck, ...]
    confidence: float
    columns: ClassVar[tuple[str, ...]] = ("site", "estimator", "result", "z", "bias", "detectable", "samples", "remark")
    num_words: ClassVar[int] = 3

    @property
    def failed(self) -> tuple[SiteCheck, ...]:
        """The sites whose estimators are biased."""
        return tuple(site for site in self.sites if site.biased)

    @property
    def title(self) -> str:
        return f"bias of the gradient, confidence {self.confidence:.4g}"

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The table: site, estimator, result, z-score, bias and detectable bias relative to the gradient, samples, remark."""
        for one in self.sites:
            t = one.test
            numbers = (float("nan"),) * 3 + (0,) if t is None else (t.z, t.bias, t.detectable, t.num_samples)
            yield (one.site, repr(one.estimator), one.verdict, *numbers, one.remark)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Bars of the bias at each site, or of the smallest bias that would have been found, as a ``matplotlib`` figure.

        Args:
            ax: The axes to draw into; new ones by default.

        Returns:
            The figure.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        tested = {one.site: (one.test, one.biased) for one in self.sites if one.test is not None}
        for y, (test, biased) in enumerate(tested.values()):
            ax.barh(y, min(test.bias if biased else test.detectable, 1e3), color="C3" if biased else "C0")
        ax.set_yticks(range(len(tested)), list(tested))
        ax.set_xscale("log")
        ax.set_xlabel("bias (red), or the smallest one that would have been found, relative to the gradient")
        ax.invert_yaxis()
        return ax.figure.figure  # the whole figure, also for axes in a part of it


class Checker:
    """Checks the sites of a program one after the other.

    Args:
        bench: The program.
        setting: The objective.
        confidence: The probability of no false alarm at all.
        clock: How much time is left.
        tolerance: The test of a site ends when it would have found a bias of this size, relative to the gradient.
    """

    def __init__(self, bench: Bench, setting: Setting, confidence: float, clock: Clock, tolerance: float = TOLERANCE):
        if not bench.parameters:
            raise ValueError("expected a program with parameters, found none, so there is no gradient; add a param statement.")
        self.bench, self.setting, self.clock, self.tolerance = bench, setting, clock, tolerance
        self.confidence = confidence
        self.alpha = (1 - confidence) / max(len(bench.sites), 1)
        self.estimators = {name: site.estimator for name, site in bench.sites.items()} | dict(setting.chosen)
        self.mixing: dict[str, Place | None] = {}
        self.draws: dict[Setting, Draw] = {}

    def run(self, seconds: float) -> ProgramCheck:
        """Check all sites within some seconds; the tests take turns, one look each.

        The first looks have at least half of the time, and at least some seconds, even if compilations have taken it all.
        """
        end = self.clock.left() - seconds
        found = {name: self._start(name, self.setting) for name in self.bench.sites}
        tests = {name: start for name, start in found.items() if isinstance(start, MeanTest)}
        self._look(tests, end, self.clock.left() - max(seconds / 2, FIRST_LOOKS))
        records = {name: self._record(name, start) for name, start in found.items()}
        biased = [name for name, one in records.items() if one.biased]
        for i, name in enumerate(biased):
            records[name] = self._at_fault(records[name], biased[i + 1 :])
        return ProgramCheck(tuple(records.values()), self.confidence)

    def _look(self, tests: Mapping[str, MeanTest], end: float, end_of_first: float = math.inf) -> None:
        """Look at tests in turn until they are decided, or until so many seconds are left. The first looks may have more time."""

        def time_left() -> bool:
            return self.clock.left() > limit

        limit = min(end, end_of_first)
        while open_ones := {name: test for name, test in tests.items() if not test.is_decided}:
            for name, test in open_ones.items():
                self.clock.show(f"check {name}")
                if not time_left():
                    return
                test.look(time_left)
            limit = end

    def _start(self, name: str, setting: Setting) -> MeanTest | str:
        """The test of a site, or the reason why there is none."""
        site, estimator = self.bench.sites[name], self.estimators[name]
        if site.in_control_flow:
            return "its draw is inside scan or cond, where no reference can be given"
        if name not in self.mixing:
            self.clock.show(f"check {name}")
            self.mixing[name] = reading_elements(self.bench.probe(name)) if site.plates else None
        reference = setting.at({name: LR()})._replace(joint=setting.joint | self._joint(name), entropy="full")
        if reference == setting._replace(entropy="full") or (estimator == LR() and not reference.joint):
            return ITSELF
        has_own_psi = not isinstance(estimator, LR) and not estimator.compares and not estimator.psi_is_zero(site.target)
        own = setting._replace(baseline=None) if has_own_psi else setting  # with a baseline, a psi of mean other than 0 goes unseen
        try:
            return MeanTest(self._gradients(own), self._gradients(reference), self.alpha, self.tolerance)
        except (ValueError, NotImplementedError) as refusal:
            return f"no reference: {str(refusal).splitlines()[0]}"

    def _record(self, name: str, start: MeanTest | str) -> SiteCheck:
        estimator = self.estimators[name]
        if isinstance(start, str):
            return SiteCheck(name, estimator, note=start)
        if not start.num_looks and not start.is_decided:
            return SiteCheck(name, estimator, note=NO_TIME)
        reference = "LR() of all costs" if self._joint(name) else "LR()"
        parameter = parameter_at(self.bench, start.result.element)
        note = f"the gradient of '{parameter}' is not that of {reference}" if start.result.biased else ""
        if not start.result.has_reference:
            note = f"{note}, which is NaN or infinite; look for a value that the model makes impossible"
        return SiteCheck(name, estimator, reference, start.result, start.result.biased, parameter, note=note)

    def _joint(self, name: str) -> frozenset[str]:
        return frozenset({name}) if self.mixing.get(name) is not None else frozenset()

    def _at_fault(self, record: SiteCheck, later: list[str]) -> SiteCheck:
        """The record of a biased site. It is not biased itself if its gradient is right with unbiased estimators at later sites."""
        name = record.site
        if later:
            right = self.setting.at(dict.fromkeys(later, LR()))._replace(joint=frozenset().union(*map(self._joint, later)))
            again = self._start(name, right)
            if isinstance(again, MeanTest):
                self._look({name: again}, self.clock.left() - AT_FAULT)
                if again.num_looks and not again.result.biased:
                    others = ", ".join(f"'{other}'" for other in later)
                    return replace(record, biased=False, note=f"its path leads through {others}, whose bias it has")
        place = self.mixing.get(name) or where(self.bench.sites[name], self.bench.probe(name))
        return replace(record, place=place)

    def _gradients(self, setting: Setting) -> Draw:
        """The gradients of a setting. Batches that several sites use are kept, within a limit on memory."""
        if setting not in self.draws:
            kept = MEMORY // max(sum(self.bench.parameters.values()), 1)
            self.draws[setting] = lru_cache(maxsize=kept)(self.bench.gradients(setting))
        return self.draws[setting]

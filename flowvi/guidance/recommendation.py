"""What ``recommend`` returns and how it is found: a search, a check of the winner, a confirmation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from flowvi.estimators import LR, RP, Estimator
from flowvi.guidance.bench import Bench, Clock, Setting
from flowvi.guidance.candidates import GuideSite, in_words
from flowvi.guidance.noise import FLOOR
from flowvi.guidance.program_check import NO_TIME, Checker, ProgramCheck
from flowvi.guidance.search import Search, Tried, ratio
from flowvi.guidance.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEARCH, CONFIRM, CHECK, GAIN = 0.5, 0.15, 0.25, 0.1  # the shares of the time
UNCOUNTED = 1e6  # above this, a ratio is not shown as a number, since the choice has no noise
ROUNDS = 3  # how often a rejected choice is replaced
CONFIDENCE, TOLERANCE = 0.999, 0.1
DEFAULT, OF_HOST = "the default", "the host's own objective"


class Gain(NamedTuple):
    """The factor by which noise times time falls, with its 95% interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """The ratio and the interval."""
        if self.ratio > UNCOUNTED:
            return "more than a million"
        return f"{self.ratio:.3g} (95% interval: {self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class SiteAdvice:
    """The advice for one site.

    Attributes:
        site: The site's name.
        estimator: The recommended estimator.
        reason: The reason, in words.
        tried: The estimators that were tried, the best one first.
    """

    site: str
    estimator: Estimator
    reason: str
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Recommendation(Table):
    """What ``recommend`` found; prints as a table.

    Attributes:
        estimators: A mapping from sites to estimators, as ``TraceFlow_ELBO`` takes it. A site whose annotation is best is left out.
        options: The other options of ``TraceFlow_ELBO``.
        gain_over_default: Noise times time of ``TraceFlow_ELBO()``, relative to that of the choice. The default has the first of the
            numbers of particles to choose from.
        gain_over_host: The same for the host's own objective; None if it cannot run the program.
        biased: Those of ``"the default"`` and ``"the host's own objective"`` whose gradient is biased on this program.
        sites: The advice for each site.
        check: The result of ``check_program`` for the choice.
        untried: The number of candidates for which there was no time.
        hints: What else would make the steps faster.
    """

    estimators: Mapping[str, Estimator]
    options: Mapping[str, Any]
    gain_over_default: Gain
    gain_over_host: Gain | None
    sites: tuple[SiteAdvice, ...]
    check: ProgramCheck
    untried: int
    hints: tuple[str, ...] = ()
    biased: frozenset[str] = frozenset()
    columns: ClassVar[tuple[str, ...]] = ("site", "estimator", "noise of the next", "time of the next", "reason")
    num_words: ClassVar[int] = 2

    @property
    def title(self) -> str:
        return "recommended estimators"

    @property
    def footer(self) -> tuple[str, ...]:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        lines = [f"options: {options}"]
        for name, gain in ((DEFAULT, self.gain_over_default), (OF_HOST, self.gain_over_host)):
            if gain is not None:
                lines.append(f"noise x time: {name} has {gain} times that of this choice{', but is biased' * (name in self.biased)}")
        lines += [f"check_program: '{one.site}' may be biased: {one.remark}" for one in self.check.failed]
        if late := [repr(one.site) for one in self.check.sites if one.note == NO_TIME]:
            lines.append(f"check_program: no time to check {', '.join(late)}; give more seconds")
        candidates = f"{self.untried} candidate{'s' * (self.untried > 1)}"
        return (*lines, *self.hints, *([f"no time for {candidates}; give more seconds"] if self.untried else []))

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The table: site, estimator, noise and time of the second best relative to the best, reason."""
        for advice in self.sites:
            others = [t for t in advice.tried if t.estimator != advice.estimator]
            noise, time = (others[0].noise, others[0].time) if others else (float("nan"), float("nan"))
            yield (advice.site, repr(advice.estimator), noise, time, advice.reason)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Noise times time of all estimators tried at each site, relative to the recommended one, as a ``matplotlib`` figure.

        Args:
            ax: The axes to draw into; new ones by default.

        Returns:
            The figure.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        for y, advice in enumerate(self.sites):
            for tried in advice.tried:
                x = min(max(tried.noise * tried.time, 1e-3), 1e6)
                ax.plot(x, y, "o", color="C3" if tried.estimator == advice.estimator else "C0")
                ax.annotate(repr(tried.estimator), (x, y), rotation=45, textcoords="offset points", xytext=(2, 4), fontsize="x-small")
        ax.set_yticks(range(len(self.sites)), [advice.site for advice in self.sites])
        ax.set_xscale("log")
        ax.set_xlabel("noise x time, relative to the recommended estimator (red)")
        ax.invert_yaxis()
        return ax.figure.figure  # the whole figure, also for axes in a part of it


def advise(search: Search, seconds: float, check_particles: int) -> Recommendation:
    """The recommendation for a program.

    Args:
        search: A search that has not begun.
        seconds: The time limit.
        check_particles: The number of particles for the check of the winner.
    """
    bench, clock = search.bench, search.clock
    search.run(SEARCH * seconds)
    clock.show("confirm")
    search.keep_default(CONFIRM * seconds)
    check = _check(bench, search, CHECK * seconds, clock, check_particles)
    for _ in range(ROUNDS):
        if not check.failed:
            break
        for one in check.failed:
            search.ban(one.site, 0.1 * seconds)
        check = _check(bench, search, CHECK * seconds, clock, check_particles)
    clock.show("gain")
    of_host = Setting(num_particles=search.default.num_particles, of_host=True)
    measured = search.measure([search.best, search.default, of_host], max(GAIN * seconds, clock.left()))
    best = measured[search.best]
    advice = tuple(_advice(search, site) for site in bench.sites.values())
    return Recommendation(
        {one.site: one.estimator for one in advice if _is_explicit(search, bench.sites[one.site])},
        _options(search.best),
        Gain(*ratio(measured[search.default], best)),
        Gain(*ratio(measured[of_host], best)) if of_host in measured else None,
        advice,
        check,
        len(search.untried),
        bench.hints(search.best, best.seconds),
        _biased(search),
    )


def _options(setting: Setting) -> dict[str, Any]:
    """The options of the objective; those of particles only if they differ from the default."""
    particles = {} if setting.particles == "independent" else {"particles": setting.particles}
    plate = {"vectorize_particles": True} if setting.vectorized else {}
    return {"num_particles": setting.num_particles, "entropy": setting.entropy} | plate | particles


def _check(bench: Bench, search: Search, seconds: float, clock: Clock, particles: int) -> ProgramCheck:
    setting = search.best._replace(num_particles=particles, particles="independent", vectorized=False)
    check = Checker(bench, setting, CONFIDENCE, clock, TOLERANCE).run(seconds)
    for one in check.failed:
        if one.test is not None and not one.test.has_reference:
            raise ValueError(f"recommend: site '{one.site}': {one.note}, or give other parameters.")
    return check


def _biased(search: Search) -> frozenset[str]:
    """Which objectives without advice have a biased gradient on this program."""
    sites = search.bench.sites
    pathwise = all(site.is_pathwise_in_host for site in sites.values())
    found = {
        DEFAULT: any(search.is_banned(name, site.estimator) for name, site in sites.items()),
        OF_HOST: pathwise and any(search.is_banned(name, RP()) for name in sites),
    }
    return frozenset(name for name, is_biased in found.items() if is_biased)


def _is_explicit(search: Search, site: GuideSite) -> bool:
    """Whether the mapping must contain a site."""
    return not site.in_control_flow and (site.name in dict(search.best.chosen) or not site.is_annotated)


def _advice(search: Search, site: GuideSite) -> SiteAdvice:
    estimator, tried = search.estimator(site.name), tuple(sorted(search.tried[site.name].values(), key=lambda t: t.score))
    if site.in_control_flow:
        wrapped = LR() if site.is_discrete else RP()
        reason = f"{site.description}, inside scan or cond, where only the wrapper acts: Estimated(distribution, {wrapped})"
        return SiteAdvice(site.name, wrapped, reason, ())
    words = f"{site.description}: {in_words(site, max(search.num_particles), estimator)}"
    if banned := search.banned.get(site.name):
        words += f"; {', '.join(map(repr, banned))} would be biased on this program"
    others = [t for t in tried if t.estimator != estimator and not search.is_banned(site.name, t.estimator)]
    if others:
        words += f"; {_versus(next((t for t in others if t.estimator == site.estimator), others[0]))}"
    elif any(name == site.name for name, _ in search.untried):
        words += "; there was no time to try another estimator"
    return SiteAdvice(site.name, estimator, words, tried)


def _versus(other: Tried) -> str:
    if all(0.9 < ratio < 1.1 for ratio in (other.noise, other.time)):
        return f"no measurable difference to {other.estimator}"
    exact = other.noise > 0.1 / FLOOR
    noise = "noisy where this is exact" if exact else f"{other.noise:.2g} times as noisy"
    return f"{other.estimator} would be {noise} at {other.time:.2g} times the time"

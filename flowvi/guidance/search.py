"""The search for the objective of least noise times time: sites of one kind at a time, the others held, by successive halving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from flowvi.estimators import Estimator
from flowvi.guidance.bench import Bench, Clock, Setting
from flowvi.guidance.bias import MeanTest
from flowvi.guidance.candidates import GuideSite, candidates, misses_jumps
from flowvi.guidance.noise import FLOOR, Scale, Trial
from flowvi.particles import Particles, can_be_joint

CLEARLY = 2.5  # standard errors
TOLERATED = 0.2  # the share by which a score may be larger where that is not sure
ALIKE = 0.05  # scores that differ by less than this share are not told apart
ALPHA = 0.001  # the probability that a plate of particles is taken for wrong
BATCHES = 128  # the most batches of one trial in a race
SURE, KNOWN = 8, 0.1  # batches that a confirmation takes at least, if there is time, and the error at which it ends
FIRST = 4  # batches that set the weights of the elements
FEWEST = 64  # samples after which the first candidates drop out


class Unit(NamedTuple):
    """What is chosen at one time: an estimator for some sites, or how the entropy is differentiated.

    Attributes:
        name: What it is, for the progress bar.
        sites: The sites, which get one estimator; none for the entropy.
        options: The settings to try, each by what is new in it.
    """

    name: str
    sites: tuple[str, ...]
    options: tuple[Any, ...]


class Tried(NamedTuple):
    """An estimator that was tried at a site, everything else held.

    Attributes:
        estimator: The estimator.
        noise: Its noise, relative to that of the one that was chosen then.
        time: The time of its step, relative to that of the one that was chosen then.
    """

    estimator: Estimator
    noise: float
    time: float

    @property
    def score(self) -> float:
        return self.noise * self.time


class Search:
    """Objectives that were tried, and the best one so far.

    Args:
        bench: The program.
        num_particles: The number of particles, or several to choose from; the first is that of the default.
        clock: How much time is left.

    Attributes:
        default: The objective without advice.
        best: The best objective so far.
        size: The number of samples of a batch.
        trials: The objectives that were measured.
        refused: Those that an estimator refused, each with its message.
        tried: For each site the estimators that raced there, noise and time of each relative to those of the winner.
        banned: For each site the estimators that are biased on this program.
    """

    def __init__(self, bench: Bench, num_particles: int | tuple[int, ...], clock: Clock):
        self.bench, self.clock = bench, clock
        self.num_particles = (num_particles,) if isinstance(num_particles, int) else tuple(num_particles)
        self.default = self.best = Setting(num_particles=self.num_particles[0])
        self.trials: dict[Setting, Trial] = {}
        self.refused: dict[Setting, str] = {}
        self.tried: dict[str, dict[Estimator, Tried]] = {name: {} for name in bench.sites}
        self.banned: dict[str, list[Estimator]] = {}
        self.compilation = 0.0
        clock.show("default")
        draw = bench.gradients(self.default)
        first = [draw(-1 - i).gradients for i in range(FIRST)]
        self.scale, self.size = Scale.of(first), len(first[0])
        self.trials[self.default] = Trial(draw, self.scale)

    def run(self, seconds: float) -> None:
        """Search for so long."""
        end = self.clock.left() - seconds
        kinds = self._kinds()
        apart = [self._unit([site]) for sites in kinds if len(sites) > 1 for site in sites]
        for units, contenders in ((self.units(), None), ([*apart, *self.units()], 3)):
            for i, unit in enumerate(units):
                self._choose(unit, end, (self.clock.left() - end) / (len(units) - i), contenders)

    @property
    def untried(self) -> int:
        """How many candidates there was no time for, apart from those that were refused."""
        refused = {(name, estimator) for setting in self.refused for name, estimator in setting.chosen}
        left = {(name, e) for unit in self.units() for name in unit.sites for e in unit.options if e not in self.tried[name]}
        return len(left - refused)

    def units(self) -> list[Unit]:
        """What is chosen one after the other: for all sites, for those of each kind, and for all again.

        Particles come first, since in a plate they take less time, whatever the estimators are.
        """
        particles = [Unit("particles", (), options)] if len(options := self._particles()) > 1 else []
        return [*particles, *map(self._unit, self._kinds()), Unit("entropy", (), ("full", "stl", "analytic"))]

    def _particles(self) -> tuple[tuple[int, Particles, bool], ...]:
        """The numbers of particles to choose from, with the ways in which so many can be drawn."""
        sites = self.bench.sites.values()
        can_be_drawn_together = any(site.is_pathwise_in_host and can_be_joint(site.target) for site in sites)
        return tuple(
            (number, how, vectorized)
            for number in self.num_particles
            for how, vectorized in (self.bench.drawn if number > 1 else self.bench.drawn[:1])
            if how == "independent" or (can_be_drawn_together and (how != "antithetic" or number % 2 == 0))
        )

    def _kinds(self) -> list[list[GuideSite]]:
        kinds: dict[tuple, list[GuideSite]] = {}
        for site in self.bench.sites.values():
            if not site.in_control_flow:
                kinds.setdefault(site.kind, []).append(site)
        return list(kinds.values())

    def at(self, unit: Unit, option: Any) -> Setting:
        """The best setting so far with one option of a unit."""
        if unit.name == "entropy":
            return self.best._replace(entropy=option)
        if unit.name == "particles":
            number, how, vectorized = option
            return self.best._replace(num_particles=number, particles=how, vectorized=vectorized)
        kept = frozenset(name for name in unit.sites if self.bench.sites[name].estimator == option)
        return self.best.without(kept).at({name: option for name in unit.sites if name not in kept})

    def keep_default(self, seconds: float) -> None:
        """Go back to the default unless the choice turns out to be better, measured side by side.

        A few samples flatter an estimator whose gradient is seldom large, such as a score; among many candidates one of them wins.
        """
        plain = self.default._replace(num_particles=self.best.num_particles)
        measured = self.measure([self.best, plain], seconds)
        excess, error = measured[self.best].excess(measured[plain])
        if self.best != plain and excess > -min(error, TOLERATED):
            found, kept = measured[self.best], measured[plain]
            for name, estimator in self.best.chosen:  # together, as they were measured
                self.tried[name][estimator] = Tried(estimator, found.noise / kept.noise, found.seconds / kept.seconds)
            self.best = plain

    def keep_loop(self, seconds: float) -> None:
        """Go back to a loop over particles where those in a plate have another mean: the program is not written for it."""
        if self.best.vectorized:
            looped = self.best._replace(particles="independent", vectorized=False)
            test = MeanTest(self.bench.gradients(self.best), self.bench.gradients(looped), ALPHA, ALIKE)
            end = self.clock.left() - seconds
            while not test.is_decided and (self.clock.left() > end or not test.num_looks):
                test.look(lambda: self.clock.left() > end)
            if test.result.biased:
                self.best = looped

    def ban(self, site: str, seconds: float) -> None:
        """Choose again at a site whose estimator is biased on this program, without those that are wrong for the same reason."""
        unit = self._unit([self.bench.sites[site]])
        biased = self.estimator(site)
        wrong = [e for e in unit.options if e == biased or (misses_jumps(biased) and misses_jumps(e))]
        self.banned.setdefault(site, []).extend(wrong)
        allowed = self._unit([self.bench.sites[site]])
        if not allowed.options:
            return
        self.best = self.at(allowed, allowed.options[0])
        self._choose(allowed, self.clock.left() - seconds, seconds, None)

    def estimator(self, site: str) -> Estimator:
        """The estimator of a site in the best setting."""
        return dict(self.best.chosen).get(site, self.bench.sites[site].estimator)

    def measure(self, settings: list[Setting], seconds: float) -> dict[Setting, Trial]:
        """Measure some objectives in turn, without those that cannot run the program."""
        end = self.clock.left() - seconds
        trials: dict[Setting, Trial] = {}
        for setting in dict.fromkeys(settings):
            with suppress(ValueError, NotImplementedError):
                trials[setting] = Trial(self.bench.gradients(setting), self.scale)
        for done in range(BATCHES):
            known = done >= SURE and all(trial.error < KNOWN or trial.noise <= FLOOR for trial in trials.values())
            if known or (done >= 2 and self.clock.left() < end):
                break
            for trial in trials.values():
                trial.run()
        return trials

    def _unit(self, sites: list[GuideSite]) -> Unit:
        of_first = candidates(sites[0], max(self.num_particles))
        banned = [estimator for site in sites for estimator in self.banned.get(site.name, [])]
        names = tuple(site.name for site in sites)
        return Unit(", ".join(names[:3]) + ("..." if len(names) > 3 else ""), names, tuple(e for e in of_first if e not in banned))

    def _choose(self, unit: Unit, end: float, seconds: float, contenders: int | None) -> None:
        """Make the best of a unit's options part of the best setting.

        Args:
            unit: The unit.
            end: When to stop, in seconds that are left on the clock.
            seconds: How long it may take.
            contenders: How many of the options that raced before to try again, the best ones; None for all.
        """
        own_end = max(end, self.clock.left() - seconds)
        options = list(unit.options)
        if contenders is not None and unit.sites:
            of_first = self.tried[unit.sites[0]]
            again = [option for option in sorted(of_first, key=lambda e: of_first[e].score) if option in unit.options][:contenders]
            options = again + [option for option in options if option not in of_first]
        racers: dict[Setting, Trial] = {}
        options_of: dict[Setting, Any] = {}
        for option in options:
            setting = self.at(unit, option)
            if (trial := self._trial(setting, unit, own_end if len(racers) > 1 else end)) is not None:
                racers[setting], options_of[setting] = trial, option
        if not racers:
            return
        self.best = self._race(racers, own_end, end)
        winner = racers[self.best]
        for name in unit.sites:
            for setting, trial in racers.items():
                if trial.times:
                    ratios = Tried(options_of[setting], trial.noise / winner.noise, trial.seconds / winner.seconds)
                    self.tried[name][ratios.estimator] = ratios

    def _trial(self, setting: Setting, unit: Unit, end: float) -> Trial | None:
        if setting in self.refused:
            return None
        if setting not in self.trials:
            before = self.clock.left()
            if before - end < self.compilation and setting != self.best:
                return None
            self.clock.show(unit.name)
            try:
                self.trials[setting] = Trial(self.bench.gradients(setting), self.scale)
            except Exception as refusal:
                if not setting.vectorized and not isinstance(refusal, ValueError | NotImplementedError):
                    raise  # a program that is not written for a plate of particles may fail in any way
                self.refused[setting] = str(refusal)
                return None
            self.compilation = max(0.7 * self.compilation, before - self.clock.left())
        return self.trials[setting]

    def _race(self, racers: Mapping[Setting, Trial], own_end: float, end: float) -> Setting:
        """The setting of least score, by successive halving: those that stay get twice as many batches."""
        racing = dict(racers)
        batches = max(FIRST, -(-FEWEST // self.size))
        while True:
            for trial in racing.values():
                while len(trial.times) < batches and (not trial.times or self.clock.left() > end):
                    trial.run()
            ordered = sorted(racing, key=lambda setting: racing[setting].score)
            best = racing[ordered[0]]
            racing = {
                setting: racing[setting]
                for i, setting in enumerate(ordered)
                if not self._is_worse(racing[setting], best, i, len(ordered))
            }
            alike = all(sum(trial.excess(best)) < ALIKE for trial in racing.values())
            batches *= 2
            if len(racing) == 1 or (alike and batches > 2 * FIRST) or batches > BATCHES or self.clock.left() < own_end:
                return self.best if self.best in racing and self._is_as_good(racing, best) else ordered[0]

    def _is_worse(self, trial: Trial, best: Trial, rank: int, size: int) -> bool:
        """Whether it drops out: surely worse, or in the worse half and probably worse."""
        excess, error = trial.excess(best)
        return trial is not best and (excess > CLEARLY * error if rank < size / 2 else excess > error) and excess > 0

    def _is_as_good(self, racing: Mapping[Setting, Trial], best: Trial) -> bool:
        """Whether the setting that is the best so far need not change."""
        excess, error = racing[self.best].excess(best)
        return excess < max(ALIKE, min(error, TOLERATED))


def ratio(a: Trial, b: Trial) -> tuple[float, float, float]:
    """The score of a over that of b, and its 95% interval."""
    excess, error = a.excess(b)
    error = 1.96 * math.hypot(error, (1 + excess) * math.hypot(a.spread, b.spread))
    return 1 + excess, max(1 + excess - error, 0.0), 1 + excess + error

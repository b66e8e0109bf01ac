"""The search for the objective of least noise times time: by successive halving, for sites of one kind at a time.

The number of particles is that of the shortest fit: least (signal + noise) times time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from flowvi.estimators import Estimator
from flowvi.guidance.bench import Bench, Clock, Setting
from flowvi.guidance.candidates import GuideSite, candidates, misses_jumps
from flowvi.guidance.noise import FLOOR, Scale, Trial
from flowvi.particles import can_be_joint, require_num_particles

CLEARLY = 2.5  # standard errors
TOLERATED = 0.1  # the share by which an uncertain score may be larger
ALIKE = 0.05  # scores that differ by less than this share count as equal
BATCHES = 128  # the most batches of one trial in a race
SURE, KNOWN = 8, 0.1  # the fewest batches of a confirmation, if there is time, and the error at which it ends
FIRST = 8  # batches for the weights of the elements
FEWEST = 64  # samples after which the first candidates drop out


class Unit(NamedTuple):
    """One choice to make: the estimator of some sites, how the entropy is differentiated, or how particles are drawn.

    Attributes:
        name: Its name in the progress bar.
        sites: The sites that get the estimator; none for the other choices.
        options: The options to choose from.
        signal: What is added to the noise.
    """

    name: str
    sites: tuple[str, ...]
    options: tuple[Any, ...]
    signal: float = 0.0


class Tried(NamedTuple):
    """An estimator that was tried at a site, with everything else unchanged.

    Attributes:
        estimator: The estimator.
        noise: Its noise, relative to that of the estimator that was chosen.
        time: The time of its step, relative to that of the estimator that was chosen.
    """

    estimator: Estimator
    noise: float
    time: float

    @property
    def score(self) -> float:
        return self.noise * self.time


class Search:
    """The objectives that were tried, and the best one so far.

    Args:
        bench: The program.
        num_particles: The number of particles, or several to choose from; the default has the first.
        clock: How much time is left.

    Attributes:
        default: The objective without advice.
        best: The best objective so far.
        size: The number of samples of a batch.
        trials: The objectives that were measured.
        refused: The objectives that an estimator refused, each with its message.
        tried: For each site the estimators that were tried, with noise and time relative to those of the winner.
        banned: For each site the estimators that are biased on this program.
    """

    def __init__(self, bench: Bench, num_particles: int | tuple[int, ...], clock: Clock):
        self.bench, self.clock = bench, clock
        numbers = num_particles if isinstance(num_particles, list | tuple) and num_particles else (num_particles,)
        self.num_particles = tuple(map(require_num_particles, numbers))
        self.default = self.best = Setting(num_particles=self.num_particles[0])
        self.trials: dict[Setting, Trial] = {}
        self.refused: dict[Setting, str] = {}
        self.tried: dict[str, dict[Estimator, Tried]] = {name: {} for name in bench.sites}
        self.banned: dict[str, list[Estimator]] = {}
        self.compilations: list[float] = []
        clock.show("default")
        draw = bench.gradients(self.default)
        first = [draw(-1 - i).gradients for i in range(FIRST)]
        if not all(np.isfinite(gradients).all() for gradients in first):
            raise ValueError(
                "recommend: expected a finite gradient of the objective without advice at these parameters, found NaN or infinity; "
                "look for a site whose value leaves the support of the model, or give other parameters."
            )
        self.scale, self.size = Scale.of(first), len(first[0])
        self.trials[self.default] = Trial(draw, self.scale)

    def run(self, seconds: float) -> None:
        """Search for some seconds."""
        end = self.clock.left() - seconds
        kinds = self._kinds()
        apart = [self._unit([site]) for sites in kinds if len(sites) > 1 for site in sites]
        for units, contenders in ((self.units(), None), ([*apart, *self.units()], 3)):
            for i, unit in enumerate(units):
                self._choose(unit, end, (self.clock.left() - end) / (len(units) - i), contenders)

    @property
    def untried(self) -> set[tuple[str, Estimator]]:
        """The candidates for which there was no time, each with its site, without the refused ones."""
        refused = {(name, estimator) for setting in self.refused for name, estimator in setting.chosen}
        left = {(name, e) for unit in self.units() for name in unit.sites for e in unit.options if e not in self.tried[name]}
        return left - refused

    def units(self) -> list[Unit]:
        """The choices to make, in order: particles, the sites of each kind, the entropy.

        Particles come first, since a plate of particles takes less time with every estimator.
        """
        return [*self._particles(), *map(self._unit, self._kinds()), Unit("entropy", (), ("full", "stl", "analytic"))]

    def _particles(self) -> list[Unit]:
        """The numbers of particles to choose from, each with the ways to draw them; empty if there is nothing to choose."""
        sites = self.bench.sites.values()
        can_be_drawn_together = any(site.is_pathwise_in_host and can_be_joint(site.target) for site in sites)
        options = tuple(
            (number, how, vectorized)
            for number in sorted(set(self.num_particles))
            for how, vectorized in (self.bench.drawn if number > 1 else self.bench.drawn[:1])
            if how == "independent" or (can_be_drawn_together and (how != "antithetic" or number % 2 == 0))
        )
        return [Unit("particles", (), options, self.scale.signal)] if len(options) > 1 else []

    def _kinds(self) -> list[list[GuideSite]]:
        kinds: dict[tuple, list[GuideSite]] = {}
        for site in self.bench.sites.values():
            if not site.in_control_flow:
                kinds.setdefault(site.kind, []).append(site)
        return list(kinds.values())

    def at(self, unit: Unit, option: Any) -> Setting:
        """The best setting so far, with one option of a unit."""
        if unit.name == "entropy" and not unit.sites:
            return self.best._replace(entropy=option)
        if unit.name == "particles" and not unit.sites:
            number, how, vectorized = option
            return self.best._replace(num_particles=number, particles=how, vectorized=vectorized)
        kept = frozenset(name for name in unit.sites if self.bench.sites[name].estimator == option)
        return self.best.without(kept).at({name: option for name in unit.sites if name not in kept})

    def keep_default(self, seconds: float) -> None:
        """Go back to the default unless the choice is better when both are measured again: the particles, then all else.

        With few samples, an estimator whose gradient is seldom large, such as a score, looks better than it is. Among many candidates,
        such an estimator can win by chance.
        """

        def without_particles(setting: Setting) -> Setting:
            return setting._replace(num_particles=self.default.num_particles, particles="independent", vectorized=False)

        plain = self.best._replace(chosen=(), entropy=self.default.entropy)
        measured = self.measure([self.best, plain, without_particles(self.best), without_particles(plain)], seconds)

        def gains(setting: Setting, signal: float) -> bool:
            if setting not in measured:
                return True
            excess, error = measured[self.best].excess(measured[setting], signal)
            return setting == self.best or excess < -_margin(error)

        if not gains(few := without_particles(self.best), self.scale.signal):
            self.best, plain = few, without_particles(plain)
        if not gains(plain, 0.0):
            found, kept = measured[self.best], measured[plain]
            for name, estimator in self.best.chosen:  # they were measured together
                self.tried[name][estimator] = Tried(estimator, found.noise / kept.noise, found.seconds / kept.seconds)
            self.best = plain

    def ban(self, site: str, seconds: float) -> None:
        """Choose again at a site whose estimator is biased on this program, without estimators that are wrong for the same reason.

        The particles are chosen again too, since the remaining estimators may have much more noise.
        """
        unit = self._unit([self.bench.sites[site]])
        biased = self.estimator(site)
        wrong = [e for e in unit.options if e == biased or (misses_jumps(biased) and misses_jumps(e))]
        self.banned.setdefault(site, []).extend(wrong)
        allowed = self._unit([self.bench.sites[site]])
        if not allowed.options:
            return
        self.best = self.at(allowed, allowed.options[0])
        end, units = self.clock.left() - seconds, [*self._particles(), allowed]
        for i, choice in enumerate(units):
            self._choose(choice, end, (self.clock.left() - end) / (len(units) - i), None)

    def is_banned(self, site: str, estimator: Estimator) -> bool:
        """Whether an estimator is biased on this program."""
        return estimator in self.banned.get(site, [])

    def estimator(self, site: str) -> Estimator:
        """The estimator of a site in the best setting."""
        return dict(self.best.chosen).get(site, self.bench.sites[site].estimator)

    def measure(self, settings: list[Setting], seconds: float) -> dict[Setting, Trial]:
        """Measure some objectives in turn, except those that cannot run the program."""
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
            end: The seconds left on the clock at which to stop.
            seconds: The time limit of this choice.
            contenders: How many of the options that were tried before to try again, the best ones; None for all.
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
        self.best = self._race(racers, own_end, end, unit.signal)
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
            if self.compilations and before - end < median(self.compilations) and setting != self.best:  # some also learn, for longer
                return None
            self.clock.show(unit.name)
            try:
                self.trials[setting] = Trial(self.bench.gradients(setting), self.scale)
            except (ValueError, NotImplementedError) as refusal:
                self.refused[setting] = str(refusal)
                return None
            self.compilations.append(before - self.clock.left())
        return self.trials[setting]

    def _race(self, racers: Mapping[Setting, Trial], own_end: float, end: float, signal: float) -> Setting:
        """The setting of least score, by successive halving: in each round the remaining settings get twice as many batches.

        The best setting so far wins if its score is not measurably larger than the least one; otherwise the first such racer wins.
        """
        racing = dict(racers)
        batches = max(FIRST, -(-FEWEST // self.size))
        while True:
            for trial in racing.values():
                while len(trial.times) < batches and (not trial.times or self.clock.left() > end):
                    trial.run()
            ordered = sorted(racing, key=lambda setting: racing[setting].score(signal))
            best = racing[ordered[0]]
            racing = {
                setting: racing[setting]
                for i, setting in enumerate(ordered)
                if not self._is_worse(racing[setting], best, i, len(ordered), signal)
            }
            alike = all(trial is best or sum(trial.excess(best, signal)) < ALIKE for trial in racing.values())
            batches *= 2
            if len(racing) == 1 or (alike and batches > 2 * FIRST) or batches > BATCHES or self.clock.left() < own_end:
                in_order = [setting for setting in (self.best, *racers) if setting in racing]  # the simplest first
                return next((one for one in in_order if self._is_as_good(racing[one], best, signal)), ordered[0])

    def _is_worse(self, trial: Trial, best: Trial, rank: int, size: int, signal: float) -> bool:
        """Whether a trial drops out: clearly worse, or in the worse half and probably worse."""
        excess, error = trial.excess(best, signal)
        return trial is not best and (excess > CLEARLY * error if rank < size / 2 else excess > error) and excess > 0

    def _is_as_good(self, trial: Trial, best: Trial, signal: float) -> bool:
        """Whether a trial is good enough to be chosen because it is simpler than the best one."""
        excess, error = trial.excess(best, signal)
        return excess < _margin(error)


def _margin(error: float) -> float:
    """The difference of two scores that is needed for the less simple choice."""
    return max(ALIKE, min(CLEARLY * error, TOLERATED))


def ratio(a: Trial, b: Trial) -> tuple[float, float, float]:
    """The score of a over that of b, and its 95% interval."""
    excess, error = a.excess(b)
    return 1 + excess, max(1 + excess - 1.96 * error, 0.0), 1 + excess + 1.96 * error

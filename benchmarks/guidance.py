"""The findings of `check_program`, the choices of `recommend`, and the time of fits with these choices.

There are four studies, each with a table. `biases`: small programs with a bias planted at one site (`planted.py`), and whether
`check_program` finds it at the right site. `right`: false alarms on random programs whose estimators are right. `choices`: the choices
of `recommend` for many kinds of programs, their noise times time relative to the best of everything that it tried, measured again in
turn, and the gains. `races`: how soon fits with the choice and with the default come close to the best ELBO (`races.py`). All seconds
are CPU time, so a busy machine changes nothing. Each study takes ten to twenty minutes. `--only` selects the rows of a host, study or
program:

    python benchmarks/guidance.py
    python benchmarks/guidance.py --smoke
    python benchmarks/guidance.py --study right
    python benchmarks/guidance.py --only NumPyro biases
    python benchmarks/guidance.py --only Pyro choices "eight schools"
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter, process_time
from typing import Any

import jax
import numpy as np
import numpyro
import pyro
import torch
from planted import BIASES, NUM_STRUCTURES, Planted, parameter, right
from programs import HOSTS, NumPyro, Program, eight_schools, mixture_guide, noisy_cone
from races import CHECKPOINTS, CLOSE, SEEDS, SETTLED, STEP_SIZES, STEPS_OF_A_FIT, Side, race
from races import PROGRAMS as RACES
from tables import Options, figure, options, table
from timing import STEPS, use_one_thread
from variance import FUNCTIONS, expectation

import flowvi.guidance
import flowvi.numpyro.guidance
import flowvi.pyro.guidance
from flowvi import Auto
from flowvi.guidance import Checker, Recommendation, Search, Setting, Watch, advise
from flowvi.guidance.search import BATCHES
from flowvi.numpyro.guidance import PARTICLES as OF_NUMPYRO
from flowvi.numpyro.guidance import NumPyroBench
from flowvi.pyro.guidance import PARTICLES as OF_PYRO
from flowvi.pyro.guidance import PyroBench

CHECK, RIGHT, CHOICE, TRUTH = 10.0, 1.5, {"NumPyro": 40.0, "Pyro": 20.0}, 4.0  # seconds
NUM_RIGHT, CONFIDENCE = 100, 0.999  # in each host
NUM_PARTICLES, ADVICE = (1, 4, 16), 60.0  # the particles to choose from, and the seconds, before a race


def check(h: Any, planted: Planted, seconds: float) -> tuple[Any, float]:
    pyro.clear_param_store()
    model, guide, estimators = planted.make(h)
    start = perf_counter()
    return h.flow.check_program(model, guide, estimators=estimators, seconds=seconds), perf_counter() - start


def biases(asked: Options) -> None:
    about = f"Planted biases: the sites and the findings that `check_program` reports in at most {CHECK:.0f} seconds."
    with table("guidance_biases", asked, ("Host", "Bias", "Planted at", "Found at", "It says", "Samples", "Seconds"), about) as row:
        for h in HOSTS[:1] if asked.smoke else HOSTS:
            for name, planted in list(BIASES.items())[: 1 if asked.smoke else None]:
                if asked.wants(h.name, "biases", name):
                    found, seconds = check(h, planted, CHECK)
                    samples = max((one.test.num_samples for one in found.sites if one.test), default=0)
                    sites = ", ".join(f"`{one.site}`" for one in found.failed) or "none"
                    says = "; ".join(one.remark for one in found.failed)
                    row(h.name, name, f"`{planted.site}`", sites, says, samples, figure(seconds, ".1f"))


def check_right(h: Any, seed: int, seconds: float, compiled: dict[int, dict]) -> Any:
    """The check of a right program. In NumPyro programs of one structure share compiled code."""
    model, guide, estimators = right(seed).make(h)
    with bench_of(h, Program(model, guide), estimators, seconds=seconds) as (bench, particles), Watch(seconds, False) as clock:
        bench.compiled = compiled.setdefault(seed % NUM_STRUCTURES, {})
        return Checker(bench, Setting(num_particles=particles), CONFIDENCE, clock).run(seconds)


def false_alarms(asked: Options) -> None:
    about = f"False alarms on random programs whose estimators are right, each checked for at most {RIGHT:g} seconds."
    columns = ("Host", "Seeds", "Programs", "Sites compared", "False alarms", "Median detectable bias, of the gradient")
    with table("guidance_right", asked, columns, about) as row:
        for h in HOSTS[1:] if asked.smoke else HOSTS:
            compiled: dict[int, dict] = {}
            for first in range(0, NUM_RIGHT, NUM_STRUCTURES)[: 1 if asked.smoke else None]:
                seeds = range(first, first + (2 if asked.smoke else NUM_STRUCTURES))
                if asked.wants(h.name, "right", f"{first}-{first + NUM_STRUCTURES - 1}"):
                    found = {seed: check_right(h, seed, 1.0 if asked.smoke else RIGHT, compiled) for seed in seeds}
                    tests = [one.test for each in found.values() for one in each.sites if one.test is not None]
                    detectable = figure(float(np.median([test.detectable for test in tests])), ".2g")
                    alarms = [seed for seed, each in found.items() if each.failed]
                    which = f" ({', '.join(map(str, alarms))})" if alarms else ""
                    row(h.name, f"{seeds[0]} to {seeds[-1]}", len(seeds), len(tests), f"{len(alarms)}{which}", detectable)


# Programs to choose for.


def one_site(prior: Callable, guide: Callable, mean: Callable = lambda h, x: x) -> Callable[[Any], Program]:
    """A latent site with one observation."""

    def make(h):
        def model():
            x = h.ppl.sample("x", prior(h))
            h.ppl.sample("y", h.dist.Normal(mean(h, 1.0 * x), 0.7), obs=h.array(1.2))

        return Program(model, lambda: h.ppl.sample("x", guide(h)))

    return make


def mixed(h: Any) -> Program:
    """A discrete and a continuous site in one mean, and local sites in a plate."""
    y = h.array(np.array([0.3, 1.8, -0.4, 1.1]))

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(0.0), 1.0))
        with h.ppl.plate("data", 4):
            k = h.ppl.sample("k", h.dist.Bernoulli(h.array(0.5)))
            h.ppl.sample("y", h.dist.Normal(w + 1.5 * k, 0.6), obs=y)

    def guide():
        h.ppl.sample("w", h.dist.Normal(parameter(h, "loc", 0.2), parameter(h, "scale", 0.6, True)))
        logits = parameter(h, "logits", np.zeros(4))
        with h.ppl.plate("data", 4):
            h.ppl.sample("k", h.dist.Bernoulli(logits=logits))

    return Program(model, guide)


def uniform_logits(h: Any, size: int):
    return h.dist.Categorical(logits=h.array(np.zeros(size)))


CHOICES: dict[str, Callable[[Any], Program]] = {
    **{
        f"{name}, k = {k:g}": (lambda h, make=make, k=k: expectation(h, make, k))
        for name, (make, ks) in FUNCTIONS.items()
        for k in (ks[0], ks[-1])
    },
    "cos(20 x)": lambda h: expectation(h, FUNCTIONS["cos(k x)"][0], 20.0),
    "Bernoulli": one_site(lambda h: h.dist.Bernoulli(h.array(0.4)), lambda h: h.dist.Bernoulli(logits=parameter(h, "logits", 0.3))),
    "Categorical of 8": one_site(
        lambda h: uniform_logits(h, 8),
        lambda h: h.dist.Categorical(logits=parameter(h, "logits", np.linspace(-1, 1, 8))),
        lambda h, x: x / 3,
    ),
    "Categorical of 40": one_site(
        lambda h: uniform_logits(h, 40),
        lambda h: h.dist.Categorical(logits=parameter(h, "logits", np.linspace(-1, 1, 40))),
        lambda h, x: x / 15,
    ),
    "Poisson": one_site(lambda h: h.dist.Poisson(h.array(2.0)), lambda h: h.dist.Poisson(parameter(h, "rate", 1.5, True))),
    "Normal": one_site(
        lambda h: h.dist.Normal(h.array(0.0), 1.0),
        lambda h: h.dist.Normal(parameter(h, "loc", 0.2), parameter(h, "scale", 0.7, True)),
    ),
    "Gamma": one_site(
        lambda h: h.dist.Gamma(h.array(2.0), 1.0),
        lambda h: h.dist.Gamma(parameter(h, "a", 2.5, True), parameter(h, "b", 1.5, True)),
    ),
    "Beta": one_site(
        lambda h: h.dist.Beta(h.array(1.0), 1.0), lambda h: h.dist.Beta(parameter(h, "a", 2.0, True), parameter(h, "b", 1.5, True))
    ),
    "VonMises": one_site(
        lambda h: h.dist.VonMises(h.array(0.0), h.array(0.5)),
        lambda h: h.dist.VonMises(parameter(h, "loc", 0.3), parameter(h, "concentration", 2.0, True)),
        lambda h, x: h.xp.sin(x),
    ),
    "MultivariateNormal": one_site(
        lambda h: h.dist.MultivariateNormal(h.array(np.zeros(3)), scale_tril=h.array(np.eye(3))),
        lambda h: h.dist.MultivariateNormal(parameter(h, "loc", np.full(3, 0.2)), scale_tril=parameter(h, "tril", 0.6 * np.eye(3))),
        lambda h, x: x.sum(-1),
    ),
    "mixed": mixed,
    "mixture guide": lambda h: mixture_guide(h, h.dist.Normal),
    "eight schools": lambda h: eight_schools(h, h.dist.Normal),
    "noisy cone": lambda h: noisy_cone(h, h.dist.Normal),
}


@contextmanager
def bench_of(h: Any, program: Program, estimators: Any = None, steps: int = 0, seconds: float = math.inf) -> Iterator[tuple[Any, int]]:
    """The bench of a program after some steps of the default, and the number of particles of a check."""
    pyro.clear_param_store()
    params = None
    if steps:
        side = STEPS[h](program, h.flow.TraceFlow_ELBO(), rate=0.02)
        side.run(steps)
        params = side.svi.get_params(side.state) if h is NumPyro else None  # in Pyro the store has them
    if h is NumPyro:
        yield NumPyroBench(program.model, program.guide, program.args, {}, estimators, Auto(), params, None), OF_NUMPYRO
    else:
        with PyroBench.opened(program.model, program.guide, program.args, {}, estimators, Auto(), 0, seconds) as bench:
            yield bench, OF_PYRO


def chosen(advice: Recommendation, *num_particles: int) -> str:
    """The chosen estimators and entropy, as text; also the particles if there are several numbers to choose from."""
    number, how = advice.options["num_particles"], advice.options.get("particles", "independent")
    particles = f"; {number} {f'{how} particles' if number > 1 else 'particle'}" if num_particles else ""
    return ", ".join(f"`{site}`: {e}" for site, e in advice.estimators.items()) + f"; {advice.options['entropy']!r}{particles}"


def in_seconds() -> str:
    return " or ".join(f"{seconds:.0f} seconds ({host})" for host, seconds in CHOICE.items())


def over_the_best(search: Search, seconds: float) -> tuple[float, str, int]:
    """The score of the choice relative to the best of everything tried, measured again in turn; the best; the number tried."""
    trials = {setting: replace(trial, deviations=[], times=[]) for setting, trial in search.trials.items()}
    start = perf_counter()
    for _ in range(BATCHES):
        for trial in trials.values():
            trial.run()
        if perf_counter() - start > seconds:
            break
    best = min(trials, key=lambda setting: trials[setting].score())
    others = ", ".join(f"{name}: {e}" for name, e in best.chosen if search.estimator(name) != e)
    which = "" if best == search.best else f"{others or 'default'}; {best.entropy!r}"
    return trials[search.best].score() / trials[best].score(), which, len(trials)


def choices(asked: Options) -> None:
    about = (
        f"The choice of `recommend` in {in_seconds()}. Over the best: its noise x time over that of the best objective that it tried, "
        f"measured again in turn for {TRUTH:.0f} seconds. Default, host's own: noise x time of the default and of the host's own "
        "objective over that of the choice, with 95% intervals."
    )
    columns = ("Host", "Program", "Choice", "Tried", "Over the best", "Which is", "Default", "Host's own", "Seconds")
    with table("guidance_choices", asked, columns, about) as row:
        for h in HOSTS[1:] if asked.smoke else HOSTS:
            for name, make in CHOICES.items():
                if (asked.smoke and name != "Bernoulli") or not asked.wants(h.name, "choices", name):
                    continue
                with bench_of(h, make(h)) as (bench, particles), Watch(CHOICE[h.name], False) as clock:
                    search = Search(bench, 1, clock)
                    advice = advise(search, CHOICE[h.name], particles)
                    spent = CHOICE[h.name] - clock.left()
                    share, which, tried = over_the_best(search, TRUTH)
                gains = advice.gain_over_default, advice.gain_over_host or "refused"
                row(h.name, name, chosen(advice), tried, figure(share, ".2f"), which, *gains, figure(spent, ".0f"))


def in_steps(side: Side) -> str:
    """The steps of a side and its step size, as text."""
    return f"{figure(side.steps)} at {side.step_size}" if np.isfinite(side.steps) else f"more than {STEPS_OF_A_FIT}"


def sooner(asked: Options) -> None:
    about = (
        f"Fits that go on with what `recommend` chooses in {ADVICE:.0f} seconds after {SETTLED} steps of the default, with "
        f"{', '.join(map(str, NUM_PARTICLES))} particles to choose from, and fits by the default throughout: the steps to the best "
        f"ELBO less {CLOSE} nats, the first {SETTLED} included, at the best of {len(STEP_SIZES)} step sizes, for the mean of "
        f"{len(SEEDS)} seeds; "
        "the time of a recommended step over that of a default one, taken in "
        "turn, with its 95% interval; and how many times as long the default takes to that ELBO."
    )
    columns = ("Host", "Program", "Choice", "ELBO", "Steps", "Steps of the default", "Time of a step", "The default takes")
    with table("guidance_races", asked, columns, about) as row:
        for h in HOSTS[1:] if asked.smoke else HOSTS:
            for name, make in RACES.items():
                if (asked.smoke and name != "Poisson") or not asked.wants(h.name, "races", name):
                    continue
                with bench_of(h, make(h), steps=SETTLED) as (bench, particles), Watch(ADVICE, False) as clock:
                    search = Search(bench, NUM_PARTICLES, clock)
                    advice = advise(search, ADVICE, particles)
                elbo, plain = h.flow.TraceFlow_ELBO, h.flow.TraceFlow_ELBO()
                recommended = elbo(estimators=advice.estimators, **advice.options)
                elbos = (plain,) if search.best == search.default else (plain, recommended)
                found = race(h, make, elbos, *([CHECKPOINTS[:40]] if asked.smoke else []))
                steps = [in_steps(side) for side in (found.advised, found.default)]
                time = "{:.2f} ({:.2f} to {:.2f})".format(*found.time)
                gain = f"{figure(found.gain)} times as long" if np.isfinite(found.gain) else "longer than it was run"
                if found.default == found.advised:
                    gain = "equal: the choice is the default" if len(elbos) == 1 else "equal: it is there before the advice"
                row(h.name, name, chosen(advice, *NUM_PARTICLES), figure(found.target, ".2f"), *steps, time, gain)


STUDIES = {"biases": biases, "right": false_alarms, "choices": choices, "races": sooner}


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__file__, __doc__, argv, tuple(STUDIES))
    use_one_thread()
    for module in (flowvi.guidance, flowvi.numpyro.guidance, flowvi.pyro.guidance, sys.modules[__name__]):
        vars(module)["perf_counter"] = process_time
    numpyro.enable_x64()
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    for name, study in STUDIES.items():
        if asked.study in (None, name):
            study(asked._replace(command=f"{asked.command} --study {name}"))


if __name__ == "__main__":
    main()

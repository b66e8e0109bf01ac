"""How long SVI takes until the ELBO is close to the best known: within 0.1 nats or 0.1 %; autoencoders within 3 %, on images held out.

    Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO   the host's own objectives; in Pyro also JitTrace_ELBO
    TraceFlow_ELBO                                     flowvi's default; in Pyro also by CompiledSVI
    best                                               options of flowvi that are chosen by hand; in Pyro by CompiledSVI
    recommended                                        the choice of `recommend` at the start, in half a minute; in Pyro by CompiledSVI

All sides of a program have the same start, Adam, the same number of particles and the same grid of learning rates. A side gets the rate
with the fewest steps on two seeds; the table has three other seeds. An evaluation is the host's ELBO at fixed draws, by NumPyro for
both hosts. Each comes after ten per cent more steps than the one before. The best known ELBO is that of a longer run with a falling
rate.

Seconds are the median number of steps to the target times the CPU time of a step. The steps of all sides are timed in turn, so the load
of the machine matters little. Sides whose steps have the same distribution share the number of steps, which the fastest of them counts.
"Compiling" is the CPU time of the first steps. It is not part of the seconds, and neither is the time of `recommend`. Half an hour:

    python benchmarks/convergence.py
    python benchmarks/convergence.py --smoke
    python benchmarks/convergence.py --only Pyro "eight schools"
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from time import process_time
from typing import Any, NamedTuple

import convergence_programs as programs
import jax
import numpy as np
import numpyro.infer
import pyro
import pyro.infer
import torch
from programs import HOSTS, NumPyro, Program
from tables import figure, options, table
from timing import particles, use_one_thread
from torch._inductor.utils import fresh_cache

from flowvi import LR, RP, DisARM, Enumerate, ImplicitRP
from flowvi.numpyro import TraceFlow_ELBO, adaptive
from flowvi.pyro import CompiledSVI

FAR = 10.0  # nats above the target, which is impossible
TUNING, SHOWN = (101, 102), (0, 1, 2)  # seeds
SEARCH = 30.0  # seconds that `recommend` gets
STEPS = sorted({round(10 * 1.1**i) for i in range(70)})  # after which the ELBO is evaluated


class Case(NamedTuple):
    """A program and its sides.

    Attributes:
        make: The program.
        best: flowvi's best options.
        hosts_own: The host's objectives, by their names in NumPyro.
        particles: The number of particles.
        best_particles: The number of particles of the best options.
        images: The number of images over which the ELBO is averaged.
        rates: The grid of learning rates.
        most: The maximal number of steps.
        tolerance: The target is below the best known ELBO by this share of it, or by 0.1 nats if that is more.
        reference: The rates at the start and at the end of the run that finds the best known ELBO.
        draws: The particles of an evaluation.
        compiles: Whether a compiled step can draw its sites.
    """

    make: Callable[[Any, bool], Program]
    best: dict[str, Any]
    hosts_own: tuple[str, ...] = ("Trace_ELBO", "TraceMeanField_ELBO")
    particles: int = 10
    best_particles: int = 10
    images: int = 0
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 0.01)
    most: int = 3000
    tolerance: float = 0.001
    reference: tuple[float, float] = (0.03, 3e-4)
    draws: int = 500
    compiles: bool = True

    def in_words(self, options: dict[str, Any]) -> str:
        """Options of flowvi's, without those that all sides share or that are the default."""
        shared = {"num_particles": self.particles, "entropy": "full", "vectorize_particles": True, "max_plate_nesting": 1}
        return ", ".join(f"{key}={value!r}" for key, value in options.items() if shared.get(key) != value) or "the default"


OWN, SCORES = ("Trace_ELBO",), ("TraceGraph_ELBO",)
FULL_RANK: dict[str, Any] = {"rates": (0.01, 0.03, 0.003), "reference": (0.01, 1e-4)}
NETWORKS: dict[str, Any] = {"rates": (0.01, 0.003), "most": 3000, "tolerance": 0.03, "reference": (0.01, 1e-3), "draws": 5}
NETWORKS["images"] = len(programs.HELD_OUT)
CASES: dict[str, Case] = {
    "Bernoulli autoencoder": Case(
        programs.bernoulli_autoencoder, {"estimators": {"z": DisARM()}}, SCORES, particles=5, best_particles=1, **NETWORKS
    ),
    "eight schools": Case(programs.schools, {"particles": "stratified", "entropy": "analytic"}),
    "logistic regression": Case(programs.logistic_mean_field, {"estimators": {"w": RP(control_variate="cubic")}}),
    "Poisson, full rank": Case(programs.poisson_full_rank, {"particles": "stratified", "entropy": "stl"}, OWN, **FULL_RANK),
    "StudentT errors": Case(programs.student_t, {"particles": "stratified", "entropy": "analytic"}),
    "hierarchical, minibatches": Case(programs.hierarchical, {"particles": "stratified", "entropy": "stl"}, OWN),
    "binary latents": Case(programs.binary, {"estimators": {"z": Enumerate()}, "particles": "stratified"}, SCORES),
    "mixture guide": Case(programs.mixture, {"estimators": {"x": ImplicitRP()}}, SCORES),
    "directions": Case(programs.directions, {"default": LR()}, SCORES, compiles=False),
    "volatility, scan": Case(programs.volatility, {"entropy": "stl"}, OWN),
    "Gaussian autoencoder": Case(programs.gaussian_autoencoder, {"entropy": "analytic"}, particles=1, best_particles=1, **NETWORKS),
}


# A side in each host: it can start with a rate and a seed, run some steps, and return its parameters.


def seconds_to_compile(side: Any) -> float:
    """The CPU time of the first steps, the compiler's included."""
    side.restart(1e-3, 0)
    start = cpu_seconds()
    side.run(3)
    return cpu_seconds() - start


def cpu_seconds() -> float:
    """The CPU time of this process and of the child processes that have ended."""
    return sum(os.times()[:4])


class NumPyroSide:
    """Steps of NumPyro's SVI in one jitted loop, for all rates and seeds."""

    def __init__(self, program: Program, elbo: Any):
        self.rate: Any = 0.0
        guide = adaptive(program.guide, elbo) if isinstance(elbo, TraceFlow_ELBO) else program.guide
        self.svi = numpyro.infer.SVI(program.model, guide, numpyro.optim.Adam(lambda i: self.rate), elbo)

        def loop(state, rate, steps):
            self.rate = rate
            return jax.lax.fori_loop(0, steps, lambda _, carry: self.svi.update(carry[0]), (state, jax.numpy.zeros(())))

        self.loop = jax.jit(loop)
        self.start = cache(jax.jit(lambda seed: self.svi.init(jax.random.key(seed))))
        self.compiling = seconds_to_compile(self)

    def restart(self, rate: float, seed: int) -> None:
        self.rate_of_run, self.state = rate, self.start(seed)

    def run(self, steps: int) -> None:
        self.state, _ = jax.block_until_ready(self.loop(self.state, self.rate_of_run, steps))

    def params(self) -> dict[str, Any]:
        return self.svi.get_params(self.state)


class PyroSide:
    """Steps of Pyro's SVI or of CompiledSVI, with its own parameter store. All rates and seeds share the compiled graph."""

    def __init__(self, program: Program, elbo: Any, kind: Any):
        self.program, self.elbo, self.kind = program, elbo, kind
        self.store: Any = {"params": {}, "constraints": {}}
        self.svi: Any = None
        self.compiling = seconds_to_compile(self)

    def restart(self, rate: float, seed: int) -> None:
        pyro.set_rng_seed(seed)
        with pyro.get_param_store().scope(self.store):
            if self.svi is None:
                self.elbo.loss(*self.program[:2])
                self.start = {name: leaf.detach().clone() for name, leaf in self.leaves().items()}
            with torch.no_grad():
                for name, leaf in self.leaves().items():
                    leaf.copy_(self.start[name])
        if self.kind is CompiledSVI and self.svi is not None:
            self.svi.optimizer.state.clear()
            for group in self.svi.optimizer.param_groups:
                group["lr"] = rate
        else:
            self.svi = self.kind(*self.program[:2], pyro.optim.Adam({"lr": rate}), self.elbo)

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: value.unconstrained() for name, value in pyro.get_param_store().items()}

    def run(self, steps: int) -> None:
        with pyro.get_param_store().scope(self.store):
            for _ in range(steps):
                self.svi.step()

    def params(self) -> dict[str, Any]:
        with pyro.get_param_store().scope(self.store):
            return {name: value.detach().numpy() for name, value in pyro.get_param_store().items()}


def recommended(h: Any, program: Program, case: Case, smoke: bool) -> dict[str, Any]:
    """The options that `recommend` chooses at the start."""
    with pyro.get_param_store().scope():
        found = h.flow.recommend(
            program.model, program.guide, num_particles=case.particles, seconds=2.0 if smoke else SEARCH, progress_bar=False
        )
    return {**found.options, **({"estimators": dict(found.estimators)} if found.estimators else {})}


def sides(h: Any, name: str, smoke: bool) -> dict[str, tuple[str, Any]]:
    """The sides by name, each with the side that counts its steps."""
    case = CASES[name]
    program, mode = case.make(h, False), particles(h, case.particles)
    best, advice = {**particles(h, case.best_particles), **case.best}, recommended(h, program, case, smoke)
    chosen = {f"best: {case.in_words(best)}": best, f"recommended: {case.in_words(advice)}": advice}
    same_as_best = next(iter(chosen)) if case.best == {"entropy": "analytic"} else ""
    if h is NumPyro:
        elbos = {own: getattr(numpyro.infer, own)(**mode) for own in case.hosts_own} | {"TraceFlow_ELBO": TraceFlow_ELBO(**mode)}
        by = {"Trace_ELBO": "TraceFlow_ELBO", "TraceMeanField_ELBO": same_as_best or "TraceMeanField_ELBO"}
        found = {what: (by.get(what, what), NumPyroSide(program, elbo)) for what, elbo in elbos.items()}
        made = [best_in_numpyro(name), NumPyroSide(program, TraceFlow_ELBO(**advice))]
        return found | {what: (what, side) for what, side in zip(chosen, made, strict=True)}
    found = {}

    def add(what: str, elbo: Any, kind: Any = pyro.infer.SVI, counted: str = "") -> None:
        found[what] = counted or what, PyroSide(program, elbo, kind)

    compiled = "TraceFlow_ELBO, CompiledSVI" if case.compiles else ""
    jit = "JitTrace_ELBO" if case.compiles else ""
    counted = compiled if "Trace_ELBO" in case.hosts_own else jit
    add("Trace_ELBO", pyro.infer.Trace_ELBO(**mode), counted=counted)
    if jit:
        add(jit, pyro.infer.JitTrace_ELBO(**mode, ignore_jit_warnings=True), counted=counted)
    if "TraceMeanField_ELBO" in case.hosts_own:  # Pyro's JitTraceMeanField_ELBO compiles anew at each step
        add("TraceMeanField_ELBO", pyro.infer.TraceMeanField_ELBO(**mode), counted=same_as_best)
    add("TraceFlow_ELBO", h.flow.TraceFlow_ELBO(**mode), counted=compiled)
    if compiled:
        add(compiled, h.flow.TraceFlow_ELBO(**mode), CompiledSVI)
    for what, options_of_side in chosen.items():
        add(what, h.flow.TraceFlow_ELBO(**options_of_side), CompiledSVI if compiled else pyro.infer.SVI)
    return found


# The target.


class Target(NamedTuple):
    """An ELBO to reach, and a function that computes the ELBO of parameters."""

    elbo: float
    evaluate: Callable[[dict[str, Any]], float]


@cache
def best_in_numpyro(name: str) -> NumPyroSide:
    """flowvi's best options in NumPyro, which also find the best known ELBO."""
    case = CASES[name]
    return NumPyroSide(case.make(NumPyro, False), TraceFlow_ELBO(case.best_particles, **case.best))


@cache
def target_of(name: str, smoke: bool) -> Target:
    """The target: a little below the best ELBO of a long run with flowvi's best options and a falling rate."""
    case = CASES[name]
    model, guide, _ = case.make(NumPyro, True)
    own = numpyro.infer.Trace_ELBO(case.draws)
    loss = jax.jit(lambda params: own.loss(jax.random.key(1), params, model, guide) / max(case.images, 1))

    def evaluate(params: dict[str, Any]) -> float:
        return -float(loss(params))

    side = best_in_numpyro(name)
    side.restart(0.0, 100)
    elbos = []
    for rate in np.geomspace(*case.reference, 3 if smoke else 60):
        side.rate_of_run = float(rate)
        side.run(2 if smoke else case.most // 45)
        elbos.append(evaluate(side.params()))
    best = max(elbos)
    return Target(best - max(case.tolerance * abs(best), 0.0 if case.images else 0.1), evaluate)


# Counting and timing.


def steps_to(target: Target, side: Any, rate: float, seed: int, most: float) -> float:
    """The number of steps to the target; infinity if it takes more than ``most``."""
    side.restart(rate, seed)
    done = 0
    for at in STEPS:
        if at > most:
            break
        try:
            side.run(at - done)
        except ValueError:  # Pyro's validation, if a rate is so large that the fit diverges
            break
        done, elbo = at, target.evaluate(side.params())
        if not elbo < target.elbo + FAR:  # rounding, if the fit has diverged
            break
        if elbo >= target.elbo:
            return at
    return math.inf


def tune(target: Target, side: Any, rates: tuple[float, ...], most: int) -> float | None:
    """The rate with the fewest steps on two seeds together; None if no rate reaches the target."""
    fewest, best = 2.0 * most, None
    for rate in rates:
        steps = 0.0
        for seed in TUNING:
            steps += steps_to(target, side, rate, seed, min(most, fewest - steps))
            if steps >= fewest:
                break
        if steps < fewest:
            fewest, best = steps, rate
    return best


def seconds(side: Any, steps: int) -> float:
    start = process_time()
    side.run(steps)
    return process_time() - start


def in_turn(all_sides: list[Any], rounds: int, duration: float) -> np.ndarray:
    """CPU seconds of a step of each side, of shape (rounds, sides). The order is reversed in every round."""
    numbers = []
    for side in all_sides:
        steps = 1
        while (spent := seconds(side, steps)) < duration / 2:
            steps *= 2
        numbers.append(max(1, round(steps * duration / spent)))
    times = np.empty((rounds, len(all_sides)))
    order = list(enumerate(zip(all_sides, numbers, strict=True)))
    for i in range(rounds):
        for j, (side, steps) in order if i % 2 else reversed(order):
            times[i, j] = seconds(side, steps) / steps
    return times


class Row(NamedTuple):
    """The result of one side."""

    rate: float | None
    steps: list[float]
    step: float
    compiling: float

    def seconds(self) -> float:
        return float(np.median(self.steps)) * self.step


def measure(h: Any, name: str, smoke: bool) -> dict[str, Row]:
    case, target = CASES[name], target_of(name, smoke)
    most = 20 if smoke else case.most
    found = sides(h, name, smoke)
    times = np.median(in_turn([side for _, side in found.values()], *((2, 0.002) if smoke else (9, 0.02))), 0)
    counted: dict[str, tuple[float | None, list[float]]] = {}
    for by in dict.fromkeys(by for by, _ in found.values()):
        side = found[by][1]
        rate = tune(target, side, case.rates, most)
        counted[by] = rate, [math.inf if rate is None else steps_to(target, side, rate, seed, most) for seed in SHOWN]
    return {what: Row(*counted[by], time, side.compiling) for (what, (by, side)), time in zip(found.items(), times, strict=True)}


# The table.


def shown(x: float, most: float, form: str = ".2g") -> str:
    return figure(x, form) if math.isfinite(x) else f"> {figure(most, form)}"


def rows(h: Any, name: str, smoke: bool, row: Callable[..., None]) -> dict[str, float]:
    """Print the rows of a program, and return by kind how many times sooner flowvi's sides are than the host's best."""
    found, most = measure(h, name, smoke), CASES[name].most
    ours = [what for what in found if what.startswith(OURS)]
    host = min((found[what] for what in found if what not in ours), key=lambda r: (r.seconds(), r.step))
    sooner = {}
    for what, r in found.items():
        times = min(host.seconds(), most * host.step) / r.seconds()
        sooner[what] = times
        row(
            name,
            what,
            r.rate or "",
            ", ".join(shown(n, most, ".0f") for n in r.steps),
            figure(1e3 * r.step),
            shown(r.seconds(), most * r.step),
            ("" if math.isfinite(host.seconds()) else "> ") + figure(times, ".2g") if math.isfinite(r.seconds()) else "",
            f"{r.compiling:.1f}",
        )
    return {kind: max(sooner[what] for what in ours if what.startswith(start)) for kind, start in zip(KINDS, OURS, strict=True)}


OURS, KINDS = ("TraceFlow", "best", "recommended"), ("default", "best", "recommendation")
COLUMNS = (
    "Program",
    "Objective",
    "Rate",
    "Steps, three seeds",
    "ms a step",
    "Seconds",
    "Times sooner than the host's best",
    "Compiling (s)",
)
ABOUT = "Until the ELBO is within 0.1 nats or 0.1 % of the best known (autoencoders: 3 %, on images held out); compilation is apart."
AIMS = {"NumPyro": 3, "Pyro": 8}


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    for h in HOSTS:
        sooner = []
        with fresh_cache(), table(f"convergence_{h.name.lower()}", options_given, COLUMNS, ABOUT) as row:
            for name in ("mixture guide",) if options_given.smoke else CASES:
                if options_given.wants(h.name, name) and (h is NumPyro or "scan" not in name):
                    sooner.append(rows(h, name, options_given.smoke, row))
            for what in KINDS if sooner else ():
                median = figure(float(np.median([s[what] for s in sooner])), ".2g")
                aim = f", aim: {AIMS[h.name]}" if what == "best" else ""
                row("median over the programs", f"flowvi's {what}{aim}", "", "", "", "", median, "")


if __name__ == "__main__":
    main()

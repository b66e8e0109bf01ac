"""Training where the cost jumps: the year in which coal mines became safer, and a thermostat.

In the change point, the likelihood jumps at each of 111 years. In the thermostat, each temperature decides whether the heater is on. A
row has the ELBO in nats after a number of steps (larger is better), as its mean and standard error over seeds, each from 1000 draws. It
also has the CPU milliseconds of one step. Every fit has four particles and Adam. NumPyro runs five seeds at once; Pyro runs two, one
after the other. Pyro's steps are those of JitTraceFlow_ELBO(backend="eager"), which runs torch operations only: the 223 evaluations of
the change point take no Python, and no compiler. About eight minutes; NumPyro alone takes two:

    python benchmarks/jumps.py
    python benchmarks/jumps.py --smoke
    python benchmarks/jumps.py --only NumPyro
    python benchmarks/jumps.py --only Pyro thermostat
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import process_time
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import pyro
from jax import random
from programs import HOSTS, NumPyro, Pyro
from tables import figure, options, table
from timing import particles, use_one_thread

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Flow, fields
from flowvi.estimators import Estimator

# British coal-mining disasters with ten or more deaths in each of the years from 1851 to 1961 (Jarrett 1979; the dates of `coal` in
# the R package boot)
DISASTERS = np.array(
    [int(n) for n in "454104340633402633545314415534252234213221111300101100310322011101010002100011023311211112330001400010000010010"]
)
YEARS = np.arange(len(DISASTERS))
THRESHOLD, HOURS = 19.0, 8
TEMPERATURES = np.array([17.2, 19.4, 17.6, 20.3, 18.1, 16.9, 19.9, 18.6])
SEEDS: dict[Any, int] = {NumPyro: 5, Pyro: 2}
OBJECTIVES: dict[Any, Callable[..., Any]] = {
    NumPyro: flowvi.numpyro.TraceFlow_ELBO,
    Pyro: partial(flowvi.pyro.JitTraceFlow_ELBO, backend="eager"),
}


class Study(NamedTuple):
    """A program, its sites with a jump of the cost, where the jumps are, and a mask that is 0 there."""

    model: Callable[[], Any]
    guide: Callable[[], Any]
    sites: list[str]
    jumps: list[float]
    mask: Callable[[Any, Any], Any]
    rate: float


def normal(h: Any, name: str, loc: float, scale: float) -> Any:
    """A Normal site of the guide."""
    log_scale = h.ppl.param(f"{name}_log_scale", h.array(np.log(scale)))
    return h.ppl.sample(name, h.dist.Normal(h.ppl.param(f"{name}_loc", h.array(loc)), h.xp.exp(log_scale)))


def change_point(h: Any) -> Study:
    years, disasters = h.array(YEARS), h.array(DISASTERS)

    def model():
        year = h.ppl.sample("year", h.dist.Normal(h.array(55.0), 30.0))
        early, late = (h.ppl.sample(name, h.dist.Normal(h.array(0.0), 1.0)) for name in ("early", "late"))
        rates = h.xp.exp(h.xp.where(year[..., None] > years, early[..., None], late[..., None]))
        h.ppl.sample("disasters", h.dist.Poisson(rates).to_event(1), obs=disasters)

    def guide():
        normal(h, "year", 70.0, 10.0)
        for name in ("early", "late"):
            normal(h, name, 0.5, 0.2)

    return Study(model, guide, ["year"], [float(year) for year in YEARS], lambda x, p: h.xp.sin(np.pi * x) ** 2, 0.1)


def thermostat(h: Any) -> Study:
    names = [f"x{hour}" for hour in range(HOURS)]

    def model():
        expected, noise = h.array(19.0), 2.0
        for hour, name in enumerate(names):
            x = h.ppl.sample(name, h.dist.Normal(expected, noise))
            h.ppl.sample(f"y{hour}", h.dist.Normal(x, 1.5), obs=h.array(TEMPERATURES[hour]))
            expected, noise = x + h.xp.where(x > THRESHOLD, -1.5, 2.0), 0.7

    def guide():
        for name in names:
            normal(h, name, THRESHOLD, 1.0)

    return Study(model, guide, names, [THRESHOLD], lambda x, p: 1 - h.xp.exp(-(((x - THRESHOLD) / 0.5) ** 2)), 0.03)


def estimators(study: Study) -> dict[str, Estimator]:
    return {
        "RP, which is wrong": RP(),
        "LR": LR(),
        "a masked field": Flow(fields.masked(study.mask, fields.location_scale())),
        "RP(jumps=...)": RP(jumps=study.jumps),
    }


STUDIES = {"change point": change_point, "thermostat": thermostat}


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    checkpoints, draws = ([1, 2], 20) if options_given.smoke else ([100, 300, 1000], 1000)
    columns = ("host", "program", "estimator", "evaluations", *(f"{n} steps" for n in checkpoints), "ms a step")
    over = ", ".join(f"{number} seeds in {h.name}" for h, number in SEEDS.items())
    about = f"The ELBO by steps of training: mean and standard error over {over}; larger is better."
    with table("jumps", options_given, columns, about) as row:
        for h in HOSTS:
            seeds = 2 if options_given.smoke else SEEDS[h]
            for name, make in STUDIES.items():
                study = make(h)
                for label, estimator in estimators(study).items():
                    if not options_given.wants(h.name, name, label):
                        continue
                    pyro.clear_param_store()
                    given = {"estimators": dict.fromkeys(study.sites, estimator), "default": RP(), "dependencies": "graph"}
                    elbo = OBJECTIVES[h](**particles(h, 4), **given)
                    evaluations = elbo.describe(study.model, study.guide).evaluations
                    value = h.flow.TraceFlow_ELBO(**particles(h, draws), default=RP())
                    bounds, seconds = TRAIN[h](study, elbo, value, checkpoints, seeds)
                    cells = [f"{figure(b.mean(), '.2f')} ± {figure(b.std(ddof=1) / np.sqrt(seeds), '.2f')}" for b in bounds]
                    row(h.name, name, label, evaluations, *cells, f"{1e3 * seconds:.2f}")


def together(study: Study, elbo: Any, value: Any, checkpoints: list[int], seeds: int) -> tuple[list[np.ndarray], float]:
    """In NumPyro: the ELBO of each seed at each checkpoint, and the seconds of one step of one seed."""
    svi = numpyro.infer.SVI(study.model, study.guide, numpyro.optim.Adam(study.rate), elbo)

    def advance(state: Any, steps: int) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, state: svi.update(state)[0], state)

    @jax.jit
    def bound(state: Any) -> jax.Array:
        return -value.loss(random.key(0), svi.get_params(state), study.model, study.guide)

    run = jax.jit(jax.vmap(advance, (0, None)))
    state = jax.vmap(svi.init)(random.split(random.key(0), seeds))
    jax.block_until_ready(run(state, 1))  # compiles before the timing
    bounds, spent = [], 0.0
    for steps in np.diff([0, *checkpoints]):
        start = process_time()
        state = jax.block_until_ready(run(state, int(steps)))
        spent += process_time() - start
        bounds.append(np.array(jax.lax.map(bound, state)))
    return bounds, spent / (checkpoints[-1] * seeds)


def in_turn(study: Study, elbo: Any, value: Any, checkpoints: list[int], seeds: int) -> tuple[list[np.ndarray], float]:
    """The same in Pyro, where all seeds share one graph."""

    def begin(seed: int) -> Any:
        pyro.clear_param_store()
        study.guide()  # creates the parameters that the graph uses
        pyro.set_rng_seed(seed)
        return pyro.infer.SVI(study.model, study.guide, pyro.optim.Adam({"lr": study.rate}), elbo)

    svi = begin(0)
    for _ in range(2):  # traces before the timing
        svi.step()
    bounds, spent = np.empty((len(checkpoints), seeds)), 0.0
    for seed in range(seeds):
        svi = begin(seed)
        for i, steps in enumerate(np.diff([0, *checkpoints])):
            start = process_time()
            for _ in range(steps):
                svi.step()
            spent += process_time() - start
            bounds[i, seed] = -value.loss(study.model, study.guide)
    return list(bounds), spent / (checkpoints[-1] * seeds)


TRAIN = {NumPyro: together, Pyro: in_turn}

if __name__ == "__main__":
    main()

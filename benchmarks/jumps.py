"""Training where the cost jumps: the year in which coal mines became safer, and a thermostat.

In the change point, the likelihood jumps at each of 111 years. In the thermostat, each temperature decides whether the heater is on. A
row holds the ELBO after a number of steps, in nats, as its mean over 5 seeds with the standard error, each from 1000 draws (larger is
better), and the milliseconds of one step. All take four particles, the same seeds and Adam. In NumPyro, where all seeds run at once;
about two minutes:

    python benchmarks/jumps.py
    python benchmarks/jumps.py --smoke
    python benchmarks/jumps.py --only thermostat
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from tables import figure, options, table
from timing import use_one_thread

from flowvi import LR, RP, Flow, fields
from flowvi.estimators import Estimator
from flowvi.numpyro import TraceFlow_ELBO

# British coal-mining disasters with ten or more deaths in each of the years from 1851 to 1961 (Jarrett 1979)
DISASTERS = np.array(
    [int(n) for n in "454014340633402633545314415534252234213221111300101100310322011101010002100011023311211112420014000100000100101"]
)
YEARS = np.arange(len(DISASTERS))
THRESHOLD, HOURS = 19.0, 8
TEMPERATURES = np.array([17.2, 19.4, 17.6, 20.3, 18.1, 16.9, 19.9, 18.6])


class Study(NamedTuple):
    """A program, the sites at which its cost jumps, where it does, and a mask that is 0 there."""

    model: Callable[[], Any]
    guide: Callable[[], Any]
    sites: list[str]
    jumps: list[float]
    mask: Callable[[Any, Any], Any]
    rate: float


def normal(name: str, loc: float, scale: float) -> jax.Array:
    """A Normal site of the guide."""
    log_scale = numpyro.param(f"{name}_log_scale", np.log(scale))
    return numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", loc), jnp.exp(log_scale)))


def change_point() -> Study:
    def model():
        year = numpyro.sample("year", dist.Normal(55.0, 30.0))
        early, late = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("early", "late"))
        rates = jnp.exp(jnp.where(year > YEARS, early, late))
        numpyro.sample("disasters", dist.Poisson(rates).to_event(1), obs=DISASTERS)

    def guide():
        normal("year", 70.0, 10.0)
        for name in ("early", "late"):
            normal(name, 0.5, 0.2)

    return Study(model, guide, ["year"], [float(year) for year in YEARS], lambda x, p: jnp.sin(jnp.pi * x) ** 2, 0.1)


def thermostat() -> Study:
    names = [f"x{hour}" for hour in range(HOURS)]

    def model():
        expected, noise = 19.0, 2.0
        for hour, name in enumerate(names):
            x = numpyro.sample(name, dist.Normal(expected, noise))
            numpyro.sample(f"y{hour}", dist.Normal(x, 1.5), obs=TEMPERATURES[hour])
            expected, noise = x + jnp.where(x > THRESHOLD, -1.5, 2.0), 0.7

    def guide():
        for name in names:
            normal(name, THRESHOLD, 1.0)

    return Study(model, guide, names, [THRESHOLD], lambda x, p: 1 - jnp.exp(-(((x - THRESHOLD) / 0.5) ** 2)), 0.03)


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
    checkpoints, seeds, draws = ([1, 2], 2, 20) if options_given.smoke else ([100, 300, 1000], 5, 1000)
    columns = ("program", "estimator", "evaluations", *(f"{n} steps" for n in checkpoints), "ms a step")
    about = f"The ELBO after so many steps, mean and standard error over {seeds} seeds; larger is better."
    with table("jumps", options_given, columns, about) as row:
        for name, make in STUDIES.items():
            study = make()
            for label, estimator in estimators(study).items():
                if not options_given.wants(name, label):
                    continue
                elbo = TraceFlow_ELBO(4, estimators=dict.fromkeys(study.sites, estimator), default=RP())
                evaluations = elbo.describe(study.model, study.guide).evaluations
                bounds, seconds = train(study, elbo, checkpoints, seeds, draws)
                cells = [f"{figure(b.mean(), '.2f')} ± {figure(b.std(ddof=1) / np.sqrt(seeds), '.2f')}" for b in bounds]
                row(name, label, evaluations, *cells, f"{1e3 * seconds:.2f}")


def train(study: Study, elbo: TraceFlow_ELBO, checkpoints: list[int], seeds: int, draws: int) -> tuple[list[np.ndarray], float]:
    """For each checkpoint the ELBO of each seed, and the seconds of one step of one seed."""
    svi = numpyro.infer.SVI(study.model, study.guide, numpyro.optim.Adam(study.rate), elbo)
    value = TraceFlow_ELBO(draws, default=RP())

    def advance(state: Any, steps: int) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, state: svi.update(state)[0], state)

    @jax.jit
    def bound(state: Any) -> jax.Array:
        return -value.loss(random.key(0), svi.get_params(state), study.model, study.guide)

    run = jax.jit(jax.vmap(advance, (0, None)))
    state = jax.vmap(svi.init)(random.split(random.key(0), seeds))
    jax.block_until_ready(run(state, 1))  # compiled before it is timed
    bounds, spent = [], 0.0
    for steps in np.diff([0, *checkpoints]):
        start = perf_counter()
        state = jax.block_until_ready(run(state, int(steps)))
        spent += perf_counter() - start
        bounds.append(np.array(jax.lax.map(bound, state)))
    return bounds, spent / (checkpoints[-1] * seeds)


if __name__ == "__main__":
    main()

"""Time of a step with sites that the model sums out: flowvi against the hosts' TraceEnum_ELBO.

Every site of the guide is reparameterized, so both sides compute the same loss and the same gradient. A row has the median over rounds
of the ratio of times, its 95% bootstrap interval, the target, and the microseconds of one step. The two sides run in turn. About two
minutes:

    python benchmarks/marginal.py
    python benchmarks/marginal.py --smoke
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.contrib.funsor
import pyro
from programs import HOSTS, NumPyro, Program
from tables import options, table
from timing import STEPS, alternate, median_interval, use_one_thread, verdict

TARGET = 1.1
COLUMNS = ("host", "program", "particles", "time / TraceEnum_ELBO", "95% interval", "target", "verdict", "µs / µs")


def points(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=n) + 4.0 * rng.integers(-1, 2, n)


def label(h: Any, name: str, probs: Any) -> Any:
    return h.ppl.sample(name, h.dist.Categorical(probs), infer={"enumerate": "parallel"})


def spread(h: Any, name: str, value: Any) -> Any:
    return h.ppl.param(name, h.array(value), constraint=h.dist.constraints.positive)


def mixture(h: Any) -> Program:
    """A thousand points of three Gaussians."""
    y = h.array(points(1000))

    def model():
        weight = h.ppl.sample("weight", h.dist.Dirichlet(h.array(np.ones(3))))
        with h.ppl.plate("components", 3):
            loc = h.ppl.sample("loc", h.dist.Normal(h.array(0.0), 5.0))
        with h.ppl.plate("data", 1000):
            z = label(h, "z", weight)
            h.ppl.sample("y", h.dist.Normal(loc[z], 1.0), obs=y)

    def guide():
        h.ppl.sample("weight", h.dist.Dirichlet(spread(h, "concentration", np.ones(3))))
        with h.ppl.plate("components", 3):
            loc = h.ppl.param("locs", h.array([-3.0, 0.5, 3.0]))
            h.ppl.sample("loc", h.dist.Normal(loc, spread(h, "scales", 0.1 * np.ones(3))))

    return Program(model, guide)


def chain(h: Any) -> Program:
    """A hidden Markov model of ten steps, four chains of it."""
    y = h.array(points(40).reshape(10, 4))
    markov = numpyro.contrib.funsor.markov if h is NumPyro else pyro.markov

    def model():
        with h.ppl.plate("states", 3):
            transition = h.ppl.sample("transition", h.dist.Dirichlet(h.array(np.ones(3))))
            loc = h.ppl.sample("loc", h.dist.Normal(h.array(0.0), 5.0))
        chains, z = h.ppl.plate("chains", 4), 0
        for t in markov(range(10)):
            with chains:
                z = label(h, f"z_{t}", transition[z])
                h.ppl.sample(f"y_{t}", h.dist.Normal(loc[z], 1.0), obs=y[t])

    def guide():
        with h.ppl.plate("states", 3):
            h.ppl.sample("transition", h.dist.Dirichlet(spread(h, "concentration", np.ones((3, 3)))))
            loc = h.ppl.param("locs", h.array([-3.0, 0.5, 3.0]))
            h.ppl.sample("loc", h.dist.Normal(loc, spread(h, "scales", 0.1 * np.ones(3))))

    return Program(model, guide)


PROGRAMS = {"mixture of 1,000": mixture, "chain of 10": chain}


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    rounds, duration = (2, 0.002) if options_given.smoke else (25, 0.02)
    about = "Time of a step relative to the host's TraceEnum_ELBO."
    with table("marginal", options_given, COLUMNS, about) as row:
        for h in HOSTS:
            for name, program in PROGRAMS.items():
                for k in (
                    (1, 10) if h is NumPyro and program is mixture and not options_given.smoke else (1,)
                ):  # several particles run in a loop in Pyro
                    if (options_given.smoke and h is NumPyro and program is chain) or not options_given.wants(h.name, name, k):
                        continue
                    how = {"num_particles": k} if h is NumPyro else {"num_particles": k, "max_plate_nesting": 1}
                    sides = [STEPS[h](program(h), elbo(**how)) for elbo in (h.flow.TraceFlow_ELBO, h.ppl.infer.TraceEnum_ELBO)]
                    times = alternate(*sides, rounds, duration)
                    median, low, high = median_interval(times[:, 0] / times[:, 1])
                    took = " / ".join(f"{1e6 * t:.0f}" for t in np.median(times, axis=0))
                    row(h.name, name, k, f"{median:.3f}", f"{low:.3f} to {high:.3f}", TARGET, verdict(TARGET, median, low), took)


if __name__ == "__main__":
    main()

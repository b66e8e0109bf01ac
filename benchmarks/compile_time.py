"""Compile time of a program of 50 discrete sites: flowvi's graph of dependencies against NumPyro's TraceGraph_ELBO.

The guide draws 50 Bernoulli sites, each from logits of its own; in the model each site leads to the next one and to an observation.
Both sides trace the program twice, once to find out what depends on what. A row holds the median over rounds, in turn, of the
seconds for tracing `SVI.update` and compiling it, and of the microseconds of one step, with the ratio flowvi / host (at most 1.10
and 1.05 are aimed at):

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --smoke
"""

from __future__ import annotations

import argparse
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceGraph_ELBO

from flowvi.numpyro import TraceFlow_ELBO


def program(sites: int):
    observed = jnp.linspace(-1.0, 1.0, sites)

    def model():
        z = 0.0
        for i in range(sites):
            z = numpyro.sample(f"z{i}", dist.Bernoulli(logits=0.5 * z))
            numpyro.sample(f"y{i}", dist.Normal(1.0 * z, 1.0), obs=observed[i])

    def guide():
        for i in range(sites):
            numpyro.sample(f"z{i}", dist.Bernoulli(logits=numpyro.param(f"logits{i}", 0.0)))

    return model, guide


def measure(elbo, model, guide) -> tuple[float, float, float]:
    """Seconds of tracing, seconds of compiling, microseconds of a step."""
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), elbo)
    state = svi.init(jax.random.key(0))
    start = perf_counter()
    lowered = jax.jit(lambda state: svi.update(state)[0]).lower(state)
    traced = perf_counter()
    update = lowered.compile()
    compiled = perf_counter()
    times = []
    for _ in range(200):
        begun = perf_counter()
        state = jax.block_until_ready(update(state))
        times.append(perf_counter() - begun)
    return traced - start, compiled - traced, 1e6 * float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one round with 5 sites, to see that it runs")
    sites, rounds = (5, 1) if parser.parse_args().smoke else (50, 5)
    model, guide = program(sites)
    sides = {"flowvi": TraceFlow_ELBO, "host": TraceGraph_ELBO}
    found = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            found[name].append(measure(sides[name](), model, guide))
    ours, theirs = (np.median(found[name], axis=0) for name in sides)
    for i, what in enumerate(("seconds of tracing", "seconds of compiling", "microseconds of a step")):
        print(f"{what:<26}{ours[i]:>10.3f}{theirs[i]:>10.3f}   ratio {ours[i] / theirs[i]:.3f}")
    ours, theirs = (side[0] + side[1] for side in (ours, theirs))
    print(f"{'seconds of both':<26}{ours:>10.3f}{theirs:>10.3f}   ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()

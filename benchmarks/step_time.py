"""Step time of flowvi against the hosts' own ELBOs.

For NumPyro and for Pyro, on eight schools (non-centred) and on logistic regression (breast cancer, 31 weights), both with a
mean-field Normal guide, it prints one row for each ratio:

    RP / Trace_ELBO        every site RP in flowvi, against the host
    Flow / RP              the pathwise field of the Normal as an elementwise Flow, against RP, both in flowvi
    LR / TraceGraph_ELBO   every site LR in flowvi, against the host, where the Normal has no reparameterized sampler
    IWAE / RenyiELBO       the importance-weighted bound with every site RP, against the host, with several particles

A row holds the median over rounds of time / time, its 95% bootstrap interval, the target, and the microseconds of one step. The
two sides run in one process and in turn, the order swapped every round. A target is "met" if the median is within it, "noise" if
only the interval reaches it, else "missed". For NumPyro a step is a call of the jitted `SVI.update`, or one turn of a jitted loop
over it (as in `SVI.run`: no time goes to the calls); a row also holds the optimised HLO instructions of the value and gradient of
the two losses. For Pyro a step is `SVI.step`, with the host's validation on (the default there) or off.

Run all of it (about four minutes) or a few seconds of it:

    python benchmarks/step_time.py
    python benchmarks/step_time.py --smoke
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.infer
import pyro
import pyro.infer
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from sklearn.datasets import load_breast_cancer

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Flow

FLOW = Flow(loc=lambda x, p: 1.0, scale=lambda x, p: (x - p.loc) / p.scale)
FLOW_TARGET, GRAPH_TARGET, BOUND_TARGET = 1.25, 1.05, 1.05


# Programs, written once for both hosts: `host` is numpyro or pyro, `xp` is jax.numpy or torch.


class Program(NamedTuple):
    model: Callable
    guide: Callable


def normal_site(host, xp, family, name: str, event: int | None = None):
    """One mean-field site of a guide: a scalar within the plates around it, or an event of a given size."""
    shape = () if event is None else (event,)
    loc = host.param(f"{name}_loc", xp.zeros(shape))
    scale = host.param(f"{name}_scale", xp.full(shape, 0.1), constraint=host.distributions.constraints.positive)
    fn = family(loc, scale)
    host.sample(name, fn if event is None else fn.to_event(1))


def eight_schools(host, xp, family) -> Program:
    normal = host.distributions.Normal
    effect = xp.asarray([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = xp.asarray([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = host.sample("mu", normal(0.0, 5.0))
        log_tau = host.sample("log_tau", normal(1.0, 1.0))
        with host.plate("schools", 8):
            z = host.sample("z", normal(0.0, 1.0))
            host.sample("effect", normal(mu + xp.exp(log_tau) * z, error), obs=effect)

    def guide():
        normal_site(host, xp, family, "mu")
        normal_site(host, xp, family, "log_tau")
        loc = host.param("z_loc", xp.zeros(8))
        scale = host.param("z_scale", xp.full((8,), 0.5), constraint=host.distributions.constraints.positive)
        with host.plate("schools", 8):
            host.sample("z", family(loc, scale))

    return Program(model, guide)


def logistic_regression(host, xp, family) -> Program:
    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    features, labels = xp.asarray(x.T, dtype=xp.float32), xp.asarray(y, dtype=xp.float32)

    def model():
        w = host.sample("w", host.distributions.Normal(xp.zeros(31), 1.0).to_event(1))
        host.sample("y", host.distributions.Bernoulli(logits=w @ features).to_event(1), obs=labels)

    def guide():
        normal_site(host, xp, family, "w", event=31)

    return Program(model, guide)


PROGRAMS = {"eight schools": eight_schools, "logistic regression": logistic_regression}


# Hosts: the same few names over each, and how to run n steps there.


class ScoreNormal(numpyro.distributions.Normal):
    """A Normal without a reparameterized sampler."""

    reparametrized_params: tuple[str, ...] = ()

    def sample(self, key, sample_shape=()):
        return jax.lax.stop_gradient(super().sample(key, sample_shape))


class NumPyro:
    name = "NumPyro"
    host, xp, score_family = numpyro, jnp, ScoreNormal
    elbo, bound = flowvi.numpyro.TraceFlow_ELBO, flowvi.numpyro.TraceFlow_RenyiELBO
    rp_target = 1.02
    modes = ({"num_particles": 1}, {"num_particles": 10})
    steps = ("call", "loop")

    def __init__(self, program: Program, elbo: Any, step: str):
        self.svi = numpyro.infer.SVI(*program, numpyro.optim.Adam(1e-3), elbo)
        self.state = self.svi.init(jax.random.key(0))
        self.step = step
        self.update = jax.jit(lambda state: self.svi.update(state)[0])
        self.loop = jax.jit(lambda state, n: jax.lax.fori_loop(0, n, lambda _, state: self.svi.update(state)[0], state))

    def run(self, steps: int) -> None:
        if self.step == "loop":
            self.state = jax.block_until_ready(self.loop(self.state, steps))
        else:
            for _ in range(steps):
                self.state = jax.block_until_ready(self.update(self.state))

    def instructions(self) -> int:
        """The optimised HLO instructions of the value and gradient of the loss."""

        def loss(params, key):
            return self.svi.loss.loss(key, self.svi.constrain_fn(params), self.svi.model, self.svi.guide)

        params = self.svi.optim.get_params(self.state.optim_state)
        text = jax.jit(jax.value_and_grad(loss)).lower(params, jax.random.key(0)).compile().as_text()
        return len(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


class Pyro:
    name = "Pyro"
    host, xp, score_family = pyro, torch, NonreparameterizedNormal
    elbo, bound = flowvi.pyro.TraceFlow_ELBO, flowvi.pyro.TraceFlow_RenyiELBO
    rp_target = 1.05
    modes = (
        {"num_particles": 1},
        {"num_particles": 10, "vectorize_particles": False},
        {"num_particles": 10, "vectorize_particles": True, "max_plate_nesting": 1},
    )
    steps = ("validated", "plain")

    def __init__(self, program: Program, elbo: Any, step: str):
        pyro.clear_param_store()  # the two sides then share the parameters
        self.svi = pyro.infer.SVI(*program, pyro.optim.Adam({"lr": 1e-3}), elbo)
        self.validate = step == "validated"

    def run(self, steps: int) -> None:
        with pyro.validation_enabled(self.validate):
            for _ in range(steps):
                self.svi.step()


# Comparisons.


@dataclass(frozen=True)
class Comparison:
    """Two ways to serve the sites of one guide, as functions from an ELBO's options to an ELBO."""

    what: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    family: Any
    target: float | None


def comparisons(host: Any) -> list[Comparison]:
    def ours(estimator):
        return partial(host.elbo, default=estimator)

    normal, infer = host.host.distributions.Normal, host.host.infer
    return [
        Comparison("RP / Trace_ELBO", ours(RP()), infer.Trace_ELBO, normal, host.rp_target),
        Comparison("Flow / RP", ours(FLOW), ours(RP()), normal, FLOW_TARGET),
        Comparison("LR / TraceGraph_ELBO", ours(LR()), infer.TraceGraph_ELBO, host.score_family, GRAPH_TARGET),
        Comparison("IWAE / RenyiELBO", host.bound, infer.RenyiELBO, normal, BOUND_TARGET),
    ]


def seconds(side: Any, steps: int) -> float:
    start = perf_counter()
    side.run(steps)
    return perf_counter() - start


def steps_lasting(side: Any, duration: float) -> int:
    """How many steps take about so many seconds, after a warm-up."""
    side.run(2)
    steps = 1
    while (spent := seconds(side, steps)) < duration / 2:
        steps *= 2
    return max(1, round(steps * duration / spent))


def alternate(a: Any, b: Any, rounds: int, duration: float) -> np.ndarray:
    """Seconds per step of the two sides in each round, of shape (rounds, 2)."""
    a.run(2)
    steps = steps_lasting(b, duration)
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = seconds((a, b)[j], steps) / steps
    return times


def median_interval(x: np.ndarray) -> tuple[float, float, float]:
    """The median and its 95% bootstrap interval."""
    resampled = np.random.default_rng(0).choice(x, (2000, len(x)))
    return np.median(x), *np.quantile(np.median(resampled, axis=1), (0.025, 0.975))


# The table.

WIDTHS = {
    "host": 7,
    "program": 19,
    "particles": 9,
    "step": 9,
    "ratio of times": 20,
    "median": 6,
    "95% interval": 14,
    "target": 6,
    "": 6,
    "us / us": 15,
    "HLO / HLO": 11,
}


def print_row(cells: Iterable[str]) -> None:
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS.values(), strict=True)).rstrip(), flush=True)


def particles_of(mode: dict) -> str:
    loop = mode.get("vectorize_particles") is False
    return f"{mode['num_particles']} loop" if loop else str(mode["num_particles"])


def verdict(target: float | None, median: float, low: float) -> tuple[str, str]:
    if target is None:
        return "-", ""
    return f"{target:.2f}", "met" if median <= target else "noise" if low <= target else "missed"


def row(host: Any, name: str, mode: dict, comparison: Comparison, step: str, rounds: int, duration: float) -> Iterator[str]:
    program = PROGRAMS[name](host.host, host.xp, comparison.family)
    a, b = (host(program, elbo(**mode), step) for elbo in (comparison.ours, comparison.theirs))
    times = alternate(a, b, rounds, duration)
    median, low, high = median_interval(times[:, 0] / times[:, 1])
    yield from (host.name, name, particles_of(mode), step, comparison.what)
    yield from (f"{median:.3f}", f"{low:.3f} .. {high:.3f}", *verdict(comparison.target, median, low))
    yield " / ".join(f"{1e6 * t:.0f}" for t in np.median(times, axis=0))
    yield f"{a.instructions()} / {b.instructions()}" if step == "call" else ""


def bench(rounds: int, duration: float, most: int | None = None) -> None:
    """Print the table, of at most so many programs, modes and kinds of step."""
    print_row(WIDTHS)
    for host in (NumPyro, Pyro):
        for comparison, name, mode, step in product(comparisons(host), list(PROGRAMS)[:most], host.modes[:most], host.steps[:most]):
            if comparison.ours is host.bound and mode["num_particles"] == 1:
                continue
            print_row(row(host, name, mode, comparison, step, rounds, duration))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="short rounds of eight schools with one particle, to see that it runs")
    torch.set_num_threads(1)
    if parser.parse_args().smoke:
        bench(rounds=2, duration=0.005, most=1)
    else:
        bench(rounds=30, duration=0.02)

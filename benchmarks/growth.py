"""How the time of a step grows with particles, sites, the size of a plate, and the size of an event.

For each size, a row has the median over rounds of the time of one step, with half the width of its 95% bootstrap interval. The exponent
a of time ~ size^a is fitted to the medians of the last decade of sizes. The target is linear growth: an exponent of at most 1.1 is
"met", "noise" if only its interval reaches 1.1, else "missed". Rows of a host's own ELBO are for comparison. About four minutes:

    python benchmarks/growth.py
    python benchmarks/growth.py --smoke
    python benchmarks/growth.py --only particles Pyro LR
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from programs import HOSTS, NumPyro, Program, Pyro, chain, eight_schools, plate
from step_time import FLOW
from tables import Options, figure, options, table
from timing import STEPS, median_interval, particles, repeat, use_one_thread, verdict

from flowvi import LR, RP, Flow

TARGET = 1.1


class Line(NamedTuple):
    """One row: functions from a size to a program and to an objective."""

    h: Any
    what: str
    program: Callable[[int], Program]
    elbo: Callable[[int], Any]
    largest: int = 10**6
    ours: bool = True


def by_particles(h: Any) -> list[Line]:
    def line(what: str, elbo: Callable[..., Any], **more: Any) -> Line:
        return Line(h, what, lambda _: eight_schools(h, h.dist.Normal), lambda k: elbo(**particles(h, k)), **more)

    def ours(estimator: Any) -> Callable[..., Any]:
        return partial(h.flow.TraceFlow_ELBO, default=estimator)

    vimco = partial(h.flow.TraceFlow_RenyiELBO, default=LR())
    return [
        line("RP", ours(RP())),
        line("Flow", ours(FLOW)),
        line("LR", ours(LR())),
        line("IWAE", h.flow.TraceFlow_RenyiELBO),
        line("VIMCO", vimco, largest=1000),
        line("Trace_ELBO", h.ppl.infer.Trace_ELBO, ours=False),
    ]


def by_sites(h: Any) -> list[Line]:
    def line(what: str, elbo: Callable[..., Any], normal: Any = h.dist.Normal, **more: Any) -> Line:
        return Line(h, what, lambda n: chain(h, normal, n), lambda _: elbo(), **more)

    ours = h.flow.TraceFlow_ELBO
    return [
        line("RP", partial(ours, default=RP())),
        line("LR, graph", partial(ours, default=LR(), dependencies="graph")),
        *([line("LR, plates", partial(ours, default=LR(), dependencies="plates"))] if h is Pyro else []),
        line("Trace_ELBO", h.ppl.infer.Trace_ELBO, ours=False),
        line("TraceGraph_ELBO", h.ppl.infer.TraceGraph_ELBO, h.score_normal, ours=False),
    ]


def by_plate(h: Any) -> list[Line]:
    def line(what: str, elbo: Callable[..., Any], **more: Any) -> Line:
        return Line(h, what, lambda n: plate(h, h.dist.Normal, n, None), lambda _: elbo(), **more)

    def ours(estimator: Any) -> Callable[..., Any]:
        return partial(h.flow.TraceFlow_ELBO, estimators={"z": estimator})

    return [
        line("RP", ours(RP())),
        line("Flow", ours(FLOW)),
        line("LR", ours(LR())),
        line('LR(baseline="plate")', ours(LR(baseline="plate"))),
        line("Trace_ELBO", h.ppl.infer.Trace_ELBO, ours=False),
    ]


def vector(h: Any, size: int) -> Program:
    """One latent vector, and an observation of its sum."""
    unit = h.array(np.eye(size))

    def model():
        x = h.ppl.sample("x", h.dist.Normal(h.array(np.zeros(size)), 1.0).to_event(1))
        h.ppl.sample("y", h.dist.Normal(x.sum(-1), 1.0), obs=h.array(1.0))

    def guide():
        h.ppl.sample("x", h.dist.MultivariateNormal(h.ppl.param("x_loc", h.array(np.zeros(size))), scale_tril=unit))

    return Program(model, guide)


def velocity(x, p, dtheta):
    """A velocity whose every coordinate depends on all others."""
    return dtheta.loc * (1 + x.sum(-1)[..., None] ** 2)


def divergence(x, p, dtheta):
    return dtheta.loc.sum(-1) * 2 * x.sum(-1)


def by_event(h: Any) -> list[Line]:
    def line(what: str, elbo: Callable[..., Any], **more: Any) -> Line:
        return Line(h, what, lambda n: vector(h, n), lambda _: elbo(), **more)

    return [
        line("Flow(velocity)", partial(h.flow.TraceFlow_ELBO, default=Flow(velocity))),
        line("Flow(velocity, divergence=...)", partial(h.flow.TraceFlow_ELBO, default=Flow(velocity, divergence=divergence))),
        line("RP", partial(h.flow.TraceFlow_ELBO, default=RP())),
        line("Trace_ELBO", h.ppl.infer.Trace_ELBO, ours=False),
    ]


def trace(line: Line, size: int, rounds: int) -> np.ndarray:
    """Seconds to trace a step, by round."""
    side = STEPS[line.h](line.program(size), line.elbo(size))
    times = []
    for _ in range(rounds):
        jax.clear_caches()  # so that each round traces anew
        start = perf_counter()
        side.lower()
        times.append(perf_counter() - start)
    return np.array(times)


class Growth(NamedTuple):
    what: str
    lines: Callable[[Any], list[Line]]
    sizes: tuple[int, ...]
    about: str
    traced: bool = False


GROWTHS = (
    Growth(
        "particles",
        by_particles,
        (1, 10, 100, 1000, 10_000, 30_000, 100_000),
        "Eight schools: µs of a step, by the number of vectorized particles. VIMCO is the bound with LR at every site.",
    ),
    Growth(
        "sites",
        by_sites,
        (1, 4, 13, 40, 130, 400),
        "A chain, by its number of sites. Pyro: µs of a step. NumPyro: µs to trace a step, because XLA's part of the compilation is "
        "about the same on every side.",
        True,
    ),
    Growth("plate", by_plate, (10, 100, 1000, 10_000, 30_000, 100_000), "A plate of latents: µs of a step, by its size."),
    Growth("event", by_event, (1, 8, 26, 81, 256), "One MultivariateNormal site: µs of a step, by its size."),
)


def exponent(times: np.ndarray, sizes: Sequence[int], axis: int = 0) -> float:
    """The slope of log median time over log size, in the last decade of sizes."""
    last = np.array(sizes) >= sizes[-1] / 10
    return float(np.polyfit(np.log(sizes)[last], np.log(np.median(times, axis=axis))[last], 1)[0])


def cells(line: Line, growth: Growth, smoke: bool) -> list[str]:
    """A cell for each size, the exponent, its interval, and the verdict."""
    sizes = [size for size in growth.sizes if size <= line.largest][: 2 if smoke else None]
    rounds, duration = (2, 0.001) if smoke else (9, 0.02)
    times = []
    for size in sizes:
        if growth.traced and line.h is NumPyro:
            times.append(trace(line, size, 1 if smoke else 2))
        else:
            times.append(repeat(STEPS[line.h](line.program(size), line.elbo(size)), rounds, duration))
    shown = [f"{m:.0f} ± {(high - low) / 2:.0f}" for m, low, high in (median_interval(1e6 * t) for t in times)]
    slope, low, high = median_interval(np.stack(times, axis=1), partial(exponent, sizes=sizes))
    missing = [""] * (len(growth.sizes) - len(sizes))
    return [
        *shown,
        *missing,
        figure(slope, ".2f"),
        f"{figure(low, '.2f')} to {figure(high, '.2f')}",
        verdict(TARGET, slope, low) if line.ours else "",
    ]


def bench(options_given: Options, growth: Growth) -> None:
    columns = ("Host", "Estimator", *(f"{size:,}" for size in growth.sizes), "Exponent", "95% interval", "Verdict")
    with table(f"growth_{growth.what}", options_given, columns, growth.about) as row:
        for h in [HOSTS[(GROWTHS.index(growth) + 1) % 2]] if options_given.smoke else HOSTS:
            for line in growth.lines(h)[: 1 if options_given.smoke else None]:
                if options_given.wants(growth.what, h.name, line.what):
                    row(h.name, line.what, *cells(line, growth, options_given.smoke))


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    for growth in GROWTHS:
        bench(options_given, growth)


if __name__ == "__main__":
    main()

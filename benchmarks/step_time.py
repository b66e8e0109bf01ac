"""Time of a step of SVI: flowvi against the hosts' own ELBOs.

    RP / Trace_ELBO                every site RP in flowvi, against the host
    Flow / RP                      the pathwise field of the Normal as an elementwise Flow, against RP, both in flowvi
    LR / TraceGraph_ELBO           every site LR in flowvi, against the host with a Normal that has no reparameterized sampler
    LR, graph / TraceGraph_ELBO    the same with dependencies="graph", the default in NumPyro
    IWAE / RenyiELBO               the importance-weighted bound with every site RP, against the host

A row has the median over rounds of the ratio of times, its 95% bootstrap interval, the target, and the microseconds of one step. The
two sides run in one process and in turn. The order changes every round. If NumPyro's two sides have the same instructions (RP), each is
compiled several times, because two compilations of one program differ by a few per cent. A target is "met" if the median is within it,
"noise" if only the interval reaches it, else "missed". PLAN lists the comparisons on each program. About eight minutes:

    python benchmarks/step_time.py
    python benchmarks/step_time.py --smoke
    python benchmarks/step_time.py --only Pyro "eight schools" 10
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from programs import HOSTS, PROGRAMS, NumPyro, Pyro, names
from tables import Options, options, table
from timing import STEPS, alternate, median_interval_of_builds, particles, use_one_thread, verdict

from flowvi import LR, RP, Flow

FLOW = Flow(loc=lambda x, p: 1.0, scale=lambda x, p: (x - p.loc) / p.scale)


class Comparison(NamedTuple):
    """Two ways to estimate the gradient of one guide, as functions from an ELBO's options to an ELBO."""

    what: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    normal: Any
    target: float


def comparisons(h: Any) -> dict[str, Comparison]:
    def ours(estimator, **more):
        return partial(h.flow.TraceFlow_ELBO, default=estimator, **more)

    infer, normal, score = h.ppl.infer, h.dist.Normal, h.score_normal
    graph = ours(LR(), dependencies="graph")
    return {
        "RP": Comparison("RP / Trace_ELBO", ours(RP()), infer.Trace_ELBO, normal, 1.02 if h is NumPyro else 1.05),
        "Flow": Comparison("Flow / RP", ours(FLOW), ours(RP()), normal, 1.25),
        "LR": Comparison("LR / TraceGraph_ELBO", ours(LR()), infer.TraceGraph_ELBO, score, 1.05),
        "LR, graph": Comparison("LR, graph / TraceGraph_ELBO", graph, infer.TraceGraph_ELBO, score, 1.05),
        "IWAE": Comparison("IWAE / RenyiELBO", h.flow.TraceFlow_RenyiELBO, infer.RenyiELBO, normal, 1.05),
    }


# The comparisons on each program, and their numbers of particles. A bound needs at least two.
PLAN: dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {
    "noisy cone": [(("RP", "Flow", "LR"), (1, 10))],
    "eight schools": [(("RP", "Flow", "LR", "IWAE"), (1, 10, 100)), (("LR, graph",), (1, 10))],
    "logistic regression": [(("RP", "Flow", "LR", "IWAE"), (1, 10, 100))],
    "autoencoder": [(("RP", "Flow", "LR"), (1,)), (("RP", "LR", "IWAE"), (10,))],
    "mixture guide": [(("LR",), (1, 10, 100))],
    "chain of 50": [(("RP", "Flow", "LR", "LR, graph"), (1,))],
    "plate of 1,000": [(("RP", "Flow", "LR", "LR, graph"), (1,)), (("RP", "LR"), (10,))],
    "scan of 100": [(("RP", "LR"), (1, 10)), (("IWAE",), (10,))],
}

# With ten particles, this program also runs with calls of `SVI.update` instead of a loop inside JAX, without Pyro's validation, and
# with particles in a loop.
IN_DETAIL = "eight schools"
KINDS = {NumPyro: ("loop", "call"), Pyro: ("validated", "plain")}

COMPILATIONS = 3  # of each side, if both are the same program; the longest is compiled once
LONG = "chain of 50"

COLUMNS = ("Program", "Particles", "Step", "Ratio of times", "Median", "95% interval", "Target", "Verdict", "µs / µs")
ABOUT = {
    NumPyro: "A step is one iteration of a jitted loop over `SVI.update`, or a call of it. HLO: the instructions of a compiled step.",
    Pyro: "A step is a call of `SVI.step`, with Pyro's validation on (the default) or off. Particles are in a plate, or in a loop.",
}


def rows(h: Any, smoke: bool) -> Iterator[tuple[str, str, int, bool, str]]:
    """Program, comparison, number of particles, whether they run in a loop, and the kind of step."""
    for i, name in enumerate(names(h)):
        if smoke and h is NumPyro and name not in ("noisy cone", "mixture guide", "scan of 100"):  # others take longer to compile
            continue
        planned = [(what, k) for whats, numbers in PLAN[name] for what in whats for k in numbers if k > 1 or what != "IWAE"]
        planned = [(what, k) for what, k in planned if what != "LR, graph" or h is Pyro]
        if smoke:
            planned = planned[i % len(planned) :][:1]
        for what, k in planned:
            yield name, what, k, False, KINDS[h][0]
            if name == IN_DETAIL and k == 10 and not smoke:
                yield name, what, k, False, KINDS[h][1]
                if h is Pyro:
                    yield name, what, k, True, KINDS[h][0]


def measure(h: Any, name: str, comparison: Comparison, k: int, loop: bool, kind: str, rounds: int, duration: float) -> Iterator[str]:
    """The cells of one row."""
    program = PROGRAMS[name](h, comparison.normal)
    builds = COMPILATIONS if h is NumPyro and comparison.what == "RP / Trace_ELBO" and name != LONG and rounds > 2 else 1
    times = []
    for _ in range(builds):
        a, b = (STEPS[h](program, elbo(**particles(h, k, loop)), kind) for elbo in (comparison.ours, comparison.theirs))
        times.append(alternate(a, b, rounds // builds, duration))
    ratios = [part[:, 0] / part[:, 1] for part in times]
    median, low, high = median_interval_of_builds(ratios)
    yield from (name, f"{k} in a loop" if loop else str(k), kind, comparison.what)
    yield from (f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{comparison.target:.2f}", verdict(comparison.target, median, low))
    yield " / ".join(f"{1e6 * t:.0f}" for t in np.median(np.concatenate(times), axis=0))
    if h is NumPyro:
        yield " / ".join(str(side.instructions()) for side in (a, b)) if kind == "loop" else ""


def bench(options_given: Options, h: Any) -> None:
    rounds, duration = (2, 0.002) if options_given.smoke else (25, 0.02)
    columns = (*COLUMNS, "HLO / HLO") if h is NumPyro else COLUMNS
    with table(f"step_time_{h.name.lower()}", options_given, columns, ABOUT[h]) as row:
        for name, what, k, loop, kind in rows(h, options_given.smoke):
            if options_given.wants(h.name, name, what, k, kind):
                row(*measure(h, name, comparisons(h)[what], k, loop, kind, rounds, duration))


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    for h in HOSTS:
        bench(options_given, h)


if __name__ == "__main__":
    main()

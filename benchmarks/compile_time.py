"""The time before the first step of a program: flowvi against the hosts' own ELBOs.

For NumPyro, the seconds to trace `SVI.update` and to compile the trace. If sites have a score, both sides trace the program twice, once
to find the dependencies. For Pyro, which compiles nothing, the seconds of the first `SVI.step`.

A row has the median over rounds of the ratio of times, the lowest and the highest ratio, the target, and the median times. The two
sides are measured in turn, with new objects in each round. About three minutes:

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --smoke
    python benchmarks/compile_time.py --only NumPyro "eight schools"
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
from programs import HOSTS, PROGRAMS, NumPyro, Program, Pyro, names
from step_time import comparisons
from tables import options, table
from timing import STEPS, particles, use_one_thread, verdict

TARGET = 1.10
PLAN = {
    "noisy cone": ("RP", "LR"),
    "eight schools": ("RP", "LR", "IWAE"),
    "logistic regression": ("RP", "LR"),
    "autoencoder": ("RP", "LR", "IWAE"),
    "mixture guide": ("LR",),
    "chain of 50": ("LR",),
    "plate of 1,000": ("RP", "LR"),
    "scan of 100": ("RP", "LR"),
}
ROUNDS = {"NumPyro": 3, "Pyro": 15}
COLUMNS = (
    "Host",
    "Program",
    "Ratio of times",
    "Median",
    "Lowest to highest",
    "Target",
    "Verdict",
    "Tracing, s / s",
    "Compiling, s / s",
)
ABOUT = "In Pyro, which compiles nothing: the first step. IWAE has 10 particles, all other rows have one."


def measure(h: Any, program: Program, elbo: Any) -> tuple[float, float]:
    """The seconds to trace a step and to compile it; in Pyro those of the first step."""
    side = STEPS[h](program, elbo)
    start = perf_counter()
    if h is Pyro:
        side.run(1)
        return perf_counter() - start, 0.0
    lowered = side.lower()
    traced = perf_counter()
    lowered.compile()
    return traced - start, perf_counter() - traced


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    with table("compile_time", options_given, COLUMNS, ABOUT) as row:
        for h in HOSTS:
            for name in names(h)[: 1 if options_given.smoke else None]:
                for what in PLAN[name]:
                    comparison = comparisons(h)[what]
                    if not options_given.wants(h.name, name, what):
                        continue
                    program = PROGRAMS[name](h, comparison.normal)
                    mode = particles(h, 10 if what == "IWAE" else 1)
                    times = np.empty((1 if options_given.smoke else ROUNDS[h.name], 2, 2))
                    measure(h, program, comparison.theirs(**mode))  # warms up what both sides share
                    for i in range(len(times)):
                        for j in (0, 1) if i % 2 else (1, 0):
                            times[i, j] = measure(h, program, (comparison.ours, comparison.theirs)[j](**mode))
                    ratios = times.sum(2)[:, 0] / times.sum(2)[:, 1]
                    median, low, high = np.median(ratios), ratios.min(), ratios.max()
                    parts = [" / ".join(f"{t:.3f}" for t in part) for part in np.median(times, 0).T]
                    cells = (f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{TARGET:.2f}", verdict(TARGET, float(median), float(low)))
                    row(h.name, name, comparison.what, *cells, parts[0], parts[1] if h is NumPyro else "")


if __name__ == "__main__":
    main()

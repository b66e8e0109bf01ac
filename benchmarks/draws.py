"""How much the unrolled random generator saves in NumPyro on CPUs: the time of a step relative to NumPyro's own objective.

Both sides make the same draws. Times are CPU times. The two sides run in one process and in turn, and the order changes every round.
The compilation is that of one step. The last row is the median over the others. About three minutes:

    python benchmarks/draws.py
    python benchmarks/draws.py --smoke
    python benchmarks/draws.py --only "eight schools" RP
"""

from __future__ import annotations

from time import process_time

import numpy as np
from programs import PROGRAMS, NumPyro
from step_time import comparisons
from tables import options, table
from timing import NumPyroSteps, median_interval, verdict

PLAN = [
    *[(name, what, 10) for name in ("noisy cone", "eight schools", "logistic regression") for what in ("RP", "LR")],
    ("mixture guide", "LR", 10),
    *[(name, what, 1) for name in ("plate of 1,000", "scan of 100") for what in ("RP", "LR")],
    ("noisy cone", "RP", 64),
]
TARGETS = {64: 0.5}  # by number of particles; otherwise 0.6, for the median over programs
COLUMNS = ("Program", "Particles", "Ratio of times", "Median", "95% interval", "Target", "Verdict", "µs / µs", "Compilation, s / s")
ABOUT = "A step is one iteration of a jitted loop over `SVI.update`. Times are CPU times."


def seconds(side: NumPyroSteps, steps: int) -> float:
    start = process_time()
    side.run(steps)
    return process_time() - start


def measure(sides: list[NumPyroSteps], rounds: int, duration: float) -> np.ndarray:
    """Seconds of a step of each side, by round."""
    steps = 2
    while (spent := seconds(sides[1], steps)) < duration / 2:
        steps *= 2
    steps = max(1, round(steps * duration / spent))
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = seconds(sides[j], steps) / steps
    return times


def compile_time(side: NumPyroSteps) -> float:
    start = process_time()
    side.run(1)
    return process_time() - start


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    rounds, duration = (2, 0.002) if options_given.smoke else (21, 0.02)
    medians = []
    with table("draws", options_given, COLUMNS, ABOUT) as row:
        for name, what, k in PLAN[:2] if options_given.smoke else PLAN:
            if not options_given.wants(name, what, k):
                continue
            comparison = comparisons(NumPyro)[what]
            program = PROGRAMS[name](NumPyro, comparison.normal)
            sides = [NumPyroSteps(program, elbo(num_particles=k)) for elbo in (comparison.ours, comparison.theirs)]
            compilation = [compile_time(side) for side in sides]
            times = measure(sides, rounds, duration)
            median, low, high = median_interval(times[:, 0] / times[:, 1])
            target = TARGETS.get(k, 0.6)
            medians += [median] if k not in TARGETS else []
            cells = (f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{target:.2f}", verdict(target, median, low))
            shown = " / ".join(f"{1e6 * t:.0f}" for t in np.median(times, 0))
            row(name, k, comparison.what, *cells, shown, " / ".join(f"{t:.2f}" for t in compilation))
        if medians:
            median = float(np.median(medians))
            row("median", "", "", f"{median:.3f}", "", "0.60", verdict(0.6, median, median), "", "")


if __name__ == "__main__":
    main()

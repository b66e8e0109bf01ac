"""Time of compiled steps in Pyro against steps of SVI with its own Trace_ELBO, ten particles at once, and the time to compile.

    CompiledSVI         flowvi's step: loss, gradient and one fused Adam
    backend="eager"     the same without a compiler: it runs the operations of the graph one by one
    JitTraceFlow_ELBO   flowvi's compiled loss and gradient in Pyro's SVI, with its Adam
    JitTrace_ELBO       Pyro's own compiled objective in its SVI

A row has the median over rounds of the ratio of CPU times, its 95% bootstrap interval, the target, and the microseconds of one step.
The denominator is a step of SVI with Trace_ELBO and with Pyro's validation on, its default. Both sides run in one process and in turn.
The order changes every round. "Compiling" is the time of the step that compiles, with an empty cache and then with the filled one. In
the first row the C++ compiler also prepares its headers. About two minutes:

    python benchmarks/compiled_pyro.py
    python benchmarks/compiled_pyro.py --smoke
    python benchmarks/compiled_pyro.py --only "eight schools" CompiledSVI
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any

import numpy as np
import pyro
import torch
import torch._inductor.compile_fx
from programs import PROGRAMS, Program, Pyro
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from tables import Options, figure, options, table
from timing import PyroSteps, median_interval, particles, steps_lasting, use_one_thread, verdict
from torch._inductor.utils import fresh_cache

from flowvi.pyro import CompiledSVI, JitTraceFlow_ELBO, TraceFlow_ELBO

PARTICLES = particles(Pyro, 10)


def eight_schools(h: Any, normal: Any) -> Program:
    """Under an AutoNormal guide."""
    model = PROGRAMS["eight schools"](h, normal).model
    return Program(model, AutoNormal(model, create_plates=lambda: pyro.plate("schools", 8)))


def autoencoder(h: Any, normal: Any) -> Program:
    """The autoencoder with tensors as arguments: Pyro's own compiled objectives take nothing else."""
    model, guide, (images, batch) = PROGRAMS["autoencoder"](h, normal)
    return Program(lambda images: model(images, batch), lambda images: guide(images, batch), (images,))


# Each program with the targets of CompiledSVI.
MEASURED: dict[str, tuple[Callable[..., Program], float]] = {
    "eight schools, AutoNormal": (eight_schools, 0.12),
    "logistic regression": (PROGRAMS["logistic regression"], 0.18),
    "mixture guide": (PROGRAMS["mixture guide"], 0.22),
    "autoencoder": (autoencoder, 0.55),
}


class CompiledSteps:
    """Calls of ``CompiledSVI.step``."""

    def __init__(self, program: Program, backend: Any = "inductor"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.args = program.args
        self.svi = CompiledSVI(
            program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), TraceFlow_ELBO(**PARTICLES), backend=backend
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.svi.step(*self.args)


SIDES: dict[str, Callable[[Program], Any]] = {
    "CompiledSVI": CompiledSteps,
    'CompiledSVI, backend="eager"': lambda program: CompiledSteps(program, "eager"),
    "JitTraceFlow_ELBO": lambda program: PyroSteps(program, JitTraceFlow_ELBO(**PARTICLES)),
    "JitTrace_ELBO": lambda program: PyroSteps(program, JitTrace_ELBO(ignore_jit_warnings=True, **PARTICLES)),
}
COLUMNS = ("Program", "Step", "Median ratio", "95% interval", "Target", "Verdict", "µs / µs", "Compiling (s)")
ABOUT = "The CPU time of a step over that of `SVI.step` with `Trace_ELBO(num_particles=10, vectorize_particles=True)`."


def cpu_seconds() -> float:
    """The CPU time of this process and of the child processes that have ended."""
    return sum(os.times()[:4])


def alternate_cpu(a: Any, b: Any, rounds: int, duration: float) -> np.ndarray:
    """CPU seconds of a step of the two sides in each round, of shape (rounds, 2)."""
    sides = [(side, steps_lasting(side, duration)) for side in (a, b)]
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            side, steps = sides[j]
            start = process_time()
            side.run(steps)
            times[i, j] = (process_time() - start) / steps
    return times


def seconds_to_compile(program: Program) -> Iterator[float]:
    """The CPU time of the second step, which compiles; with an empty cache, and then with the filled one."""
    for _ in range(2):
        torch.compiler.reset()
        steps = CompiledSteps(program)
        steps.run(1)
        start = cpu_seconds()
        steps.run(1)
        yield cpu_seconds() - start


def bench(options_given: Options) -> None:
    rounds, duration = (2, 0.002) if options_given.smoke else (15, 0.02)
    with fresh_cache(), table("compiled_pyro", options_given, COLUMNS, ABOUT) as row:
        for name, (make, target) in MEASURED.items():
            if options_given.smoke and name != "mixture guide":
                continue
            program = make(Pyro, pyro.distributions.Normal)
            for what, side in SIDES.items():
                if not options_given.wants(name, what):
                    continue
                compiling = " / ".join(figure(s, ".1f") for s in seconds_to_compile(program)) if what == "CompiledSVI" else ""
                ours, theirs = side(program), PyroSteps(program, Trace_ELBO(**PARTICLES))
                ours.run(5)  # Pyro's own compiles in the first three
                times = alternate_cpu(ours, theirs, rounds, duration)
                median, low, high = median_interval(times[:, 0] / times[:, 1])
                aim = target if what == "CompiledSVI" else None
                row(
                    name,
                    what,
                    f"{median:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    "" if aim is None else f"{aim:.2f}",
                    verdict(aim, median, low),
                    " / ".join(f"{1e6 * t:.0f}" for t in np.median(times, axis=0)),
                    compiling,
                )


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    bench(options_given)


if __name__ == "__main__":
    main()

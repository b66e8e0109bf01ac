"""How times are measured: steps of SVI in both hosts, two sides in turn, medians with their intervals, verdicts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from time import perf_counter
from typing import Any

import jax
import numpy as np
import numpyro.infer
import pyro
import pyro.infer
import torch
from programs import NumPyro, Program, Pyro


class NumPyroSteps:
    """Steps of NumPyro's SVI.

    A step is a call of the jitted ``SVI.update`` (kind ``"call"``), or one iteration of a jitted loop over it (``"loop"``, as in
    ``SVI.run``; the calls then take no time). The loss is kept, as in ``SVI.run``, so that XLA computes its value too.
    """

    def __init__(self, program: Program, elbo: Any, kind: str = "loop", rate: float = 1e-3):
        model, guide, args = program
        self.svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(rate), elbo)
        self.state = self.svi.init(jax.random.key(0), *args)
        self.kind = kind

        def update(state):
            return self.svi.update(state, *args)

        def loop(state, steps):
            return jax.lax.fori_loop(0, steps, lambda _, carry: update(carry[0]), (state, jax.numpy.zeros(())))

        self._step = jax.jit(update) if kind == "call" else jax.jit(loop)
        self._arguments = () if kind == "call" else (1,)

    def run(self, steps: int) -> None:
        if self.kind == "call":
            for _ in range(steps):
                self.state, _ = jax.block_until_ready(self._step(self.state))
        else:
            self.state, _ = jax.block_until_ready(self.compiled(self.state, steps))

    @cached_property
    def compiled(self) -> Any:
        return self.lower().compile()

    def lower(self) -> Any:
        """Trace the step."""
        return self._step.lower(self.state, *self._arguments)

    def instructions(self) -> int:
        """The optimised HLO instructions of a step."""
        return len(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = ", self.compiled.as_text(), re.MULTILINE))


class PyroSteps:
    """Calls of Pyro's ``SVI.step``, with validation on (kind ``"validated"``, Pyro's default) or off (``"plain"``)."""

    def __init__(self, program: Program, elbo: Any, kind: str = "validated", rate: float = 1e-3):
        pyro.clear_param_store()  # so that two sides of one program share its parameters
        pyro.set_rng_seed(0)
        self.svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": rate}), elbo)
        self.args, self.validate = program.args, kind == "validated"

    def run(self, steps: int) -> None:
        with pyro.validation_enabled(self.validate):
            for _ in range(steps):
                self.svi.step(*self.args)


STEPS: dict[Any, Callable[..., Any]] = {NumPyro: NumPyroSteps, Pyro: PyroSteps}


def use_one_thread() -> None:
    torch.set_num_threads(1)


def particles(h: Any, number: int, loop: bool = False) -> dict[str, Any]:
    """The options of an objective for a number of particles, vectorized or in a loop."""
    if number == 1 or h is NumPyro:
        return {"num_particles": number}
    return {"num_particles": number} if loop else {"num_particles": number, "vectorize_particles": True, "max_plate_nesting": 1}


def seconds(side: Any, steps: int) -> float:
    start = perf_counter()
    side.run(steps)
    return perf_counter() - start


def steps_lasting(side: Any, duration: float) -> int:
    """The number of steps that take about ``duration`` seconds, after a warm-up."""
    side.run(2)
    steps = 1
    while (spent := seconds(side, steps)) < duration / 2:
        steps *= 2
    return max(1, round(steps * duration / spent))


def repeat(side: Any, rounds: int, duration: float) -> np.ndarray:
    """Seconds of a step, by round."""
    steps = steps_lasting(side, duration)
    return np.array([seconds(side, steps) / steps for _ in range(rounds)])


def alternate(a: Any, b: Any, rounds: int, duration: float) -> np.ndarray:
    """Seconds of a step of both sides, of shape (rounds, 2). The side that goes first changes every round."""
    a.run(2)
    steps = steps_lasting(b, duration)
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = seconds((a, b)[j], steps) / steps
    return times


def median_interval(x: np.ndarray, statistic: Callable[..., Any] = np.median) -> tuple[float, float, float]:
    """The median over the first axis, or a statistic like it, and its 95% bootstrap interval."""
    which = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    return (float(statistic(x, axis=0)), *map(float, np.quantile([statistic(x[i], axis=0) for i in which], (0.025, 0.975))))


def median_interval_of_builds(parts: list[np.ndarray]) -> tuple[float, float, float]:
    """The median over all rounds of several builds, and its 95% bootstrap interval over builds and rounds."""
    rng = np.random.default_rng(0)

    def again() -> float:
        builds = rng.integers(len(parts), size=len(parts))
        return float(np.median(np.concatenate([rng.choice(parts[i], len(parts[i])) for i in builds])))

    low, high = np.quantile([again() for _ in range(2000)], (0.025, 0.975))
    return float(np.median(np.concatenate(parts))), float(low), float(high)


def verdict(target: float | None, median: float, low: float) -> str:
    """Whether the median is within the target ("met"), only the interval reaches it ("noise"), or neither ("missed")."""
    return "" if target is None else "met" if median <= target else "noise" if low <= target else "missed"

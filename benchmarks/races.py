"""How soon a fit comes close to the best ELBO: with the choice of `recommend` once there is one, and with the default throughout.

A choice is made for the parameters after `SETTLED` steps of the default, so both sides start with these steps. Then one side goes on
with the choice, and with a new optimizer. For each side, the steps to the best ELBO minus `CLOSE` nats are counted, as a mean over
seeds and at the best step size. They are multiplied by the CPU time of a step. The steps are timed in turn, so a busy machine hardly
matters. NumPyro computes all ELBOs from the parameters of the fit, which have the same names in both hosts, with the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any, NamedTuple

import discrete
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
from programs import NumPyro, Program, eight_schools, logistic_regression, mixture_guide, noisy_cone
from timing import STEPS, median_interval, steps_lasting

from flowvi.numpyro import TraceFlow_ELBO, adaptive

CLOSE = 0.1  # nats
STEP_SIZES, SEEDS = (0.02, 0.05, 0.15), (0, 1)
SETTLED, STEPS_OF_A_FIT = 200, 2000  # steps before the advice, and in all
CHECKPOINTS = np.unique(
    [SETTLED, *np.geomspace(1, STEPS_OF_A_FIT, 120).round().astype(int)]
)  # the steps after which a fit is evaluated
PARTICLES = 2000  # of an evaluation
ROUNDS, ROUND = 21, 0.02  # rounds of timing in turn, and the seconds of each


PROGRAMS: dict[str, Callable[[Any], Program]] = {
    "noisy cone": lambda h: noisy_cone(h, h.dist.Normal),
    "eight schools": lambda h: eight_schools(h, h.dist.Normal),
    "logistic regression": lambda h: logistic_regression(h, h.dist.Normal),
    "mixture guide": lambda h: mixture_guide(h, h.dist.Normal),
    "noisy cone, two branches": discrete.mixed_cone,
    "four Bernoullis": discrete.joint,
    "a hundred Bernoullis": discrete.local,
    "Poisson": discrete.counts,
}


class Side(NamedTuple):
    """One of the two objectives.

    Attributes:
        steps: The number of steps to the target, with those before the advice, at the best step size; infinity if no fit reached it.
        step_size: The best step size.
    """

    steps: float
    step_size: float


class Race(NamedTuple):
    """The result.

    Attributes:
        target: The ELBO to reach.
        default: The side of ``TraceFlow_ELBO()``.
        advised: The side of the recommendation.
        time: The time of a recommended step over that of a default one: the median and its 95% interval.
    """

    target: float
    default: Side
    advised: Side
    time: tuple[float, float, float]

    @property
    def gain(self) -> float:
        """The time of the default over that of the recommendation."""
        before = min(self.advised.steps, SETTLED)
        return self.default.steps / (before + (self.advised.steps - before) * self.time[0])


def race(h: Any, make: Callable[[Any], Program], elbos: tuple[Any, ...], checkpoints: np.ndarray = CHECKPOINTS) -> Race:
    """Fit a program with the default and with the recommended objective, or only once if both are the same."""
    program, evaluate = make(h), evaluator(make)
    programs = [program._replace(guide=adaptive(program.guide, elbo)) if h is NumPyro else program for elbo in elbos]
    curves: list[dict[float, np.ndarray]] = [{} for _ in elbos]  # the mean ELBO over the seeds
    for i, of_side in enumerate(curves, 1):
        for step_size in STEP_SIZES:
            sides = [STEPS[h](one, elbo, rate=step_size) for one, elbo in zip(programs[:i], elbos, strict=False)]
            of_side[step_size] = np.mean([evaluate(fit(h, sides, program.args, seed, checkpoints)) for seed in SEEDS], 0)
    target = max(float(np.nanmax(curve)) for of_side in curves for curve in of_side.values()) - CLOSE
    found = [best_side(of_side, target, checkpoints) for of_side in curves]
    if len(found) == 1:
        return Race(target, found[0], found[0], (1.0, 1.0, 1.0))
    default, advised = (STEPS[h](one, elbo) for one, elbo in zip(programs, elbos, strict=True))
    times = step_times(advised, default)
    return Race(target, found[0], found[1], median_interval(times[:, 0] / times[:, 1]))


def step_times(a: Any, b: Any) -> np.ndarray:
    """CPU seconds of equally many steps of two sides, of shape (rounds, 2). The side that goes first changes every round."""
    a.run(2)
    steps, times = steps_lasting(b, ROUND), np.empty((ROUNDS, 2))
    for i in range(ROUNDS):
        for j in (0, 1) if i % 2 else (1, 0):
            start = process_time()
            (a, b)[j].run(steps)
            times[i, j] = process_time() - start
    return times


def fit(h: Any, sides: list[Any], args: tuple, seed: int, checkpoints: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The parameters after each of some numbers of steps; the first side makes those before the advice, the last one the others."""
    side = sides[0]
    if h is NumPyro:
        side.state = side.svi.init(jax.random.key(seed), *args)
    else:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        side.svi.optim = pyro.optim.Adam(side.svi.optim.pt_optim_args)
        side.svi.evaluate_loss(*args)  # creates the parameters
    at, done = [], 0
    for checkpoint in checkpoints:
        if done == SETTLED and side is not sides[-1]:
            found, side = parameters(h, side), sides[-1]
            if h is NumPyro:
                side.state = side.svi.init(jax.random.key(seed), *args, init_params=found)
            else:
                side.svi.optim = pyro.optim.Adam(side.svi.optim.pt_optim_args)
        side.run(int(checkpoint) - done)
        at.append({name: np.array(value.detach() if h is not NumPyro else value) for name, value in parameters(h, side).items()})
        done = int(checkpoint)
    return at


def parameters(h: Any, side: Any) -> dict[str, Any]:
    return side.svi.get_params(side.state) if h is NumPyro else dict(pyro.get_param_store().items())


def evaluator(make: Callable[[Any], Program]) -> Callable[[list[dict[str, np.ndarray]]], np.ndarray]:
    """A function that computes the ELBO at each of several parameters."""
    program = make(NumPyro)
    elbo = numpyro.infer.Trace_ELBO(PARTICLES)
    svi = numpyro.infer.SVI(program.model, program.guide, numpyro.optim.SGD(1.0), TraceFlow_ELBO())
    names = set(svi.get_params(svi.init(jax.random.key(0), *program.args)))

    @jax.jit
    def elbos(params):
        return jax.lax.map(lambda one: -elbo.loss(jax.random.key(1), one, program.model, program.guide, *program.args), params)

    def evaluate(fits: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.asarray(elbos({name: jnp.stack([one[name] for one in fits]) for name in names}))

    return evaluate


def best_side(curves: dict[float, np.ndarray], target: float, checkpoints: np.ndarray) -> Side:
    """The step size at which the target is reached first."""
    steps = {step_size: reached(curve, target, checkpoints) for step_size, curve in curves.items()}
    step_size = min(steps, key=lambda one: steps[one])
    return Side(steps[step_size], step_size)


def reached(elbos: np.ndarray, target: float, checkpoints: np.ndarray) -> float:
    """The step at which the ELBO first reached the target, by linear interpolation; infinity if it never did."""
    if not (elbos >= target).any():
        return float("inf")
    i = int((elbos >= target).argmax())
    share = (target - elbos[i - 1]) / (elbos[i] - elbos[i - 1]) if i else 1.0
    return float(checkpoints[i] - (1 - share) * (checkpoints[i] - checkpoints[i - 1]))

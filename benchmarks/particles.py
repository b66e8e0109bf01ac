"""Particles that are drawn together: the noise of the gradient and the time of a step, against independent ones.

There are 64 particles, and RP at every site. A row has the variance of the gradient with independent particles over that with joint
ones: the median over the parameters called loc, and over those called scale (unconstrained), at the start and after 3,000 steps. It
also has the time of a step over that with independent particles, in each host. About three minutes:

    python benchmarks/particles.py
    python benchmarks/particles.py --smoke
    python benchmarks/particles.py --only "eight schools"
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from programs import HOSTS, PROGRAMS, NumPyro, Program
from tables import figure, options, table
from timing import STEPS, NumPyroSteps, alternate, particles, use_one_thread

K = 64
NAMES = ("noisy cone", "eight schools", "logistic regression")
HOW = ("independent", "stratified", "antithetic")
COLUMNS = ("Program", "Where", "Particles", "Less variance, loc", "Less variance, scale", "Time, NumPyro", "Time, Pyro")
ABOUT = "64 particles, every site RP. Factors against independent particles: less variance, time of a step."


def side(h: Any, program: Program, how: str, rate: float) -> Any:
    return STEPS[h](program, h.flow.TraceFlow_ELBO(**particles(h, K), particles=how), rate=rate)


def variances(of: NumPyroSteps, program: Program, points: list[dict], n: int) -> list[dict[str, float]]:
    """The variance of the gradient in each parameter, as the mean over its elements, at each point."""

    @jax.jit
    def gradients(params, keys):
        def loss(params, key):
            return of.svi.loss.loss(key, of.svi.constrain_fn(params), *program[:2], *program.args)

        return jax.lax.map(lambda key: jax.grad(loss)(params, key), keys)

    keys = jax.random.split(jax.random.key(1), n)
    return [{name: float(np.var(g, 0).mean()) for name, g in gradients(params, keys).items()} for params in points]


def params_of(of: NumPyroSteps) -> dict:
    return of.svi.optim.get_params(of.state.optim_state)


def gain(independent: dict[str, float], joint: dict[str, float], kind: str) -> str:
    with np.errstate(divide="ignore"):  # mirrored pairs have no noise if the cost is symmetric
        ratios = [np.divide(independent[name], joint[name]) for name in joint if name.endswith(kind)]
    return figure(float(np.median(ratios)), ".2g")


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    smoke = options_given.smoke
    n, steps, rounds, duration = (8, 10, 2, 0.002) if smoke else (500, 3000, 11, 0.02)
    with table("particles", options_given, COLUMNS, ABOUT) as row:
        for name in NAMES[:1] if smoke else NAMES:
            if not options_given.wants(name):
                continue
            programs = {h: PROGRAMS[name](h, h.dist.Normal) for h in HOSTS}
            sides = {h: {how: side(h, programs[h], how, 0.01) for how in HOW} for h in HOSTS}
            ours = sides[NumPyro]
            points = [params_of(ours["stratified"])]
            ours["stratified"].run(steps)
            points.append(params_of(ours["stratified"]))
            noise = {how: variances(ours[how], programs[NumPyro], points, n) for how in HOW}
            for how in HOW[1:]:
                times = [alternate(sides[h][how], sides[h]["independent"], rounds, duration) for h in HOSTS]
                ratios = [f"{np.median(t[:, 0] / t[:, 1]):.2f}" for t in times]
                for i, where in enumerate(("start", "optimum")):
                    gains = [gain(noise["independent"][i], noise[how][i], kind) for kind in ("loc", "scale")]
                    row(name, where, how, *gains, *(ratios if i == 0 else ("", "")))


if __name__ == "__main__":
    main()

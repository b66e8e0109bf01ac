"""Variance and cost of the estimators at discrete sites, and at a jump of the cost.

The gradient is that of the guide's logits, with four particles. At the jump it is that of the location and of the scale, with one
particle. Some names of programs say otherwise. "Two evaluations" or "four evaluations": the number of particles is chosen such that
every estimator takes as many evaluations. "64 particles": there are so many, in a plate in Pyro. LR has the leave-one-out baseline if
there are several particles. Step times are relative to LR, the two sides in turn. In NumPyro all steps run in one compiled loop. About
five minutes:

    python benchmarks/discrete.py
    python benchmarks/discrete.py --smoke
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyro
from programs import HOSTS, NumPyro, Program
from tables import figure, options, table
from timing import STEPS, alternate, median_interval, particles, use_one_thread

import flowvi
from flowvi import LR, RP

THETA = [0.3, -0.4, 0.8, 0.1]


def mixed_cone(h: Any, loc: float = 1.5, scale: float = 0.3) -> Program:
    """The noisy cone with two branches: the noise is small on one branch, and grows with the distance on the other.

    At the default ``loc`` the point is near the observed distance. The point is learned too, with RP.
    """

    def model():
        k = h.ppl.sample("k", h.dist.Bernoulli(h.array(0.5)))
        x = h.ppl.sample("x", h.dist.Normal(h.array(0.0), 10.0))
        y = h.ppl.sample("y", h.dist.Normal(h.array(0.0), 10.0))
        r = x**2 + y**2
        h.ppl.sample("r", h.dist.Normal(r, 0.5 + k * r / 10), obs=h.array(5.0))

    def guide():
        h.ppl.sample("k", h.dist.Bernoulli(logits=h.ppl.param("logits", h.array(0.4))))
        for name in ("x", "y"):
            spread = h.ppl.param(f"{name}_scale", h.array(scale), constraint=h.dist.constraints.positive)
            h.ppl.sample(name, h.dist.Normal(h.ppl.param(f"{name}_loc", h.array(loc)), spread))

    return Program(model, guide)


def joint(h: Any) -> Program:
    """Four Bernoullis that share one cost."""

    def model():
        b = h.ppl.sample("k", h.dist.Bernoulli(h.array([0.5] * 4)).to_event(1))
        h.ppl.factor("cost", -((b @ h.array([1.0, -0.6, 0.8, 0.4]) - 0.3) ** 2))

    def guide():
        h.ppl.sample("k", h.dist.Bernoulli(logits=h.ppl.param("logits", h.array(THETA))).to_event(1))

    return Program(model, guide)


def categories(h: Any) -> Program:
    """Four Categoricals of three values that share one cost."""
    logits = np.array([[0.3, -0.4, 0.8], [0.1, 0.5, -0.9], [0.0, 0.2, 0.1], [1.0, -0.3, 0.4]])
    scores = h.array([[1.0, -0.6, 0.2], [0.4, 0.8, -1.0], [-0.5, 0.9, 0.0], [0.3, -0.7, 0.6]])

    def model():
        k = h.ppl.sample("k", h.dist.Categorical(logits=h.array(np.zeros((4, 3)))).to_event(1))
        h.ppl.factor("cost", -((h.xp.stack([scores[i][k[..., i]] for i in range(4)], -1).sum(-1) - 0.3) ** 2))

    def guide():
        h.ppl.sample("k", h.dist.Categorical(logits=h.ppl.param("logits", h.array(logits))).to_event(1))

    return Program(model, guide)


def local(h: Any) -> Program:
    """A hundred local Bernoullis in a plate, each with an observation."""
    x = h.array(np.linspace(-1.5, 3.5, 100))

    def model():
        with h.ppl.plate("n", 100):
            z = h.ppl.sample("k", h.dist.Bernoulli(h.array(0.3)))
            h.ppl.sample("x", h.dist.Normal(2.0 * z, 1.0), obs=x)

    def guide():
        with h.ppl.plate("n", 100):
            h.ppl.sample("k", h.dist.Bernoulli(logits=h.ppl.param("logits", h.array(np.linspace(-1.0, 1.0, 100)))))

    return Program(model, guide)


def counts(h: Any) -> Program:
    """A Normal observation whose mean is a Poisson site."""

    def model():
        k = h.ppl.sample("k", h.dist.Poisson(h.array(3.0)))
        h.ppl.sample("y", h.dist.Normal(k, 1.0), obs=h.array(4.0))

    def guide():
        rate = h.ppl.param("rate", h.array(2.5), constraint=h.dist.constraints.positive)
        h.ppl.sample("k", h.dist.Poisson(rate))

    return Program(model, guide)


def jump(h: Any) -> Program:
    """The cost 3 x + 4 [x > 0.5] under a Normal."""

    def model():
        x = h.ppl.sample("k", h.dist.Normal(h.array(0.0), 1.0).mask(False))
        h.ppl.factor("cost", 3 * x + 4 * (x > 0.5))

    def guide():
        scale = h.ppl.param("scale", h.array(0.8), constraint=h.dist.constraints.positive)
        h.ppl.sample("k", h.dist.Normal(h.ppl.param("loc", h.array(0.3)), scale).mask(False))

    return Program(model, guide)


PARAMETERS = ("logits", "rate", "loc", "scale")  # of the site whose estimator is measured
FINITE = {"LR": LR(), "Enumerate": flowvi.Enumerate()}
# with the number of particles that gives every estimator the same number of evaluations
EQUAL = {"LR": (4, LR()), "DisARM": (2, flowvi.DisARM()), "DisARM, four values": (1, flowvi.DisARM(num_values=4))}
TWO = {"LR": (2, LR()), "DisARM": (1, flowvi.DisARM()), "Enumerate, random lane": (1, flowvi.Enumerate("random"))}
ROWS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "mixed cone": (mixed_cone, 4, FINITE),
    "mixed cone, 64 particles": (mixed_cone, 64, FINITE),
    "mixed cone, a wider guide, 64 particles": (partial(mixed_cone, loc=1.0, scale=0.5), 64, FINITE),
    "four Bernoullis in one cost": (
        joint,
        4,
        FINITE
        | {
            "Enumerate, random lane": flowvi.Enumerate("random"),
            "FiniteDifference": flowvi.FiniteDifference(),
            "DisARM": flowvi.DisARM(),
        },
    ),
    "four Bernoullis, four evaluations": (joint, 4, EQUAL),
    "four Categoricals, two evaluations": (categories, 2, TWO),
    "four Categoricals, four evaluations": (categories, 4, EQUAL),
    "100 local Bernoullis": (local, 4, FINITE),
    "a Poisson": (counts, 4, {"LR": LR(), "FiniteDifference": flowvi.FiniteDifference(), "MeasureValued": flowvi.MeasureValued()}),
    "a jump": (
        jump,
        1,
        {"LR": LR(), "MeasureValued": flowvi.MeasureValued(), "RP, which is wrong": RP(), "RP(jumps=[0.5])": RP(jumps=[0.5])},
    ),
}


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    samples, rounds, duration = (50, 2, 0.002) if options_given.smoke else (2000, 20, 0.05)
    about = "Variance of the gradient, summed over its elements, and time of a step relative to LR."
    columns = ("host", "program", "estimator", "evaluations", "mean", "variance", "LR's / variance", "time / LR's", "95% interval")
    with table("discrete", options_given, columns, about) as row:
        for h in HOSTS:
            for name, (program_of, of_lr, estimators) in ROWS.items():
                program = program_of(h)
                found = {}
                for label, given in estimators.items():
                    of_this, estimator = given if isinstance(given, tuple) else (of_lr, given)
                    if not options_given.wants(h.name, name, label):
                        continue
                    pyro.clear_param_store()
                    mode, of_first = (particles(h, number, loop=number <= 4) for number in (of_this, of_lr))
                    elbo = h.flow.TraceFlow_ELBO(**mode, estimators={"k": estimator})
                    evaluations = elbo.describe(*program[:2]).evaluations
                    n = samples if h is NumPyro else max(samples // 4, 10)
                    report = h.flow.gradient_report(*program[:2], estimators={"k": estimator}, options=mode, num_samples=n)
                    own = [record for record in report.parameters if record.parameter in PARAMETERS]
                    found[label] = sum(record.variance.sum() for record in own)
                    mean = sum(record.mean.sum() for record in own)
                    sides = (h.flow.TraceFlow_ELBO(**of_first, estimators={"k": LR()}), elbo)
                    times = alternate(STEPS[h](program, sides[1]), STEPS[h](program, sides[0]), rounds, duration)
                    median, low, high = median_interval(times[:, 0] / times[:, 1])
                    ratio = figure(found["LR"] / found[label]) if found[label] > 1e-12 and "LR" in found else ""
                    row(
                        *(h.name, name, label, evaluations, figure(mean), figure(found[label]), ratio),
                        *(f"{median:.2f}", f"{low:.2f} .. {high:.2f}"),
                    )


if __name__ == "__main__":
    main()

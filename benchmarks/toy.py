"""Mean and variance of the gradient in a logit: the toy problem of REBAR and RELAX, and four Bernoullis that share one cost.

The toy problem is the cost (b - t)^2 of one Bernoulli. The gradients are those of the cost, without densities. Estimators that learn
are trained first, at fixed logits. An estimate has one particle, or two for the leave-one-out mean. About a minute:

    python benchmarks/toy.py
    python benchmarks/toy.py --smoke
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.infer
from tables import figure, options, table
from timing import use_one_thread

import flowvi
from flowvi import LR, GumbelSoftmax, ReinMax, StraightThrough, Surrogate
from flowvi.estimators import Estimator
from flowvi.numpyro import TraceFlow_ELBO, adaptive

HIDDEN = 8
WEIGHTS = np.array([1.0, -0.6, 0.8, 0.4])


class Problem(NamedTuple):
    """Independent Bernoullis with ``logits``. ``cost(b)`` takes an array whose last axis is the Bernoullis."""

    logits: np.ndarray
    cost: Callable[[Any], Any]


def toy(t: float) -> Problem:
    return Problem(np.array([0.4]), lambda b: ((b - t) ** 2).sum(-1))


def joint(b: Any) -> Any:
    return (sum(w * b[..., i] for i, w in enumerate(WEIGHTS)) - 0.3) ** 2


PROBLEMS = {"t = 0.45": toy(0.45), "t = 0.499": toy(0.499), "four Bernoullis": Problem(np.array([0.3, -0.4, 0.8, 0.1]), joint)}


def exact(problem: Problem) -> float:
    """The gradient, summed over the logits."""
    values = np.indices((2,) * len(problem.logits)).reshape(len(problem.logits), -1).T
    p = 1 / (1 + np.exp(-problem.logits))
    masses = np.where(values == 1, p, 1 - p).prod(-1)
    return float(((values - p) * (masses * problem.cost(values))[:, None]).sum())


def relax(size: int) -> Surrogate:
    """A network with one hidden layer."""
    rng = np.random.default_rng(0)
    initial = {"w": 0.5 * rng.normal(size=(size, HIDDEN)), "b": np.zeros(HIDDEN), "v": np.zeros(HIDDEN), "a": 0.0}
    return Surrogate(lambda z, params: jnp.tanh(z @ params["w"] + params["b"]) @ params["v"] + params["a"], initial)


ESTIMATORS: dict[str, tuple[int, Callable[[Problem], Estimator]]] = {
    "LR": (1, lambda problem: LR()),
    "LR, leave-one-out": (2, lambda problem: LR()),
    "REBAR": (1, lambda problem: Surrogate(problem.cost, temperature=0.5)),
    "RELAX": (1, lambda problem: relax(len(problem.logits))),
    "DisARM": (1, lambda problem: flowvi.DisARM()),
    "Enumerate": (1, lambda problem: flowvi.Enumerate()),
    "ReinMax, biased": (1, lambda problem: ReinMax()),
    "StraightThrough, biased": (1, lambda problem: StraightThrough()),
    "GumbelSoftmax(0.5), biased": (1, lambda problem: GumbelSoftmax(0.5)),
}


def program(problem: Problem, logits: Callable[[], Any]) -> tuple[Callable, Callable]:
    def site(logits):
        return numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1).mask(False))

    return lambda: numpyro.factor("cost", problem.cost(site(0 * problem.logits))), lambda: site(logits())


def learn(problem: Problem, estimator: Estimator, steps: int) -> dict[str, Any]:
    """The parameters that the estimator learns at the fixed logits."""
    model, guide = program(problem, lambda: jnp.asarray(problem.logits))
    elbo = TraceFlow_ELBO(20, estimators={"b": estimator}, baseline=None)  # as in the measurement, with one particle
    svi = numpyro.infer.SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.01), elbo)
    return svi.run(jax.random.key(0), steps, progress_bar=False).params


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    samples, steps = (50, 5) if options_given.smoke else (40_000, 3000)
    about = f"Gradient of the cost, summed over the logits; {samples} estimates in NumPyro."
    columns = ("problem", "estimator", "evaluations", "exact", "mean", "variance")
    with table("toy", options_given, columns, about) as row:
        for name, problem in PROBLEMS.items():
            model, guide = program(problem, lambda problem=problem: numpyro.param("logits", jnp.asarray(problem.logits)))
            for label, (particles, make) in ESTIMATORS.items():
                if not options_given.wants(name, label):
                    continue
                estimator = make(problem)
                learned = learn(problem, estimator, steps) if isinstance(estimator, Surrogate) else {}
                elbo = TraceFlow_ELBO(particles, estimators={"b": estimator})

                def loss(logits, key, elbo=elbo, learned=learned, model=model, guide=guide):
                    return -elbo.loss(key, {"logits": logits, **learned}, model, guide)

                keys = jax.random.split(jax.random.key(1), samples)
                gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(problem.logits), keys)
                evaluations = particles * elbo.describe(model, adaptive(guide, elbo)).evaluations
                mean, variance = (float(of.sum()) for of in (gradients.mean(0), gradients.var(0)))
                row(name, label, evaluations, *map(figure, (exact(problem), mean, variance)))


if __name__ == "__main__":
    main()

"""On a GPU, in both hosts: the gradient against its exact value, and the time of a step against the host's own ELBO.

The first table has many gradients of every kind of estimator, on a program with a Normal and a Bernoulli site whose exact gradient is
known. The column z is the error of their mean in standard errors. The second table is a part of `step_time.py`. Without a GPU the
command prints a message and stops; with `--smoke` it runs on CPUs too. About five minutes, most of it compilation:

    python benchmarks/gpu.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
import pyro
import torch
from programs import PROGRAMS, NumPyro, Pyro
from step_time import FLOW, comparisons
from tables import Options, figure, options, table
from timing import STEPS, alternate, median_interval, particles

from flowvi import LR, RP, DisARM, Enumerate, FiniteDifference, MeasureValued

LOC, LOGIT = 0.3, -0.4  # of the guide's two sites
ESTIMATORS: dict[str, dict[str, Any]] = {
    "RP, LR": {"x": RP(), "k": LR()},
    "LR, LR": {"x": LR(), "k": LR()},
    "LR(q), Enumerate": {"x": LR(q=lambda p: type(p)(p.loc, 1.3 * p.scale)), "k": Enumerate()},
    "Flow, FiniteDifference": {"x": FLOW, "k": FiniteDifference()},
    "RP, MeasureValued": {"x": RP(), "k": MeasureValued()},
    "RP, DisARM": {"x": RP(), "k": DisARM()},
}


def program(h: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """E (x + 2 k - 1)^2, with x ~ Normal(loc, 0.8) and k ~ Bernoulli, as the log density of a factor; entropies cancel in the model."""

    def distributions(loc, logit):
        return h.dist.Normal(loc, 0.8), h.dist.Bernoulli(logits=logit)

    def guide():
        loc, logit = h.ppl.param("loc", h.array(LOC)), h.ppl.param("logit", h.array(LOGIT))
        x, k = distributions(loc, logit)
        h.ppl.sample("x", x)
        h.ppl.sample("k", k)

    def model():
        x, k = distributions(h.array(0.0), h.array(0.0))
        x, k = h.ppl.sample("x", x), h.ppl.sample("k", k)
        h.ppl.factor("cost", -((x + 2.0 * k - 1.0) ** 2))

    return model, guide


def exact() -> np.ndarray:
    """The derivatives of the loss in loc and logit: of E (x + 2 k - 1)^2 and of the two divergences."""
    p = 1 / (1 + np.exp(-LOGIT))
    of_loc = 2 * (LOC + 2 * p - 1) + LOC / 0.8**2
    of_probs = 4 * (LOC - 1) + 4 + LOGIT  # (x + 2 k - 1)^2 = (x - 1)^2 + 4 k (x - 1) + 4 k; KL' = logit - logit of the model
    return np.array([of_loc, of_probs * p * (1 - p)])


def gradients_numpyro(elbo: Any, number: int) -> np.ndarray:
    model, guide = program(NumPyro)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1.0), elbo)
    parameters = svi.get_params(svi.init(jax.random.key(0)))
    gradient = jax.grad(lambda parameters, key: elbo.loss(key, parameters, model, guide))
    drawn = jax.jit(jax.vmap(gradient, (None, 0)))(parameters, jax.random.split(jax.random.key(1), number))
    return np.stack([np.asarray(drawn[name], float) for name in ("loc", "logit")], -1)


def gradients_pyro(elbo: Any, number: int) -> np.ndarray:
    model, guide = program(Pyro)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    drawn = []
    for _ in range(number):
        elbo.loss_and_grads(model, guide)
        live = [pyro.param(name) for name in ("loc", "logit")]
        drawn.append([float(theta.grad) for theta in live])
        pyro.infer.util.zero_grads(live)
    return np.array(drawn)


def gradient_rows(h: Any, row: Callable[..., None], smoke: bool) -> None:
    sample, number = (gradients_numpyro, 200_000) if h is NumPyro else (gradients_pyro, 1_000)
    for name, estimators in ESTIMATORS.items():
        drawn = sample(h.flow.TraceFlow_ELBO(num_particles=1, estimators=estimators), 50 if smoke else number)
        z = (drawn.mean(0) - exact()) / (drawn.std(0, ddof=1) / np.sqrt(len(drawn)) + 1e-6)
        row(
            h.name, name, len(drawn), *(figure(x) for x in drawn.mean(0)), *(figure(x) for x in exact()), *(figure(x, ".2f") for x in z)
        )


def time_rows(h: Any, row: Callable[..., None], smoke: bool) -> None:
    rounds, duration = (2, 0.002) if smoke else (15, 0.05)
    for name in ("eight schools", "logistic regression", "autoencoder")[: 1 if smoke else 3]:
        for what in ("RP", "Flow", "LR"):
            comparison = comparisons(h)[what]
            built = PROGRAMS[name](h, comparison.normal)
            kind = "loop" if h is NumPyro else "validated"
            k = 10 if name == "autoencoder" else 100
            a, b = (STEPS[h](built, elbo(**particles(h, k)), kind) for elbo in (comparison.ours, comparison.theirs))
            times = alternate(a, b, rounds, duration)
            median, low, high = median_interval(times[:, 0] / times[:, 1])
            ours, theirs = 1e6 * np.median(times, axis=0)
            row(h.name, name, k, comparison.what, f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{ours:.0f} / {theirs:.0f}")


def main(argv: list[str] | None = None) -> None:
    options_given: Options = options(__file__, __doc__, argv)
    if not options_given.smoke and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        sys.exit("python benchmarks/gpu.py: found no GPU that both torch and jax can use.")
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    where = f"On {torch.cuda.get_device_name()}." if torch.cuda.is_available() else "On CPUs."
    columns = (
        "Host",
        "Estimators of x, k",
        "Gradients",
        "Mean, loc",
        "Mean, logit",
        "Exact, loc",
        "Exact, logit",
        "z, loc",
        "z, logit",
    )
    with table("gpu_gradients", options_given, columns, f"{where} One particle, float32.") as row:
        for h in (NumPyro, Pyro):
            gradient_rows(h, row, options_given.smoke)
    columns = ("Host", "Program", "Particles", "Ratio of times", "Median", "95% interval", "µs / µs")
    with table("gpu_step_time", options_given, columns, f"{where} Steps as in step_time.py.") as row:
        for h in (NumPyro, Pyro):
            time_rows(h, row, options_given.smoke)


if __name__ == "__main__":
    main()

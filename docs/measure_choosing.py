"""The measured tables of docs/choosing.md: the mean and the variance of one sample of the gradient, estimator by estimator.

python docs/measure_choosing.py [--smoke]

Every program is small, with a known exact gradient. A mean that is off by more than five standard errors is an error, unless the
estimator is marked as biased. The samples come from ``gradient_report`` in NumPyro. Tables are printed and written to docs/_measured/.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import i0e, i1e
from scipy.stats import norm

from flowvi import LR, RP, Flow, fields, proposals
from flowvi.numpyro import gradient_report

numpyro.enable_x64()
HERE = Path(__file__).parent


@dataclass
class Study:
    """A program, the exact gradient of its loss in one parameter, and candidates to measure.

    Attributes:
        model: The model.
        guide: The guide.
        parameter: The parameter whose gradient is measured, over all of its elements.
        exact: Its exact gradient.
        candidates: By label, an estimator for every site, or a pair of an estimator and options of ``TraceFlow_ELBO``.
        biased: The labels of the candidates that are known to be biased.
    """

    model: Callable[[], Any]
    guide: Callable[[], Any]
    parameter: str
    exact: Any
    candidates: dict[str, Any]
    biased: tuple[str, ...] = ()

    def measure(self, label, samples):
        """The mean, its standard error and the variance, each over the elements of the parameter."""
        choice = self.candidates[label]
        estimator, options = choice if isinstance(choice, tuple) else (choice, {})
        report = gradient_report(self.model, self.guide, default=estimator, num_samples=samples, options=options)
        (found,) = (p for p in report.parameters if p.parameter == self.parameter)
        error = np.sqrt(found.variance / samples)
        off = (np.abs(found.mean - np.ravel(self.exact)) / (error + 1e-12)).max()
        assert (off > 5) == (label in self.biased) or samples < 1000, (label, found.mean, self.exact, error)
        return found.mean, error, found.variance

    def rows(self, samples):
        for label in self.candidates:
            mean, error, variance = self.measure(label, samples)
            cell = f"{mean.sum():.3f} ± {np.sqrt((error**2).sum()):.3f}" + (", **biased**" if label in self.biased else "")
            yield label, cell, f"{variance.sum():.3g}"

    def table(self, samples):
        head = ("estimator", f"mean (exact: {np.sum(self.exact):.3f})", "variance of one sample")
        return markdown(head, self.rows(samples))


def markdown(head, rows):
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def normal_guide(loc=0.3, scale=1.0, shape=(), plate=False):
    """A Normal site x with a parameter ``loc`` of the given shape; its elements are in a plate or are one event."""

    def guide():
        m = numpyro.param("loc", jnp.full(shape, loc))
        if plate:
            with numpyro.plate("elements", *shape):
                return numpyro.sample("x", dist.Normal(m, scale))
        return numpyro.sample("x", dist.Normal(m, scale).to_event(len(shape)))

    return guide


def normal_model(cost):
    """A standard Normal x and a log factor ``cost(x)``."""

    def model():
        numpyro.factor("cost", cost(numpyro.sample("x", dist.Normal(0.0, 1.0))))

    return model


# ---- a discrete site


def discrete():
    def model():
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(2.0 * k, 1.0), obs=1.5)

    def guide():
        numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logits", jnp.array(0.3))))

    def loss(logits):
        p = jax.nn.sigmoid(logits)
        log_joint = jnp.log(0.5) + jnp.array([norm.logpdf(1.5), norm.logpdf(1.5, 2.0)])
        q = jnp.stack([1 - p, p])
        return (q * (jnp.log(q) - log_joint)).sum()

    candidates = {
        "`LR()`, 1 particle": LR(),
        "`LR()`, 8 particles, `baseline=None`": (LR(), {"num_particles": 8, "baseline": None}),
        "`LR()`, 8 particles, leave-one-out (the default)": (LR(), {"num_particles": 8}),
    }
    return Study(model, guide, "logits", jax.grad(loss)(0.3), candidates)


# ---- a continuous site: smooth, with a jump, with a steep cost


def smooth():
    def model():
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 0.5), obs=1.0)

    candidates = {
        "`LR()`": LR(),
        "`LR()`, 8 particles, leave-one-out": (LR(), {"num_particles": 8}),
        "halfway: `Flow(fields.scaled(0.5, fields.location_scale()))`": Flow(fields.scaled(0.5, fields.location_scale())),
        "`RP()`": RP(),
        "`RP()`, 8 particles": (RP(), {"num_particles": 8}),
        '`RP()`, `entropy="stl"`': (RP(), {"entropy": "stl"}),
    }
    return Study(model, normal_guide(scale=0.6), "loc", 0.3 + (0.3 - 1.0) / 0.25, candidates)


def away_from_the_jump(x, p):
    return 1 - jnp.exp(-2 * (x - 0.5) ** 2)


def jump():
    model = normal_model(lambda x: 4.0 * (x > 0.5) + 3.0 * x)
    candidates = {
        "`RP()`": RP(),
        "`LR()`": LR(),
        "`Flow(fields.masked(m, fields.location_scale()))`": Flow(fields.masked(away_from_the_jump, fields.location_scale())),
    }
    return Study(model, normal_guide(), "loc", 0.3 - 4 * norm.pdf(0.2) - 3.0, candidates, biased=("`RP()`",))


def steep():
    model = normal_model(lambda x: jnp.cos(20 * x))
    return Study(model, normal_guide(), "loc", 0.3 + 20 * np.sin(6.0) * np.exp(-200.0), {"`LR()`": LR(), "`RP()`": RP()})


# ---- dimension, and local against global sites


def independent(size, plate):
    """``size`` Normals with an observation each; exact for each is m + (m - 1)."""

    def model():
        if plate:
            with numpyro.plate("elements", size):
                x = numpyro.sample("x", dist.Normal(0.0, 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.ones(size))
        else:
            x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(size))

    return Study(model, normal_guide(shape=(size,), plate=plate), "loc", np.full(size, -0.4), {"LR": LR(), "RP": RP()})


def dimension(samples, sizes=(1, 10, 100)):
    """The variance of one element of the gradient."""
    arrangements = {"`LR()`, one event": ("LR", False), "`LR()`, a plate": ("LR", True), "`RP()`, either": ("RP", True)}
    rows = []
    for label, (kind, plate) in arrangements.items():
        variances = (independent(size, plate).measure(kind, samples)[2].mean() for size in sizes)
        rows.append((label, *(f"{variance:.3g}" for variance in variances)))
    return markdown(("estimator", *(f"size {size}" for size in sizes)), rows)


def shared(size):
    """One Normal above ``size`` observations of 1."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", size):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.ones(size))

    scale = (1 + size) ** -0.5  # that of the posterior
    candidates = {
        "`LR()`": LR(),
        "`LR()`, 8 particles, leave-one-out": (LR(), {"num_particles": 8}),
        "`RP()`": RP(),
    }
    return Study(model, normal_guide(scale=scale), "loc", 0.3 + size * (0.3 - 1.0), candidates)


def data(samples, sizes=(1, 10, 100)):
    """The variance of the gradient over its squared mean."""
    studies = [shared(size) for size in sizes]
    rows = (
        (label, *(f"{float(s.measure(label, samples)[2].item()) / s.exact**2:.3g}" for s in studies)) for label in studies[0].candidates
    )
    return markdown(("estimator", *(f"{size} observation{'s' * (size > 1)}" for size in sizes)), rows)


# ---- a support that moves


def moving():
    def model():
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Uniform(0.0, 1.0)), 0.3), obs=0.7)

    def guide():
        numpyro.sample("x", dist.Uniform(0.0, numpyro.param("high", jnp.array(0.5))))

    def log_likelihood(x):
        return norm.logpdf(0.7, x, 0.3)

    x = np.linspace(0, 0.5, 100_001)
    mean = np.trapezoid(log_likelihood(x), x) / 0.5
    exact = -(1 + log_likelihood(0.5) - mean) / 0.5
    return Study(model, guide, "high", exact, {"`RP()`": RP(), "`Flow(fields.uniform())`": Flow(fields.uniform())})


def refusal(study):
    """The error of LR at a site where it would be biased."""
    try:
        gradient_report(study.model, study.guide, default=LR(), num_samples=1)
    except ValueError as error:
        return f"```\nValueError: {error}\n```\n"
    raise AssertionError("LR is not refused")


# ---- families without a reparameterized sampler, full covariances, and sampling densities


def angle():
    """A direction with eight observations; E[cos(x - a)] is A cos(loc - a), A' is 1 - A / concentration - A^2."""
    observed = np.linspace(-1.0, 1.5, 8)

    def model():
        x = numpyro.sample("x", dist.VonMises(0.0, 1.0))
        with numpyro.plate("data", 8):
            numpyro.sample("y", dist.VonMises(x, 4.0), obs=jnp.array(observed))

    def guide():
        numpyro.sample("x", dist.VonMises(0.5, numpyro.param("concentration", jnp.array(2.0))))

    ratio = float(i1e(2.0) / i0e(2.0))
    slope = 1 - ratio / 2 - ratio**2
    exact = slope * (2.0 - np.cos(0.5) - 4 * np.cos(0.5 - observed).sum())
    candidates = {"`LR()`": LR(), "`Flow(fields.von_mises())`": Flow(fields.von_mises())}
    return Study(model, guide, "concentration", exact, candidates)


def covariance(size=5):
    sigma = 0.6 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    tril = jnp.linalg.cholesky(sigma)

    def model():
        x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(size), jnp.eye(size)))
        numpyro.factor("cost", -(x**2).sum())

    def guide():
        scale_tril = jnp.tril(numpyro.param("scale_tril", tril))
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(size), scale_tril=scale_tril))

    def loss(scale_tril):
        return 1.5 * (jnp.tril(scale_tril) ** 2).sum() - jnp.log(jnp.diag(scale_tril)).sum()

    candidates = {
        "`LR()`": LR(),
        "`RP()`, that is `Flow(fields.multivariate_normal())`": RP(),
        "`Flow(fields.multivariate_normal_transport())`": Flow(fields.multivariate_normal_transport()),
    }
    return Study(model, guide, "scale_tril", jax.grad(loss)(tril), candidates)


def rare():
    candidates = {
        "`LR()`": LR(),
        "`LR(q=proposals.tempered(2.0))`": LR(q=proposals.tempered(2.0)),
        "`LR(q=proposals.slice_by_mass())`": LR(q=proposals.slice_by_mass()),
        "`LR(q=lambda p: dist.Normal(p.loc + 1, 1.5 * p.scale))`": LR(q=lambda p: dist.Normal(p.loc + 1, 1.5 * p.scale)),
    }
    return Study(normal_model(lambda x: 10.0 * (x > 2.5)), normal_guide(0.0), "loc", -10 * norm.pdf(2.5), candidates)


def write(name, text):
    folder = HERE / "_measured"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    print(f"{name}\n\n{text}")


def main(samples=20_000):
    for study in (discrete, smooth, jump, steep, moving, angle, covariance, rare):
        write(study.__name__, study().table(samples))
    write("refusal", refusal(moving()))
    write("dimension", dimension(samples))
    write("data", data(samples))


if __name__ == "__main__":
    if "--smoke" in sys.argv:
        print(discrete().table(samples=100))
    else:
        main()

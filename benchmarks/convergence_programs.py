"""The programs of ``convergence.py``, each written once for both hosts.

``program(h, whole)`` is the program for training, with minibatches if it has them, or for evaluation (``whole``), with all data or with
the held-out data. All parameters are named arrays, with the same names in both hosts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from programs import IMAGES, Program, eight_schools, logistic_regression, mean_field, mixture_guide
from sklearn.datasets import load_diabetes, load_iris

TRAINED, HELD_OUT = IMAGES[:1500], IMAGES[1500:]
HIDDEN, BATCH = 100, 64


def full_rank(h: Any, name: str, size: int, scale: float = 0.1) -> Any:
    """The two parameters of a MultivariateNormal site, and its distribution."""
    loc = h.ppl.param(f"{name}_loc", h.array(np.zeros(size)))
    tril = h.ppl.param(f"{name}_tril", h.array(scale * np.eye(size)), constraint=h.dist.constraints.lower_cholesky)
    return h.dist.MultivariateNormal(loc, scale_tril=tril)


def schools(h: Any, whole: bool) -> Program:
    """Rubin's eight schools, mean field."""
    return eight_schools(h, h.dist.Normal)


def logistic_mean_field(h: Any, whole: bool) -> Program:
    """Breast cancer: 569 cases, 31 weights."""
    return logistic_regression(h, h.dist.Normal)


def logistic_full_rank(h: Any, whole: bool) -> Program:
    """The same under a MultivariateNormal."""

    def guide():
        h.ppl.sample("w", full_rank(h, "w", 31))

    return logistic_regression(h, h.dist.Normal)._replace(guide=guide)


def poisson_full_rank(h: Any, whole: bool) -> Program:
    """A Poisson regression on eight correlated features: 400 generated cases."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8)) @ (np.eye(8) + 0.4)
    x = np.column_stack([np.ones(400), x / x.std(0)])
    features, counts = h.array(x.T), h.array(rng.poisson(np.exp(x @ rng.normal(0.2, 0.3, 9))))

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(np.zeros(9)), 1.0).to_event(1))
        h.ppl.sample("y", h.dist.Poisson(h.xp.exp(w @ features)).to_event(1), obs=counts)

    def guide():
        h.ppl.sample("w", full_rank(h, "w", 9))

    return Program(model, guide)


def student_t(h: Any, whole: bool) -> Program:
    """A regression with StudentT errors, mean field: the progression of diabetes by ten features, 442 cases."""
    x, y = load_diabetes(return_X_y=True)
    features = h.array(np.column_stack([np.ones(len(x)), x / x.std(0)]).T)
    y = h.array((y - y.mean()) / y.std())

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(np.zeros(11)), 1.0).to_event(1))
        log_sigma = h.ppl.sample("log_sigma", h.dist.Normal(h.array(-0.5), 1.0))
        errors = h.dist.StudentT(4.0, w @ features, h.xp.exp(log_sigma)[..., None])
        h.ppl.sample("y", errors.to_event(1), obs=y)

    def guide():
        h.ppl.sample("w", mean_field(h, h.dist.Normal, "w", 11).to_event(1))
        h.ppl.sample("log_sigma", mean_field(h, h.dist.Normal, "log_sigma"))

    return Program(model, guide)


def hierarchical(h: Any, whole: bool) -> Program:
    """An intercept for each of 40 groups, and a common slope: 2,000 generated cases, in minibatches of 100."""
    rng = np.random.default_rng(0)
    groups, x = rng.integers(40, size=2000), rng.normal(size=2000)
    y = h.array(rng.normal(0.5, 0.7, 40)[groups] + 0.8 * x + rng.normal(0.0, 0.5, 2000))
    of_case, x = h.xp.asarray(groups), h.array(x)

    def model():
        mu = h.ppl.sample("mu", h.dist.Normal(h.array(0.0), 1.0))
        log_tau = h.ppl.sample("log_tau", h.dist.Normal(h.array(-0.5), 1.0))
        slope = h.ppl.sample("slope", h.dist.Normal(h.array(0.0), 1.0))
        with h.ppl.plate("groups", 40):
            intercept = h.ppl.sample("intercept", h.dist.Normal(mu, h.xp.exp(log_tau)))
        with h.ppl.plate("cases", 2000, subsample_size=None if whole else 100):
            group, x_, y_ = (h.ppl.subsample(a, event_dim=0) for a in (of_case, x, y))
            h.ppl.sample("y", h.dist.Normal(intercept[..., group] + slope * x_, 0.5), obs=y_)

    def guide():
        for name in ("mu", "log_tau", "slope"):
            h.ppl.sample(name, mean_field(h, h.dist.Normal, name))
        intercept = mean_field(h, h.dist.Normal, "intercept", 40)
        with h.ppl.plate("groups", 40):
            h.ppl.sample("intercept", intercept)

    return Program(model, guide)


def binary(h: Any, whole: bool) -> Program:
    """A mixture of two lengths for the petals of 150 irises, with a Bernoulli for each petal."""
    lengths = h.array(load_iris().data[:, 2])

    def model():
        short = h.ppl.sample("short", h.dist.Normal(h.array(3.0), 2.0))
        longer = h.ppl.sample("longer", h.dist.Normal(h.array(3.0), 2.0))
        with h.ppl.plate("irises", 150):
            z = h.ppl.sample("z", h.dist.Bernoulli(h.array(0.5)))
            h.ppl.sample("y", h.dist.Normal(short + longer * z, 0.6), obs=lengths)

    def guide():
        for name in ("short", "longer"):
            h.ppl.sample(name, mean_field(h, h.dist.Normal, name))
        logits = h.ppl.param("logits", h.array(np.zeros(150)))
        with h.ppl.plate("irises", 150):
            h.ppl.sample("z", h.dist.Bernoulli(logits=logits))

    return Program(model, guide)


def mixture(h: Any, whole: bool) -> Program:
    """A posterior with two modes, and a guide that is a mixture of three Normals."""
    return mixture_guide(h, h.dist.Normal)


def network(h: Any, name: str, inputs: int, outputs: int, seed: int) -> Any:
    """A network with one hidden layer."""
    rng = np.random.default_rng(seed)
    sizes = {"w1": (inputs, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, outputs), "b2": (outputs,)}
    initial = {key: rng.normal(size=size) / np.sqrt(size[0]) if len(size) == 2 else np.zeros(size) for key, size in sizes.items()}
    w1, b1, w2, b2 = (h.ppl.param(f"{name}.{key}", h.array(value)) for key, value in initial.items())
    return lambda x: h.xp.tanh(x @ w1 + b1) @ w2 + b2


def autoencoder(h: Any, whole: bool, kind: str) -> Program:
    """1,500 digits in minibatches of 64; 297 are held out."""
    size = {"Bernoulli": 20, "Gaussian": 10}[kind]
    images = h.array(HELD_OUT if whole else TRAINED)
    zeros = h.array(np.zeros(size))

    def plate():
        return h.ppl.plate("images", len(images), subsample_size=None if whole else BATCH)

    def latent(parameters):
        if kind == "Bernoulli":
            return h.dist.Bernoulli(logits=parameters).to_event(1)
        return h.dist.Normal(parameters[..., :size], h.xp.exp(parameters[..., size:])).to_event(1)

    def guide():
        encode = network(h, "encoder", IMAGES.shape[1], size * (2 if kind == "Gaussian" else 1), 0)
        with plate():
            h.ppl.sample("z", latent(encode(h.ppl.subsample(images, event_dim=1))))

    def model():
        decode = network(h, "decoder", size, IMAGES.shape[1], 1)
        with plate():
            x = h.ppl.subsample(images, event_dim=1)
            prior = h.dist.Bernoulli(logits=zeros) if kind == "Bernoulli" else h.dist.Normal(zeros, 1.0)
            z = h.ppl.sample("z", prior.to_event(1))
            h.ppl.sample("x", h.dist.Bernoulli(logits=decode(1.0 * z)).to_event(1), obs=x)

    return Program(model, guide)


def bernoulli_autoencoder(h: Any, whole: bool) -> Program:
    return autoencoder(h, whole, "Bernoulli")


def gaussian_autoencoder(h: Any, whole: bool) -> Program:
    return autoencoder(h, whole, "Gaussian")


def directions(h: Any, whole: bool) -> Program:
    """The mean directions of 20 groups of five generated angles, and a common direction, each a VonMises."""
    rng = np.random.default_rng(0)
    centres = rng.vonmises(0.8, 2.0, 20)
    angles = h.array(rng.vonmises(centres, 3.0, (5, 20)).T)

    def model():
        common = h.ppl.sample("common", h.dist.VonMises(h.array(0.0), 0.1))
        with h.ppl.plate("groups", 20):
            centre = h.ppl.sample("centre", h.dist.VonMises(common, 2.0))
            h.ppl.sample("y", h.dist.VonMises(centre[..., None], h.array(np.full(5, 3.0))).to_event(1), obs=angles)

    def guide():
        positive = h.dist.constraints.positive
        loc, concentration = h.ppl.param("common_loc", h.array(0.0)), h.ppl.param("common_c", h.array(1.0), constraint=positive)
        h.ppl.sample("common", h.dist.VonMises(loc, concentration))
        locs = h.ppl.param("centre_loc", h.array(np.zeros(20)))
        concentrations = h.ppl.param("centre_c", h.array(np.ones(20)), constraint=positive)
        with h.ppl.plate("groups", 20):
            h.ppl.sample("centre", h.dist.VonMises(locs, concentrations))

    return Program(model, guide)


def volatility(h: Any, whole: bool) -> Program:
    """A state space model in ``scan``: the volatility of 100 generated returns; NumPyro only."""
    rng, x, states = np.random.default_rng(0), 0.0, []
    for _ in range(100):
        x = 0.95 * x + 0.4 * rng.normal()
        states.append(x)
    returns = h.array(np.exp(np.array(states) / 2) * rng.normal(size=100))

    def model():
        def step(x, y):
            x = h.ppl.sample("x", h.dist.Normal(0.95 * x, 0.4))
            h.ppl.sample("y", h.dist.Normal(0.0, h.xp.exp(x / 2)), obs=y)
            return x, None

        h.scan(step, h.array(0.0), returns)

    def guide():
        loc, slope = h.ppl.param("loc", h.array(np.zeros(100))), h.ppl.param("slope", h.array(np.zeros(100)))
        scale = h.ppl.param("scale", h.array(np.full(100, 0.5)), constraint=h.dist.constraints.positive)

        def step(x, at):
            return h.ppl.sample("x", h.dist.Normal(at[0] + at[1] * x, at[2])), None

        h.scan(step, h.array(0.0), (loc, slope, scale))

    return Program(model, guide)

"""The programs that are measured, each written once for both hosts.

A program is a function of a host and of a family. The host ``h`` is :class:`NumPyro` or :class:`Pyro`, the few names that programs use.
``normal`` is the family of the guide's continuous sites: the host's Normal, or one without a reparameterized sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.control_flow
import numpyro.contrib.module
import pyro
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from sklearn.datasets import load_breast_cancer, load_digits

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR


class Program(NamedTuple):
    model: Callable
    guide: Callable
    args: tuple = ()


# Hosts.


class ScoreNormal(numpyro.distributions.Normal):
    """A Normal without a reparameterized sampler."""

    reparametrized_params: tuple[str, ...] = ()

    def sample(self, key, sample_shape=()):
        return jax.lax.stop_gradient(super().sample(key, sample_shape))


class NumPyro:
    name = "NumPyro"
    ppl, dist, xp, flow = numpyro, numpyro.distributions, jnp, flowvi.numpyro
    score_normal = ScoreNormal
    scan = staticmethod(numpyro.contrib.control_flow.scan)

    @staticmethod
    def array(x):
        return jnp.asarray(x, float)

    @staticmethod
    def network(name: str, inputs: int, outputs: int, seed: int) -> Callable[[], Callable]:
        """A network with one hidden layer. A call of the returned function registers its parameters."""
        module = equinox.nn.MLP(inputs, outputs, HIDDEN, 1, jax.nn.tanh, key=jax.random.key(seed))
        return lambda: jnp.vectorize(numpyro.contrib.module.eqx_module(name, module), signature="(i)->(o)")


class Pyro:
    name = "Pyro"
    ppl, dist, xp, flow = pyro, pyro.distributions, torch, flowvi.pyro
    score_normal = NonreparameterizedNormal

    @staticmethod
    def array(x):
        return torch.as_tensor(np.asarray(x), dtype=torch.get_default_dtype())

    @staticmethod
    def network(name: str, inputs: int, outputs: int, seed: int) -> Callable[[], Callable]:
        """As for NumPyro."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = torch.nn.Sequential(torch.nn.Linear(inputs, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, outputs))
        return lambda: pyro.module(name, module)


HOSTS: tuple[Any, ...] = (NumPyro, Pyro)


# Programs.


def mean_field(h, normal, name: str, size: int | None = None, scale: float = 0.1):
    """A mean-field site of a guide: its two parameters, in the plates around it, and its distribution."""
    shape = () if size is None else (size,)
    loc = h.ppl.param(f"{name}_loc", h.array(np.zeros(shape)))
    return normal(loc, h.ppl.param(f"{name}_scale", h.array(np.full(shape, scale)), constraint=h.dist.constraints.positive))


def noisy_cone(h, normal) -> Program:
    """A point in the plane. Its squared distance from 0 is observed, with noise that grows with the distance."""

    def model():
        x = h.ppl.sample("x", h.dist.Normal(0.0, 10.0))
        y = h.ppl.sample("y", h.dist.Normal(0.0, 10.0))
        r = x**2 + y**2
        h.ppl.sample("r", h.dist.Normal(r, 0.1 + r / 100), obs=h.array(5.0))

    def guide():
        for name in ("x", "y"):
            h.ppl.sample(name, mean_field(h, normal, name, scale=1.0))

    return Program(model, guide)


def eight_schools(h, normal) -> Program:
    """Rubin's eight schools, non-centred."""
    effect, error = h.array([28, 8, -3, 7, -1, 1, 18, 12]), h.array([15, 10, 16, 11, 9, 11, 10, 18])

    def model():
        mu = h.ppl.sample("mu", h.dist.Normal(0.0, 5.0))
        log_tau = h.ppl.sample("log_tau", h.dist.Normal(h.array(1.0), 1.0))
        with h.ppl.plate("schools", 8):
            z = h.ppl.sample("z", h.dist.Normal(0.0, 1.0))
            h.ppl.sample("effect", h.dist.Normal(mu + h.xp.exp(log_tau) * z, error), obs=effect)

    def guide():
        h.ppl.sample("mu", mean_field(h, normal, "mu"))
        h.ppl.sample("log_tau", mean_field(h, normal, "log_tau"))
        z = mean_field(h, normal, "z", 8, scale=0.5)
        with h.ppl.plate("schools", 8):
            h.ppl.sample("z", z)

    return Program(model, guide)


def logistic_regression(h, normal) -> Program:
    """Breast cancer, 569 cases: 30 features and an intercept."""
    x, y = load_breast_cancer(return_X_y=True)
    features = h.array(np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)]).T)
    labels = h.array(y)

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(np.zeros(31)), 1.0).to_event(1))
        h.ppl.sample("y", h.dist.Bernoulli(logits=w @ features).to_event(1), obs=labels)

    def guide():
        h.ppl.sample("w", mean_field(h, normal, "w", 31).to_event(1))

    return Program(model, guide)


def hierarchical_regression(h, normal, groups: int = 20, cases: int = 15) -> Program:
    """An intercept and a slope for each group, non-centred, with common means and scales; the data are generated."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(cases, groups))
    mean, spread = np.array([[1.0], [-0.5]]), np.array([[0.8], [0.4]])
    intercept, slope = mean + spread * rng.normal(size=(2, groups))
    features, observed = h.array(x), h.array(intercept + slope * x + 0.7 * rng.normal(size=x.shape))

    def model():
        intercept, slope = (h.ppl.sample(name, h.dist.Normal(0.0, 2.0)) for name in ("intercept", "slope"))
        spread = [h.xp.exp(h.ppl.sample(name, h.dist.Normal(-1.0, 1.0))) for name in ("log_of_intercept", "log_of_slope")]
        log_noise = h.ppl.sample("log_noise", h.dist.Normal(0.0, 1.0))
        with h.ppl.plate("groups", groups, dim=-1):
            u, v = (h.ppl.sample(name, h.dist.Normal(0.0, 1.0)) for name in ("u", "v"))
            with h.ppl.plate("cases", cases, dim=-2):
                loc = intercept + spread[0] * u + (slope + spread[1] * v) * features
                h.ppl.sample("y", h.dist.Normal(loc, h.xp.exp(log_noise)), obs=observed)

    def guide():
        for name in ("intercept", "slope", "log_of_intercept", "log_of_slope", "log_noise"):
            h.ppl.sample(name, mean_field(h, normal, name))
        local = [mean_field(h, normal, name, groups, scale=0.5) for name in ("u", "v")]
        with h.ppl.plate("groups", groups, dim=-1):
            for name, fn in zip(("u", "v"), local, strict=True):
                h.ppl.sample(name, fn)

    return Program(model, guide)


IMAGES = (load_digits().data > 7.5).astype(float)  # 1,797 images of 8 x 8 pixels, binarised at half of their range
PIXELS, HIDDEN, BATCH = IMAGES.shape[1], 100, 64
LATENTS = {"Bernoulli": 20, "Gaussian": 10}


def autoencoder(h, normal, kind: str = "Gaussian", size: int | None = None, estimator: Callable | None = None) -> Program:
    """A variational autoencoder of scikit-learn's digits in minibatches.

    Args:
        h: The host.
        normal: The family of Gaussian latents.
        kind: ``"Gaussian"`` or ``"Bernoulli"`` latents.
        size: How many.
        estimator: ``estimator(critic, images)`` gives that of the latents; ``critic()`` is a network from an image to a number.
    """
    size = size or LATENTS[kind]
    encoder = h.network("encoder", PIXELS, size * (2 if kind == "Gaussian" else 1), 0)
    critic = h.network("critic", PIXELS, 1, 1)
    decoder = h.network("decoder", size, PIXELS, 2)

    def latent(parameters):
        if kind == "Bernoulli":
            return h.dist.Bernoulli(logits=parameters).to_event(1)
        return normal(parameters[..., :size], h.xp.exp(parameters[..., size:])).to_event(1)

    def guide(images, batch):
        encode = encoder()
        with h.ppl.plate("images", len(images), subsample_size=batch):
            x = h.ppl.subsample(images, event_dim=1)
            h.ppl.sample("z", latent(encode(x)), infer={"estimator": estimator(critic, x)} if estimator else {})

    def model(images, batch):
        decode = decoder()
        zeros = h.array(np.zeros(size))
        with h.ppl.plate("images", len(images), subsample_size=batch):
            x = h.ppl.subsample(images, event_dim=1)
            prior = h.dist.Bernoulli(logits=zeros) if kind == "Bernoulli" else h.dist.Normal(zeros, 1.0)
            z = h.ppl.sample("z", prior.to_event(1))
            h.ppl.sample("x", h.dist.Bernoulli(logits=decode(1.0 * z)).to_event(1), obs=x)

    return Program(model, guide, (h.array(IMAGES), BATCH))


def mixture_guide(h, normal) -> Program:
    """A posterior with two modes, and a guide that is a mixture of three Normals."""

    def model():
        x = h.ppl.sample("x", h.dist.Normal(0.0, 3.0))
        h.ppl.sample("y", h.dist.Normal(abs(x), 0.5), obs=h.array(2.0))

    def guide():
        logits = h.ppl.param("logits", h.array(np.zeros(3)))
        locs = h.ppl.param("locs", h.array([-1.0, 0.0, 1.0]))
        scales = h.ppl.param("scales", h.array(np.ones(3)), constraint=h.dist.constraints.positive)
        h.ppl.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), h.dist.Normal(locs, scales)))

    return Program(model, guide)


def chain(h, normal, sites: int = 50) -> Program:
    """A chain of sites, each with an observation; the statements are unrolled."""
    observed = h.array(np.linspace(-1, 1, sites))

    def model():
        z = 0.0
        for i in range(sites):
            z = h.ppl.sample(f"z{i}", h.dist.Normal(h.array(0.0) + 0.5 * z, 1.0))
            h.ppl.sample(f"y{i}", h.dist.Normal(z, 1.0), obs=observed[i])

    def guide():
        for i in range(sites):
            h.ppl.sample(f"z{i}", mean_field(h, normal, f"z{i}"))

    return Program(model, guide)


def plate(h, normal, size: int = 1000, subsample: int | None = 50) -> Program:
    """A plate of local latents below a global one, with or without minibatches."""
    data = h.array(np.linspace(-2, 2, size))

    def model():
        mu = h.ppl.sample("mu", h.dist.Normal(h.array(0.0), 1.0))
        with h.ppl.plate("data", size, subsample_size=subsample):
            z = h.ppl.sample("z", h.dist.Normal(mu, 1.0))
            h.ppl.sample("y", h.dist.Normal(z, 1.0), obs=h.ppl.subsample(data, event_dim=0))

    def guide():
        h.ppl.sample("mu", mean_field(h, normal, "mu"))
        with h.ppl.plate("data", size, subsample_size=subsample):
            loc = h.ppl.param("z_loc", h.array(np.zeros(size)), event_dim=0)
            scale = h.ppl.param("z_scale", h.array(np.full(size, 0.5)), constraint=h.dist.constraints.positive, event_dim=0)
            h.ppl.sample("z", normal(loc, scale))

    return Program(model, guide)


def scan(h, normal, steps: int = 100) -> Program:
    """A state space model in ``scan``; NumPyro only."""
    observed = h.array(np.linspace(-1, 1, steps))

    def model():
        def step(x, y):
            x = h.ppl.sample("x", h.dist.Normal(0.9 * x, 1.0))
            h.ppl.sample("y", h.dist.Normal(x, 1.0), obs=y)
            return x, None

        h.scan(step, h.array(0.0), observed)

    def guide():
        loc = h.ppl.param("loc", h.array(np.zeros(steps)))
        scale = h.ppl.param("scale", h.array(np.full(steps, 0.5)), constraint=h.dist.constraints.positive)

        def step(x, at):
            fn = normal(at[0] + 0.5 * x, at[1])
            if normal is h.score_normal:  # handlers do not reach the draws inside scan
                fn = h.flow.Estimated(fn, LR())
            return h.ppl.sample("x", fn), None

        h.scan(step, h.array(0.0), (loc, scale))

    return Program(model, guide)


PROGRAMS: dict[str, Callable[..., Program]] = {
    "noisy cone": noisy_cone,
    "eight schools": eight_schools,
    "logistic regression": logistic_regression,
    "autoencoder": autoencoder,
    "mixture guide": mixture_guide,
    "chain of 50": chain,
    "plate of 1,000": plate,
    "scan of 100": scan,
}

SLOW_TO_COMPILE = ("chain of 50", "autoencoder")  # in NumPyro


def names(h: Any) -> list[str]:
    """The programs that run in this host."""
    return [name for name in PROGRAMS if name != "scan of 100" or h is NumPyro]

"""
A mixture guide for a posterior with two modes
==============================================

We measure θ², so the posterior of θ has two modes. A mixture of two Normals fits it, but neither Pyro nor NumPyro has a
reparameterized sampler for the weights of a mixture. ``Flow(fields.mixture())`` is pathwise: mass flows from one
component to the other along the line, with ψ = 0. (In one dimension ``ImplicitRP()`` has the same field, from the cdf.)
This example compares it with ``LR()``, in both libraries.
"""

# %%
# The model: θ ~ Normal(0, 2), a measurement 4 of θ², and a poor measurement 0.5 of θ itself.

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pyro.infer
import pyro.optim
import torch
from jax import random

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, Flow, fields, plot


class NumPyro:
    ppl, dist, array, exp = numpyro, numpyro.distributions, jnp.asarray, jnp.exp

    @staticmethod
    def fit(model, guide, estimator, steps):
        """The guide's parameters at the end."""
        elbo = flowvi.numpyro.TraceFlow_ELBO(num_particles=32, estimators={"theta": estimator})
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.03), elbo)
        return svi.run(random.key(0), steps, progress_bar=False).params


class Pyro:
    ppl, dist, array, exp = pyro, pyro.distributions, torch.as_tensor, torch.exp

    @staticmethod
    def fit(model, guide, estimator, steps):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = flowvi.pyro.TraceFlow_ELBO(
            num_particles=32, vectorize_particles=True, max_plate_nesting=0, estimators={"theta": estimator}
        )
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
        for _ in range(steps):
            svi.step()
        return {name: value.detach().numpy() for name, value in pyro.get_param_store().items()}


def model_of(host):
    def model():
        theta = host.ppl.sample("theta", host.dist.Normal(host.array(0.0), 2.0))
        host.ppl.sample("square", host.dist.Normal(theta**2, 2.0), obs=host.array(4.0))
        host.ppl.sample("self", host.dist.Normal(theta, 4.0), obs=host.array(0.5))

    return model


def guide_of(host):
    def guide():
        logits = host.ppl.param("logits", host.array([0.0, 0.0]))
        locs = host.ppl.param("locs", host.array([-1.0, 1.0]))
        scales = host.exp(host.ppl.param("log_scales", host.array([0.0, 0.0])))
        host.ppl.sample("theta", host.dist.MixtureSameFamily(host.dist.Categorical(logits=logits), host.dist.Normal(locs, scales)))

    return guide


ESTIMATORS = {"Flow(fields.mixture())": Flow(fields.mixture()), "LR()": LR()}
STEPS, NUM_SAMPLES = (10, 100) if "--smoke" in sys.argv else (400, 20_000)

# %%
# The exact posterior, on a grid.

theta = np.linspace(-4.0, 4.0, 801)
posterior = np.exp(-(theta**2) / 8 - (4 - theta**2) ** 2 / 8 - (0.5 - theta) ** 2 / 32)
posterior /= posterior.sum() * (theta[1] - theta[0])

# %%
# Fit and plot. The Kullback-Leibler divergence on the grid says how far a guide is from the posterior.


def density(params):
    """The guide's density at theta."""
    weights, scales = np.exp(params["logits"]), np.exp(params["log_scales"])
    z = (theta[:, None] - np.asarray(params["locs"])) / scales
    return (np.exp(-(z**2) / 2) / (scales * np.sqrt(2 * np.pi))) @ (weights / weights.sum())


plt.rcParams.update(plot.STYLE)
_, left = plt.subplots(figsize=(5.5, 3.4))
left.fill_between(theta, posterior, color="0.85", label="exact posterior")
for (label, estimator), color in zip(ESTIMATORS.items(), plot.COLORS, strict=False):
    for host, style in ((NumPyro, "-"), (Pyro, ":")):
        fitted = density(host.fit(model_of(host), guide_of(host), estimator, STEPS))
        left.plot(theta, fitted, style, color=color, label=label if host is NumPyro else None)
        divergence = (fitted * np.log(fitted / posterior)).sum() * (theta[1] - theta[0])
        print(f"{label} in {host.__name__}: {divergence:.4f} nats from the posterior")
left.plot([], [], ":", color="0.4", label="the same in Pyro")
left.set(xlabel="θ", ylabel="density", ylim=(0.0, 1.9 * posterior.max()))
left.legend(loc="upper left")
plt.show()

# %%
# The flow has a price. Mass that moves from one mode to the other must cross the gap between them. There p is small, and
# u, which is (F_1 - F_2)/p up to a factor, is large. The figure has the standard deviation of the gradient in the first
# logit, for the cost φ = θ and modes of scale 1:

_, right = plt.subplots(figsize=(5.5, 3.4))
distances = np.linspace(1.0, 8.0, 8)
for estimator, color in zip(ESTIMATORS.values(), plot.COLORS, strict=False):
    std = []
    for distance in distances:

        def mixture(t, distance=distance):
            components = Pyro.dist.Normal(torch.tensor([-distance / 2, distance / 2]), 1.0)
            return Pyro.dist.MixtureSameFamily(Pyro.dist.Categorical(logits=torch.stack([t, 0 * t])), components)

        std.append(plot.gradient_samples(mixture(torch.tensor(0.0)), estimator, mixture, lambda x: x, num_samples=NUM_SAMPLES).std())
    right.plot(distances, std, "o-", color=color, markersize=3)
right.set(xlabel="distance of the modes, in scales", ylabel="std of the gradient in a logit", yscale="log")
plt.show()

# %%
# Both estimators fit the two modes. For the weights of a mixture the pathwise gradient is better if the modes overlap. If
# they are more than about three scales apart, LR is better.

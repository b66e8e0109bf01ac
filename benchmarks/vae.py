"""Variational autoencoders on scikit-learn's digits, with Bernoulli and with Gaussian latents, in both hosts.

The 1,797 images (8 x 8) are binarised at half of their range; minibatches hold 64 of them; encoder and decoder have one hidden layer
of 100 units; Adam with step size 0.003. For each way to estimate the gradient, one row holds the importance-weighted bound with 50
particles on all images, in nats per image, after a number of steps, and the milliseconds of one step (which depend on the machine):

    python benchmarks/vae.py
    python benchmarks/vae.py --smoke
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.module
import numpyro.infer
import pyro
import pyro.infer
import torch
from sklearn.datasets import load_digits

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, Auto, Baseline

IMAGES = (load_digits().data > 7.5).astype(np.float32)
PIXELS, HIDDEN, BATCH = IMAGES.shape[1], 100, 64
LATENTS = {"Bernoulli": 20, "Gaussian": 10}

# For each kind of latents, what is compared: the objective and its options, and whether the LR sites have a network as baseline.
METHODS: dict[tuple[str, str], tuple[str, dict[str, Any], bool]] = {
    ("Bernoulli", "LR, no baseline"): ("TraceFlow_ELBO", {"num_particles": 1}, False),
    ("Bernoulli", "LR + leave-one-out, 5 particles"): ("TraceFlow_ELBO", {"num_particles": 5}, False),
    ("Bernoulli", "LR + network baseline"): ("TraceFlow_ELBO", {"num_particles": 1}, True),
    ("Bernoulli", "VIMCO, 5 particles"): ("TraceFlow_RenyiELBO", {"num_particles": 5}, False),
    ("Gaussian", "RP"): ("TraceFlow_ELBO", {"num_particles": 1}, False),
    ("Gaussian", "RP, 5 particles"): ("TraceFlow_ELBO", {"num_particles": 5}, False),
    ("Gaussian", "IWAE, 5 particles"): ("TraceFlow_RenyiELBO", {"num_particles": 5}, False),
    ("Gaussian", "DReG, 5 particles"): ("TraceFlow_RenyiELBO", {"num_particles": 5, "gradient": "dreg"}, False),
}


def latent(dist, xp, kind: str, parameters):
    if kind == "Bernoulli":
        return dist.Bernoulli(logits=parameters).to_event(1)
    size = parameters.shape[-1] // 2
    return dist.Normal(parameters[..., :size], xp.exp(parameters[..., size:])).to_event(1)


def prior(dist, xp, kind: str):
    zeros = xp.zeros(LATENTS[kind])
    return (dist.Bernoulli(logits=zeros) if kind == "Bernoulli" else dist.Normal(zeros, 1.0)).to_event(1)


class NumPyro:
    name = "NumPyro"
    flow = flowvi.numpyro

    def __init__(self, kind: str, baseline: bool, objective):
        outputs = LATENTS[kind] * (2 if kind == "Gaussian" else 1)

        def network(name, inputs, outputs, seed):
            module = equinox.nn.MLP(inputs, outputs, HIDDEN, 1, jax.nn.tanh, key=jax.random.key(seed))
            return jnp.vectorize(numpyro.contrib.module.eqx_module(name, module), signature="(i)->(o)")

        def guide(images, size):
            encode = network("encoder", PIXELS, outputs, 0)
            critic = network("critic", PIXELS, 1, 1) if baseline else None
            with numpyro.plate("images", len(images), subsample_size=size):
                batch = numpyro.subsample(images, event_dim=1)
                infer = {} if critic is None else {"estimator": LR(baseline=Baseline(critical(critic, size), batch))}
                numpyro.sample("z", latent(numpyro.distributions, jnp, kind, encode(batch)), infer=infer)

        def model(images, size):
            decode = network("decoder", LATENTS[kind], PIXELS, 2)
            with numpyro.plate("images", len(images), subsample_size=size):
                batch = numpyro.subsample(images, event_dim=1)
                z = numpyro.sample("z", prior(numpyro.distributions, jnp, kind))
                numpyro.sample("x", numpyro.distributions.Bernoulli(logits=decode(1.0 * z)).to_event(1), obs=batch)

        self.images = jnp.asarray(IMAGES)
        self.svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(3e-3), objective)
        self.state = self.svi.init(jax.random.key(0), self.images, BATCH)

        def update(_, state):
            return self.svi.update(state, self.images, BATCH)[0]

        def bound(state, particles):
            wide = self.flow.TraceFlow_RenyiELBO(num_particles=particles, estimators={"z": Auto()})
            parameters = self.svi.get_params(state)
            return wide.loss(jax.random.key(1), parameters, model, guide, self.images, len(IMAGES))

        self._loop = jax.jit(lambda state, n: jax.lax.fori_loop(0, n, update, state))
        self._bound = jax.jit(bound, static_argnums=1)
        jax.block_until_ready(self._loop(self.state, 0))

    def run(self, steps: int):
        self.state = jax.block_until_ready(self._loop(self.state, steps))

    def bound(self, particles: int) -> float:
        return -float(self._bound(self.state, particles)) / len(IMAGES)


class Pyro:
    name = "Pyro"
    flow = flowvi.pyro

    def __init__(self, kind: str, baseline: bool, objective):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        outputs = LATENTS[kind] * (2 if kind == "Gaussian" else 1)

        def network(inputs, outputs):
            return torch.nn.Sequential(torch.nn.Linear(inputs, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, outputs))

        encoder, decoder, critic = network(PIXELS, outputs), network(LATENTS[kind], PIXELS), network(PIXELS, 1)

        def guide(images, size):
            pyro.module("encoder", encoder)
            if baseline:
                pyro.module("critic", critic)
            with pyro.plate("images", len(images), subsample_size=size) as i:
                infer = {"estimator": LR(baseline=Baseline(critical(critic, size), images[i]))} if baseline else {}
                pyro.sample("z", latent(pyro.distributions, torch, kind, encoder(images[i])), infer=infer)

        def model(images, size):
            pyro.module("decoder", decoder)
            with pyro.plate("images", len(images), subsample_size=size) as i:
                z = pyro.sample("z", prior(pyro.distributions, torch, kind))
                pyro.sample("x", pyro.distributions.Bernoulli(logits=decoder(z)).to_event(1), obs=images[i])

        self.images = torch.as_tensor(IMAGES)
        self.model, self.guide = model, guide
        self.svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), objective)

    def run(self, steps: int):
        for _ in range(steps):
            self.svi.step(self.images, BATCH)

    def bound(self, particles: int) -> float:
        wide = self.flow.TraceFlow_RenyiELBO(0.0, particles, 1, vectorize_particles=True, estimators={"z": Auto()})
        return -wide.loss(self.model, self.guide, self.images, len(IMAGES)) / len(IMAGES)


def critical(network, size: int):
    """The baseline of a cost that is scaled by the subsampling."""
    return lambda batch: len(IMAGES) / size * network(batch)[..., 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of two of them, to see that they run")
    smoke = parser.parse_args().smoke
    steps, particles, methods = (20, 2, list(METHODS)[2::5]) if smoke else (4000, 50, list(METHODS))
    checkpoints = sorted({steps // 20, steps // 4, steps})
    header = "".join(f"{f'{n} steps':>12}" for n in checkpoints)
    print(f"{'latents':<11}{'gradient':<33}{'host':<9}{header}{'ms a step':>11}")
    for kind, method in methods:
        objective, options, baseline = METHODS[kind, method]
        for host in (NumPyro, Pyro):
            more = {"max_plate_nesting": 1, "vectorize_particles": True} if host is Pyro else {}
            run = host(kind, baseline, getattr(host.flow, objective)(**options, **more))
            bounds, done, seconds = [], 0, 0.0
            for n in checkpoints:
                start = perf_counter()
                run.run(n - done)
                seconds, done = seconds + perf_counter() - start, n
                bounds.append(run.bound(particles))
            row = "".join(f"{bound:>12.2f}" for bound in bounds)
            print(f"{kind:<11}{method:<33}{host.name:<9}{row}{1e3 * seconds / steps:>11.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Training a variational autoencoder of scikit-learn's digits, with Bernoulli and with Gaussian latents, in both hosts.

Minibatches hold 64 of the 1,797 images; encoder and decoder have one hidden layer of 100 units; Adam with step size 0.003. For each way
to estimate the gradient, a row holds the importance-weighted bound with 50 particles on all images, in nats per image, after a number
of steps (larger is better), and the milliseconds of one step. About three minutes:

    python benchmarks/vae.py
    python benchmarks/vae.py --smoke
    python benchmarks/vae.py --only NumPyro Gaussian
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from programs import BATCH, HOSTS, IMAGES, NumPyro, Program, autoencoder
from tables import figure, options, table
from timing import STEPS, particles, seconds, use_one_thread

from flowvi import Auto, Baseline

# For each kind of latents, what is compared: the objective, its particles and options, and whether LR has a network as its baseline.
METHODS: dict[tuple[str, str], tuple[str, int, dict[str, Any], bool]] = {
    ("Bernoulli", "LR, no baseline"): ("TraceFlow_ELBO", 1, {}, False),
    ("Bernoulli", "LR + leave-one-out, 5 particles"): ("TraceFlow_ELBO", 5, {}, False),
    ("Bernoulli", "LR + network baseline"): ("TraceFlow_ELBO", 1, {}, True),
    ("Bernoulli", "VIMCO, 5 particles"): ("TraceFlow_RenyiELBO", 5, {}, False),
    ("Gaussian", "RP"): ("TraceFlow_ELBO", 1, {}, False),
    ("Gaussian", "RP, 5 particles"): ("TraceFlow_ELBO", 5, {}, False),
    ("Gaussian", "IWAE, 5 particles"): ("TraceFlow_RenyiELBO", 5, {}, False),
    ("Gaussian", "DReG, 5 particles"): ("TraceFlow_RenyiELBO", 5, {"gradient": "dreg"}, False),
}


def network_baseline(network, images) -> Baseline:
    """The baseline of a cost that is scaled by the subsampling."""
    return Baseline(lambda x: len(IMAGES) / BATCH * network(x)[..., 0], images)


def bound(h: Any, side: Any, program: Program, number: int) -> float:
    """The importance-weighted bound on all images, in nats per image."""
    wide = h.flow.TraceFlow_RenyiELBO(estimators={"z": Auto()}, **particles(h, number))
    model, guide, (images, _) = program
    if h is NumPyro:
        loss = jax.jit(lambda parameters: wide.loss(jax.random.key(1), parameters, model, guide, images, len(images)))
        return -float(loss(side.svi.get_params(side.state))) / len(images)
    return -wide.loss(model, guide, images, len(images)) / len(images)


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    steps, number, methods = (20, 2, list(METHODS)[2:3]) if options_given.smoke else (3000, 50, list(METHODS))
    checkpoints = sorted({steps // 20, steps // 4, steps})
    columns = ("Latents", "Gradient", "Host", *(f"{n} steps" for n in checkpoints), "ms a step")
    about = "The importance-weighted bound with 50 particles, in nats per image, after so many steps of training; larger is better."
    with table("vae", options_given, columns, about) as row:
        for kind, method in methods:
            objective, k, more, baseline = METHODS[kind, method]
            for h in HOSTS:
                if not options_given.wants(h.name, kind, method):
                    continue
                program = autoencoder(h, h.dist.Normal, kind, network_baseline if baseline else None)
                side = STEPS[h](program, getattr(h.flow, objective)(**particles(h, k), **more), rate=3e-3)
                side.run(0)  # compiled before it is timed
                spent, bounds = 0.0, []
                for n in np.diff([0, *checkpoints]):
                    spent += seconds(side, int(n))
                    bounds.append(bound(h, side, program, number))
                row(kind, method, h.name, *(figure(b, ".2f") for b in bounds), f"{1e3 * spent / steps:.2f}")


if __name__ == "__main__":
    main()

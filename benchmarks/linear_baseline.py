"""Does a linear model of the cost help, in addition to the leave-one-out mean? The Bernoulli autoencoder of digits, in JAX.

c . (z - mu) is subtracted from the cost f of each particle, and the exact gradient of its mean is added (the double control variate of
Titsias and Shi 2022). The slope c is

    at the mean of the others     the gradient of f at the mean of the other particles
    mean of the others            the mean gradient of f at the other particles, which the backward pass computes anyway
    learned                       minus the logits, which is exact for the guide's density, plus a network of the image

All of them, and "none", leave out the score of the guide's own density, as ``entropy="stl"`` does; its mean is 0. A row has the
variance of the gradient in the encoder's logits with leave-one-out alone over that with the baseline, after some steps of training with
leave-one-out, and the same ratio of times. Each slope by a gradient is multiplied by the factor of least variance, found on the same
samples, so these rows are upper bounds. About two minutes:

    python benchmarks/linear_baseline.py
    python benchmarks/linear_baseline.py --smoke
"""

from __future__ import annotations

from functools import partial
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs import BATCH, HIDDEN, IMAGES, PIXELS
from tables import figure, options, table

TRAINED, SIZE, K = jnp.asarray(IMAGES[:1500]), 20, 4
SLOPES = ("none", "at the mean of the others", "mean of the others", "learned")
AT = (100, 500, 2000)


def network(inputs: int, outputs: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    w, v = rng.normal(size=(inputs, HIDDEN)) / np.sqrt(inputs), rng.normal(size=(HIDDEN, outputs)) / np.sqrt(HIDDEN)
    return {"w": jnp.asarray(w), "a": jnp.zeros(HIDDEN), "v": jnp.asarray(v), "b": jnp.zeros(outputs)}


def apply(p: dict[str, Any], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["a"]) @ p["v"] + p["b"]


def log_bernoulli(logits: jax.Array, z: jax.Array) -> jax.Array:
    return (z * logits - jax.nn.softplus(logits)).sum(-1)


def gradients(params: dict[str, Any], x: jax.Array, key: jax.Array, slope: str | None, share: Any = 1.0) -> tuple[dict[str, Any], Any]:
    """Minus the gradient in all parameters, and the gradient of the ELBO in the logits, averaged over the particles."""
    logits, of_encoder = jax.vjp(lambda p: apply(p, x), params["encoder"])
    mu = jax.nn.sigmoid(logits)
    z = jax.random.bernoulli(key, mu, (K, *mu.shape)).astype(float)

    def cost(decoder, z, logits):
        return log_bernoulli(apply(decoder, z), x) - SIZE * jnp.log(2.0) - log_bernoulli(logits, z)

    f, backward = jax.vjp(cost, params["decoder"], z, logits)
    of_decoder, of_z, of_logits = backward(jnp.full_like(f, 1 / K))
    centred, of_slope = z - mu, None

    def without_own(a):
        return (a.sum(0) - a) / (K - 1)

    if slope is not None:
        of_logits = jnp.zeros_like(logits)  # the score of the guide's own density
    if slope is None or slope == "none":
        rest = f - without_own(f)
    elif slope == "learned":
        c, of_network = jax.vjp(lambda p: apply(p, x), params["slope"])
        rest = f - ((c - logits) * centred).sum(-1)
        rest = rest - without_own(rest)
        (of_slope,) = of_network((-rest[..., None] * centred).mean(0))  # the gradient of half the squared residual
        of_logits = of_logits + (c - logits) * mu * (1 - mu)
    else:
        if slope == "mean of the others":
            c = share * without_own(K * of_z)
        else:
            c = share * jax.grad(lambda z: cost(params["decoder"], z, logits).sum())(without_own(z))
        linear = jnp.einsum("kbd,jbd->kjb", c, centred)
        rest = f - linear[jnp.arange(K), jnp.arange(K)]
        rest = rest - ((1 - jnp.eye(K))[..., None] * (f - linear)).sum(1) / (K - 1)
        of_logits = of_logits + c.mean(0) * mu * (1 - mu)
    of_logits = of_logits + (rest[..., None] * centred).mean(0)
    found = {"encoder": of_encoder(-of_logits)[0], "decoder": jax.tree.map(jnp.negative, of_decoder)}
    return found if of_slope is None else {**found, "slope": of_slope}, of_logits


@partial(jax.jit, static_argnums=1)
def trained(params: dict[str, Any], steps: int) -> dict[str, Any]:
    """The autoencoder after steps of Adam with leave-one-out, and the slope learned at the same time."""

    def step(carry, i):
        params, m, v = carry
        which, draw = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        x = TRAINED[jax.random.choice(which, len(TRAINED), (BATCH,), replace=False)]
        found = gradients(params, x, draw, None)[0] | {"slope": gradients(params, x, draw, "learned")[0]["slope"]}
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, found)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, found)
        a, b = 1 - 0.9 ** (i + 1.0), 1 - 0.999 ** (i + 1.0)
        return (jax.tree.map(lambda p, m, v: p - 3e-3 * (m / a) / (jnp.sqrt(v / b) + 1e-8), params, m, v), m, v), None

    zero = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(step, (params, zero, zero), jnp.arange(steps))[0][0]


@partial(jax.jit, static_argnums=(1, 3))
def of_logits(params: dict[str, Any], slope: str | None, share: float, samples: int) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), samples)
    return jax.lax.map(lambda key: gradients(params, TRAINED[:BATCH], key, slope, share)[1], keys)


def gain(params: dict[str, Any], slope: str, samples: int) -> float:
    """The variance with leave-one-out alone over that with the slope, where a slope by a gradient has its best factor."""
    usual, none, whole = (np.asarray(of_logits(params, s, 1.0, samples)) for s in (None, "none", slope))
    usual, none, change = (a - a.mean(0) for a in (usual, none, whole - none))
    share = 1.0 if slope in ("none", "learned") else -(none * change).sum() / (change**2).sum()
    return float((usual**2).sum() / ((none + share * change) ** 2).sum())


def time_ratios(params: dict[str, Any], rounds: int) -> list[float]:
    """The CPU time of the gradient with each slope over that under leave-one-out, in turn."""
    sides = [jax.jit(partial(lambda s, p, key: gradients(p, TRAINED[:BATCH], key, s)[0], s)) for s in (None, *SLOPES)]
    for side in sides:
        jax.block_until_ready(side(params, jax.random.key(0)))
    times = np.empty((rounds, len(sides)))
    for i in range(rounds):
        for j in range(len(sides)) if i % 2 else reversed(range(len(sides))):
            start = process_time()
            for _ in range(20):
                found = sides[j](params, jax.random.key(0))
            jax.block_until_ready(found)
            times[i, j] = process_time() - start
    return list(np.median(times[:, 1:] / times[:, :1], 0))


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    smoke = options_given.smoke
    start = {"encoder": network(PIXELS, SIZE, 0), "decoder": network(SIZE, PIXELS, 1), "slope": network(PIXELS, SIZE, 2)}
    points = [trained(start, steps) for steps in ((2, 3) if smoke else AT)]
    columns = ("Slope", *(f"{steps} steps" for steps in (AT[:2] if smoke else AT)), "Time")
    about = f"The variance with leave-one-out alone over that with a linear baseline as well, and the ratio of times; {K} particles."
    ratios = time_ratios(points[-1], 2 if smoke else 21)
    with table("linear_baseline", options_given, columns, about) as row:
        for slope, ratio in zip(SLOPES, ratios, strict=True):
            row(slope, *(figure(gain(p, slope, 20 if smoke else 600), ".2f") for p in points), f"{ratio:.2f}")


if __name__ == "__main__":
    main()

"""Surrogate: RELAX, REBAR and LAX. The formulas at given draws, the exact mean and variance, what is learned, what is refused."""

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, Program, chain, each, z_scores
from numpyro.contrib.control_flow import scan
from quadrature import nodes
from test_alternatives_formulas import by_complex_step, sigmoid, softmax

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Surrogate, relaxations
from flowvi.estimators import attach

NUMPYRO = HOSTS["numpyro"]


# ---- at given draws and uniform numbers, against formulas that differentiate everything by a complex step


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum())


def binary(logits, x, v):
    """The two relaxed draws of independent Bernoullis: z with the noise that gives x held fixed, and z~."""

    def of_noise(u, logits):
        return logits + np.log(u) - np.log(1 - u)

    def noise(v, p):
        return np.where(x == 1, 1 - p + v * p, (1 - v) * (1 - p))

    p = sigmoid(logits)
    return of_noise(noise(v[0], p.real), logits), of_noise(noise(v[1], p), logits)


def categories(logits, x, v):
    """The same of one categorical; x is an index."""
    log_p = log_softmax(logits)

    def given(v, log_p):
        e = -np.log(v)
        return np.where(np.arange(len(v)) == x, -np.log(e[x]), -np.log(e / np.exp(log_p) + e[x]))

    fixed = log_p.real
    return given(v[0], fixed) - fixed + log_p, given(v[1], log_p)


def wave(math, z, a):
    """A surrogate of all coordinates of an event."""
    return (math.sin(a * z)).sum(-1) + 0.3 * z[..., 0] * z[..., -1]


class Law(NamedTuple):
    """A site with parameters theta: its distribution, its relaxed draws, its log probability, and draws."""

    make: Any
    relaxed: Any
    log_prob: Any
    theta: np.ndarray
    draws: list
    hosts: tuple[str, ...] = ("numpyro", "pyro")


def log_bernoulli(logits, x):
    return (x * logits - np.log(1 + np.exp(logits))).sum()


BITS = [np.array(b) for b in product((0, 1), repeat=3)]
LAWS = {
    "Bernoulli, logits": Law(
        lambda h, t: h.dist.Bernoulli(logits=t).to_event(1), binary, log_bernoulli, np.array([0.0, 0.7, -1.2]), BITS
    ),
    "Bernoulli, probs": Law(
        lambda h, t: h.dist.Bernoulli(probs=t).to_event(1),
        lambda t, x, v: binary(np.log(t) - np.log(1 - t), x, v),
        lambda t, x: log_bernoulli(np.log(t) - np.log(1 - t), x),
        np.array([0.5, 0.7, 0.1]),
        BITS,
    ),
    "Categorical, logits": Law(
        lambda h, t: h.dist.Categorical(logits=t), categories, lambda t, x: log_softmax(t)[x], np.array([0.3, 1.2, -0.8]), [0, 1, 2]
    ),
    "Categorical, probs": Law(
        lambda h, t: h.dist.Categorical(probs=t / t.sum(-1, keepdims=True)),
        lambda t, x, v: categories(np.log(t), x, v),
        lambda t, x: log_softmax(np.log(t))[x],
        np.array([0.3, 0.6, 0.1]),
        [0, 1, 2],
    ),
    "OneHotCategorical": Law(
        lambda h, t: h.dist.OneHotCategorical(logits=t),
        lambda t, x, v: categories(t, x.argmax(), v),
        lambda t, x: log_softmax(t)[x.argmax()],
        np.array([0.3, 1.2, -0.8]),
        list(np.eye(3)),
        ("pyro",),
    ),
}
OF_HOSTS = [pytest.param(HOSTS[host], law, id=f"{host}-{name}") for name, law in LAWS.items() for host in law.hosts]


def of_draws(host, law, surrogate, v):
    """The derivatives in theta of the control variate, for all draws of the law at once."""
    x = np.stack(law.draws)

    def control(values):
        target = host.target("x", law.make(host, values["theta"]), True)
        target.uniforms = lambda shape, like: host.array(v)
        draw = host.array(x) if host.name == "pyro" and x.ndim > 1 else host.integers(x)
        return attach(host.ops, target, surrogate, draw).control.sum()

    return host.value_and_gradient(control, {"theta": np.tile(law.theta, (len(x), 1))})[1]["theta"]


def by_hand(law, c, v):
    """The same: the derivative of c(z) - c(z~), less c(z~) times the score."""
    found = []
    for i, x in enumerate(law.draws):
        of_c = by_complex_step(lambda theta, x=x, i=i: np.subtract(*map(c, law.relaxed(theta, x, v[:, i]))), {"theta": law.theta})
        score = by_complex_step(lambda theta, x=x: law.log_prob(theta, x), {"theta": law.theta})
        found.append(of_c["theta"] - c(law.relaxed(law.theta, x, v[:, i])[1]) * score["theta"])
    return np.stack(found)


@pytest.mark.parametrize(("host", "law"), OF_HOSTS)
def test_at_given_draws(host, law):
    v = np.random.default_rng(1).uniform(size=(2, len(law.draws), 3))
    relax = Surrogate(lambda z, params: wave(host.math, z, params["a"]["b"]), {"a": {"b": 0.7}})
    np.testing.assert_allclose(of_draws(host, law, relax, v), by_hand(law, lambda z: wave(np, z, 0.7), v), rtol=1e-10, atol=1e-12)
    soft = sigmoid if law.draws is BITS else softmax
    rebar = Surrogate(lambda b: wave(host.math, b, 1.3), temperature=0.6)
    expected = by_hand(law, lambda z: wave(np, soft(z / 0.6), 1.3), v)
    np.testing.assert_allclose(of_draws(host, law, rebar, v), expected, rtol=1e-10, atol=1e-12)


def test_lax_at_given_draws(host):
    """The velocity of a Normal is 1 and (x - loc) / scale; two coordinates of one event."""
    x, theta = np.array([[0.3, -0.8], [1.9, 0.4]]), {"loc": np.array([[0.2, 0.5]] * 2), "scale": np.array([[0.7, 1.3]] * 2)}
    surrogate = Surrogate(lambda z, params: wave(host.math, z, params), 0.7)

    def control(values):
        target = host.target("x", host.dist.Normal(values["loc"], values["scale"]).to_event(1), True)
        return attach(host.ops, target, surrogate, host.array(x)).control.sum()

    found = host.value_and_gradient(control, theta)[1]
    eps = (x - theta["loc"]) / theta["scale"]
    (slopes,) = by_complex_step(lambda z: wave(np, z, 0.7), {"z": x.astype(complex)}).values()
    slopes, c = slopes.sum(-1).reshape(2, 2), wave(np, x, 0.7)[:, None]
    np.testing.assert_allclose(found["loc"], slopes - c * eps / theta["scale"], rtol=1e-10)
    np.testing.assert_allclose(found["scale"], slopes * eps - c * (eps**2 - 1) / theta["scale"], rtol=1e-10)


def test_extreme_numbers(host):
    """Uniform numbers next to 0 and 1, and probabilities next to 0, in single precision: z is finite and leads to x."""
    array = jnp.asarray if host.name == "numpyro" else torch.as_tensor

    def given(relaxation, eta, hard, v):
        arrays = (np.broadcast_to(a, np.shape(eta)).astype(np.float32) for a in (eta, hard, v))
        return map(host.numpy, relaxation.given(host.ops, *map(array, arrays)))

    for v in (0.0, 2.0**-24, 0.5, 1 - 2.0**-24):
        for hard in (0, 1):
            z, slope = given(relaxations.BINARY, [-80.0, -3.0, 0.0, 3.0, 80.0], hard, v)
            assert np.isfinite(z).all()
            assert ((2 * hard - 1) * z >= 0).all()
            assert ((slope >= 0) & (slope <= 1)).all()
        z, slope = given(relaxations.CATEGORIES, [[-1e-6, -15.0, -60.0]] * 3, np.eye(3), v)
        assert np.isfinite(z).all()
        assert (np.diag(z) == z.max(-1)).all()
        assert ((slope >= 0) & (slope <= 1)).all()


# ---- the toy problem of REBAR and RELAX: E[(b - t)^2] in the logit of b

LOGIT = 0.4
TOYS = {  # c and its derivative at z, and what it is in flowvi
    "RELAX": (
        Surrogate(lambda z, params: params[0] + params[1] * z + params[2] * z**2, [0.2, 0.02, -0.01]),
        lambda z, t: (0.2 + 0.02 * z - 0.01 * z**2, 0.02 - 0.02 * z),
    ),
    "REBAR": (None, lambda z, t: ((sigmoid(z / 2) - t) ** 2, (sigmoid(z / 2) - t) * sigmoid(z / 2) * (1 - sigmoid(z / 2)))),
}


def toy(t):
    def model(h, theta):
        b = h.sample("b", h.dist.Bernoulli(h.array(0.5)).mask(False))
        h.factor("cost", (b - t) ** 2)

    return Program(lambda h, theta: h.sample("b", h.dist.Bernoulli(logits=theta[0]).mask(False)), model, (LOGIT,))


def exact_of_toy(of_c, t):
    """The mean and the variance of one sample, by quadrature over the uniform numbers of z and of z~, which are independent given b."""
    u, q = nodes(0.0, 1.0)
    inside = (u > 1e-12) & (u < 1 - 1e-12)
    u, q = u[inside], q[inside]
    p, mean, second = sigmoid(LOGIT), 0.0, 0.0
    for b, mass in ((1, p), (0, 1 - p)):
        z = by_noise(LOGIT + 1e-30j, b, u)
        c, dc = of_c(z.real, t)
        parts = dc, (b - p) * ((b - t) ** 2 - c) - z.imag / 1e-30 * dc  # what z adds, and z~
        means, squares = ([(a * q).sum() for a in of] for of in (parts, [a**2 for a in parts]))
        mean += mass * sum(means)
        second += mass * (sum(squares) + 2 * means[0] * means[1])
    return mean, second - mean**2


def by_noise(logit, b, u):
    """z given b, from a uniform number u."""
    p = sigmoid(logit)
    v = 1 - p + u * p if b else u * (1 - p)
    return logit + np.log(v) - np.log(1 - v)


@pytest.mark.parametrize("t", [0.45, 0.499])
@pytest.mark.parametrize("name", TOYS)
def test_toy(host, name, t):
    """The exact mean and variance, with one particle and with four."""
    surrogate, of_c = TOYS[name]
    surrogate = surrogate or Surrogate(lambda b: (b - t) ** 2, temperature=2.0)
    mean, variance = exact_of_toy(of_c, t)
    p = sigmoid(LOGIT)
    np.testing.assert_allclose(mean, p * (1 - p) * (1 - 2 * t), rtol=1e-8)
    for particles, n in ((1, 20_000), (4, 5_000)):
        samples = host.gradients(toy(t), n, particles=particles, baseline=None, estimators={"b": surrogate})
        assert np.all(np.abs(z_scores(samples, mean, variance / particles)) < 5)
        squares = (samples - mean) ** 2
        assert np.all(np.abs(z_scores(squares, variance / particles)) < 5)

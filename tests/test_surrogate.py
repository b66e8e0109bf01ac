"""Surrogate: RELAX, REBAR and LAX. The formulas at given draws, the exact mean and variance, what is learned, what is refused."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hosts import HOSTS
from test_alternatives_formulas import by_complex_step, sigmoid, softmax

from flowvi import Surrogate
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

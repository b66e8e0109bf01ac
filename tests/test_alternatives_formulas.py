"""FiniteDifference, MeasureValued and DisARM at given draws and uniform numbers, against independent formulas.

The exact derivative of an expectation comes from a complex step. The mean of an estimator is a sum or a quadrature over the draw and
the uniform numbers: p(x) times the derivatives of the weights times the differences of a function.
"""

from dataclasses import dataclass, replace
from itertools import product
from math import comb, factorial, gamma
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import pyro.distributions
import pytest
import torch
from hosts import HOSTS, Program, always, each, z_scores
from quadrature import nodes

from flowvi import LR, DisARM, Enumerate, FiniteDifference, MeasureValued, Surrogate
from flowvi.alternatives import Alternatives
from flowvi.estimators import attach

FUNCTIONS = {"wave": lambda x: np.sin(1.3 * x + 0.4), "rational": lambda x: x**2 / (1 + 0.1 * x**2)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def by_complex_step(f, theta):
    """The derivatives of an array f(theta) in each element of theta, along the first axis."""
    found = {}
    for name, value in theta.items():
        steps = np.eye(np.size(value)).reshape(-1, *np.shape(value)) * 1e-30j
        found[name] = np.stack([np.imag(f(**{**theta, name: value + step})) / 1e-30 for step in steps])
    return found


# ---- what an estimator compares at given draws


@dataclass(frozen=True)
class Compared:
    """The values (M, N) at N draws; the derivatives of the weights (d, M, N) and of the score (d, N) in each parameter of size d."""

    values: np.ndarray
    weights: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]


def compared(host, distribution, theta, estimator, x, uniform=0.5, event_shape=()):
    """The comparison at N draws, each with its own parameters. All values get the same uniform numbers."""
    x = np.asarray(x)
    n = len(x)
    parameters = {name: np.broadcast_to(value, (n, *np.shape(value))).copy() for name, value in theta.items()}

    def drawn(parameters):
        target = host.target("x", distribution(host, **parameters), estimator.enters)
        draw = attach(host.ops, target, estimator, host.array(x) if x.dtype.kind == "f" else host.integers(x))
        uniforms = np.broadcast_to(uniform, (draw.comparison.num_uniforms, *x.shape)).copy()
        return draw, draw.comparison.make(host.array(uniforms))

    def weight(parameters, i):
        draw, (values, weights) = drawn(parameters)
        assert values.shape[0] == weights.shape[0] == draw.comparison.num_values
        return weights[i].sum(), values

    def score(parameters):
        draw, (values, _) = drawn(parameters)
        return (0.0 * sum(p.sum() for p in parameters.values()) if draw.score is None else draw.score.sum()), values

    _, of_score = host.value_and_gradient(score, parameters, has_aux=True)
    (_, values), _ = host.value_and_gradient(score, parameters, has_aux=True)
    of_weights = [host.value_and_gradient(lambda p, i=i: weight(p, i), parameters, has_aux=True)[1] for i in range(values.shape[0])]
    return Compared(
        host.numpy(values),
        {name: np.moveaxis(np.stack([g[name].reshape(n, -1) for g in of_weights]), -1, 0) for name in theta},
        {name: of_score[name].reshape(n, -1).T for name in theta},
    )


def expected(found, f, x, masses):
    """The mean of the estimator: its derivative of the expectation of f in each parameter."""
    difference = f(found.values.astype(float)) - f(np.asarray(x, float))
    return {
        name: (weights * difference * masses).sum((-1, -2)) + (found.scores[name] * f(np.asarray(x, float)) * masses).sum(-1)
        for name, weights in found.weights.items()
    }


# ---- integers


class DiscreteWeibull:
    """P(x >= k) = q^(k^b): a family with a cdf that flowvi does not know."""

    arg_constraints: ClassVar = {}

    def log_prob(self, value):
        m = self.math
        return m.log(self.q ** (value**self.b) - self.q ** ((value + 1) ** self.b))

    def cdf(self, value):
        return 1 - self.q ** ((value + 1) ** self.b)


class DiscreteWeibullInNumPyro(DiscreteWeibull, numpyro.distributions.Distribution):
    math = jnp
    support = numpyro.distributions.constraints.nonnegative_integer
    arg_constraints: ClassVar = dict.fromkeys("qb", numpyro.distributions.constraints.positive)

    def __init__(self, q, b, *, validate_args=None):
        self.q, self.b = q, b
        super().__init__(jnp.shape(q), validate_args=validate_args)


class DiscreteWeibullInPyro(DiscreteWeibull, pyro.distributions.TorchDistribution):
    math = torch
    support = pyro.distributions.constraints.nonnegative_integer
    arg_constraints: ClassVar = dict.fromkeys("qb", pyro.distributions.constraints.positive)

    def __init__(self, q, b):
        self.q, self.b = q, b
        super().__init__(q.shape)


class Counts(numpyro.distributions.Poisson):
    """A Poisson under another name, so that flowvi has only its cdf."""


def discrete_weibull(h, q, b):
    return {"numpyro": DiscreteWeibullInNumPyro, "pyro": DiscreteWeibullInPyro}[h.name](q, b)


@dataclass(frozen=True)
class Integers:
    """A family of integers: ``make(h, **theta)``, its probabilities at ``x``, and whether ``x`` is the whole support."""

    make: object
    masses: object
    theta: dict
    x: np.ndarray
    finite: bool = True
    hosts: tuple = ("numpyro", "pyro")


def probs_of(h, logits):
    e = h.math.exp(logits)
    return e / e.sum(-1, keepdims=True)


def binomial(p, n, k):
    return np.array([comb(n, int(i)) for i in k]) * p**k * (1 - p) ** (n - k)


def negative_binomial(p, r, k):
    return np.array([gamma(i + r) / gamma(r) / factorial(int(i)) for i in k]) * (1 - p) ** r * p**k


TWO, SIX, THREE, MANY = np.arange(2), np.arange(6), np.arange(3), np.arange(90)
FLOATS = {"Bernoulli", "Binomial", "Geometric", "NegativeBinomial", "Poisson"}  # Pyro draws these as floats
INTEGERS = {
    "Bernoulli, logits": Integers(
        lambda h, logits: h.dist.Bernoulli(logits=logits), lambda logits: binomial(sigmoid(logits), 1, TWO), {"logits": 0.7}, TWO
    ),
    "Bernoulli, logits 0": Integers(
        lambda h, logits: h.dist.Bernoulli(logits=logits), lambda logits: binomial(sigmoid(logits), 1, TWO), {"logits": 0.0}, TWO
    ),
    "Bernoulli, probs": Integers(
        lambda h, probs: h.dist.Bernoulli(probs=probs), lambda probs: binomial(probs, 1, TWO), {"probs": 0.3}, TWO
    ),
    "Binomial, logits": Integers(
        lambda h, logits: h.dist.Binomial(5, logits=logits), lambda logits: binomial(sigmoid(logits), 5, SIX), {"logits": -0.4}, SIX
    ),
    "Binomial, logits 0": Integers(
        lambda h, logits: h.dist.Binomial(5, logits=logits), lambda logits: binomial(sigmoid(logits), 5, SIX), {"logits": 0.0}, SIX
    ),
    "Binomial, probs": Integers(
        lambda h, probs: h.dist.Binomial(5, probs=probs), lambda probs: binomial(probs, 5, SIX), {"probs": 0.6}, SIX
    ),
    "Categorical, logits": Integers(lambda h, logits: h.dist.Categorical(logits=logits), softmax, {"logits": [0.3, -0.8, 0.5]}, THREE),
    "Categorical, probs": Integers(
        lambda h, logits: h.dist.Categorical(probs=probs_of(h, logits)), softmax, {"logits": [0.3, -0.8, 0.5]}, THREE
    ),
    "Geometric, logits": Integers(
        lambda h, logits: h.dist.Geometric(logits=logits),
        lambda logits: sigmoid(logits) * sigmoid(-logits) ** MANY,
        {"logits": 0.2},
        MANY,
        False,
    ),
    "Geometric, probs": Integers(
        lambda h, probs: h.dist.Geometric(probs=probs), lambda probs: probs * (1 - probs) ** MANY, {"probs": 0.4}, MANY, False
    ),
    "NegativeBinomial, logits": Integers(
        lambda h, logits: h.negative_binomial(h.array(2.5), logits=logits),
        lambda logits: negative_binomial(sigmoid(logits), 2.5, MANY),
        {"logits": -0.4},
        MANY,
        False,
    ),
    "NegativeBinomial, probs": Integers(
        lambda h, probs: h.negative_binomial(h.array(2.5), probs=probs),
        lambda probs: negative_binomial(probs, 2.5, MANY),
        {"probs": 0.45},
        MANY,
        False,
    ),
    "Poisson": Integers(
        lambda h, rate: h.dist.Poisson(rate),
        lambda rate: rate**MANY * np.exp(-rate) / np.array([float(factorial(k)) for k in MANY]),
        {"rate": 1.7},
        MANY,
        False,
    ),
    "by its cdf": Integers(
        discrete_weibull, lambda q, b: q ** (MANY + 0j) ** b - q ** (MANY + 1 + 0j) ** b, {"q": 0.6, "b": 0.9}, MANY, False
    ),
    "by NumPyro's cdf": Integers(
        lambda h, rate: Counts(rate),
        lambda rate: rate**MANY * np.exp(-rate) / np.array([float(factorial(k)) for k in MANY]),
        {"rate": 1.7},
        MANY,
        False,
        ("numpyro",),
    ),
}
WAYS = {
    "up": FiniteDifference(),
    "down": FiniteDifference(downwards=True),
    "share": FiniteDifference(share=0.3),
    "share, down": FiniteDifference(downwards=True, share=1.4),
}
OF_INTEGERS = [
    pytest.param(HOSTS[h], row, estimator, id=f"{h}-{name}-{way}")
    for name, row in INTEGERS.items()
    for way, estimator in WAYS.items()
    for h in row.hosts
    if not (h == "numpyro" and name.endswith("logits 0") and estimator.share != 1)  # NumPyro's log density has a wrong derivative there
]


def draws_of(host, row):
    kind = type(row.make(host, **{name: host.array(value) for name, value in row.theta.items()})).__name__
    return row.x.astype(float) if host.name == "pyro" and kind != "Categorical" else row.x


def check_integers(host, row, estimator):
    x = draws_of(host, row)
    found = compared(host, row.make, row.theta, estimator, x)
    step = -1 if estimator.downwards else 1
    end = row.x[0] if estimator.downwards else row.x[-1] if row.finite else np.inf
    assert found.values.dtype == x.dtype
    np.testing.assert_array_equal(found.values[0], np.where(row.x == end, row.x, row.x + step))
    theta = {name: np.array(value, float) for name, value in row.theta.items()}
    masses = np.real(row.masses(**theta))
    slopes = by_complex_step(row.masses, theta)
    for name, slope in slopes.items():
        cdf = slope.cumsum(-1)
        a = (cdf - slope) / masses if estimator.downwards else -cdf / masses  # dF(k - 1) or -dF(k), over p(k)
        likely = masses > 1e-5  # a difference of cdfs has few digits elsewhere
        np.testing.assert_allclose(found.weights[name][:, 0, likely], estimator.share * a[:, likely], rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(found.weights[name][:, 0, row.x == end], 0)
    for f in FUNCTIONS.values():
        of_estimator = expected(found, f, x, masses)
        for name, slope in slopes.items():
            np.testing.assert_allclose(of_estimator[name], (slope * f(row.x)).sum(-1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("host", "row", "estimator"), OF_INTEGERS)
def test_finite_difference(host, row, estimator):
    check_integers(host, row, estimator)


# ---- rows that equal other estimators, and the Poisson


@pytest.mark.parametrize("name", ["Bernoulli, logits", "Bernoulli, probs", "Categorical, logits", "Categorical, probs", "Poisson"])
@pytest.mark.parametrize("estimator", [MeasureValued(), Enumerate()], ids=repr)
def test_sums(host, name, estimator):
    row = INTEGERS[name]
    if name == "Poisson" and isinstance(estimator, Enumerate):
        return
    x = draws_of(host, row)
    found = compared(host, row.make, row.theta, estimator, x)
    theta = {k: np.array(value, float) for k, value in row.theta.items()}
    for f in FUNCTIONS.values():
        of_estimator = expected(found, f, x, row.masses(**theta))
        for k, slope in by_complex_step(row.masses, theta).items():
            np.testing.assert_allclose(of_estimator[k], (slope * f(row.x)).sum(-1), rtol=1e-9, atol=1e-10)


# ---- numbers


@dataclass(frozen=True)
class Numbers:
    """A continuous family: ``make(h, **theta)`` with its other parameters fixed, its density, and the point that splits it in two."""

    make: object
    density: object
    theta: dict
    middle: float = 0.0
    both: bool = False
    num_values: int = 1


def absolute(z):
    return np.where(np.real(z) < 0, -z, z)


def normal(x, loc, scale):
    return np.exp(-(((x - loc) / scale) ** 2) / 2) / scale / np.sqrt(2 * np.pi)


def laplace(x, loc, scale):
    return np.exp(-absolute(x - loc) / scale) / (2 * scale)


LOC_SCALE = {"loc": 0.3, "scale": 0.8}
NUMBERS = {
    "Normal": Numbers(lambda h, loc, scale: h.dist.Normal(loc, scale), normal, LOC_SCALE, 0.3, True, 3),
    "Normal, loc 0": Numbers(
        lambda h, loc: h.dist.Normal(loc, h.array(0.8)), lambda x, loc: normal(x, loc, 0.8), {"loc": 0.0}, 0.0, True, 2
    ),
    "Normal, scale": Numbers(
        lambda h, scale: h.dist.Normal(h.array(0.3), scale), lambda x, scale: normal(x, 0.3, scale), {"scale": 0.8}, 0.3, True, 1
    ),
    "Laplace": Numbers(lambda h, loc, scale: h.dist.Laplace(loc, scale), laplace, LOC_SCALE, 0.3, True, 2),
    "Exponential": Numbers(lambda h, rate: h.dist.Exponential(rate), lambda x, rate: rate * np.exp(-rate * x), {"rate": 1.4}),
    "Gamma": Numbers(
        lambda h, rate: h.dist.Gamma(h.array(2.7), rate),
        lambda x, rate: rate**2.7 * x**1.7 * np.exp(-rate * x) / gamma(2.7),
        {"rate": 1.2},
    ),
    "Gamma, 0.9": Numbers(
        lambda h, rate: h.dist.Gamma(h.array(0.9), rate),
        lambda x, rate: rate**0.9 * x**-0.1 * np.exp(-rate * x) / gamma(0.9),
        {"rate": 1.2},
    ),
    "Weibull": Numbers(
        lambda h, scale: h.dist.Weibull(scale, h.array(1.8)),
        lambda x, scale: 1.8 / scale * (x / scale) ** 0.8 * np.exp(-((x / scale) ** 1.8)),
        {"scale": 1.3},
    ),
}


def grid(row):
    """Draws and uniform numbers with their quadrature weights, without draws so large that the density is 0."""
    x, q = nodes(row.middle, np.inf)
    if row.both:
        left, q_left = nodes(-np.inf, row.middle)
        x, q = np.concatenate([left, x]), np.concatenate([q_left, q])
    density = np.nan_to_num(row.density(x, **row.theta))
    x, q = x[density > 1e-200], q[density > 1e-200]
    u, q_u = nodes(0.0, 1.0)
    u, q_u = u[u < 1], q_u[u < 1]
    return (a.ravel() for a in (*np.meshgrid(x, u, indexing="ij"), np.outer(q, q_u)))


def check_numbers(host, row, estimator):
    x, u, q = grid(row)
    found = compared(host, row.make, row.theta, estimator, x, u)
    assert len(found.values) == row.num_values
    assert np.isfinite(found.values).all()
    assert row.both or (found.values >= x * (1 - 1e-12)).all()
    density = row.density(x, **row.theta)
    theta = {name: np.array(value) for name, value in row.theta.items()}
    slopes = by_complex_step(lambda **theta: row.density(x, **theta), theta)
    for f in FUNCTIONS.values():
        of_estimator = expected(found, f, x, density * q)
        for name, slope in slopes.items():
            np.testing.assert_allclose(of_estimator[name], (slope * f(x) * q).sum(-1), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NUMBERS)
def test_measure_valued(host, name):
    check_numbers(host, NUMBERS[name], MeasureValued())


def test_measure_valued_at_given_numbers(host):
    """At each draw, the values and the derivatives of the weights are those of the formulas."""
    x, u = np.array([0.1, 0.9]), np.array([0.2, 0.7])
    found = compared(host, NUMBERS["Normal"].make, LOC_SCALE, MeasureValued(), x, u)
    r = 0.8 * np.sqrt(-2 * np.log(1 - u))
    maxwell = 0.8 * np.sqrt(((x - 0.3) / 0.8) ** 2 - 2 * np.log(1 - u))
    np.testing.assert_allclose(found.values, [0.3 + r, 0.3 - r, 0.3 + np.array([-1, 1]) * maxwell], rtol=1e-10)
    c = 1 / (0.8 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found.weights["loc"][0], [[c, c], [-c, -c], [0, 0]], rtol=1e-10)
    np.testing.assert_allclose(found.weights["scale"][0], [[0, 0], [0, 0], [1 / 0.8] * 2], rtol=1e-10, atol=1e-12)
    found = compared(host, NUMBERS["Weibull"].make, {"scale": 1.3}, MeasureValued(), x, u)
    np.testing.assert_allclose(found.values[0], 1.3 * ((x / 1.3) ** 1.8 - np.log(1 - u)) ** (1 / 1.8), rtol=1e-10)
    np.testing.assert_allclose(found.weights["scale"][0, 0], 1.8 / 1.3, rtol=1e-10)
    found = compared(host, NUMBERS["Laplace"].make, LOC_SCALE, MeasureValued(), x, u)
    np.testing.assert_allclose(found.values, [0.6 - x, x + np.array([-1, 1]) * 0.8 * -np.log(1 - u)], rtol=1e-10)
    np.testing.assert_allclose(found.weights["loc"][0, 0], [1 / 1.6, -1 / 1.6], rtol=1e-10)


# ---- DisARM

LOGITS = {"below and above": [-0.8, 0.9, 0.2], "0": [0.0, 0.0, -1.2], "one element": [0.6]}


def cells(p, b):
    """The uniform numbers of one element, one for each outcome of b', and the probabilities of the outcomes."""
    at = (1 - p) / p if b else (1 - 2 * p) / (1 - p)  # the threshold above which b' is 1
    at = min(max(at, 0.0), 1.0)
    return [(at / 2, at), ((1 + at) / 2, 1 - at)]


def check_disarm(host, logits, estimator, by):
    logits = np.array(logits)
    p = sigmoid(logits)
    b, u, masses = [], [], []
    for draw in product((0, 1), repeat=len(p)):
        for cell in product(*map(cells, p, draw)):
            b.append(draw)
            u.append([at for at, _ in cell])
            masses.append(np.prod(np.where(draw, p, 1 - p)) * np.prod([mass for _, mass in cell]))
    b, u, masses = np.array(b), np.array(u), np.array(masses)
    make = {
        "logits": lambda h, theta: h.dist.Bernoulli(logits=theta).to_event(1),
        "probs": lambda h, theta: h.dist.Bernoulli(probs=theta).to_event(1),
    }[by]
    theta = {"theta": logits if by == "logits" else p}
    x = b.astype(float) if host.name == "pyro" else b
    found = compared(host, make, theta, estimator, x, u)
    values = found.values[0]
    assert set(np.unique(values)) <= {0, 1}
    for outcome in product((0, 1), repeat=len(p)):  # b' has the law of b
        of_outcome = masses[(values == outcome).all(-1)].sum()
        np.testing.assert_allclose(of_outcome, np.prod(np.where(outcome, p, 1 - p)), atol=1e-12)
    per_logit = 1.0 if by == "logits" else 1 / (p * (1 - p))
    by_hand = 0.5 * (values - b) * np.maximum(p, 1 - p) * per_logit
    np.testing.assert_allclose(found.weights["theta"][:, 0].T, by_hand, rtol=1e-10, atol=1e-12)
    for f in (lambda b: np.sin(1.3 * (b @ np.arange(1, len(p) + 1))), lambda b: np.exp(0.5 * b.sum(-1)) * b[:, 0]):
        mean = (found.weights["theta"][:, 0] * (f(values) - f(b)) * masses).sum(-1)
        outcomes = np.array(list(product((0, 1), repeat=len(p))))

        def mean_of(theta, outcomes=outcomes, f=f):
            p = sigmoid(theta) if by == "logits" else theta
            return (np.where(outcomes == 1, p, 1 - p).prod(-1) * f(outcomes)).sum()

        np.testing.assert_allclose(mean, by_complex_step(mean_of, theta)["theta"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("by", ["logits", "probs"])
@pytest.mark.parametrize("name", LOGITS)
def test_disarm(host, name, by):
    check_disarm(host, LOGITS[name], DisARM(), by)


def opposites(p, x):
    """All outcomes for x: the opposite value, the two uniform numbers, and the probability."""
    found, up_to = [], 0.0
    for y, mass in enumerate(p):
        if y != x:
            u, accepted = (up_to + mass / 2) / (1 - p[x]), min(1.0, (1 - p[x]) / (1 - mass))
            found += [(y, (u, accepted / 2), mass / (1 - p[x]) * accepted)]
            found += [(x, (u, (1 + accepted) / 2), mass / (1 - p[x]) * (1 - accepted))]
            up_to += mass
    return [outcome for outcome in found if outcome[-1] > 0]


def check_categories(host, logits, size, one_hot, estimator):
    """Check all outcomes at two elements, or at one element with three values."""
    logits = np.array(logits)
    p, categories = np.stack([softmax(row) for row in logits]), np.arange(logits.shape[1])
    of_element = []
    for row in p:
        pairs = [([x, y], numbers, row[x] * mass) for x in categories for y, numbers, mass in opposites(row, x)]
        singles = [([x], (row[:x].sum() + row[x] / 2, 0.5), row[x]) for x in categories]
        rows = pairs if size == 2 else [(a + b, (*u, *v), m * k) for (a, u, m), (b, v, k) in product(pairs, singles)]
        of_element.append(rows)
    every = list(product(*of_element))
    values = np.array([[row[0] for row in rows] for rows in every])  # outcomes, elements, values
    u = np.moveaxis(np.array([[row[1] for row in rows] for rows in every]), -1, 0)
    masses = np.array([np.prod([row[2] for row in rows]) for rows in every])
    x, unit = values[..., 0], np.eye(len(categories))
    if one_hot:
        u = np.broadcast_to(u[..., None], (*u.shape, len(categories)))
        make = lambda h, theta: h.dist.OneHotCategorical(logits=theta).to_event(1)
        given = unit[x].astype(float if host.name == "pyro" else int)
    else:
        make, given = lambda h, theta: h.dist.Categorical(logits=theta).to_event(1), x
    found = compared(host, make, {"theta": logits}, estimator, given, u)
    others = found.values.argmax(-1) if one_hot else found.values
    np.testing.assert_array_equal(np.moveaxis(others, 0, -1), values[..., 1:])
    for k in range(size):
        np.testing.assert_allclose(masses @ unit[values[:, 0, k]], p[0], atol=1e-12)  # each value has the law of the draw
    f = lambda x: np.sin(1.3 * (x @ np.arange(1, len(p) + 1))) + x[..., 0] ** 2
    mean = (found.weights["theta"] * (f(others) - f(x)) * masses).sum((-1, -2))
    outcomes = np.array(list(product(categories, repeat=len(p))))

    def mean_of(theta):
        of = np.stack([softmax(row) for row in theta])
        return (np.prod([of[i, outcomes[:, i]] for i in range(len(p))], 0) * f(outcomes)).sum()

    np.testing.assert_allclose(mean, by_complex_step(mean_of, {"theta": logits})["theta"], rtol=1e-9, atol=1e-10)


CATEGORIES = {
    "two elements": ([[0.3, -0.5, 1.2], [0.0, 0.0, 0.0]], 2, False),
    "vectors": ([[0.3, -0.5, 1.2], [1.9, 0.0, -0.4]], 2, True),
    "three values": ([[0.3, -0.5, 1.2, 0.2]], 3, False),
}


@each(
    ("logits", "size", "one_hot"),
    CATEGORIES,
    slow_in_numpyro=lambda row: row[1] > 2,
    hosts=lambda row: ["pyro"] if row[2] else HOSTS,  # NumPyro has no vectors of 0 and 1
)
def test_disarm_of_categories(host, logits, size, one_hot):
    check_categories(host, logits, size, one_hot, DisARM(num_values=size))


@pytest.mark.parametrize("size", [3, 5])
def test_values_that_are_antithetic_in_pairs(host, size):
    """Each value has the law of the draw. Any two have the least possible correlation, by which the weights are divided."""
    n, p = 100_000, sigmoid(np.array([-1.5, -0.3, 0.1, 0.4, 2.5]))
    rng = np.random.default_rng(size)
    b = (rng.random((n, len(p))) < p).astype(float)
    target = host.target("b", host.dist.Bernoulli(probs=host.array(p)).expand([n, len(p)]), False)
    draw = attach(host.ops, target, DisARM(num_values=size), host.array(b))
    values, weights = map(host.numpy, draw.comparison.make(host.array(rng.random((size, n, len(p))))))
    every = np.concatenate([b[None], values])
    assert np.all(np.abs(z_scores(every[1:].reshape(-1, len(p)), p, p * (1 - p))) < 5)
    by_hand = (values - every.mean(0)) / (size - 1)  # times 1 / (1 - rho)
    rho = 1 - np.where(weights == 0, 0, by_hand / np.where(weights == 0, 1, weights)).max((0, 1))
    np.testing.assert_allclose(weights * (1 - rho), by_hand, atol=1e-12)
    assert np.all(rho < 0)
    assert np.all(rho >= -1 / (size - 1) - 1e-12)
    for i, j in ((0, 1), (1, 2)):
        products = (every[i] - p) * (every[j] - p) / (p * (1 - p))
        assert np.all(np.abs(z_scores(products, rho)) < 5)


# ---- a wrong sign is rejected


def turned(draw):
    """The same draw with weights of the opposite sign."""

    def wrong(uniforms):
        values, weights = draw.comparison.make(uniforms)
        return Alternatives(values, -weights)

    return draw._replace(comparison=replace(draw.comparison, make=wrong))


class WrongDifference(FiniteDifference):
    def attach(self, ops, target, x):
        return turned(super().attach(ops, target, x))


class WrongWeakDerivative(MeasureValued):
    def attach(self, ops, target, x):
        return turned(super().attach(ops, target, x))


class WrongDisARM(DisARM):
    def attach(self, ops, target, x):
        return turned(super().attach(ops, target, x))


def test_a_wrong_sign_is_rejected(host):
    for wrong in (
        lambda: check_integers(host, INTEGERS["Poisson"], WrongDifference()),
        lambda: check_numbers(host, NUMBERS["Laplace"], WrongWeakDerivative()),
        lambda: check_disarm(host, LOGITS["below and above"], WrongDisARM(), "logits"),
        lambda: check_categories(host, *CATEGORIES["two elements"], WrongDisARM()),
    ):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            wrong()


# ---- refusals


REFUSED = {
    "continuous": (
        FiniteDifference(),
        lambda h, t: h.dist.Normal(t, h.array(1.0)),
        "needs a distribution of integers, but Normal is cont",
    ),
    "vectors": (FiniteDifference(), lambda h, t: h.dist.Multinomial(3, logits=t + h.array([0.0, 1.0])), "of integers, but the support"),
    "no cdf": (
        FiniteDifference(),
        lambda h, t: h.dist.BetaBinomial(1 + t, h.array(1.0), 3),
        "FiniteDifference needs a cdf, but BetaBinomial has none; use LR",
    ),
    "live total_count": (
        FiniteDifference(),
        lambda h, t: h.negative_binomial(2 + t, logits=h.array(0.3)),
        "needs a constant total_count of NegativeBinomial(Logits)?, found one with a gradient",
    ),
    "weak, unknown family": (
        MeasureValued(),
        lambda h, t: h.dist.Cauchy(t, h.array(1.0)),
        "weak derivatives of Normal, Laplace, .*; found Cauchy",
    ),
    "weak, unknown parameter": (
        MeasureValued(),
        lambda h, t: h.dist.Gamma(1 + t, 1 + t),
        "no weak derivative of Gamma in its concentration, which needs one; .*make the concentration a constant",
    ),
    "DisARM, Normal": (DisARM(), lambda h, t: h.dist.Normal(t, h.array(1.0)), "expected a finite support .* but Normal has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(host, name):
    estimator, distribution, message = REFUSED[name]

    def site(h, t):
        h.sample("x", distribution(h, t[0]))

    with pytest.raises(ValueError, match=f"^site 'x': .*{message}"):
        host.gradients(Program(site, site, (0.4,)), 1, estimators={"x": estimator})


def test_a_moving_support_is_refused(host):
    with pytest.raises(ValueError, match="^site 'x': FiniteDifference is biased where the support moves with a parameter"):
        compared(host, lambda h, n: h.dist.Binomial(n, logits=h.array(0.3)), {"n": 3.0}, FiniteDifference(), np.array([1.0]))


def test_a_cdf_without_a_derivative_is_refused():
    host = HOSTS["numpyro"]

    def site(h, t):
        h.sample("x", h.dist.GammaPoisson(2 + t[0], h.array(1.0)))

    with pytest.raises(ValueError, match=r"^site 'x': the cdf of GammaPoisson cannot be differentiated .*; use LR\(\)\."):
        host.gradients(Program(site, site, (0.4,)), 1, estimators={"x": FiniteDifference()})


@pytest.mark.parametrize("share", [0, 0.0, float("nan"), "half"])
def test_refused_shares(share):
    with pytest.raises(TypeError, match="FiniteDifference: expected a share that is a finite number and not 0"):
        FiniteDifference(share=share)


@pytest.mark.parametrize("estimator", [FiniteDifference, MeasureValued])
def test_refused_lanes(estimator):
    with pytest.raises(TypeError, match=rf"{estimator.__name__}: expected lanes='all' or 'random', found 'some'"):
        estimator(lanes="some")


# ---- in a program

THETA = (-0.9, 0.2, 0.7, 1.3)
WEIGHTS = (1.0, 2.0, -1.5, 0.5)
OUTCOMES = np.array(list(product((0, 1), repeat=4)), float)


def joint_cost(math, b, weights):
    return 0.5 * (b * weights).sum(-1) ** 2 + math.sin(2 * b.sum(-1))


def four_bernoullis(with_densities=False):
    def guide(h, t):
        theta = h.math.stack(t, -1)
        if with_densities:
            return h.sample("b", h.dist.Bernoulli(probs=1 / (1 + h.math.exp(-theta))).to_event(1))
        return h.sample("b", h.dist.Bernoulli(logits=theta).to_event(1).mask(False))

    def model(h, t):
        b = h.sample("b", h.dist.Bernoulli(logits=h.array([0.5] * 4)).to_event(1).mask(with_densities))
        h.factor("cost", joint_cost(h.math, b, h.array(WEIGHTS)))

    return Program(guide, model, THETA)


def exact_of_four(with_densities):
    p = sigmoid(np.array(THETA))
    masses = np.where(OUTCOMES == 1, p, 1 - p).prod(-1)
    costs = joint_cost(np, OUTCOMES, np.array(WEIGHTS))
    if with_densities:
        prior = np.where(OUTCOMES == 1, sigmoid(0.5), sigmoid(-0.5)).prod(-1)
        costs = costs + np.log(prior / masses)
    return ((OUTCOMES - p) * (masses * costs)[:, None]).sum(0)


def of_pair(z):
    """A surrogate that couples two coordinates."""
    return 0.3 * z.sum(-1) - 0.1 * z[..., 0] * z[..., -1]


PROGRAMS = {
    "LR": LR(),
    "Enumerate": Enumerate(),
    "Enumerate, random": Enumerate(lanes="random"),
    "FiniteDifference": FiniteDifference(),
    "FiniteDifference, down": FiniteDifference(downwards=True),
    "FiniteDifference, share": FiniteDifference(share=0.5),
    "FiniteDifference, random": FiniteDifference(lanes="random"),
    "MeasureValued": MeasureValued(),
    "DisARM": DisARM(),
    "ARMS": DisARM(num_values=4),
    "Surrogate": Surrogate(of_pair),
}


@pytest.mark.parametrize("what", ["cost", "ELBO"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_joint_cost_of_four_bernoullis(host, name, what):
    """The mean is the exact gradient, also under the ELBO, where the site's own density (made from ``probs``) is a cost too."""
    samples = host.gradients(four_bernoullis(what == "ELBO"), 10_000, estimators={"b": PROGRAMS[name]})
    exact = exact_of_four(what == "ELBO")
    assert np.all(np.abs(z_scores(samples, exact)) < 5), (samples.mean(0), exact)


def check_logits_of_0(host, tolerance):
    """At two Bernoullis with logits of exactly 0 both values flip, so a sample has one of two gradients, equally often."""

    def guide(h, t):
        return h.sample("b", h.dist.Bernoulli(logits=h.math.stack(t, -1)).to_event(1).mask(False))

    def model(h, t):
        b = h.sample("b", h.dist.Bernoulli(logits=h.array([0.0, 0.0])).to_event(1).mask(False))
        h.factor("cost", joint_cost(h.math, b, h.array(WEIGHTS[:2])))

    samples = host.gradients(Program(guide, model, (0.0, 0.0)), 64, estimators={"b": DisARM()})
    outcomes = np.array(list(product((0, 1), repeat=2)), float)
    exact = (outcomes - 0.5).T @ joint_cost(np, outcomes, np.array(WEIGHTS[:2])) / 4
    either = np.unique(samples.round(4), return_index=True, axis=0)[1]
    assert len(either) == 2
    np.testing.assert_allclose(samples[either].mean(0), exact, rtol=tolerance)


def test_logits_of_0(host):
    check_logits_of_0(host, 1e-10)


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro warns about the loss
@pytest.mark.parametrize("logit", [0.0, 0.2])
@each("estimator", {"Enumerate": Enumerate(), "DisARM": DisARM(), "ARMS": DisARM(num_values=4)}, slow_in_numpyro=always)
def test_a_cost_that_is_not_finite_is_not_lost(host, estimator, logit):
    """If the model excludes a value, the derivative of the expectation does not exist. The estimate must not be finite then."""

    def guide(h, t):
        return h.sample("b", h.dist.Bernoulli(logits=t[0]).mask(False))

    def model(h, t):
        b = h.sample("b", h.dist.Bernoulli(logits=h.array(0.0)).mask(False))
        h.factor("cost", h.math.where(b > 0, h.array(-np.inf), h.array(0.0)))

    samples = host.gradients(Program(guide, model, (logit,)), 20, estimators={"b": estimator})
    assert not np.isfinite(samples.mean())


def test_variances_of_four_bernoullis():
    """Variances summed over four coordinates. In 40,000 samples: LR 3.43, a random lane 3.32, GO 1.71, DisARM 1.57, all lanes 0.52."""
    host = HOSTS["pyro"]
    variance = {name: host.gradients(four_bernoullis(), 10_000, estimators={"b": e}).var(0).sum() for name, e in PROGRAMS.items()}
    assert variance["Enumerate"] < 0.4 * variance["DisARM"]
    assert variance["DisARM"] < 0.6 * variance["LR"]
    assert variance["FiniteDifference"] < 0.6 * variance["LR"]
    assert variance["MeasureValued"] == pytest.approx(variance["Enumerate"])


IN_A_PLATE = {
    "Enumerate": Enumerate(),
    "FiniteDifference": FiniteDifference(),
    "DisARM": DisARM(),
    "Surrogate": Surrogate(of_pair),
}


@pytest.mark.parametrize("outside", [False, True], ids=["cost inside", "cost outside"])
@pytest.mark.parametrize("name", IN_A_PLATE)
def test_pairs_in_a_plate(host, name, outside):
    """Three pairs of Bernoullis in a plate, with a cost for each pair or one cost for all."""
    pairs = np.array([[1.0, -0.5], [0.7, 1.5], [-1.2, 0.4]])

    def guide(h, t):
        with h.plate("n", 3):
            theta = h.math.stack([t[0] * h.array([1.0, 0.5, -0.4]), t[1] * h.array([0.3, -1.0, 1.0])], -1)
            return h.sample("b", h.dist.Bernoulli(logits=theta).to_event(1).mask(False))

    def model(h, t):
        with h.plate("n", 3):
            b = h.sample("b", h.dist.Bernoulli(logits=h.array([0.0, 0.0])).to_event(1).mask(False))
            of_pair = (b * h.array(pairs)).sum(-1)
            if not outside:
                h.factor("cost", h.math.exp(of_pair))
        if outside:
            h.factor("cost", h.math.exp(0.4 * h.over_plate(of_pair)))

    theta, coefficients = np.array([0.6, -0.3]), np.array([[1.0, 0.3], [0.5, -1.0], [-0.4, 1.0]])
    outcomes = np.array(list(product((0, 1), repeat=6)), float).reshape(-1, 3, 2)
    p = sigmoid(theta * coefficients)
    masses = np.where(outcomes == 1, p, 1 - p).prod((-1, -2))
    of_pair = (outcomes * pairs).sum(-1)
    costs = np.exp(0.4 * of_pair.sum(-1)) if outside else np.exp(of_pair).sum(-1)
    exact = (((outcomes - p) * coefficients).sum(1) * (masses * costs)[:, None]).sum(0)
    samples = host.gradients(Program(guide, model, tuple(theta), 1), 10_000, estimators={"b": IN_A_PLATE[name]})
    assert np.all(np.abs(z_scores(samples, exact)) < 5), (samples.mean(0), exact)


def test_no_derivative_of_constants(host):
    """A fixed parameter takes no evaluations, and the gradient in the other one stays the same."""

    def scale_only(h, t):
        return h.sample("x", h.dist.Normal(h.array(0.3), t[0]).mask(False))

    def both(h, t):
        return h.sample("x", h.dist.Normal(t[1], t[0]).mask(False))

    for site, theta in ((scale_only, (0.8,)), (both, (0.8, 0.3))):
        program = Program(site, lambda h, t, site=site: h.factor("cost", 1.0 * (site(h, t) > 0.5)), theta)
        samples = host.gradients(program, 10_000, estimators={"x": MeasureValued()})
        z = (0.5 - 0.3) / 0.8
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / 0.8
        assert np.all(np.abs(z_scores(samples, np.array([z * density, density])[: len(theta)])) < 5)


def test_constants_that_are_traced():
    """Under ``jit`` constants are traced like parameters; they are recognized because no parameter influences them."""
    host = HOSTS["numpyro"]

    def gamma_of(h, t):
        return h.sample("x", h.dist.Gamma(2.7 * jnp.ones(2), h.math.stack(t, -1)).to_event(1).mask(False))

    def counts(h, t):
        return h.sample("x", h.negative_binomial(jnp.ones(2), probs=h.math.stack(t, -1)).to_event(1).mask(False))

    for site, estimator, exact in ((gamma_of, MeasureValued(), -2.7 / 0.5**2), (counts, FiniteDifference(), 1 / 0.5**2)):
        program = Program(site, lambda h, t, site=site: h.factor("cost", 1.0 * site(h, t).sum(-1)), (0.5, 0.5))
        assert np.all(np.abs(z_scores(host.gradients(program, 10_000, estimators={"x": estimator}), exact)) < 5)

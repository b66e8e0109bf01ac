"""The derivatives of the hosts' log densities at special points, against exact ones. flowvi corrects the wrong ones in a guide.

A new version of a host fails here if it adds or fixes a wrong derivative.
"""

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import at_least, each
from mpmath import mp, mpf

from flowvi.numpyro.special_points import with_right_derivative
from flowvi.pyro.special_points import SAFE as MENDED_IN_PYRO
from flowvi.pyro.special_points import with_right_derivative as mended_in_pyro

TOLERANCE = {"float64": 1e-6, "float32": 2e-3}  # torch's Bessel functions are accurate to 1e-6
POINTS = 96  # points are repeated to this number, so that JAX compiles every operation once


def xlogy(a, x):
    return mpf(0) if a == 0 else a * mp.log(x)


def size(z):
    """abs(z), without a derivative at 0."""
    return z * mp.sign(mp.re(z)) if mp.re(z) or not mp.im(z) else mp.nan


def log1pexp(x):
    return mp.log1p(mp.exp(x))


def normal(z):
    return -z * z / 2 - mp.log(2 * mp.pi) / 2


def log_binomial(n, k):
    return mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1)


def log_beta(a, b):
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def student_t(x, df, loc, scale):
    z = (x - loc) / scale
    normalizer = mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2) - mp.log(df * mp.pi) / 2 - mp.log(scale)
    return normalizer - (df + 1) / 2 * mp.log1p(z * z / df)


def truncated(x, loc, scale, low, high):
    ends = (mp.erfc((loc - high) / scale / mp.sqrt(2)) - mp.erfc((loc - low) / scale / mp.sqrt(2))) / 2
    return normal((x - loc) / scale) - mp.log(scale) - mp.log(ends)


def asymmetric_laplace(x, loc, scale, asymmetry):
    z = (x - loc) / scale
    return -mp.log(scale * (asymmetry + 1 / asymmetry)) + (z / asymmetry if mp.re(z) < 0 else -z * asymmetry)


def zero_inflated(k, gate, rate):
    poisson = xlogy(k, rate) - rate - mp.loggamma(k + 1)
    return mp.log(gate + (1 - gate) * mp.exp(poisson)) if k == 0 else mp.log1p(-gate) + poisson


class Row(NamedTuple):
    """A family: its log density, the values of its parameters, and of x.

    ``inside(x, *parameters)`` says where the density is positive. ``discrete``: x has no derivative.
    """

    log_prob: Any
    parameters: dict[str, tuple]
    x: tuple
    inside: Any = lambda x, *p: True
    discrete: bool = False
    constants: Any = {}


REAL, POSITIVE, COUNT = (0.0, 1.0, -2.0, 1e-6, 30.0), (1.0, 1e-6, 0.5, 20.0), (0.0, 1.0, 4.0)
LOGITS, PROBS = (0.0, 0.5, -30.0, 30.0, 1e-6), (0.5, 0.0, 1.0, 1e-6, 0.3)
LOC, SCALE, SHAPE = (0.0, 1.0), (1.0, 0.5), (1.0, 2.0, 0.5, 30.0)
possible = lambda k, p: not (p == 0 and k > 0) and not (p == 1 and k == 0)

ROWS = {
    "Normal": Row(lambda x, m, s: normal((x - m) / s) - mp.log(s), {"loc": LOC, "scale": SCALE}, REAL),
    "Laplace": Row(lambda x, m, s: -size(x - m) / s - mp.log(2 * s), {"loc": LOC, "scale": SCALE}, REAL),
    "Logistic": Row(lambda x, m, s: -(x - m) / s - mp.log(s) - 2 * log1pexp(-(x - m) / s), {"loc": LOC, "scale": SCALE}, REAL),
    "Cauchy": Row(lambda x, m, s: -mp.log(mp.pi * s) - mp.log1p(((x - m) / s) ** 2), {"loc": LOC, "scale": SCALE}, REAL),
    "StudentT": Row(student_t, {"df": (1.0, 2.0, 0.5, 1e4), "loc": LOC, "scale": (0.5,)}, REAL),
    "Gumbel": Row(lambda x, m, s: -(x - m) / s - mp.exp(-(x - m) / s) - mp.log(s), {"loc": LOC, "scale": SCALE}, REAL),
    "SoftLaplace": Row(
        lambda x, m, s: mp.log(2 / mp.pi) - mp.log(s) - mp.log(mp.exp((x - m) / s) + mp.exp(-(x - m) / s)),
        {"loc": LOC, "scale": SCALE},
        REAL,
    ),
    "AsymmetricLaplace": Row(asymmetric_laplace, {"loc": LOC, "scale": (0.5,), "asymmetry": (1.0, 2.0)}, (0.5, -2.0, 30.0)),
    "LogNormal": Row(lambda x, m, s: normal((mp.log(x) - m) / s) - mp.log(s * x), {"loc": LOC, "scale": SCALE}, POSITIVE),
    "HalfNormal": Row(lambda x, s: mp.log(2) + normal(x / s) - mp.log(s), {"scale": SCALE}, (0.0, *POSITIVE)),
    "HalfCauchy": Row(lambda x, s: mp.log(2 / mp.pi / s) - mp.log1p((x / s) ** 2), {"scale": SCALE}, (0.0, *POSITIVE)),
    "Exponential": Row(lambda x, r: mp.log(r) - r * x, {"rate": SCALE}, (0.0, *POSITIVE)),
    "Gamma": Row(
        lambda x, a, r: a * mp.log(r) + xlogy(a - 1, x) - r * x - mp.loggamma(a),
        {"concentration": SHAPE, "rate": SCALE},
        (0.0, *POSITIVE),
        lambda x, a, r: x > 0 or a == 1,
    ),
    "InverseGamma": Row(
        lambda x, a, r: a * mp.log(r) - (a + 1) * mp.log(x) - r / x - mp.loggamma(a),
        {"concentration": SHAPE, "rate": SCALE},
        (1.0, 0.05, 20.0),
    ),
    "Weibull": Row(
        lambda x, s, c: mp.log(c / s) + (c - 1) * mp.log(x / s) - (x / s) ** c,
        {"scale": SCALE, "concentration": (1.0, 2.0, 0.5)},
        POSITIVE,
    ),
    "Beta": Row(
        lambda x, a, b: xlogy(a - 1, x) + xlogy(b - 1, 1 - x) - log_beta(a, b),
        {"concentration1": SHAPE, "concentration0": SHAPE},
        (0.5, 1e-3, 0.999, 0.0, 1.0),
        lambda x, a, b: (x > 0 or a == 1) and (x < 1 or b == 1),
    ),
    "Kumaraswamy": Row(
        lambda x, a, b: mp.log(a * b) + xlogy(a - 1, x) + xlogy(b - 1, 1 - x**a),
        {"concentration1": (1.0, 2.0, 0.5), "concentration0": (1.0, 2.0, 0.5)},
        (0.5, 1e-3, 0.999),
    ),
    "Uniform": Row(lambda x, a, b: -mp.log(b - a), {"low": (0.0, -1.0), "high": (1.0, 30.0)}, (0.5, 0.0)),
    "Pareto": Row(
        lambda x, s, a: mp.log(a) + a * mp.log(s) - (a + 1) * mp.log(x),
        {"scale": SCALE, "alpha": (1.0, 2.0)},
        (1.0, 3.0, 1e4),
    ),
    "VonMises": Row(
        lambda x, m, k: k * mp.cos(x - m) - mp.log(2 * mp.pi * mp.besseli(0, k)),
        {"loc": LOC, "concentration": (1.0, 1e-3, 30.0, 3.75)},
        (0.0, 1.0, 3.0),
    ),
    "TruncatedNormal": Row(truncated, {"loc": LOC, "scale": SCALE, "low": (0.0, -8.0), "high": (1.0, 9.0)}, (0.5, 0.0, 1.0)),
    "Poisson": Row(
        lambda k, r: xlogy(k, r) - r - mp.loggamma(k + 1),
        {"rate": (1.0, 0.0, 1e-6, 30.0)},
        COUNT,
        lambda k, r: r > 0 or k == 0,
        True,
    ),
    "GammaPoisson": Row(
        lambda k, a, r: mp.loggamma(a + k) - mp.loggamma(a) - mp.loggamma(k + 1) + a * mp.log(r) - (a + k) * mp.log1p(r),
        {"concentration": SHAPE, "rate": SCALE},
        COUNT,
        discrete=True,
    ),
    "BetaBinomial": Row(
        lambda k, a, b: log_binomial(10, k) + log_beta(a + k, b + 10 - k) - log_beta(a, b),
        {"concentration1": SHAPE, "concentration0": SHAPE},
        (*COUNT, 10.0),
        discrete=True,
        constants={"total_count": 10},
    ),
    "ZeroInflatedPoisson": Row(zero_inflated, {"gate": (0.5, 0.0, 1e-6), "rate": (1.0, 1e-3, 30.0)}, COUNT, discrete=True),
    "Bernoulli logits": Row(lambda k, t: k * t - log1pexp(t), {"logits": LOGITS}, (0.0, 1.0), discrete=True),
    "Bernoulli probs": Row(lambda k, p: xlogy(k, p) + xlogy(1 - k, 1 - p), {"probs": PROBS}, (0.0, 1.0), possible, True),
    "Binomial logits": Row(
        lambda k, t: log_binomial(10, k) + k * t - 10 * log1pexp(t),
        {"logits": LOGITS},
        (*COUNT, 10.0),
        discrete=True,
        constants={"total_count": 10},
    ),
    "Binomial probs": Row(
        lambda k, p: log_binomial(10, k) + xlogy(k, p) + xlogy(10 - k, 1 - p),
        {"probs": PROBS},
        (*COUNT, 10.0),
        lambda k, p: not (p == 0 and k > 0) and not (p == 1 and k < 10),
        True,
        {"total_count": 10},
    ),
    "Geometric logits": Row(lambda k, t: -k * log1pexp(t) - log1pexp(-t), {"logits": LOGITS}, COUNT, discrete=True),
    "Geometric probs": Row(
        lambda k, p: xlogy(k, 1 - p) + mp.log(p), {"probs": PROBS}, COUNT, lambda k, p: p > 0 and (p < 1 or k == 0), True
    ),
    "NegativeBinomial logits": Row(
        lambda k, r, t: mp.loggamma(k + r) - mp.loggamma(r) - mp.loggamma(k + 1) - r * log1pexp(t) - k * log1pexp(-t),
        {"total_count": (1.0, 3.0, 0.5), "logits": LOGITS},
        COUNT,
        discrete=True,
    ),
    "NegativeBinomial probs": Row(
        lambda k, r, p: mp.loggamma(k + r) - mp.loggamma(r) - mp.loggamma(k + 1) + r * mp.log1p(-p) + xlogy(k, p),
        {"total_count": (1.0, 3.0, 0.5), "probs": PROBS},
        COUNT,
        lambda k, r, p: p < 1 and (p > 0 or k == 0),
        True,
    ),
}


def points(row):
    """The points of positive density: an array for x and for each parameter."""
    inside = [point for point in product(row.x, *row.parameters.values()) if row.inside(*point)]
    assert len(inside) <= POINTS
    return np.array([inside[i % len(inside)] for i in range(POINTS)]).T


def exact(row, columns):
    """The derivatives in x and in the parameters, of the analytic continuation; so the ends of a support have one too.

    NaN at a kink, and where the derivative is infinite.
    """
    step = mpf(10) ** -30

    def derivative(point, i):
        moved = [mpmath.mpc(v, step) if j == i else mpf(v) for j, v in enumerate(point)]
        value = row.log_prob(*moved)
        return float(value.imag / step) if mp.isfinite(value) else np.nan

    with mp.workdps(70):
        unique = {point: [derivative(point, i) for i in range(len(point))] for point in set(map(tuple, columns.T))}
    return np.array([unique[tuple(point)] for point in columns.T]).T


def in_numpyro(family, row, columns, dtype, mend):
    def log_prob(x, *parameters):
        fn = family(**dict(zip(row.parameters, parameters, strict=True)), **row.constants, validate_args=False)
        return (with_right_derivative(fn) if mend else fn).log_prob(x).sum()

    return jax.grad(log_prob, argnums=tuple(range(len(columns))))(*(jnp.asarray(column, dtype) for column in columns))


def in_pyro(family, row, columns, dtype, mend):
    leaves = [torch.tensor(column, dtype=getattr(torch, dtype), requires_grad=True) for column in columns]
    fn = family(**dict(zip(row.parameters, leaves[1:], strict=True)), **row.constants, validate_args=False)
    fn = mended_in_pyro(fn) if mend and type(fn) in MENDED_IN_PYRO else fn
    gradients = torch.autograd.grad(fn.log_prob(leaves[0]).sum(), leaves, materialize_grads=True, allow_unused=True)
    return [gradient.detach() for gradient in gradients]  # torch 2.7 makes zeros that require a gradient


HOSTS = {"numpyro": (numpyro_dist, in_numpyro), "pyro": (pyro_dist, in_pyro)}


class Wrong(NamedTuple):
    """A wrong derivative of a host: x and parameters, the right value, and the host's value."""

    point: dict[str, float]
    exact: float
    found: float


def wrong(host, dtype="float64", mend=False):
    """The wrong derivatives of a host, by family and variable."""
    found = {}
    families, gradients = HOSTS[host]
    for name, row in ROWS.items():
        if (family := getattr(families, name.split()[0], None)) is None:
            continue
        columns, variables = points(row).astype(dtype).astype(float), ("x", *row.parameters)
        right, theirs = exact(row, columns), gradients(family, row, columns, dtype, mend)
        for i, variable in enumerate(variables):
            of_host = np.asarray(theirs[i], float)
            is_wrong = ~(np.abs(of_host - right[i]) <= TOLERANCE[dtype] * (1 + np.abs(right[i]))) & np.isfinite(right[i])
            if is_wrong.any() and (i or not row.discrete):
                at = {tuple(columns[:, j]): j for j in np.flatnonzero(is_wrong)}
                found[name, variable] = [
                    Wrong(dict(zip(variables, point, strict=True)), right[i][j], of_host[j]) for point, j in sorted(at.items())
                ]
    return found


NEW_NUMPYRO = at_least("numpyro", 0, 22)
# The number of points with a wrong derivative, by family and variable.
MENDED = {  # flowvi.numpyro.special_points and flowvi.pyro.special_points correct these in a guide
    "numpyro": {
        ("Bernoulli logits", "logits"): 2,  # z for z - 1/2 at logits of 0
        ("Binomial logits", "logits"): 4,
        ("Bernoulli probs", "probs"): 2,  # 0 at a probability of 0 or 1
        ("Binomial probs", "probs"): 2,
        ("Geometric probs", "probs"): 1,
        ("Poisson", "rate"): 1,  # NaN at a rate of 0
        **({("NegativeBinomial probs", "probs"): 3} if NEW_NUMPYRO else {}),  # NaN at a probability of 0; not exported by 0.19
    },
    "pyro": {("Poisson", "rate"): 1},
}
ENDS = {  # in NumPyro the log density is -inf at the ends
    ("Beta", "x"): 6,
    ("Beta", "concentration1"): 4,
    ("Beta", "concentration0"): 4,
    ("Pareto", "x"): 2,
    ("Pareto", "scale"): 2,
    ("Pareto", "alpha"): 2,
}
LEFT = {
    "numpyro": {
        ("Gamma", "x"): 2,  # NaN at x = 0 with a concentration of 1
        **(ENDS if NEW_NUMPYRO else {("Beta", "x"): 8}),
    },
    "pyro": {
        ("Gamma", "x"): 2,  # NaN at x = 0 with a concentration of 1
        ("Beta", "x"): 8,  # NaN at 0 and 1 too
        ("Bernoulli probs", "probs"): 2,  # torch clamps probabilities, so the derivative is 0 at 0 and 1, where only one side has one
        ("Binomial probs", "probs"): 2,
        ("Geometric probs", "probs"): 1,
        ("NegativeBinomial probs", "probs"): 3,
    },
}


@pytest.mark.filterwarnings("ignore:Out-of-support")
@each(("mend", "dtype"), list(product((False, True), TOLERANCE)), slow_in_numpyro=lambda value: value[1] == "float32")
def test_what_is_wrong_is_known(host, mend, dtype):
    """The list has all wrong derivatives. If the host has fixed one, remove it from the list, and its correction from flowvi."""
    known = LEFT[host.name] if mend else LEFT[host.name] | MENDED[host.name]
    assert {key: len(found) for key, found in wrong(host.name, dtype, mend).items()} == known


def test_the_audit_sees_a_wrong_derivative(monkeypatch):
    monkeypatch.setattr(pyro_dist.Normal, "log_prob", lambda fn, x: -0.5 * (x - fn.loc) ** 2 / fn.scale.detach() ** 2 - fn.scale.log())
    assert ("Normal", "scale") in wrong("pyro")


# ---- vectors, with derivatives in closed form


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def of_categorical(x, logits):
    return {"logits": np.eye(len(logits))[x] - softmax(logits)}


def of_dirichlet(x, concentration):
    total = mpmath.digamma(concentration.sum())
    return {
        "concentration": np.array([float(total - mpmath.digamma(a) + mpmath.log(v)) for a, v in zip(concentration, x, strict=True)]),
        "x": (concentration - 1) / x,
    }


def of_multivariate_normal(x, loc, scale_tril):
    z = np.linalg.solve(scale_tril, x - loc)
    score = np.linalg.solve(scale_tril.T, z)
    return {
        "loc": score,
        "scale_tril": np.tril(np.outer(score, z) - np.linalg.inv(scale_tril).T),
        "x": -score,
    }


VECTORS = [
    *(
        ("Categorical", of_categorical, x, {"logits": np.array(logits)})
        for x in (0, 2)
        for logits in ([0.0, 0, 0], [0, -40.0, 40], [1e-9, 0, 1])
    ),
    *(
        ("Dirichlet", of_dirichlet, np.array(x), {"concentration": np.array(concentration)})
        for x in ([1 / 3, 1 / 3, 1 / 3], [1e-8, 0.5, 0.5 - 1e-8])
        for concentration in ([1.0, 1, 1], [1.0, 2, 0.5], [1e-3, 30, 1])
    ),
    *(
        ("MultivariateNormal", of_multivariate_normal, np.array(x), {"loc": np.zeros(2), "scale_tril": np.array(factor)})
        for x in ([0.0, 0], [1.0, -30])
        for factor in ([[1.0, 0], [0, 1]], [[1e-3, 0], [5.0, 20]])
    ),
]


@pytest.mark.parametrize("family", dict.fromkeys(name for name, *_ in VECTORS))
def test_vectors(host, family):
    """Equal logits, ties, flat concentrations, unit matrices, and large and tiny values are right in both hosts."""
    for name, closed_form, x, parameters in VECTORS:
        if name == family:
            right = closed_form(x, **parameters)
            at = {**parameters, **({"x": x} if "x" in right else {})}

            def log_prob(values, name=name, x=x):
                value = values.get("x", host.integers(x))
                fn = getattr(host.dist, name)(**{k: v for k, v in values.items() if k != "x"}, validate_args=False)
                return fn.log_prob(value)

            found = host.value_and_gradient(log_prob, at)[1]
            for variable, exact_derivative in right.items():
                of_host = np.tril(found[variable]) if variable == "scale_tril" else found[variable]
                np.testing.assert_allclose(of_host, exact_derivative, rtol=1e-9, atol=1e-9, err_msg=f"{name} {variable}")


@pytest.mark.parametrize(("x", "probs"), [(0, [1 / 3, 1 / 3, 1 / 3]), (1, [0.0, 0.7, 0.3]), (0, [1.0, 0.0, 0.0])])
def test_probabilities_of_a_categorical(host, x, probs):
    """The derivatives along the simplex are right, also if a category is impossible, except in torch at a probability of 1."""
    if host.name == "numpyro" and not NEW_NUMPYRO and 0.0 in probs:
        pytest.skip("NumPyro before 0.22 has NaN where an alternative is impossible")
    right = np.eye(3)[x] / probs[x]
    found = host.value_and_gradient(
        lambda v: host.dist.Categorical(probs=v["probs"], validate_args=False).log_prob(host.integers(x)), {"probs": np.array(probs)}
    )[1]["probs"]
    if host.name == "pyro" and probs[x] == 1:
        assert np.all(found == 0)  # torch clamps it
    else:
        np.testing.assert_allclose(found - found.mean(), right - right.mean(), rtol=1e-9)

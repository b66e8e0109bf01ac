"""The estimators at the same x in both hosts, to 1e-10, and against formulas, with strict rank promotion in JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attached import attached
from hosts import HOSTS
from scipy.special import digamma

import flowvi.ops.jax
import flowvi.ops.torch
from flowvi import LR, RP, Flow, ImplicitRP
from flowvi.baselines import ParticleMean, Score
from flowvi.dependence import Frame, program_order
from flowvi.estimators import attach
from flowvi.objectives import Particle, estimate, sum_to

LOC, SCALE = np.array([0.3, -0.5, 1.1]), np.array([0.8, 1.2, 0.5])
TRIL = np.array([[0.6, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 0.9]])


@pytest.fixture(autouse=True)
def _strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def lower_q(p):
    return type(p)(p.loc - 0.2, 1.3 * p.scale)


def tril_field(x, p, dtheta):
    """The field dL eps of x = loc + L eps. The matrix is not symmetric, so that a transposed Jacobian would show."""
    eps = p.scale_tril @ (x - p.loc)[..., None]
    return dtheta.loc + (dtheta.scale_tril @ eps)[..., 0] * (1 + 0.1 * x**2)


def replicator(x, p, dtheta):
    mean = (x * dtheta.concentration).sum(-1)[..., None]
    return x * (dtheta.concentration - mean)


def dense_s(x, p):
    return (p.scale_tril @ (x - p.loc)[..., None])[..., 0] + 0.1 * (x - p.loc) ** 3


NORMAL, X = {"loc": LOC, "scale": SCALE}, np.array([0.1, 0.4, 2.0])
MVN, DIRICHLET = {"loc": LOC, "scale_tril": TRIL}, {"concentration": np.array([1.4, 2.1, 0.8])}
GAMMA = {"concentration": np.array([1.7, 0.6, 3.0]), "rate": np.array([1.2, 0.7, 2.0])}
ROWS = {
    "Normal LR": ("Normal", NORMAL, lambda h: LR(), X),
    "Normal LR q": ("Normal", NORMAL, lambda h: LR(q=lower_q), X),
    "Normal RP q": ("Normal", NORMAL, lambda h: RP(lower_q), X),
    "Normal cdf": ("Normal", NORMAL, lambda h: ImplicitRP(), X),
    "Normal cdf q": ("Normal", NORMAL, lambda h: ImplicitRP(q=lower_q), X),
    "Normal G-Rep": ("Normal", NORMAL, lambda h: ImplicitRP(lambda x, p: x - p.loc + 0.1 * x**3, exact=False), X),
    "Normal Flow": ("Normal", NORMAL, lambda h: Flow(loc=lambda x, p: h.math.sin(x), scale=lambda x, p: x**2 / p.scale), X),
    "Normal Flow loc only": ("Normal", NORMAL, lambda h: Flow(loc=lambda x, p: 0.7, q=lower_q), X),
    "Normal general": (
        "Normal",
        NORMAL,
        lambda h: Flow(lambda x, p, dtheta: h.math.sin(x) * dtheta.loc + x**2 / p.scale * dtheta.scale, q=lower_q),
        X,
    ),
    "Laplace RP q": ("Laplace", NORMAL, lambda h: RP(lower_q), X),
    "LogNormal RP q": ("LogNormal", NORMAL, lambda h: RP(lower_q), X),
    "LogNormal cdf": ("LogNormal", NORMAL, lambda h: ImplicitRP(), X),
    "Exponential RP q": ("Exponential", {"rate": SCALE}, lambda h: RP(lambda p: h.dist.Exponential(0.7 * p.rate)), X),
    "Exponential cdf": ("Exponential", {"rate": SCALE}, lambda h: ImplicitRP(), X),
    "Uniform RP q": ("Uniform", {"low": LOC - 5, "high": LOC + 4}, lambda h: RP(lambda p: h.dist.Uniform(p.low - 1, p.high + 1)), X),
    "Cauchy Flow": ("Cauchy", NORMAL, lambda h: Flow(loc=lambda x, p: h.math.exp(-(x**2))), X),
    "Gamma LR": ("Gamma", GAMMA, lambda h: LR(), X),
    "Gamma Flow": ("Gamma", GAMMA, lambda h: Flow(concentration=lambda x, p: 0.3 * x, rate=lambda x, p: -x / p.rate), X),
    "Beta LR": ("Beta", {"concentration1": SCALE, "concentration0": 2 * SCALE}, lambda h: LR(), np.array([0.1, 0.4, 0.9])),
    # without VonMises: the Bessel functions of torch's log_prob are only right to 1e-7
    "Poisson LR": ("Poisson", {"rate": SCALE}, lambda h: LR(q=lambda p: h.dist.Poisson(2 * p.rate)), np.array([0, 3, 1])),
    "Bernoulli LR": ("Bernoulli", {"logits": LOC}, lambda h: LR(), np.array([0.0, 1.0, 1.0])),
    "MVN LR": ("MultivariateNormal", MVN, lambda h: LR(), X),
    "MVN RP q": (
        "MultivariateNormal",
        MVN,
        lambda h: RP(lambda p: h.dist.MultivariateNormal(p.loc, scale_tril=1.2 * p.scale_tril)),
        X,
    ),
    "MVN general": ("MultivariateNormal", MVN, lambda h: Flow(tril_field), X),
    "MVN dense S": ("MultivariateNormal", MVN, lambda h: ImplicitRP(dense_s, exact=False), X),
    "MVN Flow loc": ("MultivariateNormal", MVN, lambda h: Flow(loc=lambda x, p: h.math.sin(x)), X),
    "Dirichlet on the simplex": ("Dirichlet", DIRICHLET, lambda h: Flow(replicator), np.array([0.2, 0.5, 0.3])),
}


@pytest.mark.parametrize("row", ROWS)
def test_hosts_agree(row):
    family, parameters, estimator, x = ROWS[row]
    results = [attached(host, family, parameters, estimator, x) for host in HOSTS.values()]
    for value, _, _ in results:
        np.testing.assert_array_equal(value, x)  # the same number, bit for bit
    (_, w1, g1), (_, w2, g2) = results
    assert (w1 is None) == (w2 is None)
    if w1 is not None:
        np.testing.assert_allclose(w1, w2, rtol=1e-10)
    for name in parameters:
        np.testing.assert_allclose(g1[name], g2[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row", ["Normal Flow", "Normal LR", "Normal general", "Normal cdf"])
def test_batch_and_event_dims(host, row):
    """Scores keep the batch dims of the site and are summed over its event dims."""
    family, parameters, estimator, x = ROWS[row]
    batched = {k: np.stack([v, v + 0.1]) for k, v in parameters.items()}
    together = attached(host, family, batched, estimator, np.stack([x, x - 0.2]), wrap=lambda d: d.to_event(2))
    assert together[0].shape == (2, 3)
    if together[1] is not None:
        assert together[1].shape == ()


def test_divergence_on_the_simplex(host):
    """psi of the replicator field uses the divergence on the simplex, sum(a) - d x.a, not the trace in the ambient space."""
    x, d = np.array([0.2, 0.5, 0.3]), 3
    concentration = DIRICHLET["concentration"]
    for k in range(d):
        e = np.eye(d)[k]

        def total(c, e=e):
            fn = host.dist.Dirichlet(host.array(concentration) + c * host.array(e))
            return attach(host.ops, host.target("x", fn, enters=True), Flow(replicator), host.array(x)).score

        psi = host.value_and_gradient(lambda at: total(at["c"]), {"c": 0.0})[1]["c"]
        u = x * (e - x[k])
        score = np.log(x[k]) - (digamma(concentration[k]) - digamma(concentration.sum()))
        expected = 1 - d * x[k] + (u * (concentration - 1) / x).sum() + score
        np.testing.assert_allclose(psi, expected, rtol=1e-10)


def test_jacobian_of_a_matrix_event(host):
    x, m = host.array(np.arange(8.0).reshape(2, 2, 2) / 7), host.array([[1.0, 2.0], [3.0, 4.0]])
    value, jacobian = host.ops.jacobian(lambda x: m @ x * x, x, 2, live=False)
    value, jacobian, x, m = (np.asarray(a) for a in (value, jacobian, x, m))
    np.testing.assert_allclose(value, m @ x * x)
    step = 1e-6
    for j in range(4):
        e = step * np.eye(4)[j].reshape(2, 2)
        difference = (m @ (x + e) * (x + e) - m @ (x - e) * (x - e)) / (2 * step)
        np.testing.assert_allclose(jacobian[..., j], difference.reshape(2, 4), atol=1e-8)


def test_weight_where_the_proposal_leaves_the_support(host):
    """With a Normal proposal for an Exponential, a sample outside the support has weight 0 and a value inside."""
    estimator = lambda h: LR(q=lambda p: h.dist.Normal(p.rate, 2 * p.rate))
    value, log_weight, _ = attached(host, "Exponential", {"rate": SCALE}, estimator, np.array([-0.5, 0.4, 1.0]))
    assert value[0] >= 0
    assert log_weight[0] == -np.inf
    np.testing.assert_array_equal(value[1:], [0.4, 1.0])
    assert np.isfinite(log_weight[1:]).all()


# ---- the tape and the objective


def test_sum_to_keeps_the_dims_of_frames():
    x = np.arange(24.0).reshape(2, 3, 4)
    inner, outer = Frame("i", -1, 4), Frame("o", -3, 2)
    np.testing.assert_array_equal(sum_to(x, {inner}), x.sum((0, 1)))
    np.testing.assert_array_equal(sum_to(x, {outer}), x.sum((1, 2), keepdims=True))
    assert sum_to(x, set()) == x.sum()
    assert sum_to(np.float64(3.0), {inner}) == 3.0


def test_leave_one_out_of_particles_with_weights():
    """The baseline is the mean over the other particles, element by element. (K,) times (K, 1) would broadcast silently."""
    score, cost = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([[1.0, 0.0], [2.0, 1.0], [6.0, 5.0]])
    weight = np.array([[1.0, 2.0], [0.5, 1.0], [2.0, 1.0]])
    mean_of_others = np.array([[4.0, 3.0], [3.5, 2.5], [1.5, 0.5]])

    def term(score, baseline):
        return estimate(flowvi.ops.jax, Particle(jnp.ones(3), {"f": (Score(score, cost, weight),)}), 3, baseline)

    for baseline, gain in ((ParticleMean(), cost - weight * mean_of_others), (None, cost)):
        value, tangent = jax.jvp(partial(term, baseline=baseline), (jnp.full((3, 2), 7.0),), (score,))
        assert value == 1.0  # the score adds nothing
        np.testing.assert_allclose(tangent, (score * gain).sum() / 3)


def test_program_order():
    guide, model = ("a", "aux", "b", "c", "d"), ("y0", "b", "y1", "a", "c", "y2", "d")
    random, scans = frozenset(guide), (frozenset({"c", "d"}), frozenset({"c", "y2"}))
    of_guide, of_model = program_order(guide, model, random, *scans)
    assert of_guide == {"a": {"a"}, "aux": {"a", "aux"}, "b": {"a", "aux", "b"}, "c": random, "d": random}
    assert of_model["y0"] == {"a", "aux"}  # the auxiliary site, and the guide's earlier draws
    assert of_model["b"] == of_model["y1"] == of_model["a"] == {"a", "aux", "b"}
    assert of_model["c"] == of_model["y2"] == random
    assert program_order(guide, model, random, model_scans=scans[1])[0]["c"] == random - {"d"}  # a scan in the model only
    without = program_order(("a", "b", "c", "d"), model, random - {"aux"}, *scans)[1]
    assert without["y0"] == set()
    assert without["y1"] == {"a", "b"}

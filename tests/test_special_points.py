"""Initial values at which a host's log density has a wrong derivative; the estimators are right there."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pytest
from hosts import HOSTS, Program, z_scores
from numpyro.contrib.control_flow import scan

from flowvi import LR, Enumerate
from flowvi.numpyro.special_points import with_right_derivative

DIST = numpyro.distributions


def test_numpyro_itself_is_wrong():
    """If this fails, NumPyro has fixed the bug, and `with_right_derivative` can be removed."""
    wrong = jax.grad(lambda logits: DIST.Bernoulli(logits=logits).log_prob(1.0))(0.0)
    assert wrong == 1.0  # the right value is 1/2


def bernoulli(h, t):
    return h.dist.Bernoulli(logits=t)


def binomial(h, t):
    return h.dist.Binomial(total_count=10, logits=t)


def program(family, mask=None):
    def guide(h, t):
        fn = family(h, t[0])
        h.sample("k", fn if mask is None else fn.mask(mask))

    def model(h, t):
        fn = family(h, 0 * t[0] + h.array(0.4))
        k = h.sample("k", fn if mask is None else fn.mask(mask))
        h.factor("y", -0.5 * (2.0 - 0.7 * k) ** 2)

    return Program(guide, model, (0.0,))


def exact(family, mask=None):
    """The exact gradient, as a sum over all values, differentiated away from 0."""

    def elbo(logits):
        n = 1 if family is bernoulli else 10
        k = jnp.arange(n + 1.0)
        p, prior = (family(HOSTS["numpyro"], t) for t in (logits, 0.4))
        log_p = p.log_prob(k)
        costs = -0.5 * (2.0 - 0.7 * k) ** 2 + (0.0 if mask is False else prior.log_prob(k) - log_p)
        return (jnp.exp(log_p) * costs).sum()

    step = 1e-4
    return np.array([(elbo(step) - elbo(-step)) / (2 * step)])


@pytest.mark.parametrize("mask", [None, False])
@pytest.mark.parametrize("family", [bernoulli, binomial])
@pytest.mark.parametrize("particles", [1, 4])
def test_logits_of_zero(host, family, mask, particles):
    samples = host.gradients(program(family, mask), 40_000, particles=particles, estimators={"k": LR()})
    assert np.all(np.abs(z_scores(samples, exact(family, mask))) < 5)
    samples = host.gradients(program(family, mask), 3, particles=particles, estimators={"k": Enumerate()})
    np.testing.assert_allclose(samples, np.broadcast_to(exact(family, mask), samples.shape), rtol=1e-6)


def test_logits_of_zero_in_a_scan():
    h = HOSTS["numpyro"]

    def part(logits):
        def body(carry, _):
            k = numpyro.sample("k", DIST.Bernoulli(logits=logits))
            return carry + k, None

        return scan(body, 0.0, None, length=2)[0]

    def model(h, t):
        h.factor("y", -0.5 * (2.0 - part(0.4 + 0 * t[0])) ** 2)

    samples = h.gradients(Program(lambda h, t: part(t[0]), model, (0.0,)), 40_000, default=LR())

    def elbo(t):
        p, prior = jax.nn.sigmoid(t), jax.nn.sigmoid(0.4)
        masses = jnp.array([(1 - p) ** 2, 2 * p * (1 - p), p**2])
        divergence = p * jnp.log(p / prior) + (1 - p) * jnp.log((1 - p) / (1 - prior))
        return masses @ (-0.5 * (2.0 - jnp.arange(3.0)) ** 2) - 2 * divergence

    assert np.all(np.abs(z_scores(samples, np.array([jax.grad(elbo)(0.0)]))) < 5)


# ---- a probability of 0 downstream


def switched(y):
    """a ~ Bernoulli(q0), b ~ Bernoulli(q1 a), so b = 1 is impossible if a is 0."""

    def guide(h, t):
        a = h.sample("a", h.dist.Bernoulli(probs=1 / (1 + h.math.exp(-t[0]))))
        h.sample("b", h.dist.Bernoulli(probs=a / (1 + h.math.exp(-t[1]))))

    def model(h, t):
        a = h.sample("a", h.dist.Bernoulli(probs=h.array(0.5) + 0 * t[0]))
        b = h.sample("b", h.dist.Bernoulli(probs=0.4 * a))
        h.factor("y", -0.5 * (a + b - y) ** 2)

    return Program(guide, model, (0.3, -0.2))


def exact_switched(y):
    def elbo(t):
        q0, q1 = jax.nn.sigmoid(t)
        of = lambda a, b: -0.5 * (a + b - y) ** 2 + np.log(0.5)
        none = of(0, 0) - jnp.log(1 - q0)
        one = of(1, 0) + np.log(0.6) - jnp.log(q0) - jnp.log(1 - q1)
        both = of(1, 1) + np.log(0.4) - jnp.log(q0) - jnp.log(q1)
        return (1 - q0) * none + q0 * ((1 - q1) * one + q1 * both)

    return np.asarray(jax.grad(elbo)(jnp.array([0.3, -0.2])))


@pytest.mark.parametrize("y", [6.0, 20.0])
@pytest.mark.parametrize("estimator", [LR(), Enumerate()])
def test_what_cannot_happen_has_no_score(host, estimator, y):
    samples = host.gradients(switched(y), 20_000, default=estimator)
    assert np.isfinite(samples).all()
    assert np.all(np.abs(z_scores(samples, exact_switched(y))) < 5)


@pytest.mark.parametrize("mask", [None, True])
def test_a_rate_of_zero_has_no_score(host, mask):
    """At a rate of 0 the gradient of E[0.3 a + sin n] is right, with the mean of sin n in closed form."""

    def guide(h, t):
        a = h.sample("a", h.dist.Bernoulli(probs=1 / (1 + h.math.exp(-t[0]))).mask(False))
        fn = h.dist.Poisson(a * h.math.exp(t[1]))
        h.sample("n", (fn if mask is None else fn.mask(mask)))

    def model(h, t):
        a = h.sample("a", h.dist.Bernoulli(probs=h.array(0.5) + 0 * t[0]).mask(False))
        n = h.sample("n", h.dist.Poisson(h.array(1.0) + 0 * t[0]).mask(False))
        h.factor("cost", 0.3 * a + h.math.sin(n))

    def exact(t):
        q, rate = jax.nn.sigmoid(t[0]), jnp.exp(t[1])
        n = jnp.arange(40.0)
        log_p = n * t[1] - rate - jax.scipy.special.gammaln(n + 1)
        return q * (0.3 + jnp.exp(log_p) @ (jnp.sin(n) - log_p))

    theta = (0.3, -0.2)
    samples = host.gradients(Program(guide, model, theta), 40_000, default=LR())
    assert np.isfinite(samples).all()
    assert np.all(np.abs(z_scores(samples, np.asarray(jax.grad(exact)(jnp.array(theta))))) < 5)


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (lambda p: DIST.Bernoulli(probs=p), [0, 1]),
        (lambda p: DIST.Binomial(total_count=4, probs=p), [0, 1, 4]),
        (lambda p: DIST.Geometric(probs=p), [0, 1, 5]),
        (lambda p: HOSTS["numpyro"].negative_binomial(2.5, probs=p), [0, 1, 5]),
        (lambda p: DIST.Multinomial(3, probs=jnp.stack([p, 1 - p])), [np.array([1, 2]), np.array([3, 0])]),
        (DIST.Poisson, [0, 1, 5]),
    ],
)
def test_the_safe_densities_are_those_of_numpyro(fn, values):
    def value_and_slope(make, p, k):
        return jax.value_and_grad(lambda p: make(p).log_prob(k))(p)

    for p in (0.2, 0.5, 0.9):
        for k in values:
            ours, theirs = value_and_slope(lambda p: with_right_derivative(fn(p)), p, k), value_and_slope(fn, p, k)
            np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert np.isfinite(jax.grad(lambda p: with_right_derivative(fn(p)).log_prob(0 * values[0]).sum())(1e-300))

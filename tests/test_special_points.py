"""Starting values at which a host's log density has a wrong derivative: the estimators are right there all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pytest
from hosts import HOSTS, Program, z_scores
from numpyro.contrib.control_flow import scan

from flowvi import LR, Enumerate

DIST = numpyro.distributions


def test_numpyro_itself_is_wrong():
    """Where this fails, NumPyro has mended it, and `with_right_derivative` can go."""
    wrong = jax.grad(lambda logits: DIST.Bernoulli(logits=logits).log_prob(1.0))(0.0)
    assert wrong == 1.0  # 1/2 is right


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
    """By the sum over all values, differentiated away from 0."""

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

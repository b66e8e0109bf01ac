"""The wrapper ``Estimated``: it equals the annotation, has the interface of a distribution, and works under Pyro's own ELBOs."""

import jax
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import Program
from kinds import KINDS, WEIGHTS, cost_of, wide

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_is_the_annotation(host, kind):
    """In any nesting, Estimated(p, e) gives the samples of the mapping; outside flowvi it is p."""

    def program(wrap):
        def guide(h, t):
            h.sample("x", wrap(h, h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None])))

        def model(h, t):
            x = h.sample("x", h.dist.Normal(0 * t[0][..., None] + h.array(WEIGHTS), h.array(1.0)).to_event(1))
            h.factor("f", cost_of(h, x))

        return Program(guide, model, (0.3, 0.8))

    plain = host.gradients(program(lambda h, d: d.to_event(1)), 5, estimators={"x": KINDS[kind]})
    for wrap in (
        lambda h, d: h.flow.Estimated(d, KINDS[kind]).to_event(1),
        lambda h, d: h.flow.Estimated(d.to_event(1), KINDS[kind]),
        lambda h, d: h.flow.Estimated(d, KINDS[kind]).to_event(1).mask(True),
    ):
        np.testing.assert_allclose(host.gradients(program(wrap), 5), plain, rtol=1e-10)
    overridden = host.gradients(program(lambda h, d: h.flow.Estimated(d.to_event(1), LR())), 5, estimators={"x": RP()})
    np.testing.assert_allclose(overridden, host.gradients(program(lambda h, d: d.to_event(1)), 5, estimators={"x": RP()}), rtol=1e-10)


def test_the_wrapper_is_a_distribution(host):
    plain = host.dist.Normal(host.array([0.3, 0.1]), host.array(1.5))
    wrapped = host.flow.Estimated(plain, LR(q=wide))
    x = host.array([0.2, -0.4])
    assert type(wrapped.support) is type(plain.support)
    np.testing.assert_allclose(wrapped.log_prob(x), plain.log_prob(x))
    np.testing.assert_allclose(wrapped.to_event(1).log_prob(x), plain.to_event(1).log_prob(x))
    np.testing.assert_allclose(wrapped.mask(False).log_prob(x), 0 * plain.log_prob(x))
    assert tuple(wrapped.expand((3, 2)).batch_shape) == (3, 2)
    np.testing.assert_allclose(wrapped.mean, plain.mean)
    other = host.dist.Normal(host.array(0.0), host.array(1.0))
    kl = host.kl_divergence
    np.testing.assert_allclose(kl(wrapped, other), kl(plain, other))
    np.testing.assert_allclose(kl(other.expand((2,)), wrapped), kl(other.expand((2,)), plain))
    np.testing.assert_allclose(kl(wrapped, wrapped), 0 * kl(plain, plain), atol=1e-12)
    np.testing.assert_allclose(*(host.numpy(host.draw(d, (3,))) for d in (wrapped, plain)))
    if host.name == "numpyro":
        assert jax.tree.structure(wrapped) == jax.tree.structure(host.flow.Estimated(plain, LR(q=wide)))
        np.testing.assert_allclose(jax.jit(lambda d: d.log_prob(x))(wrapped), plain.log_prob(x))
        assert numpyro_dist.biject_to(wrapped.support)(0.3) == 0.3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cdf"])
@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO"])
def test_the_wrapper_under_pyros_own_elbos(elbo, kind):
    """With q = p, Pyro's own objectives use the estimator. y depends on x, so that a lost path or score would show."""
    n = 20_000
    leaf = torch.full((n,), 0.4, requires_grad=True)

    def guide():
        with pyro.plate("n", n):
            x = pyro.sample("x", flowvi.pyro.Estimated(pyro_dist.Normal(leaf, 0.9), KINDS[kind]))
            pyro.sample("y", flowvi.pyro.Estimated(pyro_dist.Normal(torch.sin(x), 0.7), LR()))

    def model():
        with pyro.plate("n", n):
            x = pyro.sample("x", pyro_dist.Normal(0.0, 1.0))
            pyro.sample("y", pyro_dist.Normal(x, 1.0))

    def exact(m):  # E[log p(x, y)] + entropies, by quadrature over x; E[(y - x)^2] = 0.49 + (sin x - x)^2
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        x = m + 0.9 * nodes
        return (weights * (-0.5 * x**2 - 0.5 * (0.49 + (np.sin(x) - x) ** 2))).sum() / weights.sum()

    truth = (exact(0.4 + 1e-5) - exact(0.4 - 1e-5)) / 2e-5
    objective = getattr(pyro.infer, elbo)(max_plate_nesting=1, strict_enumeration_warning=False)
    pyro.set_rng_seed(0)
    if elbo == "TraceGraph_ELBO":
        _, surrogate = objective._loss_and_surrogate_loss(model, guide, (), {})
        surrogate.backward()
    else:
        objective.differentiable_loss(model, guide).backward()
    samples = -leaf.grad.numpy()
    assert abs(samples.mean() - truth) < 5 * samples.std() / np.sqrt(n)

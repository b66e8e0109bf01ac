"""The second derivative of a loss is right if all derivatives are those of the host's own samplers, and refused otherwise."""

import jax
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pytest
import torch

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Enumerate, Flow, ImplicitRP, fields

NORMAL = {
    "LR": (LR(), {}),
    "a flow": (Flow(loc=lambda x, p: 0.5), {}),
    "a pathwise field": (Flow(fields.location_scale()), {}),
    "the cdf": (ImplicitRP(), {}),
    "a control variate": (RP(control_variate="diagonal"), {}),
    "a proposal": (RP(lambda p: type(p)(p.loc, 1.3 * p.scale)), {}),
    "sticking the landing": (RP(), {"entropy": "stl"}),
}


def second_in_numpyro(elbo, discrete=False):
    dist = numpyro.distributions

    def loss(t):
        def guide():
            numpyro.sample("x", dist.Bernoulli(logits=t) if discrete else dist.Normal(t, 0.7))

        def model():
            x = numpyro.sample("x", dist.Bernoulli(0.5) if discrete else dist.Normal(0.0, 1.0))
            numpyro.factor("y", -(x**4))

        return elbo.loss(jax.random.key(3), {}, model, guide)

    first = jax.grad(loss)
    assert np.isfinite(first(0.4))
    return [jax.grad(first)(0.4), jax.jit(jax.grad(first))(0.4), jax.jacfwd(first)(0.4)]


def second_in_pyro(elbo, discrete=False):
    dist, t = pyro.distributions, torch.tensor(0.4, requires_grad=True)

    def guide():
        pyro.sample("x", dist.Bernoulli(logits=t) if discrete else dist.Normal(t, 0.7))

    def model():
        x = pyro.sample("x", dist.Bernoulli(0.5) if discrete else dist.Normal(0.0, 1.0))
        pyro.factor("y", -(x**4))

    pyro.set_rng_seed(3)
    (first,) = torch.autograd.grad(elbo.differentiable_loss(model, guide), t, create_graph=True)
    assert first.isfinite()
    return list(torch.autograd.grad(first, t))


SECOND = {"numpyro": second_in_numpyro, "pyro": second_in_pyro}


@pytest.mark.parametrize("name", NORMAL)
def test_a_surrogate_has_no_second_derivative(host, name):
    estimator, options = NORMAL[name]
    with pytest.raises(ValueError, match="no second derivative"):
        SECOND[host.name](host.flow.TraceFlow_ELBO(estimators={"x": estimator}, **options))


@pytest.mark.parametrize("estimator", [LR(), Enumerate()])
def test_nor_has_that_of_a_discrete_site(host, estimator):
    with pytest.raises(ValueError, match="no second derivative"):
        SECOND[host.name](host.flow.TraceFlow_ELBO(estimators={"x": estimator}), discrete=True)


@pytest.mark.parametrize("estimator", [LR(), ImplicitRP()])
def test_nor_has_a_bound(host, estimator):
    with pytest.raises(ValueError, match="no second derivative"):
        SECOND[host.name](host.flow.TraceFlow_RenyiELBO(estimators={"x": estimator}))


def test_a_program_of_pathwise_sites_has_one(host):
    """The second derivative is that of (t + 0.7 e)^4 and of the two log densities, at the draw."""
    for value in SECOND[host.name](host.flow.TraceFlow_ELBO()):
        assert value > 1.0 + 1e-6  # the prior's part is 1, and 12 x^2 is positive
    assert len(SECOND[host.name](host.flow.TraceFlow_RenyiELBO())) > 0


@pytest.mark.parametrize("estimator", [LR(), Enumerate()])
def test_nor_have_the_costs_of_each_site(estimator):
    """The losses by site, with ``sum_sites=False``, refuse a second derivative too."""
    dist = numpyro.distributions
    elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"x": estimator}, sum_sites=False)

    def loss(t):
        model = lambda: numpyro.sample("x", dist.Bernoulli(0.5))
        return sum(elbo.loss(jax.random.key(3), {}, model, lambda: numpyro.sample("x", dist.Bernoulli(logits=t))).values())

    assert np.isfinite(jax.grad(loss)(0.4))
    with pytest.raises(ValueError, match="no second derivative"):
        jax.hessian(loss)(0.4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch warns in forward mode
@pytest.mark.parametrize("estimator", [LR(), Enumerate()])
def test_first_derivatives_of_other_kinds_in_pyro(estimator):
    """First derivatives by ``torch.func.grad`` and in forward mode work in Pyro."""
    dist, t = pyro.distributions, torch.tensor(0.4)
    elbo = flowvi.pyro.TraceFlow_ELBO(default=estimator)

    def loss(t):
        pyro.set_rng_seed(3)
        model = lambda: pyro.sample("x", dist.Bernoulli(0.3))
        return elbo.differentiable_loss(model, lambda: pyro.sample("x", dist.Bernoulli(logits=t)))

    live = t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(live), live)
    torch.testing.assert_close(torch.func.grad(loss)(t), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (t,), (torch.ones(()),))[1], expected)

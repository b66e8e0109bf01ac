"""``entropy="analytic"``: divergences in closed form, where host and program allow it. For "stl" see test_exact.py."""

import math

import jax
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import numpyro.infer
import pyro
import pyro.distributions as pyro_dist
import pyro.infer
import pytest
import torch
from cases import EXACT, KINDS, normal_normal
from hosts import Program
from quadrature import gauss, log_normal, slope

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP

N = 40_000
OFF = EXACT["elbo-normal-normal-off"]


def at_truth(samples, truth):
    return np.all(np.abs(samples.mean(0) - truth) < 5 * samples.std(0) / np.sqrt(len(samples)) + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_site(host, kind):
    """Only the noise of the likelihood is left, and its variance under RP is exact."""
    program = normal_normal(OFF["theta"]["value"])
    samples = host.gradients(program, N, estimators={"x": KINDS[kind](None)}, entropy="analytic")
    assert at_truth(samples, OFF["gradient"])
    if kind == "RP":  # log N(1.1; m + s z, 0.8) in m and log s, with r = (1.1 - m - s z) / 0.64: r and r s z
        m, s = OFF["theta"]["value"][0], math.exp(OFF["theta"]["value"][1])
        z, w = np.array(gauss(0.0, 1.0)).T[::-1]
        r = (1.1 - m - s * z) / 0.64
        variance = [(w * g**2).sum() - (w * g).sum() ** 2 for g in (r, r * s * z)]
        squares = (samples - samples.mean(0)) ** 2
        assert np.all(np.abs(squares.mean(0) - variance) < 5 * squares.std(0) / np.sqrt(N))


def hierarchy(reordered=False, tempered=1.0):
    """Guide and model are chains of two Normals; the model's log densities may be tempered by a factor."""

    def guide(h, t):
        first = h.sample("a", h.dist.Normal(t[0], h.array(0.8)))
        h.sample("b", h.dist.Normal(t[1] + h.math.sin(first), h.array(0.6)))

    def model(h, t):
        with h.scale(tempered):
            if reordered:
                b = h.sample("b", h.dist.Normal(h.array(0.0), h.array(1.0)))
                a = h.sample("a", h.dist.Normal(0.5 * b, h.array(1.0)))
            else:
                a = h.sample("a", h.dist.Normal(h.array(0.0), h.array(1.0)))
                b = h.sample("b", h.dist.Normal(0.5 * a, h.array(1.0)))
        h.sample("y", h.dist.Normal(a * b, h.array(1.0)), obs=h.array(0.7))

    return Program(guide, model, (0.3, -0.4))


def exact_hierarchy(tempered=1.0):
    def elbo(theta):
        total = 0.0
        for wa, a in gauss(theta[0], 0.8):
            for wb, b in gauss(theta[1] + math.sin(a), 0.6):
                prior = log_normal(a, 0, 1) + log_normal(b, 0.5 * a, 1)
                guide = log_normal(a, theta[0], 0.8) + log_normal(b, theta[1] + math.sin(a), 0.6)
                total += wa * wb * (tempered * prior + log_normal(0.7, a * b, 1) - guide)
        return total

    return slope(elbo, (0.3, -0.4))


@pytest.mark.parametrize("dependencies", ["graph", "plates"])
@pytest.mark.parametrize("estimators", [{"a": LR()}, {"b": LR()}, {"a": RP(), "b": LR()}], ids=["LR at a", "LR at b", "mixed"])
def test_parents_stay_live(host, estimators, dependencies):
    options = {"estimators": estimators, "dependencies": dependencies}
    samples = host.gradients(hierarchy(), N, entropy="analytic", **options)
    assert at_truth(samples, exact_hierarchy())
    assert np.all(samples.var(0) < host.gradients(hierarchy(), N, **options).var(0))
    weighted = {name: type(e)(q=lambda p: host.dist.Normal(p.loc, 1.3 * p.scale)) for name, e in estimators.items()}
    samples = host.gradients(hierarchy(), N, seed=1, estimators=weighted, entropy="analytic", dependencies=dependencies, particles=2)
    assert at_truth(samples, exact_hierarchy())


def test_densities_that_count_differently_are_sampled(host):
    """With a tempered model there is no closed form; both log densities are then sampled, each with its own factor."""
    samples = host.gradients(hierarchy(tempered=0.5), N, entropy="analytic")
    assert at_truth(samples, exact_hierarchy(0.5))
    assert not at_truth(samples, exact_hierarchy())


def test_describe_says_where(host):
    """`describe` says that x has a closed form and y has none."""

    def guide():
        host.sample("x", host.dist.Normal(host.array(0.1), 1.0))
        host.sample("y", host.dist.Normal(host.array(0.1), 1.0))

    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), 1.0))
        host.sample("y", host.dist.StudentT(host.array(3.0), 0.0, 1.0))

    described = host.flow.TraceFlow_ELBO(entropy="analytic").describe(model, guide)
    assert [site.closed_form for site in described] == [True, False]
    assert str(described).endswith("divergence in closed form: x; sampled: y")
    assert "closed form" not in str(host.flow.TraceFlow_ELBO().describe(model, guide))


def test_another_order_is_refused(host):
    with pytest.raises(ValueError, match=r"site 'a': entropy='analytic' needs the latent sites in the same order .* \['b', 'a'\]"):
        host.gradients(hierarchy(reordered=True), 1, entropy="analytic")
    host.gradients(hierarchy(reordered=True), 1)


DATA = np.array([0.3, -1.0, 2.0, 0.1])


@pytest.mark.slow
def test_the_same_numbers_as_numpyro():
    def model(data):
        with numpyro.plate("i", 8, subsample_size=4):
            x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            k = numpyro.sample("g", numpyro_dist.Gamma(2.0, 1.0))
            numpyro.sample("y", numpyro_dist.Normal(x.sum(-1), k), obs=data)

    def guide(data):
        m, s = numpyro.param("m", 0.3), numpyro.param("s", 0.9)
        with numpyro.plate("i", 8, subsample_size=4):
            numpyro.sample("x", numpyro_dist.Normal(m, s).expand([2]).to_event(1))
            numpyro.sample("g", numpyro_dist.Gamma(3.0, s))

    def value_and_grad(elbo):
        return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(1), p, model, guide, DATA))({"m": 0.3, "s": 0.9})

    for particles in (1, 3):
        ours = value_and_grad(flowvi.numpyro.TraceFlow_ELBO(particles, entropy="analytic"))
        theirs = value_and_grad(numpyro.infer.TraceMeanField_ELBO(particles))
        np.testing.assert_allclose(*(np.array([v, g["m"], g["s"]]) for v, g in (ours, theirs)), rtol=1e-10)


@pytest.mark.parametrize("dependencies", ["graph", "plates"])
def test_the_same_numbers_as_pyro(dependencies):
    def model():
        with pyro.plate("i", 8, subsample_size=4):
            x = pyro.sample("x", pyro_dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            k = pyro.sample("g", pyro_dist.Gamma(2.0, 1.0))
            pyro.sample("y", pyro_dist.Normal(x.sum(-1), k), obs=torch.tensor(DATA))

    def guide():
        m, s = pyro.param("m", torch.tensor(0.3)), pyro.param("s", torch.tensor(0.9))
        with pyro.plate("i", 8, subsample_size=4):
            pyro.sample("x", pyro_dist.Normal(m, s).expand([2]).to_event(1))
            pyro.sample("g", pyro_dist.Gamma(torch.tensor(3.0), s))

    def loss_and_grads(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        value = elbo.loss_and_grads(model, guide)
        return np.array([value, *(pyro.param(name).unconstrained().grad for name in ("m", "s"))])

    ours = loss_and_grads(flowvi.pyro.TraceFlow_ELBO(entropy="analytic", dependencies=dependencies))
    np.testing.assert_allclose(ours, loss_and_grads(pyro.infer.TraceMeanField_ELBO()), rtol=1e-10)

"""Particles that are drawn together: each keeps its distribution, and their mean has less noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hosts import Program, chain, each, z_scores
from test_families import THETA

import flowvi.numpyro.particles
import flowvi.pyro.handlers
from flowvi import LR
from flowvi.host import host_of
from flowvi.numpyro.host import enable_x64
from flowvi.particles import BY_INVERSE_CDF, at_uniforms
from flowvi.pyro.particles import uniforms

HOW = ["stratified", "antithetic"]
K = 8


def elbo(host, particles="stratified", num_particles=K, plates=0, **options):
    nesting = {} if host.name == "numpyro" else {"max_plate_nesting": 1 + plates}
    return host.flow.TraceFlow_ELBO(num_particles, vectorize_particles=True, particles=particles, **nesting, **options)


def draws(host, how, n, shape, num_particles=K):
    """Uniform numbers of (n, particles, *shape)."""
    if host.name == "pyro":
        torch.manual_seed(0)
        return uniforms(how, (n, num_particles, *shape), 1, torch.zeros(())).numpy()

    def particle(key, i, shared):
        return flowvi.numpyro.particles.Together(how, i, num_particles, shared).uniforms("x", key, shape)

    def one(key):
        keys = jax.random.split(key, num_particles + 1)
        return jax.vmap(particle, (0, 0, None))(keys[1:], jnp.arange(num_particles), keys[0])

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), n)))


# ---- the uniform numbers


@pytest.mark.parametrize("how", HOW)
def test_each_particle_keeps_its_law(host, how):
    """The numbers of one particle are uniform, and independent at different elements."""
    u = draws(host, how, 20_000, (3,))[:, 5] - 0.5
    assert np.abs(z_scores(u, 0.0, np.full(3, 1 / 12))).max() < 5
    assert np.abs(z_scores(u**2, 1 / 12, np.full(3, 1 / 80 - 1 / 144))).max() < 5
    assert np.abs(z_scores(u * np.roll(u, 1, -1), 0.0, np.full(3, 1 / 144))).max() < 5


def test_a_latin_hypercube(host):
    u = draws(host, "stratified", 50, (2, 3))
    assert (np.sort((u * K).astype(int), 1) == np.arange(K)[:, None, None]).all()
    ranks = u.argsort(1)
    assert not (ranks[..., :1] == ranks).all()  # each element has its own permutation


def test_mirrored_pairs(host):
    u = np.sort(draws(host, "antithetic", 50, (2, 3)), 1)
    np.testing.assert_allclose(u + u[:, ::-1], 1, rtol=1e-12)


def test_numbers_in_single_precision_are_never_0_or_1(host):
    torch.set_default_dtype(torch.float32)
    with enable_x64(False):
        for how in HOW:
            u = draws(host, how, 200, (20,), 64)
            assert u.dtype == np.float32
            assert 0 < u.min() < u.max() < 1
            assert np.isfinite(np.asarray(jax.scipy.special.ndtri(u))).all()


# ---- the samples


@each("name", sorted(BY_INVERSE_CDF), slow_in_numpyro=lambda name: name not in ("Normal", "Cauchy", "Pareto"))
def test_a_sample_at_uniform_numbers(host, name):
    """The sample is the inverse cdf, with the derivative -dF/dtheta over the density in each parameter."""
    theta = [host.array(v) for v in THETA[name].values()]

    def make(values):
        return getattr(host.dist, name)(**dict(zip(THETA[name], values, strict=True)))

    u = host.array([0.01, 0.3, 0.9])
    core = host_of(make(theta))

    def x(values):
        return at_uniforms(core.ops, core.target("x", make(values), True), u)

    def cdf(values):
        return make(values).cdf(fixed)

    if host.name == "numpyro":
        fixed = x(theta)
        moved, of_cdf = jax.jacobian(x)(theta), jax.jacobian(cdf)(theta)
    else:
        fixed = x(theta).detach()
        moved, of_cdf = (torch.autograd.functional.jacobian(lambda *t, f=f: f(t), tuple(theta)) for f in (x, cdf))
    np.testing.assert_allclose(np.asarray(cdf(theta)), np.asarray(u), rtol=1e-10)
    density = np.exp(np.asarray(make(theta).log_prob(fixed)))
    for one, other in zip(moved, of_cdf, strict=True):
        np.testing.assert_allclose(np.asarray(one), -np.asarray(other) / density, rtol=1e-8, atol=1e-10)


def square(joint=False):
    """A Normal with the cost x^2, or with a cost of the sum of two coordinates."""

    def site(h, t, values):
        if not joint:
            return h.dist.Normal(t[0], t[1])
        loc = h.math.stack([t[0], 0 * t[0]], -1)
        tril = h.math.stack([h.math.stack([t[1], 0 * t[1]], -1), h.math.stack([0.5 * t[1], 1 + 0 * t[1]], -1)], -2)
        return h.dist.MultivariateNormal(loc, scale_tril=tril)

    def cost(h, t, values):
        x = values["x"]
        return (x.sum(-1) if joint else x) ** 2

    return chain((0.4, 0.7), {"x": site}, {"x": cost})


def give(monkeypatch, host, numbers):
    """Give a site these uniform numbers, of shape (particles, *event)."""
    if host.name == "numpyro":
        monkeypatch.setattr(
            flowvi.numpyro.particles.Together, "uniforms", lambda self, name, key, shape: jnp.asarray(numbers)[self.number]
        )
    else:
        given = torch.as_tensor(numbers)[:, None]
        monkeypatch.setattr(flowvi.pyro.handlers, "uniforms", lambda how, shape, axis, like: given.expand(shape))


@pytest.mark.parametrize("joint", [False, True], ids=["Normal", "MultivariateNormal"])
def test_the_gradient_is_that_of_the_formula(host, joint, monkeypatch):
    """The gradient is the mean over particles of 2 x dx/dtheta at the drawn x."""
    u = np.random.default_rng(0).uniform(size=(K, 2) if joint else (K,))
    give(monkeypatch, host, u)
    z = np.asarray(jax.scipy.special.ndtri(u))
    found = host.gradients_of(elbo(host), square(joint), 1)[0]
    if joint:
        total, slope = 0.4 + 1.2 * 0 + 0.7 * z[:, 0] + 0.35 * z[:, 0] + z[:, 1], 1.5 * z[:, 0]
    else:
        total, slope = 0.4 + 0.7 * z, z
    np.testing.assert_allclose(found, [(2 * total).mean(), (2 * total * slope).mean()], rtol=1e-10)


def exact_variance(g, how):
    """The variance of the mean over K particles of g at a Normal number, by a fine grid of equally likely points."""
    z = np.asarray(jax.scipy.special.ndtri((np.arange(K * 20_000) + 0.5) / (K * 20_000)))
    if how == "independent":
        return g(z).var(0) / K
    if how == "antithetic":
        return ((g(z) + g(-z)) / 2).var(0) / (K / 2)
    return g(z).reshape((K, -1, 2)).var(1).mean(0) / K


@each("how", HOW, slow_in_numpyro=lambda how: how == "antithetic")
def test_the_mean_is_exact_and_the_noise_smaller(host, how):
    loc, scale = 0.4, 0.7
    samples = host.gradients_of(elbo(host, how), square(), 4000)

    def gradient(z):
        x = loc + scale * z
        return np.stack([2 * x, 2 * x * z], -1)

    variance, independent = (exact_variance(gradient, one) for one in (how, "independent"))
    assert np.abs(z_scores(samples, [2 * loc, 2 * scale], variance)).max() < 5
    np.testing.assert_allclose(samples.var(0), variance, rtol=0.2, atol=1e-12)
    gain = independent / samples.var(0).clip(1e-12)
    # because 2 (x + x') of a mirrored pair is constant
    assert (gain > [12, 2.5]).all() if how == "stratified" else gain[0] > 1e6 and gain[1] < 1


def in_a_plate():
    """Three elements in a plate, each with its own permutation, and a cost that couples them."""

    def guide(h, t):
        with h.plate("data", 3):
            h.sample("x", h.dist.LogNormal(t[0], t[1]).mask(False))

    def model(h, t):
        with h.plate("data", 3):
            x = h.sample("x", h.dist.LogNormal(t[0], t[1]).mask(False))
        h.factor("cost", h.over_plate(x) ** 2)

    return Program(guide, model, (0.2, 0.4), plates=1)


def test_a_plate(host):
    """The mean is the derivative of E (sum x)^2 = 3 E x^2 + 6 (E x)^2."""
    loc, scale = 0.2, 0.4
    second, mean = np.exp(2 * loc + 2 * scale**2), np.exp(loc + scale**2 / 2)
    exact = [6 * second + 12 * mean**2, 12 * scale * second + 12 * scale * mean**2]
    samples, plain = (host.gradients_of(elbo(host, how, plates=1), in_a_plate(), 4000) for how in ("stratified", "independent"))
    assert np.abs(z_scores(samples, exact)).max() < 5
    assert (plain.var(0) > 2 * samples.var(0)).all()


# ---- scores


def gate():
    """A Bernoulli below a joint site that gives its logits, and a cost of both."""

    def cost(h, t, values):
        return 3 * values["k"] * (1 + values["x"]) + values["x"] ** 2

    sites = {"x": lambda h, t, v: h.dist.Normal(t[0], 1.0), "k": lambda h, t, v: h.dist.Bernoulli(logits=v["x"] + t[1])}
    return chain((0.3, -0.2), sites, {"k": cost})


@each("how", HOW, slow_in_numpyro=lambda how: how == "antithetic")
def test_scores_below_a_joint_site(host, how):
    """The leave-one-out mean does not depend on the draw of the Bernoulli, although the particles have joint logits."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x, weights = 0.3 + nodes, weights / weights.sum()
    p = 1 / (1 + np.exp(-(x - 0.2)))
    exact = [(weights * (3 * p * (1 - p) * (1 + x) + 3 * p + 2 * x)).sum(), (weights * 3 * p * (1 - p) * (1 + x)).sum()]
    samples = host.gradients_of(elbo(host, how, 4, estimators={"k": LR()}), gate(), 10_000)
    assert np.abs(z_scores(samples, exact)).max() < 5


@each("how", HOW, slow_in_numpyro=lambda how: how == "antithetic")
def test_scores_drawn_together_would_be_biased(host, how):
    """Joint draws at a site with a score would be biased, because the leave-one-out mean would depend on its draw."""
    u = draws(host, how, 20_000, ())
    z = np.asarray(jax.scipy.special.ndtri(u))
    cost = (0.4 + 0.7 * z) ** 2
    with_loo = (z / 0.7 * (cost - (cost.sum(1, keepdims=True) - cost) / (K - 1))).mean(1)
    assert abs(z_scores(with_loo[:, None], [0.8])[0]) > 10
    assert abs(z_scores((z / 0.7 * cost).mean(1)[:, None], [0.8])[0]) < 5


# ---- the rest


def test_describe_says_which(host):
    t = [host.array(v) for v in gate().theta]
    programs = [lambda part=part: part(host, t) for part in (gate().model, gate().guide)]
    description = elbo(host, estimators={"k": LR()}).describe(*programs)
    assert description.together == ("x",)
    assert str(description).endswith("particles drawn together: x; independently: k")


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (4, {"particles": "lattice"}, "expected 'independent', 'stratified', 'antithetic' or 'fixed', found 'lattice'"),
        (1, {"particles": "stratified"}, "expected at least 2 as num_particles, found 1"),
        (3, {"particles": "antithetic"}, "expected an even num_particles, found 3"),
        (4, {"particles": "stratified", "vectorize_particles": False}, "expected vectorize_particles=True"),
    ],
)
def test_refusals(host, number, options, message):
    with pytest.raises(ValueError, match=message):
        host.flow.TraceFlow_ELBO(number, **{"vectorize_particles": True, **options})

"""Jumps across a plane in the space of an event: the flux through it makes every estimator right, in both hosts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import Program, z_scores
from scipy import stats

from flowvi import LR, RP, Enumerate, Flow, HalfSpace
from flowvi.surfaces import surface_comparison

THETA = (0.3, -0.2, 0.1, 0.4)
TRIL = np.array([[0.8, 0.0], [0.5, 0.6]])


def law(h, t, multivariate):
    loc = h.math.stack([t[0], t[1]], -1)
    if multivariate:
        return h.dist.MultivariateNormal(loc, scale_tril=h.math.exp(t[2])[..., None, None] * h.array(TRIL)).mask(False)
    return h.dist.Normal(loc, h.math.exp(t[2])[..., None] * h.array([0.8, 0.6])).to_event(1).mask(False)


def plane(h, t):
    """Its normal and its offset, which move."""
    return h.math.stack([1.0 + 0 * t[3], t[3]], -1), 0.5 * t[3]


def program(multivariate):
    def guide(h, t):
        h.sample("x", law(h, t, multivariate))

    def model(h, t):
        x = h.sample("x", law(h, [0.0 * p for p in t], multivariate))
        normal, offset = plane(h, t)
        h.factor("cost", 3 * x[..., 0] - x[..., 1] + 4 * h.math.where((normal * x).sum(-1) > offset, 1.0, 0.0))

    return Program(guide, model, THETA)


def exact(multivariate):
    tril = TRIL if multivariate else np.diag([0.8, 0.6])

    def value(theta):
        a = jnp.array([1.0, theta[3]])
        spread = jnp.exp(theta[2]) * jnp.linalg.norm(tril.T @ a)
        return 3 * theta[0] - theta[1] + 4 * jax.scipy.stats.norm.cdf((a @ theta[:2] - 0.5 * theta[3]) / spread)

    return np.asarray(jax.grad(value)(jnp.array(THETA)))


def across(h, t):
    return HalfSpace(*plane(h, t))


MOVING = {
    "RP": (lambda h, t: RP(jumps=across(h, t)), True),
    "RP, independent Normals": (lambda h, t: RP(jumps=[across(h, t)]), False),
    "LR": (lambda h, t: LR(jumps=across(h, t)), True),
    "half a field": (
        lambda h, t: Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale, jumps=across(h, t)),
        False,
    ),
    "a proposal": (lambda h, t: RP(lambda p: type(p)(p.loc, 1.3 * p.scale), jumps=across(h, t)), False),
}


@pytest.mark.parametrize("name", MOVING)
def test_unbiased(host, name):
    estimator, multivariate = MOVING[name]
    truth = exact(multivariate)
    samples = host.gradients_with(program(multivariate), 20_000, lambda h, t: {"x": estimator(h, t)})
    assert np.all(np.abs(z_scores(samples, truth)) < 5), (samples.mean(0), truth)


@pytest.mark.parametrize("estimator", [LR(), RP()])
def test_without_it_they_are_biased(host, estimator):
    samples = host.gradients(program(True), 20_000, estimators={"x": estimator})
    assert np.abs(z_scores(samples, exact(True))).max() > 5


def test_derivatives_without_noise(host):
    """In loc, the flux is the same everywhere on the plane."""
    samples = host.gradients_with(program(True), 50, lambda h, t: {"x": RP(jumps=across(h, t))})
    np.testing.assert_allclose(samples[:, :2], np.broadcast_to(exact(True)[:2], (50, 2)), rtol=1e-8)


def test_a_wrong_sign_is_rejected(host, monkeypatch):
    def flipped(ops, target, x, surfaces, velocity):
        return surface_comparison(ops, target, x, surfaces, lambda y: -velocity(y))

    monkeypatch.setattr("flowvi.jumps.surface_comparison", flipped)
    samples = host.gradients_with(program(True), 4000, lambda h, t: {"x": RP(jumps=across(h, t))})
    assert np.abs(z_scores(samples, exact(True))).max() > 5


def test_two_planes_and_a_later_site(host, monkeypatch):
    """A corner of two planes, whose cost depends on a Bernoulli downstream."""

    def guide(h, t):
        x = h.sample("x", law(h, [t[0]] * 3, False))
        h.sample("k", h.dist.Bernoulli(logits=x[..., 0]).mask(False))

    def model(h, t):
        x = h.sample("x", law(h, [t[0]] * 3, False))
        k = h.sample("k", h.dist.Bernoulli(logits=0 * t[0]).mask(False))
        h.factor("cost", (1 + 2 * k) * h.math.where((x[..., 0] > 0.1) & (x[..., 1] > -0.2), 1.0, 0.0))

    def value(t):
        s = np.exp(t) * np.array([0.8, 0.6])
        nodes, weights = np.polynomial.legendre.leggauss(200)
        upper = t + 12 * s[0]
        x = 0.1 + (nodes + 1) / 2 * (upper - 0.1)
        inner = (weights * (upper - 0.1) / 2) @ ((1 + 2 / (1 + np.exp(-x))) * stats.norm.pdf(x, t, s[0]))
        return inner * stats.norm.sf(-0.2, t, s[1])

    truth = [(value(0.2 + 1e-5) - value(0.2 - 1e-5)) / 2e-5]
    planes = [HalfSpace(host.array([1.0, 0.0]), 0.1), HalfSpace(lambda p: 0 * p.loc + host.array([0.0, 1.0]), -0.2)]
    estimators = {"x": RP(jumps=planes), "k": Enumerate()}
    samples = host.gradients(Program(guide, model, (0.2,)), 20_000, estimators=estimators)
    assert np.all(np.abs(z_scores(samples, truth)) < 5), (samples.mean(0), truth)
    samples = host.gradients(Program(guide, model, (0.2,)), 20_000, estimators=estimators | {"x": RP(jumps=planes[:1])})
    assert np.abs(z_scores(samples, truth)).max() > 5

    def at_one_point(*arguments):
        found = surface_comparison(*arguments)
        return replace(found, make=lambda uniforms: found.make(0 * uniforms))

    monkeypatch.setattr("flowvi.jumps.surface_comparison", at_one_point)
    samples = host.gradients(Program(guide, model, (0.2,)), 20_000, estimators=estimators)
    assert np.abs(z_scores(samples, truth)).max() > 5


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (lambda h: h.dist.Normal(h.array(0.0), 1.0), "found Normal with 0 event dims"),
        (lambda h: h.dist.Gamma(h.array([1.0, 2.0]), 1.0).to_event(1), "found Gamma with 1 event dims"),
    ],
)
def test_refused(host, fn, found):
    def part(h, t):
        h.sample("x", fn(h))

    with pytest.raises(ValueError, match=rf"site 'x': jumps=HalfSpace\(...\) are for Normal under to_event\(1\).* {found}"):
        host.gradients(Program(part, part, (0.3,)), 1, estimators={"x": LR(jumps=HalfSpace(1.0))})


def test_a_plane_that_the_model_annotates_inline(host):
    """A new object, with new arrays, at every run."""

    def model():
        x = host.sample("x", law(host, t, False), infer={"estimator": RP(jumps=HalfSpace(host.array([1.0, 1.0]), 1.0))})
        host.factor("cost", host.math.where(x.sum(-1) > 1, 1.0, 0.0))

    def guide():
        loc = host.param("loc", host.array([0.0, 0.0]))
        host.sample("x", host.dist.Normal(loc, 1.0).to_event(1).mask(False))

    t = [host.array(0.0)] * 3
    elbo = host.flow.TraceFlow_ELBO()
    _, params = host.fit(host.svi(model, guide, elbo), 3)
    assert np.all(host.numpy(params["loc"]) > 0)
    assert elbo.describe(model, guide).evaluations == 3


def test_numbers_beside_a_plane():
    with pytest.raises(TypeError, match="RP: expected jumps that are all numbers or all a HalfSpace"):
        RP(jumps=[0.5, HalfSpace(1.0)])

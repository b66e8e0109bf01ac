"""Jumps at a surface in the space of an event: with the flux through it every estimator is right, in both hosts."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import HOSTS, Program, always, each, slow_in_numpyro, z_scores
from scipy import integrate, stats

from flowvi import LR, RP, Enumerate, Flow, HalfSpace, LevelSet
from flowvi.level_sets import _log_density_of_distance
from flowvi.surfaces import surface_comparison

THETA = (0.3, -0.2, 0.1, 0.4)
TRIL = np.array([[0.8, 0.0], [0.5, 0.6]])


def law(h, t, multivariate):
    loc = h.math.stack([t[0], t[1]], -1)
    if multivariate:
        return h.dist.MultivariateNormal(loc, scale_tril=h.math.exp(t[2])[..., None, None] * h.array(TRIL)).mask(False)
    return h.dist.Normal(loc, h.math.exp(t[2])[..., None] * h.array([0.8, 0.6])).to_event(1).mask(False)


def plane(h, t):
    """The normal and the offset of a plane that moves."""
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


@each(("estimator", "multivariate"), MOVING, slow_in_numpyro=lambda row: not row[1])
def test_unbiased(host, estimator, multivariate):
    truth = exact(multivariate)
    samples = host.gradients_with(program(multivariate), 20_000, lambda h, t: {"x": estimator(h, t)})
    assert np.all(np.abs(z_scores(samples, truth)) < 5), (samples.mean(0), truth)


@pytest.mark.parametrize("estimator", [LR(), RP()])
def test_without_it_they_are_biased(host, estimator):
    samples = host.gradients(program(True), 20_000, estimators={"x": estimator})
    assert np.abs(z_scores(samples, exact(True))).max() > 5


def test_derivatives_without_noise(host):
    """In loc there is no noise, because the flux is the same everywhere on the plane."""
    samples = host.gradients_with(program(True), 50, lambda h, t: {"x": RP(jumps=across(h, t))})
    np.testing.assert_allclose(samples[:, :2], np.broadcast_to(exact(True)[:2], (50, 2)), rtol=1e-8)


def test_a_wrong_sign_is_rejected(host, monkeypatch):
    def flipped(ops, target, x, surfaces, velocity):
        return surface_comparison(ops, target, x, surfaces, lambda y: -velocity(y))

    monkeypatch.setattr("flowvi.jumps.surface_comparison", flipped)
    samples = host.gradients_with(program(True), 4000, lambda h, t: {"x": RP(jumps=across(h, t))})
    assert np.abs(z_scores(samples, exact(True))).max() > 5


def test_two_planes_and_a_later_site(host, monkeypatch):
    """A corner of two planes, with a cost that depends on a later Bernoulli."""

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

    with pytest.raises(ValueError, match=rf"site 'x': surfaces in jumps are for Normal under to_event\(1\).* {found}"):
        host.gradients(Program(part, part, (0.3,)), 1, estimators={"x": LR(jumps=HalfSpace(1.0))})


def test_a_plane_that_the_model_annotates_inline(host):
    """A plane annotated inline in the model is a new object with new arrays in every run."""

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
    with pytest.raises(TypeError, match="RP: expected jumps that are all numbers or all surfaces"):
        RP(jumps=[0.5, HalfSpace(1.0)])


# ---- level sets


def disc(multivariate):
    """A cost that jumps where x leaves a disc, whose radius and height are live."""

    def guide(h, t):
        h.sample("x", law(h, t, multivariate))

    def model(h, t):
        x = h.sample("x", law(h, [0.0 * p for p in t], multivariate))
        h.factor("cost", 3 * x[..., 0] - x[..., 1] + 4 * h.math.where(outside(h, t)(x, None) > 0, 1.0, 0.0))

    return Program(guide, model, THETA)


def outside(h, t):
    return lambda x, p: (x[..., 0] - 0.5) ** 2 + (x[..., 1] + t[3]) ** 2 - (0.8 + t[3]) ** 2


def exact_of_disc(multivariate):
    """The exact gradient by quadrature over the disc, in polar coordinates."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    angle = np.arange(120) * 2 * np.pi / 120
    unit, weight = (nodes + 1) / 2, weights * (nodes + 1) / 2 * np.pi / 120
    tril = TRIL if multivariate else np.diag([0.8, 0.6])

    def value(theta):
        r = (0.8 + theta[3]) * unit[:, None]
        x = jnp.stack([0.5 + r * np.cos(angle), -theta[3] + r * np.sin(angle)], -1)
        density = jax.scipy.stats.multivariate_normal.pdf(x, theta[:2], jnp.exp(2 * theta[2]) * (tril @ tril.T))
        return 3 * theta[0] - theta[1] + 4 * (1 - (0.8 + theta[3]) ** 2 * (weight @ density.sum(-1)))

    return np.asarray(jax.grad(value)(jnp.array(THETA)))


DISC = {
    "RP": (lambda h, t: RP(jumps=LevelSet(outside(h, t), centre=h.array([0.7, -0.2]))), True),
    "LR": (lambda h, t: LR(jumps=LevelSet(outside(h, t), centre=lambda p: p.loc)), False),
}


@each(("estimator", "multivariate"), DISC, slow_in_numpyro=always)
def test_disc(host, estimator, multivariate):
    truth = exact_of_disc(multivariate)
    samples = host.gradients_with(disc(multivariate), 20_000, lambda h, t: {"x": estimator(h, t)})
    assert np.all(np.abs(z_scores(samples, truth)) < 5), (samples.mean(0), truth)


def test_the_density_on_a_ray_counts(monkeypatch):
    def at_the_mean(ops, offset, size, s):
        return _log_density_of_distance(ops, 0 * offset, size, s)

    monkeypatch.setattr("flowvi.level_sets._log_density_of_distance", at_the_mean)
    samples = HOSTS["pyro"].gradients_with(disc(True), 20_000, lambda h, t: {"x": DISC["RP"][0](h, t)})
    assert np.abs(z_scores(samples, exact_of_disc(True))).max() > 5


def test_density_on_a_ray(host):
    for size, offset in itertools.product([1, 2, 30], [-50.0, -3.0, 0.0, 4.0]):
        peak = (np.sqrt(offset**2 + 4 * size) - offset) / 2
        of = lambda s, size=size, offset=offset: (size - 1) * np.log(s) - (s + offset) ** 2 / 2
        relative = lambda s, of=of, peak=peak: np.exp(of(s) - of(peak))
        total, _ = integrate.quad(relative, 0, peak + 12, points=[peak], epsabs=0, epsrel=1e-13, limit=200)
        s = np.array([0.3, 1.0, 1.4]) * peak
        found = host.numpy(_log_density_of_distance(host.ops, host.array([offset] * 3), size, host.array(s)))
        np.testing.assert_allclose(found, of(s) - of(peak) - np.log(total), rtol=1e-10, atol=1e-10)


@slow_in_numpyro
def test_a_ball_around_the_mean_without_noise(host):
    """For a ball around the mean there is no noise: |x - loc|^2 / s^2 is chi squared with three degrees of freedom."""

    def site(h, t):
        return h.sample("x", h.dist.Normal(h.array([0.2, -0.1, 0.4]), h.math.exp(t[0])[..., None]).to_event(1).mask(False))

    def model(h, t):
        h.factor("cost", h.math.where(g(site(h, t), None) > 0, 1.0, 0.0))

    def g(x, p):
        return ((x - host.array([0.2, -0.1, 0.4])) ** 2).sum(-1) - 2.0

    sphere = LevelSet(g, centre=lambda p: p.loc)
    samples = host.gradients(Program(site, model, (0.3,)), 50, estimators={"x": RP(jumps=sphere)})
    ratio = 2.0 * np.exp(-0.6)
    np.testing.assert_allclose(samples, 2 * ratio * stats.chi2.pdf(ratio, 3), rtol=1e-8)


def as_level_set(h, t, along):
    normal, offset = plane(h, t)
    return LevelSet(lambda x, p: (normal * x).sum(-1) - offset, along=along)


@slow_in_numpyro
def test_a_plane_as_a_level_set(host):
    """Along the covariance times the normal, a plane as LevelSet has the points of HalfSpace; along other lines, the same mean."""
    direction = np.array([1.0, THETA[3]]) @ (TRIL @ TRIL.T)
    same = host.gradients_with(program(True), 50, lambda h, t: {"x": RP(jumps=as_level_set(h, t, h.array(direction)))})
    expected = host.gradients_with(program(True), 50, lambda h, t: {"x": RP(jumps=across(h, t))})
    np.testing.assert_allclose(same, expected, rtol=1e-8)
    samples = host.gradients_with(program(True), 20_000, lambda h, t: {"x": RP(jumps=as_level_set(h, t, lambda p: p.loc + 1))})
    assert np.all(np.abs(z_scores(samples, exact(True))) < 5)


def test_two_crossings_of_one_line(host):
    """A line that crosses a disc twice is refused; under a trace the gradient is NaN."""
    choose = lambda h, t: {"x": RP(jumps=LevelSet(outside(h, t), along=h.array([1.0, 0.0])))}
    if host.name == "pyro":
        with pytest.raises(ValueError, match=r"^site 'x': g of a LevelSet changes its sign more than once on a line; expected"):
            host.gradients_with(disc(False), 500, choose)
    else:
        share = np.isnan(host.gradients_with(disc(False), 500, choose)).any(-1).mean()
        assert 0.1 < share < 0.9  # the share of draws inside the disc


@slow_in_numpyro
def test_refused_level_sets(host):
    with pytest.raises(TypeError, match=r"LevelSet: expected a function g\(x, p\), found 1.0"):
        LevelSet(1.0, along=1.0)
    for options, found in (({}, "neither"), ({"centre": 0.0, "along": 1.0}, "both")):
        with pytest.raises(TypeError, match=f"LevelSet: expected one of centre and along, found {found}"):
            LevelSet(lambda x, p: x.sum(-1), **options)

    def part(h, t):
        with h.plate("n", 3):
            h.sample("x", h.dist.Normal(h.array(np.zeros((3, 2))), 1.0).to_event(1))

    for g, message in (
        (lambda x, p: x, r"g of a LevelSet must have the shape of x .*expected \(3,\), found \(3, 2\)"),
        (lambda x, p: x[..., 0] - x.mean(), "g of a LevelSet must read x at its own element of the batch only"),
    ):
        elbo = host.flow.TraceFlow_ELBO(estimators={"x": RP(jumps=LevelSet(g, along=1.0))})
        with pytest.raises(ValueError, match=f"^site 'x': {message}"):
            host.differentiable_loss(elbo, lambda: part(host, None), lambda: part(host, None))

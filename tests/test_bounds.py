"""The importance-weighted and Rényi bounds: every estimator has the exact mean gradient, in both hosts."""

import itertools
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
from cases import EXACT, HALF_NORMAL, normal_normal
from hosts import Program
from quadrature import gauss, log_normal, slope

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Baseline, Flow, ImplicitRP

N = 40_000
IWAE = EXACT["iwae-K2"]
THETA = tuple(IWAE["theta"]["value"])
NORMAL = normal_normal(THETA)


def quadrature(log_ratio, nodes, num_particles, alpha):
    """The exact bound: a sum over all tuples of particles. A particle is a node (weight, value) of a quadrature of the guide."""
    total = 0.0
    for particles in itertools.product(nodes, repeat=num_particles):
        r = np.array([(1 - alpha) * log_ratio(x) for _, x in particles])
        total += math.prod(w for w, _ in particles) * (np.logaddexp.reduce(r) - math.log(num_particles)) / (1 - alpha)
    return total


def normal_bound(theta, num_particles, alpha, size=40):
    loc, scale = theta[0], math.exp(theta[1])
    log_ratio = lambda x: log_normal(x, 0, 1) + log_normal(1.1, x, 0.8) - log_normal(x, loc, scale)
    return quadrature(log_ratio, gauss(loc, scale, size), num_particles, alpha)


def test_the_exact_row(host):
    row, trap = IWAE["estimators"]
    assert row["estimator"] == "RP total"
    samples = host.bound_gradients(NORMAL, N, particles=2)
    z = (samples.mean(0) - IWAE["gradient"]) / np.sqrt(np.array(row["variance"]) / N)
    assert np.all(np.abs(z) < 5)
    squares = (samples - samples.mean(0)) ** 2
    assert np.all(np.abs(squares.mean(0) - row["variance"]) < 5 * squares.std(0) / np.sqrt(N))
    z = (samples.mean(0) - trap["mean"]) / np.sqrt(np.array(row["variance"]) / N)
    assert np.all(np.abs(z) > 5)  # sticking the landing is biased for a bound
    np.testing.assert_allclose(IWAE["gradient"], slope(lambda t: normal_bound(t, 2, 0.0), THETA), rtol=1e-6)


ESTIMATORS = {
    "LR": ({"default": LR()}, 0.0, 2),
    "LR without a baseline": ({"default": LR(), "baseline": None}, 0.0, 2),
    "LR, 3 particles": ({"default": LR()}, 0.0, 3),
    "LR, alpha 0.5": ({"default": LR()}, 0.5, 2),
    "half": ({"default": Flow(**HALF_NORMAL)}, 0.0, 2),
    "half, alpha -1": ({"default": Flow(**HALF_NORMAL)}, -1.0, 2),
    "implicit": ({"default": ImplicitRP()}, 0.5, 2),
    "RP, 1 particle": ({}, 0.0, 1),
    "LR, 1 particle": ({"default": LR()}, 0.0, 1),
    "dreg": ({"gradient": "dreg"}, 0.0, 2),
    "dreg, alpha 0.5": ({"gradient": "dreg"}, 0.5, 2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_at_the_exact_gradient(host, name):
    options, alpha, particles = ESTIMATORS[name]
    truth = slope(lambda t: normal_bound(t, particles, alpha, 40 if particles < 3 else 16), THETA)
    samples = host.bound_gradients(NORMAL, N, particles=particles, alpha=alpha, **options)
    assert np.all(np.abs(samples.mean(0) - truth) < 5 * samples.std(0) / np.sqrt(N))
    if host.name == "pyro":
        looped = host.bound_gradients(NORMAL, N, seed=1, particles=particles, alpha=alpha, vectorize=False, **options)
        assert np.all(np.abs(looped.mean(0) - truth) < 5 * looped.std(0) / np.sqrt(N))
    else:
        looped, vectorized = (
            host.bound_gradients(NORMAL, 50, particles=particles, alpha=alpha, vectorize=v, **options) for v in (False, True)
        )
        np.testing.assert_allclose(looped, vectorized, rtol=1e-9, atol=1e-9)


def test_variances(host):
    """The leave-one-out bound lowers the variance of LR. If the guide is the posterior, the DReG gradient has no variance."""
    variance = lambda **options: host.bound_gradients(NORMAL, 4_000, **options).var(0)
    loo, without = variance(default=LR(), particles=5), variance(default=LR(), particles=5, baseline=None)
    assert np.all(loo < without)
    optimum = normal_normal(EXACT["elbo-normal-normal-opt"]["theta"]["value"])
    np.testing.assert_allclose(host.bound_gradients(optimum, 20, particles=5, gradient="dreg"), 0, atol=1e-12)
    assert np.all(host.bound_gradients(optimum, 20, particles=5).var(0) > 1e-3)


def mixed():
    """k ~ Bernoulli and x | k ~ Normal; the scale of the model is a parameter too."""

    def guide(h, t):
        k = h.sample("k", h.dist.Bernoulli(logits=t[0]))
        h.sample("x", h.dist.Normal(t[1] + k, h.array(0.7)))

    def model(h, t):
        k = h.sample("k", h.dist.Bernoulli(h.array(0.3)))
        x = h.sample("x", h.dist.Normal(2.0 * k - 1.0, h.math.exp(t[2])))
        h.sample("y", h.dist.Normal(x * x, h.array(1.0)), obs=h.array(1.5))

    return Program(guide, model, (0.2, 0.1, -0.3))


def mixed_bound(theta, alpha):
    logit, shift, log_scale = theta
    p = 1 / (1 + math.exp(-logit))
    nodes = [(pk * w, (k, x)) for k, pk in ((0, 1 - p), (1, p)) for w, x in gauss(shift + k, 0.7, 30)]

    def log_ratio(node):
        k, x = node
        model = math.log(0.3 if k else 0.7) + log_normal(x, 2 * k - 1, math.exp(log_scale)) + log_normal(1.5, x * x, 1)
        return model - math.log(p if k else 1 - p) - log_normal(x, shift + k, 0.7)

    return quadrature(log_ratio, nodes, 2, alpha)


@pytest.mark.parametrize("estimators", [None, {"x": LR()}, {"x": Flow(loc=lambda x, p: 0.5)}], ids=["RP", "LR", "half"])
def test_discrete_and_continuous_sites_together(host, estimators):
    truth = slope(lambda t: mixed_bound(t, 0.0), mixed().theta)
    samples = host.bound_gradients(mixed(), N, estimators=estimators)
    assert np.all(np.abs(samples.mean(0) - truth) < 5 * samples.std(0) / np.sqrt(N))


def test_shared_plates_stay_outside_the_log(host):
    """With two local latents the bound is the sum of their bounds; with a global latent the plate is inside the log."""
    data = (1.1, -0.4)

    def guide(h, t):
        with h.plate("i", 2):
            h.sample("x", h.dist.Normal(t[0], h.math.exp(t[1])))

    def model(h, t):
        with h.plate("i", 2):
            x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
            h.sample("y", h.dist.Normal(x, h.array(0.8)), obs=h.array(data))

    def exact(theta):
        loc, scale = theta[0], math.exp(theta[1])
        log_ratio = lambda y: lambda x: log_normal(x, 0, 1) + log_normal(y, x, 0.8) - log_normal(x, loc, scale)
        return sum(quadrature(log_ratio(y), gauss(loc, scale), 2, 0.0) for y in data)

    program = Program(guide, model, THETA, plates=1)
    for estimator in (RP(), LR()):
        samples = host.bound_gradients(program, N, default=estimator)
        assert np.all(np.abs(samples.mean(0) - slope(exact, THETA)) < 5 * samples.std(0) / np.sqrt(N))


# ---- against the hosts' own RenyiELBO, which is right if every site is pathwise and no plate is subsampled


def test_the_same_numbers_as_numpyro():
    def model(data):
        with numpyro.plate("i", 20, subsample_size=5):
            batch = numpyro.subsample(data, event_dim=0)
            x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
            numpyro.sample("y", numpyro_dist.Normal(x, 0.5), obs=batch)

    def guide(data):
        m, s = numpyro.param("m", 0.3), numpyro.param("s", 0.9)
        with numpyro.plate("i", 20, subsample_size=5):
            numpyro.sample("x", numpyro_dist.Normal(m, s))

    data, key = jax.random.normal(jax.random.key(3), (20,)), jax.random.key(1)

    def value_and_grad(bound):
        return jax.value_and_grad(lambda params: bound.loss(key, params, model, guide, data))({"m": 0.3, "s": 0.9})

    for alpha in (0.0, 0.5):
        ours = value_and_grad(flowvi.numpyro.TraceFlow_RenyiELBO(alpha, 3))
        theirs = value_and_grad(numpyro.infer.RenyiELBO(alpha, 3))
        np.testing.assert_allclose(*(np.array([v, g["m"], g["s"]]) for v, g in (ours, theirs)), rtol=1e-10)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_same_numbers_as_pyro(vectorize):
    data = torch.linspace(-1, 1, 5)

    def model():
        with pyro.plate("i", 5):
            x = pyro.sample("x", pyro_dist.Normal(0.0, 1.0))
            pyro.sample("y", pyro_dist.Normal(x, 0.5), obs=data)

    def guide():
        m, s = pyro.param("m", torch.tensor(0.3)), pyro.param("s", torch.tensor(0.9))
        with pyro.plate("i", 5):
            pyro.sample("x", pyro_dist.Normal(m, s))

    def loss_and_grads(bound):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        value = bound(0.5, 3, max_plate_nesting=1, vectorize_particles=vectorize).loss_and_grads(model, guide)
        return np.array([value, *(pyro.param(name).unconstrained().grad for name in ("m", "s"))])

    ours, theirs = map(loss_and_grads, (flowvi.pyro.TraceFlow_RenyiELBO, pyro.infer.RenyiELBO))
    np.testing.assert_allclose(ours[1:], theirs[1:], rtol=1e-10)
    value = flowvi.pyro.TraceFlow_RenyiELBO(0.5, 3, max_plate_nesting=1, vectorize_particles=vectorize)
    pyro.set_rng_seed(0)
    np.testing.assert_allclose(value.loss(model, guide), ours[0], rtol=1e-12)
    pyro.set_rng_seed(0)
    host = pyro.infer.RenyiELBO(0.5, 3, max_plate_nesting=1, vectorize_particles=vectorize)
    np.testing.assert_allclose(host.loss(model, guide), ours[0], rtol=1e-10)


def test_subsampling_in_pyro():
    """Particles share one subsample, and its scale is outside the log, so the mean over subsamples is the bound of the whole plate."""
    data = torch.linspace(-1.5, 1, 4)

    def model(size):
        with pyro.plate("i", 4, subsample_size=size) as i:
            pyro.sample("x", pyro_dist.Delta(torch.tensor(0.5)))
            pyro.sample("y", pyro_dist.Normal(0.5, 0.5), obs=data[i])

    def guide(size):
        with pyro.plate("i", 4, subsample_size=size):
            pyro.sample("x", pyro_dist.Delta(torch.tensor(0.5)))

    bound = flowvi.pyro.TraceFlow_RenyiELBO(num_particles=3)
    whole = bound.loss(model, guide, 4)
    np.testing.assert_allclose(whole, -float(pyro_dist.Normal(0.5, 0.5).log_prob(data).sum()))
    halves = {round(bound.loss(model, guide, 1), 10) for _ in range(60)}
    np.testing.assert_allclose(sorted(halves), sorted(-4 * pyro_dist.Normal(0.5, 0.5).log_prob(data).numpy()), rtol=1e-9)


DATA_OF_THREE = torch.tensor([1.3, -0.4, 0.8])


def three_latents(kind, form, only=None):
    """A latent for each of three data, in a vectorized or sequential plate, or for one of the data alone."""

    def over_data(statements, subsample):
        if form == "alone":
            statements(f"_{only}", only)
            return
        plate = pyro.plate("data", 3, subsample_size=subsample)
        if form == "dim":
            with plate as i:
                statements("", i)
        else:
            for i in plate:
                statements(f"_{int(i)}", i)

    def latent(name, loc, i):
        fn = pyro_dist.Normal(loc[i], 0.9) if kind == "Normal" else pyro_dist.Bernoulli(logits=loc[i])
        return pyro.sample(f"x{name}", fn)

    def guide(subsample=None):
        loc = pyro.param("loc", torch.tensor([0.2, 0.5, -0.1]))
        over_data(lambda name, i: latent(name, loc, i), subsample)

    def model(subsample=None):
        def statements(name, i):
            x = latent(name, torch.zeros(3), i)
            pyro.sample(f"y{name}", pyro_dist.Normal(x, 0.5), obs=DATA_OF_THREE.double()[i])

        over_data(statements, subsample)

    return model, guide


@pytest.mark.parametrize("subsample", [None, 2])
@pytest.mark.parametrize(("kind", "gradient"), [("Normal", "plain"), ("Normal", "dreg"), ("Bernoulli", "plain")])
def test_sequential_plates_stay_outside_the_log(kind, gradient, subsample):
    """A sequential plate has the same bound for each datum as a vectorized one, at the same draws."""

    def evaluate(form):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = flowvi.pyro.TraceFlow_RenyiELBO(0.3, 3, gradient=gradient).loss_and_grads(*three_latents(kind, form), subsample)
        return loss, pyro.param("loc").grad.numpy()

    for ours, theirs in zip(evaluate("loop"), evaluate("dim"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("kind", ["Normal", "Bernoulli"])
def test_sequential_plates_with_vectorized_particles(kind):
    """The bound is the sum of the bounds of the single data."""

    def evaluate(*programs):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        bound = flowvi.pyro.TraceFlow_RenyiELBO(0.0, 4, 0, vectorize_particles=True)
        loss = sum(bound.loss_and_grads(*program) for program in programs)
        return loss, pyro.param("loc").grad.numpy()

    together = evaluate(three_latents(kind, "loop"))
    for ours, theirs in zip(together, evaluate(*(three_latents(kind, "alone", i) for i in range(3))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


# ---- refusals

REFUSED = {
    "a proposal": (RP(lambda p: p), {}, "site 'x': with a proposal q the bound would be multiplied by the joint weight"),
    "a baseline": (LR(Baseline(lambda: 1.0)), {}, "site 'x': the bound has its own baseline"),
    "a score under dreg": (LR(), {"gradient": "dreg"}, "site 'x': gradient='dreg' needs sites without a score"),
    "another gradient": (RP(), {"gradient": "stl"}, "gradient: expected 'plain' or 'dreg', found 'stl'"),
    "another baseline": (RP(), {"baseline": "vimco"}, "baseline: expected 'loo' or None, found 'vimco'"),
    "alpha 1": (RP(), {"alpha": 1.0}, "alpha: expected a number other than 1, found 1.0; use TraceFlow_ELBO"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(host, what):
    estimator, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        host.bound_gradients(NORMAL, 2, estimators={"x": estimator}, **options)


def test_a_moving_support_under_dreg(host):
    def guide(h, t):
        h.sample("x", h.dist.Uniform(h.array(0.0), t[0]))

    program = Program(guide, NORMAL.model, (0.7,))
    with pytest.raises(ValueError, match="site 'x': gradient='dreg' is biased where the support moves"):
        host.bound_gradients(program, 2, gradient="dreg")


def test_a_subsampled_plate_inside_the_log():
    def model(size):
        pyro.sample("g", pyro_dist.Normal(0.0, 1.0))
        with pyro.plate("i", 4, subsample_size=size):
            pyro.sample("x", pyro_dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="plate 'i': an importance-weighted bound can only subsample a plate"):
        flowvi.pyro.TraceFlow_RenyiELBO().loss(model, model, 2)
    flowvi.pyro.TraceFlow_RenyiELBO().loss(model, model, 4)


def test_describe(host):
    bound = host.flow.TraceFlow_RenyiELBO(estimators={"x": LR()})
    theta = [host.array(t) for t in THETA]
    (site,) = bound.describe(lambda: NORMAL.model(host, theta), lambda: NORMAL.guide(host, theta))
    assert (site.name, site.estimator) == ("x", LR())

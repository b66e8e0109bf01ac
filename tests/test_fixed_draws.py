"""Fixed draws: the loss is a deterministic function of the parameters, and the gradient is its derivative."""

import jax
import jax.flatten_util
import numpy as np
import pyro
import pytest
import torch
from hosts import each, slow_in_numpyro
from scipy.optimize import minimize
from test_families import THETA

from flowvi import LR, RP
from flowvi.host import host_of
from flowvi.particles import SMOOTH
from flowvi.pyro import CompiledSVI, TraceFlow_ELBO

START = {"loc": 0.1, "rate": -0.2, "w": np.array([0.3, -0.4])}


def program(host):
    """Sites of three families, one in a plate, and a cost that couples them."""

    def guide():
        host.sample("x", host.dist.Normal(host.param("loc", host.array(0.1)), host.math.exp(host.param("rate", host.array(-0.2)))))
        w = host.param("w", host.array([0.3, -0.4]))
        with host.plate("data", 2):
            host.sample("z", host.dist.LogNormal(w, 0.5))

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), 2.0))
        with host.plate("data", 2):
            z = host.sample("z", host.dist.LogNormal(0.1 * x, host.array(1.0)))
            host.sample("y", host.dist.Normal(x * z, 0.7), obs=host.array([0.4, 1.3]))

    return model, guide


def nesting(host):
    return {} if host.name == "numpyro" else {"max_plate_nesting": 1}


RUNS = {"one": (1, True), "loop": (3, False), "vectorized": (3, True)}


@each("runs", RUNS, slow_in_numpyro=lambda runs: runs[0] > 1)
def test_the_gradient_is_that_of_the_loss(host, runs):
    number, vectorize = runs
    options = {"num_particles": number, "vectorize_particles": vectorize, "plates": 1, "particles": "fixed"}
    model, guide = program(host)

    def at(params, seed):
        return host.loss_and_gradients(params, model, guide, seed, **options)

    if host.name == "numpyro":
        elbo = host.flow.TraceFlow_ELBO(number, vectorize, particles="fixed")
        at = jax.jit(lambda params, seed: jax.value_and_grad(lambda p: elbo.loss(jax.random.key(seed), p, model, guide))(params))

    def loss(seed=0, **moved):
        return at({name: host.array(value) for name, value in (START | moved).items()}, seed)

    value, gradients = loss()
    assert loss(seed=7)[0] == value
    assert loss(loc=0.2)[0] != value
    step = 1e-5
    for name, move in (("loc", step), ("rate", step), ("w", np.array([0.0, step]))):
        slope = (loss(**{name: START[name] + move})[0] - loss(**{name: START[name] - move})[0]) / (2 * step)
        np.testing.assert_allclose(np.ravel(gradients[name])[-1], slope, rtol=1e-7)


@each("name", sorted(SMOOTH), slow_in_numpyro=lambda name: name not in ("Normal", "Weibull"))
def test_the_samplers_are_smooth(host, name):
    """At fixed random numbers the derivative of a sample agrees with finite differences, at all parameters."""
    special = {
        "MultivariateNormal": {"loc": np.zeros(2), "scale_tril": np.array([[0.7, 0.0], [0.3, 0.5]])},
        "LowRankMultivariateNormal": {"loc": np.zeros(2), "cov_factor": np.array([[0.7], [0.3]]), "cov_diag": np.array([0.5, 0.6])},
    }
    theta = {key: host.array(value) for key, value in (special.get(name) or THETA[name]).items()}

    def sample(scaled, seed):
        p = getattr(host.dist, name)(**(theta | scaled))
        return host_of(p).rsample(p, seed).sum()

    for parameter in theta:
        for seed in range(3):
            f = lambda t, parameter=parameter, seed=seed: sample({parameter: theta[parameter] * t["t"]}, seed)
            slope = host.value_and_gradient(f, {"t": 1.0})[1]["t"]
            up, down = (float(f({"t": host.array(t)})) for t in (1 + 1e-6, 1 - 1e-6))
            np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@slow_in_numpyro
def test_by_l_bfgs(host):
    """L-BFGS finds the minimum of the loss at the fixed draws, more exactly than noise would allow."""
    model, guide = program(host)
    elbo = host.flow.TraceFlow_ELBO(10, vectorize_particles=True, particles="fixed", **nesting(host))
    if host.name == "pyro":
        pyro.clear_param_store()
        elbo.loss(model, guide)
        leaves = [pyro.param(name).unconstrained() for name in START]
        optimizer = torch.optim.LBFGS(leaves, max_iter=100, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = elbo.differentiable_loss(model, guide)
            loss.backward()
            return loss

        optimizer.step(closure)
        closure()
        gradient = torch.cat([leaf.grad.reshape(-1) for leaf in leaves]).numpy()
    else:
        flat, unflatten = jax.flatten_util.ravel_pytree({name: host.array(value) for name, value in START.items()})
        f = jax.jit(jax.value_and_grad(lambda t: elbo.loss(jax.random.key(5), unflatten(t), model, guide)))
        found = minimize(lambda t: [np.asarray(a) for a in f(t)], flat, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-8})
        gradient = found.jac
    assert np.abs(gradient).max() < 1e-6


def test_the_first_loss_is_at_the_same_draws():
    """The first loss has the same draws, although Pyro runs the program before it to count the nested plates."""

    def part(loc):
        pyro.sample("x", pyro.distributions.Normal(loc, 1.0))

    elbo = TraceFlow_ELBO(2, vectorize_particles=True, particles="fixed")
    first, second = (elbo.loss(lambda: part(0.0), lambda: part(0.1)) for _ in range(2))
    assert first == second


def normal_guide():
    return pyro.infer.autoguide.AutoNormal(own_model, init_scale=0.3)


def drawing_guide():
    """A guide whose parameter starts at a random number, so that the first run draws one more."""

    def guide():
        pyro.sample("x", pyro.distributions.Normal(pyro.param("loc", lambda: torch.randn(())), 0.3))

    return guide


def own_model():
    x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
    pyro.sample("y", pyro.distributions.Normal(x, 0.5), obs=torch.tensor(0.7))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", [normal_guide, drawing_guide])
def test_a_new_guide_has_the_same_draws_from_its_first_loss_on(make, vectorize):
    elbo = TraceFlow_ELBO(2, vectorize_particles=vectorize, particles="fixed")
    for clears in (True, True, False):
        if clears:
            pyro.clear_param_store()
        guide = make()
        losses = [loss(own_model, guide) for loss in (elbo.loss_and_grads, elbo.loss, elbo.loss)]
        assert losses == losses[:1] * 3


def test_refusals(host):
    def refused(fn, message, plate=None, **options):
        def part():
            with host.plate("data", 4, subsample_size=plate):
                host.sample("x", fn)

        def loss():
            elbo = host.flow.TraceFlow_ELBO(particles="fixed", **nesting(host), **options)
            return host.loss(elbo, part, part)

        with pytest.raises(ValueError, match=message):
            jax.eval_shape(loss) if host.name == "numpyro" else loss()

    number = host.array(0.5)
    refused(host.dist.Normal(number, 1.0), "plate 'data': expected a plate that is not subsampled", plate=2)
    refused(host.dist.Normal(number, 1.0), r"site 'x': .* the gradient of LR\(\) is right only on average", estimators={"x": LR()})
    quadratic = RP(control_variate="quadratic")
    refused(host.dist.Normal(number, 1.0), "site 'x': .* is right only on average", estimators={"x": quadratic})
    refused(host.dist.Gamma(number, 1.0), "site 'x': .* the sampler of Gamma may jump")
    refused(host.dist.Bernoulli(number), "site 'x': .* is right only on average")
    refused(host.dist.Normal(number, 1.0), "expected entropy='full' or 'analytic', found 'stl'", entropy="stl")


def test_a_report_of_their_noise_is_refused(host):
    """gradient_report is refused, because every sample of the gradient would be the same."""
    model, guide = program(host)
    with pytest.raises(ValueError, match="options: expected an objective that draws anew at every step, found particles='fixed'"):
        host.flow.gradient_report(model, guide, options={"particles": "fixed"})


def test_compiled_steps_have_no_fixed_draws():
    def part():
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="particles='fixed': expected an objective that is not compiled"):
        CompiledSVI(part, part, pyro.optim.Adam({"lr": 0.1}), TraceFlow_ELBO(particles="fixed"), backend="eager")

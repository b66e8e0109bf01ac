"""Flows that the host cannot invert: right if the base sample suffices, refused otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, Program, always, each
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoBNAFNormal
from pyro.distributions.transforms import block_autoregressive, planar
from pyro.infer.autoguide import AutoNormalizingFlow

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow, Enumerate, Flow, ImplicitRP, fields

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]


def bent(math, t, x):
    a, c = t
    return math.stack([x[..., 0] * math.exp(a), x[..., 1] * math.exp(c * x[..., 0]) + a * x[..., 0] ** 2], -1)


def unbent(math, t, y):
    a, c = t
    first = y[..., 0] * math.exp(-a)
    return math.stack([first, (y[..., 1] - a * first**2) * math.exp(-c * first)], -1)


class BentInNumPyro(numpyro.distributions.transforms.Transform):
    domain = codomain = numpyro.distributions.constraints.real_vector

    def __init__(self, t):
        self.t = t

    def __call__(self, x):
        return bent(jnp, self.t, x)

    def _inverse(self, y):
        return unbent(jnp, self.t, y)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return self.t[0] + self.t[1] * x[..., 0]

    def tree_flatten(self):
        return (self.t,), (("t",), {})

    def __eq__(self, other):
        return type(self) is type(other) and self.t is other.t


class OneWayInNumPyro(BentInNumPyro):
    _inverse = numpyro.distributions.transforms.Transform._inverse


class BentInPyro(torch.distributions.Transform):
    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, t):
        super().__init__(cache_size=1)
        self.t = t

    def _call(self, x):
        return bent(torch, self.t, x)

    def _inverse(self, y):
        return unbent(torch, self.t, y)

    def log_abs_det_jacobian(self, x, y):
        return self.t[0] + self.t[1] * x[..., 0]


class OneWayInPyro(BentInPyro):
    _inverse = torch.distributions.Transform._inverse


BENT = {"numpyro": (BentInNumPyro, OneWayInNumPyro), "pyro": (BentInPyro, OneWayInPyro)}


def program(host, one_way):
    bent = BENT[host.name][one_way]

    def guide(h, t):
        base = h.dist.Normal(t[2][..., None] + h.array([0.0, 0.3]), 1.2).to_event(1)
        h.sample("x", h.dist.TransformedDistribution(base, [bent((t[0], t[1]))]))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array([0.0, 0.5]), 1.0).to_event(1))
        h.sample("y", h.dist.Normal(x[..., 0] * x[..., 1], 0.8), obs=h.array(1.3))

    return Program(guide, model, (0.2, 0.3, 0.1))


def gradients(host, one_way, **options):
    pyro.clear_param_store()
    return host.gradients(program(host, one_way), 5, **options)


OPTIONS = [
    {"entropy": "stl"},
    {"default": RP(control_variate="quadratic")},
    {"default": Flow(fields.scaled(0.4, fields.location_scale())), "dependencies": "graph"},
    {"entropy": "stl", "particles": 3, "vectorize": False},
    {"default": ImplicitRP(), "entropy": "stl"},
    {"default": AdaptiveFlow(start=0.5)},
]


@each("options", OPTIONS, slow_in_numpyro=OPTIONS[2:].__contains__)
def test_every_sample_is_that_of_the_flow_with_an_inverse(host, options):
    np.testing.assert_allclose(gradients(host, True, **options), gradients(host, False, **options), rtol=1e-9, atol=1e-11)


def test_sticking_the_landing_is_something_else():
    host = PYRO
    assert np.all(np.abs(gradients(host, True, entropy="stl") - gradients(host, True)) > 1e-3)


@each("gradient", ["dreg"], slow_in_numpyro=always)
def test_doubly_reparameterized_bounds(host, gradient):
    ours, theirs = (host.bound_gradients(program(host, one_way), 5, particles=3, gradient=gradient) for one_way in (True, False))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_what_needs_the_inverse_is_refused(host):
    with pytest.raises(ValueError, match=r"site 'x': LR, .*, needs the inverse of OneWayIn\w+, but the host has none; use RP\(\)"):
        gradients(host, True, default=LR())
    with pytest.raises(ValueError, match=r"site 'x': the weight of a sample of q needs the inverse of OneWayIn\w+, but the host has"):
        gradients(host, True, default=LR(q=lambda p: p))
    with pytest.raises(ValueError, match=r"site 'x': the density at the other values, where jumps are declared, needs the inverse"):
        gradients(host, True, default=RP(jumps=[0.5]))


@each("estimator", [Enumerate()], slow_in_numpyro=always)
def test_beside_a_site_that_compares(host, estimator):
    """Right in NumPyro, whose trace keeps the base sample; refused in Pyro, where another draw replaces the flow's cache."""

    def with_switch(one_way):
        plain = program(host, one_way)

        def part(run):
            def switched(h, t):
                h.sample("k", h.dist.Bernoulli(0.3 + 0 * t[0]))
                run(h, t)

            return switched

        return Program(part(plain.guide), part(plain.model), plain.theta)

    def of(one_way):
        return host.gradients(with_switch(one_way), 5, estimators={"k": estimator})

    if host.name == "numpyro":
        np.testing.assert_allclose(of(True), of(False), rtol=1e-9, atol=1e-11)
    else:
        with pytest.raises(ValueError, match="site 'x': the density of another run, which another estimator compares, needs the inver"):
            of(True)


def model(h):
    x = h.sample("x", h.dist.Normal(h.array([0.0, 0.0]), 1.0).to_event(1))
    h.sample("y", h.dist.Normal(x[..., 0] * x[..., 1], 0.5), obs=h.array(1.0))


@pytest.mark.slow
def test_autoguides_in_numpyro():
    guide = AutoBNAFNormal(lambda: model(NUMPYRO), num_flows=1)
    for elbo in (
        flowvi.numpyro.TraceFlow_ELBO(entropy="stl"),
        flowvi.numpyro.TraceFlow_RenyiELBO(gradient="dreg"),
    ):
        svi = SVI(lambda: model(NUMPYRO), guide, numpyro.optim.Adam(0.01), elbo)
        assert np.isfinite(svi.run(jax.random.key(0), 2, progress_bar=False).losses).all()


@pytest.mark.parametrize("flow", [pytest.param(block_autoregressive, marks=pytest.mark.slow), planar])
def test_autoguides_in_pyro(flow):
    for elbo in (
        flowvi.pyro.TraceFlow_ELBO(3, entropy="stl", vectorize_particles=True, max_plate_nesting=0),
        flowvi.pyro.TraceFlow_RenyiELBO(gradient="dreg"),
    ):
        pyro.clear_param_store()
        guide = AutoNormalizingFlow(lambda: model(PYRO), flow)
        svi = pyro.infer.SVI(lambda: model(PYRO), guide, pyro.optim.Adam({}), elbo)
        assert np.isfinite([svi.step() for _ in range(2)]).all()

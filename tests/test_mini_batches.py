"""What an estimator learns where the elements of a plate are other data at every step, of any number."""

import jax
import numpy as np
import pyro
import pytest
from hosts import HOSTS, always, each

import flowvi.numpyro
from flowvi import RP, AdaptiveFlow

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]
SIZES = (20, 10)
LEARNED = {RP(control_variate="diagonal"): ("z.control_variate", (1, 2)), AdaptiveFlow(bumps=0): ("z.velocity", (2, 1))}


def programs(h, rows=None, subsample=None):
    """A latent for each datum: its location is a function of the datum, or a parameter with a row for each."""

    def guide(data):
        slope = h.param("slope", h.array(0.5))
        loc = slope * data if rows is None else h.param("loc", h.array(np.zeros(rows)), event_dim=0)
        with h.plate("data", len(data), subsample_size=subsample) as i:
            h.sample("z", h.dist.Normal(loc if subsample is None else loc[i], 0.7))

    def model(data):
        with h.plate("data", len(data), subsample_size=subsample) as i:
            z = h.sample("z", h.dist.Normal(0.0, 1.0))
            h.sample("y", h.dist.Normal(z, 0.5), obs=data if subsample is None else data[i])

    return model, guide


class Steps:
    """SVI in either host, a step at a time."""

    def __init__(self, host, model, guide, estimator):
        self.host = host
        elbo = host.flow.TraceFlow_ELBO(2, estimators={"z": estimator})
        self.svi = host.svi(model, flowvi.numpyro.adaptive(guide, elbo) if host is NUMPYRO else guide, elbo)
        self.state = None

    def step(self, size):
        data = self.host.array(np.linspace(-1, 1, size))
        if self.host is PYRO:
            return self.svi.step(data)
        self.state = self.svi.init(jax.random.key(0), data) if self.state is None else self.state
        self.state, loss = self.svi.update(self.state, data)
        return float(loss)

    def learned(self, name):
        return pyro.param(name).shape if self.host is PYRO else self.svi.get_params(self.state)[name].shape


@each("estimator", list(LEARNED), slow_in_numpyro=lambda estimator: isinstance(estimator, AdaptiveFlow))
def test_batches_of_changing_size(host, estimator):
    steps = Steps(host, *programs(host), estimator)
    assert np.isfinite([steps.step(size) for size in SIZES]).all()
    name, shape = LEARNED[estimator]
    assert steps.learned(name) == shape


@each("subsample", [None, 5], slow_in_numpyro=lambda subsample: subsample is None)
def test_elements_that_are_the_same_data_have_their_own(host, subsample):
    steps = Steps(host, *programs(host, 20, subsample), RP(control_variate="diagonal"))
    steps.step(20)
    assert steps.learned("z.control_variate") == (20, 1, 2)


def test_a_row_for_each_element_of_another_plate_is_refused(host):
    def guide(data):
        host.param("rows", host.array(np.zeros(20)))  # so that the plate looks like one of rows
        programs(host)[1](data)

    model, _ = programs(host)
    steps = Steps(host, model, guide, RP(control_variate="diagonal"))
    steps.step(20)
    with pytest.raises(ValueError, match=r"site 'z': what the estimator learns \('z.control_variate'\) has a row .* shared=True"):
        steps.step(10)
    pyro.clear_param_store()
    steps = Steps(host, model, guide, RP(control_variate="diagonal", shared=True))
    assert np.isfinite([steps.step(size) for size in SIZES]).all()


def test_shared_coefficients_get_the_sum(host):
    """The gradient in a shared coefficient is the sum of those in the elements' own."""

    def gradients(shared):
        model, guide = programs(host, 4)
        data = host.array([0.3, -1.0, 2.0, 0.1])
        learned = np.zeros((1, 2) if shared else (4, 1, 2))
        params = {"loc": np.array([0.1, 0.2, 0.3, 0.4]), "z.control_variate": learned}
        options = {"estimators": {"z": RP(control_variate="diagonal", shared=shared)}}
        return host.loss_and_gradients(params, lambda: model(data), lambda: guide(data), plates=1, **options)[1]

    own, shared = gradients(False), gradients(True)
    np.testing.assert_allclose(shared["loc"], own["loc"], rtol=1e-12)
    np.testing.assert_allclose(shared["z.control_variate"], own["z.control_variate"].sum(0), rtol=1e-10)


@each("estimator", [RP(control_variate="diagonal")], slow_in_numpyro=always)
def test_a_full_rank_site_shares_too(host, estimator):
    def guide(data):
        factor = host.math.exp(host.param("log_scale", host.array(0.1))) * host.array(np.eye(2))
        with host.plate("data", len(data)):
            host.sample("z", host.dist.MultivariateNormal(data[:, None] + host.array([0.0, 1.0]), scale_tril=factor))

    def model(data):
        with host.plate("data", len(data)):
            z = host.sample("z", host.dist.Normal(host.array([0.0, 0.0]), 1.0).to_event(1))
            host.sample("y", host.dist.Normal(z[..., 0] * z[..., 1], 0.5), obs=data)

    steps = Steps(host, model, guide, estimator)
    assert np.isfinite([steps.step(size) for size in (6, 3)]).all()
    assert steps.learned("z.control_variate") == (2, 2)

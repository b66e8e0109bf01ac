"""Pyro's forecasting and epidemiology modules with flowvi's objective, although they make a Trace_ELBO by themselves."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.epidemiology import compartmental
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer.autoguide import AutoNormal

from flowvi import RP
from flowvi.pyro import TraceFlow_ELBO


class Walk(ForecastingModel):
    def model(self, zero_data, covariates):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 0.1).expand([1]).to_event(1))
        self.predict(dist.Normal(0.0, 0.5).expand([1]).to_event(1), drift.cumsum(-2) + bias)


@pytest.mark.slow
def test_a_forecaster_trained_by_svi():
    """A Forecaster made without training steps can be trained by SVI with any loss, and then forecasts."""
    data, covariates = 0.2 * torch.arange(12.0)[:, None], torch.zeros(15, 0)
    model = Walk()
    forecaster = Forecaster(model, data, covariates[:12], guide=AutoNormal(model), num_steps=0)
    estimators = {"drift": RP(control_variate="diagonal")}
    loss = TraceFlow_ELBO(4, forecaster.max_plate_nesting, vectorize_particles=True, estimators=estimators)
    svi = pyro.infer.SVI(forecaster.model, forecaster.guide, pyro.optim.Adam({"lr": 0.1}), loss)
    losses = [svi.step(data, covariates[:12]) for _ in range(60)]
    assert losses[-1] < losses[0] - 10
    assert pyro.param("drift_unconstrained.control_variate").shape == (12, 1, 2)
    forecast = forecaster(data, covariates, num_samples=20)
    assert forecast.shape == (20, 3, 1)
    assert torch.isfinite(forecast).all()


@pytest.mark.filterwarnings("ignore")
def test_a_compartmental_model(monkeypatch):
    """With flowvi's objective in place of the one that `fit_svi` uses, the losses are the same."""

    def losses():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = SimpleSIRModel(population=50, recovery_time=3.0, data=torch.tensor([1.0, 2.0, 4.0, 3.0, 2.0]))
        return model.fit_svi(num_samples=3, num_steps=3, num_particles=2, log_every=100)

    theirs = losses()
    monkeypatch.setattr(compartmental, "Trace_ELBO", TraceFlow_ELBO)
    np.testing.assert_allclose(losses(), theirs, rtol=1e-6)

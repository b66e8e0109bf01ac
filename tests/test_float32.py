"""Single precision: every kind of estimator keeps the dtype and the mean."""

import numpy as np
import numpyro
import pyro
import pytest
import torch
from cases import HALF_NORMAL, half_normal, one, square
from hosts import HOSTS

from flowvi import LR, RP, Flow, ImplicitRP

N = 40_000
LOC, SCALE = 0.5, 1.2


@pytest.fixture
def single():
    """Single precision by default, and double afterwards."""
    numpyro.enable_x64(False)
    torch.set_default_dtype(torch.float32)
    yield
    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)


def program(h):
    """x ~ Normal(loc, scale) with cost x^2, whose gradient is (2 loc, 2 scale)."""
    return one((LOC, SCALE), lambda h, loc, scale: h.dist.Normal(loc, scale), square)


KINDS = {
    "LR": lambda q: LR(q=q),
    "RP": lambda q: RP(q),
    "ImplicitRP by the cdf": lambda q: ImplicitRP(q=q),
    "ImplicitRP": lambda q: ImplicitRP(lambda x, p: (x - p.loc) / p.scale, q),
    "generalised": lambda q: ImplicitRP(lambda x, p: x - 0.5 * p.loc, q, exact=False),
    "Flow per parameter": lambda q: Flow(q=q, **HALF_NORMAL),
    "Flow": lambda q: Flow(half_normal, q=q),
}


def proposal(h, name):
    return {"p": None, "q": lambda p: h.dist.Normal(p.loc + 0.5, 1.5 * p.scale)}[name]


@pytest.mark.parametrize("q", ["p", "q"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_dtype(host, single, kind, q):
    estimators = {"x": KINDS[kind](proposal(host, q))}
    samples = host.gradients(program(host), N, estimators=estimators)
    assert samples.dtype == np.float32
    samples = samples.astype(np.float64)
    assert np.isfinite(samples).all()
    z = (samples.mean(0) - [2 * LOC, 2 * SCALE]) / (samples.std(0) / np.sqrt(N))
    assert np.all(np.abs(z) < 5)


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("q", ["p", "q"])
@pytest.mark.parametrize("kind", KINDS)
def test_pyro_keeps_the_double_precision_of_a_program(single, kind, q, particles):
    """A program in double precision under a default of single precision: the same numbers as under its own default."""
    host = HOSTS["pyro"]
    estimators = {"x": KINDS[kind](proposal(host, q)), "k": LR()}

    def gradient(default):
        torch.set_default_dtype(default)
        theta = torch.tensor([LOC, SCALE], dtype=torch.float64, requires_grad=True)

        def sites():
            x = pyro.sample("x", host.dist.Normal(*theta))
            return x, pyro.sample("k", host.dist.Bernoulli(logits=theta[0]))

        def model():
            x, k = sites()
            pyro.factor("cost", (x - k) ** 2)

        pyro.set_rng_seed(0)
        loss = host.flow.TraceFlow_ELBO(particles, estimators=estimators).differentiable_loss(model, sites)
        loss.backward()
        assert loss.dtype == theta.grad.dtype == torch.float64
        return [*theta.grad.tolist(), loss.item()]

    np.testing.assert_allclose(gradient(torch.float32), gradient(torch.float64), rtol=1e-12)

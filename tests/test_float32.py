"""Every kind of estimator keeps the dtype and the mean in single precision."""

import jax
import numpy as np
import numpyro
import pyro
import pytest
import torch
from cases import HALF_NORMAL, half_normal, one, square
from hosts import HOSTS
from test_alternatives_formulas import check_logits_of_0

from flowvi import LR, RP, Flow, ImplicitRP, proposals

N = 40_000
LOC, SCALE = 0.5, 1.2


@pytest.fixture
def single():
    """Single precision as the default during a test."""
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
    """In Pyro, a program in double precision gives the same numbers if the default is single precision."""
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


SKEW = {
    "Gamma": (1.1, 1.2),
    "Beta": (1.1, 1.4),
    "LogNormal": (0.3, 2.0),
    "Gumbel": (0.3, 1.2),
    "HalfCauchy": (1.2,),
    "InverseGamma": (3.0, 0.1),  # NumPyro's log density is infinite below 1e-19
    "Weibull": (50.0, 1.05),  # many left ends of slices are next to 0
}


@pytest.mark.parametrize("by", ["mass", "height"])
@pytest.mark.parametrize("family", SKEW)
def test_slices_of_skew_densities(host, single, family, by):
    """The weight p/q has the mean 1."""
    p = getattr(host.dist, family)(*map(host.array, SKEW[family]))
    q = getattr(proposals, f"slice_by_{by}")()(p).expand((N,))
    x = host.draw(q, seed=1)
    weight = np.exp(np.asarray(p.log_prob(x) - q.log_prob(x)))
    assert weight.dtype == np.float32
    assert abs(weight.mean() - 1) < 5 * weight.std() / np.sqrt(N) + 1e-5


def test_a_mode_that_is_0_in_single_precision(host, single):
    """If the mode exp(loc - scale^2) of a wide LogNormal underflows, there is no density rather than a wrong one, also under jit."""
    for q in (proposals.slice_by_mass(), proposals.slice_by_height()):
        with pytest.raises(ValueError, match=r"slice_by_(mass|height) needs a LogNormal with a peak .*, not next to an end"):
            q(host.dist.LogNormal(host.array(0.0), host.array(11.0)))
        if host.name == "numpyro":
            log_prob = jax.jit(lambda scale, q=q: q(host.dist.LogNormal(0.0, scale)).log_prob(0.3))
            assert np.isfinite(log_prob(2.0))
            assert np.isnan(log_prob(11.0))


def test_disarm_at_logits_of_0(host, single):
    check_logits_of_0(host, 1e-5)

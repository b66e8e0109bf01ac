"""`describe` raises the errors of the first step of a fit."""

import re
from functools import partial

import pyro
import pytest
import torch
from hosts import HOSTS

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, AdaptiveFlow, Enumerate


def positive(h, name):
    return h.param(name, h.array(0.7), constraint=h.dist.constraints.positive)


def normal(h, in_guide):
    loc, scale = (h.param("m", h.array(0.3)), positive(h, "s")) if in_guide else (h.array(0.0), h.array(1.0))
    h.sample("z", h.dist.Normal(loc, scale))


def coin(h, in_guide):
    h.sample("z", h.dist.Bernoulli(logits=h.param("l", h.array(0.3)) if in_guide else h.array(0.0)))


def uniform(h, in_guide):
    h.sample("z", h.dist.Uniform(h.array(0.0), positive(h, "w") if in_guide else h.array(1.0)))


REFUSED = {
    "a comparison under a bound": (coin, "TraceFlow_RenyiELBO", {"estimators": {"z": Enumerate()}}, "use LR() here"),
    "a score at fixed draws": (normal, "TraceFlow_ELBO", {"particles": "fixed", "default": LR()}, "particles='fixed' needs"),
    "a score under dreg": (normal, "TraceFlow_RenyiELBO", {"gradient": "dreg", "default": LR()}, "needs sites without a score"),
    "stl where the support moves": (uniform, "TraceFlow_ELBO", {"entropy": "stl"}, "is biased where the support moves"),
    "LR where the support moves": (uniform, "TraceFlow_ELBO", {"default": LR()}, "LR is biased where the support moves"),
    "one particle for the optimal baseline": (normal, "TraceFlow_ELBO", {"default": LR(baseline="optimal")}, "needs several particles"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_describe_refuses_what_the_fit_refuses(host, case):
    program, objective, options, message = REFUSED[case]
    elbo, parts = getattr(host.flow, objective)(**options), (partial(program, host, False), partial(program, host, True))
    with pytest.raises(ValueError, match=f"site 'z': .*{re.escape(message)}") as described:
        elbo.describe(*parts)
    with pytest.raises(ValueError, match="^" + re.escape(str(described.value))):  # Pyro adds the shapes of the trace
        host.fit(host.svi(*parts, elbo), 1)


def test_numpyro_describe_wants_what_an_estimator_learns():
    model, guide = (partial(normal, HOSTS["numpyro"], in_guide) for in_guide in (False, True))
    elbo = flowvi.numpyro.TraceFlow_ELBO(default=AdaptiveFlow())
    with pytest.raises(ValueError, match=r"site 'z': AdaptiveFlow\(\) learns .*; pass flowvi.numpyro.adaptive"):
        elbo.describe(model, guide)
    (site,) = elbo.describe(model, flowvi.numpyro.adaptive(guide, elbo))
    assert site.estimator == AdaptiveFlow()


def test_pyro_describe_leaves_the_objective_as_it_is():
    model, guide = (partial(normal, HOSTS["pyro"], in_guide) for in_guide in (False, True))
    elbo = flowvi.pyro.TraceFlow_ELBO(4, vectorize_particles=True)
    state, options = torch.get_rng_state(), vars(elbo).copy()
    elbo.describe(model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(elbo) == options
    assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())

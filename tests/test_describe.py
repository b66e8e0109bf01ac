"""`describe` raises the errors of the first step of a fit."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS
from numpyro.infer import SVI

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow, Enumerate, MeasureValued


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


def needs_raw_keys():
    """A number that only a raw key gives."""
    return 0.0 * jax.random.split(numpyro.prng_key())[0][0]


def numpyro_program(prior, loc):
    """A model and a guide of a vector in a plate; ``loc`` is a parameter, or its number in the model."""

    def model():
        with numpyro.plate("n", 3):
            numpyro.sample("x", numpyro.distributions.Normal(prior(), 1.0))
        numpyro.factor("cost", 1.0)

    def guide():
        mean = loc()
        with numpyro.plate("n", 3):
            numpyro.sample("x", numpyro.distributions.Normal(mean, 1.0))

    return model, guide


KEY, LOC = jax.random.PRNGKey(1), jnp.arange(3.0)
UNUSUAL = {
    "raw keys": (numpyro_program(needs_raw_keys, lambda: numpyro.param("loc", LOC) + needs_raw_keys()), {"rng_key": KEY}),
    "a parameter without an initial value": (
        numpyro_program(lambda: numpyro.param("prior"), lambda: numpyro.param("loc")),
        {"params": {"loc": LOC, "prior": jnp.array(0.5)}},
    ),
    "a function as initial value": (numpyro_program(lambda: 0.0, lambda: numpyro.param("loc", lambda key: LOC)), {}),
}
OBJECTIVES = {
    "ELBO": lambda: flowvi.numpyro.TraceFlow_ELBO(default=LR()),
    "several values": lambda: flowvi.numpyro.TraceFlow_ELBO(default=MeasureValued()),
    "learned": lambda: flowvi.numpyro.TraceFlow_ELBO(default=AdaptiveFlow()),
    "joint": lambda: flowvi.numpyro.TraceFlow_ELBO(control_variate="quadratic"),
    "bound": lambda: flowvi.numpyro.TraceFlow_RenyiELBO(num_particles=2),
}
QUICK = {("raw keys", "joint"), ("a parameter without an initial value", "learned"), ("a function as initial value", "joint")}


def adapted(objective, guide, rng_key=None):
    return flowvi.numpyro.adaptive(guide, objective, rng_key=rng_key) if hasattr(objective, "assignment") else guide


@pytest.mark.parametrize(
    ("program", "objective"),
    [pytest.param(p, o, marks=[] if (p, o) in QUICK else pytest.mark.slow) for p in UNUSUAL for o in OBJECTIVES],
)
def test_describe_with_a_key_and_with_parameters(program, objective):
    """Programs that need raw keys or given parameters: ``describe`` takes them, as ``gradient_report`` does."""
    (model, guide), options = UNUSUAL[program]
    elbo = OBJECTIVES[objective]()
    guide = adapted(elbo, guide, options.get("rng_key"))
    assert [site.name for site in elbo.describe(model, guide, **options)] == ["x"]


@pytest.mark.slow
@pytest.mark.parametrize("program", UNUSUAL)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_fit_with_a_raw_key_and_with_parameters(program, objective):
    (model, guide), options = UNUSUAL[program]
    elbo = OBJECTIVES[objective]()
    svi = SVI(model, adapted(elbo, guide, KEY), numpyro.optim.Adam(0.01), elbo)
    result = svi.run(KEY, 2, progress_bar=False, init_params=options.get("params"))
    assert jnp.isfinite(result.losses).all()
    again = svi.run(KEY, 2, progress_bar=False, init_params=result.params)  # with what the estimators have learned
    assert jnp.isfinite(again.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("program", UNUSUAL)
@pytest.mark.parametrize("tool", ["gradient_report", "check_program"])
def test_tools_with_a_raw_key_and_with_parameters(program, tool):
    (model, guide), options = UNUSUAL[program]
    options = options | ({"num_samples": 4} if tool == "gradient_report" else {"seconds": 1})
    getattr(flowvi.numpyro, tool)(model, guide, default=RP(control_variate="quadratic"), **options)

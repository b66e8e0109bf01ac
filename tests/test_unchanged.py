"""What flowvi does before the first step leaves the guide as it was: its start depends on the key or the seed of the fit alone."""

from contextlib import suppress
from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.infer.autoguide
import pyro
import pyro.infer.autoguide
import pytest
import torch
from hosts import HOSTS, always, each, slow_in_numpyro

from flowvi import RP
from flowvi.unchanged import attributes, unchanged

AUTOGUIDES = {"numpyro": numpyro.infer.autoguide, "pyro": pyro.infer.autoguide}


def model_of(host):
    def model():
        x = host.sample("x", host.dist.Normal(host.array(np.zeros(3)), host.array(1.0)).to_event(1))
        y = host.sample("y", host.dist.Normal(host.array(0.0), 1.0))
        host.sample("z", host.dist.Normal(x.sum(-1) + y, 1.0), obs=host.array(1.3))

    return model


def auto(host, name, model, **options):
    start = numpyro.infer.init_to_uniform if host.name == "numpyro" else pyro.infer.autoguide.init_to_uniform
    return getattr(AUTOGUIDES[host.name], name)(model, init_loc_fn=start, **options)


def in_a_list(host, model):
    guide = AUTOGUIDES[host.name].AutoGuideList(model)
    block = host.handlers.block
    guide.append(auto(host, "AutoNormal", block(model, hide=["y"])))
    guide.append(auto(host, "AutoDelta", block(model, hide=["x"])))
    return guide


def in_a_closure(host, model):
    inside = auto(host, "AutoNormal", model)

    def guide():
        return inside()

    return guide


class Owner:
    def __init__(self, guide):
        self.inside = guide

    def guide(self, scale=1.0):
        return self.inside()


GUIDES = {
    "mean field": lambda host, model: auto(host, "AutoNormal", model),
    "full rank": lambda host, model: auto(host, "AutoMultivariateNormal", model),
    "low rank": lambda host, model: auto(host, "AutoLowRankMultivariateNormal", model, rank=1),
    "list": in_a_list,
    "closure": in_a_closure,
    "method": lambda host, model: Owner(auto(host, "AutoNormal", model)).guide,
    "partial": lambda host, model: partial(Owner(auto(host, "AutoNormal", model)).guide, scale=2.0),
    "handler": lambda host, model: host.handlers.scale(auto(host, "AutoNormal", model), scale=1.0),
}


def start(host, model, guide, seed, **options):
    """The parameters with which a fit starts, without those that estimators learn."""
    elbo = host.flow.TraceFlow_ELBO(**options)
    if host.name == "numpyro":
        svi = numpyro.infer.SVI(model, host.flow.adaptive(guide, elbo) if options else guide, numpyro.optim.Adam(0.1), elbo)
        params = svi.get_params(svi.init(jax.random.key(seed)))
        return {name: np.asarray(value) for name, value in params.items() if "." not in name}
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo).step()
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items() if "control" not in name}


def require_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


FIRST = {
    "describe": lambda h, model, guide: h.flow.TraceFlow_ELBO(control_variate="quadratic").describe(model, guide),
    "describe a bound": lambda h, model, guide: h.flow.TraceFlow_RenyiELBO(num_particles=2).describe(model, guide),
    "report": lambda h, model, guide: h.flow.gradient_report(model, guide, num_samples=2),
}


@each("make", GUIDES, always)
def test_describe(host, make):
    model = model_of(host)
    starts = [start(host, model, make(host, model), seed) for seed in (0, 1)]
    assert any(np.any(starts[0][name] != starts[1][name]) for name in starts[0])
    for seed, expected in enumerate(starts):
        guide = make(host, model)
        pyro.clear_param_store()
        FIRST["describe"](host, model, guide)
        assert not pyro.get_param_store()
        require_same(start(host, model, guide, seed), expected)


@each("first", FIRST, always)
def test_a_fit_after_them(host, first):
    model, guide = (model := model_of(host)), GUIDES["mean field"](host, model)
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    expected = torch.rand(())
    pyro.set_rng_seed(5)
    first(host, model, guide)
    assert torch.rand(()) == expected
    require_same(start(host, model, guide, 1), start(host, model, GUIDES["mean field"](host, model), 1))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["recommend", "check_program"])
def test_a_fit_after_guidance(host, function):
    model, guide = (model := model_of(host)), GUIDES["mean field"](host, model)
    pyro.clear_param_store()
    getattr(host.flow, function)(model, guide, seconds=1, progress_bar=False)
    assert not pyro.get_param_store()
    require_same(start(host, model, guide, 1), start(host, model, GUIDES["mean field"](host, model), 1))


def test_an_autoguide_is_as_new(host):
    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), 1.0))

    guide = auto(host, "AutoDelta", model)
    before = dict(vars(guide))
    host.flow.TraceFlow_ELBO().describe(model, guide)
    assert vars(guide) == before
    assert guide.prototype_trace is None


@slow_in_numpyro
def test_what_is_learned_does_not_fix_the_start(host):
    """In NumPyro, `adaptive` runs the guide once more."""
    model = model_of(host)
    for options in ({"control_variate": "quadratic"}, {"default": RP(control_variate="quadratic")}):
        for seed in (0, 1):
            plain = start(host, model, GUIDES["mean field"](host, model), seed)
            require_same(start(host, model, GUIDES["mean field"](host, model), seed, **options), plain)


@slow_in_numpyro
def test_a_guide_that_has_run_keeps_its_start(host):
    model, guide = (model := model_of(host)), GUIDES["mean field"](host, model)
    first = start(host, model, guide, 0)
    held = guide.prototype_trace
    FIRST["describe"](host, model, guide)
    assert guide.prototype_trace is held
    if host.name == "pyro":
        require_same({name: value.detach().numpy() for name, value in pyro.get_param_store().items()}, first)


def test_attributes_and_their_containers_are_restored():
    class Stateful:
        def __init__(self):
            self.names, self.sizes, self.number = ["a"], {"a": 1}, 0

        def __call__(self):
            self.names.append("b")
            self.sizes["b"] = self.number = 2
            self.new = True

    one = Stateful()
    names = one.names
    with suppress(ZeroDivisionError), unchanged([partial(lambda: one())], {Stateful: attributes}):
        one()
        raise ZeroDivisionError
    assert vars(one) == {"names": ["a"], "sizes": {"a": 1}, "number": 0}
    assert one.names is names


def with_decaying_baseline():
    """A model and a guide whose baseline is in the parameter store, and changes at every run."""

    def model():
        k = pyro.sample("k", pyro.distributions.Bernoulli(0.5))
        pyro.sample("y", pyro.distributions.Normal(k, 1.0), obs=torch.tensor(1.0))

    def guide():
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("k", pyro.distributions.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))), infer=infer)

    return model, guide


@pytest.mark.parametrize("look", ["describe", "report"])
def test_pyro_a_fit_goes_on_as_if_nobody_had_looked(look):
    """The decaying average is one of the values in the parameter store."""
    found = []
    for looks in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model, guide = with_decaying_baseline()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), HOSTS["pyro"].flow.TraceFlow_ELBO())
        for _ in range(3):
            svi.step()
        if looks and look == "describe":
            svi.loss.__self__.describe(model, guide)
        elif looks:
            HOSTS["pyro"].flow.gradient_report(model, guide, num_samples=5)
        for _ in range(3):
            svi.step()
        found.append({name: value.item() for name, value in pyro.get_param_store().items()})
    assert found[0] == found[1]


def test_pyro_programs_that_keep_one_tensor_under_two_names():
    model = model_of(HOSTS["pyro"])
    guide = pyro.infer.autoguide.AutoIAFNormal(model)
    pyro.clear_param_store()
    HOSTS["pyro"].flow.TraceFlow_ELBO().describe(model, guide)
    assert not pyro.get_param_store().keys()


def test_pyro_a_lazy_module():
    net = torch.nn.LazyLinear(1)

    def guide():
        loc = net(torch.ones(2))[0]
        pyro.module("net", net)
        pyro.sample("x", pyro.distributions.Normal(loc, 1.0))

    def model():
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    pyro.clear_param_store()
    HOSTS["pyro"].flow.TraceFlow_ELBO().describe(model, guide)
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), HOSTS["pyro"].flow.TraceFlow_ELBO()).step()


def test_what_a_program_holds():
    """Deeply nested containers do not matter, and an object is found in default arguments too."""
    deep = []
    for _ in range(5000):
        deep = [deep]

    def program(of=deep):
        of[0] = None

    class Guide:
        x = 1

        def __call__(self):
            self.x = 2

    guide = Guide()

    def outer(first=[[guide]]):  # noqa: B006
        first[0][0]()

    with unchanged([program, outer], {Guide: attributes}):
        outer()
        assert guide.x == 2
    assert guide.x == 1

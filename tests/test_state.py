"""A fit goes on as if nobody had looked: what flowvi runs besides the steps leaves the program as it was, bit for bit."""

import random
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.module
import pyro
import pytest
import torch
from hosts import HOSTS

import flowvi.numpyro.host
import flowvi.pyro.host
from flowvi.unchanged import _held

AS_FOUND = {"numpyro": flowvi.numpyro.host.as_found, "pyro": flowvi.pyro.host.as_found}
DATA = np.array([0.3, -1.2, 0.7])


# ---- what runs besides the steps

LOOKS = {
    "describe": lambda h, model, guide: h.flow.TraceFlow_ELBO(2).describe(model, guide),
    "describe a bound": lambda h, model, guide: h.flow.TraceFlow_RenyiELBO().describe(model, guide),
    "gradient_report": lambda h, model, guide: h.flow.gradient_report(model, guide, num_samples=2),
    "recommend": lambda h, model, guide: h.flow.recommend(model, guide, seconds=0.5, progress_bar=False),
    "check_program": lambda h, model, guide: h.flow.check_program(model, guide, seconds=0.5),
}


def fit(host, make, look=None):
    """Everything that a fit of three steps leaves, with a look before it and in the middle."""
    pyro.clear_param_store()
    for seed in (pyro.set_rng_seed, np.random.seed, random.seed):
        seed(3)
    model, guide, *modules = make(host)
    elbo = host.flow.TraceFlow_ELBO()
    svi = host.svi(model, guide, elbo, 0.1)
    state = None
    for step in range(3):
        if look and step in (0, 2):
            look(host, model, guide)
        if host.name == "pyro":
            svi.step()
        else:
            if step == 0:
                state, update = svi.init(jax.random.PRNGKey(1)), jax.jit(svi.update)
            state, _ = update(state)
    found = {"random": random.random(), "numpy": np.random.rand(), "torch": torch.rand(()).item()}
    if host.name == "numpyro":
        return found | {"state": (svi.get_params(state), state.mutable_state, state.rng_key)}
    found |= {name: parameter.detach().clone() for name, parameter in pyro.get_param_store().named_parameters()}
    return found | {str(i): module.state_dict() for i, module in enumerate(modules)}


def require_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- programs with state


def regression(host, network, guide=None):
    """A model with a network of the data, and a guide."""

    def model():
        scale = host.sample("scale", host.dist.LogNormal(host.array(0.0), 1.0))
        f = network()(host.array(DATA)[:, None])[:, 0]
        with host.plate("data", 3):
            host.sample("y", host.dist.Normal(f, scale), obs=host.array(DATA))

    def mean_field():
        host.sample("scale", host.dist.LogNormal(host.param("m", host.array(0.1)), 0.5))

    return model, guide or mean_field


def batch_norm(host):
    network = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.2), torch.nn.Linear(2, 1))
    return *regression(host, lambda: pyro.module("net", network)), network


class Flax(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.BatchNorm(use_running_average=False)(flax.linen.Dense(1, param_dtype=float)(x))


def linen(host):
    def network():
        return numpyro.contrib.module.flax_module("net", Flax(), input_shape=(3, 1), mutable=["batch_stats"])

    return regression(host, network)


class NNX(flax.nnx.Module):
    def __init__(self):
        self.dense = flax.nnx.Linear(1, 1, param_dtype=float, rngs=flax.nnx.Rngs(0))
        self.mean = flax.nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        y = self.dense(x)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * y.mean()
        return y - self.mean[...]


def nnx(host):
    network = NNX()
    return regression(host, lambda: numpyro.contrib.module.nnx_module("net", network))


def counted(host):
    """A counter that the model passes to ``mutable``, and that each run changes in place."""
    start = {"value": jnp.zeros(()), "deep": {"value": 1.0}}

    def network():
        counter = numpyro.primitives.mutable("counter", start)
        counter["value"] = counter["value"] + 1.0
        counter["deep"]["value"] = counter["deep"]["value"] * 2.0
        return lambda x: x * counter["value"]

    return regression(host, network)


def generators(host):
    """Draws from generators outside of the host, in the guide's initial values and in a model that is run at each step."""
    own, ours = np.random.default_rng(1), random.Random(2)

    def guide():
        m = host.param("m", lambda *key: host.array(np.random.randn() + own.normal() + ours.random() + random.random()))
        host.sample("scale", host.dist.LogNormal(m, 0.5))

    return regression(host, lambda: lambda x: x, guide)


PROGRAMS = {
    "pyro": {"batch norm": batch_norm, "generators": generators},
    "numpyro": {"linen": linen, "nnx": nnx, "mutable": counted, "generators": generators},
}
FAST = {("pyro", "batch norm"), ("pyro", "generators")}


def rows():
    for host, programs in PROGRAMS.items():
        for name, make in programs.items():
            for look in LOOKS:
                fast = look == "describe" and (host, name) in FAST
                yield pytest.param(HOSTS[host], make, look, id=f"{host}-{name}-{look}", marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("host", "make", "look"), list(rows()))
def test_a_fit_goes_on(host, make, look):
    require_same(fit(host, make, LOOKS[look]), fit(host, make))


def test_numpyro_a_dict_that_changes_in_place():
    start = {"value": 1.0, "deep": {"value": 2.0}}
    generator = np.random.default_rng(0)
    states = np.random.get_state()[2], random.getstate(), generator.bit_generator.state

    def model():
        counter = numpyro.primitives.mutable("counter", start)
        counter["value"] = counter["deep"]["value"] = np.random.randn() + random.random() + generator.normal()

    with suppress(ZeroDivisionError), AS_FOUND["numpyro"](model), numpyro.handlers.trace():
        model()
        raise ZeroDivisionError
    assert start == {"value": 1.0, "deep": {"value": 2.0}}
    assert (np.random.get_state()[2], random.getstate(), generator.bit_generator.state) == states


# ---- where a program may keep an autoguide


@dataclass
class Plain:
    """An object that cannot be called."""

    inside: Any

    def run(self):
        return self.inside()


@dataclass(slots=True)
class Slots:
    inside: Any


class OfTheClass:
    inside: Any = None


held = Plain(None)
spare = ModuleType("spare")


def in_a_global(auto):
    held.inside = auto
    return lambda: held.inside()


def in_a_method(auto):
    return Plain(auto).run


def in_an_attribute_of_an_attribute(auto):
    one = Plain(Plain(Slots([auto])))
    return lambda: one.inside.inside.inside[0]()


def in_a_class(auto):
    OfTheClass.inside = staticmethod(auto)
    return lambda: OfTheClass.inside()


def in_another_module(auto):
    spare.found = auto
    return lambda: spare.found()


def in_a_function_inside(auto):
    held.inside = auto

    def guide():
        return [(lambda: held.inside())() for _ in range(1)]

    return guide


def in_a_cached_function(auto):
    @cache
    def found():
        return auto

    return lambda: found()()


def in_arguments(auto):
    return lambda one, two: one.inside(), (Plain(auto),), {"two": 2}


def in_keywords(auto):
    return lambda one: one["a"][0](), (), {"one": {"a": (auto,)}}


HOLDERS = [
    in_a_global,
    in_a_method,
    in_an_attribute_of_an_attribute,
    in_a_class,
    in_another_module,
    in_a_function_inside,
    in_a_cached_function,
    in_arguments,
    in_keywords,
]


@pytest.mark.parametrize("hold", HOLDERS)
def test_an_autoguide_is_found(host, hold):
    def model(*args, **kwargs):
        host.sample("x", host.dist.Normal(host.array(0.0), 1.0))

    autoguides = numpyro.infer.autoguide if host.name == "numpyro" else pyro.infer.autoguide
    auto = autoguides.AutoDelta(model)
    guide, args, kwargs = found if isinstance(found := hold(auto), tuple) else (found, (), {})
    before = dict(vars(auto))
    with AS_FOUND[host.name](model, guide, args, kwargs), nullcontext() if host.name == "pyro" else numpyro.handlers.seed(rng_seed=0):
        guide(*args, **kwargs)
        assert vars(auto) != before
    assert vars(auto) == before


@pytest.mark.parametrize("look", ["describe", "gradient_report"])
def test_pyro_an_autoguide_in_an_argument(look):
    def model(one):
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    auto = pyro.infer.autoguide.AutoNormal(model)
    elbo, arguments = flowvi.pyro.TraceFlow_ELBO(), (model, lambda one: one.inside(one), Plain(auto))
    elbo.describe(*arguments) if look == "describe" else flowvi.pyro.gradient_report(*arguments, num_samples=2)
    assert auto.prototype_trace is None


def test_the_search_is_short():
    """It does not search the libraries, and a container of numbers is one object."""

    def model(network, data):
        return torch.nn.functional.relu(network(jnp.asarray(data))), numpyro.infer, pyro.infer, regression

    assert len(list(_held([model, torch.nn.Linear(2, 2), [1.0] * 10**6]))) < 200


# ---- memory


def peak_of_saved_tensors(run):
    """The largest number of tensors that graphs keep for their derivatives at one time."""
    live, peak = set(), 0

    class Saved:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor = tensor
            live.add(id(self))
            peak = max(peak, len(live))

        def __del__(self):
            live.discard(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return peak


@pytest.mark.parametrize("look", ["describe", "gradient_report"])
def test_pyro_particles_share_no_memory(look):
    """The graph of a particle is freed before the next particle but one is drawn."""

    def guide():
        pyro.sample("x", pyro.distributions.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))

    def model():
        x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        pyro.factor("cost", (x * x.exp()).sin())

    def run(num_particles):
        if look == "describe":
            return flowvi.pyro.TraceFlow_ELBO(num_particles).describe(model, guide)
        options = {"num_particles": num_particles}
        return flowvi.pyro.gradient_report(model, guide, num_samples=2, options=options)

    few, many = (peak_of_saved_tensors(lambda n=n: run(n)) for n in (3, 12))
    assert few == many > 0

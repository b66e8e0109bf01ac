"""A fit goes on as if nobody had looked: what flowvi runs besides the steps leaves the program as it was, bit for bit."""

import importlib
import random
import unittest.mock
import weakref
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
import numpyro.infer.autoguide
import pyro
import pyro.contrib.easyguide
import pyro.infer.autoguide
import pytest
import torch
from hosts import HOSTS

import flowvi.numpyro.host
import flowvi.pyro.host
from flowvi import LR, RP
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
    state = update = None
    for step in range(3):
        if look and step in (0, 2):
            look(host, model, guide)
        if host.name == "pyro":
            svi.step()
        else:
            state = svi.init(jax.random.PRNGKey(1)) if state is None else state
            update = jax.jit(lambda state: svi.update(state)) if step != 1 else update  # traced again after each look
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


# ---- autoguides, which draw their start


def latents(host):
    """A model of a vector and a number."""

    def model():
        x = host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
        scale = host.sample("scale", host.dist.LogNormal(host.array(0.0), 1.0))
        host.sample("y", host.dist.Normal(x.sum(-1), scale), obs=host.array(1.3))

    return model


AUTOGUIDES = {"numpyro": numpyro.infer.autoguide, "pyro": pyro.infer.autoguide}


def auto(name, **options):
    def make(host):
        return (model := latents(host)), getattr(AUTOGUIDES[host.name], name)(model, **options)

    return make


def guide_list(host):
    model, guide = latents(host), AUTOGUIDES[host.name].AutoGuideList(latents(host))
    guide.append(AUTOGUIDES[host.name].AutoNormal(host.handlers.block(model, hide=["scale"])))
    guide.append(AUTOGUIDES[host.name].AutoDelta(host.handlers.block(model, hide=["x"])))
    return model, guide


def easy_guide(host):
    @pyro.contrib.easyguide.easy_guide(latents(host))
    def guide(self):
        loc = pyro.param("loc", lambda: torch.randn(2))
        self.group("x").sample("auxiliary", pyro.distributions.Normal(loc, 1.0).to_event(1))
        self.map_estimate("scale")

    return latents(host), guide


def pyro_module(host):
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Dropout(0.3), torch.nn.Linear(1, 4))
            self.spread = pyro.nn.PyroParam(lambda: torch.rand(()), pyro.distributions.constraints.positive)

        def forward(self):
            x = self.network(torch.as_tensor(DATA)[:, None]).sum(0)
            pyro.sample("x", pyro.distributions.Normal(x[:2], self.spread).to_event(1))
            pyro.sample("scale", pyro.distributions.LogNormal(x[2], x[3].exp()))

    guide = Guide()
    return latents(host), guide, guide.network


def lazy_layers(host):
    network = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.ReLU(), torch.nn.LazyBatchNorm1d(), torch.nn.LazyLinear(4))

    def guide():
        x = network(torch.as_tensor(DATA)[:, None]).sum(0)
        pyro.module("network", network)
        pyro.sample("x", pyro.distributions.Normal(x[:2], 1.0).to_event(1))
        pyro.sample("scale", pyro.distributions.LogNormal(x[2], x[3].exp()))

    return latents(host), guide, network


def constrained(host):
    """Parameters with constraints, whose initial values are tensors of the program."""
    loc, scale = torch.tensor([0.2, -0.4]), torch.tensor([0.5, 0.7])

    def guide():
        s = pyro.param("s", scale, constraint=pyro.distributions.constraints.positive)
        pyro.sample("x", pyro.distributions.Normal(pyro.param("m", loc), s).to_event(1))
        pyro.sample("scale", pyro.distributions.LogNormal(pyro.param("l", lambda: torch.randn(())), 0.5))

    return latents(host), guide


def semi_dais(host):
    def of_all():
        return numpyro.sample("theta", numpyro.distributions.Normal(0.0, 1.0))

    def of_each(theta):
        with numpyro.plate("data", 8, subsample_size=2):
            tau = numpyro.sample("tau", numpyro.distributions.Gamma(5.0, 5.0))
            numpyro.sample("obs", numpyro.distributions.Normal(0.0, tau), obs=jnp.ones(2))

    def model():
        return of_each(of_all())

    guides = AUTOGUIDES["numpyro"]
    return model, guides.AutoSemiDAIS(model, of_each, guides.AutoNormal(of_all), K=2)


def surrogate_dais(host):
    model = latents(host)

    def surrogate():
        x = numpyro.sample("x", numpyro.distributions.Normal(np.zeros(2), 1.0).to_event(1))
        scale = numpyro.sample("scale", numpyro.distributions.LogNormal(0.0, 1.0))
        weight = numpyro.param("weight", lambda key: jax.random.uniform(key), constraint=numpyro.distributions.constraints.positive)
        with numpyro.handlers.scale(scale=weight):
            numpyro.sample("y", numpyro.distributions.Normal(x.sum(-1), scale), obs=1.3)

    return model, AUTOGUIDES["numpyro"].AutoSurrogateLikelihoodDAIS(model, surrogate, K=2)


PROGRAMS = {
    "pyro": {
        "batch norm": batch_norm,
        "generators": generators,
        "AutoNormal": auto("AutoNormal", init_loc_fn=pyro.infer.autoguide.init_to_uniform),
        "low rank": auto("AutoLowRankMultivariateNormal"),
        "AutoIAFNormal": auto("AutoIAFNormal"),
        "AutoStructured": auto("AutoStructured"),
        "AutoDelta": auto("AutoDelta"),
        "messenger": auto("AutoNormalMessenger"),
        "list": guide_list,
        "easy guide": easy_guide,
        "module": pyro_module,
        "lazy layers": lazy_layers,
        "constraints": constrained,
    },
    "numpyro": {
        "linen": linen,
        "nnx": nnx,
        "mutable": counted,
        "generators": generators,
        "AutoNormal": auto("AutoNormal"),
        "AutoIAFNormal": auto("AutoIAFNormal"),
        "AutoBNAFNormal": auto("AutoBNAFNormal", num_flows=1),
        "AutoDAIS": auto("AutoDAIS", K=2),
        "AutoSemiDAIS": semi_dais,
        "AutoSurrogateLikelihoodDAIS": surrogate_dais,
        "list": guide_list,
    },
}
QUICK = {"pyro": ("describe", "describe a bound", "gradient_report"), "numpyro": ("describe",)}
FAST = {"batch norm", "generators", "lazy layers", "easy guide"}
EVERY_LOOK = {"AutoNormal", "batch norm", "linen"}  # the other programs get those that are quick


def rows():
    for host, programs in PROGRAMS.items():
        for name, make in programs.items():
            for look in LOOKS if name in EVERY_LOOK else QUICK[host]:
                fast = host == "pyro" and look == "describe" and name in FAST
                yield pytest.param(HOSTS[host], make, look, id=f"{host}-{name}-{look}", marks=[] if fast else [pytest.mark.slow])


untouched = cache(fit)


@pytest.mark.parametrize(("host", "make", "look"), list(rows()))
def test_a_fit_goes_on(host, make, look):
    require_same(fit(host, make, LOOKS[look]), untouched(host, make))


def test_numpyro_a_dict_of_a_class_of_its_own():
    class State(dict):
        pass

    start = State(value=1.0)

    def model():
        numpyro.primitives.mutable("counter", start)["value"] = 2.0

    with AS_FOUND["numpyro"](model), numpyro.handlers.trace():
        model()
    assert start == {"value": 1.0}


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


OBJECTIVES = {"an annotation in the model": {}, "a control variate for the guide": {"control_variate": "quadratic"}}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_pyro_the_objective_learns_nothing(options):
    """A first step that finds something about the program runs it again, with the same random numbers."""

    def model():
        infer = {} if options else {"estimator": LR()}
        x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0), infer=infer)
        pyro.sample("z", pyro.distributions.Normal(x, 1.0))

    def guide():
        x = pyro.sample("x", pyro.distributions.Normal(pyro.param("m", lambda: torch.randn(())), 1.0))
        pyro.sample("z", pyro.distributions.Normal(0.5 * x.detach(), pyro.param("s", lambda: torch.rand(()))))

    found = []
    for looks in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = HOSTS["pyro"].svi(model, guide, elbo := flowvi.pyro.TraceFlow_ELBO(**options))
        before = repr(vars(elbo.assignment))
        if looks:
            elbo.describe(model, guide)
            assert repr(vars(elbo.assignment)) == before
        svi.step()
        found.append({name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()})
    require_same(*found)


# ---- what is around a program, also after an error

LOOKS_AT_PARTS = {
    **LOOKS,
    "check_estimator": lambda h, model, guide: flowvi.check_estimator(lambda loc: guide.p(loc), RP(), {"loc": 0.3}, num_samples=200),
}


def flags(host):
    if host.name == "numpyro":
        flags = jax.config.jax_enable_x64, numpyro.distributions.Distribution._validate_args
        return *flags, list(numpyro.primitives._PYRO_STACK), np.random.get_state()[2], random.getstate()
    flags = torch.distributions.Distribution._validate_args, pyro.infer.util.is_validation_enabled(), torch.is_grad_enabled()
    generators = torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()
    return *flags, *generators, torch.get_default_dtype(), pyro.settings.get(), list(pyro.poutine.runtime._PYRO_STACK)


class Guide(torch.nn.Module):
    """A guide that draws, and changes its modes and its buffers, and may fail after some runs."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.eval()
        self.norm.bias.requires_grad = False
        self.norm.weight.grad = torch.ones(1)

    def p(self, loc):
        self.norm.train()
        torch.rand(()), np.random.rand(), random.random()
        shift = self.norm(torch.as_tensor(DATA)[:, None])[0, 0]
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError
        return pyro.distributions.Normal(loc + shift, 1.0)

    def forward(self):
        pyro.module("guide", self)
        pyro.sample("x", self.p(pyro.param("loc", torch.tensor(0.3))))


left = [0]  # the number of runs until a guide fails; not an object that the guide holds


@pytest.mark.parametrize("runs", [0, 1, 3])
@pytest.mark.parametrize(
    "look", [pytest.param(look, marks=[pytest.mark.slow] if look in {"recommend", "check_program"} else []) for look in LOOKS_AT_PARTS]
)
def test_pyro_nothing_around_it_changes(look, runs):
    """Modes and gradients of parameters, the optimizer, generators and flags."""
    host = HOSTS["pyro"]

    def model():
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    guide, left[0] = Guide(), 0
    svi = host.svi(model, guide, host.flow.TraceFlow_ELBO())
    svi.step()
    guide.eval()
    pyro.param("loc").grad = torch.tensor(2.0)

    def state():
        parameters = [(p, p.requires_grad, p.grad, p.tolist()) for p in guide.parameters()]
        store = {name: (p, p.grad, p.tolist()) for name, p in pyro.get_param_store().named_parameters()}
        modes = [(module.training, dict(vars(module))) for module in guide.modules()]
        numbers = {name: buffer.tolist() for name, buffer in guide.named_buffers()}
        return repr((parameters, store, modes, numbers, svi.optim.get_state(), flags(host)))

    before, left[0] = state(), runs
    with pytest.raises(ZeroDivisionError) if runs else nullcontext():
        LOOKS_AT_PARTS[look](host, model, guide)
    assert state() == before


def test_pyro_a_module_has_not_run():
    """Pyro warns about a module that has run before it becomes part of another one."""
    model, guide, _ = pyro_module(HOSTS["pyro"])
    flowvi.pyro.TraceFlow_ELBO().describe(model, guide)
    assert not guide._pyro_context.used


@pytest.mark.parametrize("look", [pytest.param("describe", marks=pytest.mark.slow), "gradient_report", "adaptive"])
def test_numpyro_nothing_around_it_changes(look):
    """Also if the model fails, in the middle of a run."""
    host = HOSTS["numpyro"]

    def model():
        numpyro.sample("x", numpyro.distributions.Normal(np.random.rand()))
        raise ZeroDivisionError

    guide = AUTOGUIDES["numpyro"].AutoDelta(lambda: numpyro.sample("x", numpyro.distributions.Normal(random.random())))
    looks = {**LOOKS, "adaptive": lambda h, model, guide: start(h.flow.adaptive(guide, h.flow.TraceFlow_ELBO(), model))}

    def start(adaptive):
        with numpyro.handlers.seed(rng_seed=0):
            adaptive()

    before = flags(host), dict(vars(guide))
    with pytest.raises(ZeroDivisionError):
        looks[look](host, model, guide)
    assert (flags(host), dict(vars(guide))) == before


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


@pytest.mark.parametrize("look", ["describe", "gradient_report", pytest.param("check_program", marks=pytest.mark.slow)])
def test_what_an_objective_holds(host, look):
    """Here a generator that its function of the site reads."""
    generator, calls = np.random.default_rng(0), []

    def estimators(site):
        calls.append(generator.random())
        return RP()

    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), 1.0))

    def guide():
        host.sample("x", host.dist.Normal(host.param("m", host.array(0.1)), 1.0))

    looks = {
        "describe": lambda: host.flow.TraceFlow_ELBO(estimators=estimators).describe(model, guide),
        "gradient_report": lambda: host.flow.gradient_report(model, guide, estimators=estimators, num_samples=2),
        "check_program": lambda: host.flow.check_program(model, guide, estimators=estimators, seconds=0.5),
    }
    looks[look]()
    assert calls
    assert generator.random() == np.random.default_rng(0).random()


def test_the_search_knows_installed_packages(tmp_path, monkeypatch):
    """A model from an installed package is searched like any other; its modules may import each other."""
    folder = tmp_path / "site-packages" / "installed"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text("from installed import two\nfound = []\ndef model():\n    return two.helper(two)\n")
    (folder / "two.py").write_text("from installed import one\ndef helper(two):\n    return one.found, two.helper\n")
    monkeypatch.syspath_prepend(folder.parent)
    one = importlib.import_module("installed.one")
    assert any(value is one.found for value in _held([one.model]))
    assert not any(value is one.found for value in _held([lambda: one.model()]))


class Proxy:
    """An object without a dict that answers everything, as a proxy does."""

    __slots__ = ("inside",)

    def __getattr__(self, name):
        return 3


class Unbound:
    """A proxy of an object that does not exist yet."""

    @property
    def __class__(self):
        raise RuntimeError("unbound")

    @property
    def __dict__(self):
        raise RuntimeError("unbound")


def test_the_search_asks_objects_nothing():
    generator, proxy, gone = random.Random(0), Proxy(), Plain(None)
    proxy.inside = generator
    values = [weakref.proxy(gone), Unbound(), unittest.mock.Mock(spec=fit), proxy]
    del gone
    assert any(value is generator for value in _held([values]))


def test_the_search_is_short():
    """It does not search the libraries, and a container of numbers is one object."""

    def model(network, data):
        return torch.nn.functional.relu(network(jnp.asarray(data))), numpyro.infer, pyro.infer, regression

    assert len(list(_held([model, torch.nn.Linear(2, 2), [1.0] * 10**6]))) < 200


@pytest.mark.parametrize("hold", [in_a_global, in_a_method, in_arguments])
def test_pyro_a_generator_is_restored(hold):
    """Torch's generators, which the garbage collector does not track, and the normal number that a RandomState keeps for later."""
    of_torch, of_numpy = torch.Generator(), np.random.RandomState(0)
    of_numpy.randn()

    def numbers():
        return torch.rand((), generator=of_torch).item(), of_numpy.randn()

    before = of_torch.get_state(), of_numpy.get_state()[2:]
    function, args, kwargs = found if isinstance(found := hold(numbers), tuple) else (found, (), {})
    with AS_FOUND["pyro"](function, args, kwargs):
        function(*args, **kwargs)
    assert torch.equal(of_torch.get_state(), before[0])
    assert of_numpy.get_state()[2:] == before[1]


def test_pyro_buffers_that_share_memory():
    """An expanded buffer cannot change in place; one of a single element can."""
    module, base = torch.nn.Module(), torch.zeros(4)
    for name, buffer in {"three": torch.ones(()).expand(3), "one": torch.ones(()).expand(1), "a": base[:3], "b": base[1:]}.items():
        module.register_buffer(name, buffer)
    with AS_FOUND["pyro"](module):
        for buffer in (module.one, module.a, module.b):
            buffer += 1.0
    assert base.tolist() == [0.0] * 4
    assert [module.one.tolist(), module.three.tolist()] == [[1.0], [1.0] * 3]


def test_pyro_nothing_is_added_to_a_gradient():
    """Of a leaf that is no parameter of Pyro, to which the derivative of the loss adds in place."""
    weight = torch.ones((), requires_grad=True)
    weight.grad = before = torch.tensor(5.0)
    with suppress(ZeroDivisionError), AS_FOUND["pyro"](lambda: weight):
        weight.backward()
        raise ZeroDivisionError
    assert weight.grad is before
    assert before == 5.0


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

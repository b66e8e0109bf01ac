"""Autoguides, handlers and modules of the hosts: if all draws are pathwise, TraceFlow_ELBO equals Trace_ELBO to the last digit."""

import inspect
import warnings
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.infer.autoguide
import numpyro.infer.reparam
import pyro
import pyro.infer.autoguide
import pyro.infer.autoguide.initialization
import pyro.infer.reparam
import pytest
import torch
from hosts import HOSTS, at_least
from pyro.contrib.autoname import scope as pyro_scope
from pyro.nn import PyroModule, PyroParam
from svi_programs import MIXED, PROGRAMS, assert_same, bind, both, fit, m, normal, observe, s, svi

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]
DATA = [0.4, -1.1, 0.7]


# ---- autoguides


def hierarchical(h):
    """Global and local latents, one of them positive."""

    def model():
        a = h.sample("a", normal(h, 0.0))
        scale = h.sample("s", h.dist.LogNormal(h.array(0.0), h.array(0.5)))
        with h.plate("n", 3):
            z = h.sample("z", h.dist.Normal(a, scale))
            h.sample("y", normal(h, z, 0.7), obs=h.array(DATA))

    return model


def numpyro_list(model):
    autoguide = numpyro.infer.autoguide
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(numpyro.handlers.block(model, hide=["a"])))
    guide.append(autoguide.AutoDelta(numpyro.handlers.block(model, expose=["a"])))
    return guide


def pyro_list(model):
    autoguide = pyro.infer.autoguide
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(pyro.poutine.block(model, hide=["a"])))
    guide.append(autoguide.AutoDelta(pyro.poutine.block(model, expose=["a"])))
    return guide


def pyro_flow(model):
    return pyro.infer.autoguide.AutoNormalizingFlow(model, partial(pyro.distributions.transforms.iterated, 2, pyro_planar))


def pyro_planar(size):
    return pyro.distributions.transforms.planar(size)


AUTOGUIDES = {
    "numpyro": [
        "AutoNormal",
        "AutoDelta",
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
        "AutoIAFNormal",
        "AutoBNAFNormal",
        "AutoLaplaceApproximation",
        "AutoDAIS",
        numpyro_list,
    ],
    "pyro": [
        "AutoNormal",
        "AutoDelta",
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
        "AutoIAFNormal",
        "AutoLaplaceApproximation",
        "AutoStructured",
        "AutoGaussian",
        "AutoNormalMessenger",
        "AutoHierarchicalNormalMessenger",
        "AutoRegressiveMessenger",
        pyro_list,
        pyro_flow,
    ],
}


def make_guide(h, name, model):
    return (getattr(h.library.infer.autoguide, name) if isinstance(name, str) else name)(model)


def of_numpyro(elbos, guide, model, *args):
    """Loss and gradient of each objective."""
    seeded = numpyro.handlers.seed(guide, 0)
    sites = numpyro.handlers.trace(seeded).get_trace(*args)
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    def evaluate(params):
        key = jax.random.key(3)
        return [jax.value_and_grad(lambda p, e=e: e.loss(key, p, model, guide, *args))(params) for e in elbos]

    return jax.jit(evaluate)(params)


def of_pyro(elbo, make, model, *args):
    """Loss and gradient, with a new guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = make(model)
    guide(*args)
    pyro.set_rng_seed(3)
    loss = elbo.loss_and_grads(model, guide, *args)
    return loss, {name: p.grad.numpy() for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}


def guides_and_particles():
    """Each guide with one particle and with several. In NumPyro, which compiles each, most rows with several are slow tests."""
    for host, names in AUTOGUIDES.items():
        for name, particles in product(names, (1, 3)):
            slow = host == "numpyro" and (particles == 3 or name == "AutoBNAFNormal") and name != "AutoNormal"
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(HOSTS[host], name, particles, id=f"{host}-{getattr(name, '__name__', name)}-{particles}", marks=marks)


@pytest.mark.parametrize(("h", "name", "particles"), list(guides_and_particles()))
def test_autoguides(h, name, particles):
    model = hierarchical(h)
    theirs, ours = h.library.infer.Trace_ELBO(particles), h.flow.TraceFlow_ELBO(particles)
    if h is NUMPYRO:
        assert_same(*of_numpyro((theirs, ours), make_guide(h, name, model), model))
    else:
        assert_same(*(of_pyro(elbo, partial(make_guide, h, name), model) for elbo in (theirs, ours)))


@pytest.mark.parametrize("name", ["AutoNormalMessenger", "AutoStructured", "AutoNormal"])
def test_pyro_autoguides_with_vectorized_particles(name):
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    elbos = (elbo(**options) for elbo in (pyro.infer.Trace_ELBO, flowvi.pyro.TraceFlow_ELBO))
    assert_same(*(of_pyro(elbo, partial(make_guide, PYRO, name), hierarchical(PYRO)) for elbo in elbos))


def posterior(name):
    if name == "z":
        return PYRO.dist.Normal(pyro.param("z_loc", torch.arange(6.0) / 10, event_dim=0), 0.6)
    return PYRO.dist.Normal(PYRO.param("w_loc", torch.tensor(0.2)), PYRO.param("w_scale", torch.tensor(0.8)))


class Messenger(pyro.infer.autoguide.effect.AutoMessenger):
    def get_posterior(self, name, prior):
        return posterior(name)


def plain_guide(size):
    PYRO.sample("w", posterior("w"))
    with PYRO.plate("data", 6, subsample_size=size):
        PYRO.sample("z", posterior("z"))


def of_a_subsample(size):
    w = PYRO.sample("w", normal(PYRO, 0.0))
    with PYRO.plate("data", 6, subsample_size=size) as rows:
        z = PYRO.sample("z", normal(PYRO, w))
        PYRO.sample("y", normal(PYRO, z, 0.4), obs=torch.linspace(-1, 1, 6)[rows])


MESSENGERS = {
    "full": (2, lambda flow: flow.TraceFlow_ELBO()),
    "stl": (2, lambda flow: flow.TraceFlow_ELBO(entropy="stl")),
    "values": (2, lambda flow: flow.TraceFlow_ELBO(estimators={"w": RP(jumps=[0.0])})),
    "dreg": (6, lambda flow: flow.TraceFlow_RenyiELBO(gradient="dreg")),
}


@pytest.mark.parametrize(("size", "make"), MESSENGERS.values(), ids=MESSENGERS)
def test_pyro_a_messenger_is_like_any_guide(size, make):
    """Also where the guide runs again, which has to keep the subsample."""
    results = []
    for guide in (plain_guide, Messenger(of_a_subsample)):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        loss = make(flowvi.pyro).loss_and_grads(of_a_subsample, guide, size)
        results.append((loss, {name: p.grad.numpy() for name, p in pyro.get_param_store().named_parameters()}))
    assert_same(*results)


def test_pyro_the_report_of_a_messenger():
    reports = []
    for guide in (plain_guide, Messenger(of_a_subsample)):
        pyro.clear_param_store()
        guide(2)
        reports.append(flowvi.pyro.gradient_report(of_a_subsample, guide, 2, num_samples=3).parameters)
    assert [(p.parameter, p.sites) for p in reports[1]] == [("w_loc", ("w",)), ("w_scale", ("w",)), ("z_loc", ("z",))]
    for plain, other in zip(*reports, strict=True):
        np.testing.assert_allclose(other.mean, plain.mean, rtol=1e-10)


def test_pyro_an_enumerated_autoguide_takes_the_exact_sum():
    def model():
        k = pyro.sample("k", pyro.distributions.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", pyro.distributions.Normal(3 * k, torch.tensor(1.0)), obs=torch.tensor(2.0))

    guide = pyro.infer.autoguide.AutoDiscreteParallel(model)
    guide()
    (parameter,) = guide.parameters()

    def gradient(loss):
        return torch.autograd.grad(loss, parameter)[0]

    expected = gradient(pyro.infer.TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, guide))
    for _ in range(3):
        assert_same(gradient(flowvi.pyro.TraceFlow_ELBO().differentiable_loss(model, guide)).numpy(), expected.numpy())
    assert str(flowvi.pyro.TraceFlow_ELBO(estimators={"k": LR()}).describe(model, guide)[0].estimator) == "LR()"


# ---- handlers that change a guide or a model


def base_guide(h, name="w"):
    h.sample(name, normal(h, m(h), s(h)))


def base_model(h, name="w"):
    observe(h, h.sample(name, normal(h, 0.0)) * h.param("b", h.array(0.9)))


def with_extra(h):
    base_guide(h)
    h.sample("extra", normal(h, 0.0))


def centered(h):
    w = h.sample("w", normal(h, 0.4, 1.3))
    observe(h, w)


def two_latents(h):
    v = h.sample("v", normal(h, 0.2))
    observe(h, v + h.sample("w", normal(h, 0.0)))


def decentering(h):
    return {"w": h.library.infer.reparam.LocScaleReparam(0.0)}


def scoped(h, part):
    return lambda: numpyro.handlers.scope(part, prefix="p")(h) if h is NUMPYRO else pyro_scope(part, prefix="p")(h)


def lifted_guide(h):
    base_guide(h)
    h.sample("b", normal(h, h.param("b_loc", h.array(0.2)), 0.5))


def partly_observed(h, guide):
    """Three observations with the second missing: its value is the latent site ``y_unobserved``."""
    with h.plate("n", 3):
        if guide:
            h.sample("y_unobserved", h.dist.Normal(m(h) + h.array([0.0, 0.0, 0.0]), s(h)))
        else:
            mask = h.array(DATA) > -1
            h.sample("y", h.dist.Normal(h.param("b", h.array(0.9)), h.array([1.0, 1.0, 1.0])), obs=h.array(DATA), obs_mask=mask)


HANDLED = {
    "block": lambda h: (lambda: h.handlers.block(with_extra, hide=["extra"])(h), lambda: base_model(h)),
    "reparam": lambda h: (lambda: base_guide(h, "w_decentered"), lambda: h.handlers.reparam(centered, config=decentering(h))(h)),
    "lift": lambda h: (lambda: lifted_guide(h), lambda: h.handlers.lift(base_model, prior={"b": normal(h, 0.0)})(h)),
    "scope": lambda h: (scoped(h, base_guide), scoped(h, base_model)),
    "condition": lambda h: (lambda: base_guide(h), lambda: h.handlers.condition(two_latents, data={"v": h.array(0.3)})(h)),
    "condition the guide": lambda h: (
        lambda: h.handlers.condition(with_extra, data={"extra": h.array(0.3)})(h),
        lambda: base_model(h),
    ),
    "do": lambda h: (lambda: base_guide(h), lambda: h.handlers.do(two_latents, data={"v": h.array(0.3)})(h)),
    "obs_mask": lambda h: (lambda: partly_observed(h, True), lambda: partly_observed(h, False)),
}


@pytest.mark.parametrize("handler", HANDLED)
def test_handlers(host, handler):
    guide, model = HANDLED[handler](host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # test_the_same_complaints has this warning
        assert_same(*both(host, (lambda h: guide(), lambda h: model())))


def test_numpyro_substituted_values():
    """A latent with a substituted value is no draw, so LR adds nothing there."""
    guide = lambda h: numpyro.handlers.substitute(base_guide, data={"w": jnp.array(0.3)})(h)
    program = (guide, base_model)
    theirs, ours = both(NUMPYRO, program)
    assert_same(theirs, ours)
    elbo = flowvi.numpyro.TraceFlow_ELBO(default=LR())
    bound = bind(NUMPYRO, program)
    assert_same(theirs[0], elbo.loss(jax.random.key(3), {"m": 0.3, "s": 0.8, "b": 0.9}, *bound[::-1]))


@pytest.mark.parametrize("handler", ["reparam", "lift", "scope", "obs_mask"])
def test_sites_that_handlers_make_or_rename(host, handler):
    """Estimators are given by the names that sites have in the run, after handlers have made or renamed them."""
    name = {"reparam": "w_decentered", "lift": "b", "scope": "p/w", "obs_mask": "y_unobserved"}[handler]
    guide, model = HANDLED[handler](host)
    described = host.flow.TraceFlow_ELBO(estimators={name: LR()}).describe(model, guide)
    assert {d.name: d.estimator for d in described}[name] == LR()


def test_infer_config_says_an_estimator(host):
    config = lambda site: {"estimator": LR()} if site["name"] == "w" else {}
    guide = host.handlers.infer_config(base_guide, config_fn=config)
    (site,) = host.flow.TraceFlow_ELBO().describe(lambda: base_model(host), lambda: guide(host))
    assert (site.estimator, site.source) == (LR(), "guide")


# ---- the interface of the objective


def test_the_hosts_arguments_in_the_hosts_order(host):
    theirs, ours = (inspect.signature(elbo).parameters.values() for elbo in (host.library.infer.Trace_ELBO, host.flow.TraceFlow_ELBO))
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]


def raised(f, *args):
    """The warnings and the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            f(*args)
        except Exception as error:
            return [str(w.message) for w in caught], type(error), str(error)
    return [str(w.message) for w in caught], None, None


def two_in_a_plate(h, name, size=2):
    with h.plate("n", size):
        h.sample(name, normal(h, h.array([0.0] * size)))


COMPLAINTS = {
    "a site of the model is missing": (lambda h: base_guide(h, "other"), base_model),
    "a site of the guide is missing": (with_extra, base_model),
    "plates differ": (lambda h: two_in_a_plate(h, "w"), lambda h: h.sample("w", normal(h, h.array([0.0, 0.0])))),
    "shapes differ": (lambda h: two_in_a_plate(h, "w", 3), lambda h: two_in_a_plate(h, "w", 2)),
}


@pytest.mark.parametrize("what", COMPLAINTS)
def test_the_same_complaints(host, what):
    """If a guide does not match its model, the warnings and errors are those of the host."""
    guide, model = bind(host, COMPLAINTS[what])

    def evaluate(elbo):
        host.loss(elbo, model, guide)

    theirs, ours = (raised(evaluate, elbo()) for elbo in (host.library.infer.Trace_ELBO, host.flow.TraceFlow_ELBO))
    assert theirs == ours
    assert theirs != ([], None, None)


def test_arguments_reach_model_and_guide():
    """Traced, keyword and static arguments reach model and guide in NumPyro; with the same key each step is the host's."""

    def part(guide, x, *, y, twice):
        loc = m(NUMPYRO) if guide else 0.0
        w = numpyro.sample("w", numpyro.distributions.Normal(loc + x, 2.0 if twice else 1.0))
        if not guide:
            numpyro.sample("y", numpyro.distributions.Normal(w, 1.0), obs=y)

    def step(elbo):
        run = numpyro.infer.SVI(partial(part, False), partial(part, True), numpyro.optim.Adam(0.1), elbo, twice=True)
        state = run.init(jax.random.key(0), 0.3, y=1.2)
        state, loss = jax.jit(run.update)(state, 0.5, y=1.4)
        return loss, run.get_params(state), run.evaluate(state, -0.5, y=0.1)

    assert_same(step(numpyro.infer.Trace_ELBO()), step(flowvi.numpyro.TraceFlow_ELBO()))


def test_pyro_arguments_reach_model_and_guide():
    def part(guide, x, *, y):
        w = pyro.sample("w", normal(PYRO, (m(PYRO) if guide else 0.0) + x))
        if not guide:
            observe(PYRO, w, value=y)

    def step(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        run = pyro.infer.SVI(partial(part, False), partial(part, True), pyro.optim.Adam({"lr": 0.1}), elbo)
        x = torch.tensor(0.5)
        return (
            run.step(x, y=1.4),
            run.evaluate_loss(x, y=0.3),
            float(elbo(partial(part, False), partial(part, True))(x, y=1.4).detach()),
        )

    assert_same(step(pyro.infer.Trace_ELBO()), step(flowvi.pyro.TraceFlow_ELBO()))


def constant_costs():
    """A latent in a plate, and costs that depend on no draw, so their value is the same for any number of particles."""

    def guide(h):
        h.sample("w", normal(h, m(h), s(h)))

    def model(h):
        h.sample("w", normal(h, 0.0))
        h.factor("f", h.array(0.7))
        observe(h, h.array(0.2))

    return guide, model


VALUED = {
    **{name: PROGRAMS[name] for name in ("plain", "subsampled plate", "nested plates", "mask")},
    "constant costs": constant_costs(),
}


@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 4, "vectorize_particles": True}, {"num_particles": 4, "vectorize_particles": False}]
)
@pytest.mark.parametrize("program", VALUED)
def test_the_value_does_not_depend_on_the_estimator(host, program, options):
    """With LR the loss has the value of Trace_ELBO at the same draws."""
    guide, model = bind(host, VALUED[program])
    elbos = host.library.infer.Trace_ELBO(**options), host.flow.TraceFlow_ELBO(default=LR(), **options)
    if host is NUMPYRO:
        assert_same(*jax.jit(lambda: [elbo.loss(jax.random.key(3), {}, model, guide) for elbo in elbos])())
        return
    values = []
    for elbo in elbos:
        pyro.set_rng_seed(3)
        values.append(elbo.loss(model, guide))
    assert_same(*values)


def test_numpyro_in_single_precision():
    numpyro.enable_x64(False)
    for program in ("plain", "subsampled plate"):
        theirs, ours = both(NUMPYRO, PROGRAMS[program], num_particles=2)
        assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype("float32")}
        assert_same(theirs, ours, rtol=2e-5)


# ---- Pyro's modules and parameter store


class Local(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.3))
        self.scale = PyroParam(torch.tensor(0.8), constraint=pyro.distributions.constraints.positive)

    def forward(self):
        pyro.sample("w", normal(PYRO, self.loc, self.scale))


def test_pyro_module_local_params():
    """The gradients are right if parameters are in their module and not in the store."""

    def gradient(elbo):
        with pyro.settings.context(module_local_params=True):
            guide = Local()
            pyro.set_rng_seed(0)
            loss = elbo(lambda: observe(PYRO, pyro.sample("w", normal(PYRO, 0.0))), guide)()
            loss.backward()
            assert not len(pyro.get_param_store())
            return loss.detach(), {name: p.grad for name, p in guide.named_parameters()}

    assert_same(gradient(pyro.infer.Trace_ELBO(2)), gradient(flowvi.pyro.TraceFlow_ELBO(2)))


@pytest.mark.skipif(not at_least("pyro-ppl", 1, 9, 2), reason="Pyro 1.9.1 cannot load what it has saved with torch 2.6 or newer")
def test_pyro_checkpoint(tmp_path):
    """The parameters and the optimizer, saved and loaded by Pyro, are the whole state."""

    def objective():
        return flowvi.pyro.TraceFlow_ELBO(4, default=LR())

    fit(PYRO, MIXED, objective(), 3)
    run = svi(PYRO, MIXED, objective())
    run.step()
    pyro.get_param_store().save(tmp_path / "params")
    run.optim.save(tmp_path / "optimizer")

    def go_on(run):
        pyro.set_rng_seed(7)
        return [run.step() for _ in range(3)], {name: p.detach().clone() for name, p in pyro.get_param_store().items()}

    expected = go_on(run)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "params")
    fresh = svi(PYRO, MIXED, objective())
    fresh.optim.load(tmp_path / "optimizer")
    assert_same(expected, go_on(fresh), rtol=0)

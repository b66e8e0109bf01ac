"""Compiled steps in Pyro equal those of SVI at the same draws, and refuse values that the graph would freeze."""

import shutil
import warnings
from copy import deepcopy
from functools import partial

import estimators
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hosts import HOSTS, at_least
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from svi_programs import ESTIMATORS, MIXED, PROGRAMS, bind, m, normal, observe, s
from test_every_estimator import THETA, of_row

import flowvi.pyro.generators
from flowvi import LR, Enumerate, FiniteDifference
from flowvi.pyro import CompiledSVI, JitTraceFlow_ELBO, JitTraceFlow_RenyiELBO, TraceFlow_ELBO, TraceFlow_RenyiELBO
from flowvi.pyro.arguments import Arguments
from flowvi.pyro.compiled import CompiledLoss
from flowvi.pyro.operations import Operations

PYRO = HOSTS["pyro"]


def initialize(values):
    pyro.clear_param_store()
    for name, value in values.items():
        pyro.param(name, PYRO.array(value))


def gradients():
    return {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}


def step_of_graph(elbo, model, guide, *args, init=None):
    """Loss and gradients of a graph, without a compiler."""
    initialize(init or {})
    elbo.loss_and_grads(model, guide, *args)
    compiled, arguments = CompiledLoss(elbo, model, guide, "eager"), Arguments.of(args, {})
    compiled.prepare(arguments, tuple(pyro.get_param_store()))
    pyro.set_rng_seed(0)
    value = compiled(arguments)
    return float(value.loss), value.gradients


def step_of_host(elbo, model, guide, *args, init=None):
    """Loss and gradients without a graph, at the draws of the graph."""
    initialize(init or {})
    with pyro.validation_enabled(False), pytest.MonkeyPatch.context() as patch, Operations():
        patch.setattr(flowvi.pyro.generators, "is_tracing", lambda: True)
        elbo.loss_and_grads(model, guide, *args)
        initialize(init or {})
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(model, guide, *args)
    return loss, gradients()


def assert_same_step(elbo, model, guide, *args, init=None):
    (loss, of_graph), (theirs, of_host) = (step(elbo, model, guide, *args, init=init) for step in (step_of_graph, step_of_host))
    np.testing.assert_allclose(loss, theirs, rtol=1e-10)
    assert set(of_graph) == set(of_host)
    for name, gradient in of_host.items():
        np.testing.assert_allclose(of_graph[name], gradient, rtol=1e-9, atol=1e-12)


FAST = ("LR, optimal", "AdaptiveFlow, q", "MeasureValued")
OF_ESTIMATORS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in estimators.ROWS]


@pytest.mark.parametrize("name", OF_ESTIMATORS)
def test_every_estimator(name):
    """Loss and gradients are the same at the same draws, also those of learned parameters."""

    def run(params, model, guide, plates, **options):
        assert_same_step(TraceFlow_ELBO(max_plate_nesting=plates, **options), model, guide, init=params)
        return 0.0, dict.fromkeys(THETA)

    of_row(PYRO, estimators.ROWS[name], run=run)


SUBSAMPLED = "subsampled plate"
OF_PROGRAMS = [
    pytest.param(name, elbo, marks=() if name == SUBSAMPLED else pytest.mark.slow)
    for name in PROGRAMS
    for elbo in (TraceFlow_ELBO, TraceFlow_RenyiELBO)
    if (name, elbo) != (SUBSAMPLED, TraceFlow_RenyiELBO)  # a bound refuses this program
]


@pytest.mark.parametrize(("name", "elbo"), OF_PROGRAMS)
def test_programs(name, elbo):
    guide, model = bind(PYRO, PROGRAMS[name])
    assert_same_step(elbo(num_particles=2, max_plate_nesting=2), model, guide)


OBJECTIVES = {
    "one": TraceFlow_ELBO(estimators=ESTIMATORS),
    "looped": TraceFlow_ELBO(3, estimators=ESTIMATORS),
    "vectorized": TraceFlow_ELBO(3, 1, vectorize_particles=True, estimators=ESTIMATORS),
    "graph": TraceFlow_ELBO(estimators=ESTIMATORS, dependencies="graph"),
    "sticking the landing": TraceFlow_ELBO(estimators=ESTIMATORS, entropy="stl"),
    "closed forms": TraceFlow_ELBO(estimators=ESTIMATORS, entropy="analytic"),
    "sums": TraceFlow_ELBO(estimators={**ESTIMATORS, "k": Enumerate()}),
    "bound": TraceFlow_RenyiELBO(0.5, 3, 1, vectorize_particles=True, estimators=ESTIMATORS),
}


SLOW = ("one", "looped", "sticking the landing")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OBJECTIVES])
def test_objectives(name):
    guide, model = bind(PYRO, MIXED)
    assert_same_step(OBJECTIVES[name], model, guide)


def test_sums_over_sites_with_random_sites_below():
    """The runs of an exact sum draw the sites below with the same noise."""

    def program(logits, h=PYRO):
        k = pyro.sample("k", dist.Bernoulli(logits=logits))
        x = pyro.sample("x", dist.Normal(k, 1.0))
        j = pyro.sample("j", dist.Bernoulli(logits=x + k))
        return k + x * j

    def guide():
        program(m(PYRO))

    def model():
        observe(PYRO, program(PYRO.array(0.0)))

    assert_same_step(TraceFlow_ELBO(estimators={"k": Enumerate(), "j": FiniteDifference()}), model, guide)


# ---- whole steps


def data_model(y):
    w = pyro.sample("w", normal(PYRO, 0.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(w, 0.7), obs=y)


def data_guide(y):
    pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)))


DATA = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "Adam, foreach": lambda: pyro.optim.Adam({"lr": 0.05, "foreach": True}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 2.0, "weight_decay": 0.1}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.05}),
    "by parameter": lambda: pyro.optim.SGD(lambda name: {"lr": 0.01} if name == "m" else {"lr": 0.02, "momentum": 0.9}),
    "clipped": lambda: pyro.optim.RMSprop({"lr": 0.05}, {"clip_norm": 0.5}),
}
if at_least("pyro-ppl", 1, 9, 2):
    OPTIMIZERS["ClippedAdam, centered"] = lambda: pyro.optim.ClippedAdam({"lr": 0.05, "centered_variance": True})


def fit(kind, optim, steps=6, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = kind(data_model, data_guide, optim, TraceFlow_ELBO(), **options)
    losses = [svi.step(DATA) for _ in range(steps)]
    return losses, {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_svi(name):
    (theirs, their_parameters), (ours, our_parameters) = (
        fit(SVI, OPTIMIZERS[name]()),
        fit(CompiledSVI, OPTIMIZERS[name](), backend="eager"),
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    for parameter, value in their_parameters.items():
        np.testing.assert_allclose(our_parameters[parameter], value, rtol=1e-10)


# a warning of torch when inductor is imported
inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@inductor
@needs_a_compiler
def test_inductor():
    """Compiled, subsampled steps are those of SVI, and each makes new draws."""
    guide, model = bind(PYRO, PROGRAMS["subsampled plate"])
    runs = []
    for kind, options in ((SVI, {}), (CompiledSVI, {})):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceFlow_ELBO(), **options)
        losses = [svi.step() for _ in range(5)]
        runs.append([*losses, *(p.detach().clone() for p in pyro.get_param_store().values())])
    assert len(set(losses)) == 5
    for theirs, ours in zip(*runs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def compiled_svi(model, guide, elbo=None, optim=None, backend="eager"):
    return CompiledSVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), elbo or TraceFlow_ELBO(), backend=backend)


def test_batches_of_other_sizes():
    """A batch size is compiled when it comes for the second time, with one warning. The steps are those of SVI."""
    sizes = [6, 6, 6, 4, 6, 4, 4, 3]
    losses = []
    for kind in (lambda *args: SVI(*args), lambda *args: CompiledSVI(*args, backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = kind(data_model, data_guide, pyro.optim.Adam({"lr": 0.05}), TraceFlow_ELBO())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append([svi.step(DATA[:size]) for size in sizes])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-10)
    assert len(svi._loss_and_gradients._compiled) == 2
    (warning,) = (w for w in caught if "have changed their shapes" in str(w.message))
    assert warning.filename == __file__


def test_arguments_that_are_no_tensors():
    def model(*, y, times):
        w = pyro.sample("w", normal(PYRO, 0.0))
        observe(PYRO, times * w, value=y)

    def guide(*, y, times):
        data_guide(y)

    svi = compiled_svi(model, guide)
    with pytest.warns(UserWarning, match="or the values of arguments that are not tensors"):
        losses = [svi.evaluate_loss(y=0.4, times=times) for times in (1, 1, 2, 2)]
    assert all(map(np.isfinite, losses))
    with pytest.raises(TypeError, match="hashable values as arguments of a compiled step, found ndarray"):
        svi.step(y=np.zeros(2), times=1)
    with pytest.raises(ValueError, match="arguments that do not require a gradient"):
        svi.step(y=torch.zeros(2, requires_grad=True), times=1)


def test_what_the_program_closes_over_may_change_in_place():
    y = torch.zeros(3, dtype=torch.float64)

    def model():
        pyro.factor("y", y.sum() * pyro.param("m"))

    def guide():
        pyro.param("m", torch.ones((), dtype=torch.float64))

    svi = compiled_svi(model, guide)
    assert [svi.evaluate_loss() for _ in range(3)] == [0.0] * 3
    y += 1
    assert svi.evaluate_loss() == -3.0


def test_indices_and_masks():
    """A scalar draw may be an index, and a mask may be closed over or computed from constants."""
    closed = DATA > 0

    def guide(y):
        k = pyro.sample("k", dist.Categorical(logits=pyro.param("l", torch.zeros(3))), infer={"estimator": LR()})
        pyro.sample("w", normal(PYRO, m(PYRO) + torch.arange(3.0)[k], s(PYRO)))

    def model(y):
        pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
        w = pyro.sample("w", normal(PYRO, 0.0))
        observe(PYRO, w + y[closed].sum() + y[torch.arange(6) < 2].sum())

    assert_same_step(TraceFlow_ELBO(), model, guide, DATA)


def test_statistics_that_change_in_place():
    """The statistics of a BatchNorm change once at each step, also at the step that compiles."""

    def model(y):
        data_model(network(y[:, None])[:, 0])

    runs = []
    for kind, options in ((SVI, {}), (CompiledSVI, {"backend": "eager"})):
        network = torch.nn.BatchNorm1d(1).double()
        svi = kind(model, data_guide, pyro.optim.Adam({"lr": 0.05}), TraceFlow_ELBO(), **options)
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        runs.append([*(svi.step(DATA) for _ in range(4)), network.running_mean.item(), network.num_batches_tracked.item()])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-10)


# ---- in Pyro's own SVI


@pytest.mark.parametrize("bound", [False, True])
def test_jit(bound):
    """Losses, parameters and gradients are those of the objective without compilation."""
    kinds = (TraceFlow_RenyiELBO, JitTraceFlow_RenyiELBO) if bound else (TraceFlow_ELBO, JitTraceFlow_ELBO)
    runs = []
    for kind in kinds:
        elbo = kind(num_particles=2, **({} if kind is kinds[0] else {"backend": "eager"}))
        (theirs, parameters) = fit(lambda *args, elbo=elbo: SVI(*args[:3], elbo), pyro.optim.Adam({"lr": 0.05}), steps=4)
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(data_model, data_guide, DATA)
        (2 * loss).backward()
        runs.append([*theirs, loss.item(), *parameters.values(), *gradients().values()])
    for theirs, ours in zip(*runs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    loss = elbo.differentiable_loss(data_model, data_guide, DATA)
    leaf = pyro.param("m")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative because of its compilation"):
        torch.autograd.grad(gradient, leaf)


def test_jit_takes_the_options_of_pyro():
    options = {"num_particles": 2, "ignore_jit_warnings": True, "jit_options": {"optimize": False}}
    assert JitTraceFlow_ELBO(**options).num_particles == pyro.infer.JitTrace_ELBO(**options).num_particles


# ---- parameters


def test_parameters_live_in_the_store():
    """Parameters stay in the store, also in modules and under constraints, and values set between steps are used."""
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1).double()

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.ones((), dtype=torch.float64), dist.constraints.positive)

        def forward(self, y):
            loc = pyro.module("network", network)(torch.ones(1, dtype=torch.float64)).sum()
            pyro.sample("w", dist.Normal(loc, self.scale))

    guide = Guide()
    svi = compiled_svi(data_model, guide)
    leaves = {}
    for _ in range(4):
        svi.step(DATA)
        store = pyro.get_param_store()
        assert set(store) == {"network$$$weight", "network$$$bias", "scale"}
        for name, leaf in store.named_parameters():
            assert leaves.setdefault(name, leaf) is leaf
            assert leaf.grad is None
    assert store._params["network$$$bias"] is network.bias
    assert guide.scale == store["scale"] > 0
    with torch.no_grad():
        guide.scale_unconstrained.fill_(-30.0)
        network.weight.fill_(0.0)
        network.bias.fill_(2.0)
    losses = []
    for evaluate in (svi.evaluate_loss, svi.evaluate_loss, partial(TraceFlow_ELBO().loss, data_model, guide)):
        pyro.set_rng_seed(0)
        losses.append(evaluate(DATA))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)


def test_a_parameter_with_two_names():
    def guide(y):
        leaf = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        pyro.sample("w", dist.Normal(pyro.param("one", leaf) * pyro.param("two", pyro.param("one")), 1.0))

    runs = []
    for kind, options in ((SVI, {}), (CompiledSVI, {"backend": "eager"})):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = kind(data_model, guide, pyro.optim.Adam({"lr": 0.05}), TraceFlow_ELBO(), **options)
        runs.append([*(svi.step(DATA) for _ in range(4)), pyro.param("one").item(), pyro.param("two").item()])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-10)


def test_a_store_that_is_cleared_or_loaded():
    svi = compiled_svi(data_model, data_guide)
    svi.run(4, DATA, progress_bar=False)
    state = deepcopy(pyro.get_param_store().get_state())
    saved = pyro.param("m").item()
    svi.run(4, DATA, progress_bar=False)
    pyro.clear_param_store()
    svi.step(DATA)
    assert abs(pyro.param("m").item() - 0.3) < 0.06
    pyro.get_param_store().set_state(state)  # as load() does, which in Pyro 1.9.1 cannot read what it has saved with torch 2.6 or newer
    assert pyro.param("m").item() == saved
    svi.run(3, DATA, progress_bar=False)
    assert 0 < abs(pyro.param("m").item() - saved) < 0.16


def test_a_store_that_is_cleared_before_anything_is_compiled(capsys):
    svi = compiled_svi(data_model, data_guide)
    svi.step(DATA)
    pyro.clear_param_store()
    svi.run(3, DATA)
    assert "3/3" in capsys.readouterr().err
    assert 0 < abs(pyro.param("m").item() - 0.3) < 0.16


def test_a_decaying_rate_starts_anew_after_the_store_is_cleared():
    found = []
    for make in (SVI, partial(CompiledSVI, backend="eager")):
        svi = make(data_model, data_guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.5}), TraceFlow_ELBO())
        for _ in range(4):
            svi.step(DATA)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi.step(DATA)
        found.append(pyro.param("m").item())
        pyro.clear_param_store()
    assert abs(found[0] - found[1]) < 1e-6


def test_the_state_of_the_optimizer_is_that_of_svi():
    """A state saved after compiled steps can be loaded by SVI, and the other way around; the next steps are the same."""
    for optimizer in ("Adam", "ClippedAdam"):
        losses = []
        for kinds in ((SVI, SVI), (CompiledSVI, SVI), (SVI, CompiledSVI)):
            pyro.clear_param_store()
            pyro.set_rng_seed(1)
            first, second = OPTIMIZERS[optimizer](), OPTIMIZERS[optimizer]()
            for kind, optim, steps in zip(kinds, (first, second), (4, 3), strict=True):
                svi = kind(data_model, data_guide, optim, TraceFlow_ELBO(), **({"backend": "eager"} if kind is CompiledSVI else {}))
                of_kind = [svi.step(DATA) for _ in range(steps)]
                second.set_state(first.get_state())
            losses.append(of_kind)
        for ours in losses[1:]:
            np.testing.assert_allclose(ours, losses[0], rtol=1e-9)


@pytest.mark.parametrize("optim", [pyro.optim.Adam, pyro.optim.ClippedAdam])
def test_two_programs_that_share_an_optimizer(optim):
    """Two programs share the optimizer's state of common parameters, as in Pyro."""

    def model():
        pyro.sample("x", dist.Normal(1.0, 1.0))

    def guide():
        pyro.sample("x", dist.Delta(pyro.param("m", torch.tensor(0.1))))

    def other():
        pyro.sample("x", dist.Delta(pyro.param("m", torch.tensor(0.1)) * pyro.param("k", torch.tensor(0.7))))

    def trained(svi):
        pyro.clear_param_store()
        shared = optim({"lr": 0.1})
        both = [svi(model, g, shared, TraceFlow_ELBO()) for g in (guide, other)]
        for _ in range(2):  # the second time with new parameters
            pyro.clear_param_store()
            for one in both * 4:
                one.step()
        return [pyro.param(name).item() for name in ("m", "k")]

    np.testing.assert_allclose(trained(partial(CompiledSVI, backend="eager")), trained(SVI), rtol=1e-12)


def test_a_decaying_average_of_costs():
    """Pyro's decaying average baseline sets a parameter at each step."""

    def guide():
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.5}
        pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)), infer={"estimator": LR(), "baseline": baseline})

    def model():
        observe(PYRO, pyro.sample("w", normal(PYRO, 0.0)))

    averages = []
    for kind, elbo, options in (
        (SVI, TraceFlow_ELBO(), {}),
        (CompiledSVI, TraceFlow_ELBO(), {"backend": "eager"}),
        (SVI, JitTraceFlow_ELBO(backend="eager"), {}),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo, **options)
        averages.append([])
        for _ in range(5):
            svi.step()
            averages[-1].append(pyro.param("__baseline_avg_downstream_cost_w").item())
    for ours in averages[1:]:
        np.testing.assert_allclose(ours, averages[0], rtol=1e-10)


# ---- refusals


def looks(k):
    return 1.0 if k > 0 else 2.0


def not_a_constant(k):
    """A tensor that is changed through a view of it."""
    numbers = torch.zeros(2)
    numbers[:1].copy_(k)
    return 1.0 if numbers.sum() > 0 else 2.0


READS = {
    "if": looks,
    "item": lambda k: k.item(),
    "tolist": lambda k: k.reshape(1).tolist()[0],
    "numpy": lambda k: float(np.asarray(k.detach())),
    "list": lambda k: torch.tensor([k, 1.0]).sum(),
    "old constructor": lambda k: torch.Tensor([k, 1.0]).sum(),
    "not a constant": not_a_constant,
    "mask": lambda k: torch.ones(1)[k.reshape(1) > 0].sum(),
}


@pytest.mark.parametrize("name", READS)
def test_python_that_looks_at_a_draw(name):
    """Python code that looks at a draw is refused; the message names the draw and the line."""

    def guide():
        pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)))
        pyro.sample("k", dist.Bernoulli(logits=m(PYRO)))

    def model():
        pyro.sample("w", normal(PYRO, 0.0))
        k = pyro.sample("k", dist.Bernoulli(PYRO.array(0.5)))
        observe(PYRO, PYRO.array(0.0) + READS[name](k))

    svi = compiled_svi(model, guide)
    svi.step()
    with pytest.raises(
        ValueError, match=r"^site 'k': expected operations on tensors, .* that Python looks at numbers, by .*compiled\.py:\d+"
    ):
        svi.step()
    svi.loss.differentiable_loss(model, guide)  # the failed trace leaves nothing behind


def test_a_distribution_that_looks_at_numbers():
    def guide():
        pyro.sample("angle", dist.VonMises(m(PYRO), 2.0), infer={"estimator": LR()})

    def model():
        pyro.sample("angle", dist.VonMises(PYRO.array(0.0), 1.0))

    svi = compiled_svi(model, guide)
    svi.step()
    with pytest.raises(ValueError, match="^site 'angle': .* that its distribution or its estimator looks at numbers"):
        svi.step()


def test_python_that_looks_at_an_argument():
    def model(y):
        data_model(y if y[0] > 0 else -y)

    svi = compiled_svi(model, data_guide)
    svi.step(DATA)
    with pytest.raises(ValueError, match="^expected operations on tensors"):
        svi.step(DATA)


def test_what_is_not_the_same_in_two_runs():
    rng, count = np.random.default_rng(0), iter(range(100))

    def guide():
        pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)))

    def by_numpy():
        observe(PYRO, pyro.sample("w", normal(PYRO, 0.0)) + PYRO.array(rng.normal()))

    def by_count():
        observe(PYRO, pyro.sample("w", normal(PYRO, 0.0)) * next(count))

    for model, what in ((by_numpy, "constants"), (by_count, "operations")):
        svi = compiled_svi(model, guide)
        svi.step()
        with pytest.raises(ValueError, match=f"expected the same {what} in two runs of the program, found .* Draw with torch"):
            svi.step()


def test_other_refusals():
    with pytest.raises(TypeError, match="expected a TraceFlow_ELBO or a TraceFlow_RenyiELBO of flowvi.pyro, found Trace_ELBO"):
        compiled_svi(data_model, data_guide, pyro.infer.Trace_ELBO())
    scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.1})
    with pytest.raises(TypeError, match=r"expected an optimizer of pyro\.optim without a scheduler, .* found PyroLRScheduler"):
        compiled_svi(data_model, data_guide, optim=scheduler)
    with pytest.raises(ValueError, match="backend: expected 'inductor' or 'eager', found 'xla'"):
        compiled_svi(data_model, data_guide, backend="xla")
    with pytest.raises(RuntimeError, match="a step outside of all handlers of Pyro"), pyro.poutine.scale(scale=2.0):
        compiled_svi(data_model, data_guide).step(DATA)


@inductor
def test_without_a_compiler():
    svi = compiled_svi(data_model, data_guide, backend="inductor")
    svi.step(DATA)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with without, pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler, .* or use backend='eager'"):
        svi.step(DATA)

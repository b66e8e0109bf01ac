"""Pyro's SVI with TraceFlow_ELBO: the methods of the loss, modules, and the state between steps."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from hosts import HOSTS
from pyro.nn import PyroModule, PyroParam
from svi_programs import (
    DATA,
    INIT,
    MIXED,
    OPTIONS,
    PROGRAMS,
    assert_same,
    bind,
    both,
    m,
    mixed,
    normal,
    observe,
    s,
    svi,
)

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP

PYRO = HOSTS["pyro"]


def sequential():
    def guide(h):
        w = h.sample("w", normal(h, m(h), s(h)))
        for i in pyro.plate("n", 6, subsample_size=4):
            h.sample(f"z_{i}", normal(h, w + h.param("l", h.array(INIT["l"]))[i], s(h)))

    def model(h):
        w = h.sample("w", normal(h, 0.0))
        for i in pyro.plate("n", 6, subsample_size=4):
            observe(h, h.sample(f"z_{i}", normal(h, w)), name=f"y_{i}", value=DATA[int(i)])

    return guide, model


@pytest.mark.parametrize("options", [{}, {"num_particles": 4}])
def test_pyro_sequential_plate(options):
    assert_same(*both(PYRO, sequential(), **options))


ALL_PYRO = pytest.mark.parametrize("options", list(OPTIONS["pyro"].values()), ids=list(OPTIONS["pyro"]))


def seeded(f, *args):
    pyro.set_rng_seed(5)
    return f(*args)


def gradients():
    """The gradients in the parameter store, which it then clears."""
    found = {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}
    for _, p in pyro.get_param_store().named_parameters():
        p.grad = None
    return found


@ALL_PYRO
def test_pyro_faces_of_the_loss(options):
    """loss, evaluate_loss, differentiable_loss and loss_and_grads have the same value and the same derivative."""
    guide, model = bind(PYRO, MIXED)
    elbo = mixed(PYRO, **options)
    run = svi(PYRO, MIXED, elbo)
    elbo.loss(model, guide)  # the first call draws once more, to guess the nesting
    total = seeded(elbo.loss_and_grads, model, guide)
    expected = gradients()
    assert isinstance(total, float)
    surrogate = seeded(elbo.differentiable_loss, model, guide)
    surrogate.backward()
    assert_same((total, expected), (surrogate.detach(), gradients()))
    for value in (seeded(elbo.loss, model, guide), seeded(run.evaluate_loss)):
        assert isinstance(value, float)
        assert_same(total, value)
    with torch.no_grad():
        assert not seeded(elbo.differentiable_loss, model, guide).requires_grad
    assert_same(total, seeded(run.step))


@ALL_PYRO
def test_pyro_loss_is_that_of_trace_elbo(options):
    guide, model = bind(PYRO, PROGRAMS["subsampled plate"])
    assert_same(*(seeded(elbo(**options).loss, model, guide) for elbo in (pyro.infer.Trace_ELBO, flowvi.pyro.TraceFlow_ELBO)))


def test_pyro_svi_step():
    """Five steps end in the same parameters as with Trace_ELBO."""

    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        run = svi(PYRO, PROGRAMS["subsampled plate"], elbo)
        return [run.step() for _ in range(5)], {name: p.detach().clone() for name, p in pyro.get_param_store().items()}

    assert_same(run(pyro.infer.Trace_ELBO(2)), run(flowvi.pyro.TraceFlow_ELBO(2)))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(torch.tensor(0.3))
        self.s = PyroParam(torch.tensor(0.8), constraint=pyro.distributions.constraints.positive)
        self.logit = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        pyro.sample("w", normal(PYRO, self.m, self.s))
        pyro.sample("k", PYRO.dist.Bernoulli(logits=self.logit))


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, y):
        w = pyro.sample("w", normal(PYRO, 0.0))
        k = pyro.sample("k", PYRO.dist.Bernoulli(PYRO.array(0.5)))
        with pyro.plate("n", len(y)):
            pyro.sample("y", normal(PYRO, w + 2 * self.b * k, 0.7), obs=y)


@pytest.mark.parametrize("vectorize", [False, True])
def test_pyro_module_with_a_torch_optimizer(vectorize):
    elbo = flowvi.pyro.TraceFlow_ELBO(4, vectorize_particles=vectorize)(Model(), Guide())
    assert isinstance(elbo, torch.nn.Module)
    y, losses = torch.tensor([2.3, 2.6]), []
    elbo(y)
    assert {name for name, _ in elbo.named_parameters()} == {"model.b", "guide.m", "guide.s_unconstrained", "guide.logit"}
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = elbo(y)
        loss.backward()
        assert all(p.grad is not None for p in elbo.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < np.mean(losses[:10]) - 1
    assert elbo.guide.logit > 0.5


@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_pyro_retain_graph(options):
    """Two steps may share a graph only with retain_graph=True, with score terms and without."""
    leaf = torch.tensor(0.2, requires_grad=True)
    shared = leaf.exp()

    def guide():
        pyro.sample("w", normal(PYRO, PYRO.array(0.0), shared))
        pyro.sample("k", PYRO.dist.Bernoulli(logits=shared))

    def model():
        w = pyro.sample("w", normal(PYRO, 0.0))
        observe(PYRO, w + pyro.sample("k", PYRO.dist.Bernoulli(PYRO.array(0.5))))

    kept = flowvi.pyro.TraceFlow_ELBO(retain_graph=True, **options)
    for _ in range(2):
        leaf.grad = None
        seeded(kept.loss_and_grads, model, guide)
        assert leaf.grad is not None
    again = seeded(kept.differentiable_loss, model, guide)
    expected = leaf.grad
    (gradient,) = torch.autograd.grad(again, leaf)
    assert_same(expected, gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        flowvi.pyro.TraceFlow_ELBO(**options).loss_and_grads(model, guide)


@pytest.mark.parametrize(("program", "depth"), [("plain", 0), ("subsampled plate", 1), ("nested plates", 2)])
def test_pyro_guesses_the_nesting(program, depth):
    guide, model = bind(PYRO, PROGRAMS[program])
    elbo = flowvi.pyro.TraceFlow_ELBO(3, vectorize_particles=True, default=LR() if program != "transformed" else RP())
    assert elbo.max_plate_nesting == float("inf")
    elbo.loss_and_grads(model, guide)
    assert elbo.max_plate_nesting == depth + 1


def test_pyro_without_warnings():
    """No warning: torch warns if a tensor that requires a gradient becomes a float."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in OPTIONS["pyro"].values():
            run = svi(PYRO, MIXED, mixed(PYRO, **options))
            run.step()
            run.evaluate_loss()
    assert not caught


def test_pyro_a_loss_without_parameters():
    def guide(h):
        h.sample("w", normal(h, 0.0))

    def model(h):
        observe(h, h.sample("w", normal(h, 0.0)))

    bound = bind(PYRO, (guide, model))[::-1]
    assert_same(*(seeded(elbo().loss_and_grads, *bound) for elbo in (pyro.infer.Trace_ELBO, flowvi.pyro.TraceFlow_ELBO)))


def test_pyro_an_annotation_of_the_model_belongs_to_its_run():
    """A model's annotation whose proposal reads a parameter uses its current value."""
    seen = []

    def guide():
        pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)))

    def model():
        c = pyro.param("c", PYRO.array(1.5), constraint=pyro.distributions.constraints.positive)

        def q(p):
            seen.append(c.item())
            return PYRO.dist.Normal(p.loc, c * p.scale)

        observe(PYRO, pyro.sample("w", normal(PYRO, 0.0, c), infer={"estimator": LR(q=q)}))

    run = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), flowvi.pyro.TraceFlow_ELBO())
    present = 1.5
    for _ in range(4):
        run.step()
        assert seen[-1] == present
        present = pyro.param("c").item()
    assert present != 1.5


@pytest.mark.parametrize("objective", ["ELBO", "ELBO, graph", "RenyiELBO"])
def test_pyro_a_factor_of_the_model_under_a_messenger_guide(objective):
    """A GuideMessenger runs the model, so a factor of the model appears while the guide draws; it still belongs to the model."""

    def model():
        w = pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        pyro.factor("f", -((w - 0.7) ** 2))
        observe(PYRO, w)

    def loss_and_grads(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = pyro.infer.autoguide.AutoNormalMessenger(model)
        guide()
        loss = elbo.loss_and_grads(model, guide)
        return loss, {name: p.grad.numpy() for name, p in pyro.get_param_store().named_parameters()}

    theirs, ours = {
        "ELBO": (pyro.infer.Trace_ELBO(3), flowvi.pyro.TraceFlow_ELBO(3)),
        "ELBO, graph": (pyro.infer.Trace_ELBO(3), flowvi.pyro.TraceFlow_ELBO(3, dependencies="graph")),
        "RenyiELBO": (pyro.infer.RenyiELBO(num_particles=3), flowvi.pyro.TraceFlow_RenyiELBO(num_particles=3)),
    }[objective]
    assert_same(loss_and_grads(theirs), loss_and_grads(ours))


def test_pyro_a_program_without_sites():
    elbo = flowvi.pyro.TraceFlow_ELBO()
    for loss in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        assert loss(lambda: None, lambda: None) == 0


def test_a_control_variate_after_an_empty_batch():
    def model(n):
        pyro.sample("x", pyro.distributions.Normal(torch.zeros(n), 1.0).to_event(1))

    def guide(n):
        pyro.sample("x", pyro.distributions.Normal(pyro.param("m", torch.tensor(0.3)).expand(n), 1.0).to_event(1))

    estimator = RP(control_variate="quadratic", shared=True)
    elbo = flowvi.pyro.TraceFlow_ELBO(estimators={"x": estimator})
    for n, expected in ((0, RP()), (2, estimator)):
        elbo.loss(model, guide, n)
        assert elbo.describe(model, guide, n)[0].estimator == expected

"""Scores and flows at the guide's sites of programs whose model has sites that the host sums out.

Let C be the cost that multiplies the score of one element of a site. The estimate is unbiased if C minus the whole ELBO does not depend
on that element. No site of these guides depends on another one. So a change of one element changes no other draw, and C and the ELBO
must change by the same number.
"""

from collections.abc import Callable
from functools import cache

import funsor
import jax
import numpy as np
import pyro
import pytest
from hosts import HOSTS, always, each, taken_gradients
from marginal_programs import PROGRAMS
from svi_programs import assert_same

import flowvi.numpyro.distributions
import flowvi.objectives.elbo
import flowvi.pyro.distributions
import flowvi.tape
from flowvi import LR, Flow, ImplicitRP, proposals


@pytest.fixture(autouse=True)
def _funsor_with_jax():
    funsor.set_backend("jax")


def half(x, p):
    return 0.5


def inwards(x, p):
    return 0.3 * x * (1 - x)


CHOSEN = {
    "mixture by AutoNormal": {"weight": LR(), "loc": Flow(loc=half), "scale": ImplicitRP()},
    "topics": {"of_topic": LR(), "proportions": LR(q=proposals.tempered(1.1))},
    "hidden Markov model": {"transition": LR(), "loc": Flow(loc=half)},
    "regressions": {"weight": Flow(concentration1=inwards), "slope": LR()},
    "counts": {"rate": Flow(loc=half), "gate": LR()},
    "autoencoder": {"code": Flow(loc=half)},
    "captures": {"survival": LR(), "capture": Flow(concentration0=inwards)},
    "annotators": {"prevalence": LR(), "confusion": LR()},
    "nested": {"loc": Flow(loc=half), "spread": LR()},
}  # the tenth has an AutoDelta, which draws nothing


def objective(host, library, nesting, **options):
    """An objective of flowvi or of the host."""
    return library(**options, **({"max_plate_nesting": nesting} if host.name == "pyro" else {}))


class Moves:
    """Moves elements of the draws halfway to a number in every support, and collects the cost of each score."""

    def __init__(self, host, monkeypatch):
        self.host = host
        self.shapes, self.costs, self.moved = {}, {}, {}
        attach, make_score = flowvi.pyro.distributions.attach, flowvi.objectives.elbo.make_score

        def attach_elsewhere(ops, target, estimator, x):
            self.shapes[target.name] = x.shape[: target.batch_ndim]
            if (moved := self.moved.get(target.name)) is not None:
                inside = 1 / x.shape[-1] if target.event_ndim else 0.7
                x = x + 0.5 * moved.reshape((*moved.shape, *(1,) * (x.ndim - moved.ndim))) * (inside - x)
            return attach(ops, target, estimator, x)

        def collect(ops, name, score, cost, *rest):
            self.costs[name] = cost
            return make_score(ops, name, score, cost, *rest)

        monkeypatch.setattr(flowvi.objectives.elbo, "make_score", collect)
        for adapter in (flowvi.pyro.distributions, flowvi.numpyro.distributions):
            monkeypatch.setattr(adapter, "attach", attach_elsewhere)

    def changes(self, program, nesting, **options):
        """The elements as (site, index), and by how much their C and the ELBO change if they move."""
        elbo = objective(self.host, self.host.flow.TraceFlow_ELBO, nesting, default=LR(), **options)
        model, guide = program(self.host)

        def evaluate(moved):
            self.moved = moved
            return -self.host.loss(elbo, model, guide, seed=1), dict(self.costs)

        first_run(self.host, guide, lambda: evaluate({}))
        elements = [(name, index) for name, shape in self.shapes.items() for index in np.ndindex(*shape)]
        moved = {name: np.zeros((1 + len(elements), *shape)) for name, shape in self.shapes.items()}
        for row, (name, index) in enumerate(elements, 1):
            moved[name][row, *index] = 1
        elbos, costs = each_row(self.host, evaluate, moved)
        of_costs = []
        for row, (name, index) in enumerate(elements, 1):
            cost = np.broadcast_to(costs[name], (len(elbos), *self.shapes[name]))
            of_costs.append(cost[row, *index] - cost[0, *index])
        return elements, np.array(of_costs), elbos[1:] - elbos[0]


def first_run(host, guide: Callable, run: Callable):
    """Set up an autoguide of NumPyro, whose first run cannot be traced."""
    if host.name == "pyro":
        run()
    else:
        with host.handlers.block(), host.handlers.seed(rng_seed=0):
            guide()
        jax.eval_shape(run)


def each_row(host, f: Callable, rows: dict):
    """``f`` at each row of some arrays."""
    if host.name == "numpyro":
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(f))(rows))
    results = [f({name: host.array(row) for name, row in zip(rows, row, strict=True)}) for row in zip(*rows.values(), strict=True)]
    values, costs = zip(*results, strict=True)
    return np.array(values), {name: np.stack([host.numpy(cost[name]) for cost in costs]) for name in costs[0]}


@each("name", list(CHOSEN), slow_in_numpyro=lambda name: name != "nested")
def test_what_multiplies_a_score(host, name, monkeypatch):
    """C and the ELBO change by the same number, to rounding, at each element of each site."""
    program, nesting = PROGRAMS[name]
    for dependencies in ("graph", "plates"):
        with monkeypatch.context() as patch:
            elements, of_costs, of_elbo = Moves(host, patch).changes(program, nesting, dependencies=dependencies)
        assert {site.removesuffix("_unconstrained") for site, _ in elements} == set(CHOSEN[name])
        assert np.all(np.abs(of_elbo) > 1e-3)
        assert_same(of_elbo, of_costs)


def forget(monkeypatch, site):
    """Make the marginal densities independent of a site."""
    of_parts = flowvi.tape._of_parts

    def without(graph, model):
        graph = of_parts(graph, model)
        forgotten = {entry.name: graph.model[entry.name] - {site, f"{site}_unconstrained"} for entry in model if entry.parts}
        return graph._replace(model=graph.model | forgotten)

    monkeypatch.setattr(flowvi.tape, "_of_parts", without)
    monkeypatch.setattr(flowvi.tape, "_by_order", flowvi.tape._by_order.__wrapped__)  # without its cache


@each("name", list(CHOSEN), slow_in_numpyro=always)
def test_that_can_fail(host, name, monkeypatch):
    """The check fails at every element of a site if a marginal density wrongly does not depend on it."""
    program, nesting = PROGRAMS[name]
    for site in CHOSEN[name]:
        with monkeypatch.context() as patch:
            forget(patch, site)
            elements, of_costs, of_elbo = Moves(host, patch).changes(program, nesting)
        of_site = np.array([element.removesuffix("_unconstrained") == site for element, _ in elements])
        assert np.all(np.abs(of_costs - of_elbo)[of_site] > 1e-4)
        assert_same(of_elbo[~of_site], of_costs[~of_site])


# ---- means, with estimators of several kinds


def samples(host, elbo, program, steps):
    """Gradients of the loss in all parameters, of shape (steps, ...), for any objective."""
    model, guide = program(host)
    if host.name == "pyro":
        gradients = []
        for step in range(steps):
            pyro.clear_param_store()
            pyro.set_rng_seed(step)
            elbo.loss_and_grads(model, guide)
            gradients.append(np.concatenate([g.ravel() for g in taken_gradients().values()]))
        return np.stack(gradients)
    traces = [host.handlers.trace(host.handlers.seed(part, 0)).get_trace() for part in (guide, model)]
    params = {name: site["value"] for trace in traces for name, site in trace.items() if site["type"] == "param"}

    def gradient(key):
        return jax.grad(lambda params: elbo.loss(key, params, model, guide))(params)

    keys = jax.random.split(jax.random.key(elbo.num_particles), steps)
    found = jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=500))(keys)
    return np.concatenate([np.asarray(found[name]).reshape((steps, -1)) for name in params], 1)


@cache
def of_the_host(host, name):
    """Gradients of the host's own objective."""
    program, nesting = PROGRAMS[name]
    elbo = objective(host, host.library.infer.TraceEnum_ELBO, nesting)
    return samples(host, elbo, program, 500 if host.name == "pyro" else 20_000)


def z_scores(host, name, num_particles):
    """z-scores of the mean gradient with the chosen estimators, against that of the host's own objective."""
    program, nesting = PROGRAMS[name]
    elbo = objective(host, host.flow.TraceFlow_ELBO, nesting, estimators=CHOSEN[name], num_particles=num_particles)
    steps = (1000 if host.name == "pyro" else 20_000) // num_particles
    exact, found = of_the_host(host, name), samples(host, elbo, program, steps)
    variance = exact.var(0) / len(exact) + found.var(0) / len(found)
    return (found.mean(0) - exact.mean(0)) / np.sqrt(variance + 1e-24)


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("name", CHOSEN)
def test_the_mean(host, name, num_particles):
    z = z_scores(host, name, num_particles)
    assert np.all(np.abs(z) < 5), z


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_that_the_mean_can_fail(name, monkeypatch):
    """Without the marginal density, the mean gradient of a score is different."""
    for site, estimator in CHOSEN[name].items():
        if estimator != ImplicitRP():
            with monkeypatch.context() as patch:
                forget(patch, site)
                z = z_scores(HOSTS["numpyro"], name, 1)
                assert np.any(np.abs(z) > 8), (site, z)

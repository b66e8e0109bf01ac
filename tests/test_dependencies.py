"""``dependencies="graph"``: whether a cost depends on a draw, through every kind of code in between."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import Program as HostProgram
from numpyro.contrib.control_flow import cond, scan

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Auto
from flowvi.assignment import Assignment
from flowvi.numpyro.run import NumPyroProgram, run_program
from flowvi.pyro.run import PyroProgram
from flowvi.run import run
from flowvi.sites import GuideSites
from flowvi.tape import record

# ---- the ways from a draw k (of "a") to a cost

TABLE = [0.1, 0.7, -0.4]
LINEAR = equinox.nn.Linear(1, 1, key=jax.random.key(0))

NUMPYRO_WAYS = {
    "arithmetic": lambda k: 2.0 * k - 1,
    "indexing": lambda k: jnp.array(TABLE)[k],
    "an update in place": lambda k: jnp.zeros(3).at[1].set(k).sum(),
    "comparison": lambda k: jnp.where(k > 0, 1.0, 2.0),
    "stop_gradient": lambda k: jax.lax.stop_gradient(1.0 * k),
    "jit": lambda k: jax.jit(lambda x: 3.0 * x)(k),
    "scan": lambda k: jax.lax.scan(lambda c, _: (c + k, None), 0.0, None, length=3)[0],
    "cond": lambda k: jax.lax.cond(k > 0, lambda: 1.0, lambda: 2.0),
    "while": lambda k: jax.lax.while_loop(lambda c: c < 3 * k, lambda c: c + 1, 0) * 1.0,
    "a module": lambda k: LINEAR(jnp.array([1.0]) * k)[0],
}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def in_place(k):
    z = torch.zeros(3)
    z[1] = k
    return z.sum()


def through_a_view(k):
    z = torch.zeros(3)
    view = z[:2]
    view += k
    return z.sum()


def out_argument(k):
    z = torch.zeros(())
    torch.mul(k, 2.0, out=z)
    return z


def new_data(k):
    z = torch.zeros(())
    z.data = k.detach()
    return z


PYRO_WAYS = {
    "arithmetic": lambda k: 2.0 * k - 1,
    "indexing": lambda k: torch.tensor(TABLE)[k.long()],
    "an update in place": in_place,
    "an update of a view": through_a_view,
    "an out argument": out_argument,
    "new data": new_data,
    "a storage": lambda k: torch.zeros(()).set_(k.detach().untyped_storage(), 0, (), ()),
    "comparison": lambda k: torch.where(k > 0, 1.0, 2.0),
    "detach": lambda k: (1.0 * k).detach(),
    "an autograd.Function": lambda k: Double.apply(k),
    "a module": lambda k: torch.nn.Linear(1, 1)(k.reshape(1))[0],
    "if": lambda k: torch.tensor(1.0 if k > 0 else 2.0),
    "item": lambda k: torch.tensor(2 * k.item()),
    "a Python index": lambda k: torch.tensor(TABLE[int(k)]),
    "numpy": lambda k: torch.as_tensor(k.detach().numpy() * 2.0),
    "vmap": lambda k: torch.vmap(torch.nn.Linear(1, 1))(k.reshape(1, 1)).sum(),
    "a derivative": lambda k: torch.func.grad(lambda x: x**2)(k),
    "a Jacobian": lambda k: torch.func.jacrev(lambda x: x**2)(k.reshape(1)).sum(),
    "the number of results": lambda k: torch.tensor(1.0 * len(torch.ones(3)[torch.ones(3) * k > 0])),
    "the length of a slice": lambda k: torch.tensor(1.0 * len(torch.ones(3)[: k.long()])),
    "the length of a range": lambda k: torch.tensor(1.0 * len(torch.arange(k))),
    "a size": lambda k: torch.tensor(1.0 * torch.zeros(k.long()).numel()),
    "the size of an expansion": lambda k: torch.tensor(1.0 * torch.ones(1).expand(k.long()).numel()),
    "the size of a view": lambda k: torch.tensor(1.0 * len(torch.ones(2).view(k.long() + 1, -1))),
    "a full tensor": lambda k: torch.tensor(1.0 * torch.full((k.long(),), 1.0).numel()),
    "a format": lambda k: torch.tensor(1.0 * float(f"{k}")),
    "a string": lambda k: torch.tensor(1.0 * len(str(k))),
}


def numpyro_program(way):
    def guide():
        for name in "ab":
            numpyro.sample(name, numpyro_dist.Bernoulli(0.4), infer={"estimator": LR()})

    def model():
        a, b = (numpyro.sample(name, numpyro_dist.Bernoulli(0.4)) for name in "ab")
        numpyro.factor("of b", 1.0 * b)
        numpyro.factor("of a", way(a))

    return model, guide


def pyro_program(way):
    def guide():
        for name in "ab":
            pyro.sample(name, pyro_dist.Bernoulli(torch.tensor(0.4)), infer={"estimator": LR()})

    def model():
        a, b = (pyro.sample(name, pyro_dist.Bernoulli(torch.tensor(0.4))) for name in "ab")
        pyro.factor("of b", 1.0 * b)
        pyro.factor("of a", way(a))

    return model, guide


def tape_in_numpyro(model, guide, dependencies="graph"):
    program = NumPyroProgram(jax.random.key(0), {}, model, guide, (), {})
    return record(run_program(program, Assignment(None, Auto())), dependencies)


def tape_in_pyro(model, guide, dependencies="graph"):
    program = PyroProgram(model, guide, (), {}, flowvi.pyro.TraceFlow_ELBO(), follows_tensors=dependencies == "graph")
    return record(run(program, GuideSites(Assignment(None, Auto()))), dependencies)


def ancestors(tape):
    return {term.name: names(term) for term in tape.terms}


def names(record):
    return {ancestor.name for ancestor in record.ancestors}


@pytest.mark.parametrize("way", NUMPYRO_WAYS)
def test_ways_in_numpyro(way):
    found = ancestors(tape_in_numpyro(*numpyro_program(NUMPYRO_WAYS[way])))
    assert (found["of a"], found["of b"]) == ({"a"}, {"b"})


@pytest.mark.parametrize("way", PYRO_WAYS)
def test_ways_in_pyro(way):
    found = ancestors(tape_in_pyro(*pyro_program(PYRO_WAYS[way])))
    assert (found["of a"], found["of b"]) == ({"a"}, {"b"})


def test_what_runs_after_a_branch_depends_on_it():
    """A statement after a branch depends on the draw, although its numbers do not. Pyro's own provenance does not see this."""

    def way(k):
        if k > 0.5:
            pyro.factor("inside", torch.tensor(1.0))
        return torch.tensor(0.0)

    model, guide = pyro_program(way)
    for _ in range(10):
        found = ancestors(tape_in_pyro(model, guide))
        assert (found["of a"], found.get("inside", {"a"})) == ({"a"}, {"a"})


def test_validation_is_no_branch():
    """The hosts' validation looks at numbers, but a cost of b still does not depend on a."""

    def way(k):
        pyro.sample("y", pyro_dist.Normal(k, 1.0), obs=torch.tensor(0.3))
        return torch.tensor(0.0)

    with pyro.validation_enabled():
        found = ancestors(tape_in_pyro(*pyro_program(way)))
    assert (found["y"], found["of a"]) == ({"a"}, set())


def test_parents_lead_through_parameters(host):
    """The parameters of b read a, its proposal does not. The cost of b still has the weight and the score of a."""
    sample, dist = host.sample, host.dist

    def guide():
        a = sample("a", dist.Normal(host.array(0.1), host.array(1.0)))
        sample("b", dist.Normal(0.5 * a, host.array(1.0)))

    def model():
        sample("a", dist.Normal(host.array(0.0), host.array(1.0)))
        b = sample("b", dist.Normal(host.array(0.0), host.array(1.0)))
        host.factor("of b", b)

    tape = tape_in(host, model, guide, LR(q=lambda p: dist.Normal(host.array(0.0), host.array(2.0))))
    assert ancestors(tape)["of b"] == {"a", "b"}
    assert {site.name: names(site) for site in tape.sites} == {"a": {"a"}, "b": {"a", "b"}}


def tape_in(host, model, guide, estimator):
    assignment = Assignment({"a": estimator, "b": estimator}, Auto())
    if host.name == "numpyro":
        return record(run_program(NumPyroProgram(jax.random.key(0), {}, model, guide, (), {}), assignment), "graph")
    program = PyroProgram(model, guide, (), {}, flowvi.pyro.TraceFlow_ELBO(), follows_tensors=True)
    return record(run(program, GuideSites(assignment)), "graph")


def test_a_value_of_the_guide_does_not_depend_on_parents_in_the_model(host):
    def guide():
        for name in "ab":
            host.sample(name, host.dist.Normal(host.array(0.1), host.array(1.0)))

    def model():
        a = host.sample("a", host.dist.Normal(host.array(0.0), host.array(1.0)))
        b = host.sample("b", host.dist.Normal(a, host.array(1.0)))
        host.factor("of b", b)

    tape = tape_in(host, model, guide, LR())
    assert ancestors(tape)["of b"] == {"b"}
    assert {(term.sign, term.name): names(term) for term in tape.terms if term.name == "b"} == {(1, "b"): {"a", "b"}, (-1, "b"): {"b"}}


def test_scan_and_cond_of_the_host():
    """Everything after a draw inside scan counts as dependent on it, and nothing before it."""

    def guide():
        numpyro.sample("a", numpyro_dist.Bernoulli(0.4), infer={"estimator": LR()})

        def body(carry, _):
            wrapped = flowvi.numpyro.Estimated(numpyro_dist.Normal(carry, 1.0), LR())
            return numpyro.sample("x", wrapped), None

        scan(body, 0.0, None, length=3)

    def model():
        a = numpyro.sample("a", numpyro_dist.Bernoulli(0.4))
        numpyro.factor("before", 1.0 * a)

        def body(carry, _):
            return numpyro.sample("x", numpyro_dist.Normal(carry, 1.0)), None

        last, _ = scan(body, 0.0, None, length=3)
        numpyro.factor("after", last)
        cond(a > 0, lambda _: numpyro.factor("then", 1.0), lambda _: numpyro.factor("then", 2.0), None)

    found = ancestors(tape_in_numpyro(model, guide))
    assert (found["before"], found["after"]) == ({"a"}, {"x"})
    assert found["then"] >= {"a"}


def test_runs_of_the_program():
    """A program of RP sites is traced once, as under Trace_ELBO. The graph takes one more run if a site has a score."""
    runs = []

    def program():
        runs.append(1)
        numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))

    for options, expected in (
        ({}, 2),
        ({"default": LR()}, 4),
        ({"default": LR(), "dependencies": "plates"}, 2),
        ({"default": RP()}, 2),
    ):
        runs.clear()
        elbo = flowvi.numpyro.TraceFlow_ELBO(**options)
        step = jax.jit(lambda key, elbo=elbo: elbo.loss(key, {}, program, program))
        step(jax.random.key(0))
        step(jax.random.key(1))
        assert len(runs) == expected


def test_both_modes_have_the_same_mean(host):
    """Both modes have the exact mean gradient at a program where they find different dependencies."""
    table, logits = np.array(TABLE), np.array([0.2, -0.1])

    def guide(h, t):
        for i, name in enumerate("ab"):
            h.sample(name, h.dist.Bernoulli(logits=t[i]).mask(False))

    def model(h, t):
        a, b = (h.sample(name, h.dist.Bernoulli(h.array(0.5)).mask(False)) for name in "ab")
        h.factor("of a", h.array(TABLE)[h.index(a)])
        h.factor("of both", h.array(TABLE)[h.index(a + b)])

    p = 1 / (1 + np.exp(-logits))
    values = np.array([[table[a] + table[a + b] for b in (0, 1)] for a in (0, 1)])
    weights = [np.array([1 - q, q]) for q in p]
    slope = [q * (1 - q) * np.array([-1, 1]) for q in p]
    exact = np.array([slope[0] @ values @ weights[1], weights[0] @ values @ slope[1]])
    for dependencies in ("graph", "plates"):
        samples = host.gradients(HostProgram(guide, model, tuple(logits)), 40_000, default=LR(), dependencies=dependencies)
        assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))


class OneWay(numpyro_dist.transforms.ExpTransform):
    """A transform without an inverse."""

    def _inverse(self, y):
        raise NotImplementedError


def test_draws_that_cannot_be_marked_as_they_are():
    """The graph is right next to a site whose density needs its base sample, and next to a substituted Python number."""

    def guide():
        numpyro.sample("k", numpyro_dist.Bernoulli(0.4))
        numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
        numpyro.sample("y", numpyro_dist.TransformedDistribution(numpyro_dist.Normal(0.0, 1.0), OneWay()))

    def model():
        k = numpyro.sample("k", numpyro_dist.Bernoulli(0.5))
        x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", numpyro_dist.LogNormal(0.0, 1.0))
        numpyro.factor("of k", 1.0 * k)
        numpyro.factor("of x and y", x + y)

    found = ancestors(tape_in_numpyro(model, numpyro.handlers.substitute(guide, data={"x": 0.3})))
    assert (found["of k"], found["of x and y"]) == ({"k"}, set())


def test_a_divergence_in_closed_form_does_not_depend_on_its_site(host):
    """It is an expectation over the site given the earlier draws, so it does not depend on the site, also by program order."""

    def part(h, t):
        a = h.sample("a", h.dist.Normal(t, h.array(1.0)))
        h.sample("b", h.dist.Normal(0.5 * a, h.array(1.0)))

    program = HostProgram(lambda h, t: part(h, t[0]), lambda h, t: part(h, 0 * t[0]), (0.5,))
    samples = host.gradients(program, 100, estimators={"a": LR(), "b": LR()}, entropy="analytic", dependencies="plates")
    np.testing.assert_allclose(samples, -0.5, atol=1e-12)  # the gradient of -KL(a) alone; that of b is 0 for every a

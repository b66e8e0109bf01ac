"""What the default estimator chooses, and that its choice is unbiased."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.control_flow
import pyro
import pytest
import torch
from hosts import Program
from test_alternatives import NORMAL, binary, exact, sampled, without_noise

import flowvi.numpyro
import flowvi.pyro

GRAPH = {"dependencies": "graph"}


def chosen(host, program):
    """The estimator of each site by ``describe``, and the number of evaluations."""
    t = [host.array(x) for x in program.theta]
    elbo = host.flow.TraceFlow_ELBO(**GRAPH)
    description = elbo.describe(lambda: program.model(host, t), lambda: program.guide(host, t))
    return {site.name: repr(site.estimator) for site in description}, description.evaluations


def local(h, t):
    with h.plate("n", 3):
        return h.sample("b", h.dist.Bernoulli(logits=t[0] * h.array([1.0, -0.5, 2.0])))


def local_model(h, t, joint=False):
    with h.plate("n", 3):
        b = h.sample("b", h.dist.Bernoulli(h.array(0.3)))
        h.sample("y", h.dist.Normal(2 * b, h.array(1.0)), obs=h.array([0.1, 1.5, 2.5]))
    if joint:
        h.factor("joint", 0.5 * h.over_plate(b) ** 2)


def test_a_plate_takes_one_run(host):
    program = Program(local, local_model, (0.7,), plates=1)
    assert chosen(host, program) == ({"b": "Enumerate()"}, 2)
    without_noise(host, program, exact(program, b=binary(3)), **GRAPH)


def test_a_joint_cost_would_take_three(host):
    program = Program(local, lambda h, t: local_model(h, t, joint=True), (0.7,), plates=1)
    assert chosen(host, program) == ({"b": "LR()"}, 1)
    sampled(host, program, exact(program, b=binary(3)), particles=2, **GRAPH)


def three(h, t):
    x = h.sample("x", h.dist.Normal(t[0], h.array(0.7)))
    a = h.sample("a", h.dist.Bernoulli(logits=t[1] + x))
    b = h.sample("b", h.dist.Bernoulli(logits=t[1] - 0.5 * a))
    h.sample("c", h.dist.Bernoulli(logits=t[1] * b))


def three_model(h, t):
    x = h.sample("x", h.dist.Normal(h.array(0.1), h.array(1.0)))
    sites = [h.sample(name, h.dist.Bernoulli(h.array(0.4))) for name in "abc"]
    h.sample("y", h.dist.Normal(x + sites[0] - 2 * sites[1] * sites[2], h.array(0.8)), obs=h.array(0.5))


@pytest.mark.parametrize("particles", [1, 2])
def test_sites_that_share_a_cost_take_two_runs_together(host, particles):
    program = Program(three, three_model, (0.3, 0.4))
    assert chosen(host, program) == ({"x": "RP()", "a": "Enumerate()", "b": "Enumerate()", "c": "LR()"}, 3)
    truth = exact(program, x=NORMAL, a=binary(), b=binary(), c=binary())
    sampled(host, program, truth, 20_000, particles=particles, **GRAPH)


@pytest.mark.parametrize(("size", "estimator", "evaluations"), [(3, "Enumerate()", 3), (4, "LR()", 1)])
def test_the_number_of_values(host, size, estimator, evaluations):
    def part(h, t):
        h.sample("k", h.dist.Categorical(logits=t[0] * h.array(np.arange(float(size)))))

    assert chosen(host, Program(part, part, (0.4,))) == ({"k": estimator}, evaluations)


def test_supports_that_cannot_be_enumerated(host):
    def part(h, t):
        h.sample("k", h.dist.Poisson(h.math.exp(t[0])))
        h.sample("n", h.dist.Binomial(h.integers([1, 2]), logits=t[0]).to_event(1))
        h.sample("v", h.dist.Bernoulli(logits=t[0] * h.array([1.0, 2.0, 3.0])).to_event(1))

    assert chosen(host, Program(part, part, (0.4,))) == ({"k": "LR()", "n": "LR()", "v": "LR()"}, 1)


def test_a_bound_has_no_exact_sum(host):
    part = lambda h, t: h.sample("b", h.dist.Bernoulli(logits=t[0]))
    program = Program(part, part, (0.4,))
    assert np.isfinite(host.bound_gradients(program, 3)).all()
    t = [host.array(0.4)]
    description = host.flow.TraceFlow_RenyiELBO().describe(lambda: part(host, t), lambda: part(host, t))
    assert repr(description[0].estimator) == "LR()"


def test_a_scan():
    def part():
        logits = numpyro.param("l", 0.3)

        def body(carry, _):
            return carry, numpyro.sample("b", numpyro.distributions.Bernoulli(logits=logits + 0 * carry))

        numpyro.contrib.control_flow.scan(body, jnp.array(0.0), None, length=2)

    description = flowvi.numpyro.TraceFlow_ELBO().describe(part, part)
    assert (repr(description[0].estimator), description.evaluations) == ("LR()", 1)


def pyro_bernoulli(**infer):
    return pyro.sample("b", pyro.distributions.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))), infer=infer)


def branching_model():
    b = pyro.sample("b", pyro.distributions.Bernoulli(torch.tensor(0.3)))
    if b > 0:
        pyro.factor("f", torch.tensor(1.0))


def plain_model():
    pyro.factor("f", 2.0 * pyro.sample("b", pyro.distributions.Bernoulli(torch.tensor(0.3))))


@pytest.mark.parametrize(
    ("model", "infer", "dependencies", "estimator"),
    [
        (plain_model, {}, "graph", "Enumerate()"),
        (plain_model, {}, "plates", "LR()"),
        (branching_model, {}, "graph", "LR()"),
        (plain_model, {"baseline": {"use_decaying_avg_baseline": True}}, "graph", "LR()"),
    ],
)
def test_what_pyro_knows_of_a_program(model, infer, dependencies, estimator):
    pyro.clear_param_store()
    runs = []

    def counted():
        runs.append(1)
        model()

    elbo = flowvi.pyro.TraceFlow_ELBO(dependencies=dependencies)
    description = elbo.describe(counted, lambda: pyro_bernoulli(**infer))
    assert repr(description[0].estimator) == estimator
    runs.clear()
    elbo.loss_and_grads(counted, lambda: pyro_bernoulli(**infer))
    assert len(runs) == description.evaluations == (2 if estimator == "Enumerate()" else 1)
    pyro.clear_param_store()

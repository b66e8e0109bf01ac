"""Sites whose cost is compared at several values: means, values, number of runs, and wrong rules that the tests reject."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.control_flow
import numpyro.distributions
import pyro
import pyro.infer.autoguide.effect
import pytest
import torch
from hosts import HOSTS, Program, always, each, slow_in_numpyro, z_scores
from kinds import half_velocity, wide
from svi_programs import assert_same

import flowvi.numpyro
import flowvi.ops.jax
import flowvi.ops.torch
import flowvi.plot
import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow, Enumerate, Flow
from flowvi.alternatives import Comparison
from flowvi.numpyro.host import enable_x64
from flowvi.objectives import comparison

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
NORMAL = list(zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True))


def binary(*shape):
    """All values of Bernoullis of a given shape, each with weight 1."""
    return [(np.reshape(bits, shape).astype(float), 1.0) for bits in itertools.product((0, 1), repeat=int(np.prod(shape)))]


def exact(program, **sites):
    """The gradient of the ELBO as a weighted sum over the values of the sites. Values of a Normal are standardized."""
    h = HOSTS["numpyro"]

    def family(fn):
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        return fn

    def term(theta, values):
        def place(site):
            if site["name"] not in values:
                return None
            fn, value = family(site["fn"]), values[site["name"]]
            return fn.loc + fn.scale * value if isinstance(fn, numpyro.distributions.Normal) else value

        guide = lambda: program.guide(h, list(theta))
        trace = numpyro.handlers.trace(numpyro.handlers.substitute(guide, substitute_fn=place)).get_trace()
        drawn = {name: trace[name]["value"] for name in values}
        log_q, log_p = (
            numpyro.infer.util.log_density(part, (), {}, drawn)[0] for part in (guide, lambda: program.model(h, list(theta)))
        )
        discrete = [name for name in values if not isinstance(family(trace[name]["fn"]), numpyro.distributions.Normal)]
        return (log_p - log_q) * jnp.exp(sum(family(trace[name]["fn"]).log_prob(drawn[name]).sum() for name in discrete))

    combinations = list(itertools.product(*sites.values()))
    weight = jnp.array([np.prod([w for _, w in one]) for one in combinations])
    values = {name: jnp.array([one[i][0] for one in combinations]) for i, name in enumerate(sites)}
    return np.asarray(jax.jit(jax.grad(lambda t: weight @ jax.vmap(term, (None, 0))(t, values)))(jnp.array(program.theta)))


def sampled(host, program, truth, n=4000, **options):
    """Assert that the mean is ``truth``, and return the samples."""
    samples = host.gradients(program, n, **options)
    assert np.all(np.abs(z_scores(samples, truth)) < 5), (samples.mean(0), truth)
    return samples


def without_noise(host, program, truth, n=5, rtol=1e-9, **options):
    """Assert that every sample is ``truth``."""
    np.testing.assert_allclose(host.gradients(program, n, **options), np.broadcast_to(truth, (n, len(truth))), rtol, atol=1e-9)


# ---- one site and a deterministic rest: the gradient has no noise


def of_prior(h):
    return [h.array(0.1), h.array(-0.2)]


def lone(distribution, theta):
    """A site k, a prior of the same family with other parameters, and a cost."""

    def guide(h, t):
        h.sample("k", distribution(h, t))

    def model(h, t):
        k = h.sample("k", distribution(h, of_prior(h)))
        h.factor("f", curve(h, k))

    return Program(guide, model, theta)


def stacked(h, t):
    return h.math.stack([t[0], t[1], 0.0 * t[0]], -1)


def curve(h, k):
    return h.math.sin(2.0 * k + 0.3)


def softmax(x):
    return (e := HOSTS["numpyro"].math.exp(x) if isinstance(x, jax.Array) else x.exp()) / e.sum(-1, keepdims=True)


LONE = {
    "Bernoulli logits": (lambda h, t: h.dist.Bernoulli(logits=t[0]), (0.4,), 2),
    "Bernoulli probs": (lambda h, t: h.dist.Bernoulli(h.math.exp(-h.math.exp(t[0]))), (0.4,), 2),
    "Bernoulli at 0": (lambda h, t: h.dist.Bernoulli(logits=t[0]), (0.0,), 2),
    "Categorical": (lambda h, t: h.dist.Categorical(logits=stacked(h, t)), (0.4, -0.7), 3),
    "Categorical probs": (lambda h, t: h.dist.Categorical(softmax(stacked(h, t))), (0.4, -0.7), 3),
    "Binomial": (lambda h, t: h.dist.Binomial(3, logits=t[0]), (0.4,), 4),
    "Binomial at 0": (lambda h, t: h.dist.Binomial(3, logits=t[0]), (0.0,), 4),
    "BetaBinomial": (lambda h, t: h.dist.BetaBinomial(h.math.exp(t[0]), h.math.exp(t[1]), 3), (0.4, 0.1), 4),
}


@each(("distribution", "theta", "size"), LONE, slow_in_numpyro=lambda row: row in (LONE["BetaBinomial"], LONE["Categorical probs"]))
def test_one_site_has_no_noise(host, distribution, theta, size):
    program, truth = lone(distribution, theta), by_differences(distribution, theta, size)
    without_noise(host, program, truth, default=Enumerate(), rtol=1e-7)
    assert evaluations(host, program, default=Enumerate()) == size


@each(("distribution", "theta", "size"), {name: LONE[name] for name in ("Categorical", "Binomial at 0")})
def test_one_value_at_random(host, distribution, theta, size):
    program, truth = lone(distribution, theta), by_differences(distribution, theta, size)
    sampled(host, program, truth, default=Enumerate("random"))
    assert evaluations(host, program, default=Enumerate("random")) == 2


def by_differences(distribution, theta, size):
    """Central differences, which are independent of the hosts' derivatives of log densities."""
    h, k = HOSTS["pyro"], torch.arange(float(size))

    def elbo(theta):
        t = [torch.tensor(x) for x in theta]
        log_q, log_p = distribution(h, t).log_prob(k), distribution(h, of_prior(h)).log_prob(k)
        return float((log_q.exp() * (log_p - log_q + curve(h, k))).sum())

    return np.array([(elbo(theta + e) - elbo(theta - e)) / 2e-5 for e in 1e-5 * np.eye(len(theta))])


def evaluations(host, program, **options):
    t = [host.array(x) for x in program.theta]
    elbo = host.flow.TraceFlow_ELBO(**options)
    return elbo.describe(lambda: program.model(host, t), lambda: program.guide(host, t)).evaluations


def test_logits_of_exactly_0(host):
    """The gradient is right at logits of 0, where NumPyro's log density of a Bernoulli has a wrong derivative."""

    def model(h, t):
        k = h.sample("k", h.dist.Bernoulli(h.array(0.5)))
        h.sample("y", h.dist.Normal(3.0 * k, h.array(1.0)), obs=h.array(2.0))

    program = Program(lambda h, t: h.sample("k", h.dist.Bernoulli(logits=t[0])), model, (0.0,))
    without_noise(host, program, [0.375], default=Enumerate())


def test_pyro_one_hot_vectors():
    def part(h, logits, t):
        return h.sample("k", h.dist.OneHotCategorical(logits=logits))

    def model(h, t):
        k = part(h, stacked(h, of_prior(h)), t)
        h.factor("f", (k * h.array([0.3, -1.0, 2.0])).sum(-1) ** 2)

    def index(h, t):
        h.factor("f", h.array([0.3, -1.0, 2.0])[h.sample("k", h.dist.Categorical(logits=stacked(h, of_prior(h))))] ** 2)

    theta = (0.4, -0.7)
    as_index = Program(lambda h, t: h.sample("k", h.dist.Categorical(logits=stacked(h, t))), index, theta)
    truth = exact(as_index, k=[(np.array(k), 1.0) for k in range(3)])
    one_hot = Program(lambda h, t: part(h, stacked(h, t), t), model, theta)
    without_noise(HOSTS["pyro"], one_hot, truth, default=Enumerate())
    assert evaluations(HOSTS["pyro"], one_hot, default=Enumerate()) == 3


def test_numpyro_a_uniform_law_without_parameters():
    def guide(h, t):
        x = h.sample("x", h.dist.Normal(t[0], 1.0))
        k = h.sample("k", h.dist.DiscreteUniform(1, 3))
        h.sample("z", h.dist.Bernoulli(logits=t[1] * k + 0.3 * x))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(0.0, 1.0))
        k = h.sample("k", h.dist.DiscreteUniform(0, 4))
        z = h.sample("z", h.dist.Bernoulli(logits=0.1))
        h.factor("f", -((x - k * z) ** 2))

    program = Program(guide, model, (0.4, -0.2))
    truth = exact(program, x=NORMAL, k=[(np.array(k), 1.0) for k in (1, 2, 3)], z=binary())
    sampled(HOSTS["numpyro"], program, truth, default=Enumerate(), estimators={"x": RP()})


# ---- several sites


def chain_of(h, t, sample, side):
    """The chain a -> x -> b, for the guide or the model."""
    a = sample("a", h.dist.Bernoulli(logits=t[0] if not side else 0.2 + 0.0 * t[0]))
    x = sample("x", h.dist.Normal(t[1] + (0.8 - side) * a, h.array(0.9)))
    b = sample("b", h.dist.Bernoulli(logits=t[2] + (1.0 - 0.5 * side) * x))
    return a, x, b


def chain_model(h, t):
    a, x, b = chain_of(h, t, h.sample, 1)
    h.factor("f", (x + 1.3 * b - 0.7 * a) ** 2)


CHAIN = Program(lambda h, t: chain_of(h, t, h.sample, 0), chain_model, (0.4, -0.3, 0.2))


def other_odds(p):
    return type(p)(logits=0.3 - 0.5 * p.logits)


CHAINS = {
    "graph": {"dependencies": "graph"},
    "plates": {"dependencies": "plates"},
    "stl": {"entropy": "stl"},
    "analytic": {"entropy": "analytic"},
    "analytic, graph": {"entropy": "analytic", "dependencies": "graph"},
    "random": {"default": Enumerate("random")},
    "four particles": {"particles": 4},
    "four particles in a loop": {"particles": 4, "vectorize": False},
    "Flow": {"estimators": {"x": Flow(half_velocity)}},
    "RP(q)": {"estimators": {"x": RP(wide)}},
    "AdaptiveFlow": {"estimators": {"x": AdaptiveFlow(bumps=0)}},
    "a by LR(q)": {"estimators": {"x": RP(), "a": LR(q=other_odds)}},
    "b by LR(q)": {"estimators": {"x": RP(), "b": LR(q=other_odds)}, "particles": 4},
}


@pytest.fixture(scope="module")
def exact_chain():
    with enable_x64(True):
        return exact(CHAIN, a=binary(), x=NORMAL, b=binary())


@each("options", CHAINS, slow_in_numpyro=lambda options: "estimators" in options or options.get("vectorize") is False)
def test_a_chain_of_sites(host, options, exact_chain):
    options = {"default": Enumerate(), "estimators": {"x": RP()}, **options}
    sampled(host, CHAIN, exact_chain, **options)


# ---- plates


def locals_of(h, t, side, size=3):
    """Local Bernoullis, with different masks and scales in the guide and in the model."""
    shift, mask = (0.4 + 0.0 * t[0], [0.0, 1.0, 1.0]) if side else (t[0], [1.0, 0.0, 1.0])
    logits = shift + h.array([0.0, 0.3, -0.2])[:size]
    return h.sample("k", h.dist.Bernoulli(logits=logits).mask(h.array(mask)[:size] > 0))


def local_program(size=3, outside=False):
    def guide(h, t):
        with h.plate("n", size), h.scale(1.7):
            locals_of(h, t, 0, size)

    def model(h, t):
        with h.plate("n", size), h.scale(1.7):
            k = locals_of(h, t, 1, size)
            h.factor("f", h.array([1.0, -2.0, 0.5])[:size] * k)
        if outside:
            h.factor("g", h.over_plate(k) ** 2)

    return Program(guide, model, (0.3,), plates=1)


@pytest.mark.parametrize("size", [1, 3])
def test_local_sites_share_a_run(host, size):
    program = local_program(size)
    without_noise(host, program, exact(program, k=binary(size)), default=Enumerate())
    assert evaluations(host, program, default=Enumerate()) == 2


@pytest.mark.parametrize(("lanes", "runs"), [("all", 4), ("random", 2)])
def test_a_cost_outside_the_plate_takes_lanes(host, lanes, runs):
    program = local_program(outside=True)
    truth = exact(program, k=binary(3))
    sampled(host, program, truth, default=Enumerate(lanes))
    assert evaluations(host, program, default=Enumerate(lanes)) == runs


ROWS = [[0.0, 0.3, -0.2], [0.5, 0.0, 0.1]]
TWO = (0.3, -0.4)


def event_program(rows):
    """Bernoullis as one event and a Normal that depends on them: one such pair, or one for each row of a plate."""

    def part(h, t, side):
        plate = h.plate("n", len(rows)) if len(rows) > 1 else nullcontext()
        logits = h.array(rows if len(rows) > 1 else rows[0]) + (0.0 if side else t[0][..., None])
        with plate:
            k = h.sample("k", h.dist.Bernoulli(logits=logits).to_event(1))
            x = h.sample("x", h.dist.Normal((1 - side) * (t[1] + (k * h.array([1.0, -2.0, 0.5])).sum(-1)), h.array(1.0)))
            if side:
                h.factor("f", -((x - k.sum(-1)) ** 2))

    return Program(lambda h, t: part(h, t, 0), lambda h, t: part(h, t, 1), TWO, plates=1)


@each(("lanes", "runs"), {"all": ("all", 4), "random": ("random", 2)}, slow_in_numpyro=always)
def test_coordinates_of_an_event_take_lanes(host, lanes, runs):
    program = event_program(ROWS)
    truth = sum(exact(event_program([row]), k=binary(3), x=NORMAL) for row in ROWS)
    sampled(host, program, truth, default=Enumerate(lanes), estimators={"x": RP()})
    assert evaluations(host, program, default=Enumerate(lanes), estimators={"x": RP()}) == runs


def test_an_empty_event(host):
    def part(h, logits):
        return h.sample("k", h.dist.Bernoulli(logits=logits[..., None] * h.array(np.zeros(0))).to_event(1))

    program = Program(lambda h, t: part(h, t[0]), lambda h, t: part(h, 0.0 * t[0]), (0.3,))
    without_noise(host, program, [0.0], default=Enumerate())


def nested_part(h, t, side):
    """A global site, local Normals, local Bernoullis."""
    g = h.sample("g", h.dist.Bernoulli(logits=t[0] * (1 - side)))
    with h.plate("n", 2):
        x = h.sample("x", h.dist.Normal(t[1] + g * (1 - side) + h.array([0.0, 0.5]), h.array(0.8)))
        k = h.sample("k", h.dist.Bernoulli(logits=t[2] + x * (1.0 - 0.5 * side)))
        if side:
            h.factor("f", -((x - k + 0.5 * g) ** 2))


NESTED = Program(lambda h, t: nested_part(h, t, 0), lambda h, t: nested_part(h, t, 1), (0.4, -0.3, 0.2), plates=1)


@pytest.fixture(scope="module")
def exact_nested():
    pairs = [(np.array([a, b]), v * w) for (a, v), (b, w) in itertools.product(NORMAL, NORMAL)]
    with enable_x64(True):
        return exact(NESTED, g=binary(), x=pairs, k=binary(2))


@each("options", {"one": {}, "four": {"particles": 4}, "graph": {"dependencies": "graph"}, "plates": {"dependencies": "plates"}})
def test_a_global_site_before_local_ones(host, options, exact_nested):
    sampled(host, NESTED, exact_nested, default=Enumerate(), estimators={"x": RP()}, **options)
    assert evaluations(host, NESTED, default=Enumerate(), estimators={"x": RP()}) == 3


LOGITS = (0.3, -0.4, 0.8, 0.1)


def subsampled_program(size):
    """Four local sites with a logit each, in a plate that takes ``size`` of them at a time."""
    data = [1.0, -2.0, 0.5, 1.5]

    def joined(h, t):
        return h.math.stack(t) if h.name == "numpyro" else torch.cat(t, -1)

    def guide(h, t):
        with h.plate("n", 4, subsample_size=size) as index:
            h.sample("k", h.dist.Bernoulli(logits=joined(h, t)[..., index]))

    def model(h, t):
        with h.plate("n", 4, subsample_size=size) as index:
            k = h.sample("k", h.dist.Bernoulli(h.array(0.3)))
            h.sample("y", h.dist.Normal(2.0 * k, h.array(1.0)), obs=h.array(data)[index])

    return Program(guide, model, LOGITS, plates=1)


@slow_in_numpyro
def test_a_subsampled_plate(host):
    """The subsample is the only noise: its elements have twice their own gradient, the others none."""
    truth = exact(subsampled_program(4), k=binary(4))
    samples = np.concatenate([host.gradients(subsampled_program(2), 1, seed, default=Enumerate()) for seed in range(5)])
    seen = samples != 0
    np.testing.assert_allclose(samples, 2 * truth * seen, rtol=1e-9)
    np.testing.assert_array_equal(seen.sum(1), 2)
    assert len(np.unique(seen, axis=0)) > 1


def hundred(h, t, side):
    with h.plate("n", 100):
        k = h.sample("k", h.dist.Bernoulli(logits=h.array(np.linspace(-1, 1, 100)) + t[0] * (1 - side)))
        if side:
            h.factor("f", h.math.cos(h.array(np.arange(100.0))) * k)


HUNDRED = Program(lambda h, t: hundred(h, t, 0), lambda h, t: hundred(h, t, 1), (0.3,), plates=1)


def test_a_hundred_local_sites_have_no_noise(host):
    samples = host.gradients(HUNDRED, 20, default=Enumerate())
    assert samples.std() < 1e-10 < host.gradients(HUNDRED, 20, default=LR()).std()
    assert evaluations(host, HUNDRED, default=Enumerate()) == 2


def test_single_precision(host):
    truth = exact(local_program(), k=binary(3))
    torch.set_default_dtype(torch.float32)
    with enable_x64(False):
        samples = host.gradients(local_program(), 5, default=Enumerate())
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, np.broadcast_to(truth, (5, 1)), rtol=1e-4)


# ---- what does not change


def beside_each_other(h, t, side):
    x = h.sample("x", h.dist.Normal(t[0] * (1 - side), h.array(0.8)))
    k = h.sample("k", h.dist.Bernoulli(logits=t[1] * (1 - side)))
    y = h.sample("y", h.dist.Normal(t[2] * (1 - side) + 0.3 * k, h.array(0.7)))
    return x, k, y


def beside_model(h, t):
    x, k, y = beside_each_other(h, t, 1)
    h.factor("f", -((x - k + y) ** 2))


BESIDE = Program(lambda h, t: beside_each_other(h, t, 0), beside_model, (0.4, -0.2, 0.5))


@each("options", [{}, {"entropy": "stl"}, {"particles": 4}, {"dependencies": "graph"}])
def test_other_sites_take_their_gradients_from_the_first_run(host, options):
    """At the same draws, other sites keep their gradients and the loss its value (bit by bit unless compiled)."""
    lr, enumerated = ({"estimators": {"k": e}, **options} for e in (LR(), Enumerate()))
    before, after = (host.gradients(BESIDE, 7, **one) for one in (lr, enumerated))
    np.testing.assert_allclose(after[:, [0, 2]], before[:, [0, 2]], rtol=1e-12)
    assert np.all(after[:, 1] != before[:, 1])
    values = [host.gradients(BESIDE, 7, value=True, **one) for one in (lr, enumerated)]
    if host.name == "pyro" or "particles" not in options:
        np.testing.assert_array_equal(*values)
    np.testing.assert_allclose(*values, rtol=1e-14)


# ---- how often the program runs


def counting(host, program, **options):
    """Count how often one step runs guide and model for one particle."""
    t = [host.array(x) for x in program.theta]
    elbo = host.flow.TraceFlow_ELBO(**options)
    if host.name == "pyro":
        calls = Counter()

        def counted(name):
            def part():
                calls[name] += 1
                getattr(program, name)(host, [x.requires_grad_() for x in t])

            return part

        elbo.loss_and_grads(counted("model"), counted("guide"))
        assert calls["model"] == calls["guide"]
        return calls["model"]
    runs = []
    vmap = jax.vmap

    def spy(f, *args, **kwargs):
        mapped = vmap(f, *args, **kwargs)

        def call(*arrays):
            if "variants" in f.__qualname__:
                runs.append(jax.tree.leaves(arrays)[0].shape[0])
            return mapped(*arrays)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "vmap", spy)
        elbo.loss(jax.random.key(0), {}, lambda: program.model(host, t), lambda: program.guide(host, t))
    return 1 + sum(runs)


def apart(n):
    """``n`` sites that share no cost."""

    def part(h, t, side):
        for i in range(n):
            k = h.sample(f"k{i}", h.dist.Bernoulli(logits=t[0] * (1 - side) + 0.1 * i))
            if side:
                h.factor(f"f{i}", 0.3 * i * k)

    return Program(lambda h, t: part(h, t, 0), lambda h, t: part(h, t, 1), (0.3,))


COUNTED = {
    "chain": (CHAIN, {"estimators": {"x": RP()}}, 3),
    "local": (local_program(), {}, 2),
    "lanes": (local_program(outside=True), {}, 4),
    "random lane": (local_program(outside=True), {"default": Enumerate("random")}, 2),
    "event": (event_program(ROWS), {"estimators": {"x": RP()}}, 4),
    "nested": (NESTED, {"estimators": {"x": RP()}}, 3),
    "apart": (apart(5), {"dependencies": "graph"}, 2),
    "apart, by order": (apart(5), {"dependencies": "plates"}, 6),
    "none": (CHAIN, {"default": LR()}, 1),
}


@each(("program", "options", "runs"), COUNTED, slow_in_numpyro=[COUNTED[name] for name in ("event", "nested", "chain")].__contains__)
def test_the_number_of_evaluations(host, program, options, runs):
    options = {"default": Enumerate(), **options}
    assert evaluations(host, program, **options) == counting(host, program, **options) == runs


def test_describe_prints_the_evaluations(host):
    t = [host.array(x) for x in CHAIN.theta]
    parts = lambda: CHAIN.model(host, t), lambda: CHAIN.guide(host, t)
    elbos = [host.flow.TraceFlow_ELBO(estimators={"a": a, "b": LR()}) for a in (LR(), Enumerate())]
    printed = [str(elbo.describe(*parts)).splitlines() for elbo in elbos]
    assert printed[1][-1] == "2 evaluations of the program per particle"
    assert "evaluations" not in printed[0][-1]


@pytest.mark.parametrize("n", [1, 8, 32])
def test_sites_that_share_no_cost_share_a_run(host, n):
    program = apart(n)
    assert evaluations(host, program, default=Enumerate(), dependencies="graph") == 2
    if n == 32 and host.name == "numpyro":  # takes too long to compile
        return

    def elbo(t):
        i = jnp.arange(n)
        q, p = (jnp.stack([1 - jax.nn.sigmoid(x), jax.nn.sigmoid(x)]) for x in (t + 0.1 * i, 0.1 * i))
        return (q * (jnp.log(p) - jnp.log(q))).sum() + (q[1] * 0.3 * i).sum()

    without_noise(host, program, [float(jax.grad(elbo)(0.3))], n=2, default=Enumerate(), dependencies="graph")


# ---- programs that branch on a value, and runs that use other random numbers


def with_branch(h, t):
    """A program whose last cost exists only if a is 1."""
    a = h.sample("a", h.dist.Bernoulli(h.array(0.4)))
    b = h.sample("b", h.dist.Bernoulli(h.array(0.6)))
    if a > 0:
        h.factor("f", -2.0 * b - 0.5)


def without_branch(h, t):
    a = h.sample("a", h.dist.Bernoulli(h.array(0.4)))
    b = h.sample("b", h.dist.Bernoulli(h.array(0.6)))
    h.factor("f", a * (-2.0 * b - 0.5))


def two_bernoullis(h, t):
    h.sample("a", h.dist.Bernoulli(logits=t[0]))
    h.sample("b", h.dist.Bernoulli(logits=t[1]))


@pytest.mark.parametrize("options", [{"dependencies": "graph"}, {}, {"entropy": "analytic"}], ids=str)
def test_pyro_a_branch_that_only_one_run_takes(options):
    h = HOSTS["pyro"]
    truth = exact(Program(two_bernoullis, without_branch, (0.3, -0.4)), a=binary(), b=binary())
    program, samples = Program(two_bernoullis, with_branch, (0.3, -0.4)), []
    for seed in range(200):
        leaf = torch.tensor(program.theta, requires_grad=True)
        pyro.set_rng_seed(seed)
        elbo = h.flow.TraceFlow_ELBO(default=Enumerate(), **options)
        elbo.loss_and_grads(lambda: program.model(h, list(leaf)), lambda: program.guide(h, list(leaf)))  # noqa: B023
        samples.append(-leaf.grad.numpy())
    assert np.all(np.abs(z_scores(np.stack(samples), truth)) < 5), (np.mean(samples, 0), truth)


def test_pyro_a_branch_whose_cost_joins_the_elements_is_refused():
    h = HOSTS["pyro"]
    t = torch.tensor(-9.0, requires_grad=True)

    def guide():
        with pyro.plate("n", 3):
            return pyro.sample("k", h.dist.Bernoulli(logits=t + torch.zeros(3)))

    def model():
        with pyro.plate("n", 3):
            k = pyro.sample("k", h.dist.Bernoulli(0.5 * torch.ones(3)))
        if k.sum() > 1:
            pyro.factor("f", k.sum() ** 2)

    pyro.set_rng_seed(0)  # with this seed no value is 1; in the next run all are
    with pytest.raises(ValueError, match="site 'k': its elements change in one run.*'f' depends on all of them"):
        h.flow.TraceFlow_ELBO(default=Enumerate()).loss_and_grads(model, guide)


def test_pyro_only_programs_that_branch_are_followed_again(monkeypatch):
    """Later runs use the graph of the first, unless Python has looked at a draw."""
    h, followed = HOSTS["pyro"], []
    program_of = flowvi.pyro.run.PyroProgram
    right = program_of._followed
    monkeypatch.setattr(program_of, "_followed", lambda self, sites: followed.append(1) or right(self, sites))
    for model, expected in ((without_branch, 1), (with_branch, 3)):
        followed.clear()
        t = [torch.tensor(x, requires_grad=True) for x in (0.3, -0.4)]
        elbo = h.flow.TraceFlow_ELBO(default=Enumerate(), dependencies="graph")
        elbo.loss_and_grads(lambda: model(h, t), lambda: two_bernoullis(h, t))  # noqa: B023
        assert len(followed) == expected


def test_pyro_a_statement_that_no_draw_decides_is_refused():
    h, runs = HOSTS["pyro"], []

    def model():
        runs.append(1)
        k = pyro.sample("k", h.dist.Bernoulli(torch.tensor(0.5)))
        pyro.factor(f"f{len(runs)}", 2.0 * k)

    def guide():
        pyro.sample("k", h.dist.Bernoulli(logits=torch.tensor(0.3, requires_grad=True)))

    with pytest.raises(ValueError, match="site 'f2': expected the statements of the first run.*use LR"):
        h.flow.TraceFlow_ELBO(default=Enumerate(), dependencies="graph").loss_and_grads(model, guide)


def test_pyro_parameters_that_the_first_run_initializes_at_random():
    """Such a parameter uses random numbers in the first run only; upstream values still stay the same in later runs."""

    def guide():
        w = pyro.param("w", lambda: 1.0 + 0.0 * torch.randn(()))
        x = pyro.sample("x", pyro.distributions.Normal(w, 1.0))
        pyro.sample("k", pyro.distributions.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))
        return x

    def model():
        x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        k = pyro.sample("k", pyro.distributions.Bernoulli(torch.tensor(0.5)))
        pyro.factor("f", 5.0 * x**2 * k)

    elbo = flowvi.pyro.TraceFlow_ELBO(default=RP(), estimators={"k": Enumerate()})
    gradients = []
    for _ in range(2):  # the second time the parameter exists, so the generator is where x is drawn
        pyro.set_rng_seed(0)
        if gradients:
            torch.randn(())
        elbo.loss_and_grads(model, guide)
        gradients.append(float(pyro.param("l").grad))
        pyro.param("l").grad = pyro.param("w").grad = None
    assert gradients[0] == gradients[1]


def test_pyro_without_a_gradient_nothing_runs_again():
    h, calls = HOSTS["pyro"], []
    t = [h.array(x).requires_grad_() for x in CHAIN.theta]

    def model():
        calls.append(1)
        CHAIN.model(h, t)

    elbo = h.flow.TraceFlow_ELBO(default=Enumerate(), estimators={"x": RP()})
    elbo.loss(model, lambda: CHAIN.guide(h, t))
    assert len(calls) == 1
    pyro.infer.SVI(model, lambda: CHAIN.guide(h, t), pyro.optim.Adam({}), elbo).evaluate_loss()
    assert len(calls) == 2
    elbo.loss_and_grads(model, lambda: CHAIN.guide(h, t))
    assert len(calls) == 5


@pytest.mark.parametrize("lanes", ["all", "random"])
def test_pyro_the_generator_is_left_as_by_lr(lanes):
    h, states = HOSTS["pyro"], []
    t = [h.array(x).requires_grad_() for x in CHAIN.theta]
    for estimator in (LR(), Enumerate(lanes)):
        pyro.set_rng_seed(3)
        elbo = h.flow.TraceFlow_ELBO(default=estimator, estimators={"x": RP()})
        elbo.loss_and_grads(lambda: CHAIN.model(h, t), lambda: CHAIN.guide(h, t))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---- other ways to write a program


@pytest.mark.parametrize("options", [{}, {"dependencies": "graph"}, {"entropy": "analytic"}], ids=str)
def test_pyro_a_guide_messenger_runs_again(options):
    class Guide(pyro.infer.autoguide.effect.AutoMessenger):
        def get_posterior(self, name, prior):
            return posterior(name)

    def posterior(name):
        if name == "k":
            return pyro.distributions.Bernoulli(logits=pyro.param("l", torch.tensor(0.3)))
        return pyro.distributions.Normal(pyro.param("m", torch.tensor(0.2)), 0.8)

    def guide():
        for name in ("k", "x"):
            pyro.sample(name, posterior(name))

    def model():
        k = pyro.sample("k", pyro.distributions.Bernoulli(torch.tensor(0.5)))
        x = pyro.sample("x", pyro.distributions.Normal(1.0 * k, 1.0))
        pyro.factor("f", -((x - 2 * k) ** 2))

    results = []
    for either in (guide, Guide(model)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = flowvi.pyro.TraceFlow_ELBO(estimators={"k": Enumerate()}, **options).loss_and_grads(model, either)
        results.append((loss, float(pyro.param("l").grad), float(pyro.param("m").grad)))
    assert results[0] == results[1]


def test_pyro_a_program_that_takes_a_derivative_itself():
    """A guide may differentiate by itself, also in the runs without gradients."""
    host = HOSTS["pyro"]

    def model():
        x = host.sample("x", host.dist.Normal(0.0, 1.0))
        b = host.sample("b", host.dist.Bernoulli(host.array(0.4)))
        host.sample("y", host.dist.Normal(x + b, host.array(0.8)), obs=host.array(1.1))

    def guide(automatic):
        a = host.param("a", host.array(0.7))
        start = torch.tensor(0.5, requires_grad=True)
        loc = torch.autograd.grad(torch.sin(a * start), start, create_graph=True)[0] if automatic else a * torch.cos(a * 0.5)
        host.sample("x", host.dist.Normal(loc, 1.0))
        host.sample("b", host.dist.Bernoulli(logits=host.param("l", host.array(0.3)) * loc))

    params = {"a": np.array(0.7), "l": np.array(0.3)}
    found, expected = (
        host.loss_and_gradients(params, model, lambda automatic=automatic: guide(automatic), estimators={"b": Enumerate()})
        for automatic in (True, False)
    )
    assert_same(expected, found)


def test_the_wrapper_enumerates(host):
    def wrapped(h, t):
        k = h.sample("k", h.flow.Estimated(h.dist.Bernoulli(logits=t[0]), Enumerate()))
        h.sample("x", h.dist.Normal(2.0 * k + t[1], h.array(1.0)))

    program = of_parts(downstream_part)
    by_name = host.gradients(program, 3, estimators={"k": Enumerate()})
    np.testing.assert_allclose(host.gradients(replace(program, guide=wrapped), 3), by_name, rtol=1e-14)


def test_a_site_that_compares_from_the_second_step_on():
    """In Pyro the first step shows that the program runs once, so the state of the generator is not kept then."""
    compares = []

    def guide():
        pyro.sample("k", pyro.distributions.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    def model():
        pyro.factor("f", 3.0 * pyro.sample("k", pyro.distributions.Bernoulli(logits=torch.tensor(0.0))))

    elbo = flowvi.pyro.TraceFlow_ELBO(estimators=lambda site: Enumerate() if compares else LR())
    elbo.loss_and_grads(model, guide)
    compares.append(True)
    for _ in range(2):
        pyro.param("l").grad = None
        elbo.loss_and_grads(model, guide)
        p = torch.sigmoid(torch.tensor(0.3))
        torch.testing.assert_close(pyro.param("l").grad, p * (1 - p) * (0.3 - 3.0), rtol=1e-12, atol=0)


def scanned_part(h, t, side):
    """A site before a scan, which draws from it."""
    k = numpyro.sample("k", h.dist.Bernoulli(logits=t[0] * (1 - side)))

    def step(carry, _):
        z = numpyro.sample("z", h.dist.Normal(0.5 * carry + (1 - side) * (k + t[1]), 1.0))
        return z, z

    _, zs = numpyro.contrib.control_flow.scan(step, 0.0, jnp.arange(2))
    if side:
        numpyro.factor("f", -((zs[1] - k) ** 2))


def unrolled_part(h, t, side):
    k = numpyro.sample("k", h.dist.Bernoulli(logits=t[0] * (1 - side)))
    z0 = numpyro.sample("z0", h.dist.Normal((1 - side) * (k + t[1]), 1.0))
    z1 = numpyro.sample("z1", h.dist.Normal(0.5 * z0 + (1 - side) * (k + t[1]), 1.0))
    if side:
        numpyro.factor("f", -((z1 - k) ** 2))


def test_numpyro_a_scan_downstream():
    truth = exact(of_parts(unrolled_part), k=binary(), z0=NORMAL, z1=NORMAL)
    sampled(HOSTS["numpyro"], of_parts(scanned_part), truth, estimators={"k": Enumerate(), "z": RP()})


def test_numpyro_a_guide_of_many_samples():
    """Each sample is a lane with the gradient of one sample."""
    h = HOSTS["numpyro"]

    def guide(h, t):
        k = numpyro.sample("k", h.dist.Bernoulli(logits=t[0]), sample_shape=(3,))
        numpyro.sample("x", h.dist.Normal(2.0 * k + t[1], 1.0))

    program = of_parts(downstream_part)
    truth = exact(program, k=binary(), x=NORMAL)
    elbo = h.flow.TraceFlow_ELBO(multi_sample_guide=True, estimators={"k": Enumerate(), "x": RP()})
    samples = h.gradients_of(elbo, replace(program, guide=guide), 4000)
    assert np.all(np.abs(z_scores(samples, 3 * truth)) < 5)


# ---- wrong rules, which the tests must reject


def upstream_part(h, t, side):
    """The probability of k depends on x, and the cost depends on both."""
    x = h.sample("x", h.dist.Normal(t[0] * (1 - side), h.array(1.0)))
    k = h.sample("k", h.dist.Bernoulli(logits=(t[1] + 2.0 * x) * (1 - side)))
    if side:
        h.factor("f", 3.0 * x * k)


def downstream_part(h, t, side):
    k = h.sample("k", h.dist.Bernoulli(logits=t[0] * (1 - side)))
    x = h.sample("x", h.dist.Normal((2.0 * k + t[1]) * (1 - side), h.array(1.0)))
    if side:
        h.factor("f", -((x - 1.0) ** 2))


def of_parts(part):
    return Program(lambda h, t: part(h, t, 0), lambda h, t: part(h, t, 1), (0.2, 0.5))


def drawn_anew(host, patch):
    """A wrong rule: later runs draw upstream sites again, with other random numbers."""
    if host.name == "numpyro":
        program = flowvi.numpyro.run.NumPyroProgram
        right = program.variants
        patch.setattr(program, "variants", lambda self, *args: right(replace(self, rng_key=jax.random.split(self.rng_key)[0]), *args))
        return
    patch.setattr(flowvi.pyro.run, "restore_generators", lambda states: torch.manual_seed(1))
    patch.setattr(flowvi.pyro.handlers.attach_estimators, "_hold", lambda self, msg: None)


def kept(host, patch):
    """A wrong rule: downstream sites keep their values, without a weight."""
    if host.name == "numpyro":
        program = flowvi.numpyro.run.NumPyroProgram
        right = program.run

        def run(self, sites, values=None, **options):
            if sites.replaced:
                values = first
            of = right(self, sites, values, **options)
            first.update(
                {name: s.value for name, s in of.guide.items() if name not in sites.replaced and not sites.replaced and name != "k"}
            )
            return of

        first: dict = {}
        patch.setattr(program, "run", run)
        return
    right_plan = comparison.plan
    patch.setattr(comparison, "plan", lambda *args: [one._replace(downstream=frozenset({one.name})) for one in right_plan(*args)])


def in_one_run(host, patch):
    """A wrong rule: all lanes change in one run."""
    patch.setattr(comparison, "_lane_axes", lambda *args: [])


def in_parallel(host, patch):
    """A wrong rule: every plate counts as local to the site."""
    right = comparison.plan

    def plan(tape, branches):
        frames = {site.name: site.frames for site in tape.sites}
        runs = {"num_lanes": 1, "num_runs": 1}
        return [one._replace(frames=frames[one.name], **runs) for one in right(tape, branches)]

    patch.setattr(comparison, "plan", plan)
    patch.setattr(comparison, "_refuse_joint_branch", lambda *args: None)


def both(h, t, side):
    """A cost of two local sites that is 0 unless both are 1."""
    with h.plate("n", 2):
        k = h.sample("k", h.dist.Bernoulli(logits=(t[0] + h.array([0.0, 1.0])) * (1 - side)))
    if side:
        h.factor("f", 1.5 * h.over_plate(k) * (h.over_plate(k) - 1.0))


JOINT = Program(lambda h, t: both(h, t, 0), lambda h, t: both(h, t, 1), (0.3,), plates=1)
FAULTS = {
    "upstream drawn anew": (drawn_anew, of_parts(upstream_part), {"x": NORMAL, "k": binary()}),
    "downstream kept": (kept, of_parts(downstream_part), {"k": binary(), "x": NORMAL}),
    "lanes in one run": (in_one_run, JOINT, {"k": binary(2)}),
    "plates in parallel": (in_parallel, JOINT, {"k": binary(2)}),
}


@each(("fault", "program", "values"), FAULTS)
def test_a_fault_is_rejected(host, fault, program, values, monkeypatch):
    truth = exact(program, **values)
    options = {"default": Enumerate(), "estimators": {"x": RP()} if "x" in values else None}
    sampled(host, program, truth, **options)
    with monkeypatch.context() as patch:
        fault(host, patch)
        assert np.any(np.abs(z_scores(host.gradients(program, 4000, **options), truth)) > 7)


def test_a_live_own_density_is_noise(host, monkeypatch):
    monkeypatch.setattr("flowvi.objectives.elbo._without_own_densities", lambda ops, run: run)
    with pytest.raises(AssertionError):
        test_a_hundred_local_sites_have_no_noise(host)


# ---- refusals


def test_a_bound_refuses(host):
    program = lone(lambda h, t: h.dist.Bernoulli(logits=t[0]), (0.4,))
    with pytest.raises(ValueError, match=r"site 'k': TraceFlow_RenyiELBO takes no estimator that compares.*use LR\(\)"):
        host.bound_gradients(program, 2, default=Enumerate())


def test_a_continuous_site_refuses(host):
    with pytest.raises(ValueError, match=r"site 'x': expected a finite support.*Normal has none; use LR\(\)"):
        host.gradients(CHAIN, 2, estimators={"x": Enumerate()})


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("loop", ["scan", "cond"])
def test_numpyro_control_flow_refuses(loop, wrapped):
    h = HOSTS["numpyro"]

    def draw(name="k"):
        fn = h.dist.Bernoulli(logits=numpyro.param("l", 0.3))
        return numpyro.sample(name, h.flow.Estimated(fn, Enumerate()) if wrapped else fn)

    def step(carry, _):
        return carry, draw()

    def guide():
        numpyro.param("l", 0.3)
        if loop == "scan":
            numpyro.contrib.control_flow.scan(step, 0.0, jnp.arange(3))
        else:
            numpyro.contrib.control_flow.cond(True, lambda _: draw(), lambda _: draw(), None)

    elbo = h.flow.TraceFlow_ELBO(default=LR() if wrapped else Enumerate())
    with pytest.raises(ValueError, match=r"site 'k': Enumerate\(\) has to replace the site's value.*use LR\(\) there"):
        elbo.loss(jax.random.key(0), {"l": 0.3}, guide, guide)


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO", "RenyiELBO"])
def test_pyros_own_objectives_refuse(elbo):
    leaf = torch.tensor(0.3, requires_grad=True)

    def guide():
        return pyro.sample("k", flowvi.pyro.Estimated(pyro.distributions.Bernoulli(logits=leaf), Enumerate()))

    def model():
        pyro.sample("k", pyro.distributions.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(ValueError, match=r"Enumerate\(\) runs the program again.*TraceFlow_ELBO, or LR\(\)"):
        getattr(pyro.infer, elbo)().loss_and_grads(model, guide)
    assert pyro.infer.Predictive(guide, num_samples=3)()["k"].shape == (3,)
    assert float(guide()) in (0.0, 1.0)
    assert np.isfinite(pyro.infer.SVI(model, guide, pyro.optim.Adam({}), pyro.infer.Trace_ELBO()).evaluate_loss())


def test_a_picture_refuses(host):
    with pytest.raises(ValueError, match=r"Enumerate\(\) compares the cost"):
        flowvi.plot.velocity(host.dist.Bernoulli(host.array(0.3)), Enumerate(), "probs")


def test_check_estimator_refuses(host):
    with pytest.raises(ValueError, match=r"found Enumerate\(\), which compares the cost.*gradient_report"):
        flowvi.check_estimator(host.dist.Bernoulli(host.array(0.3)), Enumerate())


def test_pyro_an_annotated_baseline_refuses():
    def guide():
        logits = pyro.param("l", torch.tensor(0.3))
        pyro.sample("k", pyro.distributions.Bernoulli(logits=logits), infer={"baseline": {"use_decaying_avg_baseline": True}})

    def model():
        pyro.sample("k", pyro.distributions.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(ValueError, match=r"site 'k': .* because Enumerate\(\) has no score; remove the baseline, or use LR\(\)"):
        flowvi.pyro.TraceFlow_ELBO(default=Enumerate()).loss_and_grads(model, guide)


def test_lanes_are_all_or_random():
    with pytest.raises(TypeError, match="Enumerate: expected lanes='all' or 'random', found 'one'"):
        Enumerate("one")


@pytest.mark.parametrize("lanes", ["all", "random"])
def test_a_site_with_one_value(host, lanes):
    def site(h, logit):
        return h.dist.Categorical(logits=h.math.stack([logit], -1))

    def guide(h, t):
        h.sample("x", h.dist.Normal(t[1], 1.0))
        h.sample("k", site(h, t[0]))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        h.factor("cost", 2 * x + h.sample("k", site(h, h.array(0.0))))

    samples = host.gradients(Program(guide, model, (0.3, 0.5)), 20, estimators={"x": RP(), "k": Enumerate(lanes)}, entropy="analytic")
    np.testing.assert_allclose(samples, np.broadcast_to([0.0, 1.5], samples.shape), atol=1e-12)


OPS = {"numpyro": flowvi.ops.jax, "pyro": flowvi.ops.torch}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_lane_is_drawn_whatever_is_rounded(host, dtype):
    """At uniform numbers on the border between two lanes and next to it, exactly one lane is drawn."""
    size = 500
    borders = np.cumsum(np.full(size, (1 - comparison.FLOOR) / size + comparison.FLOOR / size, dtype))
    uniforms = np.concatenate([borders, np.nextafter(borders, dtype(0)), np.nextafter(borders, dtype(2)), np.zeros(1, dtype)])
    lanes = np.broadcast_to(np.arange(1, size + 1, dtype=dtype)[:, None], (size, len(uniforms)))
    make = host.array if dtype == np.float64 else (jnp.asarray if host.name == "numpyro" else torch.tensor)
    changed, weight, uniform = make(lanes.copy()), make(np.ones_like(lanes)), make(uniforms)
    one = Comparison(lambda uniforms: None, uniform, event_ndim=0, batch_ndim=1, num_values=1, lanes="random")
    values, weights = comparison._one_of(OPS[host.name], one, changed, weight, uniform)
    np.testing.assert_allclose(np.asarray(weights[0]), size, rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(values[0]) % 1, 0)
    assert set(np.asarray(values[0]).tolist()) == set(range(1, size + 1))

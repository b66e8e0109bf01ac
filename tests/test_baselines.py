"""Baselines of a site: they change no gradient but their own, and Pyro's annotation for baselines keeps its meaning."""

import pickle
from dataclasses import FrozenInstanceError, replace
from functools import partial

import equinox
import flax.linen
import flax.nnx
import jax
import numpy as np
import numpyro
import numpyro.contrib.module
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from cases import one
from hosts import HOSTS, Program, chain
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from pyro.infer import TraceGraph_ELBO

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Baseline, Flow
from flowvi.baselines import _best_of_others

THETA = (0.4, -0.3, 0.7, 0.2)  # m, l, w, b


def upstream(b_of, estimator=LR):
    """x ~ N(m, 1) with RP, then y with an estimator whose baseline is w x + b."""

    def guide(h, t):
        x = h.sample("x", h.dist.Normal(t[0], h.array(1.0)), infer={"estimator": RP()})
        y = h.dist.Bernoulli(logits=t[1] + 0.5 * x) if estimator is LR else h.dist.Normal(t[1] + 0.5 * x, h.array(1.0))
        h.sample("y", y, infer={"estimator": estimator(baseline=b_of(h, t, x))})

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        y = h.sample("y", h.dist.Bernoulli(h.array(0.3)) if estimator is LR else h.dist.Normal(h.array(0.0), h.array(1.0)))
        h.factor("cost", y * x - (y - 0.3) ** 2)

    return Program(guide, model, THETA)


def half(baseline):
    return Flow(lambda x, p, dtheta: 0.5 * dtheta.loc, baseline=baseline)


LIVE = upstream(lambda h, t, x: Baseline(lambda x: t[2] * x + t[3], x))
LIVE_FLOW = upstream(lambda h, t, x: Baseline(lambda x: t[2] * x + t[3], x), half)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("estimator", [LR, half])
def test_the_squared_error_reaches_nothing_but_the_baseline(host, estimator, particles):
    fixed = upstream(lambda h, t, x: Baseline(lambda x: THETA[2] * x + THETA[3], x), estimator)
    leaking = upstream(lambda h, t, x: Baseline(lambda: THETA[2] * x + THETA[3]), estimator)
    live, fixed, leaking = (
        host.gradients(p, 50, particles=particles) for p in (LIVE if estimator is LR else LIVE_FLOW, fixed, leaking)
    )
    np.testing.assert_allclose(live[:, :2], fixed[:, :2], rtol=1e-12)
    assert np.all(fixed[:, 2:] == 0)
    assert np.all(live[:, 2:] != 0)
    assert np.all(np.abs(leaking[:, 0] - fixed[:, 0]) > 1e-6)  # a closure is not detached, and the test detects it


def test_the_baseline_descends_its_squared_error(host):
    """The derivative in b is the mean of C - b, where C is the cost that the score of y multiplies."""
    n, (m, logit, w, b) = 40_000, THETA
    gradients = host.gradients(LIVE, n)[:, 3]
    x, weights = np.polynomial.hermite_e.hermegauss(60)
    x, weights = x + m, weights / weights.sum()
    p = 1 / (1 + np.exp(-(logit + 0.5 * x)))
    cost = {k: k * x - (k - 0.3) ** 2 + np.log(0.3 if k else 0.7) - np.log(p if k else 1 - p) for k in (0, 1)}
    error = {k: cost[k] - w * x - b for k in (0, 1)}
    mean = (weights * (p * error[1] + (1 - p) * error[0])).sum()
    variance = (weights * (p * error[1] ** 2 + (1 - p) * error[0] ** 2)).sum() - mean**2
    assert abs(gradients.mean() - mean) < 5 * np.sqrt(variance / n)


def test_a_baseline_for_each_plate_element(host):
    """With constant costs c_i under LR, the baselines c_i leave no gradient in any sample."""
    costs = [1.0, -2.0, 0.5]

    def program(baseline):
        def guide(h, t):
            with h.plate("i", 3):
                probs = t[0] + h.array([0.0, 0.1, 0.2])
                h.sample("k", h.dist.Bernoulli(probs).mask(False), infer={"estimator": LR(baseline=baseline(h))})

        def model(h, t):
            with h.plate("i", 3):
                k = h.sample("k", h.dist.Bernoulli(h.array(0.5)).mask(False))
                h.factor("cost", h.array(costs) + 0.0 * k)

        return Program(guide, model, (0.4,), plates=1)

    for particles in (1, 2):
        own = host.gradients(program(lambda h: Baseline(lambda: h.array(costs))), 20, particles=particles)
        np.testing.assert_allclose(own, 0.0, atol=1e-12)
    with pytest.raises(ValueError, match=r"site 'k': a baseline must have the shape of the site's plates .* found \(4,\)"):
        host.gradients(program(lambda h: Baseline(lambda: h.array([1.0, 2.0, 3.0, 4.0]))), 3)


def local(baseline, shared=0.0):
    """Four local Normals under LR, each with its own cost, and a cost that depends on all of them."""

    def guide(h, t):
        with h.plate("i", 4):
            h.sample("x", h.dist.Normal(t[0], h.array(1.0)).mask(False), infer={"estimator": LR(baseline=baseline)})

    def model(h, t):
        with h.plate("i", 4):
            x = h.sample("x", h.dist.Normal(t[0], h.array(1.0)).mask(False))
            h.factor("own", 10.0 + x**2)
        h.factor("shared", shared * h.over_plate(x) ** 2)

    return Program(guide, model, (0.5,), plates=1)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_the_mean_over_a_plate(host, shared, particles):
    """The baseline is the mean of the other elements' own costs, without the shared cost, which depends on every element."""
    exact = 4 * (2 * 0.5) + shared * 2 * (4 * 0.5) * 4
    plain, plate = (host.gradients(local(b, shared), 40_000, particles=particles, baseline=None) for b in (None, "plate"))
    for samples in (plain, plate):
        assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))
    assert plate.var() < 0.5 * plain.var()
    if host.name == "pyro":
        looped = host.gradients(local("plate", shared), 40_000, particles=particles, baseline=None, vectorize=False)
        assert np.all(np.abs(looped.mean(0) - exact) < 5 * looped.std(0) / np.sqrt(len(looped)))


# ---- trained by the user's optimizer, with networks from the hosts' modules

TARGET = np.array([-1.0, 0.5, 2.0])


def equinox_network():
    network = numpyro.contrib.module.eqx_module("net", equinox.nn.Linear(1, 1, key=jax.random.key(0)))
    return jax.vmap(network)


def flax_network():
    return numpyro.contrib.module.flax_module("net", flax.linen.Dense(1), input_shape=(3, 1))


def nnx_network():
    return numpyro.contrib.module.nnx_module("net", flax.nnx.Linear(1, 1, rngs=flax.nnx.Rngs(0)))


@pytest.mark.parametrize("make", [equinox_network, flax_network, nnx_network])
def test_a_network_trained_in_numpyro(make):
    data = jax.numpy.asarray(TARGET)

    def guide():
        network = make()
        with numpyro.plate("i", 3):
            baseline = Baseline(lambda x: network(x[:, None])[:, 0], data)
            numpyro.sample("k", numpyro_dist.Bernoulli(0.5), infer={"estimator": LR(baseline=baseline)})

    def model():
        with numpyro.plate("i", 3):
            k = numpyro.sample("k", numpyro_dist.Bernoulli(0.5))
            numpyro.factor("cost", 3 * data - 1 + 0 * k)

    svi = SVI(model, guide, numpyro.optim.Adam(0.05), flowvi.numpyro.TraceFlow_ELBO())
    fitted = jax.tree.leaves(svi.run(jax.random.key(1), 600, progress_bar=False).params["net$params"])
    np.testing.assert_allclose(sorted(float(leaf.squeeze()) for leaf in fitted), [-1, 3], atol=0.02)


def test_a_network_trained_in_pyro():
    data, network = torch.tensor(TARGET), torch.nn.Linear(1, 1)

    def guide():
        pyro.module("net", network)
        with pyro.plate("i", 3):
            baseline = Baseline(lambda x: network(x[:, None])[:, 0], data)
            pyro.sample("k", pyro_dist.Bernoulli(torch.tensor(0.5)), infer={"estimator": LR(baseline=baseline)})

    def model():
        with pyro.plate("i", 3):
            pyro.sample("k", pyro_dist.Bernoulli(torch.tensor(0.5)))
            pyro.factor("cost", 3 * data - 1)

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), flowvi.pyro.TraceFlow_ELBO())
    for _ in range(600):
        svi.step()
    np.testing.assert_allclose([network.weight.item(), network.bias.item()], [3, -1], atol=0.02)


# ---- refusals: inputs that are not known to be upstream, and baselines inside scan


def test_refused_baselines(host):
    with pytest.raises(TypeError, match="LR: expected baseline=flowvi.Baseline.* found 2.0"):
        LR(baseline=2.0)
    alone = Program(
        lambda h, t: h.sample("k", h.dist.Bernoulli(t[0]), infer={"estimator": LR(baseline="plate")}),
        lambda h, t: h.sample("k", h.dist.Bernoulli(h.array(0.5))),
        (0.4,),
    )
    with pytest.raises(ValueError, match="site 'k': baseline='plate' needs a plate of several elements"):
        host.gradients(alone, 1)
    with pytest.raises(TypeError, match="Baseline: expected a function of the inputs, found 2.0"):
        Baseline(2.0)

    def model(h, t):
        k = h.sample("k", h.dist.Bernoulli(h.array(0.5)), infer={"estimator": LR(baseline=Baseline(lambda x: x, h.array(1.0)))})
        h.factor("cost", k)

    program = Program(lambda h, t: h.sample("k", h.dist.Bernoulli(t[0])), model, (0.4,))
    with pytest.raises(ValueError, match="site 'k': a baseline with inputs cannot be given in the model"):
        host.gradients(program, 1)


def test_names_are_turned_into_baselines_once():
    for name in ("plate", "optimal"):
        estimator = LR(baseline=name)
        assert repr(estimator) == f"LR(baseline='{name}')"
        assert estimator == LR(baseline=estimator.baseline) != LR()
        assert pickle.loads(pickle.dumps(estimator)) == estimator
        assert hash(replace(estimator, q=abs)) == hash(LR(name, abs))
    assert LR("plate") != LR("optimal")
    with pytest.raises(FrozenInstanceError):
        estimator.baseline = None
    with pytest.raises(TypeError, match="LR: expected baseline=flowvi.Baseline.* found 'mean'"):
        LR(baseline="mean")


def test_a_baseline_in_scan_is_refused():
    def body(carry, _):
        k = numpyro.sample("k", numpyro_dist.Bernoulli(0.4), infer={"estimator": LR(baseline=Baseline(lambda: 1.0))})
        return carry + k, None

    def program():
        scan(body, 0, None, length=3)

    with pytest.raises(ValueError, match="site 'k': inside scan or cond an estimator cannot have a baseline of its own"):
        flowvi.numpyro.TraceFlow_ELBO().loss(jax.random.key(0), {}, program, program)


# ---- Pyro's infer={"baseline": {...}}

OPTIONS = {
    "decaying average": lambda net: {"use_decaying_avg_baseline": True, "baseline_beta": 0.8},
    "network": lambda net: {"nn_baseline": net, "nn_baseline_input": torch.tensor([[1.0], [2.0], [-1.0]])},
    "value": lambda net: {"baseline_value": net(torch.ones(3, 1))},
    "both": lambda net: {**OPTIONS["decaying average"](net), **OPTIONS["network"](net)},
}


@pytest.mark.parametrize("said", OPTIONS)
def test_a_program_written_for_tracegraph(said):
    """The gradients are those of Pyro's TraceGraph_ELBO, which is right here and drops the entropy's score like "stl".

    Those of the network are half as large, because flowvi halves the squared error.
    """

    class Network(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, 0]

    torch.manual_seed(3)
    network = Network(1, 1)

    def guide():
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.1]))
        with pyro.plate("i", 3):
            pyro.sample("k", pyro_dist.Bernoulli(logits=logits), infer={"baseline": OPTIONS[said](network)})

    def model():
        with pyro.plate("i", 3):
            k = pyro.sample("k", pyro_dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("y", pyro_dist.Normal(2 * k, 1.0), obs=torch.tensor(TARGET))

    def steps(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        result = []
        for _ in range(4):
            network.zero_grad()
            elbo.loss_and_grads(model, guide)
            leaf = pyro.param("logits").unconstrained()
            result.append((leaf.grad.clone(), *(torch.zeros(1) if p.grad is None else p.grad.clone() for p in network.parameters())))
            leaf.grad = None
        average = "__baseline_avg_downstream_cost_k"
        return result, pyro.param(average) if average in pyro.get_param_store() else None

    (ours, average), (theirs, host_average) = steps(flowvi.pyro.TraceFlow_ELBO(entropy="stl")), steps(TraceGraph_ELBO())
    for (logits, *net), (host_logits, *host_net) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(logits, host_logits)
        for gradient, host_gradient in zip(net, host_net, strict=True):
            torch.testing.assert_close(2 * gradient, host_gradient)
    assert (average is None) == (host_average is None) == (said in ("network", "value"))
    if average is not None:
        torch.testing.assert_close(average, host_average)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": True}, r"site 'k': infer\['baseline'\] has no option \['decay'\]; the options are: baseline_beta"),
        ({"nn_baseline": abs, "baseline_value": 1.0}, "site 'k': .* takes nn_baseline or baseline_value, found both"),
        ({"baseline_value": torch.ones(2)}, r"site 'k': a baseline must have the shape of the site's plates .* found \(2,\)"),
    ],
)
def test_wrong_options(options, message):
    program = chain(0.4, {"k": lambda h, t, v: h.dist.Bernoulli(t[0])}, {"k": lambda h, t, v: v["k"]})

    def guide(h, t):
        h.sample("k", h.dist.Bernoulli(t[0]), infer={"baseline": options})

    with pytest.raises(ValueError, match=message):
        HOSTS["pyro"].gradients(Program(guide, program.model, (0.4,)), 3)


def test_two_baselines_at_one_site():
    def guide():
        estimator = LR(baseline=Baseline(lambda: 1.0))
        pyro.sample("k", pyro_dist.Bernoulli(0.4), infer={"estimator": estimator, "baseline": {"baseline_value": 1.0}})

    with pytest.raises(ValueError, match=r"site 'k': expected one baseline, found Baseline\(<lambda>\) and infer\['baseline'\]"):
        flowvi.pyro.TraceFlow_ELBO().loss(guide, guide)


LOC_SCALE = {"loc": [0.3, -0.2], "scale": [0.8, 1.2]}
LOGITS = {"logits": [[0.3, -0.2, 0.1], [0.0, 0.4, -0.5]]}
APART = {
    **{family: (LOC_SCALE, [0.5, 0.1]) for family in ("Normal", "LogNormal", "Laplace", "Logistic", "Cauchy", "Gumbel")},
    "StudentT": ({"df": [3.0, 5.0], **LOC_SCALE}, [0.5, 0.1]),
    **{family: ({"scale": [0.8, 1.2]}, [0.5, 0.1]) for family in ("HalfNormal", "HalfCauchy")},
    "Gamma": ({"concentration": [0.8, 2.2], "rate": [1.0, 0.6]}, [0.5, 0.1]),
    "VonMises": ({"loc": [0.3, -0.2], "concentration": [0.8, 2.2]}, [0.5, 0.1]),
    "Exponential": ({"rate": [0.8, 1.2]}, [0.5, 0.1]),
    "Poisson": ({"rate": [0.8, 1.2]}, [2.0, 1.0]),
    "Bernoulli": ({"logits": [0.3, -0.2]}, [1.0, 0.0]),
    "Bernoulli of probs": ({"probs": [0.3, 0.8]}, [1.0, 0.0]),
    "Binomial": ({"total_count": [4.0, 3.0], "logits": [0.3, -0.2]}, [1.0, 2.0]),
    "Binomial of probs": ({"total_count": [4.0, 3.0], "probs": [0.3, 0.8]}, [1.0, 2.0]),
    "Categorical": (LOGITS, [1.0, 2.0]),
    "Categorical of probs": ({"probs": [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]}, [1.0, 2.0]),
    "OneHotCategorical": (LOGITS, [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
}


@pytest.mark.parametrize("family", APART)
def test_the_score_is_the_sum_of_its_parts(host, family):
    """The parts of the score of `LR(baseline="optimal")` sum to the derivative of the log density, and each has its own square."""
    if not hasattr(host.dist, family.split()[0]):
        pytest.skip(f"NumPyro has no {family}")
    parameters, x = APART[family]
    live = {name: np.array(value) for name, value in parameters.items() if name != "total_count"}
    x = host.array(x) if family.split()[0] != "Categorical" else host.integers(np.array(x, int))

    def target(live):
        fixed = {"total_count": host.array(parameters["total_count"])} if "total_count" in parameters else {}
        return host.target("x", getattr(host.dist, family.split()[0])(**fixed, **live), enters=True)

    _, of_parts = host.value_and_gradient(lambda live: sum(score.sum() for score, _ in target(live).scores(x)), live)
    _, exact = host.value_and_gradient(lambda live: target(live).p.log_prob(x).sum(), live)
    for name in live:
        assert np.any(np.asarray(exact[name]) != 0)
        np.testing.assert_allclose(of_parts[name], exact[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("event_ndim", [0, 1])
def test_the_score_under_a_constant_transform(host, event_ndim):
    """Under a constant transform, as in NumPyro's autoguides, the parts are those of the base. A live transform has none."""
    transforms = host.dist.transforms
    live = {"loc": np.array([0.3, -0.2]), "scale": np.array([0.8, 1.2])}

    def target(live, factor=2.0):
        of = [transforms.ExpTransform(), transforms.AffineTransform(1.0, factor)]
        fn = host.dist.TransformedDistribution(host.dist.Normal(live["loc"], live["scale"]), of)
        return host.target("x", fn.expand([3, 2]).to_event(event_ndim), enters=False)

    x = host.array([[2.1, 1.3], [1.5, 4.0], [3.0, 1.1]])
    _, of_parts = host.value_and_gradient(lambda live: sum(score.sum() for score, _ in target(live).scores(x)), live)
    _, exact = host.value_and_gradient(lambda live: target(live).p.log_prob(x).sum(), live)
    for name in live:
        np.testing.assert_allclose(of_parts[name], exact[name], rtol=1e-10)
    with pytest.raises(
        ValueError, match="site 'x': baseline='optimal' knows the parameters of Normal, .*; found TransformedDistribution"
    ):
        host.value_and_gradient(lambda live: target(live, live["factor"]).scores(x)[0][0].sum(), live | {"factor": np.array(2.0)})


def test_optimal_without_a_derivative_in_pyro():
    """Without gradients the loss is that of any other baseline."""
    program = chain([0.3], {"x": lambda h, t, v: h.dist.Bernoulli(logits=t[0])}, {"x": lambda h, t, v: v["x"] - 0.2})
    losses = []
    for estimator in (LR(baseline="optimal"), LR()):
        pyro.set_rng_seed(0)
        elbo = flowvi.pyro.TraceFlow_ELBO(5, max_plate_nesting=0, vectorize_particles=True, estimators={"x": estimator})
        t = [pyro.param("t", torch.tensor(0.3))]
        losses.append(elbo.loss(partial(program.model, HOSTS["pyro"], t), partial(program.guide, HOSTS["pyro"], t)))
    assert losses[0] == losses[1]


def test_numpyro_optimal_beside_an_integer():
    """NumPyro keeps a scale of 1 an integer, in which JAX takes no derivative."""
    whole, real = (
        HOSTS["numpyro"].gradients(
            chain(0.4, {"x": lambda h, t, v, scale=scale: h.dist.Normal(t[0], scale)}, {"x": lambda h, t, v: v["x"] ** 2}),
            3,
            particles=2,
            estimators={"x": LR(baseline="optimal")},
        )
        for scale in (1, 1.0)
    )
    np.testing.assert_array_equal(whole, real)


def test_optimal_under_a_transform(host):
    """The mean is exact for E[x^2] = exp(2 m + 2 s^2), with x = exp(z) and z ~ N(m, s)."""

    def exp_normal(h, m, s):
        return h.dist.TransformedDistribution(h.dist.Normal(m, s), [h.dist.transforms.ExpTransform()])

    m, s = 0.2, 0.3
    mean = np.exp(2 * m + 2 * s**2)
    program = one((m, s), exp_normal, lambda h, x: x**2)
    samples = host.gradients(program, 20_000, particles=8, estimators={"x": LR(baseline="optimal")})
    assert np.all(np.abs(samples.mean(0) - (2 * mean, 4 * s * mean)) < 5 * samples.std(0) / np.sqrt(len(samples)))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_baseline_of_the_others(host, weighted):
    """The baseline of each particle and parameter is sum_j w_j^2 psi_j^2 phi_j / sum_j w_j^2 psi_j^2 over the other particles."""
    rng = np.random.default_rng(0)
    psi, cost, weight = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 2)), rng.exponential(size=(4, 3, 2))
    w = weight if weighted else 1.0
    found = _best_of_others(host.ops, host.array(psi**2), host.array(w * cost), host.array(weight) if weighted else None)
    exact = np.empty_like(psi)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        norm = ((w * psi) ** 2)[others].sum(0)
        exact[k] = ((w * psi) ** 2 * cost)[others].sum(0) / norm
    np.testing.assert_allclose(np.asarray(found), exact, rtol=1e-12)


def test_optimal_for_each_parameter(host):
    """loc and scale have different best baselines, and the particles estimate both."""
    program = one((0.0, 1.0), lambda h, loc, scale: h.dist.Normal(loc, scale), lambda h, x: x**2)
    particles, n = 300, 700
    samples, loo = (
        host.gradients(program, n, particles=particles, estimators={"x": e}, seed=1) for e in (LR(baseline="optimal"), LR())
    )
    x, weights = np.polynomial.hermite_e.hermegauss(30)
    weights, cost = weights / weights.sum(), x**2
    psi = np.stack([x, x**2 - 1])
    b = (psi**2 * cost) @ weights / (psi**2 @ weights)
    best = (psi * (cost - b[:, None])) ** 2 @ weights - ((psi * cost) @ weights) ** 2
    of_estimated_b = (psi**4 * (cost - b[:, None]) ** 2) @ weights / (psi**2 @ weights) / particles
    of_mean = (psi * (cost - cost @ weights)) ** 2 @ weights - ((psi * cost) @ weights) ** 2
    assert abs(b[0] - b[1]) > 1
    assert np.all(np.abs(samples.mean(0) - (0.0, 2.0)) < 5 * np.sqrt((best + of_estimated_b) / particles / n))
    found = particles * samples.var(0)
    assert np.all(found > 0.85 * best)
    assert np.all(found < 1.15 * (best + of_estimated_b))
    np.testing.assert_allclose(particles * loo.var(0), of_mean, rtol=0.15)
    assert np.all(of_mean > 1.3 * (best + of_estimated_b))  # so that the test can tell the two apart


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("q", [False, True])
def test_optimal_baselines_are_unbiased(host, q, vectorize):
    """The mean is exact in a plate, below another site, for arrays of parameters, and with proposals."""
    categorical = lambda p: type(p)(logits=0.5 * p.logits)

    def guide(h, t):
        k = h.sample("k", h.dist.Categorical(logits=h.math.stack([t[0] + 0.0, t[1] + 0.0, 0 * t[0]], -1)).mask(False))
        with h.plate("i", 2):
            h.sample("x", h.dist.Normal(t[2] * (k + 1.0), h.array([0.7, 1.1])).mask(False))

    def model(h, t):
        k = h.sample("k", h.dist.Categorical(logits=h.array(np.zeros(3))).mask(False))
        with h.plate("i", 2):
            x = h.sample("x", h.dist.Normal(0.0 * k, h.array([1.0, 1.0])).mask(False))
            h.factor("cost", 5.0 + h.array([1.0, 0.5]) * (x - 1) ** 2 * (k + 0.5))

    program = Program(guide, model, (0.2, -0.4, 0.6), plates=1)
    wider = lambda p: host.dist.Normal(p.loc, 1.3 * p.scale)
    estimators = {"k": LR("optimal", categorical if q else None), "x": LR("optimal", wider if q else None)}
    theta = np.array(program.theta)
    probs = np.exp([*theta[:2], 0.0]) / np.exp([*theta[:2], 0.0]).sum()
    k, a, s2 = np.arange(3), np.array([1.0, 0.5]), np.array([0.7, 1.1]) ** 2
    mean = 10.0 + (a * ((theta[2] * (k[:, None] + 1) - 1) ** 2 + s2)).sum(1) * (k + 0.5)
    of_mean = (a * 2 * (theta[2] * (k[:, None] + 1) - 1) * (k[:, None] + 1)).sum(1) * (k + 0.5)
    exact = [*(probs * (mean - probs @ mean))[:2], probs @ of_mean]
    samples = host.gradients(program, 6000, particles=3, estimators=estimators, vectorize=vectorize)
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))


def test_optimal_baselines_are_refused(host):
    program = one((0.3,), lambda h, loc: h.dist.Normal(loc, h.array(1.0)), lambda h, x: x**2)
    with pytest.raises(ValueError, match=r"site 'x': baseline='optimal' needs several particles, found 1"):
        host.gradients(program, 1, estimators={"x": LR(baseline="optimal")})
    with pytest.raises(TypeError, match="Flow has no baseline='optimal'"):
        Flow(loc=lambda x, p: 0.5, baseline="optimal")

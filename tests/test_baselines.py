"""Baselines of a site's own: they stay out of every gradient but their own, and Pyro's way to say them keeps its meaning."""

import equinox
import jax
import numpy as np
import numpyro
import numpyro.contrib.module
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, chain
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from pyro.infer import TraceGraph_ELBO

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Baseline, Flow

THETA = (0.4, -0.3, 0.7, 0.2)  # m, l, w, b


def upstream(b_of, estimator=LR):
    """x ~ N(m, 1) by RP, then y by an estimator whose baseline reads x; the baseline is w x + b."""

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
    assert np.all(np.abs(leaking[:, 0] - fixed[:, 0]) > 1e-6)  # a closure is not detached, and the test sees it


def test_the_baseline_descends_its_squared_error(host):
    """The derivative in b is the mean of C - b, with C the cost of the score of y."""
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
    """Constant costs c_i under LR: with the baseline c_i of its own element no gradient is left, in every sample."""
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
    """Four local Normals under LR with a cost of their own, and a cost that reads all of them."""

    def guide(h, t):
        with h.plate("i", 4):
            h.sample("x", h.dist.Normal(t[0], h.array(1.0)).mask(False), infer={"estimator": LR(baseline=baseline)})

    def model(h, t):
        with h.plate("i", 4):
            x = h.sample("x", h.dist.Normal(t[0], h.array(1.0)).mask(False))
            h.factor("own", 10.0 + x**2)
        h.factor("shared", shared * (x.sum(-1, keepdims=True) if h.name == "pyro" else x.sum()) ** 2)

    return Program(guide, model, (0.5,), plates=1)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_the_mean_over_a_plate(host, shared, particles):
    """The other elements' own costs are a baseline; the shared cost, which every element moves, stays out of it."""
    exact = 4 * (2 * 0.5) + shared * 2 * (4 * 0.5) * 4
    plain, plate = (host.gradients(local(b, shared), 40_000, particles=particles, baseline=None) for b in (None, "plate"))
    for samples in (plain, plate):
        assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))
    assert plate.var() < 0.5 * plain.var()
    if host.name == "pyro":
        looped = host.gradients(local("plate", shared), 40_000, particles=particles, baseline=None, vectorize=False)
        assert np.all(np.abs(looped.mean(0) - exact) < 5 * looped.std(0) / np.sqrt(len(looped)))


# ---- trained by the user's own optimizer, networks through the hosts' own modules

TARGET = np.array([-1.0, 0.5, 2.0])


def test_a_network_trained_in_numpyro():
    data = jax.numpy.asarray(TARGET)

    def guide():
        network = numpyro.contrib.module.eqx_module("net", equinox.nn.Linear(1, 1, key=jax.random.key(0)))
        with numpyro.plate("i", 3):
            baseline = Baseline(lambda x: jax.vmap(network)(x[:, None])[:, 0], data)
            numpyro.sample("k", numpyro_dist.Bernoulli(0.5), infer={"estimator": LR(baseline=baseline)})

    def model():
        with numpyro.plate("i", 3):
            k = numpyro.sample("k", numpyro_dist.Bernoulli(0.5))
            numpyro.factor("cost", 3 * data - 1 + 0 * k)

    svi = SVI(model, guide, numpyro.optim.Adam(0.05), flowvi.numpyro.TraceFlow_ELBO())
    network = svi.run(jax.random.key(1), 600, progress_bar=False).params["net$params"]
    np.testing.assert_allclose([network.weight[0, 0], network.bias[0]], [3, -1], atol=0.02)


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


# ---- what cannot be seen to be upstream, or out of reach, is refused


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
    with pytest.raises(ValueError, match="site 'k': a baseline with inputs cannot be said in the model"):
        host.gradients(program, 1)


def test_a_baseline_in_scan_is_refused():
    def body(carry, _):
        k = numpyro.sample("k", numpyro_dist.Bernoulli(0.4), infer={"estimator": LR(baseline=Baseline(lambda: 1.0))})
        return carry + k, None

    def program():
        scan(body, 0, None, length=3)

    with pytest.raises(ValueError, match="site 'k': inside scan or cond the inputs of a baseline are out of reach"):
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
    """The same gradients as under Pyro's TraceGraph_ELBO, which is right here and drops the entropy's own score as "stl" does.

    Those of the network are halved, as its squared error is.
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

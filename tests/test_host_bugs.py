"""Programs whose gradient has a closed form, at which one of the hosts' own objectives is wrong and flowvi is right.

Each docstring says what the host gets wrong. If the half of a test that shows the host's bug fails, the host has fixed the bug: remove
that half, and note the version.
"""

import funsor
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, chain, expected_under, z_scores
from numpyro.contrib.control_flow import scan
from pyro.distributions.testing.rejection_gamma import RejectionGamma

from flowvi import LR, RP, Auto, Flow

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]
KINDS = {"LR": LR(), "RP": RP(), "half": Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
DATA = np.array([0.5, -1.0, 2.0, 0.3])
GRAPH = numpyro.infer.TraceGraph_ELBO()


def wrong_under(objective, program, host, exact, n=20_000):
    """Assert that the host's own objective is far from the exact gradient. If not, the host has fixed it."""
    samples = host.gradients_of(objective, program, n)
    assert np.abs(z_scores(samples, exact)).max() > 5, (samples.mean(0), exact)


def score_normal(h, loc, scale=1.0):
    """A Normal for which the host's own objectives use a score."""
    return h.score_normal(loc, h.array(scale))


def normal(h, loc, scale=1.0):
    return h.dist.Normal(loc, h.array(scale))


# ---- 1: NumPyro's Trace_ELBO and sites that are not reparameterized


def test_numpyro_trace_elbo_has_no_score():
    """Trace_ELBO never looks at has_rsample: the logits of a mixture silently get the gradient 0.

    E[x^2] = sum_k p_k (m_k^2 + s_k^2), whose derivative in the logit k is p_k (m_k^2 + s_k^2 - E[x^2]).
    """
    means, scales, logits = np.array([-1.0, 0.5, 2.0]), np.array([0.5, 1.0, 0.7]), np.array([0.2, -0.3, 0.4])

    def mixture(h, t, v):
        components = h.dist.Normal(h.array(means), h.array(scales))
        return h.dist.MixtureSameFamily(h.dist.Categorical(logits=jnp.stack(t)), components)

    program = chain(logits, {"x": mixture}, {"x": lambda h, t, v: v["x"] ** 2})
    p, f = np.exp(logits) / np.exp(logits).sum(), means**2 + scales**2
    exact = p * (f - p @ f)
    expected_under(program, NUMPYRO, exact)
    wrong_under(numpyro.infer.Trace_ELBO(), program, NUMPYRO, exact)


# ---- 2: NumPyro's TraceGraph_ELBO and scales


@pytest.mark.parametrize("particles", [1, 4])
@ALL_KINDS
def test_scale_acts_on_costs_only(host, kind, particles):
    """NumPyro's TraceGraph_ELBO scales the score as well as the costs: twice the gradient under ``handlers.scale``.

    A scale of 2 around both programs should double the gradient: d/dm of -KL(N(m, 1) || N(0, 1)) is -m.
    """

    def part(h, d):
        with h.scale(2.0):
            h.sample("x", d)

    def program(normal):
        return Program(lambda h, t: part(h, normal(h, t[0])), lambda h, t: part(h, normal(h, 0 * t[0])), (0.7,))

    expected_under(program(normal), host, -1.4, estimators={"x": KINDS[kind]}, particles=particles, n=40_000 // particles)
    if host is NUMPYRO and kind == "LR":
        wrong_under(numpyro.infer.TraceGraph_ELBO(particles), program(score_normal), host, -1.4)


@ALL_KINDS
def test_subsampled_plate(host, kind):
    """NumPyro's TraceGraph_ELBO scales the score as well as the costs: N/B times the gradient of a subsampled local latent.

    Two of four elements, scaled by 2: d/dm of -KL(N(m, 1) || N(0, 1)) - E[(y - z)^2] / 2 of an element is -m + (y - m).
    """

    def part(h, loc, normal, observe):
        # the subsample is fixed in Pyro, where replicates share one
        plate = numpyro.plate("n", 4, 2, -1) if h.name == "numpyro" else pyro.plate("n", 4, subsample=torch.tensor([0, 2]), dim=-1)
        with plate as index:
            z = h.sample("z", normal(h, loc + 0 * h.array(DATA)[index]))
            if observe:
                h.sample("y", h.dist.Normal(z, h.array(1.0)), obs=h.array(DATA)[index])

    def program(family):
        return Program(lambda h, t: part(h, t[0], family, False), lambda h, t: part(h, 0 * t[0], normal, True), (0.7,), plates=1)

    elements = 2 * (-0.7 + (DATA - 0.7))
    exact = elements.sum() / 2 if host is NUMPYRO else elements[0] + elements[2]
    expected_under(program(normal), host, exact, estimators={"z": KINDS[kind]})
    if host is NUMPYRO and kind == "LR":
        wrong_under(GRAPH, program(score_normal), host, exact)


# ---- 3: NumPyro's TraceGraph_ELBO and observations without a plate


@ALL_KINDS
def test_observations_without_a_plate(kind):
    """NumPyro's TraceGraph_ELBO counts the scalar costs once for each element of a vector observation outside every plate.

    The vector is one cost: d/dm of -KL(N(m, 1) || N(0, 1)) - sum E[(y - z)^2] / 2 is -m + sum (y - m).
    """

    def model(h, t):
        z = h.sample("z", h.dist.Normal(0.0, 1.0))
        h.sample("y", h.dist.Normal(z, 1.0), obs=h.array(DATA))

    def program(normal):
        return Program(lambda h, t: h.sample("z", normal(h, t[0])), model, (0.7,))

    exact = -0.7 + (DATA - 0.7).sum()
    expected_under(program(normal), NUMPYRO, exact, estimators={"z": KINDS[kind]})
    if kind == "LR":
        with pytest.warns(UserWarning, match="Missing a plate statement for batch dimension -1 at site 'y'"):
            wrong_under(GRAPH, program(score_normal), NUMPYRO, exact)


# ---- 4 and 8: NumPyro's TraceGraph_ELBO and factors of a guide, Pyro's Trace_ELBO and auxiliary sites


def factor_of_the_guide(h, value):
    if h.name == "pyro":
        pyro.factor("f", value, has_rsample=True)
    else:
        numpyro.factor("f", value)


@ALL_KINDS
def test_factor_in_the_guide(host, kind):
    """NumPyro's TraceGraph_ELBO treats a factor of the guide as a score, and so drops its derivative.

    d/dm of -KL(N(m, 1) || N(0, 1)) - m^2 is -m - 2 m.
    """

    def guide(h, t):
        h.sample("x", normal(h, t[0]))
        factor_of_the_guide(h, t[0] ** 2)

    program = Program(guide, lambda h, t: h.sample("x", normal(h, 0 * t[0])), (0.7,))
    expected_under(program, host, -2.1, estimators={"x": KINDS[kind]})
    if host is NUMPYRO and kind == "RP":
        wrong_under(GRAPH, program, host, -2.1)


def test_autodais():
    """NumPyro's TraceGraph_ELBO drops the derivative of AutoDAIS's factors. Trace_ELBO is right, because all draws are pathwise."""

    def model():
        x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
        numpyro.sample("y", numpyro_dist.Normal(x, 0.5), obs=1.0)

    guide = numpyro.infer.autoguide.AutoDAIS(model, K=2)
    params = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(1.0), GRAPH)
    params = params.get_params(params.init(jax.random.key(0)))

    def gradients(elbo):
        gradient = jax.grad(lambda params, key: elbo.loss(key, params, model, guide))
        samples = jax.jit(jax.vmap(gradient, (None, 0)))(params, jax.random.split(jax.random.key(1), 5_000))
        return np.stack([samples["auto_eta_coeff"], samples["auto_z_0_loc"][:, 0]], -1)

    right, flow, graph = map(gradients, (numpyro.infer.Trace_ELBO(), NUMPYRO.flow.TraceFlow_ELBO(), GRAPH))
    np.testing.assert_allclose(flow, right, rtol=1e-10)
    assert np.abs(z_scores(graph - right, 0)).max() > 5


@ALL_KINDS
def test_auxiliary_site_of_the_guide(host, kind):
    """In Pyro's Trace_ELBO, the score of an auxiliary site does not multiply its own -log q (the pattern of every AutoContinuous).

    With s the log scale and z = x: d/ds of -KL(N(0, e^2s) || N(0, 1)) is 1 - e^2s.
    """

    def program(normal):
        def guide(h, t):
            x = h.sample("aux", normal(h, 0 * t[0], h.math.exp(t[0])), infer={"is_auxiliary": True})
            h.sample("z", h.dist.Delta(x))

        return Program(guide, lambda h, t: h.sample("z", h.dist.Normal(0 * t[0], h.array(1.0))), (0.4,))

    exact = 1 - np.exp(0.8)
    expected_under(program(normal), host, exact, estimators={"aux": KINDS[kind]})
    if host is PYRO and kind == "LR":
        wrong_under(pyro.infer.Trace_ELBO(max_plate_nesting=1), program(score_normal), host, exact)


# ---- 5: NumPyro's TraceGraph_ELBO in scan and under masks


@ALL_KINDS
def test_inside_scan(kind):
    """NumPyro's TraceGraph_ELBO adds the path through the carry of scan to the score, so a continuous LR site is biased.

    x_t ~ N(0.8 x_{t-1} + m, 1) for t = 1..3, the model's the same at m = 0 with the cost sum_t cos(x_t): -KL is -3 m^2 / 2, and
    E[cos(x)] = cos(l) exp(-v / 2) under N(l, v).
    """

    def chain_of(family, loc):
        def step(x, _):
            x = numpyro.sample("x", family(0.8 * x + loc))
            return x, x

        return scan(step, jnp.array(0.0), None, length=3)[1]

    def program(family):
        def model(h, t):
            h.factor("f", jnp.cos(chain_of(lambda loc: normal(h, loc), 0.0)).sum())

        return Program(lambda h, t: chain_of(family, t[0]), model, (0.4,))

    exact, loc, variance, slope = -3 * 0.4, 0.0, 0.0, 0.0
    for _ in range(3):
        loc, variance, slope = 0.8 * loc + 0.4, 0.64 * variance + 1.0, 0.8 * slope + 1.0
        exact += -np.sin(loc) * np.exp(-variance / 2) * slope
    expected_under(program(lambda loc: NUMPYRO.flow.Estimated(normal(NUMPYRO, loc), KINDS[kind])), NUMPYRO, exact)
    if kind == "LR":
        wrong_under(GRAPH, program(lambda loc: score_normal(NUMPYRO, loc)), NUMPYRO, exact)


@ALL_KINDS
def test_a_masked_site_drives_unmasked_costs(host, kind):
    """NumPyro's TraceGraph_ELBO masks the score together with the guide's density, and loses it.

    The guide's density is masked, the model's is not: d/dm E[-x^2 / 2] = -m.
    """

    def program(normal):
        return Program(lambda h, t: h.sample("x", normal(h, t[0]).mask(False)), lambda h, t: h.sample("x", normal(h, 0 * t[0])), (0.7,))

    expected_under(program(normal), host, -0.7, estimators={"x": KINDS[kind]})
    if host is NUMPYRO and kind == "LR":
        wrong_under(GRAPH, program(score_normal), host, -0.7)


# ---- 6: NumPyro's RenyiELBO


def test_renyi_bound_of_a_discrete_site(host):
    """NumPyro's RenyiELBO has no score: sites that are not reparameterized only get the derivative of their own density.

    b ~ Bernoulli(logit t), the bound E[log (w_1 + w_2) / 2] and its derivative by enumeration of both particles.
    """
    prior, likelihood = 0.3, np.array([-2.0, 0.5])

    def guide(h, t):
        h.sample("b", h.dist.Bernoulli(logits=t[0]))

    def model(h, t):
        b = h.sample("b", h.dist.Bernoulli(h.array(prior) + 0 * t[0]))
        h.factor("f", likelihood[0] * (1 - b) + likelihood[1] * b)

    def bound(t):
        q = jnp.stack([jax.nn.sigmoid(-t), jax.nn.sigmoid(t)])
        w = jnp.array([1 - prior, prior]) * jnp.exp(likelihood) / q
        return (q[:, None] * q * jnp.log((w[:, None] + w) / 2)).sum()

    program, exact = Program(guide, model, (0.3,)), jax.grad(bound)(0.3)
    samples = host.bound_gradients(program, 40_000)
    assert np.abs(z_scores(samples, exact)) < 5
    if host is NUMPYRO:
        wrong_under(numpyro.infer.RenyiELBO(), program, host, exact)


# ---- 7 and 9: Pyro's TraceGraph_ELBO


@pytest.mark.parametrize("particles", [1, 4])
def test_python_numbers_in_the_model(particles):
    """Pyro's TraceGraph_ELBO follows tensors, and loses a cost that depends on a draw through ``.item()``, ``.tolist()`` or ``if``.

    b ~ Bernoulli(logit t) with cost 3 b - (1 - b): d/dt is p (1 - p) (4 - t), with -KL to Bernoulli(1/2).
    """

    def guide(h, t):
        h.sample("b", h.dist.Bernoulli(logits=t[0]))

    def model(h, t):
        b = h.sample("b", h.dist.Bernoulli(h.array(0.5)).expand(t[0].shape))
        costs = [3.0 if element else -1.0 for element in b.flatten().tolist()]
        h.factor("f", h.array(costs).reshape(b.shape))

    program, p = Program(guide, model, (0.3,)), 1 / (1 + np.exp(-0.3))
    exact = p * (1 - p) * (4 - 0.3)
    expected_under(program, PYRO, exact, particles=particles)
    wrong_under(pyro.infer.TraceGraph_ELBO(max_plate_nesting=1), program, PYRO, exact)


@pytest.mark.parametrize("estimator", [Auto(), RP(), LR()], ids=repr)
def test_rejection_sampled_sites_have_a_path_and_a_score(estimator):
    """Pyro's TraceGraph_ELBO drops the score of a site that is only partly reparameterized.

    d/da of E[x^2] - KL(Gamma(a, 1) || Gamma(1, 1)) is 2 a + 1 - (a - 1) trigamma(a).
    """

    def guide(h, t):
        h.sample("x", RejectionGamma(t[0], torch.ones_like(t[0])))

    def model(h, t):
        h.factor("f", h.sample("x", h.dist.Gamma(torch.ones_like(t[0]), 1.0)) ** 2)

    program, exact = Program(guide, model, (1.05,)), 2 * 1.05 + 1 - 0.05 * float(torch.polygamma(1, torch.tensor(1.05)))
    samples = expected_under(program, PYRO, exact, n=100_000, estimators={"x": estimator})
    if estimator != LR():
        np.testing.assert_allclose(samples, PYRO.gradients_of(pyro.infer.Trace_ELBO(max_plate_nesting=1), program, 100_000))
    wrong_under(pyro.infer.TraceGraph_ELBO(max_plate_nesting=1), program, PYRO, exact, n=100_000)


class PositiveGamma(RejectionGamma):
    support = torch.distributions.constraints.positive


def test_a_rejection_sampled_site_keeps_its_score():
    """The site keeps its score also after sticking the landing has run the guide again at given values."""

    def guide(h, t):
        h.sample("x", PositiveGamma(t[0], torch.ones_like(t[0])))

    def model(h, t):
        h.factor("f", h.sample("x", h.dist.Gamma(torch.ones_like(t[0]), 1.0)) ** 2)

    elbo = PYRO.flow.TraceFlow_ELBO(entropy="stl", max_plate_nesting=1)
    first, second = (PYRO.gradients_of(elbo, Program(guide, model, (1.05,)), 20) for _ in range(2))
    np.testing.assert_allclose(first, second)


# ---- 10: Pyro's switch has_rsample_

SWITCHED = {
    "Independent": (lambda m: pyro_dist.Normal(m[..., None], torch.ones(2)).to_event(1), lambda x: x.sum(-1), lambda m: 2.0),
    "Masked": (lambda m: pyro_dist.Normal(m, 1.0).mask(torch.tensor(True)), lambda x: x**2, lambda m: 2 * m),
    "Transformed": (
        lambda m: pyro_dist.TransformedDistribution(pyro_dist.Normal(m, 1.0), [pyro_dist.transforms.ExpTransform()]),
        torch.log,
        lambda m: 1.0,
    ),
    "Weibull": (lambda m: pyro_dist.Weibull(m, torch.tensor(2.0)), lambda x: x**2, lambda m: 2 * m),  # E[x^2] = m^2 Gamma(2)
    "Gumbel": (lambda m: pyro_dist.Gumbel(m, torch.tensor(0.5)), lambda x: x, lambda m: 1.0),
    "Pareto": (lambda m: pyro_dist.Pareto(torch.tensor(1.0), m), torch.log, lambda m: -1 / m**2),  # log x ~ Exponential(m)
}


@pytest.mark.parametrize("family", SWITCHED)
def test_a_switch_for_every_family(family):
    """``has_rsample_(False)``, Pyro's own switch to the score, raises AttributeError at common wrappers and families.

    d/dm of E[cost(x)], by LR.
    """
    distribution, cost, exact = SWITCHED[family]
    program = chain(1.3, {"x": lambda h, t, v: distribution(t[0])}, {"x": lambda h, t, v: cost(v["x"])})
    expected_under(program, PYRO, exact(1.3), estimators={"x": LR()})
    with pytest.raises(AttributeError, match="has_rsample"):
        distribution(torch.tensor(1.3)).has_rsample_(False)


@pytest.mark.parametrize("particles", [1, 4])
def test_a_switch_inside_a_plate(particles):
    """In Pyro, ``has_rsample_(False)`` before ``to_event`` crashes inside any plate, and so with vectorized particles.

    d/dm of -KL(N(m, 1)^3 || N(0, 1)^3) in a plate of two is -2 * 3 m.
    """

    def program(switch):
        def part(h, loc):
            with h.plate("n", 2):
                h.sample("x", switch(h.dist.Normal(loc[..., None] + torch.zeros(2, 3), 1.0)).to_event(1))

        return Program(lambda h, t: part(h, t[0]), lambda h, t: part(h, 0 * t[0]), (0.7,), plates=1)

    expected_under(program(lambda d: d), PYRO, -4.2, estimators={"x": LR()}, particles=particles, n=40_000 // particles)
    with pytest.raises(AttributeError, match="has_rsample"):
        PYRO.gradients_of(pyro.infer.Trace_ELBO(particles, max_plate_nesting=2), program(lambda d: d.has_rsample_(False)), 2)


# ---- 11: a plate that is left and entered again


@pytest.mark.parametrize("outside", ["Normal", "Delta"])
def test_a_plate_that_is_entered_again(host, outside):
    """In TraceGraph_ELBO the score of an element multiplies only its own costs, although a site outside the plate carries it to all.

    Locals b_n ~ Bernoulli(logit t) in a plate of two, a global g ~ N(b_1 + b_2, 1) or g = b_1 + b_2, and the costs w_n g in the
    plate, of mean 2 p (w_1 + w_2). Of the divergences, that of the locals from Bernoulli(1/2) has the derivative 2 p (1 - p) t, and
    that of g from N(0, 1) is p + p^2. Of the derivative of the costs the host has one half.
    """
    t, weights = 0.4, [1.0, 3.0]
    p = 1 / (1 + np.exp(-t))

    def guide(h, t):
        with h.plate("n", 2):
            b = h.sample("b", h.dist.Bernoulli(logits=t[0]))
        total = h.over_plate(b)
        h.sample("g", h.dist.Delta(1.0 * total) if outside == "Delta" else h.dist.Normal(total, h.array(1.0)))

    def model(h, t):
        g = h.sample("g", h.dist.Normal(0 * t[0], h.array(1.0)))
        with h.plate("n", 2):
            h.sample("b", h.dist.Bernoulli(logits=0 * t[0]))
            h.factor("cost", h.array(weights) * g)

    program = Program(guide, model, (t,), plates=1)
    of_costs, of_divergences = 2 * p * (1 - p) * sum(weights), p * (1 - p) * (2 * t + 1 + 2 * p)
    for dependencies in ("graph", "plates"):
        expected_under(program, host, of_costs - of_divergences, dependencies=dependencies)
    theirs = GRAPH if host is NUMPYRO else pyro.infer.TraceGraph_ELBO(max_plate_nesting=2)
    wrong_under(theirs, program, host, of_costs - of_divergences)
    found = host.gradients_of(theirs, program, 20_000)
    np.testing.assert_allclose(found.mean(), of_costs / 2 - of_divergences, atol=5 * found.std() / len(found) ** 0.5)


# ---- 12: sites of the model that the hosts sum out


def evaluated(host, model, *elbos):
    """The losses under a guide without sites."""
    return [float(host.loss(elbo, model, lambda: None)) for elbo in elbos]


@pytest.mark.filterwarnings("ignore:Out-of-support values")
def test_numpyro_enumerates_the_indices_of_a_support():
    """NumPyro gives an enumerated site the values 0, 1, ... for any support: here 0 and 1 instead of 2 and 3."""

    def model():
        z = numpyro.sample("z", numpyro_dist.DiscreteUniform(2, 3), infer={"enumerate": "parallel"})
        numpyro.sample("y", numpyro_dist.Normal(z, 1.0), obs=2.0)

    funsor.set_backend("jax")  # an import of Pyro may have set another backend
    exact = -np.log(0.5 * (1 + np.exp(-0.5)) / np.sqrt(2 * np.pi))
    theirs, ours = evaluated(NUMPYRO, model, numpyro.infer.TraceEnum_ELBO(), NUMPYRO.flow.TraceFlow_ELBO())
    assert abs(ours - exact) < 1e-10
    assert theirs > exact + 0.5


def test_a_masked_distribution_that_pyro_sums_out():
    """If ``.mask`` masks a marginalised site, Pyro masks its probabilities, which then sum to the number of its values."""

    def model():
        z = pyro.sample("z", pyro_dist.Bernoulli(torch.tensor(0.3)).mask(False), infer={"enumerate": "parallel"})
        pyro.sample("y", pyro_dist.Normal(z, 1.0).mask(False), obs=torch.tensor(2.0))

    elbos = (elbo(max_plate_nesting=0) for elbo in (pyro.infer.TraceEnum_ELBO, PYRO.flow.TraceFlow_ELBO))
    theirs, ours = evaluated(PYRO, model, *elbos)
    assert abs(ours) < 1e-12
    assert abs(theirs + np.log(2)) < 1e-12

"""The sampling densities: each integrates to 1, is the density of its sampler, and has the right weights."""

import math
from itertools import pairwise

import jax
import numpy as np
import pytest
from attached import attached
from cases import CASES, EXACT
from hosts import HOSTS, chain, z_scores
from proposal_rows import ROWS, THETA, distribution
from quadrature import nodes

from flowvi import LR, Flow, fields, proposals
from flowvi.families import FAMILIES
from flowvi.host import host_of
from flowvi.proposals.slices import _SymmetricSlice

N = 20_000
SUPPORT = {
    "Beta": (0, 1),
    "VonMises": (-math.pi, math.pi),
    **dict.fromkeys(("HalfNormal", "HalfCauchy", "Exponential", "Gamma", "InverseGamma", "Weibull", "LogNormal"), (0, math.inf)),
}
LOGISTIC = 1.2 * 1.5434046384182085
MODES = (math.exp(0.3 - 1.2**2), 1.2 / 1.7, 0.7 / 1.2, 1.2 / 2.7, 1.3 * (0.8 / 1.8) ** (1 / 1.8), 0.3)
BREAKS = (0.3 - LOGISTIC, -0.9, 0.3, 0.71428571428571, 1.2, 1.3, 1.41666666666667, 1.5, 0.3 + LOGISTIC, 4.0, *MODES)


def density(host, q):
    def f(x):
        return np.exp(np.asarray(q.log_prob(host.array(x))))

    return f


def cdf(host, family, q, at):
    """The cdf of q at some points, and its total, by quadrature between possible kinks."""
    low, high = SUPPORT.get(family, (-math.inf, math.inf))
    ends = sorted({low, high, *at, *(b for b in BREAKS if low < b < high)})
    rules = [nodes(a, b) for a, b in pairwise(ends)]
    x, w = (np.concatenate(part) for part in zip(*rules, strict=True))
    mass = np.where((x > low) & (x < high), w * np.nan_to_num(density(host, q)(np.clip(x, low + 1e-300, high))), 0.0)
    below = np.concatenate([[0.0], np.cumsum(mass.reshape(len(rules), -1).sum(-1))])
    return below[np.searchsorted(ends, at)], below[-1]


def draw(host, q, n, seed=0):
    return host.numpy(host.draw(q.expand((n,)), seed=seed))


@pytest.mark.parametrize(("family", "name"), ROWS, ids=str)
def test_density_and_sampler(host, family, name):
    """The density integrates to 1, and the share of samples below given points is its cdf."""
    q = ROWS[family, name](distribution(host, family))
    x = draw(host, q, N)
    points = np.quantile(x, [0.02, 0.2, 0.4, 0.5, 0.7, 0.97])
    expected, total = cdf(host, family, q, points)
    assert abs(total - 1) < (1e-6 if family in ("VonMises", "Cauchy", "StudentT") else 1e-8)
    z = ((x[:, None] < points).mean(0) - expected) / np.sqrt(expected * (1 - expected) / N)
    assert np.all(np.abs(z) < 5)


@pytest.mark.parametrize(("family", "name"), ROWS, ids=str)
def test_weight(host, family, name):
    """The log weight is log p - log q, and the mean weight under q is 1, in batches and at one point."""
    q, p = ROWS[family, name](distribution(host, family, (3,))), distribution(host, family, (3,))
    x = np.array([0.31, 0.62, 0.91])
    theta = {k: np.full(3, v) for k, v in THETA[family].items()}
    _, log_weight, _ = attached(host, family, theta, lambda h: LR(q=ROWS[family, name]), x)
    expected = np.asarray(p.log_prob(host.array(x))) - np.asarray(q.log_prob(host.array(x)))
    np.testing.assert_allclose(log_weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "name"), [key for key in ROWS if key[0] != "VonMises"], ids=str)
def test_hosts_agree(family, name):
    x = [0.31, 0.62, 0.91]
    densities = [np.asarray(ROWS[family, name](distribution(h, family)).log_prob(h.array(x))) for h in HOSTS.values()]
    np.testing.assert_allclose(*densities, rtol=1e-10, atol=1e-10)


SKEW = {
    "Exponential by mass": ("Exponential", proposals.slice_by_mass(0), lambda x: 1.4**2 * x * np.exp(-1.4 * x)),
    "Exponential by height": ("Exponential", proposals.slice_by_height(0), lambda x: 1.4 * np.exp(-1.4 * x)),
    "HalfNormal by mass": (
        "HalfNormal",
        proposals.slice_by_mass(0),
        lambda x: math.sqrt(2 / math.pi) * x**2 / 1.2**3 * np.exp(-0.5 * (x / 1.2) ** 2),
    ),
    "Gumbel by height": (
        "Gumbel",
        proposals.slice_by_height(0),
        lambda x: math.e / 2.4 * abs(np.expm1(-(x - 0.3) / 1.2)) * np.exp(-(x - 0.3) / 1.2 - np.exp(-(x - 0.3) / 1.2)),
    ),
}


@pytest.mark.parametrize("name", SKEW)
def test_densities_of_skew_families(host, name):
    family, q, formula = SKEW[name]
    x = np.array([0.1, 0.7, 2.9])
    np.testing.assert_allclose(density(host, q(distribution(host, family)))(x), formula(x), rtol=1e-12)


FORMULAS = {
    "slice_by_mass": (proposals.slice_by_mass(0), lambda z, p: z**2 * p),
    "slice_by_height": (proposals.slice_by_height(0), lambda z, p: abs(z) * p * math.sqrt(math.pi / 2)),
    "optimal scale": (proposals.optimal("scale", 0), lambda z, p: abs(z**2 - 1) * p / (4 * math.exp(-0.5) / math.sqrt(2 * math.pi))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_densities_of_a_normal(host, name):
    q, formula = FORMULAS[name]
    p, x = distribution(host, "Normal"), np.array([-1.7, 0.4, 2.9])
    expected = formula((x - 0.3) / 1.2, density(host, p)(x))
    np.testing.assert_allclose(density(host, q(p))(x), expected, rtol=1e-12)


SECOND_MOMENTS = {  # the second moment of LR at the cost 1, relative to q = p
    ("Normal", "loc"): 2 / math.pi,
    ("Normal", "scale"): 8 / (math.e * 2 * math.pi),
    ("Exponential", "rate"): 4 / math.e**2,
    ("Laplace", "loc"): 1.0,
}


@pytest.mark.parametrize(("family", "parameter"), SECOND_MOMENTS, ids=str)
def test_optimal_is_as_good_as_it_says(host, family, parameter):
    """Under the optimal density |w psi| is constant, and its square is the ratio of second moments times the Fisher information."""
    x = np.array([0.31, 0.62, 2.91])
    theta = {k: np.full(3, v) for k, v in THETA[family].items()}
    q = proposals.optimal(parameter, epsilon=0)

    def weighted_score(e):
        _, log_weight, gradient = attached(host, family, theta, lambda h: LR(q=q), x)
        ramp = np.linspace(-1.0, 2.0, 3)  # the weights of the scores in `attached`
        return np.exp(log_weight) * gradient[parameter] / ramp

    fisher = {("Normal", "loc"): 1, ("Normal", "scale"): 2, ("Exponential", "rate"): 1, ("Laplace", "loc"): 1}[family, parameter]
    unit = THETA[family]["rate" if family == "Exponential" else "scale"]
    expected = math.sqrt(SECOND_MOMENTS[family, parameter] * fisher) / unit
    np.testing.assert_allclose(np.abs(weighted_score(0)[[0, 2]]), expected, rtol=1e-10)


def wide(h, p):
    return h.dist.Normal(p.loc, 1.3 * p.scale)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors(host, shape):
    """A defensive mixture picks whole vectors, and tempered and student_t work at a MultivariateNormal."""
    tril = host.array([[0.6, 0.0], [0.4, 0.8]]) + host.array(np.zeros((*shape, 1, 1)))
    p = host.dist.MultivariateNormal(host.array(np.zeros((*shape, 2))), scale_tril=tril)
    for q in (proposals.tempered(2.0), proposals.student_t(5.0), proposals.defensive(proposals.tempered(2.0), 0.5)):
        d = q(p)
        assert tuple(d.batch_shape) == shape
        assert tuple(d.event_shape) == (2,)
        x = draw(host, d, 4) if not shape else np.zeros((3, 2))
        assert np.asarray(d.log_prob(host.array(x))).shape == (x.shape[0],)
    np.testing.assert_allclose(
        np.asarray(proposals.tempered(2.0)(p).log_prob(host.array(np.ones(2)))),
        np.asarray(host.dist.MultivariateNormal(p.loc, scale_tril=math.sqrt(2) * tril).log_prob(host.array(np.ones(2)))),
        rtol=1e-12,
    )


DISCRETE = {
    "Poisson": (lambda h: h.dist.Poisson(h.array(2.0)), lambda h: h.dist.Poisson(h.array(math.sqrt(2.0)))),
    "Bernoulli": (lambda h: h.dist.Bernoulli(logits=h.array(0.8)), lambda h: h.dist.Bernoulli(logits=h.array(0.4))),
    "Categorical": (
        lambda h: h.dist.Categorical(logits=h.array([0.8, -0.4])),
        lambda h: h.dist.Categorical(logits=h.array([0.4, -0.2])),
    ),
    "Bernoulli, probs": (lambda h: h.dist.Bernoulli(h.array(0.8)), lambda h: h.dist.Bernoulli(h.array(2 / 3))),
    "Categorical, probs": (
        lambda h: h.dist.Categorical(h.array([0.64, 0.36])),
        lambda h: h.dist.Categorical(h.array([0.8, 0.6]) / 1.4),
    ),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_tempered_discrete(host, name):
    p, expected = (make(host) for make in DISCRETE[name])
    x = host.array([0.0, 1.0, 1.0]) if not name.startswith("Categorical") else host.integers([0, 1])
    np.testing.assert_allclose(np.asarray(proposals.tempered(2.0)(p).log_prob(x)), np.asarray(expected.log_prob(x)), rtol=1e-12)


@pytest.mark.parametrize(
    ("q", "family", "message"),
    [
        (proposals.tempered(2.0), "Cauchy", "tempered is for Normal, .*; found Cauchy"),
        (proposals.student_t(4.0), "Gamma", "student_t is for .*MultivariateNormal; found Gamma"),
        (proposals.slice_by_mass(), "VonMises", "slice_by_mass is for Normal, .*HalfCauchy, .*; found VonMises"),
        (proposals.optimal("concentration"), "Gamma", "optimal.'concentration'. is for Normal.loc, .*Gamma.rate, .*; found Gamma"),
        (proposals.optimal("loc"), "LogNormal", "optimal.'loc'. is for .*; found LogNormal"),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_refused(host, q, family, message):
    with pytest.raises(ValueError, match=message):
        q(distribution(host, family))


@pytest.mark.parametrize(
    ("family", "theta"),
    [
        ("Gamma", {"concentration": 1.0, "rate": 1.2}),
        ("Weibull", {"scale": 1.3, "concentration": 0.8}),
        ("Beta", {"concentration1": 0.6, "concentration0": 0.7}),
    ],
)
def test_slices_need_a_mode_inside(host, family, theta):
    """If the mode is not inside the support, slices raise an error, or give NaN under jit, where the parameters are unknown."""
    q, family = proposals.slice_by_mass(), getattr(host.dist, family)
    theta = {k: host.array(v) for k, v in theta.items()}
    with pytest.raises(
        ValueError, match=f"slice_by_mass needs a {family.__name__} with a peak inside its support, concentration1? above 1"
    ):
        q(family(**theta))
    if host.name == "numpyro":
        samples, weight = jax.jit(lambda t: (q(family(**t)).expand((5,)).sample(jax.random.key(0)), q(family(**t)).log_prob(0.3)))(
            theta
        )
        assert np.isnan(samples).any()
        assert np.isnan(weight)


def test_what_a_proposal_refuses_names_the_site(host):
    program = chain(0.3, {"x": lambda h, t, v: h.dist.Gamma(0.5 + 0 * t[0], t[0])}, {"x": lambda h, t, v: v["x"]})
    for q, message in ((proposals.student_t(4.0), "student_t is for"), (proposals.slice_by_mass(), "slice_by_mass needs a Gamma")):
        with pytest.raises(ValueError, match=f"^site 'x': {message}"):
            run(host, program, LR(q=q))


def run(host, program, estimator):
    """Run a program once, with known parameters."""
    model, guide = (lambda: program.model(host, [host.array(0.3)])), (lambda: program.guide(host, [host.array(0.3)]))
    elbo = host.flow.TraceFlow_ELBO(estimators={"x": estimator})
    return host.loss(elbo, model, guide)


def test_defensive_needs_a_share():
    with pytest.raises(ValueError, match="epsilon between 0 and 1, found 1.5"):
        proposals.defensive(lambda p: p, 1.5)


def test_a_wrong_density_is_rejected(host):
    """The z-score rejects a density that is not that of its sampler."""
    case, exact = CASES["normal-scale-square"], EXACT["normal-scale-square"]

    class Wrong(_SymmetricSlice):
        def log_prob(self, ops, parts, x):
            return super().log_prob(ops, parts, x) + 0.1

    q = proposals.defensive(lambda p: host_of(p).proposal(Wrong("height", FAMILIES["Normal"].peak), p))
    for wrong, estimator in (
        (True, LR(q=q)),
        (False, LR(q=proposals.slice_by_height())),
        (False, Flow(fields.location_scale(), q=proposals.slice_by_height())),
    ):
        samples = host.gradients(case.program, 100_000, estimators={"x": estimator})
        assert (np.abs(z_scores(samples, exact["gradient"], samples.var(0))) > 5).all() == wrong


def test_in_a_plate_inside_an_event(host):
    """A proposal expands with its site, in a plate inside an event."""
    program = chain(
        0.3,
        {"x": lambda h, t, v: h.dist.Normal(t[0][..., None] + h.array([0.0, 1.0, 2.0]), h.array(1.2)).to_event(1)},
        {"x": lambda h, t, v: (v["x"] ** 2).sum(-1)},
    )
    for q in (proposals.slice_by_height(), proposals.student_t(6.0), proposals.optimal("scale")):
        samples = host.gradients(program, 40_000, estimators={"x": LR(q=q)})
        assert abs(z_scores(samples, 2 * (3 * 0.3 + 3), samples.var(0))) < 5

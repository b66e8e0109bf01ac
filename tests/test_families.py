"""The table of families: why a column is empty, and whether its entries are true for the hosts' distributions."""

from dataclasses import fields as columns_of
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hosts import HOSTS

from flowvi import Flow, fields
from flowvi.estimators import attach
from flowvi.families import FAMILIES
from flowvi.family import Family, SkewPeak
from flowvi.host import host_of
from flowvi.rebuild import arguments, parameters, rebuild


def by(*names):
    """The classes of families whose name in one host includes the parameterization."""
    return tuple(f"{name}{parameter}" for name in names for parameter in ("", "Logits", "Probs"))


DISCRETE = ("Poisson", *by("Bernoulli", "Binomial", "Categorical", "Geometric", "NegativeBinomial"), "OneHotCategorical")
MIXTURES = ("MixtureSameFamily", "MixtureGeneral")
TRUNCATED = ("TwoSidedTruncatedDistribution", "LeftTruncatedDistribution", "RightTruncatedDistribution")
VECTORS = ("Dirichlet", "MultivariateNormal", "LowRankMultivariateNormal")
CONTINUOUS = tuple(name for name in FAMILIES if name not in DISCRETE)


class Missing:
    """The reasons for an empty column, and the families for each reason."""

    parameters: ClassVar = {"it has those of its parts": MIXTURES}
    separate: ClassVar = {
        "its support moves with them, so that LR is refused": ("Uniform", "Pareto", *TRUNCATED),
        "it has those of its parts": MIXTURES,
        "in Pyro its log_prob reads other tensors than the parameters": ("Weibull", "Beta", "Kumaraswamy"),
        "it has several parameterisations": ("MultivariateNormal",),
        "nobody has needed it": ("Dirichlet", "LowRankMultivariateNormal"),
    }
    standardization: ClassVar = {
        "only its cdf takes the parameters out, and RP(q=...) has that": (
            *("Gamma", "InverseGamma", "Weibull", "Beta", "Kumaraswamy", "Pareto", "VonMises"),
            *(*TRUNCATED, *MIXTURES),
        ),
        "it has none in closed form": ("Dirichlet", "LowRankMultivariateNormal"),
        "it is discrete": DISCRETE,
    }
    standardized: ClassVar = {
        "mean and variance do": ("Uniform", "Beta", "Kumaraswamy", *MIXTURES),
        "AdaptiveFlow is for scalars": VECTORS,
        "it is discrete": DISCRETE,
    }
    moves: ClassVar = {
        "the support of q would not cover that of p": ("Uniform", "Pareto", *TRUNCATED),
        "it has the parameters of its parts": MIXTURES,
        "AdaptiveFlow is for scalars": VECTORS,
        "it is discrete": DISCRETE,
    }
    tempered: ClassVar = {
        "it is no exponential family": (
            *("Logistic", "Cauchy", "StudentT", "Gumbel", "HalfCauchy", "Weibull", "Kumaraswamy", "Uniform", "Pareto"),
            *(*TRUNCATED, *MIXTURES),
        ),
        "the concentration (a + 1) / t - 1 is not positive where a is small": ("InverseGamma",),
        "nobody has needed it": ("LowRankMultivariateNormal", "OneHotCategorical", *by("Binomial", "Geometric", "NegativeBinomial")),
    }
    peak: ClassVar = {
        "its slices end at a bound that moves": ("Uniform", "Pareto", *TRUNCATED),
        "it has several peaks": MIXTURES,
        "a circle has no ends": ("VonMises",),
        "nobody has needed it": ("Kumaraswamy",),
        "slices are for scalars": VECTORS,
        "it is discrete": DISCRETE,
    }
    stretch: ClassVar = {
        "its scale stretches the two sides by different densities": ("Gumbel",),
        "no parameter stretches it": ("LogNormal", "Beta", "Kumaraswamy", "VonMises", *MIXTURES),
        "its support moves with the scale": ("Uniform", "Pareto", *TRUNCATED),
        "nobody has needed it": ("HalfCauchy",),
        "it is for scalars": VECTORS,
        "it is discrete": DISCRETE,
    }
    masses: ClassVar = {
        "it is continuous": CONTINUOUS,
        "its support is infinite": ("Poisson", *by("Geometric", "NegativeBinomial")),
    }
    neighbours: ClassVar = {
        "it is continuous": CONTINUOUS,
        "its values are no integers": ("OneHotCategorical",),
    }
    weak_derivatives: ClassVar = {
        "nobody has needed it": (
            *("Logistic", "Cauchy", "StudentT", "Gumbel", "LogNormal", "HalfNormal", "HalfCauchy", "InverseGamma", "Kumaraswamy"),
            *("MultivariateNormal", "LowRankMultivariateNormal", *MIXTURES, *by("Binomial", "Geometric", "NegativeBinomial")),
        ),
        "its support moves": ("Uniform", "Pareto", *TRUNCATED),
        "the parts of its derivative are no known laws": ("Beta", "VonMises", "Dirichlet"),
    }
    relaxation: ClassVar = {
        "it is continuous": CONTINUOUS,
        "it has infinitely many values": ("Poisson", *by("Geometric", "NegativeBinomial")),
        "nobody has needed it": by("Binomial"),
    }
    fields: ClassVar = {
        "the host's own sampler is enough": ("LowRankMultivariateNormal",),
        "it is discrete": DISCRETE,
    }


FACTS = ("name", "vanishing", "circle", "binary")  # columns in which False is an entry


@pytest.mark.parametrize("column", [c.name for c in columns_of(Family) if c.name not in FACTS])
def test_an_empty_column_has_a_reason(column):
    reasons = getattr(Missing, column)
    explained = [name for names in reasons.values() for name in names]
    assert len(explained) == len(set(explained))
    assert set(explained) == {name for name, family in FAMILIES.items() if not getattr(family, column)}


def test_facts():
    assert {name for name, f in FAMILIES.items() if f.vanishing} == {"Normal", "MultivariateNormal", "LowRankMultivariateNormal"}
    assert {name for name, f in FAMILIES.items() if f.circle} == {"VonMises"}
    assert {name for name, f in FAMILIES.items() if f.binary} == set(by("Bernoulli"))
    assert {name for name, f in FAMILIES.items() if f.symmetric} == {"Normal", "Laplace", "Logistic", "Cauchy", "StudentT"}


# ---- the entries of the columns

THETA = {  # parameters of every scalar family, and of the families with separate scores
    **{name: {"loc": 0.3, "scale": 0.8} for name in ("Normal", "Laplace", "Logistic", "Cauchy", "LogNormal", "Gumbel")},
    "StudentT": {"df": 4.5, "loc": 0.3, "scale": 0.8},
    **{name: {"scale": 1.2} for name in ("HalfNormal", "HalfCauchy")},
    **{name: {"rate": 1.4} for name in ("Exponential", "Poisson")},
    **{name: {"concentration": 2.7, "rate": 1.2} for name in ("Gamma", "InverseGamma")},
    "Weibull": {"scale": 1.3, "concentration": 1.8},
    **{name: {"concentration1": 1.6, "concentration0": 2.4} for name in ("Beta", "Kumaraswamy")},
    "Uniform": {"low": -0.3, "high": 1.2},
    "Pareto": {"scale": 1.2, "alpha": 2.5},
    "VonMises": {"loc": 0.5, "concentration": 1.8},
    **{name: {"logits": 0.4} for name in ("Bernoulli", "BernoulliLogits")},
    "BernoulliProbs": {"probs": 0.3},
    **{name: {"logits": 0.4, "total_count": 5} for name in ("Binomial", "BinomialLogits")},
    "BinomialProbs": {"probs": 0.3, "total_count": 5},
    **{name: {"logits": 0.4} for name in ("Geometric", "GeometricLogits")},
    "GeometricProbs": {"probs": 0.3},
    **{name: {"logits": 0.4, "total_count": 5} for name in ("NegativeBinomial", "NegativeBinomialLogits")},
    "NegativeBinomialProbs": {"probs": 0.3, "total_count": 5},
    **{name: {"logits": [0.4, -0.3, 0.1]} for name in ("Categorical", "CategoricalLogits", "OneHotCategorical")},
    "CategoricalProbs": {"probs": [0.2, 0.5, 0.3]},
}


def made(h, name):
    """The distribution, or None if the host has no class of this name."""
    make = getattr(h.dist, name, None)
    p = make and make(**{k: v if k == "total_count" else h.array(v) for k, v in THETA[name].items()})
    return p if type(p).__name__ == name else None


BOTH = [pytest.param(h, name, id=f"{h.name}-{name}") for h in HOSTS.values() for name in THETA if made(h, name) is not None]


def drawn(h, p, n):
    if h.name == "numpyro":
        return p.sample(jax.random.key(0), (n,))
    torch.manual_seed(0)
    return p.sample((n,))


def test_every_row_is_tested():
    assert set(THETA) == set(FAMILIES) - {*MIXTURES, *TRUNCATED, *VECTORS}
    assert {param.values[1] for param in BOTH} == set(THETA)


@pytest.mark.parametrize(("h", "name"), BOTH)
def test_parameters(h, name):
    p, family = made(h, name), FAMILIES[name]
    assert set(family.parameters) <= set(p.arg_constraints)
    assert set(family.moves) <= set(family.parameters)
    assert set(family.tempered(p, 2.0) if family.tempered else ()) <= set(family.parameters)
    if family.stretch is not None:
        assert family.stretch.parameter in family.parameters


def separate(params):
    return [param for param in params if FAMILIES[param.values[1]].separate]


@pytest.mark.parametrize(("h", "name"), separate(BOTH))
def test_scores_apart(h, name):
    """The separate scores sum to the derivative of the host's log_prob."""
    p, known = made(h, name), FAMILIES[name].parameters
    x, host = drawn(h, p, 4), host_of(p)
    theta = [h.array(np.array([THETA[name][k]] * 4)) for k in known]

    def moved(theta):
        return rebuild(p, dict(zip(known, theta, strict=True)))

    def log_prob(theta):
        return moved(theta).log_prob(x).sum()

    def scores(theta):
        return sum(score.sum() for score, _ in host.target("x", moved(theta), False).scores(x))

    found, expected = (gradient(h, f, theta) for f in (scores, log_prob))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def gradient(h, f, theta):
    if h.name == "numpyro":
        return [np.asarray(g) for g in jax.grad(f)(theta)]
    leaves = [t.clone().requires_grad_() for t in theta]
    return [g.numpy() for g in torch.autograd.grad(f(leaves), leaves)]


@pytest.mark.parametrize(("h", "name"), BOTH)
def test_standardized_is_roughly_normal(h, name):
    """The standardized value has the quartiles of a standard Normal, about 0 and +-0.67."""
    p, family = made(h, name), FAMILIES[name]
    if family.standardized is None or name == "VonMises":
        return
    low, middle, high = np.quantile(np.asarray(family.standardized(host_of(p).ops, drawn(h, p, 20_000), p)), (0.25, 0.5, 0.75))
    assert abs(middle) < 0.4
    assert 0.4 < (high - low) / 2 < 1.2


@pytest.mark.parametrize(("h", "name"), BOTH)
def test_peak_and_stretch(h, name):
    p, family = made(h, name), FAMILIES[name]
    ops = host_of(p).ops
    if isinstance(family.peak, SkewPeak) and family.peak.mode is not None:
        mode = float(family.peak.mode(ops, p))
        around = np.asarray(p.log_prob(h.array([mode - 1e-3, mode, mode + 1e-3])))
        assert around[1] > max(around[0], around[2])
    elif family.symmetric:
        z, v = h.array([0.5, 1.7]), np.exp(np.asarray(p.log_prob(p.loc + p.scale * h.array([0.0, 0.5, 1.7]))))
        np.testing.assert_allclose(np.asarray(family.peak.level(ops, p, h.array(v[1:] / v[0]))), z, rtol=1e-10)
    if family.stretch is not None:
        peak = h.array(float(family.stretch.peak(p)))
        assert abs(float(family.stretch.balance(ops, p, peak))) < 1e-10


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.fields])
def test_fields_serve_their_families(name):
    family = FAMILIES[name]
    assert family.pathwise.divergence == "pathwise"
    for make in family.fields:
        assert name in make().families


# ---- an InverseGamma is the reciprocal of a Gamma


def velocity(h, name, field, x, theta):
    """The derivatives of the value at x in each parameter, each at a separate site."""

    def value(values):
        p = getattr(h.dist, name)(**dict(zip(theta, values, strict=True)))
        host = host_of(p)
        return attach(host.ops, host.target("x", p, True), Flow(field), h.array(x)).value.sum()

    return dict(zip(theta, gradient(h, value, [h.array(v) for v in theta.values()]), strict=True))


def test_inverse_gamma(host):
    """With x = 1 / y, dx is -x^2 dy, where JAX's derivative of the Gamma sample y in the concentration is right to 1e-13."""
    x = np.array([0.02, 0.3, 0.9, 4.0, 70.0])
    theta = {"concentration": np.array([0.3, 1.0, 2.5, 2.5, 0.8]), "rate": np.array([1.2, 0.7, 1.2, 3.0, 0.5])}
    found = velocity(host, "InverseGamma", fields.inverse_gamma(), x, theta)
    of_gamma = np.asarray(jax.lax.random_gamma_grad(jnp.asarray(theta["concentration"]), jnp.asarray(theta["rate"] / x)))
    np.testing.assert_allclose(found["concentration"], -(x**2) * of_gamma / theta["rate"], rtol=1e-9)
    np.testing.assert_allclose(found["rate"], x / theta["rate"], rtol=1e-14)
    gamma = velocity(host, "Gamma", fields.gamma_implicit(), 1 / x, theta)
    for name in theta:
        np.testing.assert_allclose(found[name], -(x**2) * gamma[name], rtol=1e-12)


# ---- a distribution rebuilt with other parameters


def test_rebuild(host):
    d = host.dist
    p = d.MixtureSameFamily(d.Categorical(probs=host.array([0.3, 0.7])), d.Normal(host.array([0.0, 1.0]), host.array([1.0, 2.0])))
    mixing = "mixing_distribution" if host.name == "numpyro" else "_mixture_distribution"
    assert "loc" in " ".join(parameters(d.Normal(host.array(0.0), host.array(1.0)).expand([3]).to_event(1)))
    again = rebuild(d.Normal(host.array(0.0), host.array(1.0)).expand([3]).to_event(1), {"scale": host.array(2.0)})
    assert tuple(again.event_shape) == (3,)
    np.testing.assert_allclose(np.asarray(again.variance), 4.0)
    if host.name == "numpyro":
        again = rebuild(p, {"component_distribution.scale": host.array([3.0, 4.0])})
        np.testing.assert_allclose(again.component_distribution.scale, [3.0, 4.0])
        np.testing.assert_allclose(getattr(again, mixing).probs, [0.3, 0.7])
    with pytest.raises(TypeError, match="OneArgument cannot be built again from "):
        rebuild(OneArgument(), {})


class OneArgument:
    arg_constraints: ClassVar = {}

    def __init__(self, *, needed=1, validate_args=None):
        if needed == 1:
            self.needed = 2
        elif needed == 2:
            raise TypeError("no")


def test_of_alternatives_the_wanted_one_or_the_given_one():
    bernoulli = HOSTS["pyro"].dist.Bernoulli(probs=torch.tensor(0.3))
    assert list(arguments(bernoulli)) == ["probs"]
    assert list(arguments(bernoulli, ["logits"])) == ["logits"]
    np.testing.assert_allclose(rebuild(bernoulli, {"logits": torch.tensor(0.0)}).probs, 0.5)

"""The fields of flowvi.fields at their families: one row for each parameter, and rows for vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hosts import at_least

from flowvi import fields

BOTH = ("numpyro", "pyro")


@dataclass(frozen=True)
class Row:
    """One parameter of one family.

    Attributes:
        distribution: ``(h, t) -> p``, of the batch shape of t.
        theta: The value of t.
        field: The field.
        support: ``t -> (low, high)``.
        x: Interior points at which the field is evaluated.
        hosts: The hosts that have the family.
        digits: The digits of the transport equation; fewer than 8 if the host's log_prob is less accurate.
        kink: ``t -> x``, a kink of the density.
        cost: A smooth cost, periodic if the field needs that.
    """

    distribution: Callable[[Any, Any], Any]
    theta: float
    field: Callable[[], fields.Field]
    support: Callable[[float], tuple[float, float]]
    x: tuple[float, ...]
    hosts: tuple[str, ...] = BOTH
    digits: int = 8
    kink: Callable[[float], float] = lambda t: 0.5
    cost: Callable[[Any, Any], Any] = lambda m, x: m.tanh(0.8 * x - 0.3) + 0.3 / (1 + x**2)


def real(t):
    return -np.inf, np.inf


def positive(t):
    return 0.0, np.inf


def unit(t):
    return 0.0, 1.0


def circle(t):
    return -np.pi, np.pi


def periodic(m, x):
    return m.cos(x - 1) + 0.3 * m.sin(2 * x)


def not_periodic(m, x):
    return 0.5 * x + m.sin(x)


REALS, POSITIVES, UNITS = (-2.1, -0.4, 0.3, 1.7), (0.11, 0.6, 1.3, 3.9), (0.08, 0.31, 0.62, 0.93)


def family(name, field, support, x, theta, hosts=BOTH, **more):
    """A row for each parameter of a family, with the others fixed."""

    def row(parameter, value):
        def distribution(h, t):
            return getattr(h.dist, name)(**{k: t if k == parameter else v + 0 * t for k, v in theta.items()})

        def bounds(t):
            return (
                support(**{**theta, parameter: t})
                if callable(support) and support not in (real, positive, unit, circle)
                else support(t)
            )

        return Row(distribution, value, field, bounds, x, hosts, **more)

    return {f"{name} {parameter} {field()}": row(parameter, value) for parameter, value in theta.items()}


def normal_mixture(h, logit, loc):
    logits = h.array([0.0, -0.2, 0.1]) + logit[..., None] * h.array([1.0, 0.0, 0.0])
    locs = h.array([-1.5, 0.4, 2.0]) + loc[..., None] * h.array([0.0, 1.0, 0.5])
    components = h.dist.Normal(locs, h.array([0.6, 0.9, 0.5]))
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), components)


def general_mixture(h, t):
    components = [h.dist.Normal(-1.0, 0.7), h.dist.Laplace(t, 0.4), h.dist.Logistic(1.5, 0.6)]
    logits = h.array([0.3, 0.0, -0.2]) + t[..., None] * h.array([1.0, -1.0, 0.0])
    return h.dist.MixtureGeneral(h.dist.Categorical(logits=logits), components)


def beta_mixture(h, t):
    shape = t[..., None] * h.array([1.0, 2.0])
    components = h.dist.Gamma(shape, h.array([1.0, 2.0]) + 0 * shape)
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=h.array([0.3, -0.1]) + 0 * shape), components)


SMOOTH = tuple(f for f in fields.location_scale().families if f != "Laplace")
LOCATION_SCALE = {"loc": 0.3, "scale": 1.2}
BETA = {"concentration1": 1.6, "concentration0": 0.7}
TRUNCATED = {"loc": 0.4, "scale": 1.1, "low": -0.8, "high": 1.5}
ROWS = {
    **{k: v for f in SMOOTH for k, v in family(f, fields.location_scale, real, REALS, LOCATION_SCALE).items()},
    "Laplace loc": Row(lambda h, t: h.dist.Laplace(t, h.array(1.2)), 0.3, fields.location_scale, real, REALS, kink=lambda t: t),
    "Laplace scale": Row(lambda h, t: h.dist.Laplace(h.array(0.3), t), 1.2, fields.location_scale, real, REALS, kink=lambda t: 0.3),
    **{k: v for f in ("HalfNormal", "HalfCauchy") for k, v in family(f, fields.scale, positive, POSITIVES, {"scale": 1.2}).items()},
    **family("LogNormal", fields.log_normal, positive, POSITIVES, LOCATION_SCALE),
    **family("Exponential", fields.exponential, positive, POSITIVES, {"rate": 1.4}),
    **family("Gamma", fields.gamma_implicit, positive, POSITIVES, {"concentration": 1.7, "rate": 1.2}),
    **family("Gamma", fields.gamma_g_rep, positive, POSITIVES, {"concentration": 1.7, "rate": 1.2}),
    **family("Gamma", fields.gamma_one_moment, positive, POSITIVES, {"concentration": 1.7, "rate": 1.2}),
    **family("InverseGamma", fields.inverse_gamma, positive, POSITIVES, {"concentration": 2.4, "rate": 1.2}),
    **family("Weibull", fields.weibull, positive, POSITIVES, {"scale": 1.3, "concentration": 1.8}),
    **family("Kumaraswamy", fields.kumaraswamy, unit, UNITS, BETA),
    **family("Beta", fields.beta_implicit, unit, UNITS, BETA),
    **family("Beta", fields.beta_g_rep, unit, UNITS, BETA),
    **family("StudentT", fields.student_t, real, REALS, {"df": 3.5, **LOCATION_SCALE}),
    **family("VonMises", fields.von_mises, circle, REALS, {"loc": 0.5, "concentration": 1.8}, digits=6, cost=periodic),
    **family(
        "VonMises",
        lambda: fields.von_mises(cut=np.pi),
        circle,
        REALS,
        {"loc": 0.5, "concentration": 1.8},
        digits=6,
        cost=not_periodic,
    ),
    **family("Uniform", fields.uniform, lambda low, high: (low, high), (-0.3, 0.1, 1.1), {"low": -0.4, "high": 1.3}),
    **family("Pareto", fields.pareto, lambda scale, alpha: (scale, np.inf), (1.4, 2.1, 5.0), {"scale": 1.2, "alpha": 2.5}),
    **family(
        "TruncatedNormal",
        fields.truncated_normal,
        lambda loc, scale, low, high: (low, high),
        (-0.7, 0.2, 1.3),
        TRUNCATED,
        hosts=("numpyro",),
    ),
    "TruncatedNormal low, one side": Row(
        lambda h, t: h.dist.TruncatedNormal(0.4, 1.1, low=t),
        -0.8,
        fields.truncated_normal,
        lambda t: (t, np.inf),
        (-0.5, 2.0),
        ("numpyro",),
    ),
    "TruncatedNormal scale, one side": Row(
        lambda h, t: h.dist.TruncatedNormal(0.4, t, high=0.9),
        1.1,
        fields.truncated_normal,
        lambda t: (-np.inf, 0.9),
        (-2.5, 0.5),
        ("numpyro",),
    ),
    "TruncatedCauchy low implicit()": Row(
        lambda h, t: h.dist.TruncatedCauchy(0.4, 1.1, low=t),
        -0.8,
        fields.implicit,
        lambda t: (t, np.inf),
        (-0.5, 2.0),
        ("numpyro",) if at_least("numpyro", 0, 20) else (),  # before, it has no cdf
    ),
    "Gumbel scale implicit()": Row(lambda h, t: h.dist.Gumbel(h.array(0.3), t), 1.2, fields.implicit, real, REALS),
    "Normal loc scaled": Row(
        lambda h, t: h.dist.Normal(t, h.array(1.2)), 0.3, lambda: fields.scaled(0.3, fields.location_scale()), real, REALS
    ),
    "Normal scale masked": Row(
        lambda h, t: h.dist.Normal(h.array(0.3), t),
        1.2,
        lambda: fields.masked(lambda x, p: x**2 / (1 + x**2), fields.location_scale()),
        real,
        REALS,
    ),
    "Normal scale summed": Row(
        lambda h, t: h.dist.Normal(h.array(0.3), t),
        1.2,
        lambda: fields.summed(
            fields.scaled(0.6, fields.location_scale()), fields.per_element(scale=lambda x, p: 0.2 * x**3 / (1 + x**2))
        ),
        real,
        REALS,
    ),
    "Gamma concentration scaled G-Rep": Row(
        lambda h, t: h.dist.Gamma(t, h.array(1.2)), 1.7, lambda: fields.scaled(1.5, fields.gamma_g_rep()), positive, POSITIVES
    ),
    "mixture logit": Row(lambda h, t: normal_mixture(h, t, 0 * t), 0.3, fields.mixture, real, REALS),
    "mixture loc": Row(lambda h, t: normal_mixture(h, 0 * t, t), 0.3, fields.mixture, real, REALS),
    "mixture logit and loc": Row(lambda h, t: normal_mixture(h, t, t), 0.3, fields.mixture, real, REALS),
    "mixture logit and loc implicit()": Row(lambda h, t: normal_mixture(h, t, t), 0.3, fields.implicit, real, REALS),
    "mixture loc, field of the components": Row(
        lambda h, t: normal_mixture(h, t, t), 0.3, lambda: fields.mixture(components=fields.location_scale()), real, REALS
    ),
    "mixture of Gammas, field of the components": Row(
        beta_mixture, 1.4, lambda: fields.mixture(components=fields.gamma_implicit()), positive, POSITIVES
    ),
    "general mixture": Row(general_mixture, 0.2, fields.mixture, real, REALS, ("numpyro",), kink=lambda t: t),
    "general mixture implicit()": Row(general_mixture, 0.2, fields.implicit, real, REALS, ("numpyro",), kink=lambda t: t),
}
TRIL = [[0.6, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 0.9]]
MVN_X = np.array([[0.3, -0.2, 0.5], [1.1, 0.4, -1.2]])


def along_tril(h, t):
    """A field along the Cholesky factor, all of whose entries move."""
    return h.array(TRIL) + t[..., None, None] * h.array([[0.3, 0.0, 0.0], [1.0, 0.2, 0.0], [-0.5, 0.7, 0.4]])


def mvn(said):
    def distribution(h, t):
        loc, tril = t[..., None] * h.array([1.0, -0.5, 0.2]), along_tril(h, t)
        if said == "scale_tril":
            return h.dist.MultivariateNormal(loc, scale_tril=tril)
        covariance = tril @ tril.mT
        return h.dist.MultivariateNormal(loc, **{said: covariance if said == "covariance_matrix" else h.math.linalg.inv(covariance)})

    return distribution


def turn(p, dtheta):
    """An antisymmetric matrix that depends on the parameters and is linear in dtheta."""
    d = dtheta.of(lambda p: p.scale_tril)
    return d @ p.scale_tril.mT + 2 * d


def dirichlet(h, t):
    return h.dist.Dirichlet(h.array([1.4, 2.1, 0.8]) + t[..., None] * h.array([1.0, -0.5, 0.3]))


def product_mixture(h, t):
    logits = h.array([0.3, -0.2, 0.1]) + t[..., None] * h.array([1.0, -0.4, 0.2])
    logits = logits - h.math.log(h.math.exp(logits).sum(-1))[..., None]  # Pyro normalises logits too
    locs = h.array([[-1.0, 0.4, 0.2], [0.8, -0.6, 0.0], [0.1, 1.2, -0.5]]) + t[..., None, None] * h.array([[1.0], [0.5], [-0.5]])
    scales = h.array([[1.3, 1.1, 0.8], [0.9, 1.5, 1.0], [0.7, 0.6, 1.2]]) + 0 * locs
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), h.dist.Normal(locs, scales).to_event(1))


VECTORS = {
    **{
        f"MVN {said}": (mvn(said), fields.multivariate_normal, MVN_X)
        for said in ("scale_tril", "covariance_matrix", "precision_matrix")
    },
    "MVN transport": (mvn("scale_tril"), fields.multivariate_normal_transport, MVN_X),
    "MVN transport covariance": (mvn("covariance_matrix"), fields.multivariate_normal_transport, MVN_X),
    "MVN null": (mvn("scale_tril"), lambda: fields.multivariate_normal(turn), MVN_X),
    "MVN transport null": (mvn("precision_matrix"), lambda: fields.multivariate_normal_transport(turn), MVN_X),
    "MVN scaled": (mvn("scale_tril"), lambda: fields.scaled(0.4, fields.multivariate_normal()), MVN_X),
    "MVN masked": (
        mvn("scale_tril"),
        lambda: fields.masked(lambda x, p: 1 / (1 + (x**2).sum(-1)), fields.multivariate_normal()),
        MVN_X,
    ),
    "MVN summed with automatic": (
        mvn("scale_tril"),
        lambda: fields.summed(fields.multivariate_normal(), lambda x, p, dtheta: x**2 * dtheta.loc),
        MVN_X,
    ),
    "Dirichlet": (dirichlet, fields.dirichlet, np.array([[0.2, 0.5, 0.3], [0.05, 0.05, 0.9]])),
    "Dirichlet scaled": (dirichlet, lambda: fields.scaled(0.5, fields.dirichlet()), np.array([[0.2, 0.5, 0.3]])),
    "product mixture": (product_mixture, fields.mixture, MVN_X),
    "product mixture, averaged": (product_mixture, lambda: fields.mixture([(0, 1, 2), (2, 0, 1), (1, 0, 2)]), MVN_X),
    "product mixture, field of the components": (
        product_mixture,
        lambda: fields.mixture(components=fields.location_scale()),
        MVN_X,
    ),
}

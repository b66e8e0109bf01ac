"""The named families of both hosts, one entry each; see :class:`flowvi.family.Family` for the columns.

A family is known by the name of its class, so one entry is for both hosts. A class that only one host has, such as NumPyro's
``BernoulliLogits`` and Pyro's ``Bernoulli``, has its own entry. ``tests/test_families.py`` gives the reason for each empty column.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from flowvi import masses, neighbours, relaxations
from flowvi import standardizations as standard
from flowvi import weak_derivatives as weak
from flowvi.family import FAMILIES, Family, SkewPeak, Stretch, SymmetricPeak
from flowvi.fields.beta import beta_g_rep, beta_implicit, dirichlet, student_t
from flowvi.fields.circular import von_mises
from flowvi.fields.gamma import gamma_g_rep, gamma_implicit, gamma_one_moment, inverse_gamma
from flowvi.fields.mixtures import mixture
from flowvi.fields.multivariate import multivariate_normal, multivariate_normal_transport
from flowvi.fields.scalar import (
    exponential,
    kumaraswamy,
    location_scale,
    log_normal,
    pareto,
    scale,
    truncated_normal,
    uniform,
    weibull,
)

LOGISTIC = 1.5434046384182085  # where z tanh(z / 2) is 1


def _wider(p: Any, factor: float) -> dict[str, Any]:
    return {"loc": p.loc, "scale": factor * p.scale}


def _logits(p: Any, t: float) -> dict[str, Any]:
    return {"logits": p.logits / t}


def _towards_1(name: str, p: Any, t: float) -> Any:
    """The parameter a of a density x^(a - 1) that is raised to 1/t."""
    return (getattr(p, name) - 1) / t + 1


_location_scale = partial(
    Family,
    parameters=("loc", "scale"),
    separate=True,
    standardization=standard.location_scale,
    standardized=standard.location_scale,
    moves=("loc", "scale"),
    fields=(location_scale,),
)
_scale = partial(Family, parameters=("scale",), separate=True, standardization=standard.scale, moves=("scale",), fields=(scale,))
_of_logits = partial(Family, parameters=("logits",), separate=True)
_of_probs = partial(Family, parameters=("probs",), separate=True)
_bernoulli: dict[str, Any] = {
    "binary": True,
    "masses": masses.bernoulli,
    "neighbours": neighbours.BERNOULLI,
    "weak_derivatives": "sum",
    "relaxation": relaxations.BINARY,
}
_binomial: dict[str, Any] = {"masses": masses.binomial, "neighbours": neighbours.BINOMIAL}
_categorical: dict[str, Any] = {
    "masses": masses.categorical,
    "neighbours": neighbours.CATEGORICAL,
    "weak_derivatives": "sum",
    "relaxation": relaxations.CATEGORIES,
}
_truncated = partial(Family, standardized=standard.of_truncated, fields=(truncated_normal,))

for _family in (
    _location_scale(
        "Normal",
        weak_derivatives=weak.NORMAL,
        tempered=lambda p, t: _wider(p, math.sqrt(t)),
        peak=SymmetricPeak(lambda ops, p, z: z, lambda ops, p, v: ops.sqrt(-2 * ops.log(v))),
        stretch=Stretch("scale", lambda ops, p, z: 1 - z**2),
        vanishing=True,
    ),
    _location_scale(
        "Laplace",
        weak_derivatives=weak.LAPLACE,
        tempered=_wider,
        peak=SymmetricPeak(lambda ops, p, z: 1 + 0 * z, lambda ops, p, v: -ops.log(v)),
        stretch=Stretch("scale", lambda ops, p, z: 1 - z),
    ),
    _location_scale(
        "Logistic",
        peak=SymmetricPeak(lambda ops, p, z: ops.tanh(z / 2), lambda ops, p, v: 2 * (ops.log1p(ops.sqrt(1 - v)) - ops.log(v) / 2)),
        stretch=Stretch("scale", lambda ops, p, z: 1 - z * ops.tanh(z / 2), lambda p: LOGISTIC),
    ),
    _location_scale(
        "Cauchy",
        peak=SymmetricPeak(lambda ops, p, z: 2 * z / (1 + z**2), lambda ops, p, v: ops.sqrt(1 / v - 1)),
        stretch=Stretch("scale", lambda ops, p, z: 1 - 2 * z**2 / (1 + z**2)),
    ),
    _location_scale(
        "StudentT",
        parameters=("df", "loc", "scale"),
        peak=SymmetricPeak(
            lambda ops, p, z: (p.df + 1) * z / (p.df + z**2),
            lambda ops, p, v: ops.sqrt(p.df * ops.expm1(-2 / (p.df + 1) * ops.log(v))),
        ),
        stretch=Stretch("scale", lambda ops, p, z: 1 - (p.df + 1) * z**2 / (p.df + z**2)),
        fields=(student_t,),
    ),
    _location_scale("Gumbel", peak=SkewPeak(lambda ops, p: p.loc, (-math.inf, math.inf))),
    _location_scale(
        "LogNormal",
        standardization=standard.log_normal,
        standardized=standard.log_normal,
        tempered=lambda p, t: _wider(p, math.sqrt(t)),
        peak=SkewPeak(lambda ops, p: ops.exp(p.loc - p.scale**2)),
        fields=(log_normal,),
    ),
    _scale(
        "HalfNormal",
        standardized=standard.half_normal,
        tempered=lambda p, t: {"scale": math.sqrt(t) * p.scale},
        peak=SkewPeak(mode=None),
        stretch=Stretch("scale", lambda ops, p, z: 1 - z**2),
    ),
    _scale("HalfCauchy", standardized=standard.half_cauchy, peak=SkewPeak(mode=None)),
    Family(
        "Exponential",
        parameters=("rate",),
        separate=True,
        standardization=standard.rate,
        standardized=standard.exponential,
        moves=("rate",),
        tempered=lambda p, t: {"rate": p.rate / t},
        peak=SkewPeak(mode=None),
        stretch=Stretch("rate", lambda ops, p, z: 1 - z, unit=lambda p: 1 / p.rate),
        weak_derivatives=weak.EXPONENTIAL,
        fields=(exponential,),
    ),
    Family(
        "Gamma",
        parameters=("concentration", "rate"),
        separate=True,
        standardized=standard.gamma,
        moves=("concentration", "rate"),
        tempered=lambda p, t: {"concentration": _towards_1("concentration", p, t), "rate": p.rate / t},
        peak=SkewPeak(lambda ops, p: (p.concentration - 1) / p.rate, shapes=("concentration",)),
        stretch=Stretch("rate", lambda ops, p, z: p.concentration - z, lambda p: p.concentration, lambda p: 1 / p.rate),
        weak_derivatives=weak.GAMMA,
        fields=(gamma_implicit, gamma_g_rep, gamma_one_moment),
    ),
    Family(
        "InverseGamma",
        parameters=("concentration", "rate"),
        separate=True,
        standardized=standard.inverse_gamma,
        moves=("concentration", "rate"),
        peak=SkewPeak(lambda ops, p: p.rate / (p.concentration + 1)),
        stretch=Stretch("rate", lambda ops, p, z: 1 / z - p.concentration, lambda p: 1 / p.concentration, lambda p: p.rate),
        fields=(inverse_gamma,),
    ),
    Family(
        "Weibull",
        parameters=("scale", "concentration"),
        standardized=standard.weibull,
        moves=("scale", "concentration"),
        peak=SkewPeak(lambda ops, p: p.scale * (1 - 1 / p.concentration) ** (1 / p.concentration), shapes=("concentration",)),
        stretch=Stretch("scale", lambda ops, p, z: p.concentration * (1 - z**p.concentration)),
        weak_derivatives=weak.WEIBULL,
        fields=(weibull,),
    ),
    Family(
        "Beta",
        parameters=("concentration1", "concentration0"),
        moves=("concentration1", "concentration0"),
        tempered=lambda p, t: {name: _towards_1(name, p, t) for name in ("concentration1", "concentration0")},
        peak=SkewPeak(
            lambda ops, p: (p.concentration1 - 1) / (p.concentration1 + p.concentration0 - 2),
            (0.0, 1.0),
            ("concentration1", "concentration0"),
        ),
        fields=(beta_implicit, beta_g_rep),
    ),
    Family(
        "Kumaraswamy",
        parameters=("concentration1", "concentration0"),
        moves=("concentration1", "concentration0"),
        fields=(kumaraswamy,),
    ),
    Family("Uniform", parameters=("low", "high"), standardization=standard.uniform, fields=(uniform,)),
    Family("Pareto", parameters=("scale", "alpha"), standardized=standard.pareto, fields=(pareto,)),
    Family(
        "VonMises",
        parameters=("loc", "concentration"),
        separate=True,
        standardized=standard.von_mises,
        moves=("loc", "concentration"),
        tempered=lambda p, t: {"loc": p.loc, "concentration": p.concentration / t},
        circle=True,
        fields=(von_mises,),
    ),
    _truncated("TwoSidedTruncatedDistribution", parameters=("low", "high")),
    _truncated("LeftTruncatedDistribution", parameters=("low",)),
    _truncated("RightTruncatedDistribution", parameters=("high",)),
    Family("MixtureSameFamily", fields=(mixture,)),
    Family("MixtureGeneral", fields=(mixture,)),
    Family(
        "Dirichlet",
        parameters=("concentration",),
        tempered=lambda p, t: {"concentration": _towards_1("concentration", p, t)},
        fields=(dirichlet,),
    ),
    Family(
        "MultivariateNormal",
        parameters=("loc", "scale_tril"),
        standardization=standard.multivariate_normal,
        tempered=lambda p, t: {"loc": p.loc, "scale_tril": math.sqrt(t) * p.scale_tril},
        vanishing=True,
        fields=(multivariate_normal, multivariate_normal_transport),
    ),
    Family("LowRankMultivariateNormal", parameters=("loc", "cov_factor", "cov_diag"), vanishing=True),
    Family(
        "Poisson",
        parameters=("rate",),
        separate=True,
        tempered=lambda p, t: {"rate": p.rate ** (1 / t)},
        neighbours=neighbours.POISSON,
        weak_derivatives=weak.POISSON,
    ),
    _of_logits("Bernoulli", tempered=_logits, **_bernoulli),
    _of_logits("BernoulliLogits", tempered=_logits, **_bernoulli),
    _of_probs(
        "BernoulliProbs",
        tempered=lambda p, t: {"probs": p.probs ** (1 / t) / (p.probs ** (1 / t) + (1 - p.probs) ** (1 / t))},
        **_bernoulli,
    ),
    _of_logits("Binomial", **_binomial),
    _of_logits("BinomialLogits", **_binomial),
    _of_probs("BinomialProbs", **_binomial),
    _of_logits("Categorical", tempered=_logits, **_categorical),
    _of_logits("CategoricalLogits", tempered=_logits, **_categorical),
    _of_probs(
        "CategoricalProbs",
        tempered=lambda p, t: {"probs": p.probs ** (1 / t) / (p.probs ** (1 / t)).sum(-1, keepdims=True)},
        **_categorical,
    ),
    _of_logits("OneHotCategorical", masses=masses.categorical, weak_derivatives="sum", relaxation=relaxations.CATEGORIES),
    _of_logits("Geometric", neighbours=neighbours.GEOMETRIC),
    _of_logits("GeometricLogits", neighbours=neighbours.GEOMETRIC),
    _of_probs("GeometricProbs", neighbours=neighbours.GEOMETRIC),
    _of_logits("NegativeBinomial", neighbours=neighbours.NEGATIVE_BINOMIAL),
    _of_logits("NegativeBinomialLogits", neighbours=neighbours.NEGATIVE_BINOMIAL),
    _of_probs("NegativeBinomialProbs", neighbours=neighbours.NEGATIVE_BINOMIAL),
):
    FAMILIES[_family.name] = _family

"""The sampling densities of flowvi.proposals at their families, one row for each pair."""

import numpy as np

from flowvi import proposals
from flowvi.families import FAMILIES

LOC = {"loc": 0.3, "scale": 1.2}
THETA = {
    **dict.fromkeys(("Normal", "Laplace", "Logistic", "Cauchy", "LogNormal", "Gumbel"), LOC),
    "StudentT": {"df": 3.5, **LOC},
    "HalfNormal": {"scale": 1.2},
    "Exponential": {"rate": 1.4},
    "Gamma": {"concentration": 1.7, "rate": 1.2},
    "HalfCauchy": {"scale": 1.2},
    "InverseGamma": {"concentration": 1.7, "rate": 1.2},
    "Weibull": {"scale": 1.3, "concentration": 1.8},
    "Beta": {"concentration1": 1.6, "concentration0": 2.4},
    "VonMises": {"loc": 0.5, "concentration": 1.8},
}
SYMMETRIC = ("Normal", "Laplace", "Logistic", "Cauchy", "StudentT")
PEAKED = [name for name, f in FAMILIES.items() if f.peak is not None]
STRETCHES = {name: f.stretch.parameter for name, f in FAMILIES.items() if f.stretch is not None}
ROWS = {
    **{(f, f"tempered {t}"): proposals.tempered(t) for f in THETA if FAMILIES[f].tempered for t in (0.7, 2.0)},
    **{(f, "student_t"): proposals.student_t(4.0) for f in SYMMETRIC},
    **{
        (f, f"slice_by_{by} {e}"): getattr(proposals, f"slice_by_{by}")(e)
        for f in PEAKED
        for by in ("mass", "height")
        for e in (0, 0.2)
    },
    **{(f, "optimal loc"): proposals.optimal("loc", epsilon=0) for f in (*SYMMETRIC, "Gumbel")},
    **{(f, f"optimal stretch {e}"): proposals.optimal(parameter, epsilon=e) for f, parameter in STRETCHES.items() for e in (0, 0.1)},
    ("Normal", "defensive"): proposals.defensive(lambda p: type(p)(p.loc + 1.0, 0.5 * p.scale), epsilon=0.3),
}


def distribution(host, family, shape=()):
    theta = {k: host.array(np.full(shape, v)) for k, v in THETA[family].items()}
    return getattr(host.dist, family)(**theta)

"""flowvi: one gradient estimator per latent site, for Pyro and NumPyro.

This module imports neither jax nor torch. The objectives are in ``flowvi.numpyro`` and ``flowvi.pyro``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowvi import families, fields, proposals
from flowvi.baselines import Baseline
from flowvi.estimators import (
    LR,
    RP,
    Auto,
    DisARM,
    Enumerate,
    FiniteDifference,
    Flow,
    GumbelSoftmax,
    ImplicitRP,
    MeasureValued,
    ReinMax,
    StraightThrough,
)
from flowvi.learned.flow import AdaptiveFlow
from flowvi.learned.surrogate import Surrogate
from flowvi.level_sets import LevelSet
from flowvi.surfaces import HalfSpace

if TYPE_CHECKING:
    from flowvi.checks import check_estimator

__all__ = [
    "LR",
    "RP",
    "AdaptiveFlow",
    "Auto",
    "Baseline",
    "DisARM",
    "Enumerate",
    "FiniteDifference",
    "Flow",
    "GumbelSoftmax",
    "HalfSpace",
    "ImplicitRP",
    "LevelSet",
    "MeasureValued",
    "ReinMax",
    "StraightThrough",
    "Surrogate",
    "check_estimator",
    "families",
    "fields",
    "proposals",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import ``flowvi.checks`` when it is first used: it needs NumPy, which comes with a host."""
    if name not in ("checks", "check_estimator"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    checks = import_module("flowvi.checks")
    return checks if name == "checks" else checks.check_estimator

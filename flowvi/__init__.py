"""flowvi: one gradient estimator per latent site, for Pyro and NumPyro.

This module imports neither jax nor torch. The objectives are in ``flowvi.numpyro`` and ``flowvi.pyro``.
"""

import typing as _typing
from importlib import import_module as _import_module

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

if _typing.TYPE_CHECKING:
    from flowvi import checks as checks
    from flowvi.checks import check_estimator
else:  # a type checker that saw this function would accept every name

    def __getattr__(name):
        """Import ``flowvi.checks`` when it is first used: it needs NumPy, which comes with a host."""
        if name not in ("checks", "check_estimator"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        checks = _import_module("flowvi.checks")
        return checks if name == "checks" else checks.check_estimator


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


def __dir__() -> list[str]:
    """The names that tab completion offers: the public ones, and the public modules that the program has imported."""
    modules = ("guidance", "numpyro", "plot", "pyro", "report")
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") or name in modules)})

"""flowvi: one gradient estimator per latent site, for Pyro and NumPyro.

The names here import neither jax nor torch; ``flowvi.numpyro`` and ``flowvi.pyro`` hold the objectives.
"""

from flowvi import families, fields, proposals
from flowvi.baselines import Baseline
from flowvi.checks import check_estimator
from flowvi.estimators import LR, RP, Auto, Flow, ImplicitRP
from flowvi.learned.flow import AdaptiveFlow

__all__ = [
    "LR",
    "RP",
    "AdaptiveFlow",
    "Auto",
    "Baseline",
    "Flow",
    "ImplicitRP",
    "check_estimator",
    "families",
    "fields",
    "proposals",
]
__version__ = "0.1.0"

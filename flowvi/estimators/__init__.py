"""Gradient estimators: what happens at one site. Each has its own module.

Every estimator here is a choice of a velocity field u and a sampling density q in the probability-flow estimator

    E_i = w [ u_i . grad phi + psi_i phi ],    w = p / q,    psi_i = div u_i + u_i . grad_x log p + d_theta_i log p

of Parmas and Sugiyama (AISTATS 2021, eq. 19), where phi is the cost of the rest of the program as a function of the sample.
("Probability flow" is the mass that moves with the parameters. It is neither the ODE of diffusion models nor a normalizing flow.)
"""

from flowvi.estimators.auto import Auto
from flowvi.estimators.disarm import DisARM
from flowvi.estimators.enumerate import Enumerate
from flowvi.estimators.estimator import Draw, Estimator, attach, is_proposal, refuse_discrete, refuse_moving_support
from flowvi.estimators.finite_difference import FiniteDifference
from flowvi.estimators.flow import Flow
from flowvi.estimators.gumbel_softmax import GumbelSoftmax
from flowvi.estimators.implicit import ImplicitRP
from flowvi.estimators.lr import LR
from flowvi.estimators.measure_valued import MeasureValued
from flowvi.estimators.reinmax import ReinMax
from flowvi.estimators.rp import RP
from flowvi.estimators.straight_through import StraightThrough

__all__ = [
    "LR",
    "RP",
    "Auto",
    "DisARM",
    "Draw",
    "Enumerate",
    "Estimator",
    "FiniteDifference",
    "Flow",
    "GumbelSoftmax",
    "ImplicitRP",
    "MeasureValued",
    "ReinMax",
    "StraightThrough",
    "attach",
    "is_proposal",
    "refuse_discrete",
    "refuse_moving_support",
]

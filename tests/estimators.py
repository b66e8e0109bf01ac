"""Every estimator at a Normal or a Bernoulli, one row each. ``test_every_estimator.py`` checks the same properties of all.

A new estimator needs one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from kinds import half_divergence, half_of_loc, half_of_scale, half_velocity, shift, standardize

from flowvi import (
    LR,
    RP,
    AdaptiveFlow,
    Auto,
    Baseline,
    DisARM,
    Enumerate,
    FiniteDifference,
    Flow,
    GumbelSoftmax,
    ImplicitRP,
    MeasureValued,
    ReinMax,
    StraightThrough,
    Surrogate,
    proposals,
)
from flowvi.estimators import Estimator


class Refused(NamedTuple):
    """A site at which an estimator raises an error: its distribution ``(h, t) -> p``, and a part of the message."""

    distribution: Callable[[Any, Any], Any]
    message: str


def normal(h, loc, scale):
    return h.dist.Normal(loc, scale)


def bernoulli(h, loc, scale):
    return h.dist.Bernoulli(logits=loc + scale)


@dataclass(frozen=True)
class Row:
    """One estimator.

    Attributes:
        make: Makes the estimator from named functions of this module, so that its repr can be evaluated here.
        refused: Sites at which it is refused.
        cases: The programs of exact.json, of one site x, at which it is unbiased.
        particles: The numbers of particles with which it runs.
        learned: Its learned parameters by name, with values away from the start, for one element of a plate.
        shared: Whether the elements of a plate share the learned parameters.
        draws: The density that it draws from, if that is not its ``q``.
        by_value: Whether two calls of ``make`` give equal estimators. A Baseline may hold arrays and is equal only to itself.
        site: ``site(h, loc, scale)`` is the distribution at which it acts, if that is not a Normal.
    """

    make: Callable[[], Estimator]
    refused: Refused | None
    cases: tuple[str, ...] = ("normal-scale-square", "elbo-normal-normal-off")
    particles: tuple[int, ...] = (1, 4)
    learned: Mapping[str, np.ndarray] = field(default_factory=dict)
    shared: bool = False
    draws: Callable[[Any], Any] | None = None
    by_value: bool = True
    site: Callable[[Any, Any, Any], Any] = normal

    def coefficients(self, *batch):
        """The learned parameters under their names at the site x, for each element of a batch."""
        batch = () if self.shared else batch
        return {f"x.{name}": np.broadcast_to(value, (*batch, *np.shape(value))).copy() for name, value in self.learned.items()}


# ---- parts of the rows


def wide(p):
    """A wider Normal. At other families, where only refusals are tested, it returns p."""
    return type(p)(p.loc, 1.4 * p.scale) if type(p).__name__ == "Normal" else p


def two():
    return 2.0


def pathwise(x, p, dtheta):
    return dtheta.loc + (x - p.loc) / p.scale * dtheta.scale


def to_the_right(p):
    return type(p)(p.loc + p.scale * 0.5, p.scale)


def mixed(p):
    """The proposal of AdaptiveFlow at the values of PROPOSAL."""
    return proposals.defensive(to_the_right, 0.1)(p)


def random(*shape):
    return 0.3 * np.random.default_rng(3).normal(size=shape)


def polynomial(z, params):
    return params["a"][0] * z + params["a"][1] * z**2


def toy(b):
    return (b - 0.45) ** 2


POLYNOMIAL = {"c.a": np.array([0.3, -0.1])}
RELAXED = {"scale": np.array(1.4), "log_temperature": np.array(-0.2)}
PROPOSAL = np.array([0.5, 0.0])
# The control variate of a parameter reads the scores of all live parameters. Here it reads its own, so that the other can be fixed.
FIELD = {"velocity": random(2, 6), "control": np.concatenate([random(2, 5), np.diag([0.4, -0.3])], 1)}

MOVING = Refused(lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t), "is biased where the support moves")
DISCRETE = Refused(lambda h, t: h.dist.Bernoulli(logits=t), "needs a continuous distribution, but Bernoulli(Logits)? is discrete")
NO_SAMPLER = Refused(lambda h, t: h.dist.VonMises(t, h.array(1.0)), "RP needs a reparameterized sampler, but VonMises has none")
NO_INVERSE = Refused(lambda h, t: h.dist.StudentT(4 + t, h.array(0.0), h.array(1.0)), ".*StudentT only for a constant df")
NO_MODEL = Refused(lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)), ".*expected Normal or MultivariateNormal, found Gamma")


NO_SUPPORT = Refused(lambda h, t: h.dist.Poisson(t), "expected a finite support that the host enumerates, but Poisson has none")
NO_INTEGERS = Refused(lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)), "needs a distribution of integers, but Gamma is continuous")
NO_WEAK_DERIVATIVE = Refused(lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)), "no weak derivative of Gamma in its concentration")

NO_PATH = Refused(lambda h, t: h.dist.Poisson(t), "Surrogate needs one of Bernoulli, .*found Poisson")
NO_TEMPERATURE = Refused(lambda h, t: h.dist.Normal(t, h.array(1.0)), "a temperature relaxes a discrete site, but Normal has no relax")
NOT_RELAXED = Refused(
    lambda h, t: h.dist.Categorical(logits=t[..., None] * h.array([0.0, 1.0])), "can move, but the value of a Categorical"
)

TOY = ("bernoulli-logit-t0.45",)
SHARED: dict[str, Any] = {"shared": True, "by_value": False}
DISCRETE_ONLY = ("bernoulli-logit-t0.45", "categorical-logit2")
WITH_DISCRETE = ("normal-scale-square", "elbo-normal-normal-off", "bernoulli-logit-t0.45")
IN_A_PLATE = ("plate4-local-cost", "plate4-local-cost, cost outside")

ROWS = {
    "LR": Row(LR, MOVING, WITH_DISCRETE),
    "LR, q": Row(lambda: LR(q=wide), MOVING),
    "LR, baseline": Row(lambda: LR(Baseline(two)), MOVING, WITH_DISCRETE, by_value=False),
    "LR, plate": Row(lambda: LR("plate"), MOVING, IN_A_PLATE),
    "LR, optimal": Row(lambda: LR("optimal"), MOVING, WITH_DISCRETE, particles=(4,)),
    "RP": Row(RP, NO_SAMPLER),
    "RP, q": Row(lambda: RP(wide), NO_INVERSE),
    "RP, diagonal": Row(lambda: RP(control_variate="diagonal"), NO_MODEL, learned={"control_variate": random(1, 2)}),
    "RP, quadratic": Row(lambda: RP(control_variate="quadratic"), NO_MODEL, learned={"control_variate": random(1, 2)}),
    "RP, cubic": Row(lambda: RP(control_variate="cubic"), NO_MODEL, learned={"control_variate": random(1, 4)}),
    "ImplicitRP": Row(ImplicitRP, DISCRETE),
    "ImplicitRP, q": Row(lambda: ImplicitRP(q=wide), DISCRETE),
    "ImplicitRP, S": Row(lambda: ImplicitRP(standardize), DISCRETE),
    "ImplicitRP, not exact": Row(lambda: ImplicitRP(shift, exact=False), MOVING),
    "Flow, per parameter": Row(lambda: Flow(loc=half_of_loc, scale=half_of_scale), MOVING),
    "Flow, general": Row(lambda: Flow(half_velocity), MOVING),
    "Flow, q": Row(lambda: Flow(half_velocity, q=wide), MOVING),
    "Flow, divergence": Row(lambda: Flow(half_velocity, divergence=half_divergence), DISCRETE),
    "Flow, pathwise": Row(lambda: Flow(pathwise, divergence="pathwise"), DISCRETE),
    "AdaptiveFlow": Row(AdaptiveFlow, MOVING, learned=FIELD),
    "AdaptiveFlow, q": Row(lambda: AdaptiveFlow(q="learned"), DISCRETE, learned=FIELD | {"proposal": PROPOSAL}, draws=mixed),
    "Enumerate": Row(Enumerate, NO_SUPPORT, DISCRETE_ONLY, site=bernoulli),
    "Enumerate, random": Row(lambda: Enumerate(lanes="random"), NO_SUPPORT, DISCRETE_ONLY, site=bernoulli),
    "FiniteDifference": Row(FiniteDifference, NO_INTEGERS, DISCRETE_ONLY, site=bernoulli),
    "FiniteDifference, down": Row(lambda: FiniteDifference(downwards=True), NO_INTEGERS, DISCRETE_ONLY, site=bernoulli),
    "FiniteDifference, share": Row(lambda: FiniteDifference(share=0.5), NO_INTEGERS, DISCRETE_ONLY, site=bernoulli),
    "MeasureValued": Row(MeasureValued, NO_WEAK_DERIVATIVE),
    "DisARM": Row(DisARM, NO_SUPPORT, DISCRETE_ONLY, site=bernoulli),
    "Surrogate": Row(lambda: Surrogate(polynomial, {"a": [0.0, 0.0]}), NO_PATH, ("normal-scale-square",), learned=POLYNOMIAL, **SHARED),
    "Surrogate, temperature": Row(
        lambda: Surrogate(toy, temperature=0.5), NO_TEMPERATURE, TOY, learned=RELAXED, site=bernoulli, **SHARED
    ),
    "GumbelSoftmax": Row(lambda: GumbelSoftmax(0.5), NOT_RELAXED, (), site=bernoulli),
    "StraightThrough": Row(StraightThrough, NOT_RELAXED, (), site=bernoulli),
    "ReinMax": Row(ReinMax, NOT_RELAXED, TOY, site=bernoulli),  # which is right, because the cost is quadratic
    "Auto": Row(Auto, None, WITH_DISCRETE),  # only the estimator that it chooses can refuse
}


# ---- wrong estimators, each with the property that it violates


def no_divergence(x, p, dtheta):
    return 0 * x * dtheta.loc


def uneven(x, p, dtheta):
    """A step along loc, doubled if scale moves too: right for each parameter alone, but not linear in dtheta."""
    both = dtheta.of(lambda p: p.loc) is not None and dtheta.of(lambda p: p.scale) is not None
    return (2 if both else 1) * half_velocity(x, p, dtheta)


class Offset(LR):
    def attach(self, ops, target, x):
        return super().attach(ops, target, x + 1e-12)


WRONG = {
    "unbiased": Row(lambda: Flow(half_velocity, divergence=no_divergence), MOVING),
    "value": Row(Offset, MOVING),
    "linear": Row(lambda: Flow(uneven), MOVING),
    "refused": Row(LR, NO_SAMPLER),
    "plain": Row(lambda: LR(q=lambda p: p), MOVING),
}

"""Estimators and distributions with one fault each, and the condition that check_estimator must name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpyro
import numpyro.distributions
import pyro.distributions
import torch
from field_rows import normal_mixture

from flowvi import LR, RP, Flow, ImplicitRP, fields, proposals
from flowvi.estimators import Estimator
from flowvi.families import FAMILIES
from flowvi.host import host_of
from flowvi.proposals.slices import _SymmetricSlice

BOTH = ("numpyro", "pyro")


class CutNormal(numpyro.distributions.Normal):
    """Its log_prob ignores the derivative in the scale."""

    def log_prob(self, value, intermediates=None):
        return numpyro.distributions.Normal(self.loc, jax.lax.stop_gradient(self.scale)).log_prob(value)


class CutNormalPyro(pyro.distributions.Normal):
    def log_prob(self, value):
        return pyro.distributions.Normal(self.loc, self.scale.detach(), validate_args=False).log_prob(value)


class Unnormalized(numpyro.distributions.Normal):
    """A Normal whose log_prob lacks the logarithm of the scale."""

    def log_prob(self, value, intermediates=None):
        return -(((value - self.loc) / self.scale) ** 2) / 2


class UnnormalizedPyro(pyro.distributions.Normal):
    def log_prob(self, value):
        return -(((value - self.loc) / self.scale) ** 2) / 2


class CutSampler(numpyro.distributions.Normal):
    """Its sampler ignores the derivative in the scale."""

    def sample(self, key, sample_shape=()):
        return (
            numpyro.distributions.Normal(self.loc, jax.lax.stop_gradient(self.scale)).expand(self.batch_shape).sample(key, sample_shape)
        )


class CutSamplerPyro(pyro.distributions.Normal):
    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return pyro.distributions.Normal(self.loc, self.scale.detach(), validate_args=False).rsample(sample_shape)


CUT = {"numpyro": CutNormal, "pyro": CutNormalPyro}
UNNORMALIZED = {"numpyro": Unnormalized, "pyro": UnnormalizedPyro}
CUT_SAMPLER = {"numpyro": CutSampler, "pyro": CutSamplerPyro}


def stop(x):
    return x.detach() if isinstance(x, torch.Tensor) else jax.lax.stop_gradient(x)


def normal(h):
    return h.dist.Normal(h.array(0.3), h.array(1.2))


def gamma(h, a=0.6):
    return h.dist.Gamma(h.array(a), h.array(1.2))


def uniform(h):
    return h.dist.Uniform(h.array(-0.4), h.array(1.3))


def exponential(h):
    return h.dist.Exponential(h.array(1.4))


def von_mises(h):
    return h.dist.VonMises(h.array(0.5), h.array(1.8))


def dirichlet(h):
    return h.dist.Dirichlet(h.array([1.4, 2.1, 0.8]))


def truncated(h):
    return h.dist.TruncatedNormal(h.array(0.4), h.array(1.1), low=-0.8, high=1.5)


def vector(h):
    return h.dist.MultivariateNormal(
        h.array([0.3, -0.2, 0.1]), scale_tril=h.array([[0.6, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 0.9]])
    )


def away_from_zero(x, p):
    return x**2 / (1 + x**2)


def naive_mask():
    """The mixture m RP + (1 - m) LR without its term u_RP . grad m."""
    return fields.Field(
        lambda x, p, dtheta: away_from_zero(x, p) * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale),
        lambda x, p, dtheta: away_from_zero(x, p) * dtheta.scale / p.scale,
    )


def wrong_seam(x, p, dtheta):
    """Mass that grows along the circle and is cut off at the seam."""
    return 0.05 * x / dtheta.ops.exp(p.log_prob(x)) * dtheta.concentration + 0 * x * dtheta.loc


class WrongSlice(_SymmetricSlice):
    def log_prob(self, ops, parts, x):
        return super().log_prob(ops, parts, x) + 0.1


def wrong_proposal(p):
    return host_of(p).proposal(WrongSlice("height", FAMILIES[type(p).__name__].peak), p)


def push(x, p, dtheta):
    """A field tangent to the simplex that crosses its faces."""
    d = dtheta.concentration.sum(-1)[..., None]
    return d * (0.1 * dtheta.ops.cos(0 * x) - dtheta.ops.asarray([0.3, 0.0, 0.0], x))


@dataclass(frozen=True)
class Fault:
    """A fault, and the finding that check_estimator must report.

    Attributes:
        distribution: ``h -> p``, or ``h -> (function, parameters)``.
        estimator: ``h -> estimator``.
        condition: The condition that must be named.
        message: A part of the message.
        parameters: The live parameters.
        hosts: The hosts that have the family.
    """

    distribution: Callable[[Any], Any]
    estimator: Callable[[Any], Estimator]
    condition: str
    message: str
    parameters: Any = None
    hosts: tuple[str, ...] = BOTH


FAULTS = {
    "a wrong divergence": Fault(
        normal,
        lambda h: Flow(lambda x, p, dtheta: 0.1 * x**2 * dtheta.loc, divergence=lambda x, p, dtheta: 0.1 * x * dtheta.loc),
        "divergence",
        r"at x = .*, parameter loc: psi .* is .*, expected .* by differences; correct divergence",
    ),
    "a mask without its gradient": Fault(normal, lambda h: Flow(naive_mask()), "divergence", "at x = .*, parameter"),
    "a divergence that does not see x": Fault(
        normal, lambda h: Flow(lambda x, p, dtheta: stop(x) * dtheta.loc), "divergence", "parameter loc"
    ),
    "q narrower than p": Fault(
        normal, lambda h: LR(q=lambda p: h.dist.Normal(p.loc, 0.6 * p.scale)), "second moment", "is infinite, parameter .*widen q"
    ),
    "q with lighter tails": Fault(
        lambda h: h.dist.StudentT(h.array(3.5), h.array(0.3), h.array(1.2)),
        lambda h: RP(lambda p: h.dist.Normal(p.loc, 3 * p.scale)),
        "second moment",
        "towards x = .* too light",
        ("loc", "scale"),
    ),
    "q that vanishes where the field does not": Fault(
        normal,
        lambda h: Flow(fields.location_scale(), q=proposals.slice_by_height(epsilon=0)),
        "second moment",
        "q vanishes near x = 0.3, .* mix p into q",
    ),
    "a discrete q with lighter tails": Fault(
        lambda h: h.dist.Geometric(probs=h.array(0.3)),
        lambda h: LR(q=lambda p: h.dist.Poisson(2.0 + 0 * p.probs)),
        "second moment",
        "is infinite",
    ),
    "q of a smaller support": Fault(
        normal,
        lambda h: LR(q=lambda p: h.dist.Exponential(p.scale)),
        "support of q",
        "must cover that of Normal, expected numbers from -inf to inf, found numbers from 0",
    ),
    "q whose sampler is not its density's": Fault(
        normal, lambda h: LR(q=proposals.defensive(wrong_proposal)), "sampler", "sample and log_prob of q do not agree"
    ),
    "LR on a moving support": Fault(uniform, lambda h: LR(), "requirements", "LR is biased where the support moves .* upper bound"),
    "u through the end of a Gamma": Fault(
        gamma,
        lambda h: Flow(concentration=lambda x, p: 1.0),
        "boundary flux",
        r"lower end x = 0, .*this end is fixed: u must vanish there",
    ),
    "u through the end of an Exponential": Fault(
        exponential, lambda h: Flow(rate=lambda x, p: -1 / p.rate), "boundary flux", r"p \(u - v\) is -1, expected 0"
    ),
    "u through the end of a truncated Normal": Fault(
        truncated,
        lambda h: Flow(lambda x, p, dtheta: 0 * x + dtheta.of(lambda p: p.base_dist.loc)),
        "boundary flux",
        "end x = .*this end is fixed: u must vanish there",
        ("loc",),
        ("numpyro",),
    ),
    "u through the ends of a Beta": Fault(
        lambda h: h.dist.Beta(h.array(1.0), h.array(1.0)),
        lambda h: Flow(concentration1=lambda x, p: 0.2),
        "boundary flux",
        "end x = .*this end is fixed: u must vanish there",
    ),
    "u that does not ride a moving end": Fault(
        uniform,
        lambda h: Flow(fields.Field(lambda x, p, dtheta: 0.5 * (x - p.low) / (p.high - p.low) * dtheta.high, rides=True)),
        "boundary flux",
        "upper end x = 1.3, parameter high: .* moves: u must be its speed there",
        ("high",),
    ),
    "u that carries mass to infinity": Fault(
        normal,
        lambda h: Flow(lambda x, p, dtheta: 0.1 / dtheta.ops.exp(p.log_prob(x)) * dtheta.loc),
        "boundary flux",
        "u moves mass to infinity",
        ("loc",),
    ),
    "u through a face of the simplex": Fault(
        lambda h: h.dist.Dirichlet(h.array([1.0, 1.0, 1.0])), lambda h: Flow(push), "boundary flux", "where coordinate 0 of x is 0"
    ),
    "u off the simplex": Fault(
        dirichlet, lambda h: Flow(lambda x, p, dtheta: x * dtheta.concentration), "tangent", "the coordinates of u sum to"
    ),
    "u with a wrong seam": Fault(von_mises, lambda h: Flow(wrong_seam), "boundary flux", "at the seam, parameter concentration"),
    "u that jumps": Fault(
        normal, lambda h: Flow(loc=lambda x, p: 1.0 * (x > 0.5), scale=lambda x, p: 0.0), "mean of psi", "parameter loc: E_p.psi. is"
    ),
    "a log_prob that detaches a parameter": Fault(
        lambda h: CUT[h.name](h.array(0.3), h.array(1.2)), lambda h: LR(), "log_prob", "parameter scale: its derivative is 0, expected"
    ),
    "a detached parent": Fault(
        lambda h: (lambda t: h.dist.Normal(t, h.math.exp(0.5 * stop(t))), {"t": h.array(0.3)}),
        lambda h: RP(),
        "log_prob",
        "parameter t",
    ),
    "a log_prob that is not normalized": Fault(
        lambda h: UNNORMALIZED[h.name](h.array(0.3), h.array(1.2)), lambda h: LR(), "mean of psi", "parameter scale: .*not normalised"
    ),
    "a sampler that detaches a parameter": Fault(
        lambda h: CUT_SAMPLER[h.name](h.array(0.3), h.array(1.2)), lambda h: RP(), "unbiased", r"parameter scale: .*\|z\|"
    ),
    "a sampler without a derivative": Fault(
        lambda h: normal_mixture(h, h.array(0.3), h.array(0.0)),
        lambda h: RP(force=True),
        "unbiased",
        r"parameter mixing_distribution.logits.0.: .* the mean estimate is 0,",
        hosts=("numpyro",),
    ),
    "a sampler with a wrong derivative": Fault(
        lambda h: h.dist.MixtureOfDiagNormals(
            h.array([[-1.0, 0.0], [1.0, 0.5]]), h.array([[1.0, 1.0], [1.0, 1.0]]), h.array([0.2, -0.3])
        ),
        lambda h: RP(force=True),
        "unbiased",
        "parameter component_logits",
        hosts=("pyro",),
    ),
    "a velocity that is not linear": Fault(
        normal, lambda h: Flow(lambda x, p, dtheta: dtheta.loc + dtheta.loc**2), "linear in dtheta", "only the first order"
    ),
    "a velocity that does not vanish": Fault(
        normal, lambda h: Flow(lambda x, p, dtheta: dtheta.loc + 0.1), "linear in dtheta", "velocity.x, p, 0. is 0.1 at x"
    ),
    "a velocity of the wrong sign": Fault(
        normal, lambda h: Flow(lambda x, p, dtheta: -dtheta.loc, divergence="pathwise"), "pathwise", "parameter loc", ("loc",)
    ),
    "a velocity that is not pathwise": Fault(
        lambda h: gamma(h, 1.7),
        lambda h: Flow(fields.Field(fields.gamma_one_moment().velocity, "pathwise")),
        "pathwise",
        "parameter concentration: psi is declared 0",
    ),
    "a vector field of the wrong sign": Fault(
        vector,
        lambda h: Flow(lambda x, p, dtheta: dtheta.loc - ((dtheta.scale_tril) @ (x - p.loc)[..., None])[..., 0], divergence="pathwise"),
        "unbiased",
        r"parameter scale_tril\[.*over 5000 samples",
    ),
    "a velocity of the wrong shape": Fault(
        lambda h: h.dist.Normal(h.array([0.3, 0.1]), h.array(1.2)),
        lambda h: Flow(loc=lambda x, p: h.array([1.0, 2.0, 3.0])),
        "requirements",
        "the velocity of 'loc' must have the shape of x",
    ),
    "a velocity that is NaN somewhere": Fault(
        normal, lambda h: Flow(loc=lambda x, p: h.math.sqrt(x + 1)), "finite", r"on a share 0\.1\d* of the mass of p"
    ),
    "a field that mixes coordinates": Fault(normal, lambda h: Flow(loc=lambda x, p: x - x.mean()), "elementwise", "another element"),
    "a velocity that mixes a batch": Fault(
        lambda h: h.dist.Normal(h.array([0.3, 0.1]), h.array(1.2)),
        lambda h: Flow(lambda x, p, dtheta: x.mean(-1)[..., None] * dtheta.loc),
        "elementwise",
        "another element",
    ),
    "a mask that mixes coordinates": Fault(
        normal, lambda h: Flow(fields.masked(lambda x, p: x - x.mean(), fields.location_scale())), "elementwise", "another element"
    ),
    "an S that mixes coordinates": Fault(
        normal, lambda h: ImplicitRP(lambda x, p: x - p.loc + 0.1 * x.sum()), "elementwise", "reads x at another"
    ),
    "an S that is not monotone": Fault(
        normal,
        lambda h: ImplicitRP(lambda x, p: ((x - p.loc) / p.scale) ** 2),
        "standardization",
        r"changes its sign near x = 0\.(2|3)",
    ),
    "an S that is constant in x": Fault(
        normal, lambda h: ImplicitRP(lambda x, p: 0 * x + p.loc), "standardization", "does not depend on x"
    ),
    "an S whose law depends on a parameter": Fault(
        normal, lambda h: ImplicitRP(lambda x, p: x / p.scale), "pathwise", "parameter loc: psi is declared 0"
    ),
    "an S with a wrong parameter": Fault(normal, lambda h: ImplicitRP(lambda x, p: (x - p.loc) / 1.2), "pathwise", "parameter scale"),
}

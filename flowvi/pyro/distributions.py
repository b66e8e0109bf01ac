"""Pyro's distributions as the core sees them, and the wrapper :class:`Estimated`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from pyro.infer.util import is_validation_enabled
from torch.distributions import constraints
from torch.distributions.kl import kl_divergence, register_kl
from torch.distributions.transforms import _InverseTransform

import flowvi.ops.torch as ops
from flowvi.estimated import ForwardsToBase, name_of_site, require_parts
from flowvi.estimators import Draw, Estimator, attach
from flowvi.pyro.detach import detached, tensors_in
from flowvi.pyro.generators import generator_states, uniforms
from flowvi.shapes import rows
from flowvi.target import OWN_STANDARDIZATION, Target

BIASED_SAMPLERS = (
    dist.RelaxedBernoulliStraightThrough,
    dist.OneHotCategoricalStraightThrough,
    dist.MixtureOfDiagNormals,
    dist.MixtureOfDiagNormalsSharedCovariance,
)
PLAIN_TRANSFORMED = (dist.TransformedDistribution, torch.distributions.TransformedDistribution)
TRANSFORMED = (*PLAIN_TRANSFORMED, dist.FoldedDistribution)
ONE_WAY = (  # their inverse is only a look-up in the cache
    transforms.BlockAutoregressive,
    ConditionedPlanar,
    ConditionedRadial,
    transforms.Sylvester,
    transforms.Polynomial,
)
PARTICLES = "num_particles_vectorized"  # Pyro's name of the plate


_is_subclass = lru_cache(maxsize=256)(issubclass)


def is_kind(p: Any, kinds: type | tuple[type, ...]) -> bool:
    """A cached ``isinstance``: it is called at every draw, and slow for classes with a metaclass."""
    return _is_subclass(type(p), kinds)  # type: ignore[arg-type]


def unwrap(fn: Any) -> Any:
    """Remove the wrappers that do not change the family: independent, expanded, masked, estimated."""
    while hasattr(fn, "base_dist") and isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


class PyroTarget(Target):
    """See :class:`flowvi.target.Target`.

    Attributes:
        params: The parameters of the guide so far.
        own_rows: See :class:`flowvi.assignment.Assignment`.
    """

    plain_transformed = PLAIN_TRANSFORMED
    transformed = TRANSFORMED
    unwrap = staticmethod(unwrap)
    host_validates = staticmethod(is_validation_enabled)

    params: Sequence[torch.Tensor] = ()
    own_rows: dict[tuple[str, str], bool]

    @cached_property
    def plate_rows(self):
        return {
            f.dim: 1 if f.name == PARTICLES else rows(f.full_size or f.size, f.size, partial(self._has_own_rows, f))
            for f in self.frames
            if f.vectorized
        }

    def _has_own_rows(self, frame: Any) -> bool:
        """Whether the first and the last element of a plate depend on the first and the last row of some parameter alone."""
        key = self.name, frame.name
        if key not in self.own_rows:
            candidates = [param for param in self.params if frame.size in param.shape and param.requires_grad]
            of_family = (getattr(self.p, name) for name in self.parameters)
            self.own_rows[key] = bool(candidates) and any(self._depends_on_a_row(value, frame, candidates) for value in of_family)
        return self.own_rows[key]

    def _depends_on_a_row(self, value: Any, frame: Any, candidates: list[torch.Tensor]) -> bool:
        """Whether a parameter of the family does."""
        axis = len(self.p.batch_shape) + frame.dim - self.extra_ndim
        if not (isinstance(value, torch.Tensor) and value.requires_grad and 0 <= axis < value.ndim and value.shape[axis] == frame.size):
            return False
        rows_of = []  # for each of the two elements, the parameters, by number and axis, of which it has a row
        for element in (0, -1):
            gradients = torch.autograd.grad(value.select(axis, element).sum(), candidates, retain_graph=True, allow_unused=True)
            axes = ((k, i, g) for k, g in enumerate(gradients) if g is not None for i in range(g.ndim) if g.shape[i] == frame.size)
            rows_of.append({(k, i) for k, i, g in axes if _is_a_row(g.movedim(i, 0), element)})
        return not rows_of[0].isdisjoint(rows_of[1])

    def detach(self, p):
        return detached(p)

    def is_live(self, value):
        return value.requires_grad if isinstance(value, torch.Tensor) else any(map(self.is_live, tensors_in(value)))

    def _scores(self, x, names):
        if not torch.is_grad_enabled():
            return []
        p = self.p.expand(self.batch_shape)
        live = [theta for name in names if (theta := getattr(p, name)).requires_grad]
        psi = torch.autograd.grad(p.log_prob(x).sum(), live, retain_graph=True) if live else ()
        return list(zip(map(ops.tether, live), psi, strict=True))

    @staticmethod
    def lacks_inverse(transform):
        if is_kind(transform, torch.distributions.ComposeTransform):
            return any(map(PyroTarget.lacks_inverse, transform.parts))
        inverts = is_kind(transform, _InverseTransform) or type(transform)._inverse is not torch.distributions.Transform._inverse
        return is_kind(transform, ONE_WAY) or not inverts

    def lacks_rsample(self):
        p = self.p
        while type(p) in PLAIN_TRANSFORMED:
            p = unwrap(p.base_dist)
        if is_kind(p, BIASED_SAMPLERS):
            return f"the derivative of {type(p).__name__}'s is biased"
        return None if p.has_rsample else f"{type(p).__name__} has none"

    def cdf(self, x, p, what="ImplicitRP", instead=OWN_STANDARDIZATION):
        concentration = getattr(p, "concentration", None)
        if isinstance(p, torch.distributions.Gamma | dist.InverseGamma) and self.is_live(concentration):
            self.refuse(f"torch's cdf of {self.family} has no derivative in the concentration, which needs one; {instead}.")
        try:
            return p.cdf(x)
        except NotImplementedError:
            self.refuse(f"{what} needs a cdf, but {self.family} has none; {instead}.")

    def uniforms(self, shape, like):
        return uniforms(generator_states(), self.name, shape, like)

    def expand(self, q):
        if not isinstance(q, torch.distributions.Distribution):
            self.refuse(f"q(p) must return a Pyro distribution, found {type(q).__name__}.")
        return detached(q.expand(self.batch_shape))

    def clip(self, x):
        inside = self.p0.support.check(x)
        feasible = torch.distributions.transform_to(self.p0.support)(torch.zeros_like(x))
        return inside, torch.where(inside.reshape(inside.shape + (1,) * self.event_ndim), x, feasible)


def _is_a_row(gradient: torch.Tensor, row: int) -> bool:
    """Whether this row is all that is not 0."""
    return bool(gradient[row].any()) and bool(torch.count_nonzero(gradient) == torch.count_nonzero(gradient[row]))


def draw(target: PyroTarget, estimator: Estimator) -> Draw:
    """Draw at a site from the estimator's proposal and attach derivatives and weight."""
    q = target.p if estimator.q is None else estimator.proposal(ops, target)[0]
    if q.batch_shape != target.batch_shape:
        q = q.expand(target.batch_shape)
    x = q.rsample() if q.has_rsample else q.sample()  # as Pyro draws
    return attach(ops, target, estimator, x)


def is_partly_reparameterized(p: Any) -> bool:
    """Whether the family has its own ``score_parts``, with a path and a score, like a rejection sampler."""
    return getattr(type(p), "score_parts", dist.Distribution.score_parts) is not dist.Distribution.score_parts


class Estimated(ForwardsToBase, dist.TorchDistribution):
    r"""A distribution that carries its own gradient estimator: ``Estimated(dist.Normal(loc, scale), LR())``.

    ``TraceFlow_ELBO`` uses ``estimator`` at the site. Under other objectives ``Estimated`` draws from p (never from a proposal q), and
    its ``log_prob`` is that of p. The draw has the derivatives of the estimator at q = p, so Pyro's ``Trace_ELBO``, ``TraceGraph_ELBO``
    and ``TraceEnum_ELBO`` use the estimator too; one that learns keeps its initial coefficients. Under these objectives ``Estimated``
    has to be the outermost wrapper; its ``to_event``, ``expand`` and ``mask`` keep it outermost.

    **Requirements**: those of the estimator. It wraps a whole distribution.

    Args:
        base_dist: The distribution p, of any batch and event shape.
        estimator: The estimator of the site.

    Raises:
        TypeError: ``base_dist`` is not a distribution of Pyro, or ``estimator`` is not an estimator.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import LR
        >>> from flowvi.pyro import Estimated
        >>> Estimated(dist.Normal(0.0, 1.0), LR()).expand([3]).to_event(1).event_shape
        torch.Size([3])

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any, estimator: Estimator, *, validate_args: bool | None = None):
        require_parts(base_dist, estimator, TorchDistributionMixin, "Pyro")
        self.base_dist: Any = base_dist
        self.estimator: Estimator = estimator
        # whether psi = 0 at q = p; an attribute, not a property, because Pyro assigns it
        self.has_rsample: bool = estimator.psi_is_zero(PyroTarget(self._name, base_dist, enters=True))
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)

    @property
    def _name(self) -> str:
        return name_of_site(unwrap(self.base_dist))

    @constraints.dependent_property
    def support(self) -> Any:
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Estimated:
        return Estimated(self.base_dist.expand(batch_shape), self.estimator)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Estimated:
        return Estimated(self.base_dist.to_event(reinterpreted_batch_ndims), self.estimator)

    def mask(self, mask: Any) -> Estimated:
        return Estimated(self.base_dist.mask(mask), self.estimator)

    def __call__(self, sample_shape: Any = torch.Size()) -> Any:  # noqa: B008
        fn = self.base_dist.expand_by(sample_shape) if sample_shape else self.base_dist
        estimator = self._at_q_equal_p(fn)
        if estimator.uses_sampler or estimator.biased:
            return fn()
        return draw(PyroTarget(self._name, fn, estimator.enters), estimator).value

    sample = rsample = __call__

    def log_prob(self, value: Any) -> Any:
        return self.base_dist.log_prob(value)

    def score_parts(self, value: Any) -> ScoreParts:
        log_prob = self.log_prob(value)
        estimator = self._at_q_equal_p(self.base_dist)
        if estimator.uses_sampler:
            return self.base_dist.score_parts(value)
        target = PyroTarget(self._name, self.base_dist, estimator.enters)
        if (estimator.compares or estimator.biased) and torch.is_grad_enabled():
            does = "runs the program again" if estimator.compares else "moves a discrete value"
            target.refuse(f"{estimator} {does}, which this objective does not; use flowvi.pyro.TraceFlow_ELBO, or LR().")
        score = attach(ops, target, estimator, target.pull(value.detach())).score
        return ScoreParts(log_prob, torch.zeros(()) if score is None else score, log_prob)

    def _at_q_equal_p(self, fn: Any) -> Estimator:
        return self.estimator.at_p().resolve(PyroTarget(self._name, fn, enters=True))


WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution, Estimated)


@register_kl(Estimated, torch.distributions.Distribution)
def _kl_of_estimated(p, q):
    return kl_divergence(p.base_dist, q)


@register_kl(torch.distributions.Distribution, Estimated)
def _kl_to_estimated(p, q):
    return kl_divergence(p, q.base_dist)


@register_kl(Estimated, Estimated)
def _kl_between_estimated(p, q):
    return kl_divergence(p.base_dist, q.base_dist)

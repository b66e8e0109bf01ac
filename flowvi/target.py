"""What an estimator sees of a site: its distribution with the wrappers taken off."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from flowvi.ops import Array, Ops, SecondMoment
from flowvi.standardizations import STANDARDIZATIONS

THIN_SUPPORTS = {
    "_Simplex": "simplex",
    "_Sphere": "sphere",
    "_ZeroSum": "zero-sum vectors",
    "_CorrCholesky": "Cholesky factors of correlation matrices",
    "_CorrMatrix": "correlation matrices",
    "_PositiveDefinite": "symmetric matrices",
    "_PositiveSemiDefinite": "symmetric matrices",
    "_PositiveDefiniteCirculantVector": "circulant vectors",
    "_LowerCholesky": "triangular matrices",
    "_LowerTriangular": "triangular matrices",
    "_UnitLowerCholesky": "triangular matrices",
    "_ScaledUnitLowerCholesky": "triangular matrices",
    "_SoftplusLowerCholesky": "triangular matrices",
}

# Their tails are so light that their density vanishes at every boundary to which exp, a sigmoid and the like carry it.
VANISHING = {"Normal", "MultivariateNormal", "LowRankMultivariateNormal"}


SEPARATE_PARAMETERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Normal", "LogNormal", "Laplace", "Logistic", "Cauchy", "Gumbel"), ("loc", "scale")),
    "StudentT": ("df", "loc", "scale"),
    **dict.fromkeys(("HalfNormal", "HalfCauchy"), ("scale",)),
    "Gamma": ("concentration", "rate"),
    "VonMises": ("loc", "concentration"),
    **dict.fromkeys(("Exponential", "Poisson"), ("rate",)),
    **dict.fromkeys(("Bernoulli", "BernoulliLogits", "BinomialLogits", "Binomial"), ("logits",)),
    **dict.fromkeys(("Categorical", "CategoricalLogits", "OneHotCategorical"), ("logits",)),
    **dict.fromkeys(("BernoulliProbs", "BinomialProbs", "CategoricalProbs"), ("probs",)),
}


class Support(NamedTuple):
    """A support as far as it can be compared: coordinates between bounds, or a kind by name.

    Both hosts give their constraints the same class names, so one reading serves both.
    """

    kind: str
    discrete: bool
    lower: Any = -math.inf
    upper: Any = math.inf

    @classmethod
    def of(cls, constraint: Any) -> Support:
        if constraint is None:  # NumPyro's discrete distributions of TensorFlow Probability
            return cls("unknown", True)
        while hasattr(constraint, "base_constraint"):
            constraint = constraint.base_constraint
        kind = type(constraint).__name__
        if kind == "_Real":
            return REAL
        if kind == "_Boolean":
            return cls("coordinates", True, 0, 1)
        bounds = {side: getattr(constraint, f"{side}_bound") for side in ("lower", "upper") if hasattr(constraint, f"{side}_bound")}
        if kind == "_Multinomial" or not (bounds or kind == "_Integer"):
            return cls(kind, constraint.is_discrete)
        return cls("coordinates", constraint.is_discrete, **bounds)

    @property
    def fixed(self) -> bool:
        """Whether the bounds are plain numbers."""
        return isinstance(self.lower, (int, float)) and isinstance(self.upper, (int, float))

    def fills(self, domain: Support) -> bool:
        """Whether it is known to be the whole of a transform's ``domain``, so that its image is the whole codomain."""
        known = self.kind == "coordinates" or self.kind in THIN_SUPPORTS
        return known and self.fixed and domain.fixed and self == domain

    def __str__(self) -> str:
        if self.kind != "coordinates":
            return self.kind.strip("_")
        return f"{'integers' if self.discrete else 'numbers'} from {self.lower} to {self.upper}"


REAL = Support("coordinates", False)


class Learned(NamedTuple):
    """A parameter that an estimator learns while SVI runs.

    Attributes:
        initial: Makes its initial value. The dims on the left are those of the site's batch shape, at the full sizes of its plates.
        event_shape: Of the dims on the right that are no batch dims of the site.
    """

    initial: Callable[[], Array]
    event_shape: tuple[int, ...]


class Target(ABC):
    """The distribution of one site as the estimators see it; each host subclasses it once.

    ``Independent``, expanded and masked distributions are unwrapped, and a plain ``TransformedDistribution`` is entered
    where the estimator acts on the base sample (``push`` then carries the sample to the site's value). What is left is a
    named family ``p``; its samples are called x.

    Attributes:
        name: The site's name, for messages.
        p: The family with live parameters.
        p0: The family with detached parameters; this is the ``p`` that user functions get.
        shape: The shape of x, all batch dims included.
        event_ndim: The number of event dims of ``p``.
        batch_ndim: The number of batch dims of the *site*: scores and weights are summed down to these.
        transforms: The transforms entered, in the order in which they act on x.
        validate: Whether the host's validation is on; costly checks run only then.
        first_use: Whether the objective meets this site for the first time; the costliest checks run only then.
        plate_sizes: The full size of each plate around the site, by (negative) dim of the site's batch shape; the plate of vectorized
            particles counts as of size 1.
        learned: The values of the parameters that the estimator learns; None outside of an objective, where they stay at their start.
        own_density: By how much the objective differentiates the site's own log density in its parameters at a fixed x: the
            scale and mask of the cost under ``entropy="full"``, else 0.
    """

    name: str
    p: Any
    shape: tuple[int, ...]
    event_ndim: int
    batch_ndim: int
    transforms: list[Any]
    validate: bool
    first_use: bool = True
    plate_sizes: Mapping[int, int] = MappingProxyType({})
    learned: Mapping[str, Array] | None = None
    own_density: Any = 0.0

    @abstractmethod
    def __init__(self, name: str, fn: Any, enters: bool):
        """``fn`` is the site's distribution; ``enters``: whether a plain transformed one is entered."""

    @cached_property
    def p0(self) -> Any:
        return self.detach(self.p)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.p.arg_constraints)

    @property
    def family(self) -> str:
        return type(self.p).__name__

    @abstractmethod
    def detach(self, p: Any) -> Any:
        """A copy of ``p`` whose parameters carry no derivative and whose validation is off."""

    def push(self, x: Array) -> Array:
        """Carry a sample of ``p`` through the site's transforms, with their live parameters."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def pull(self, y: Array) -> Array:
        """The sample of ``p`` behind a value of the site."""
        for transform in reversed(self.transforms):
            y = transform.inv(y)
        return y

    @abstractmethod
    def is_live(self, value: Any) -> bool:
        """Whether ``value``, a number or a transform, may carry a derivative; a traced value that might counts as one that does."""

    @abstractmethod
    def transformed_base(self) -> tuple[Any, list[Any]] | None:
        """Where ``p`` is itself a plain transformed distribution: its base, and its transforms."""

    @cached_property
    def support(self) -> Support:
        try:
            return Support.of(self.p.support)
        except NotImplementedError:  # constraints.dependent on an instance
            self.refuse(f"expected a support, but that of {self.family} is left open; give its class a property support.")

    def moving_bounds(self) -> list[str]:
        """The bounds of p's support that move with a live parameter (or cannot be told not to)."""
        moving = self._live_bounds("its", self.support)
        if (transformed := self.transformed_base()) is not None:
            base, transforms = transformed
            support = Support.of(base.support)
            moving += self._live_bounds("its base's", support)
            if type(base).__name__ not in VANISHING:
                moving += self._moved_by(transforms, support)
        return moving

    def _moved_by(self, transforms: list[Any], support: Support) -> list[str]:
        """The names of the live transforms that move the image of a ``support`` that stays."""
        moving = []
        for transform in [part for t in transforms for part in _parts(t)]:
            name = type(transform).__name__
            if support.fills(Support.of(transform.domain)):
                support = Support.of(transform.codomain)
                moving += self._live_bounds(f"{name}'s", support)
            elif self.is_live(transform):
                moving.append(name)
            else:
                support = Support("unknown", support.discrete)
        return moving

    def _live_bounds(self, whose: str, support: Support) -> list[str]:
        if support.fixed:
            return []
        bounds = {"lower": support.lower, "upper": support.upper}
        return [f"{whose} {side} bound" for side, bound in bounds.items() if self.is_live(bound)]

    def require_still_support(self, what: str) -> None:
        """Refuse ``what`` where it is biased: it drops a score whose mean is 0 only under a support that stays."""
        if bounds := self.moving_bounds():
            self.refuse(
                f"{what} is biased where the support moves with a parameter, but that of {self.family} moves with "
                f"{', '.join(bounds)} (a traced bound counts as live); go without it, or make the bound a constant."
            )

    def is_discrete(self) -> bool:
        return self.support.discrete

    def chart(self) -> str | None:
        """None for a support of full dimension, ``"simplex"``, or what a thin support without a known chart is called."""
        return THIN_SUPPORTS.get(self.support.kind)

    def scores(self, x: Array) -> list[tuple[Array, Array]]:
        """The score taken apart by arrays of parameters, over the batch of x: value 0 with tangent psi, and psi^2 (detached).

        The mean of each psi is 0, so that each may have a baseline of its own.
        """
        if self.family not in SEPARATE_PARAMETERS:
            inner = type(self)(self.name, self.p.expand(self.batch_shape), enters=True)
            if inner.transforms and not any(map(self.is_live, inner.transforms)):
                return inner.scores(inner.pull(x))
            self.refuse(
                f"baseline='optimal' knows the parameters of {', '.join(SEPARATE_PARAMETERS)}, also under constant transforms; found "
                f"{self.family}; use the default, 'plate' or a Baseline."
            )
        apart = []
        for tangent, psi in self._scores(x, SEPARATE_PARAMETERS[self.family]):
            own = tuple(range(len(self.batch_shape), psi.ndim))
            score, square = psi * tangent, psi**2
            apart.append((score.sum(own), square.sum(own)) if own else (score, square))
        return apart

    @abstractmethod
    def _scores(self, x: Array, names: tuple[str, ...]) -> list[tuple[Array, Array]]:
        """For each named array of p, its tangent and d log p(x) / d theta (detached), over the batch of x and the array's own dims."""

    @abstractmethod
    def lacks_rsample(self) -> str | None:
        """Why the host's sampler has no right derivative, or None where it has one."""

    @abstractmethod
    def cdf(self, x: Array, p: Any) -> Array:
        """The cdf of ``p``; refuses where the host's is missing or has no derivative in a live parameter."""

    def standardization(self, ops: Ops) -> Callable[[Array, Any], Array]:
        """A function S(x, p) with a law free of p's parameters that increases along the host's sampler."""
        if (known := STANDARDIZATIONS.get(self.family)) is not None:
            if self.family == "StudentT" and self.is_live(self.p.df):
                self.refuse(
                    "RP(q=...) knows a standardization of StudentT for a constant df only; use Flow(loc=..., scale=..., q=...)."
                )
            return partial(known, ops)
        if self.event_ndim:
            self.refuse(f"RP(q=...) needs the inverse of the sampler, and none is known for {self.family}; use ImplicitRP(S, q).")
        return self.cdf

    @abstractmethod
    def expand(self, q: Any) -> Any:
        """``q`` detached and expanded to the batch shape of x; refuses what is no distribution."""

    def cover(self, ops: Ops, q: Any) -> tuple[Any, bool]:
        """``q`` as a sampling density for x, and whether its samples may fall outside the support of p.

        Refuses a q of another event shape, or one that does not cover the support of p.
        """
        if hasattr(q, "event_shape") and tuple(q.event_shape) != tuple(self.event_shape):
            self.refuse(
                f"q(p) must have the event shape of {self.family}, expected {tuple(self.event_shape)}, found {tuple(q.event_shape)}."
            )
        if hasattr(q, "batch_shape") and not broadcasts(q.batch_shape, self.batch_shape):
            self.refuse(
                f"q(p) must have the batch shape of x or one that expands to it, expected {tuple(self.batch_shape)}, "
                f"found {tuple(q.batch_shape)}."
            )
        q = self.expand(q)
        p_support, q_support = self.support, Support.of(q.support)
        if p_support.fixed and q_support.fixed and p_support == q_support:
            return q, False
        message = f"the support of q must cover that of {self.family}, expected {p_support}, found {q_support}; widen q."
        if p_support.kind != q_support.kind or p_support.discrete != q_support.discrete:
            self.refuse(message)
        for low, high in ((q_support.lower, p_support.lower), (p_support.upper, q_support.upper)):
            ok = low <= high
            self.check(ops, ok if isinstance(ok, bool) else ok.all(), message)
        return q, True

    @abstractmethod
    def clip(self, x: Array) -> tuple[Array, Array]:
        """Which x (over batch dims of ``p``) lie in the support of p, and x with the others put at some point of it."""

    def to_batch(self, a: Array) -> Array:
        """Sum an array over the batch dims of ``p`` that are event dims of the site."""
        axes = tuple(range(self.batch_ndim - a.ndim, 0))
        return a.sum(axis=axes) if axes else a

    def sum_event(self, a: Array) -> Array:
        """Sum an array of the shape of x over the event dims of ``p``."""
        return a.sum(axis=tuple(range(-self.event_ndim, 0))) if self.event_ndim else a

    def in_shape(self, ops: Ops, u: Any, x: Array, what: str) -> Array:
        """``u`` in the shape of x."""
        u = ops.asarray(u, x)
        if u.shape == x.shape:
            return u
        if not broadcasts(u.shape, x.shape):
            self.refuse(
                f"{what} must have the shape of x or one that broadcasts to it, expected {tuple(x.shape)}, found {tuple(u.shape)}."
            )
        return ops.broadcast_to(u, x.shape)

    def check_elementwise(self, ops: Ops, f: Callable[[Array, Any], Array], x: Array, what: str) -> None:
        """Refuse an ``f(x, p)`` that reads x at another coordinate, where the host's validation is on."""
        if self.validate and self.first_use and x.ndim:
            with self.probe(x) as (x, p):
                ok = ops.is_elementwise(lambda x: self.in_shape(ops, f(x, p), x, what), x)
            self.check(ops, ok, f"{what} must be elementwise, but at one coordinate it reads x at another; use Flow(velocity).")

    def divergence(self, ops: Ops, dx: Callable[[Array], Array], x: Array) -> tuple[Array, Array | None]:
        """``dx(x)`` and its divergence, exact by automatic derivatives over the event, both with their derivatives."""
        if self.event_ndim == 0:
            return ops.derivative(dx, x, live=True)
        chart = self.chart()
        if chart not in (None, "simplex"):
            self.refuse(
                f"the divergence on a support of lower dimension ({chart}) is not the sum over coordinates; "
                "give divergence(x, p, dtheta) in closed form."
            )
        velocity, jacobian = ops.jacobian(dx, x, self.event_ndim, live=True)
        divergence = ops.trace(jacobian)
        if chart == "simplex":  # in the chart that drops the last coordinate: the last moves against each of the others
            divergence = divergence - jacobian[..., -1].sum(-1)
        return velocity, divergence

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch shape of x."""
        return self.shape[: len(self.shape) - self.event_ndim]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.event_ndim :]

    @property
    def extra_ndim(self) -> int:
        """The number of batch dims of x that are event dims of the site."""
        return len(self.batch_shape) - self.batch_ndim

    @property
    def site_shape(self) -> tuple[int, ...]:
        """The batch shape of the site for what is learned: full plates, no particles, without 1s on the left."""
        return self._at_full_size(self.batch_shape[: self.batch_ndim])

    @property
    def element_shape(self) -> tuple[int, ...]:
        """As :attr:`site_shape`, with the batch dims of x that are event dims of the site."""
        extra = self.batch_shape[self.batch_ndim :]
        return (*self.site_shape, *extra) if self.site_shape else _without_ones(extra)

    def _at_full_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _without_ones(tuple(self.plate_sizes.get(i - len(shape), size) for i, size in enumerate(shape)))

    def own_density_at(self, ops: Ops, x: Array) -> Array:
        """:attr:`own_density` in the shape of x."""
        weight = ops.asarray(self.own_density, x)
        of_event = self.extra_ndim if weight.ndim <= self.batch_ndim else 0
        return ops.broadcast_to(weight.reshape((*weight.shape, *(1,) * (of_event + self.event_ndim))), x.shape)

    def take(self, learns: Mapping[str, Learned], values: Mapping[str, Array]) -> None:
        """Take over the values of the parameters that the estimator ``learns``."""
        for name, (_, event_shape) in learns.items():
            if (found := tuple(shape := values[name].shape)[len(shape) - len(event_shape) :]) != event_shape:
                self.refuse(
                    f"what the estimator learns as '{self.name}.{name}' has the shape {event_shape} on the right, but the program's "
                    f"parameter of that name {found}; another estimator has left it there, so clear the parameters or rename the site."
                )
        self.learned = values

    def read(self, learns: Callable[[], Mapping[str, Learned]]) -> Mapping[str, Array]:
        """The values of the parameters that the estimator ``learns``."""
        return {name: parameter.initial() for name, parameter in learns().items()} if self.learned is None else self.learned

    def learn(
        self, ops: Ops, outputs: tuple[Array, ...], learned: dict[str, Array], fixed: tuple[Array, ...], second_moment: SecondMoment
    ) -> tuple[Array, ...]:
        """``outputs``, from which an objective learns; see :meth:`flowvi.ops.Ops.learn`."""
        return outputs if self.learned is None else ops.learn(outputs, learned, fixed, second_moment)

    @contextmanager
    def probe(self, x: Array) -> Iterator[tuple[Array, Any]]:
        """A sample and detached parameters with known values, at which user functions can be checked."""
        yield x, self.p0

    def check(self, ops: Ops, ok: Array, message: str) -> None:
        ops.check(ok, f"site '{self.name}': {message}")

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(f"site '{self.name}': {message}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without the 1s on its left."""
    ones = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[ones:]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of ``shape`` broadcasts to the shape ``to`` without making it larger."""
    return shape == to or (len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)))


def _parts(transform: Any) -> list[Any]:
    """The transforms of which one is composed; the codomain of a composition is only that of its last part."""
    transform = getattr(transform, "base_transform", transform)  # of an IndependentTransform
    return [part for t in transform.parts for part in _parts(t)] if hasattr(transform, "parts") else [transform]


class Tangents:
    """Parameter tangents: ``dtheta.loc`` has value 0 and the derivative of the live parameter ``loc``.

    Attributes:
        ops: The operations of the backend, for velocity fields that serve both hosts.
        target: The site's distribution.
        p: The distribution (or the part of it, see :meth:`within`) with live parameters.
        p0: The same with detached parameters.
    """

    def __init__(self, ops: Ops, target: Target, part: Callable[[Any], Any] = lambda p: p):
        self.ops, self.target, self._part = ops, target, part
        self.p, self.p0 = part(target.p), part(target.p0)

    def __getattr__(self, name: str) -> Array:
        if name not in self.p.arg_constraints:
            self.target.refuse(unknown_parameter(self.p, name))
        return self.ops.tether(getattr(self.p, name))

    def of(self, f: Callable[[Any], Array]) -> Array | None:
        """The tangent of ``f(p)``, linear in dtheta for every x that f closes over; None where it does not move."""
        live = f(self.p)
        return self.ops.tether(live - f(self.p0)) if self.target.is_live(live) else None

    def within(self, part: Callable[[Any], Any]) -> Tangents:
        """The tangents of the parameters of a part of p, such as the components of a mixture."""
        return Tangents(self.ops, self.target, lambda p: part(self._part(p)))


def unknown_parameter(p: Any, name: str) -> str:
    names = ", ".join(p.arg_constraints) or "none"
    return f"{type(p).__name__} has no parameter '{name}'; its parameters are: {names}."

"""The distribution of a site as an estimator sees it, without its wrappers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, NoReturn, Self

from flowvi.family import family_of, names
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops, SecondMoment
from flowvi.refusals import MOVING_SUPPORTS, PAGE, refusal
from flowvi.shapes import Shapes, broadcasts
from flowvi.support import Support, moving_bounds

OWN_STANDARDIZATION = "give ImplicitRP(standardization) your own S(x, p), or use RP() or LR()"


class Target(Shapes, ABC):
    """The distribution of one site as the estimators see it; each host subclasses it once.

    ``Independent``, expanded and masked distributions are unwrapped. A plain ``TransformedDistribution`` is *entered* if the estimator
    acts on the base sample (``push`` then maps the sample to the site's value). What is left is a named family ``p``; its samples are
    called x. A *live* parameter is one that may carry a derivative. The shapes are those of :class:`flowvi.shapes.Shapes`.

    Args:
        name: The site's name.
        fn: The site's distribution.
        enters: Whether a plain transformed distribution is entered.
        frames: The host's frames of the plates around the site, from which it reads ``plate_rows``.
        first_use: Whether the objective reaches this site for the first time; the costliest checks run only then.
        validate: Whether costly checks run; None: if the host's validation is on.

    Attributes:
        name: The site's name, for messages.
        p: The family with live parameters.
        p0: The family with detached parameters; this is the ``p`` that user functions get.
        transforms: The transforms entered, in the order in which they act on x.
        validate: Whether costly checks run.
        first_use: Whether the objective reaches this site for the first time.
        learned: The values of the parameters that the estimator learns, see :meth:`with_learned`; None for their initial values.
        own_density: The factor with which the objective differentiates the site's own log density in its parameters at a fixed x: the
            scale and mask of the cost under ``entropy="full"``, else 0.
        plain_transformed: The host's classes of plain transformed distributions.
        transformed: The host's classes of transformed distributions whose support is that of the base, transformed.
    """

    learned: Mapping[str, Array] | None = None
    own_density: Any = 0.0
    plain_transformed: ClassVar[tuple[type, ...]]
    transformed: ClassVar[tuple[type, ...]]

    def __init__(self, name: str, fn: Any, enters: bool, *, frames: Any = (), first_use: bool = True, validate: bool | None = None):
        self.name: str = name
        self.frames: Any = frames
        self.first_use: bool = first_use
        self.batch_ndim: int = len(fn.batch_shape)
        self.p: Any = self.unwrap(fn)
        self.shape: tuple[int, ...] = fn.batch_shape + fn.event_shape
        self.transforms: list[Any] = []
        if enters and type(self.p) in self.plain_transformed:
            self.p, self.transforms = self._enter(self.plain_transformed)
            for transform in reversed(self.transforms):
                self.shape = transform.inverse_shape(self.shape)
        self.event_ndim: int = len(self.p.event_shape)
        self.validate: bool = self.host_validates() if validate is None else validate

    # ---- what each host implements

    @staticmethod
    @abstractmethod
    def unwrap(fn: Any) -> Any:
        """Remove the wrappers that do not change the family: independent, expanded, masked, estimated."""

    @staticmethod
    @abstractmethod
    def host_validates() -> bool:
        """Whether the host's validation is on."""

    @abstractmethod
    def detach(self, p: Any) -> Any:
        """A copy of ``p`` whose parameters carry no derivative and whose validation is off."""

    @abstractmethod
    def is_live(self, value: Any) -> bool:
        """Whether ``value``, a number or a transform, may carry a derivative; a traced value counts as live unless it cannot."""

    def live(self, *names: str) -> list[str]:
        """Those of the named parameters that are live."""
        return [name for name in names if self.is_live(getattr(self.p, name))]

    @staticmethod
    @abstractmethod
    def lacks_inverse(transform: Any) -> bool:
        """Whether the host can apply a transform only forward."""

    def bound_moves(self, value: Any) -> bool:
        """Whether a bound of a support, or a transform that makes one, moves with a parameter or a draw."""
        return self.is_live(value)

    @abstractmethod
    def lacks_rsample(self) -> str | None:
        """Why the host's sampler has no right derivative, or None if it has one."""

    @abstractmethod
    def cdf(self, x: Array, p: Any, what: str = "ImplicitRP", instead: str = OWN_STANDARDIZATION) -> Array:
        """The cdf of ``p``; refused if the host has none, or if it has no derivative in a live parameter.

        Args:
            x: Where to evaluate it.
            p: The family.
            what: What needs the cdf, for messages.
            instead: What to use instead, for messages.
        """

    @abstractmethod
    def expand(self, q: Any) -> Any:
        """``q`` detached and expanded to the batch shape of x; refused if it is not a distribution."""

    @abstractmethod
    def clip(self, x: Array) -> tuple[Array, Array]:
        """Which x (over batch dims of ``p``) lie in the support of p; and x, with the others replaced by a point of the support."""

    @abstractmethod
    def _scores(self, x: Array, names: tuple[str, ...]) -> list[tuple[Array, Array]]:
        """For each named array of parameters, its tangent and d log p(x) / d theta (detached), over the batch of x and its own dims."""

    @abstractmethod
    def uniforms(self, shape: tuple[int, ...], like: Array) -> Array:
        """Uniform numbers between 0 and 1 while the site is drawn, of the dtype of ``like``; they do not change the draw."""

    @contextmanager
    def probe(self, x: Array) -> Iterator[tuple[Array, Any]]:
        """A sample and detached parameters with known values, at which user functions can be checked."""
        yield x, self.p0

    # ---- the family, and the way from it to the site

    @property
    def of_arrays(self) -> Any:
        """``p``, where the host leaves numbers as they are with arrays instead; user functions of live parameters get it."""
        return self.p

    @cached_property
    def p0(self) -> Any:
        return self.detach(self.p)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.p.arg_constraints)

    @property
    def family(self) -> str:
        return type(self.p).__name__

    def push(self, x: Array) -> Array:
        """Map a sample of ``p`` through the site's transforms, with their live parameters."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def pull(self, y: Array) -> Array:
        """The sample of ``p`` that the transforms map to a value of the site."""
        self.require_inverse("the base sample of a given value")
        for transform in reversed(self.transforms):
            y = transform.inv(y)
        return y

    def at_base(self) -> Self:
        """The target of a site whose value is x itself, without the transforms."""
        return self._with(transforms=[])

    def transformed_base(self) -> tuple[Any, list[Any]] | None:
        """The base and the transforms of ``p``, if it is itself a transformed distribution."""
        return self._enter(self.transformed) if type(self.p) in self.transformed else None

    def one_way(self) -> Any:
        """The first transform between x and the site, or inside ``p``, that the host cannot invert; None if there is none."""
        inside = self.transformed_base()
        transforms = [*(inside[1] if inside else ()), *self.transforms]
        return next((transform for transform in transforms if self.lacks_inverse(transform)), None)

    def require_inverse(self, what: str) -> None:
        """Refuse ``what`` if it needs the inverse of a transform and the host has none."""
        if (transform := self.one_way()) is not None:
            self.refuse(
                f"{what} needs the inverse of {type(transform).__name__}, but the host has none; use RP(), or ImplicitRP() or Flow(), "
                "which act on the base sample, with entropy='full' or 'stl'."
            )

    def _enter(self, kinds: tuple[type, ...]) -> tuple[Any, list[Any]]:
        """The outermost distribution inside ``p`` that is not of these kinds, and the transforms from it to ``p``."""
        base: Any = self.p
        transforms: list[Any] = []
        while type(base) in kinds:
            base, transforms = self.unwrap(base.base_dist), base.transforms + transforms
        return base, transforms

    def _with(self, **attributes: Any) -> Self:
        new = object.__new__(type(self))  # what copy.copy does, but faster
        new.__dict__.update(self.__dict__)
        new.__dict__.update(attributes)
        return new

    # ---- its support

    @cached_property
    def support(self) -> Support:
        try:
            return Support.of(self.p.support)
        except NotImplementedError:  # constraints.dependent on an instance
            self.refuse(f"expected a support, but {self.family} does not define one; give its class a property support.")

    def moving_bounds(self) -> list[str]:
        """The bounds of p's support that move, or may move, with a live parameter."""
        return moving_bounds(self.support, self.transformed_base(), self.bound_moves)

    def require_fixed_support(self, what: str) -> None:
        """Refuse ``what`` if the support moves: it drops a score whose mean is 0 only if the support is fixed."""
        if bounds := self.moving_bounds():
            self.refuse(
                f"{what} is biased where the support moves with a parameter, but the support of {self.family} moves with "
                f"{', '.join(bounds)} (or is traced, so flowvi cannot tell); remove the option, or make the bound a constant.",
                MOVING_SUPPORTS,
            )

    def is_discrete(self) -> bool:
        return self.support.discrete

    def chart(self) -> str | None:
        """See :attr:`flowvi.support.Support.chart`."""
        return self.support.chart

    def cover(self, ops: Ops, q: Any) -> tuple[Any, bool]:
        """``q`` as a sampling density for x, and whether its samples may lie outside the support of p.

        A q is refused if it has another event shape or does not cover the support of p.
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

    def enumerated_support(self) -> Array:
        """All values of a finite support, of event shape, with the values on the left."""
        if not getattr(self.p, "has_enumerate_support", False):
            self.refuse(f"expected a finite support that the host enumerates, but {self.family} has none; use LR().")
        try:
            values = self.p.enumerate_support(expand=False)
        except (NotImplementedError, TypeError) as error:  # a TypeError if the number of values is traced
            self.refuse(f"the support of this {self.family} cannot be enumerated ({error}); use LR().")
        return values.reshape((values.shape[0], *self.event_shape))

    # ---- what the estimators need from the family

    def standardization(self, ops: Ops) -> Callable[[Array, Any], Array]:
        """A function S(x, p) that increases along the host's sampler and whose law does not depend on p's parameters."""
        if (known := family_of(self.p).standardization) is not None:
            if self.family == "StudentT" and self.is_live(self.p.df):
                self.refuse("RP(q=...) has a standardization of StudentT only for a constant df; use Flow(loc=..., scale=..., q=...).")
            return partial(known, ops)
        if self.event_ndim:
            self.refuse(f"RP(q=...) needs the inverse of the sampler, and none is known for {self.family}; use ImplicitRP(S, q).")
        return self.cdf

    def scores(self, x: Array) -> list[tuple[Array, Array]]:
        """The score of each array of parameters, over the batch of x: value 0 with tangent psi, and psi^2 (detached).

        The mean of each psi is 0, so each may have its own baseline.
        """
        known = family_of(self.p)
        if not known.separate:
            inner = type(self)(self.name, self.p.expand(self.batch_shape), enters=True)
            if inner.transforms and not any(map(self.is_live, inner.transforms)):
                return inner.scores(inner.pull(x))
            self.refuse(
                f"baseline='optimal' knows the parameters of {', '.join(names(lambda f: f.separate))}, also under constant transforms; "
                f"found {self.family}; use the default, 'plate' or a Baseline."
            )
        apart = []
        for tangent, psi in self._scores(x, known.parameters):
            own = tuple(range(len(self.batch_shape), psi.ndim))
            score, square = psi * tangent, psi**2
            apart.append((score.sum(own), square.sum(own)) if own else (score, square))
        return apart

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
        if chart == "simplex":  # the last coordinate is 1 minus the others, so it moves against each of them
            divergence = divergence - jacobian[..., -1].sum(-1)
        return velocity, divergence

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
        """Refuse an ``f(x, p)`` that reads x at another coordinate, while the host's validation is on."""
        if self.validate and self.first_use and x.ndim:
            with self.probe(x) as (x, p):
                ok = ops.is_elementwise(lambda x: self.in_shape(ops, f(x, p), x, what), x)
            self.check(ops, ok, f"{what} must be elementwise, but at one coordinate it reads x at another; use Flow(velocity).")

    # ---- what the estimator learns

    def with_learned(self, learns: Mapping[str, Learned], values: Mapping[str, Array], own_density: Any) -> Self:
        """The target with values of the parameters that the estimator ``learns``, and with :attr:`own_density`."""
        for name, (_, event_shape) in learns.items():
            if (found := tuple(shape := values[name].shape)[len(shape) - len(event_shape) :]) != event_shape:
                self.refuse(
                    f"the learned parameter '{self.name}.{name}' must have the shape {event_shape} on the right, but the program's "
                    f"parameter of that name has {found}; another estimator has registered it, or the control variate for the whole "
                    "guide, with other sites or plates. Clear the parameters or rename the site; under such a control variate keep the "
                    "sites and plates as they are, and in NumPyro use adaptive(guide, elbo, model) if the model annotates estimators."
                )
        return self._with(learned=values, own_density=own_density)

    @contextmanager
    def registering(self, learns: Mapping[str, Learned]) -> Iterator[None]:
        """Name the site if the host's plates refuse a parameter that the estimator ``learns``."""
        try:
            yield
        except ValueError as error:
            if "invalid shape of" not in str(error):
                raise
            names = ", ".join(f"'{self.name}.{name}'" for name in learns)
            self.refuse(
                f"what the estimator learns ({names}) has a row for each element of a plate of another size ({error}); "
                "where the plate is a mini-batch, give the estimator shared=True (RP(control_variate=..., shared=True) in place of a "
                "control variate for the whole guide)."
            )

    def own_density_at(self, ops: Ops, x: Array) -> Array:
        """:attr:`own_density` in the shape of x."""
        weight = ops.asarray(self.own_density, x)
        of_event = self.extra_ndim if weight.ndim <= self.batch_ndim else 0
        return ops.broadcast_to(weight.reshape((*weight.shape, *(1,) * (of_event + self.event_ndim))), x.shape)

    def read(self, learns: Callable[[], Mapping[str, Learned]]) -> Mapping[str, Array]:
        """The values of the parameters that the estimator ``learns``."""
        return {name: parameter.initial() for name, parameter in learns().items()} if self.learned is None else self.learned

    def learn(
        self, ops: Ops, outputs: tuple[Array, ...], learned: dict[str, Array], fixed: tuple[Array, ...], second_moment: SecondMoment
    ) -> tuple[Array, ...]:
        """``outputs``, from which the parameters are learned; see :meth:`flowvi.ops.Ops.learn`."""
        if self.learned is None:
            return outputs
        try:
            return ops.learn(outputs, learned, fixed, second_moment)
        except TypeError as error:
            self.refuse_forward_mode(error)

    def refuse_forward_mode(self, error: TypeError) -> NoReturn:
        """Name the site if forward mode meets an estimator that learns in the backward pass; raise any other error again."""
        if "forward-mode" not in str(error):
            raise error
        self.refuse(
            "the estimator learns from the backward pass: expected reverse-mode differentiation, found forward-mode; remove "
            "forward_mode_differentiation=True, or use an estimator that does not learn."
        )

    # ---- messages

    def check(self, ops: Ops, ok: Array, message: str) -> None:
        ops.check(ok, f"site '{self.name}': {message}")

    def refuse(self, message: str, page: str = PAGE) -> NoReturn:
        raise refusal(self.name, message, page)

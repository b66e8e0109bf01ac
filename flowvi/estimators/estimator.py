"""The protocol of an estimator, and the draw that it returns.

The host draws, never the estimator. :func:`attach` returns the drawn number with the right derivatives, a score and a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from flowvi.alternatives import Comparison
from flowvi.baselines import MakeScores, SiteBaseline
from flowvi.jumps import Jump, jump_comparison
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.refusals import MOVING_SUPPORTS
from flowvi.target import Target


class Draw(NamedTuple):
    """A drawn value with its derivatives attached.

    Attributes:
        value: The value of the site; its tangent is the velocity.
        score: Batch shape of the site, with the tangent psi; its value has no meaning. None if psi is identically 0.
        log_weight: Batch shape of the site, log p - log q, detached; None if q is p.
        log_prob: Batch shape of the site, log p(x; theta) with all derivatives, if the estimator has computed it.
        baseline: Makes the records of the score after the run, with the estimator's own baseline; None if it has none.
        comparison: How the cost is compared at several values of the site; None if it is not.
        instead: Makes a comparison that an objective may use instead of the score; None if there is none.
        control: Batch shape of the site, with value 0 and a tangent of mean 0, which the objective adds to its costs; None if absent.
        base: The standard Normals from which the value is computed, in one dim, for the control variates of other sites.
        joint_control: Makes the part of the control variate that depends on the noise of other sites, from all draws of the run.
    """

    value: Array
    score: Array | None = None
    log_weight: Array | None = None
    log_prob: Array | None = None
    baseline: MakeScores | None = None
    control: Array | None = None
    comparison: Comparison | None = None
    instead: Callable[[], Comparison | None] | None = None
    base: Array | None = None
    joint_control: Callable[[Mapping[str, Draw]], Array] | None = None


class Estimator(ABC):
    """One gradient estimator for one site: the protocol of :class:`~flowvi.LR`, :class:`~flowvi.RP` and the others.

    An estimator is a frozen dataclass.

    Attributes:
        q: A function ``q(p) -> distribution`` that proposes the samples, or None for q = p.
        enters: Whether it acts on the base sample of a plain ``TransformedDistribution``, instead of on the site's value.
        jumps: Where the cost jumps as the site crosses a number.
        compares: Whether it compares the cost at several values of its site, which runs the program several times.
        biased: Whether its mean differs from the gradient; tables mark such an estimator.
        shares: Whether it learns, and all elements of its site share what it learns.
        inputs: Arrays that its functions read; they exist before the site is drawn.
        uses_sampler: Whether the derivative is that of the host's own sampler, so nothing has to be attached.
        baseline: What is subtracted from the costs that multiply the score; None for the objective's baseline.
    """

    q: Callable[[Any], Any] | None = None
    baseline: SiteBaseline | None = None
    enters: bool = True
    jumps: tuple[Jump, ...] = ()
    biased: bool = False
    inputs: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if self.q is not None and not is_proposal(self.q):
            raise TypeError(
                f"{type(self).__name__}: expected q=q(p), a function of the distribution, found {type(self.q).__name__}; "
                "write q=lambda p: ..."
            )

    @property
    def compares(self) -> bool:
        return bool(self.jumps)

    @property
    def uses_sampler(self) -> bool:
        return False

    @property
    def shares(self) -> bool:
        return False

    def __repr__(self) -> str:
        """The arguments that differ from their defaults, functions by name."""
        shown = (f for f in fields(self) if f.repr)  # type: ignore[arg-type]
        values = {f.name: getattr(self, f.name) for f in shown if getattr(self, f.name) != f.default}
        arguments = (f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({', '.join(arguments)})"

    @property
    def label(self) -> str:
        """Its repr, and whether it is biased, as tables show it."""
        return f"{self!r} (biased)" if self.biased else repr(self)

    def resolve(self, target: Target) -> Estimator:
        """The estimator to use at ``target``: itself, except for :class:`~flowvi.Auto`."""
        return self

    def psi_is_zero(self, target: Target) -> bool:
        """Whether the score term is absent."""
        return False

    def at_p(self) -> Estimator:
        """The same field, with samples drawn from p itself."""
        return self if self.q is None else replace(self, q=None)  # type: ignore[type-var]

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        """The parameters that it learns at ``target``, by name; the host passes their values as ``target.learned``."""
        return {}

    def proposal(self, ops: Ops, target: Target) -> tuple[Any, bool]:
        """The sampling density (detached, of the shape of x), and whether its samples may lie outside the support of p."""
        if self.q is None:
            return target.p0, False
        try:
            q = self.q(target.p0)
        except ValueError as error:
            target.refuse(str(error))
        return target.cover(ops, q)

    @abstractmethod
    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        """Attach derivatives to a detached sample ``x`` of the proposal; :func:`attach` adds the weight."""


def is_proposal(q: Any) -> bool:
    """Whether q may be a function of p. A distribution is callable too, but the call draws."""
    return callable(q) and (isinstance(q, type) or not hasattr(q, "log_prob"))


def attach(ops: Ops, target: Target, estimator: Estimator, x: Array) -> Draw:
    """The draw at ``target`` for a sample ``x`` of the estimator's proposal, weight and baseline included."""
    x = ops.stop_gradient(x)
    if estimator.q is None:
        return _completed(ops, target, estimator, x, estimator.attach(ops, target, x))
    target.at_base().require_inverse("the weight of a sample of q")
    q, leaves_support = estimator.proposal(ops, target)
    log_q = ops.stop_gradient(q.log_prob(x))
    if leaves_support:
        inside, x = target.clip(x)
        log_weight = ops.where(inside, target.p0.log_prob(x) - log_q, ops.asarray(-float("inf"), x))
    else:
        log_weight = target.p0.log_prob(x) - log_q
    log_weight = target.to_batch(ops.stop_gradient(log_weight))
    if target.validate:
        ok = ops.all_finite(ops.exp(log_weight))
        target.check(ops, ok, "the weight p/q is not finite; the density of q must be positive wherever that of p is.")
    draw = estimator.attach(ops, target, x)
    if draw.control is not None:
        draw = draw._replace(control=ops.exp(log_weight) * draw.control)
    return _completed(ops, target, estimator, x, draw._replace(log_weight=log_weight))


def _completed(ops: Ops, target: Target, estimator: Estimator, x: Array, draw: Draw) -> Draw:
    """The draw with the estimator's own baseline, and with the surface terms of the jumps."""
    if estimator.baseline is not None and draw.score is not None:
        draw = draw._replace(baseline=estimator.baseline.at_draw(ops, target, x, draw.score))
    if estimator.jumps:
        target.require_inverse("the density at the other values, where jumps are declared,")

        def velocity(t: Array) -> Array:
            return ops.tether(estimator.attach(ops, target, t).value)

        draw = draw._replace(comparison=jump_comparison(ops, target, x, estimator.jumps, velocity))
    return draw


def refuse_moving_support(target: Target, what: str) -> None:
    if bounds := target.moving_bounds():
        target.refuse(
            f"{what} is biased where the support moves with a parameter, but the support of {target.family} moves with "
            f"{', '.join(bounds)} (or is traced, so flowvi cannot tell); use RP() or ImplicitRP(), or make the bound a constant.",
            MOVING_SUPPORTS,
        )


def refuse_discrete(target: Target, what: str) -> None:
    if target.is_discrete():
        target.refuse(f"{what} needs a continuous distribution, but {target.family} is discrete; use LR().")

"""The probability-flow estimator: a velocity field of the user, with the score term that makes the estimator unbiased."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flowvi.baselines import Baseline, BaselineField
from flowvi.estimators.estimator import Draw, Estimator, refuse_discrete, refuse_moving_support
from flowvi.fields import Field, per_element
from flowvi.fields.field import name_of, require_finite
from flowvi.jumps import Jumps, JumpsField
from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class _FieldEstimator(Estimator):
    """The dataclass fields of :class:`Flow`, whose constructor also takes functions per parameter."""

    velocity: Field
    q: Callable[[Any], Any] | None = None
    baseline: Baseline | Literal["plate"] | None = BaselineField()  # type: ignore[assignment]  # noqa: RUF009
    jumps: Jumps = JumpsField()  # type: ignore[assignment]  # noqa: RUF009


class Flow(_FieldEstimator):
    r"""The probability-flow estimator with your own velocity field, which says how the sample moves as a parameter grows.

    The estimate is :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]`, with the velocity u, the cost :math:`\phi` and the weight w = p/q.
    :math:`\psi = \nabla\cdot u + u\cdot\nabla_x\log p + \partial_\theta\log p` is computed for you, so *any* field is unbiased.
    ("Probability flow" is the flow of mass as the parameters change. It is neither the ODE of diffusion models nor a normalizing flow.)
    There are two forms:

    * ``Flow(loc=u_loc, scale=u_scale)``: one function ``u(x, p)`` per parameter, elementwise in x. A parameter that is not named has u
      = 0, as in LR. This is short for ``Flow(fields.per_element(loc=u_loc, scale=u_scale))``.
    * ``Flow(velocity)``: ``velocity(x, p, dtheta) -> dx``, for parameters that move several coordinates. ``dtheta`` has a tangent for
      each parameter by name; dx has the shape of x and must be linear in dtheta.

    **Requirements**: a continuous site with a differentiable ``log_prob``, and a support that does not move with the parameters (unless
    the field moves with the bounds, as some of :mod:`flowvi.fields` do). The field must not cross the boundary of the support, and must
    be 0 on (or tangent to) jumps of the cost.

    Args:
        velocity: The general form: a function, or a :class:`~flowvi.fields.Field` of :mod:`flowvi.fields`.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        divergence: For the general form: ``divergence(x, p, dtheta)`` in closed form, of batch shape and linear in dtheta.
            ``"pathwise"`` declares psi = 0 (a field that solves the transport equation). By default it is computed exactly, by
            automatic derivatives over the event.
        baseline: Subtracted from the costs that multiply psi, instead of the objective's leave-one-out mean; see :class:`~flowvi.LR`.
        jumps: Where the cost jumps as x crosses a number. The field need not be 0 there. See :class:`RP`.
        **per_parameter: The form per parameter.

    Raises:
        TypeError: Both forms at once, or neither; a divergence with the form per parameter, or with a field that has its own;
            ``baseline`` is neither a :class:`~flowvi.Baseline` nor ``"plate"``.
        ValueError: At the first run, naming the site: an unknown parameter, or one that moves several coordinates; a field of another
            shape, or one that mixes coordinates (checked while the host's validation is on); a discrete site; a support that moves.

    Example:
        Halfway between LR and RP for a Normal:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import LR, RP, Flow, plot
        >>> half = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)
        >>> samples = [plot.gradient_samples(dist.Normal(0.5, 1.0), e, "loc", lambda x: 3.0 * x) for e in (LR(), half, RP())]
        >>> [bool(abs(e.mean() - 3.0) < 0.2) for e in samples]  # all unbiased
        [True, True, True]
        >>> bool(samples[0].std() > samples[1].std() > samples[2].std())
        True

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    def __init__(
        self,
        velocity: Callable[[Array, Any, Any], Array] | Field | None = None,
        *,
        q: Callable[[Any], Any] | None = None,
        divergence: Callable[[Array, Any, Any], Array] | Literal["pathwise"] | None = None,
        baseline: Baseline | Literal["plate"] | None = None,
        jumps: Jumps = (),
        **per_parameter: Callable[[Array, Any], Array],
    ):
        if (velocity is None) == (not per_parameter):
            found = "neither" if velocity is None else f"both, the latter for {', '.join(per_parameter)}"
            raise TypeError(
                f"Flow takes either velocity(x, p, dtheta) or one function u(x, p) for each parameter by name, found {found}; give one."
            )
        if divergence is not None and velocity is None:
            raise TypeError("Flow takes a divergence with the general form only; per parameter it is exact and cheap; remove it.")
        if isinstance(velocity, Field) and divergence is not None:
            raise TypeError("Flow takes no divergence with a Field, which has its own; remove it.")
        if isinstance(divergence, str) and divergence != "pathwise":
            raise TypeError(f"Flow's divergence is a function, 'pathwise' or None; found {divergence!r}.")
        if velocity is not None and not callable(velocity) and not isinstance(velocity, Field):
            raise TypeError(f"Flow: expected a function velocity(x, p, dtheta) or a Field, found {velocity!r}.")
        for name, u in per_parameter.items():
            if not callable(u):
                raise TypeError(f"Flow: expected {name}=u(x, p), a function, found {u!r}; write {name}=lambda x, p: ...")
        if velocity is None:
            field = per_element(**per_parameter)
        elif isinstance(velocity, Field):
            field = velocity
        else:
            field = Field(velocity, divergence, name=name_of(velocity) if divergence is None else "")
        super().__init__(field, q, baseline, jumps)

    def psi_is_zero(self, target: Target) -> bool:
        return self.velocity.divergence == "pathwise"

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        refuse_discrete(target, "Flow")
        field = self.velocity
        if not field.rides:
            refuse_moving_support(target, "a Flow field that is not known to move with the bound")
        if field.elementwise is None:
            velocity, divergence = _velocity_and_divergence(ops, target, field, x)
        else:
            velocity, divergence = field.elementwise.attach(ops, target, x)
        value = x + velocity
        if self.psi_is_zero(target):
            return Draw(target.push(value))
        log_prob = target.to_batch(target.p.log_prob(value))
        score = log_prob if divergence is None else log_prob + target.to_batch(divergence)
        return Draw(target.push(value), score, log_prob=log_prob)


def _velocity_and_divergence(ops: Ops, target: Target, field: Field, x: Array) -> tuple[Array, Array | None]:
    """The velocity, and an array whose tangent is its divergence, linear in dtheta."""
    dtheta = Tangents(ops, target)
    if field.families and target.family not in field.families:
        target.refuse(f"the field {field} is for {', '.join(field.families)}; found {target.family}.")

    def dx(x: Array) -> Array:
        return target.in_shape(ops, field.velocity(x, target.p0, dtheta), x, "the velocity")

    if callable(field.divergence):
        velocity, divergence = dx(x), field.divergence(x, target.p0, dtheta)
    elif field.divergence == "pathwise":
        velocity, divergence = dx(x), None
    else:
        velocity, divergence = target.divergence(ops, dx, x)
    require_finite(ops, target, velocity)
    require_finite(ops, target, divergence)
    if target.validate:
        ok = ops.is_close(velocity, 0 * x)
        target.check(ops, ok, "velocity(x, p, dtheta) must be linear in dtheta, but is not 0 at dtheta = 0.")
    return ops.tether(velocity), divergence

"""What happens at one site: the gradient estimators.

Every estimator here is one choice of a velocity field u and a sampling density q in the probability-flow estimator

    E_i = w [ u_i . grad phi + psi_i phi ],    w = p / q,    psi_i = div u_i + u_i . grad_x log p + d_theta_i log p

of Parmas and Sugiyama (AISTATS 2021, eq. 19), where phi is everything the program does with the sample. ("Probability flow" is
the mass that moves with the parameters. It is neither the ODE of diffusion models nor a normalizing flow.) An estimator
never draws: the host does, and :meth:`Estimator.attach` returns the same number with the right derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple

from flowvi.fields import Field
from flowvi.learned.cost_model import CostModel, Kind
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops, times
from flowvi.shapes import broadcasts
from flowvi.tangents import Tangents, unknown_parameter
from flowvi.target import Target


class Draw(NamedTuple):
    """A drawn value with its derivatives attached.

    Attributes:
        value: The value of the site; its tangent is the velocity.
        score: Batch shape of the site, with the tangent psi; its value has no meaning. None where psi is identically 0.
        log_weight: Batch shape of the site, log p - log q, detached; None where q is p.
        log_prob: Batch shape of the site, log p(x; theta) with every derivative, where the score needed it anyway.
        baseline: The estimator's own baseline, with the derivatives of its parameters, or how to find it; None where it has none.
        by_parameter: The score taken apart by arrays of parameters, where the baseline is ``"optimal"``: each with its psi^2, over the
            batch shape of the site and, on the right, the batch dims of x that are event dims of the site.
        control: Batch shape of the site, value 0 and a tangent of mean 0, which the objective adds to its costs; None where absent.
    """

    value: Array
    score: Array | None = None
    log_weight: Array | None = None
    log_prob: Array | None = None
    baseline: Array | Literal["plate", "optimal"] | None = None
    by_parameter: tuple[tuple[Array, Array], ...] = ()
    control: Array | None = None


class Baseline:
    r"""A baseline b for the score term of one site, :math:`\psi\,(\phi - b)`, fitted to the costs while SVI runs.

    ``fn(*inputs)`` is called just before the site is drawn, with detached inputs. The trainable parameters that ``fn`` reads (of a
    network, or a single number) are trained by the user's own optimizer on :math:`\tfrac12 (w b - w\phi)^2`; nothing else is.

    **Requirements**: b must not depend on the site's own draw or on anything drawn from it, so write it at the site's statement in
    the guide. Whatever is random and read by ``fn`` must be given as an input: a closure is not detached. The parameters of
    ``fn`` must be parameters of the guide (in NumPyro: registered while the guide runs).

    Args:
        fn: Returns b, of the shape of the site's plates.
        *inputs: Arrays, or containers of arrays, for ``fn``.

    Raises:
        TypeError: ``fn`` is no function.
        ValueError: At the first run, naming the site, where b has another shape than the site's plates.

    Example:
        >>> import flowvi
        >>> flowvi.LR(baseline=flowvi.Baseline(abs, -2.0))
        LR(baseline=Baseline(abs))

    References:
        Mnih and Gregor 2014 (network baselines). Parmas and Sugiyama 2021, eq. 19: unbiased where the mean of psi is 0.
    """

    def __init__(self, fn: Callable[..., Array], *inputs: Any):
        if not callable(fn):
            raise TypeError(f"Baseline: expected a function of the inputs, found {fn!r}; for a constant c write Baseline(lambda: c).")
        self.fn, self.inputs = fn, inputs

    def __repr__(self) -> str:
        """The function by name."""
        return f"Baseline({getattr(self.fn, '__name__', type(self.fn).__name__)})"

    def __call__(self, ops: Ops) -> Array:
        """Evaluate ``fn`` at the detached inputs."""
        return self.fn(*_detached(ops, self.inputs))


SiteBaseline = Baseline | Literal["plate", "optimal"] | None


class Estimator(ABC):
    """One gradient estimator for one site: the protocol of :class:`LR`, :class:`RP`, :class:`ImplicitRP`, :class:`Flow`.

    Attributes:
        q: A function ``q(p) -> distribution`` that proposes the samples, or None for q = p.
        enters: Whether it acts on the base sample of a plain ``TransformedDistribution`` (or on the outermost value).
        uses_sampler: Whether the derivative is that of the host's own sampler, so that there is nothing to attach.
        baseline: What is subtracted from the costs that multiply the score, or None to leave that to the objective.
    """

    q: Callable[[Any], Any] | None
    baseline: SiteBaseline = None
    enters: bool = True

    @property
    def uses_sampler(self) -> bool:
        return False

    def __repr__(self) -> str:
        """The arguments that differ from their defaults, functions by name."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]
        said.update(said.pop("per_parameter", ()))
        arguments = (f"{name}={getattr(value, '__name__', repr(value))}" for name, value in said.items() if value is not None)
        return f"{type(self).__name__}({', '.join(arguments)})"

    def resolve(self, target: Target) -> Estimator:
        """The estimator that serves ``target``: itself, except for :class:`Auto`."""
        return self

    def psi_is_zero(self, target: Target) -> bool:
        """Whether the score term is absent."""
        return False

    def at_p(self) -> Estimator:
        """The same field, with samples drawn from p itself."""
        if self.q is None:
            return self
        estimator = copy(self)
        object.__setattr__(estimator, "q", None)
        return estimator

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        """The parameters that it learns at ``target``, by name; the host keeps them and hands them in as ``target.learned``."""
        return {}

    def proposal(self, ops: Ops, target: Target) -> tuple[Any, bool]:
        """The sampling density (detached, of the shape of x) and whether it may leave the support of p."""
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


def attach(ops: Ops, target: Target, estimator: Estimator, x: Array) -> Draw:
    """The draw at ``target`` for a sample ``x`` of the estimator's proposal, weight and baseline included."""
    x = ops.stop_gradient(x)
    if estimator.q is None:
        return _with_baseline(ops, estimator, estimator.attach(ops, target, x))
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
    return _with_baseline(ops, estimator, draw._replace(log_weight=log_weight))


def _with_baseline(ops: Ops, estimator: Estimator, draw: Draw) -> Draw:
    if estimator.baseline is None or draw.score is None:
        return draw
    if isinstance(estimator.baseline, str):
        return draw._replace(baseline=estimator.baseline)
    return draw._replace(baseline=ops.asarray(estimator.baseline(ops), draw.score))


@dataclass(frozen=True, repr=False)
class LR(Estimator):
    r"""Likelihood ratio (score function, REINFORCE): :math:`E = w\,\phi(x)\,\nabla_\theta \log p(x;\theta)`.

    u = 0 and psi is the score. It acts on the outermost value of the site.

    **Requirements**: ``log_prob`` differentiable in the parameters, and a support that does not move with them. The cost may be
    anything, discontinuous or a black box, as long as its jumps do not move with the parameters either.

    Args:
        baseline: Subtracted from the costs instead of the objective's leave-one-out mean over particles; ``"plate"`` is the mean
            over the other elements of the site's plates of the costs that are theirs alone, which needs no second particle;
            ``"optimal"`` is for each parameter the one of least variance, E[psi^2 phi] / E[psi^2], estimated from the other
            particles (a vector that belongs to one event, such as logits, counts as one parameter). With few particles that estimate
            is noisy, and the leave-one-out mean may be better.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.

    Raises:
        TypeError: ``baseline`` is neither a :class:`Baseline` nor one of the names.
        ValueError: At the first run, naming the site, where the support moves with a live parameter; ``"plate"`` without a plate;
            ``"optimal"`` with a single particle, or for a family whose parameters it does not know.

    Example:
        >>> import flowvi
        >>> flowvi.LR()
        LR()

    References:
        Williams 1992; Ranganath, Gerrish and Blei 2014; Weaver and Tao 2001 (``"optimal"``). Parmas and Sugiyama 2021, eq. 19 with
        u = 0.
    """

    baseline: SiteBaseline = None
    q: Callable[[Any], Any] | None = None
    enters = False

    def __post_init__(self):
        _require_baseline(self.baseline, "LR")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        _refuse_moving_support(target, "LR")
        log_prob = target.to_batch(target.p.log_prob(x))
        by_parameter = tuple(target.scores(x)) if self.baseline == "optimal" else ()
        return Draw(target.push(x), log_prob, log_prob=log_prob, by_parameter=by_parameter)


@dataclass(frozen=True, repr=False)
class RP(Estimator):
    r"""Reparameterization (pathwise): :math:`E = w\,\nabla_\theta\,\phi(T(\epsilon;\theta))`.

    u is the velocity of the host's own sampler and psi = 0. With a proposal, the sampler is inverted at the sample of q: through a
    known standardization of the family (location-scale, LogNormal, MultivariateNormal, ...) or through the cdf of a scalar.

    With a control variate, :math:`\nabla_\theta (E_p[f] - f(T(\epsilon;\theta)))` is added, where f is a polynomial model of the
    cost, whose mean under a Normal is known. Its coefficients are learned while SVI runs, by the user's own optimizer and from the
    same backward pass: they descend the second moment of the gradient in the site's parameters. They are parameters of the program,
    so that in NumPyro the guide is passed to ``SVI`` as ``flowvi.numpyro.adaptive(guide, elbo)``.

    **Requirements**: a reparameterized sampler with an unbiased derivative, and a cost without jumps in x (on a circle: a periodic
    one). With ``q``, a known standardization or a differentiable cdf. With ``control_variate``, a Normal or MultivariateNormal and
    reverse-mode differentiation.

    Args:
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        force: Trust the derivative of the host's sampler where its flag denies that there is one.
        control_variate: ``"quadratic"``: the model couples all coordinates of the site's event, and has their number squared of
            coefficients; ``"diagonal"``: each by itself; ``"cubic"``: the quadratic one, with up to four directions along which the
            curvature changes. A batch dim is no event, also outside of a plate (as NumPyro's AutoDiagonalNormal has one): nothing is
            coupled along it. None: no control variate.

    Raises:
        TypeError: A control variate that does not exist, or one beside ``q``.
        ValueError: At the first run, naming the site, where the sampler has no right derivative or cannot be inverted, or where there
            is no control variate for the family.

    Example:
        >>> import flowvi
        >>> flowvi.RP(force=True)
        RP(force=True)

    References:
        Kingma and Welling 2014; Rezende, Mohamed and Wierstra 2014. Parmas and Sugiyama 2021, eq. 19 with psi = 0. Miller, Foti,
        D'Amour and Adams 2017; Geffner and Domke 2020 (quadratic control variates).
    """

    q: Callable[[Any], Any] | None = None
    force: bool = field(default=False, kw_only=True)
    control_variate: Kind | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if self.control_variate not in ("cubic", "quadratic", "diagonal", None):
            raise TypeError(f"RP: expected control_variate='cubic', 'quadratic', 'diagonal' or None, found {self.control_variate!r}.")
        if self.control_variate is not None and self.q is not None:
            raise TypeError("RP takes a control variate or q, found both; the mean of the control variate is known under p only.")

    @property
    def uses_sampler(self) -> bool:
        return self.q is None and self.control_variate is None

    def resolve(self, target: Target) -> Estimator:
        if self.q is None and not self.force and (why := target.lacks_rsample()):
            target.refuse(f"RP needs a reparameterized sampler, but {why}; use LR() or ImplicitRP().")
        return self

    def psi_is_zero(self, target: Target) -> bool:
        return True

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        return {} if self.control_variate is None else CostModel(ops, target, self.control_variate).learns()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        model = None if self.control_variate is None else CostModel(ops, target, self.control_variate)
        if model is None or target.learned is None:  # its coefficients are 0 then
            return ImplicitRP(target.standardization(ops)).attach(ops, target, x)
        value, control = model.attach(x)
        return Draw(target.push(value), control=control)


@dataclass(frozen=True, repr=False)
class ImplicitRP(Estimator):
    r"""Implicit reparameterization: :math:`u = -(\partial S/\partial x)^{-1}\,\partial_\theta S(x;\theta)`, from a standardization S.

    psi = 0 where the law of S(x) is free of the parameters (a cdf, a standardization). For any other invertible S set
    ``exact=False``: psi is then the derivative of log p(x; theta) - log |det dS/dx| along the flow, which is the generalised
    reparameterization.

    **Requirements**: S differentiable in x and in the parameters, and invertible in x; a cost without jumps in x. For a scalar
    family S is elementwise; for an event S maps it to a vector of the same size and its Jacobian is solved densely.

    Args:
        standardization: ``S(x, p) -> eps`` with x of shape batch_shape + event_shape (detached) and p with *live* parameters. The
            default is the distribution's own cdf.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        exact: Whether the law of S(x) is free of the parameters.

    Raises:
        ValueError: At the first run, naming the site: a discrete site, no cdf, a cdf without a derivative in a live parameter, an S
            that returns another shape or does not depend on x, with ``exact=False`` a support that moves.

    Example:
        >>> import flowvi
        >>> def standardize(x, p):
        ...     return (x - p.loc) / p.scale
        >>> flowvi.ImplicitRP(standardize).exact
        True

    References:
        Figurnov, Mohamed and Mnih 2018; Ruiz, Titsias and Blei 2016 (``exact=False``). Parmas and Sugiyama 2021, section 2.3.
    """

    standardization: Callable[[Array, Any], Array] | None = None
    q: Callable[[Any], Any] | None = None
    exact: bool = field(default=True, kw_only=True)

    def psi_is_zero(self, target: Target) -> bool:
        return self.exact

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        _refuse_discrete(target, "ImplicitRP")
        if not self.exact:
            _refuse_moving_support(target, "ImplicitRP(exact=False)")
        s = self.standardization or target.cdf
        eps = s(x, target.p)
        if tuple(eps.shape) != tuple(x.shape):
            target.refuse(
                f"the standardization function must return the shape of x, expected {tuple(x.shape)}, "
                f"found {tuple(eps.shape)}; return one number for each coordinate of x."
            )
        if target.event_ndim == 0:
            target.check_elementwise(ops, s, x, "the standardization function")
        slope = _slope(ops, target, lambda x: s(x, target.p0), x, live=False)
        if target.validate:
            ok = ops.all_finite(ops.log_abs(slope) if target.event_ndim == 0 else ops.log_abs_det(slope))
            target.check(ops, ok, "dS/dx of the standardization function is 0 or not finite; S must be invertible in x.")
        tangent = ops.tether(eps)
        if target.event_ndim == 0:
            value = x - tangent / slope
        else:
            value = x - ops.solve(slope, tangent.reshape(slope.shape[:-1])).reshape(x.shape)
        if self.exact:
            return Draw(target.push(value))
        slope = _slope(ops, target, lambda x: s(x, target.p), value, live=True)
        log_volume = ops.log_abs(slope) if target.event_ndim == 0 else ops.log_abs_det(slope)
        return Draw(target.push(value), target.to_batch(target.p.log_prob(value) - log_volume))


@dataclass(frozen=True, repr=False)
class Flow(Estimator):
    r"""The probability-flow estimator with your own velocity field: :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]`.

    :math:`\psi = \nabla\cdot u + u\cdot\nabla_x\log p + \partial_\theta\log p` is computed for you, so that *any* field is
    unbiased. ("Probability flow" is the flow of mass as the parameters move; neither the ODE of diffusion models nor a normalizing
    flow.) Two forms:

    * ``Flow(loc=u_loc, scale=u_scale)``: one function ``u(x, p)`` per parameter, elementwise in x. A parameter that is not
      named has u = 0, that is LR.
    * ``Flow(velocity)``: ``velocity(x, p, dtheta) -> dx``, for parameters that couple. ``dtheta`` holds a tangent for each
      parameter by name; dx has the shape of x and must be linear in dtheta.

    **Requirements**: a continuous site with a differentiable ``log_prob``, a support that does not move with the parameters (unless
    the field is one of :mod:`flowvi.fields` that rides its bounds), a field that does not cross the boundary of the support, and that
    is 0 on (or tangent to) jumps of the cost.

    Args:
        velocity: The general form: a function, or a :class:`~flowvi.fields.Field` of :mod:`flowvi.fields`.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        divergence: With the general form: ``divergence(x, p, dtheta)`` in closed form, of batch shape and linear in dtheta;
            ``"pathwise"`` declares psi = 0 (a field that solves the transport equation); the default is exact, by
            automatic derivatives over the event.
        baseline: Subtracted from the costs that multiply psi, instead of the objective's leave-one-out mean; see :class:`LR`.
        **per_parameter: The form per parameter.

    Raises:
        TypeError: Both forms at once, or neither; a divergence beside a field that has its own, or per parameter; ``baseline`` is
            neither a :class:`Baseline` nor ``"plate"``.
        ValueError: At the first run, naming the site: an unknown or coupled parameter, a field of another shape, one that mixes
            coordinates (seen where the host's validation is on), a discrete site, a support that moves.

    Example:
        Halfway between LR and RP for a Normal:

        >>> import flowvi
        >>> half = flowvi.Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)
        >>> [name for name, u in half.per_parameter]
        ['loc', 'scale']

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    velocity: Callable[[Array, Any, Any], Array] | Field | None
    q: Callable[[Any], Any] | None
    divergence: Callable[[Array, Any, Any], Array] | str | None
    per_parameter: tuple[tuple[str, Callable[[Array, Any], Array]], ...]
    baseline: SiteBaseline = None

    def __init__(
        self,
        velocity: Callable[[Array, Any, Any], Array] | Field | None = None,
        *,
        q: Callable[[Any], Any] | None = None,
        divergence: Callable[[Array, Any, Any], Array] | str | None = None,
        baseline: SiteBaseline = None,
        **per_parameter: Callable[[Array, Any], Array],
    ):
        if (velocity is None) == (not per_parameter):
            raise TypeError("Flow takes either velocity(x, p, dtheta) or one function u(x, p) for each parameter by name.")
        if divergence is not None and velocity is None:
            raise TypeError("Flow takes a divergence with the general form only; per parameter it is exact and cheap.")
        if isinstance(velocity, Field) and divergence is not None:
            raise TypeError("Flow takes no divergence beside a Field, which has its own.")
        if isinstance(divergence, str) and divergence != "pathwise":
            raise TypeError(f"Flow's divergence is a function, 'pathwise' or None; found {divergence!r}.")
        object.__setattr__(self, "velocity", velocity)
        object.__setattr__(self, "q", q)
        object.__setattr__(self, "divergence", divergence)
        object.__setattr__(self, "baseline", _require_baseline(baseline, "Flow"))
        object.__setattr__(self, "per_parameter", tuple(per_parameter.items()))

    @property
    def _field(self) -> Field:
        """The general form as a field."""
        if isinstance(self.velocity, Field):
            return self.velocity
        assert self.velocity is not None
        return Field(self.velocity, self.divergence)

    def psi_is_zero(self, target: Target) -> bool:
        return self.velocity is not None and self._field.divergence == "pathwise"

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        _refuse_discrete(target, "Flow")
        if self.velocity is None or not self._field.rides:
            _refuse_moving_support(target, "a Flow field that is not known to ride the moving bound")
        velocity, divergence = self._elementwise(ops, target, x) if self.velocity is None else self._general(ops, target, x)
        value = x + velocity
        if self.psi_is_zero(target):
            return Draw(target.push(value))
        log_prob = target.to_batch(target.p.log_prob(value))
        score = log_prob if divergence is None else log_prob + target.to_batch(divergence)
        return Draw(target.push(value), score, log_prob=log_prob)

    def _elementwise(self, ops: Ops, target: Target, x: Array) -> tuple[Array, Array | None]:
        """The velocity, of value 0 and linear in dtheta, and what has its divergence as its tangent (None for constant fields).

        The divergence of an elementwise u_i is u_i'(x) dtheta_i: the derivative of u_i along dtheta_i.
        """
        if chart := target.chart():
            target.refuse(
                f"a field per parameter cannot stay on a support of lower dimension ({chart}); "
                "use Flow(velocity) with a dx that is tangent to it."
            )
        velocity = divergence = None
        parameters, p0 = target.parameters, target.p0
        for name, u in self.per_parameter:
            if name not in parameters:
                target.refuse(unknown_parameter(target.p, name))
            theta = ops.asarray(getattr(target.p, name), x)
            if not broadcasts(theta.shape, x.shape):
                target.refuse(
                    f"parameter '{name}' of shape {tuple(theta.shape)} does not act coordinate by coordinate on x of shape "
                    f"{tuple(x.shape)}; use the general form Flow(velocity)."
                )

            at_x = u(x, p0)
            if isinstance(at_x, (int, float)):  # a constant field
                moved = times(theta, at_x)
            else:
                what = f"the velocity of '{name}'"
                at_x = target.in_shape(ops, at_x, x, what)
                target.check_elementwise(ops, u, x, what)
                if target.validate and target.first_use:
                    _check_finite(ops, target, ops.derivative(partial(_field_at, ops, target, u), x, live=False)[1])
                along = target.in_shape(ops, u(x + ops.tether(theta), p0), x, what)
                if target.is_live(at_x):  # u reads a live parameter by itself, which moves no probability
                    along, at_x = along - at_x, ops.stop_gradient(at_x)
                divergence = along if divergence is None else divergence + along
                moved = at_x * theta
            velocity = moved if velocity is None else velocity + moved
        velocity = ops.tether(velocity)
        _check_finite(ops, target, velocity)
        return velocity, None if divergence is None else target.sum_event(divergence)

    def _general(self, ops: Ops, target: Target, x: Array) -> tuple[Array, Array | None]:
        """The velocity and what has its divergence as its tangent, linear in dtheta."""
        field, dtheta = self._field, Tangents(ops, target)
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
        _check_finite(ops, target, velocity)
        _check_finite(ops, target, divergence)
        if target.validate:
            ok = ops.is_close(velocity, 0 * x)
            target.check(ops, ok, "velocity(x, p, dtheta) must be linear in dtheta, but is not 0 at dtheta = 0.")
        return ops.tether(velocity), divergence


@dataclass(frozen=True, repr=False)
class Auto(Estimator):
    """:class:`RP` where the host's distribution is fully reparameterized with an unbiased derivative, else :class:`LR`; the default.

    **Requirements**: those of the estimator it chooses.

    Raises:
        ValueError: At the first run, naming the site, where neither is right (a moving support without a reparameterized sampler).

    Example:
        >>> import flowvi
        >>> flowvi.Auto()
        Auto()

    References:
        Schulman, Heess, Weber and Abbeel 2015.
    """

    q = None

    def resolve(self, target: Target) -> Estimator:
        return LR() if target.lacks_rsample() else RP()

    def psi_is_zero(self, target: Target) -> bool:
        return not target.lacks_rsample()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        raise TypeError("Auto is resolved to RP or LR before it is attached.")


def _require_baseline(baseline: Any, what: str) -> SiteBaseline:
    if not isinstance(baseline, Baseline | None) and baseline not in ("plate", "optimal"):
        raise TypeError(f"{what}: expected baseline=flowvi.Baseline(fn, *inputs), 'plate', 'optimal' or None, found {baseline!r}.")
    if baseline == "optimal" and what != "LR":
        raise TypeError(f"{what} has no baseline='optimal', which is for LR; use Baseline(fn, *inputs), 'plate' or None.")
    return baseline


def _field_at(ops: Ops, target: Target, u: Callable[[Array, Any], Array], x: Array) -> Array:
    return ops.asarray(u(x, target.p0), x)


def _check_finite(ops: Ops, target: Target, a: Array | None) -> None:
    """Of a velocity, of its divergence or its slope; None is 0."""
    if target.validate and a is not None:
        target.check(ops, ops.all_finite(a), "the velocity field or its divergence is NaN or infinite at a sample.")


def _detached(ops: Ops, value: Any) -> Any:
    """Every array in a container detached."""
    if isinstance(value, list | tuple):
        return type(value)(_detached(ops, v) for v in value)
    if isinstance(value, dict):
        return {k: _detached(ops, v) for k, v in value.items()}
    return ops.stop_gradient(value) if hasattr(value, "shape") else value


def _refuse_moving_support(target: Target, what: str) -> None:
    if bounds := target.moving_bounds():
        target.refuse(
            f"{what} is biased where the support moves with a parameter, but that of {target.family} moves with {', '.join(bounds)} "
            "(a traced bound counts as live); use RP() or ImplicitRP(), or make the bound a constant."
        )


def _refuse_discrete(target: Target, what: str) -> None:
    if target.is_discrete():
        target.refuse(f"{what} needs a continuous distribution, but {target.family} is discrete; use LR().")


def _slope(ops: Ops, target: Target, f: Callable[[Array], Array], x: Array, live: bool) -> Array:
    """df/dx: elementwise for a scalar family, the Jacobian over the event otherwise."""
    if target.event_ndim:
        return ops.jacobian(f, x, target.event_ndim, live)[1]
    _, slope = ops.derivative(f, x, live)
    if slope is None:
        target.refuse("the standardization function must depend on x, but is constant in it.")
    return slope

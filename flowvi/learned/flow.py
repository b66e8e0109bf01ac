"""A velocity field, a control variate and a sampling density that are learned while SVI runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from flowvi.baselines import Baseline, BaselineField
from flowvi.estimators import Draw, Estimator, is_proposal, refuse_discrete, refuse_moving_support
from flowvi.family import Standardization, family_of, names
from flowvi.fields.field import Field, Part
from flowvi.learned.amortised import Amortised, Features
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.proposals.proposal import defensive
from flowvi.rebuild import build
from flowvi.standardizations import by_moments
from flowvi.tangents import Tangents
from flowvi.target import Target

REACH = 2.0  # the outermost bumps, in standard deviations
WIDTH = 0.7  # of a bump, in units of the distance between two


@dataclass(frozen=True, repr=False)
class AdaptiveFlow(Estimator):
    r"""A flow that learns its velocity field and a control variate while SVI runs, so that its gradient has less noise.

    The estimate for parameter i is :math:`E_i = w\,[u_i\cdot\nabla\phi + \psi_i\,\phi + \zeta_i]`, with the cost :math:`\phi`, the
    weight w = p/q and a control variate :math:`\zeta_i`. With :math:`u'_i` the pathwise field of parameter i, :math:`s_i` its
    score, and z the standardized sample,

    .. math:: u_i = m_i(z)\,u'_i, \qquad \psi_i = (1 - m_i)\,s_i + u'_i\,\partial_x m_i, \qquad
        m_i(z) = a_{i0} + \sum_j a_{ij}\,e^{-(z - c_j)^2 / 2 h^2} .

    :math:`m_i = 1`, the start, is RP, and :math:`m_i = 0` is LR. The control variate
    :math:`\zeta_i = \sum_k b_{ik} s_k + h_i s_i - u'_i\,\partial_x h_i` has mean 0 for all numbers :math:`b_{ik}` and every sum of
    bumps :math:`h_i`, so the estimator is unbiased for all coefficients. They minimize the second moment of the gradient in the site's
    own parameters. The user's optimizer trains them, from the same backward pass. In NumPyro, pass
    ``flowvi.numpyro.adaptive(guide, elbo)`` to ``SVI`` as the guide. In Pyro they are registered automatically, as
    ``"{site}.velocity"``, ``"{site}.control"`` and ``"{site}.proposal"``.

    **Requirements**: a continuous scalar family (or ``to_event`` of one) with a pathwise field in ``flowvi.families``, a support that
    does not move, reverse-mode differentiation, and a cost *without jumps*. If the cost jumps, no pathwise field is right, and learning
    finds a wrong one (for a step under a Normal: 0, where the gradient is 0.53). Make the field 0 at the jumps with ``mask``, or use
    :class:`flowvi.LR`. With several particles learning is faster, because the leave-one-out mean removes a constant cost from the
    score. As with every score, the elements of a plate must not read each other.

    Args:
        bumps: The number of bumps, evenly from -2 to 2 standard deviations. 0 learns a constant blend of LR and RP for each parameter,
            and the constants of the control variate.
        q: ``"learned"``: p with its location shifted and its positive parameters multiplied by learned amounts, mixed with p. Or a
            function ``q(p) -> distribution``, or None for q = p.
        start: The initial value of m: 1 is RP, 0 is LR.
        field: A pathwise field with parts to start from, instead of the family's field in ``flowvi.families``.
        mask: ``mask(x, p)``, elementwise: the field is multiplied by it; make it 0 where the cost jumps.
        shared: Whether the elements of the site's plates and event share the coefficients. By default each has its own, except in a
            plate that may hold other data at every step; see :class:`flowvi.RP`.
        epsilon: The weight of p in the learned q, which keeps the weights below 1/epsilon; 0 for none.
        baseline: Subtracted from the costs that multiply psi, instead of the objective's leave-one-out mean; see :class:`flowvi.LR`.
        features: ``features(p)``, with detached parameters: an array of the shape of x with a dim of features f on the right, such as
            parameters of p, or covariates of its data. The coefficients of an element are then :math:`W_0 + \sum_k f_k W_k`; see
            :class:`flowvi.RP`.

    Raises:
        TypeError: ``field`` has no parts; ``q`` is none of these; ``baseline`` is neither a :class:`flowvi.Baseline` nor ``"plate"``.
        ValueError: A negative number of bumps, an epsilon outside [0, 1). At the first run, naming the site: a discrete site, a support
            that moves, a family without a pathwise field, or (``q="learned"``) one that cannot be moved.

    Example:
        At the start it is RP, whose gradient of E[3 x] in loc has no noise. With ``start=0.0`` it is LR:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import AdaptiveFlow, plot
        >>> def noise(estimator):
        ...     return float(plot.gradient_samples(dist.Normal(0.0, 1.0), estimator, "loc", lambda x: 3.0 * x).std())
        >>> round(noise(AdaptiveFlow()), 3)
        0.0
        >>> abs(noise(AdaptiveFlow(start=0.0)) - 4.24) < 0.3
        True

    References:
        Parmas and Sugiyama 2021, eq. 19, with u and q by descent on E[g^2]. Ruiz, Titsias and Blei 2016 (a learned q). Jankowiak and
        Karaletsos 2019 (adaptive velocity fields).
    """

    bumps: int = 5
    q: Callable[[Any], Any] | Literal["learned"] | None = None  # type: ignore[assignment]
    start: float = 1.0
    field: Field | None = None
    mask: Callable[[Array, Any], Array] | None = None
    shared: bool = False
    epsilon: float = 0.1
    baseline: Baseline | Literal["plate"] | None = BaselineField()  # type: ignore[assignment]  # noqa: RUF009
    features: Features | None = None

    def __post_init__(self) -> None:
        if self.q is not None and self.q != "learned" and not is_proposal(self.q):
            raise TypeError(f"AdaptiveFlow: expected q='learned', a function q(p) or None, found {self.q!r}.")
        if self.bumps < 0:
            raise ValueError(f"AdaptiveFlow: expected a number of bumps, 0 or more, found {self.bumps}.")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"AdaptiveFlow: expected an epsilon between 0 and 1, found {self.epsilon}.")
        if self.field is not None and self.field.parts is None:
            raise TypeError(
                f"AdaptiveFlow needs a pathwise field with a part for each parameter, found {self.field}; "
                "those of flowvi.families have them, combinations of fields do not."
            )

    @property
    def shares(self) -> bool:
        return self.shared or self.features is not None

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        parts = self._pathwise(target)
        shapes: dict[str, tuple[int, ...]] = {
            "velocity": (len(parts), 1 + self.bumps),
            "control": (len(parts), self.bumps + len(parts)),
        }
        if self.q == "learned":
            shapes["proposal"] = (len(self._moves(target)),)
        amortised = self._amortised(ops, target)
        of_event = () if self.shares else target.extra_shape

        def initial(name: str) -> Array:
            zero = ops.stop_gradient(1.0 * ops.tether(next(iter(parts.values())).parameter(target.p))).sum()
            value = ops.stack([zero + self.start, *[zero] * self.bumps], -1) if name == "velocity" else zero
            batch = () if self.shares else target.element_shape
            return ops.broadcast_to(value, (*batch, *shapes[name]))

        learned = {name: Learned(partial(initial, name), (*of_event, *shape)) for name, shape in shapes.items()}
        return learned if amortised is None else {name: amortised.learned(ops, of_all) for name, of_all in learned.items()}

    def _amortised(self, ops: Ops, target: Target) -> Amortised | None:
        return None if self.features is None else Amortised.at(ops, target, self.features, target.batch_shape)

    def _coefficients(self, ops: Ops, target: Target) -> dict[str, Array]:
        """The coefficients, for every element or shared by all."""
        values, amortised = target.read(partial(self.learns, ops, target)), self._amortised(ops, target)
        return {name: value if amortised is None else amortised.coefficients(value) for name, value in values.items()}

    def proposal(self, ops: Ops, target: Target) -> tuple[Any, bool]:
        if self.q != "learned":
            return super().proposal(ops, target)
        values = {name: getattr(target.p0, name) for name in target.parameters}
        eta = self._coefficients(ops, target)["proposal"]
        q = _moved(ops, type(target.p), values, self._moves(target), ops.stop_gradient(eta))
        return target.cover(ops, defensive(lambda p: q, self.epsilon)(target.expand(target.p0)) if self.epsilon else q)

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        refuse_moving_support(target, "a field that is learned")
        parts, dtheta = self._pathwise(target), Tangents(ops, target)
        tangents = {name: d for name, part in parts.items() if (d := dtheta.of(part.parameter)) is not None}
        if not tangents:
            return Draw(target.push(x))
        along = ops.stack([ops.broadcast_to(d, x.shape) for d in tangents.values()], 0)
        names, live = ["velocity", "control"], [list(parts).index(name) for name in tangents]
        fixed = (*self._fields(ops, target, x, [parts[name] for name in tangents]), target.own_density_at(ops, x))
        proposal = None
        if self.q == "learned":
            names.append("proposal")
            fixed = (*fixed, x, *(ops.asarray(getattr(target.p0, name), x) for name in target.parameters))
            proposal = type(target.p), target.parameters, self._moves(target), self.epsilon
        gradient = _Gradient(ops, self.bumps, live, len(parts), target.extra_ndim, self.mask is not None, proposal)
        values = self._coefficients(ops, target)
        learned = {name: values[name] for name in names}
        u, psi, zeta = gradient.terms({name: ops.stop_gradient(value) for name, value in learned.items()}, fixed)
        outputs = (u * along).sum(0), target.to_batch((psi * along).sum(0)), target.to_batch((zeta * along).sum(0))
        step, score, control = target.learn(ops, outputs, learned, fixed, gradient.second_moment)
        return Draw(target.push(x + step), score, control=control)

    def _pathwise(self, target: Target) -> Mapping[str, Part]:
        """The pathwise field of the family, parameter by parameter."""
        refuse_discrete(target, "AdaptiveFlow")
        field = family_of(target.p).pathwise if self.field is None else self.field
        parts = {} if field is None or field.parts is None else field.parts(target.p0) if target.family in field.families else {}
        if not parts:
            where = "flowvi.families" if self.field is None else self.field
            target.refuse(
                f"AdaptiveFlow needs a pathwise field for each parameter of a scalar family, but {where} has none for this "
                f"{target.family}; use LR(), RP() or Flow(velocity)."
            )
        for name in () if self.field is None else target.parameters:
            if name not in parts and target.is_live(getattr(target.p, name)):
                target.refuse(
                    "AdaptiveFlow needs a velocity for each parameter that may need a gradient (as a traced number may), but "
                    f"{self.field} has none for '{name}'; add one, or make the parameter a constant."
                )
        return parts

    def _moves(self, target: Target) -> tuple[str, ...]:
        """The parameters that a learned q moves."""
        if not (moves := family_of(target.p).moves):
            movable = ", ".join(names(lambda family: family.moves))
            target.refuse(f"q='learned' is for {movable}; found {target.family}. Your own function q(p) works for any family.")
        return moves

    def _fields(self, ops: Ops, target: Target, x: Array, parts: list[Part]) -> tuple[Array, ...]:
        """Detached, over x: u' and s of the parts, the bumps and their derivatives (each with one more dim on the left), mask."""
        p = target.p0
        elementwise: list[tuple[str, Callable[[Array], Any]]] = [
            ("log p", p.log_prob),
            ("the standardized sample", partial(_standardized, ops, family_of(p).standardized or by_moments, p)),
            *(("the velocity", partial(_velocity, ops, part, p)) for part in parts),
        ]
        if self.mask is not None:
            target.check_elementwise(ops, self.mask, x, "the mask")
            elementwise.append(("the mask", partial(_mask, self.mask, p)))

        def each(xs: Array) -> Array:
            return ops.stack([target.in_shape(ops, f(xs[i]), x, what) for i, (what, f) in enumerate(elementwise)], 0)

        try:
            values, slopes = ops.derivative(each, ops.broadcast_to(x, (len(elementwise), *x.shape)), live=False)
        except NotImplementedError:
            target.refuse(f"the pathwise field of this {target.family} needs a cdf, and a component has none; use LR().")
        assert slopes is not None
        for a in (values, slopes) if target.validate else ():
            target.check(ops, ops.all_finite(a), "the velocity field or its derivative is NaN or infinite at a sample.")
        u, du = (a[2 : 2 + len(parts)] for a in (values, slopes))
        spacing = 2 * REACH / max(self.bumps - 1, 2)
        centres = [REACH * (2 * j / (self.bumps - 1) - 1) if self.bumps > 1 else 0.0 for j in range(self.bumps)]
        away = (values[1:2] - ops.asarray(centres, x).reshape((self.bumps, *(1,) * x.ndim))) / (WIDTH * spacing)
        bumps = ops.exp(-0.5 * away**2)
        fixed = u, -(du + u * slopes[:1]), bumps, away * bumps * (-slopes[1:2] / (WIDTH * spacing))
        return fixed if self.mask is None else (*fixed, values[-1], slopes[-1])


@dataclass(frozen=True)
class _Gradient:
    """The gradient at one draw as a function of the coefficients.

    Attributes:
        ops: The operations of the backend.
        bumps: The number of bumps.
        live: The parameters with a derivative, as indices.
        size: The number of parameters.
        extra_ndim: The number of batch dims of x that are event dims of the site.
        masked: Whether there is a mask.
        proposal: For a learned q: the family, the names of its parameters, those that move, and the weight of p; None for another q.
    """

    ops: Ops
    bumps: int
    live: list[int]
    size: int
    extra_ndim: int
    masked: bool
    proposal: tuple[type, tuple[str, ...], tuple[str, ...], float] | None

    def terms(self, learned: Mapping[str, Array], fixed: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        """u, psi and zeta of each live parameter, along the first axis."""
        u, score, *each_bump = fixed[:4]
        ndim = u.ndim - 1
        velocity, control = (self._of_live(self._over(learned[name], ndim)) for name in ("velocity", "control"))
        of_scores = control[:, self.bumps :]
        if len(self.live) < self.size:
            of_scores = self.ops.stack([of_scores[:, i] for i in self.live], 1)
        m, zeta = velocity[:, 0], (of_scores * score[None]).sum(1)
        dm = 0.0
        if self.bumps:
            bumps, dbumps = (a[None] for a in each_bump)
            of_field, of_control = velocity[:, 1:], control[:, : self.bumps]
            m, dm = m + (of_field * bumps).sum(1), (of_field * dbumps).sum(1)
            zeta = zeta + (of_control * bumps).sum(1) * score - u * (of_control * dbumps).sum(1)
        if self.masked:
            mask, dmask = (a[None] for a in fixed[4:6])
            m, dm = m * mask, dm * mask + m * dmask
        return m * u, (1 - m) * score + u * dm, zeta

    def second_moment(self, cotangents: tuple[Array, ...], learned: dict[str, Array], fixed: tuple[Array, ...]) -> Array:
        """The sum of the squared gradients in each parameter, with the derivative in the proposal taken under the integral over x."""
        of_value, of_score, of_control = cotangents
        of_score, of_control = (a.reshape((*a.shape, *(1,) * self.extra_ndim)) for a in (of_score, of_control))
        u, psi, zeta = self.terms(learned, fixed)
        own_density, *rest = fixed[6 if self.masked else 4 :]
        g = of_value[None] * u + of_score[None] * psi + of_control[None] * (zeta - own_density[None] * fixed[1])
        moment = (g**2).sum()
        if self.proposal is None:
            return moment
        family, names, moves, epsilon = self.proposal
        x, values = rest[0], dict(zip(names, rest[1:], strict=True))
        log_q = _moved(self.ops, family, values, moves, learned["proposal"]).log_prob(x)
        if epsilon:
            log_p = build(family, values).log_prob(x)
            log_q = self.ops.logaddexp(math.log1p(-epsilon) + log_q, math.log(epsilon) + log_p)
        square = (g**2).sum(0)
        if self.extra_ndim:  # the weight is that of the whole event
            square = square.sum(tuple(range(-self.extra_ndim, 0)), keepdims=True)
        return moment - (self.ops.stop_gradient(square) * log_q).sum()

    def _over(self, a: Array, ndim: int) -> Array:
        """Coefficients with their own two dims first: arithmetic is fastest if the long dims, those of x, are on the right."""
        batch = a.shape[:-2]
        return self.ops.moveaxis(a, (-2, -1), (0, 1)).reshape((*a.shape[-2:], *(1,) * (ndim - len(batch)), *batch))

    def _of_live(self, a: Array) -> Array:
        return a if len(self.live) == self.size else self.ops.stack([a[i] for i in self.live], 0)


def _mask(mask: Callable[[Array, Any], Any], p: Any, x: Array) -> Any:
    return mask(x, p)


def _standardized(ops: Ops, standardize: Standardization, p: Any, x: Array) -> Array:
    return standardize(ops, x, p)


def _velocity(ops: Ops, part: Part, p: Any, x: Array) -> Any:
    return part.u(ops, x, p)


def _moved(ops: Ops, family: type, values: Mapping[str, Array], moves: tuple[str, ...], eta: Array) -> Any:
    """The family with its location shifted by eta, in units of its scale, and its positive parameters multiplied by exp(eta)."""
    moved = dict(values)
    for i, name in enumerate(moves):
        if name != "loc":
            moved[name] = values[name] * ops.exp(eta[..., i])
        else:
            unit = values["scale"] if "scale" in values else values["concentration"] ** -0.5
            moved[name] = values[name] + unit * eta[..., i]
    return build(family, moved)

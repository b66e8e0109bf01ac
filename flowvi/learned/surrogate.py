"""RELAX, REBAR and LAX: control variates from a function that approximates the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flowvi.estimators import Draw, Estimator, refuse_moving_support
from flowvi.family import family_of, names
from flowvi.fields.field import Part
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.refusals import refusal
from flowvi.relaxations import Relaxation
from flowvi.tangents import Tangents
from flowvi.target import Target


@dataclass(frozen=True, repr=False, eq=False)
class Surrogate(Estimator):
    r"""Likelihood ratio with a control variate from a function c that approximates the cost: RELAX, REBAR and LAX.

    .. math:: E = (\phi(x) - c(\tilde z))\,\nabla\log p(x) + \nabla c(z) - \nabla c(\tilde z)

    A discrete x is determined by a continuous z: for a Bernoulli by the sign of the logit plus Logistic noise, for categories by the
    largest of the log probabilities plus Gumbel noise. :math:`\tilde z` is a second draw from p(z | x). Both are differentiable
    functions of the parameters and of noise, so what c adds has mean 0 for every c (RELAX). The host draws x as it always does; z and
    :math:`\tilde z` are then drawn given x. At a continuous site :math:`\tilde z = z = x`, and there is no last term (LAX). The program
    runs once, and c never sees the cost.

    The parameters of c minimize the second moment of the gradient in the site's own parameters (at a discrete site: in its logits). The
    user's optimizer trains them, from the same backward pass. They are parameters of the program, named ``"{site}.c.{name}"``. In
    NumPyro, pass ``flowvi.numpyro.adaptive(guide, elbo)`` to ``SVI`` as the guide.

    With a ``temperature`` :math:`\lambda`, the control variate is :math:`\eta\,c(\sigma(z/\lambda))`, with a sigmoid or a softmax
    (REBAR). c can then be a function like the cost. :math:`\eta` and :math:`\log\lambda` are learned too, as ``"{site}.scale"`` and
    ``"{site}.log_temperature"``.

    **Requirements**: a Bernoulli, Categorical or OneHotCategorical, or a continuous scalar family (or ``to_event`` of one) with a
    pathwise field in ``flowvi.families`` and a support that does not move, but not an angle; not inside ``cond``. c must be
    differentiable, without jumps, and must not read z at other elements of the site's batch. If c reads something random, it must be an
    input. Reverse-mode differentiation, if c has parameters.

    Args:
        c: ``c(z, params, *inputs)``, without ``params`` if there is no ``initial``. z has the shape of x, with one more dim for the
            categories of a Categorical. c returns an array of the batch shape of the site, so under ``to_event(1)`` it reads all
            coordinates. Like the ELBO, a good c is large where the fit is good.
        initial: The initial parameters of c: an array or a number, or (nested) dicts of these.
        inputs: More arrays for c, which exist before the site is drawn, such as an observation or an earlier draw; they are detached.
            Not for an estimator that is annotated in the model, which runs after the guide.
        temperature: The initial :math:`\lambda`, a positive number. None: c gets z itself.

    Raises:
        TypeError: c is not a function.
        ValueError: A temperature that is not positive. At the first run, naming the site: another family, a temperature at a continuous
            site, or a c that returns another shape or reads z at other elements.

    Example:
        The gradient of E[2 b] in a logit of 0 is 1/2. Under LR it is 1 if b is 1, and 0 otherwise. The best constant c removes all
        noise:

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import LR, Surrogate
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     b = numpyro.sample("b", dist.Bernoulli(0.5).mask(False))
        ...     numpyro.factor("cost", 2.0 * b)
        >>> def guide():
        ...     numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logit", 0.0)).mask(False))
        >>> def gradients(estimator):
        ...     loss = TraceFlow_ELBO(estimators={"b": estimator}).loss
        ...     gradient = jax.grad(lambda logit, key: -loss(key, {"logit": logit}, model, guide))
        ...     return sorted(set(jax.vmap(gradient, (None, 0))(0.0, jax.random.split(jax.random.key(0), 20)).tolist()))
        >>> gradients(LR()), gradients(Surrogate(lambda z: 1.0 + 0.0 * z))
        ([0.0, 1.0], [0.5])

    References:
        Grathwohl, Choi, Wu, Roeder and Duvenaud 2018 (RELAX, eq. 8). Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein 2017 (REBAR).
    """

    c: Callable[..., Any]
    initial: Any = field(default=None, repr=False)
    inputs: Sequence[Array] = field(default=(), repr=False)
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.c):
            raise TypeError(f"Surrogate: expected a function c(z), found {self.c!r}.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"Surrogate: expected a positive temperature, found {self.temperature}.")

    @property
    def shares(self) -> bool:
        return True

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        values = {} if self.initial is None else dict(_flat("c", self.initial))
        if self.temperature is not None:
            values |= {"scale": 1.0, "log_temperature": math.log(self.temperature)}
        parameter = next(iter(_parts(target).values())).parameter(target.p) if _relaxation(target, self) is None else target.p.logits
        like = ops.stop_gradient(1.0 * ops.tether(parameter))
        arrays = {name: ops.stop_gradient(ops.asarray(value, like)) for name, value in values.items()}
        return {name: Learned(partial(_itself, array), tuple(array.shape)) for name, array in arrays.items()}

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        refuse_moving_support(target, "Surrogate")
        relaxation = _relaxation(target, self)
        moving = _continuous(ops, target, x) if relaxation is None else _relaxed(ops, target, relaxation, x)
        if moving is None:
            return Draw(target.push(x))
        along, score, slope, last, *rest = moving
        own_density = target.own_density_at(ops, ops.asarray(x, last))
        own_density = own_density.reshape((*x.shape, *(1,) * (last.ndim - x.ndim)))
        fixed = (score, slope, own_density, last, *rest, *self.inputs)
        learned = target.read(partial(self.learns, ops, target))
        gradient = _Gradient(ops, self, target.name, target.batch_ndim, relaxation)
        if target.validate and target.first_use:
            gradient.check_batch(target, last)
        detached = {name: ops.stop_gradient(value) for name, value in learned.items()}
        log_prob = target.to_batch(target.p.log_prob(x))
        outputs = log_prob, gradient.to_batch((gradient.of_control(detached, fixed, live=False) * along).sum(0))
        if learned:
            outputs = target.learn(ops, outputs, dict(learned), fixed, gradient.second_moment)
        return Draw(target.push(x), outputs[0], log_prob=log_prob, control=outputs[1])


@dataclass(frozen=True)
class _Gradient:
    """The gradient at one draw as a function of the learned parameters.

    The site's parameters are along the first axis of their arrays. The tuple ``fixed`` holds the score s of each parameter, the slope
    that multiplies the derivative of c at the last point, the factor of the site's own density, and the last point, which is z~ or x;
    at a discrete site also the probabilities and z; at the end the inputs of c.
    """

    ops: Ops
    surrogate: Surrogate
    name: str
    batch_ndim: int
    relaxation: Relaxation | None

    def of_control(self, learned: Mapping[str, Array], fixed: tuple[Array, ...], live: bool) -> Array:
        """The derivative of the control variate in each parameter; ``live``: differentiable in what is learned."""
        score, slope, _, last, *rest = fixed
        cost = partial(self._cost, learned, rest if self.relaxation is None else rest[2:])
        value, at_last = self.ops.gradient(cost, last, live)
        result = slope * at_last[None] - self._over(value, last)[None] * score
        return result if self.relaxation is None else result + self.ops.gradient(cost, rest[1], live)[1][None]

    def second_moment(self, cotangents: tuple[Array, ...], learned: dict[str, Array], fixed: tuple[Array, ...]) -> Array:
        """The sum of the squared gradients in the site's parameters."""
        score, _, own_density, last, *rest = fixed
        of_score, of_control = (self._over(a, last)[None] for a in cotangents)
        g = of_score * score + of_control * (self.of_control(learned, fixed, live=True) - own_density[None] * score)
        return ((g if self.relaxation is None else self.relaxation.in_logits(g, rest[0][None])) ** 2).sum()

    def to_batch(self, a: Array) -> Array:
        """Sum an array of the shape of z over all but the batch dims of the site."""
        axes = tuple(range(self.batch_ndim, a.ndim))
        return a.sum(axis=axes) if axes else a

    def check_batch(self, target: Target, z: Array) -> None:
        """Refuse a c that reads z at another element of the batch."""
        with target.probe(z) as (z, _):
            learned = {name: parameter.initial() for name, parameter in self.surrogate.learns(self.ops, target).items()}
            cost, along = partial(self._cost, learned, list(self.surrogate.inputs)), self.ops.ramp(z)
            ok = self.ops.is_elementwise(lambda t: cost(z + self._over(t, z) * along), self.to_batch(0 * z))
        target.check(self.ops, ok, "c must read z at its own element of the batch only; put what it reads into the event.")

    def _cost(self, learned: Mapping[str, Array], inputs: list[Array], z: Array) -> Array:
        """The surrogate at z, over the batch of the site."""
        surrogate = self.surrogate
        if self.relaxation is not None and surrogate.temperature is not None:
            z = self.relaxation.soft(self.ops, z / self.ops.exp(learned["log_temperature"]))
        params = () if surrogate.initial is None else (_like("c", surrogate.initial, learned),)
        value = self.ops.asarray(surrogate.c(z, *params, *inputs), z)
        expected = tuple(z.shape[: self.batch_ndim])
        if tuple(value.shape) != expected:
            raise refusal(
                self.name, f"c must return a number for each element of the batch, expected {expected}, found {tuple(value.shape)}."
            )
        return value if surrogate.temperature is None else learned["scale"] * value

    def _over(self, a: Array, z: Array) -> Array:
        """An array over the batch of the site, reshaped to broadcast to z."""
        return a.reshape((*a.shape, *(1,) * (z.ndim - self.batch_ndim)))


def _relaxation(target: Target, surrogate: Surrogate) -> Relaxation | None:
    """The relaxation of a discrete site; None for a continuous one."""
    relaxation = family_of(target.p).relaxation
    if relaxation is None and surrogate.temperature is not None:
        target.refuse(f"a temperature relaxes a discrete site, but {target.family} has no relaxation; leave it out.")
    return relaxation


def _parts(target: Target) -> Mapping[str, Part]:
    """The pathwise field of a continuous family, parameter by parameter."""
    field = family_of(target.p).pathwise
    parts = {} if field is None or field.parts is None else field.parts(target.p0)
    if family_of(target.p).circle:
        target.refuse(f"Surrogate would need a periodic c at a {target.family}, which cannot be checked; use LR() or Flow(...).")
    if not parts:
        relaxed = ", ".join(names(lambda family: family.relaxation))
        target.refuse(
            f"Surrogate needs one of {relaxed}, or a scalar family with a pathwise field for each parameter in flowvi.families; "
            f"found {target.family}; use LR() or RP()."
        )
    return parts


def _relaxed(ops: Ops, target: Target, relaxation: Relaxation, x: Array) -> tuple[Array, ...]:
    """The tangents of eta, the score, the slope, z~, the probabilities and z."""
    eta = relaxation.eta(ops, target.p, target.batch_shape)
    fixed = ops.stop_gradient(eta)
    hard, probs = relaxation.hard(ops, x, fixed), relaxation.soft(ops, fixed)
    v = target.uniforms((2, *fixed.shape), fixed)
    z, _ = relaxation.given(ops, fixed, hard, v[0])
    z_tilde, speed = relaxation.given(ops, fixed, hard, v[1])
    return ops.tether(eta)[None], (hard - probs)[None], -speed[None], z_tilde, probs, z


def _continuous(ops: Ops, target: Target, x: Array) -> tuple[Array, ...] | None:
    """The tangents of the live parameters, their scores, the velocities and x; None if no parameter is live."""
    dtheta = Tangents(ops, target)
    live = [(d, part) for part in _parts(target).values() if (d := dtheta.of(part.parameter)) is not None]
    if not live:
        return None
    p = target.p0

    def each(xs: Array) -> Array:
        found = [p.log_prob(xs[0]), *(part.u(ops, xs[i], p) for i, (_, part) in enumerate(live, 1))]
        return ops.stack([target.in_shape(ops, f, x, "the velocity") for f in found], 0)

    values, slopes = ops.derivative(each, ops.broadcast_to(x, (1 + len(live), *x.shape)), live=False)
    assert slopes is not None
    u = values[1:]
    along = ops.stack([ops.broadcast_to(d, x.shape) for d, _ in live], 0)
    return along, -(slopes[1:] + u * slopes[:1]), u, x


def _itself(array: Array) -> Array:
    return array


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays in nested dicts, each with its dotted name."""
    if not isinstance(value, Mapping):
        yield name, value
    else:
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)


def _like(name: str, value: Any, learned: Mapping[str, Array]) -> Any:
    """The learned parameters, nested like the initial ``value``."""
    if not isinstance(value, Mapping):
        return learned[name]
    return {key: _like(f"{name}.{key}", part, learned) for key, part in value.items()}

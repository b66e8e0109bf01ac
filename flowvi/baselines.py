"""Baselines: what is subtracted from the costs that a score multiplies.

A baseline b does not change the mean of the gradient if it does not depend on the draw whose score it multiplies. There are three
stages, each with its own objects:

* The user chooses a baseline at construction: :class:`Baseline`, ``"plate"`` (:class:`PlateMean`) or ``"optimal"`` (:class:`Optimal`).
  Its ``at_draw`` is called when a site has been drawn.
* ``at_draw`` returns a function that makes the :class:`Score` records of the site after the run, when its costs are known.
* These records hold arrays only, so that particles can be mapped and stacked. When all particles have run, :class:`Fitted`,
  :class:`BestOfOthers` and the objective's :class:`ParticleMean` turn them into a term of the surrogate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from flowvi.ops import Array, Ops
from flowvi.refusals import refusal
from flowvi.shapes import broadcasts
from flowvi.target import Target

# ---- records of one run: arrays only


class ScoreBaseline(Protocol):
    """The baseline of one score after the runs of all particles; a container of arrays."""

    def term(self, ops: Ops, name: str, score: Score, num_particles: int) -> Array:
        """The score times its costs minus the baseline, plus a term that trains the baseline; its value has no meaning."""
        ...


class Score(NamedTuple):
    """One score and its factors, all of the shape of the site's plates, with the particles as first axis if there are several.

    Attributes:
        score: Its tangent is psi; its value has no meaning.
        cost: The weighted costs that depend on the site, detached.
        weight: The product of the weights of the site and its ancestors; None if all are 1. It multiplies a baseline.
        baseline: The site's baseline; None for the objective's.
    """

    score: Array
    cost: Array
    weight: Array | None = None
    baseline: ScoreBaseline | None = None

    def weighted(self, baseline: Array) -> Array:
        return baseline if self.weight is None else self.weight * baseline


class ParticleMean:
    """``"loo"``: the mean cost of the other particles."""

    def term(self, ops: Ops, name: str, score: Score, num_particles: int) -> Array:
        cost = score.cost
        if cost.shape[0] > 1:
            others = (cost.sum(axis=0, keepdims=True) - cost) / (cost.shape[0] - 1)
            cost = cost - score.weighted(others)
        return score.score * cost


class Fitted(NamedTuple):
    """A baseline with a value, whose squared error trains the parameters that it reads."""

    value: Array

    def term(self, ops: Ops, name: str, score: Score, num_particles: int) -> Array:
        fitted = score.weighted(self.value)
        return score.score * (score.cost - ops.stop_gradient(fitted)) - 0.5 * (fitted - score.cost) ** 2


class BestOfOthers(NamedTuple):
    """For each particle the best constant for the others, given psi^2 in the shape of the score."""

    square: Array

    def term(self, ops: Ops, name: str, score: Score, num_particles: int) -> Array:
        if num_particles == 1:
            raise refusal(name, "baseline='optimal' needs several particles, found 1; use 'plate', a Baseline or None.")
        best = _best_of_others(ops, self.square, score.cost, score.weight)
        return score.score * (score.cost - score.weighted(best))


def _best_of_others(ops: Ops, square: Array, cost: Array, weight: Array | None) -> Array:
    """For each particle, the b of least mean psi^2 (cost - weight b)^2 over the other particles."""
    num_particles = cost.shape[0]
    weighted = square if weight is None else square * weight
    norm = (weighted if weight is None else weighted * weight).reshape((num_particles, -1))
    others = ops.where(ops.eye(num_particles, norm), 0 * norm[:, :1], 0 * norm[:, :1] + 1)
    norm, product = others @ norm, others @ (weighted * cost).reshape((num_particles, -1))
    return ops.where(norm > 0, product / ops.where(norm > 0, norm, 0 * norm + 1), 0 * norm).reshape(cost.shape)


# ---- after one run


class SiteCosts(NamedTuple):
    """The result of a run for one site with a score.

    Attributes:
        name: The site's name.
        score: Its score, over its plates.
        cost: The weighted costs that depend on it, detached.
        weight: The product of the weights of the site and its ancestors; None if all are 1.
        num_elements: The number of elements of its plates.
        own_costs: Computes, for each element of the plates, the costs that depend only on this element.
    """

    name: str
    score: Array
    cost: Array
    weight: Array | None
    num_elements: int
    own_costs: Callable[[], Array]


MakeScores = Callable[[Ops, SiteCosts], tuple[Score, ...]]


def make_score(ops: Ops, name: str, score: Array, cost: Array, weight: Array | None, baseline: Array | None = None) -> Score:
    """The record of a site's whole score, with a fitted baseline if there is one."""
    if weight is None and baseline is None and score.shape == cost.shape:
        return Score(score, cost)
    shape = ops.broadcast_shapes(score.shape, cost.shape, *(() if weight is None else (weight.shape,)))
    score, cost = ops.broadcast_to(score, shape), ops.broadcast_to(cost, shape)
    weight = None if weight is None else ops.broadcast_to(weight, shape)
    if baseline is None:
        return Score(score, cost, weight)
    require_plate_shape(name, baseline, shape)
    return Score(score, cost, weight, Fitted(ops.broadcast_to(baseline, shape)))


def require_plate_shape(name: str, baseline: Array, shape: tuple[int, ...]) -> None:
    """Refuse a baseline that does not broadcast to the ``shape`` of the site's plates."""
    if not broadcasts(baseline.shape, shape):
        raise refusal(
            name,
            f"a baseline must have the shape of the site's plates or one that broadcasts to it, "
            f"expected {tuple(shape)}, found {tuple(baseline.shape)}.",
        )


def _fitted(value: Array, ops: Ops, costs: SiteCosts) -> tuple[Score, ...]:
    return (make_score(ops, *costs[:4], value),)


def _mean_of_other_elements(ops: Ops, costs: SiteCosts) -> tuple[Score, ...]:
    if costs.num_elements == 1:
        raise refusal(costs.name, "baseline='plate' needs a plate of several elements, found none; use the default.")
    own = costs.own_costs()
    return (make_score(ops, *costs[:4], (own.sum() - own) / (costs.num_elements - 1)),)


def _by_parameter(parts: list[tuple[Array, Array]], ndim: int, ops: Ops, costs: SiteCosts) -> tuple[Score, ...]:
    """A record for each array of parameters. A part may have more dims on the right than the score, which has ``ndim``."""

    def over(part: Array, a: Array | None) -> Array | None:
        return None if a is None else ops.broadcast_to(a.reshape((*a.shape, *(1,) * (part.ndim - ndim))), part.shape)

    return tuple(Score(part, over(part, costs.cost), over(part, costs.weight), BestOfOthers(square)) for part, square in parts)


# ---- what the user chooses


class SiteBaseline(ABC):
    """What an estimator subtracts at its site, instead of the objective's baseline."""

    @abstractmethod
    def at_draw(self, ops: Ops, target: Target, x: Array, score: Array) -> MakeScores:
        """A function that makes the site's records after the run.

        Args:
            ops: The operations of the backend.
            target: The site's distribution.
            x: The sample, detached.
            score: The score of the draw.
        """


@dataclass(frozen=True, repr=False)
class PlateMean(SiteBaseline):
    """``"plate"``: the mean over the other elements of the site's plates, each with the costs that depend only on it."""

    def __repr__(self) -> str:
        """The name by which the user gives it."""
        return "'plate'"

    def at_draw(self, ops: Ops, target: Target, x: Array, score: Array) -> MakeScores:
        return _mean_of_other_elements


@dataclass(frozen=True, repr=False)
class Optimal(SiteBaseline):
    """``"optimal"``: for each array of parameters the constant of least variance, estimated from the other particles."""

    def __repr__(self) -> str:
        """The name by which the user gives it."""
        return "'optimal'"

    def at_draw(self, ops: Ops, target: Target, x: Array, score: Array) -> MakeScores:
        return partial(_by_parameter, target.scores(x), score.ndim)


class Baseline(SiteBaseline):
    r"""A baseline b for the score term of one site, :math:`\psi\,(\phi - b)`, fitted to the costs while SVI runs.

    ``fn(*inputs)`` is called just before the site is drawn, with detached inputs. The user's optimizer trains the parameters that
    ``fn`` reads (a network, or a single number) on :math:`\tfrac12 (w b - w\phi)^2`, and no others.

    **Requirements**: b must not depend on the site's own draw or on a later draw, so write it at the site's statement in the guide. If
    ``fn`` reads something random, it must be an input: a closure is not detached. The parameters of ``fn`` must be parameters of the
    guide (in NumPyro: registered while the guide runs).

    Args:
        fn: Returns b, of the shape of the site's plates.
        *inputs: Arrays, or containers of arrays, for ``fn``.

    Raises:
        TypeError: ``fn`` is not a function.
        ValueError: At the first run, naming the site, if b does not broadcast to the shape of the site's plates.

    Example:
        A constant, which learns the mean of the cost:

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import LR, Baseline
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     k = numpyro.sample("k", dist.Bernoulli(0.5))
        ...     numpyro.factor("cost", 4.0 + 2.0 * k)
        >>> def guide():
        ...     b = numpyro.param("b", 0.0)
        ...     numpyro.sample("k", dist.Bernoulli(0.5), infer={"estimator": LR(baseline=Baseline(lambda: b))})
        >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.05), TraceFlow_ELBO())
        >>> params = svi.run(jax.random.key(0), 2000, progress_bar=False).params
        >>> abs(float(params["b"]) - 5.0) < 0.5
        True

    References:
        Mnih and Gregor 2014 (network baselines). Parmas and Sugiyama 2021, eq. 19: unbiased where the mean of psi is 0.
    """

    def __init__(self, fn: Callable[..., Array], *inputs: Any):
        if not callable(fn):
            raise TypeError(f"Baseline: expected a function of the inputs, found {fn!r}; for a constant c write Baseline(lambda: c).")
        self.fn: Callable[..., Array] = fn
        self.inputs: tuple[Any, ...] = inputs

    def __repr__(self) -> str:
        """The function by name."""
        return f"Baseline({getattr(self.fn, '__name__', type(self.fn).__name__)})"

    def at_draw(self, ops: Ops, target: Target, x: Array, score: Array) -> MakeScores:
        return partial(_fitted, ops.asarray(self.fn(*_detached(ops, self.inputs)), score))


def _detached(ops: Ops, value: Any) -> Any:
    """Every array in a container detached."""
    if isinstance(value, list | tuple):
        return type(value)(_detached(ops, v) for v in value)
    if isinstance(value, dict):
        return {k: _detached(ops, v) for k, v in value.items()}
    return ops.stop_gradient(value) if hasattr(value, "shape") else value


NAMED: dict[Any, SiteBaseline] = {"plate": PlateMean(), "optimal": Optimal()}


class BaselineField:
    """The field ``baseline`` of an estimator's dataclass. It turns names into objects when the estimator is made.

    It is a descriptor-typed field (see :mod:`dataclasses`), so it also works in a frozen class.

    Args:
        optimal: Whether the estimator allows ``"optimal"``, which needs psi to be the score itself.
    """

    def __init__(self, optimal: bool = False):
        self._optimal = optimal

    def __get__(self, estimator: Any, owner: type) -> SiteBaseline | None:
        """The baseline of an estimator; None for the class itself, which makes None the default."""
        return None if estimator is None else vars(estimator)["baseline"]

    def __set__(self, estimator: Any, value: Any) -> None:
        """Turn a name into its object, and refuse anything else."""
        what, baseline = type(estimator).__name__, NAMED.get(value, value) if isinstance(value, str) else value
        if not isinstance(baseline, SiteBaseline | None):
            raise TypeError(f"{what}: expected baseline=flowvi.Baseline(fn, *inputs), 'plate', 'optimal' or None, found {value!r}.")
        if isinstance(baseline, Optimal) and not self._optimal:
            raise TypeError(f"{what} has no baseline='optimal', which is for LR; use Baseline(fn, *inputs), 'plate' or None.")
        vars(estimator)["baseline"] = baseline

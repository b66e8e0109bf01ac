"""One estimator at one distribution, as :func:`flowvi.check_estimator` sees it: its field, differences and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from flowvi.checks import Build, Parameter, named
from flowvi.checks.quadrature import SIDE, Chart, Coordinates, integers, nodes
from flowvi.estimators import Estimator, attach
from flowvi.family import family_of
from flowvi.ops import Array

STENCIL = {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12}  # of a first derivative, to order 4
STEP = 2e-4  # of differences, in the natural unit of each coordinate
LOWER = ("_LowerCholesky", "_LowerTriangular", "_ScaledUnitLowerCholesky", "_SoftplusLowerCholesky")
SYMMETRIC = ("_PositiveDefinite", "_PositiveSemiDefinite", "_CorrMatrix")
CHUNKS = 50
SEEN = 1e-10  # mass below which a point does not count


def _directions(name: str, parameter: Parameter) -> Iterator[tuple[str, np.ndarray]]:
    """The directions in which a parameter may move within its constraint, each with a label."""
    constraint = parameter.constraint
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    kind = type(constraint).__name__
    shape = np.shape(parameter.value)
    for index in np.ndindex(shape):
        e = np.zeros(shape)
        e[index] = 1.0
        if kind == "_Simplex":
            if index[-1] == shape[-1] - 1:
                continue
            e[(*index[:-1], -1)] = -1.0
        elif kind in LOWER + SYMMETRIC:
            if index[-1] > index[-2]:
                continue
            if kind in SYMMETRIC:
                e[(*index[:-2], index[-1], index[-2])] = 1.0
        yield (f"{name}[{','.join(map(str, index))}]" if shape else name), e


def difference(f: Callable[[int], np.ndarray]) -> np.ndarray:
    """The derivative of ``f(k)`` at k = 0."""
    return sum(c * f(k) for k, c in STENCIL.items())  # type: ignore[return-value]


class Case:
    """One estimator at one distribution, whose parameters are moved by a vector eta (0 at the point to check).

    An x is flat: (n, *batch, d), with the batch of the site and all other dims as d coordinates. Derivatives in eta are the last axis.
    """

    def __init__(
        self,
        host: Any,
        build: Build,
        theta: Mapping[str, Parameter],
        estimator: Estimator,
        tolerance: float,
        num_samples: int,
        seed: int,
    ):
        self.host, self.ops, self.build, self.estimator = host, host.ops, build, estimator
        self.tolerance, self.seed = tolerance, seed
        self.num_samples = CHUNKS * math.ceil(num_samples / CHUNKS)
        self.theta = {name: np.asarray(number(p.value), float) for name, p in theta.items()}
        self.moves = [(name, label, e) for name, p in theta.items() for label, e in _directions(name, p)]
        self.labels = [label for _, label, _ in self.moves]
        self.size = len(self.moves)
        self.steps = np.full(self.size, np.nan)
        self.still = self.target(self.moved(), 1)
        self.family, self.discrete = self.still.family, self.still.is_discrete()
        self.batch = tuple(self.still.shape[1 : self.still.batch_ndim])

    # ---- the distribution

    def require_same(self, p: Any) -> None:
        """Refuse a class whose parameters are not what it is built from."""
        again = dict(named("", self.build({})))
        for name, parameter in named("", p):
            if not np.array_equal(number(parameter.value), number(again[name].value)):
                raise TypeError(
                    f"check_estimator: {type(p).__name__} cannot be built again from its parameters, as its {name} is then another; "
                    "give a function of them: check_estimator(lambda loc: ..., estimator, {'loc': 0.3})."
                )

    def moved(self, i: int = 0, k: float = 0.0) -> np.ndarray:
        """An eta: k steps along coordinate i."""
        eta = np.zeros(self.size)
        if k:
            eta[i] = k * self.steps[i]
        return eta

    def distribution(self, eta: Any, n: int) -> Any:
        """The site's distribution at a (live) eta, n times."""
        theta = dict(self.theta)
        for i, (name, _, e) in enumerate(self.moves):
            theta[name] = (
                theta[name] + e * eta[i] if isinstance(eta, np.ndarray) else self.host.array(theta[name]) + self.host.array(e) * eta[i]
            )
        fn = self.host.unwrap(self.build({name: self.host.array(value) for name, value in theta.items()}))
        return fn.expand((n, *fn.batch_shape))

    def target(self, eta: Any, n: int) -> Any:
        target = self.host.Target("x", self.distribution(eta, n), self.estimator.enters)
        target.validate = False
        return target

    def flat(self, x: Any) -> Any:
        return x.reshape((*x.shape[: 1 + len(self.batch)], -1))

    def padded(self, x: np.ndarray) -> np.ndarray:
        """An x with its first row repeated, up to a length for which the host has compiled before."""
        n = next((n for n in self.host.lengths if len(x) <= n), len(x))
        return np.concatenate([x, np.broadcast_to(x[:1], (n - len(x), *x.shape[1:]))])

    def shaped(self, x: np.ndarray) -> Array:
        """A flat x as the host has it."""
        return self.host.array(np.array(x).reshape((len(x), *self.still.shape[1:])))

    def log_prob(self, eta: Any, x: np.ndarray) -> np.ndarray:
        x, n = self.padded(x), len(x)
        target = self.target(eta, len(x))
        return np.asarray(number(target.to_batch(target.p0.log_prob(self.shaped(x)))), float)[:n]

    def along(self, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The derivatives of f(eta) by differences."""
        return np.stack([difference(lambda k, i=i: f(self.moved(i, k))) / self.steps[i] for i in range(self.size)], -1)  # type: ignore[misc]

    @cached_property
    def draws(self) -> np.ndarray:
        """Samples of p."""
        target = self.target(self.moved(), self.num_samples)
        return self.flat(number(self.host.sample(target, target.p0, self.seed)))

    @property
    def unit(self) -> np.ndarray:
        """The natural unit of each parameter."""
        return self.steps / STEP

    def find_steps(self) -> None:
        """The unit of each parameter: 1 over the root of its Fisher information; a step of differences is a small part of it."""
        size = [max(abs(e * self.theta[name]).max(), 1e-3) for name, _, e in self.moves]
        self.steps = 1e-6 * np.array(size)
        x = self.draws[:400]
        units = []
        for i in range(self.size):
            score = (self.log_prob(self.moved(i, 1), x) - self.log_prob(self.moved(i, -1), x)) / (2 * self.steps[i])
            square = np.mean(score**2, 0, where=np.isfinite(score))
            units.append(1 / np.sqrt(square.max()) if np.nanmax(square) > 1e-16 else size[i])
        self.steps = STEP * np.minimum(units, np.where(np.array(size) > 1e-3, 10 * np.array(size), np.inf))

    # ---- the estimator

    def attached(self, eta: Any, x: Array, pushed: bool = False) -> tuple[Array, Array | None, Array | None]:
        """Value, score and log weight of the estimator at a host's x; the value before the site's transforms unless ``pushed``."""
        target = self.target(eta, len(x))
        if not pushed:
            target.transforms = []
        draw = attach(self.ops, target, self.estimator, x)
        return draw.value, draw.score, draw.log_weight

    @cached_property
    def _field(self) -> Callable[[Array], list[np.ndarray]]:
        def f(eta: Array, x: Array) -> list[Array]:
            value, score, _ = self.attached(eta, x)
            found = [] if self.discrete else [self.flat(value)]
            return found if score is None else [*found, score]

        return self.host.jacobian(f, self.size)

    def field(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u, of the shape of x and D, and psi, of batch shape and D."""
        found = [derivative[: len(x)] for derivative in self._field(self.shaped(self.padded(x)))]
        u = np.zeros((*x.shape, self.size)) if self.discrete else found.pop(0)
        return u, found[0] if found else np.zeros((*x.shape[:-1], self.size))

    @cached_property
    def _drawn(self) -> Callable[[Array], list[np.ndarray]]:
        def f(eta: Array, x: Array) -> list[Array]:
            value, score, log_weight = self.attached(eta, x)
            zero = 0 * self.flat(x).sum(-1)
            value = zero if self.discrete else zero + self.flat(value).sum(-1)
            return [value, zero if score is None else score, zero if log_weight is None else log_weight]

        return self.host.values(f, self.size)

    def drawn(self, x: np.ndarray) -> list[np.ndarray]:
        """The sum over the value of the estimator, its score and its log weight, each of batch shape."""
        return [a[: len(x)] for a in self._drawn(self.shaped(self.padded(x)))]

    # ---- coordinates of the support

    def chart(self, target: Any) -> Chart | None:
        """Real coordinates of the support for one value of the parameters; None where it is of an unknown kind."""
        support, event_ndim = target.support, target.event_ndim
        if self.discrete:
            return None
        if support.kind == "_Simplex" and event_ndim == 1:
            return Chart(True, np.zeros(1), np.zeros(1))
        if support.kind != "coordinates":
            return None
        sides = (-math.pi, math.pi) if self.on_circle else (support.lower, support.upper)
        bounds = [np.asarray(number(b), float) for b in sides]
        bounds = [b.reshape((*b.shape, *[1] * event_ndim)) if b.ndim else b for b in bounds]
        low, high = (np.broadcast_to(b, (1, *self.still.shape[1:])).reshape((*self.batch, -1)) for b in bounds)
        return Chart(False, low, high)

    @property
    def on_circle(self) -> bool:
        return family_of(self.still.p).circle

    @cached_property
    def coordinates(self) -> Coordinates:
        chart = self.chart(self.still)
        y = chart.to_y(self.draws)  # type: ignore[union-attr]
        ok = np.isfinite(y).reshape(len(y), -1).all(1)
        return Coordinates.fitted(y[ok])

    @cached_property
    def middle(self) -> np.ndarray:
        """A point (*batch, d) well inside the support."""
        return self.draws[0] if self.chart(self.still) is None else self.chart(self.still).to_x(self.coordinates.centre)  # type: ignore[union-attr]

    def riding(self, eta: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The x at chart coordinates y, which rides moving bounds, and the log density of p over y."""
        chart = self.chart(self.target(eta, 1))
        if chart is None:
            return y, self.log_prob(eta, y)
        x = chart.to_x(y)
        inside = chart.inside(x)
        x = np.where(inside[..., None], x, self.middle)
        log_p = self.log_prob(eta, x) + chart.log_slope(y)
        return x, np.where(inside & np.isfinite(log_p), log_p, -np.inf)

    @cached_property
    def points(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Chart coordinates y and log weights over y of a rule that integrates p to 1, or None where there is none."""
        y, log_w = self._rule()
        if y is None:
            return None
        _, log_p = self.riding(self.moved(), y)
        mass = np.exp(log_p + log_w)
        trusted = abs(mass.sum(0) - 1) < self.tolerance / 10
        if (odd := self._odd(y)) is not None:
            trusted &= abs(mass[odd].sum(0) - 0.5) < self.tolerance
        return (y, log_w) if trusted.all() else None

    @cached_property
    def massive(self) -> tuple[np.ndarray, np.ndarray]:
        """Points x and the mass of each: those of the rule, the others put in the middle; or the draws."""
        if self.points is None:
            return self.draws, np.full(self.draws.shape[:-1], 1 / len(self.draws))
        y, log_w = self.points
        x, log_p = self.riding(self.moved(), y)
        mass = np.exp(log_p + log_w)
        return np.where((mass > SEEN)[..., None], x, self.middle), mass

    def _odd(self, y: np.ndarray) -> np.ndarray | None:
        """In two dimensions every other point, as on a chessboard: a rule of its own."""
        return None if self.discrete or y.shape[-1] < 2 else np.indices((SIDE, SIDE)).sum(0).reshape(-1) % 2 == 1

    def _rule(self) -> tuple[Any, Any]:
        support = self.still.support
        if self.discrete:
            like = np.asarray(number(self.host.sample(self.target(self.moved(), 1), self.still.p0, self.seed)))
            if support.kind == "_OneHot":
                k = np.eye(like.shape[-1])
            elif support.kind == "coordinates" and self.still.event_ndim == 0:
                found = integers(
                    number(support.lower),
                    number(support.upper),
                    lambda k: self.log_prob(self.moved(), self.everywhere(k[:, None].astype(like.dtype))),
                )
                if found is None:
                    return None, None
                k = found[:, None]
            else:
                return None, None
            y = self.everywhere(k.astype(like.dtype))
            return y, np.zeros(y.shape[:-1])
        chart = self.chart(self.still)
        d = self.draws.shape[-1] - (chart is not None and chart.simplex)
        if chart is None or d > 2:
            return None, None

        def log_density(t: np.ndarray) -> np.ndarray:
            return self.riding(self.moved(), self.coordinates.to_y(t))[1] + self.coordinates.log_slope(t)

        t_of = lambda x: self.coordinates.to_t(chart.to_y(x))  # noqa: E731
        samples = t_of(self.draws[:400])
        samples = np.where(np.isfinite(samples), samples, 0.0)
        t, w = nodes(log_density, samples, t_of(self._kinks(chart)) if d == 1 else np.zeros((0, 1)))
        with np.errstate(divide="ignore"):
            return self.coordinates.to_y(t), np.log(w) + self.coordinates.log_slope(t)

    def everywhere(self, k: np.ndarray) -> np.ndarray:
        """Points (n, d) for every element of the batch."""
        return np.broadcast_to(k.reshape((len(k), *[1] * len(self.batch), -1)), (len(k), *self.batch, k.shape[-1])).copy()

    def _kinks(self, chart: Chart) -> np.ndarray:
        """Where the density may have kinks: at those of its parameters that lie inside the support."""
        values = np.unique(
            np.concatenate([np.ravel(number(p.value)) for _, p in named("", self.still.p0)] or [np.zeros(0)]).astype(float)
        )
        kinks = self.everywhere(values[:, None])
        return kinks[chart.inside(kinks).reshape(len(kinks), -1).all(1)]

    # ---- means

    @cached_property
    def scale_of_value(self) -> tuple[np.ndarray, np.ndarray]:
        value = self.flat(np.asarray(number(self.still.push(self.shaped(self.draws))), float))
        low, centre, high = np.quantile(value, [0.25, 0.5, 0.75], axis=0)
        spread = (high - low) / 1.35
        return centre, np.where(spread > 0, spread, 1.0)

    def costs(self, value: Array) -> list[Array]:
        """The battery at the site's value, the constant first: each of the shape (n, *batch)."""
        ops: Any = np if isinstance(value, np.ndarray) else self.ops
        value = self.flat(value)
        one = 0 * value.sum(-1) + 1
        if self.on_circle:
            v = value[..., 0]
            periodic = [ops.cos(v - 1), ops.sin(2 * v) + 0.3 * ops.cos(v)]
            return [one, *periodic, *([] if self.periodic_only else [0.5 * v + ops.sin(v)])]
        array = np.asarray if ops is np else self.host.array
        centre, spread = map(array, self.scale_of_value)
        z = (value - centre) / spread
        n = z.shape[-1]
        a, b = (array(np.cos(c * np.arange(n)) if n > 1 else np.ones(1)) for c in (1.0, 2.5))
        first, second = (z * a).sum(-1), (z * b).sum(-1)
        return [one, ops.tanh(first - 0.5), 1 / (1 + second**2), ops.log1p((first + 0.3) ** 2)]

    periodic_only = False
    costs_said = ("1", "tanh(z - 1/2)", "1/(1 + z^2)", "log(1 + (z + 0.3)^2)")

    def said(self, j: int) -> str:
        return ("1", "cos(x - 1)", "sin(2x) + 0.3 cos(x)", "x/2 + sin(x)")[j] if self.on_circle else self.costs_said[j]

    def costs_at(self, x: np.ndarray, eta: np.ndarray | None = None) -> np.ndarray:
        """The battery at the value that x has under eta, (costs, n, *batch)."""
        target = self.still if eta is None else self.target(eta, 1)
        value = number(target.push(self.shaped(x))) if target.transforms else x
        return np.stack(self.costs(np.asarray(value, float)))

    def stacked(self, value: Array, score: Array | None, weights: Array) -> Array:
        """The terms w (phi(value) + score sg(phi)), costs first, whose derivatives are the estimates."""
        costs = self.ops.stack(self.costs(value), 0)
        return weights * (costs if score is None else costs + score * self.ops.stop_gradient(costs))

    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """The expectation of the estimator, (costs, *batch, D), by the rule, and how far its halves differ in two dimensions."""
        assert self.points is not None
        y, log_w = self.points
        x, c = self.massive
        keep = c > SEEN
        if self.estimator.q is not None:
            target = self.target(self.moved(), len(x))
            q, _ = self.estimator.proposal(self.ops, target)
            log_q = np.asarray(number(target.to_batch(q.log_prob(self.shaped(x)))))
            chart = self.chart(self.still)
            slope = 0.0 if chart is None else chart.log_slope(y)
            log_weight = self.drawn(x)[2]
            c = np.exp(log_q + log_weight + slope + log_w)
        c, odd = self.host.array(np.where(keep, c, 0.0)), self._odd(y)
        halves = [] if odd is None else [self.host.array(half.reshape((-1, *[1] * len(self.batch))) * 1.0) for half in (odd, ~odd)]
        live = self.shaped(x)

        def f(eta: Array) -> list[Array]:
            value, score, _ = self.attached(eta, live, pushed=True)
            terms = self.stacked(value, score, c)
            return [terms.sum(1)] if odd is None else [2 * (terms * half).sum(1) for half in halves]

        found = self.host.jacobian(f, self.size)()
        return (found[0], 0 * found[0]) if odd is None else ((found[0] + found[1]) / 2, abs(found[0] - found[1]))

    def truth(self) -> np.ndarray:
        """The derivatives of the mean costs, (costs, *batch, D), by differences of the rule."""
        assert self.points is not None
        y, log_w = self.points

        def mean(eta: np.ndarray) -> np.ndarray:
            x, log_p = self.riding(eta, y)
            return (np.exp(log_p + log_w) * self.costs_at(x, eta)).sum(1)

        return self.along(mean)

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of the estimator and, at the same draws, of the likelihood ratio by differences: (costs, CHUNKS, *batch, D)."""
        n = self.num_samples // CHUNKS
        by_path = self.estimator.uses_sampler
        x, weights = self.proposed
        parts = x.reshape((CHUNKS, n, *x.shape[1:]))
        w = weights.reshape((CHUNKS, n, *weights.shape[1:]))

        def f(eta: Array, chunks: range) -> Array:
            at = slice(chunks.start, chunks.stop)
            m = len(chunks)
            if by_path:
                value, score = self.host.path(self.distribution(eta, m * n), self.seed + 7 + chunks.start), None
                c = self.host.array(np.ones((m * n, *self.batch)))
            else:
                value, score, _ = self.attached(eta, self.shaped(parts[at].reshape((m * n, *x.shape[1:]))), pushed=True)
                c = self.host.array(w[at].reshape((m * n, *self.batch)))
            costs = self.stacked(value, score, c)
            return costs.reshape((costs.shape[0], m, n, *self.batch)).mean(2)

        estimates = self.host.means(f, self.size, CHUNKS)
        if self.points is not None:
            return estimates, self.truth()[:, None]
        chart = self.chart(self.still)
        y = x if chart is None else chart.to_y(x)
        base = self.riding(self.moved(), y)[1]

        def reweighted(eta: np.ndarray) -> np.ndarray:
            moved, log_p = self.riding(eta, y)
            terms = weights * np.exp(log_p - base) * self.costs_at(moved, eta)
            return terms.reshape((len(terms), CHUNKS, n, *self.batch)).mean(2)

        return estimates, self.along(reweighted)

    @cached_property
    def proposed(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws x of the estimator's sampling density, and their weights."""
        if self.estimator.q is None:
            return self.draws, np.ones(self.draws.shape[:-1])
        target = self.target(self.moved(), self.num_samples)
        q, _ = self.estimator.proposal(self.ops, target)
        x = self.flat(number(self.host.sample(target, q, self.seed + 1)))
        log_weight = self.drawn(x)[2]
        x = np.where((log_weight > -np.inf)[..., None], x, self.middle)
        return x, np.exp(log_weight)


def worst(error: np.ndarray, of_nan: float = np.inf) -> tuple[float, tuple[Any, ...]]:
    """The largest error and its index."""
    error = np.where(np.isnan(error), of_nan, error)
    index = np.unravel_index(error.argmax(), error.shape)
    return float(error[index]), tuple(int(i) for i in index)


def at(x: np.ndarray) -> str:
    """A point, as messages have it."""
    x = np.asarray(x).reshape(-1)
    return f"x = {x[0]:.4g}" if x.size == 1 else f"x = [{', '.join(f'{v:.4g}' for v in x[:6])}{', ...' if x.size > 6 else ''}]"


def number(a: Any) -> Any:
    """An array of either host as NumPy's."""
    return a.detach().cpu().numpy() if hasattr(a, "detach") else np.asarray(a)

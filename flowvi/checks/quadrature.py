"""Points and weights over the support of a distribution, for the exact part of :func:`flowvi.check_estimator`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FAR = 36.0  # where exp(-t) is below a double's last digit
CLOSE = 30.0  # as near to a bound, in its logarithm, as a double has digits for
EVEN, QUANTILES, KINKS, ORDER, SIDE = 26, 30, 8, 8, 56  # 64 panels of 8 points; 56 times 56 points


@dataclass(frozen=True)
class Chart:
    """Real coordinates y of a support: x itself, a logarithm at one bound, a logit between two, log ratios on the simplex.

    Attributes:
        simplex: Whether the support is the simplex.
        low: The lower bound, of a shape that broadcasts to that of x.
        high: The upper bound.
    """

    simplex: bool
    low: np.ndarray
    high: np.ndarray

    def to_x(self, y: np.ndarray) -> np.ndarray:
        if self.simplex:
            y = np.concatenate([y, np.zeros((*y.shape[:-1], 1))], -1)
            e = np.exp(y - y.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        low, high = np.where(below, self.low, 0.0), np.where(above, self.high, 0.0)
        with np.errstate(over="ignore"):
            share = (high - low) / (1 + np.exp(abs(y)))
            inside = np.where(y > 0, high - share, low + share)
            return np.where(below & above, inside, np.where(below, low + np.exp(y), np.where(above, high - np.exp(-y), y)))

    def to_y(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.simplex:
                return np.log(x[..., :-1]) - np.log(x[..., -1:])
            below, above = np.isfinite(self.low), np.isfinite(self.high)
            return (
                np.where(below, np.log(x - np.where(below, self.low, 0)), 0)
                - np.where(above, np.log(np.where(above, self.high, 0) - x), 0)
                + np.where(below | above, 0, x)
            )

    def log_slope(self, y: np.ndarray) -> np.ndarray:
        """The log of |dx/dy|, on the simplex of its first coordinates."""
        if self.simplex:
            y = np.concatenate([y, np.zeros((*y.shape[:-1], 1))], -1)
            return (y - np.logaddexp.reduce(y, -1, keepdims=True)).sum(-1)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        width = np.where(below & above, self.high - self.low, 1.0)
        between = np.log(width) - abs(y) - 2 * np.log1p(np.exp(-abs(y)))
        return np.where(below & above, between, np.where(below, y, np.where(above, -y, 0 * y))).sum(-1)

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest y at which a double tells x well apart from a bound."""
        if self.simplex:
            return np.array(-np.inf), np.array(np.inf)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.where(below & above, self.high - self.low, 1.0)
            low = np.where(below & (self.low != 0), np.log(abs(self.low) / unit) - CLOSE, -np.inf)
            high = np.where(above & (self.high != 0), CLOSE - np.log(abs(self.high) / unit), np.inf)
        return low, high

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Whether x is told apart from the bounds, and finite."""
        with np.errstate(invalid="ignore"):
            ok = np.isfinite(x) & (x > 0 if self.simplex else (x > self.low) & (x < self.high))
        return ok.all(-1)


@dataclass(frozen=True)
class Coordinates:
    """y = centre + spread sinh(t): the mass lies within |t| of a few, and every tail decays at least exponentially in t."""

    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def fitted(cls, y: np.ndarray) -> Coordinates:
        """To samples (n, *batch, d)."""
        centre = np.quantile(y, 0.5, axis=0)
        near = np.clip(y, *np.quantile(y, [0.1, 0.9], axis=0)) - centre
        covariance = (near[..., :, None] * near[..., None, :]).mean(0)
        unit = np.eye(y.shape[-1])
        return cls(
            centre,
            1.5 * np.linalg.cholesky(covariance + 1e-12 * unit * (1 + np.trace(covariance, axis1=-2, axis2=-1)[..., None, None])),
        )

    def to_y(self, t: np.ndarray) -> np.ndarray:
        return self.centre + (self.spread @ np.sinh(t)[..., None])[..., 0]

    def to_t(self, y: np.ndarray) -> np.ndarray:
        spread = np.broadcast_to(self.spread, (*y.shape, y.shape[-1]))
        return np.arcsinh(np.linalg.solve(spread, (y - self.centre)[..., None])[..., 0])

    def log_slope(self, t: np.ndarray) -> np.ndarray:
        return (np.logaddexp(t, -t) - np.log(2)).sum(-1) + np.log(abs(np.diagonal(self.spread, axis1=-2, axis2=-1))).sum(-1)


Density = Callable[[np.ndarray], np.ndarray]


def nodes(log_density: Density, t: np.ndarray, kinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, *batch, d) and weights (N, *batch) in t, for d = 1 or 2.

    In one dimension Gauss-Legendre panels between quantiles of the samples ``t``, ``kinks`` (at most KINKS of them) and an even grid;
    in two the midpoint rule on a square.
    """
    low, high = _reach(log_density, t.shape[1:])
    if t.shape[-1] == 1:
        even = low + (high - low) * np.linspace(0, 1, EVEN + 1).reshape(-1, *[1] * (t.ndim - 1))
        quantiles = np.quantile(t, (np.arange(QUANTILES) + 0.5) / QUANTILES, axis=0)
        kinks = np.broadcast_to(kinks[:KINKS].reshape(-1, *kinks.shape[1:]), (min(len(kinks), KINKS), *t.shape[1:]))
        kinks = np.concatenate([kinks, np.broadcast_to(low, (KINKS - len(kinks), *t.shape[1:]))])
        ends = np.sort(np.clip(np.concatenate([even, quantiles, kinks]), low, high), axis=0)
        z, w = (a.reshape(1, -1, *[1] * (t.ndim - 1)) for a in np.polynomial.legendre.leggauss(ORDER))
        middle, half = (ends[1:] + ends[:-1])[:, None] / 2, (ends[1:] - ends[:-1])[:, None] / 2
        return (middle + half * z).reshape(-1, *t.shape[1:]), (half * w + 0 * z).reshape(-1, *t.shape[1:])[..., 0]
    step = (high - low) / SIDE
    corner = np.stack(np.meshgrid(*[np.arange(SIDE) + 0.5] * 2, indexing="ij"), -1).reshape(-1, *[1] * (t.ndim - 2), 2)
    points = low + step * corner
    return points, np.broadcast_to(step.prod(-1), points.shape[:-1])


def _reach(log_density: Density, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A box, of the shape (*batch, d), that holds all mass that a double can see."""
    d = shape[-1]
    far, n = (FAR, 241) if d == 1 else (FAR / 3, 33)
    axis = np.linspace(-far, far, n)
    grid = np.stack(np.meshgrid(*[axis] * d, indexing="ij"), -1).reshape(-1, *[1] * (len(shape) - 1), d)
    log_p = log_density(np.broadcast_to(grid, (len(grid), *shape)))
    seen = (log_p > log_p.max(0) - FAR)[..., None]
    step = axis[1] - axis[0]
    return np.where(seen, grid, np.inf).min(0) - step, np.where(seen, grid, -np.inf).max(0) + step


def integers(
    lower: np.ndarray, upper: np.ndarray, log_mass: Callable[[np.ndarray], np.ndarray], limit: int = 4096
) -> np.ndarray | None:
    """The integers of a discrete support, as far as they have mass; None where they do not end."""
    low, high = int(np.min(lower)), np.max(upper)
    if np.isfinite(high):
        return np.arange(low, int(high) + 1) if high - low < limit else None
    k = np.arange(low, low + limit)
    mass = np.exp(log_mass(k))
    rest = 1 - np.cumsum(mass.reshape(limit, -1), 0).min(-1)
    return k[: int(np.argmax(rest < 1e-12)) + 2] if (rest < 1e-12).any() else None

"""Real coordinates of a support, in which a density decays towards every end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLOSE = 30.0  # the smallest distance from a bound, as a logarithm, that a double can represent


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
        """The log of |dx/dy|; on the simplex for all but the last coordinate."""
        if self.simplex:
            y = np.concatenate([y, np.zeros((*y.shape[:-1], 1))], -1)
            return (y - np.logaddexp.reduce(y, -1, keepdims=True)).sum(-1)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        width = np.where(below & above, self.high - self.low, 1.0)
        between = np.log(width) - abs(y) - 2 * np.log1p(np.exp(-abs(y)))
        return np.where(below & above, between, np.where(below, y, np.where(above, -y, 0 * y))).sum(-1)

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest y at which a double can distinguish x from a bound."""
        if self.simplex:
            return np.array(-np.inf), np.array(np.inf)
        below, above = np.isfinite(self.low), np.isfinite(self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.where(below & above, self.high - self.low, 1.0)
            low = np.where(below & (self.low != 0), np.log(abs(self.low) / unit) - CLOSE, -np.inf)
            high = np.where(above & (self.high != 0), CLOSE - np.log(abs(self.high) / unit), np.inf)
        return low, high

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Whether x is distinct from the bounds, and finite."""
        with np.errstate(invalid="ignore"):
            ok = np.isfinite(x) & (x > 0 if self.simplex else (x > self.low) & (x < self.high))
        return ok.all(-1)


@dataclass(frozen=True)
class Coordinates:
    """y = centre + spread sinh(t): the mass lies at |t| of a few units, and every tail decays at least exponentially in t."""

    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def fitted(cls, y: np.ndarray) -> Coordinates:
        """Coordinates fitted to samples (n, *batch, d)."""
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

"""Points and weights of a rule that sums or integrates over a support of one or two dimensions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FAR = 36.0  # exp(-36) is below a double's last digit
EVEN, QUANTILES, KINKS, ORDER, SIDE = 26, 30, 8, 8, 56  # 64 panels of 8 points; 56 times 56 points

Density = Callable[[np.ndarray], np.ndarray]


def nodes(log_density: Density, t: np.ndarray, kinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, *batch, d) and weights (N, *batch) in t, for d = 1 or 2.

    In one dimension, Gauss-Legendre panels between quantiles of the samples ``t``, ``kinks`` (at most KINKS of them) and an even grid;
    in two dimensions, the midpoint rule on a square.
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
    """The integers of a discrete support that have mass; None if there are too many."""
    low, high = int(np.min(lower)), np.max(upper)
    if np.isfinite(high):
        return np.arange(low, int(high) + 1) if high - low < limit else None
    k = np.arange(low, low + limit)
    mass = np.exp(log_mass(k))
    rest = 1 - np.cumsum(mass.reshape(limit, -1), 0).min(-1)
    return k[: int(np.argmax(rest < 1e-12)) + 2] if (rest < 1e-12).any() else None

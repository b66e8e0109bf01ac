"""Derivatives by differences, and the largest error of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

STENCIL = {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12}  # of a first derivative, to order 4
STEP = 2e-4  # in the natural unit of each coordinate


def difference(f: Callable[[int], np.ndarray]) -> np.ndarray:
    """The derivative of ``f(k)`` at k = 0."""
    return sum(c * f(k) for k, c in STENCIL.items())  # type: ignore[return-value]


def worst(error: np.ndarray, of_nan: float = np.inf) -> tuple[float, tuple[Any, ...]]:
    """The largest error and its index."""
    error = np.where(np.isnan(error), of_nan, error)
    index = np.unravel_index(error.argmax(), error.shape)
    return float(error[index]), tuple(int(i) for i in index)


def at(x: np.ndarray) -> str:
    """A point, as messages show it."""
    x = np.asarray(x).reshape(-1)
    return f"x = {x[0]:.4g}" if x.size == 1 else f"x = [{', '.join(f'{v:.4g}' for v in x[:6])}{', ...' if x.size > 6 else ''}]"

"""Sums over plates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from flowvi.dependence import Frame
from flowvi.ops import Array


def sum_to(x: Array, frames: Iterable[Frame]) -> Array:
    """Sum over every batch dim that is not the dim of one of ``frames``, and drop leading dims of size 1."""
    axes, shape = _summed(x.shape, frozenset(frames))
    if axes:
        x = x.sum(axis=axes, keepdims=True) if shape else x.sum()
    return x if x.shape == shape else x.reshape(shape)


@lru_cache(maxsize=256)  # the same at every step of most programs
def _summed(shape: tuple[int, ...], frames: frozenset[Frame]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes over which an array of ``shape`` is summed, and the remaining shape."""
    kept = {frame.dim for frame in frames}
    axes = tuple(dim for dim in range(-len(shape), 0) if dim not in kept and shape[dim] != 1)
    left = tuple(shape[dim] if dim in kept else 1 for dim in range(-len(shape), 0))
    ones = next((i for i, size in enumerate(left) if size != 1), len(left))
    return axes, left[ones:]

"""Supports that can be compared, and whether they move with a live parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowvi.family import family_of

THIN_SUPPORTS = {
    "_Simplex": "simplex",
    "_Sphere": "sphere",
    "_ZeroSum": "zero-sum vectors",
    "_CorrCholesky": "Cholesky factors of correlation matrices",
    "_CorrMatrix": "correlation matrices",
    "_PositiveDefinite": "symmetric matrices",
    "_PositiveSemiDefinite": "symmetric matrices",
    "_PositiveDefiniteCirculantVector": "circulant vectors",
    "_LowerCholesky": "triangular matrices",
    "_LowerTriangular": "triangular matrices",
    "_UnitLowerCholesky": "triangular matrices",
    "_ScaledUnitLowerCholesky": "triangular matrices",
    "_SoftplusLowerCholesky": "triangular matrices",
}


class Support(NamedTuple):
    """A support that can be compared with others: coordinates between bounds, or the name of another kind.

    Both hosts give their constraints the same class names, so one function reads both.
    """

    kind: str
    discrete: bool
    lower: Any = -math.inf
    upper: Any = math.inf

    @classmethod
    def of(cls, constraint: Any) -> Support:
        if constraint is None:  # NumPyro's discrete distributions of TensorFlow Probability
            return cls("unknown", True)
        while hasattr(constraint, "base_constraint"):
            constraint = constraint.base_constraint
        kind = type(constraint).__name__
        if kind == "_Real":
            return REAL
        if kind == "_Boolean":
            return cls("coordinates", True, 0, 1)
        bounds = {side: getattr(constraint, f"{side}_bound") for side in ("lower", "upper") if hasattr(constraint, f"{side}_bound")}
        if kind == "_Multinomial" or not (bounds or kind == "_Integer"):
            return cls(kind, constraint.is_discrete)
        return cls("coordinates", constraint.is_discrete, **bounds)

    @property
    def fixed(self) -> bool:
        """Whether the bounds are plain numbers."""
        return isinstance(self.lower, (int, float)) and isinstance(self.upper, (int, float))

    @property
    def chart(self) -> str | None:
        """None for a support of full dimension, else ``"simplex"`` or the name of a thin support without a known chart."""
        return THIN_SUPPORTS.get(self.kind)

    def fills(self, domain: Support) -> bool:
        """Whether it is known to be a transform's whole ``domain``; then its image is the whole codomain."""
        known = self.kind == "coordinates" or self.kind in THIN_SUPPORTS
        return known and self.fixed and domain.fixed and self == domain

    def __str__(self) -> str:
        if self.kind != "coordinates":
            return self.kind.strip("_")
        return f"{'integers' if self.discrete else 'numbers'} from {self.lower} to {self.upper}"


REAL = Support("coordinates", False)

Moves = Callable[[Any], bool]


def moving_bounds(support: Support, transformed: tuple[Any, list[Any]] | None, moves: Moves) -> list[str]:
    """The names of the bounds of a support that move with a live parameter.

    Args:
        support: The support.
        transformed: The base of a transformed distribution, and its transforms in the order in which they act; None otherwise.
        moves: Whether a bound or a transform moves.
    """
    moving = _moving("its", support, moves)
    if transformed is not None:
        base, transforms = transformed
        of_base = Support.of(base.support)
        moving += _moving("its base's", of_base, moves)
        if not family_of(base).vanishing:
            moving += _moved_by(transforms, of_base, moves)
    return moving


def _moved_by(transforms: list[Any], support: Support, moves: Moves) -> list[str]:
    """The names of the transforms that move the image of a fixed ``support``."""
    moving = []
    for transform in [step for t in transforms for step in _steps(t)]:
        name = type(transform).__name__
        if support.fills(Support.of(transform.domain)):
            support = Support.of(transform.codomain)
            moving += _moving(f"{name}'s", support, moves)
        elif moves(transform):
            moving.append(name)
        else:
            support = Support("unknown", support.discrete)
    return moving


def _moving(whose: str, support: Support, moves: Moves) -> list[str]:
    if support.fixed:
        return []
    bounds = {"lower": support.lower, "upper": support.upper}
    return [f"{whose} {side} bound" for side, bound in bounds.items() if moves(bound)]


def _steps(transform: Any) -> list[Any]:
    """The parts of a composed transform; the codomain of a composition is only that of its last part."""
    transform = getattr(transform, "base_transform", transform)  # of an IndependentTransform
    return [step for t in transform.parts for step in _steps(t)] if hasattr(transform, "parts") else [transform]

"""Importance weights of costs."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

from flowvi.dependence import Ancestor
from flowvi.objectives.plates import sum_to
from flowvi.ops import Array, Ops


def weight_of(ops: Ops, log_weights: Mapping[str, Array], ancestors: frozenset[Ancestor]) -> Array | None:
    """The product of the ancestors' weights: elementwise in the plates of the :class:`Ancestor`, multiplied over all others."""
    weighted = sorted((ancestor for ancestor in ancestors if ancestor.name in log_weights), key=itemgetter(0)) if log_weights else ()
    return ops.exp(sum(sum_to(log_weights[name], frames) for name, frames in weighted)) if weighted else None


def weigh(ops: Ops, log_weights: Mapping[str, Array], ancestors: frozenset[Ancestor], cost: Array) -> Array:
    """A cost, summed over the dims outside its plates, times its weight; 0 where the weight is 0, even if the cost is infinite."""
    weight = weight_of(ops, log_weights, ancestors)
    return cost if weight is None else ops.where(weight > 0, weight * cost, weight)

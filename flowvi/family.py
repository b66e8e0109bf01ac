"""What flowvi knows about a named family of distributions, and the table of all families, which :mod:`flowvi.families` fills.

The two are separate modules because fields and proposals look families up, and the entries name fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from flowvi.ops import Array, Ops

if TYPE_CHECKING:
    from flowvi.fields.field import Field
    from flowvi.relaxations import Relaxation

Standardization = Callable[[Ops, Array, Any], Array]


@dataclass(frozen=True)
class SymmetricPeak:
    """A density f of z = (x - loc) / scale with one peak, symmetric about it.

    Attributes:
        slope: ``slope(ops, p, z)`` is abs(d log f / dz), for z > 0.
        level: ``level(ops, p, v)`` is the z > 0 where f / f(0) is v.
    """

    slope: Callable[[Ops, Any, Array], Array]
    level: Callable[[Ops, Any, Array], Array]


@dataclass(frozen=True)
class SkewPeak:
    """A density with one peak that is not symmetric, between fixed ends at which it is 0.

    Attributes:
        mode: ``mode(ops, p)`` is where the peak is. None: the density only falls from the lower end, so only the upper end of a slice
            moves.
        support: The ends.
        shapes: The parameters that must be above 1 for such a peak to exist.
    """

    mode: Callable[[Ops, Any], Any] | None
    support: tuple[float, float] = (0.0, math.inf)
    shapes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """A parameter that stretches the family: x = unit z, or x = loc + unit z if the peak is symmetric, and z has the density f.

    Attributes:
        parameter: Its name.
        balance: ``balance(ops, p, z)`` is 1 + z d log f / dz, for z > 0.
        peak: ``peak(p)`` is the z where the balance is 0, and z f(z) is largest.
        unit: ``unit(p)``, in terms of the parameter.
    """

    parameter: str
    balance: Callable[[Ops, Any, Array], Array]
    peak: Callable[[Any], Any] = lambda p: 1.0
    unit: Callable[[Any], Array] = lambda p: p.scale


@dataclass(frozen=True)
class Neighbours:
    """The weights of the neighbours of an integer k of the support; see :mod:`flowvi.neighbours`.

    Attributes:
        above: ``above(ops, p, k)`` is the weight of k + 1.
        below: ``below(ops, p, k)`` is the weight of k - 1.
        constant: The parameters in which these weights have no derivative; they must be constants.
        next: ``next(ops, p, k, step)`` is the neighbour in the direction of ``step``, 1 or -1 (k if there is none), and whether its
            probability is positive. None: k + step.
    """

    above: Callable[[Ops, Any, Array], Array]
    below: Callable[[Ops, Any, Array], Array]
    constant: tuple[str, ...] = ()
    next: Callable[[Ops, Any, Array, int], tuple[Array, Array]] | None = None


@dataclass(frozen=True)
class WeakDerivative:
    """The derivative of a distribution in one parameter as weighted values; see :mod:`flowvi.weak_derivatives`.

    Attributes:
        weighted: ``weighted(ops, p, x, u)`` are the values, detached, each with its live weight. x is a draw, u a uniform number.
        num_values: The number of values.
    """

    weighted: Callable[[Ops, Any, Array, Array], list[tuple[Array, Array]]]
    num_values: int = 1


@dataclass(frozen=True)
class Family:
    """What is known about a family. An estimator or a sampling density that needs an empty column refuses the family.

    Attributes:
        name: The name of its class.
        parameters: The names of its parameters.
        separate: Whether the derivative of the host's ``log_prob`` in each array of ``parameters`` is the score of this array alone, as
            the baseline ``"optimal"`` needs it.
        standardization: S(x, p), whose law does not depend on the parameters and which increases along the host's sampler. Without it,
            ``RP(q=...)`` uses the cdf.
        standardized: The sample, transformed to be roughly a standard Normal, for the bumps of ``AdaptiveFlow``. Without it, the sample
            is standardized by its mean and variance.
        moves: The parameters that a learned q moves: ``loc`` is shifted, the others, which are positive, are multiplied.
        tempered: ``tempered(p, t)`` are the parameters whose natural parameters are those of p divided by t.
        peak: A description of a density with one peak, for its horizontal slices.
        stretch: A description of a scale or a rate, for its optimal sampling density.
        vanishing: Whether the tails are so light that the density still vanishes at an end made by exp, a sigmoid and the like.
        circle: Whether the values are angles from -pi to pi.
        binary: Whether it is a Bernoulli, with both ``probs`` and ``logits``.
        masses: ``masses(ops, p, values)``: the probabilities of all values of a finite support, which the host enumerates along the
            first dim. Without it they come from ``log_prob``.
        neighbours: For integers, the weights of the two neighbours of a value. Without them they come from the cdf.
        weak_derivatives: The weak derivatives by parameter; ``"sum"`` if they are the sum over ``masses``.
        relaxation: The continuous variable of which it is a function; see :mod:`flowvi.relaxations`.
        fields: The functions of :mod:`flowvi.fields` that make a field for it; the first one makes the default pathwise field.
    """

    name: str
    parameters: tuple[str, ...] = ()
    separate: bool = False
    standardization: Standardization | None = None
    standardized: Standardization | None = None
    moves: tuple[str, ...] = ()
    tempered: Callable[[Any, float], dict[str, Any]] | None = None
    peak: SymmetricPeak | SkewPeak | None = None
    stretch: Stretch | None = None
    vanishing: bool = False
    circle: bool = False
    binary: bool = False
    masses: Callable[[Ops, Any, Array], Array] | None = None
    neighbours: Neighbours | None = None
    weak_derivatives: Mapping[str, WeakDerivative] | Literal["sum"] = field(default_factory=dict)
    relaxation: Relaxation | None = None
    fields: tuple[Callable[[], Field], ...] = ()

    @property
    def symmetric(self) -> bool:
        """Whether it is symmetric about its ``loc``."""
        return isinstance(self.peak, SymmetricPeak)

    @cached_property
    def pathwise(self) -> Field | None:
        """The default pathwise field."""
        return self.fields[0]() if self.fields else None


FAMILIES: dict[str, Family] = {}
_UNKNOWN = Family("unknown")


def family_of(p: Any) -> Family:
    """The entry of a distribution's family, by the name of its class; an empty entry for an unknown class."""
    return FAMILIES.get(type(p).__name__, _UNKNOWN)


def names(known: Callable[[Family], Any]) -> tuple[str, ...]:
    """The names of the families for which ``known(family)`` is true or not empty."""
    return tuple(family.name for family in FAMILIES.values() if known(family))


def families_with(field: Callable[..., Field]) -> tuple[str, ...]:
    """The names of the families whose entry lists a function that makes a field."""
    return names(lambda family: field in family.fields)

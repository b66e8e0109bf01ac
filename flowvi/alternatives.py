r"""The cost at several values of one site.

A site may have *alternatives* to its draw x: values :math:`y_m` in the shape of x, and weights :math:`c_m` with live tangents. Its
gradient is then that of

.. math:: \sum_m \mathrm{tether}(c_m)\,\bigl(\phi(y_m) - \phi(x)\bigr),

where :math:`\phi(y) - \phi(x)` is the difference of the weighted costs that depend on the site, between a run in which the site has the
value y and the first run. Draws before the site keep their values; draws after the site are made again with the same random numbers.
Each site contributes by itself, so the evaluations of the program add up over sites and never multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flowvi.ops import Array

Lanes = Literal["all", "random"]


class Alternatives(NamedTuple):
    """Values of a site at which the cost is evaluated.

    Attributes:
        values: Detached, of the shape of x with the M alternatives on the left.
        weights: The c_m, live, of the batch shape of x with the M alternatives on the left.
    """

    values: Array
    weights: Array


@dataclass(frozen=True)
class Comparison:
    """How an estimator compares the cost at a draw with that at other values of its site.

    Attributes:
        make: Makes the alternatives from uniform numbers between 0 and 1, of the shape ``(num_uniforms, *x.shape)``.
        x: The draw.
        event_ndim: The number of event dims of x.
        batch_ndim: The number of batch dims of the site, on the left of x.
        num_values: The number M of alternatives.
        num_uniforms: How many uniform numbers each element of x needs.
        lanes: ``"all"``: elements that cannot share a run get one each. ``"random"``: one of these runs is drawn.
        joint: Whether all elements change at once, each with a weight for the whole difference.
        is_whole: Whether the alternatives are the whole derivative of the site's law. The site's own log density, whose derivative has
            mean 0, is then not differentiated.
    """

    make: Callable[[Array], Alternatives]
    x: Array
    event_ndim: int
    batch_ndim: int
    num_values: int
    num_uniforms: int = 0
    lanes: Lanes = "all"
    joint: bool = False
    is_whole: bool = True


def require_lanes(lanes: Lanes, what: str) -> None:
    """Refuse an option ``lanes`` that does not exist."""
    if lanes not in ("all", "random"):
        raise TypeError(f"{what}: expected lanes='all' or 'random', found {lanes!r}.")

"""A parameter that an estimator learns while SVI runs; the adapters register it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flowvi.ops import Array


class Learned(NamedTuple):
    """A parameter that an estimator learns while SVI runs.

    Attributes:
        initial: Makes its initial value. The dims on the left are those of the site's batch shape, at the full sizes of its plates.
        event_shape: The shape of the dims on the right that are not batch dims of the site.
    """

    initial: Callable[[], Array]
    event_shape: tuple[int, ...]

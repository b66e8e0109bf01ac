"""The shapes of a site: those of x, of the site's own batch, and of the plates around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flowvi.ops import Array


class Shapes:
    """The shapes of x, a sample of a site's family, as :class:`flowvi.target.Target` has them.

    Attributes:
        shape: The shape of x, all batch dims included.
        event_ndim: The number of event dims of the family.
        batch_ndim: The number of batch dims of the *site*: scores and weights are summed down to these.
    """

    shape: tuple[int, ...]
    event_ndim: int
    batch_ndim: int

    @property
    def plate_rows(self) -> Mapping[int, int]:
        """The :func:`rows` of each plate around the site, by (negative) dim of the site's batch shape; 1 for vectorized particles."""
        return {}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch shape of x."""
        return self.shape[: len(self.shape) - self.event_ndim]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.event_ndim :]

    @property
    def extra_ndim(self) -> int:
        """The number of batch dims of x that are event dims of the site."""
        return len(self.batch_shape) - self.batch_ndim

    @property
    def site_shape(self) -> tuple[int, ...]:
        """The batch shape of learned coefficients: the rows of the site's plates, without particles and without 1s on the left."""
        shape = self.batch_shape[: self.batch_ndim]
        return _without_ones(tuple(self.plate_rows.get(i - len(shape), size) for i, size in enumerate(shape)))

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Like :attr:`site_shape`, with :attr:`extra_shape`."""
        return (*self.site_shape, *self.extra_shape)

    @property
    def extra_shape(self) -> tuple[int, ...]:
        """The batch dims of x that are event dims of the site."""
        return self.batch_shape[self.batch_ndim :]

    def to_batch(self, a: Array) -> Array:
        """Sum an array over the batch dims of x that are event dims of the site."""
        axes = tuple(range(self.batch_ndim - a.ndim, 0))
        return a.sum(axis=axes) if axes else a

    def sum_event(self, a: Array) -> Array:
        """Sum an array of the shape of x over the event dims of the family."""
        return a.sum(axis=tuple(range(-self.event_ndim, 0))) if self.event_ndim else a


def rows(full_size: int, size: int, has_own: Callable[[], bool]) -> int:
    """The number of elements of a plate with their own coefficients: all, or 1 if the elements share them.

    An element has its own coefficients if it is the same data at every step. A subsampled plate numbers its data. Another plate may be
    a mini-batch, which may change its size, unless a parameter has a row for each element.

    Args:
        full_size: The size of the plate.
        size: The size of its subsample.
        has_own: Whether a parameter of the guide has a row for each element, and the site depends on that row alone there.
    """
    return full_size if full_size > size or (size > 1 and has_own()) else 1


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of ``shape`` broadcasts to the shape ``to`` without making it larger."""
    return shape == to or (len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without the 1s on its left."""
    ones = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[ones:]

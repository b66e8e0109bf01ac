"""Learned coefficients of the elements of a site, as a function of the features of each element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.shapes import broadcasts
from flowvi.target import Target

Features = Callable[[Any], Array]


class Amortised(NamedTuple):
    """Coefficients a = W_0 + sum_k f_k W_k of every element of a site, with its features f and learned W.

    Attributes:
        features: f, detached: the batch shape of the elements or one that broadcasts to it, and a dim for k.
    """

    features: Array

    @classmethod
    def at(cls, ops: Ops, target: Target, function: Features, shape: tuple[int, ...]) -> Amortised:
        """The features of a site whose elements have the batch ``shape``, that of x or its dims on the left."""
        found = ops.asarray(function(target.p0), getattr(target.p0, target.parameters[0]))
        own_ndim = len(target.p0.batch_shape) - (len(target.batch_shape) - len(shape))  # an array without its dim of features has fewer
        if found.ndim <= max(own_ndim, 0) or not broadcasts(tuple(found.shape[:-1]), shape):
            target.refuse(
                "features(p) must return a dim of features to the right of the batch dims, expected an array that broadcasts to "
                f"({', '.join(map(str, (*shape, 'number of features')))}), found {tuple(found.shape)}."
            )
        return cls(ops.stop_gradient(found))

    def learned(self, ops: Ops, coefficients: Learned) -> Learned:
        """W. Initially W_0 is that of the ``coefficients``, and the rest is 0."""

        def initial() -> Array:
            first = coefficients.initial()[None]
            return ops.concatenate([first, *[0 * first] * self.features.shape[-1]], 0)

        return Learned(initial, (1 + self.features.shape[-1], *coefficients.event_shape))

    def coefficients(self, w: Array) -> Array:
        """a, with the batch shape of the features on the left."""
        own = tuple(w.shape[1:])
        product = self.features @ w[1:].reshape((self.features.shape[-1], math.prod(own)))
        batch = self.features.shape[:-1]
        return w[0].reshape((*(1,) * len(batch), *own)) + product.reshape((*batch, *own))

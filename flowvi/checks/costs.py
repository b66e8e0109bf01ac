"""The costs whose mean gradients are checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowvi.checks.site import PerturbedSite
from flowvi.ops import Array


@dataclass(eq=False)
class Costs:
    """The constant, whose gradient estimate is psi, and smooth costs of a site's value.

    Attributes:
        site: The site.
        periodic_only: Whether, on a circle, costs that jump at the seam are left out.
    """

    site: PerturbedSite
    periodic_only: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        if self.site.on_circle:
            return ("1", "cos(x - 1)", "sin(2x) + 0.3 cos(x)", "x/2 + sin(x)")
        return ("1", "tanh(z - 1/2)", "1/(1 + z^2)", "log(1 + (z + 0.3)^2)")

    def of(self, value: Array) -> list[Array]:
        """The costs at the site's value: each of the shape (n, *batch)."""
        host = self.site.host
        ops: Any = np if isinstance(value, np.ndarray) else host.ops
        array: Any = np.asarray if ops is np else host.array
        value = self.site.flat(value)
        one = 0 * value.sum(-1) + 1
        if self.site.on_circle:
            v = value[..., 0]
            periodic = [ops.cos(v - 1), ops.sin(2 * v) + 0.3 * ops.cos(v)]
            return [one, *periodic, *([] if self.periodic_only else [0.5 * v + ops.sin(v)])]
        centre, spread = map(array, self._centre_and_spread)
        z = (value - centre) / spread
        n = z.shape[-1]
        a, b = (array(np.cos(c * np.arange(n)) if n > 1 else np.ones(1)) for c in (1.0, 2.5))
        first, second = (z * a).sum(-1), (z * b).sum(-1)
        return [one, ops.tanh(first - 0.5), 1 / (1 + second**2), ops.log1p((first + 0.3) ** 2)]

    def at(self, x: np.ndarray, eta: np.ndarray | None = None) -> np.ndarray:
        """The costs at the value that x has under eta, (costs, n, *batch)."""
        target = self.site.target if eta is None else self.site.target_at(eta, 1)
        value = self.site.numbers(target.push(self.site.shaped(x))) if target.transforms else np.asarray(x, float)
        return np.stack(self.of(value))

    @cached_property
    def _centre_and_spread(self) -> tuple[np.ndarray, np.ndarray]:
        value = self.site.flat(self.site.numbers(self.site.target.push(self.site.shaped(self.site.draws))))
        low, centre, high = np.quantile(value, [0.25, 0.5, 0.75], axis=0)
        spread = (high - low) / 1.35
        return centre, np.where(spread > 0, spread, 1.0)

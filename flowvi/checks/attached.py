"""What an estimator does at a perturbed site: u, psi, and its sampling density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowvi.checks.site import PerturbedSite
from flowvi.estimators import Draw, Estimator, attach
from flowvi.ops import Array


@dataclass(eq=False)
class Attached:
    """An estimator (resolved) at a site."""

    site: PerturbedSite
    estimator: Estimator

    def draw(self, eta: Any, x: Array, pushed: bool = False) -> Draw:
        """What the estimator attaches to a host's x. The transforms of the site are applied to the value only if ``pushed``."""
        target = self.site.target_at(eta, len(x))
        if not pushed:
            target = target.at_base()
        return attach(self.site.host.ops, target, self.estimator, x)

    def field(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u, of the shape of x and D, and psi, of batch shape and D."""
        site = self.site
        found = [derivative[: len(x)] for derivative in self._field(site.shaped(site.padded(x)))]
        u = np.zeros((*x.shape, site.size)) if site.discrete else found.pop(0)
        return u, found[0] if found else np.zeros((*x.shape[:-1], site.size))

    @cached_property
    def _field(self) -> Callable[[Array], list[np.ndarray]]:
        def f(eta: Array, x: Array) -> list[Array]:
            draw = self.draw(eta, x)
            found = [] if self.site.discrete else [self.site.flat(draw.value)]
            return found if draw.score is None else [*found, draw.score]

        return self.site.host.jacobian(f, self.site.size)

    def totals(self, x: np.ndarray) -> list[np.ndarray]:
        """The value of the estimator, summed over the event, its score and its log weight, each of batch shape."""
        return [a[: len(x)] for a in self._totals(self.site.shaped(self.site.padded(x)))]

    @cached_property
    def _totals(self) -> Callable[[Array], list[np.ndarray]]:
        def f(eta: Array, x: Array) -> list[Array]:
            draw = self.draw(eta, x)
            zero = 0 * self.site.flat(x).sum(-1)
            value = zero if self.site.discrete else zero + self.site.flat(draw.value).sum(-1)
            return [value, *(zero if a is None else a for a in (draw.score, draw.log_weight))]

        return self.site.host.values(f, self.site.size)

    def log_weight(self, x: np.ndarray) -> np.ndarray:
        return self.totals(x)[2]

    def log_q(self, x: np.ndarray) -> np.ndarray:
        """The log density of the estimator's proposal."""
        target = self.site.target_at(self.site.zero, len(x))
        q, _ = self.estimator.proposal(self.site.host.ops, target)
        return self.site.numbers(target.to_batch(q.log_prob(self.site.shaped(x))))

    def proposed(self, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws x of the estimator's sampling density, and their weights; draws of weight 0 are replaced by ``middle``."""
        site = self.site
        if self.estimator.q is None:
            return site.draws, np.ones(site.draws.shape[:-1])
        target = site.target_at(site.zero, site.num_samples)
        q, _ = self.estimator.proposal(site.host.ops, target)
        x = site.flat(site.host.numpy(site.host.sample(target, q, site.seed + 1)))
        log_weight = self.log_weight(x)
        return np.where((log_weight > -np.inf)[..., None], x, middle), np.exp(log_weight)

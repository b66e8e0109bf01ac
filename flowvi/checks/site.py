"""One distribution, whose parameters can be perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowvi.checks.differences import STEP, difference
from flowvi.checks.parameters import Build, directions
from flowvi.family import family_of
from flowvi.host import Host
from flowvi.ops import Array
from flowvi.rebuild import Parameter
from flowvi.target import Target

LENGTHS = (64, 512)  # samples are padded to these lengths if the host compiles once for each length


@dataclass(eq=False)
class PerturbedSite:
    """A site whose parameters are moved by a vector eta, which is 0 at the point to check.

    An x is flat: (n, *batch, d), with the batch of the site and all other dims as d coordinates. Derivatives in eta are the last axis.

    Attributes:
        host: The host of the distribution.
        build: Builds the distribution from the values of its parameters.
        start: The parameters at the point to check.
        enters: Whether the estimator acts on the base sample of a plain transformed distribution.
        tolerance: The largest discrepancy, relative to the size of the terms.
        num_samples: The number of samples for sample means.
        seed: The seed of all draws.
    """

    host: Host
    build: Build
    start: Mapping[str, Parameter]
    enters: bool
    tolerance: float
    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        self.theta = {name: np.asarray(self.host.numpy(p.value), float) for name, p in self.start.items()}
        self.directions = [(name, label, e) for name, p in self.start.items() for label, e in directions(name, p)]
        self.labels = [label for _, label, _ in self.directions]
        self.size = len(self.directions)
        self.zero = np.zeros(self.size)
        self.target = self.target_at(self.zero, 1)
        self.family, self.discrete = self.target.family, self.target.is_discrete()
        self.on_circle = family_of(self.target.p).circle
        self.batch = tuple(self.target.shape[1 : self.target.batch_ndim])

    # ---- the distribution at an eta

    def moved(self, i: int, k: float) -> np.ndarray:
        """An eta: k steps along coordinate i."""
        eta = np.zeros(self.size)
        eta[i] = k * self.steps[i]
        return eta

    def distribution(self, eta: Any, n: int) -> Any:
        """The distribution at a (live) eta, n times."""
        array: Callable[[Any], Any] = np.asarray if isinstance(eta, np.ndarray) else self.host.array
        theta: dict[str, Any] = dict(self.theta)
        for i, (name, _, e) in enumerate(self.directions):
            theta[name] = array(theta[name]) + array(e) * eta[i]
        p = self.host.unwrap(self.build({name: self.host.array(value) for name, value in theta.items()}))
        return p.expand((n, *p.batch_shape))

    def target_at(self, eta: Any, n: int) -> Target:
        return self.host.target("x", self.distribution(eta, n), self.enters, validate=False)

    def log_prob(self, eta: np.ndarray, x: np.ndarray) -> np.ndarray:
        padded = self.padded(x)
        target = self.target_at(eta, len(padded))
        return self.numbers(target.to_batch(target.p0.log_prob(self.shaped(padded))))[: len(x)]

    def along(self, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The derivatives of f(eta) by differences."""
        return np.stack([difference(lambda k, i=i: f(self.moved(i, k))) / self.steps[i] for i in range(self.size)], -1)  # type: ignore[misc]

    # ---- shapes

    def numbers(self, x: Array) -> np.ndarray:
        return np.asarray(self.host.numpy(x), float)

    def flat(self, x: Any) -> Any:
        return x.reshape((*x.shape[: 1 + len(self.batch)], -1))

    def shaped(self, x: np.ndarray) -> Array:
        """A flat x as an array of the host."""
        return self.host.array(np.array(x).reshape((len(x), *self.target.shape[1:])))

    def padded(self, x: np.ndarray) -> np.ndarray:
        """An x with its first row repeated, up to a length for which the host has compiled before."""
        n = next((n for n in LENGTHS if len(x) <= n), len(x)) if self.host.compiles else len(x)
        return np.concatenate([x, np.broadcast_to(x[:1], (n - len(x), *x.shape[1:]))])

    def everywhere(self, k: np.ndarray) -> np.ndarray:
        """Points (n, d) for every element of the batch."""
        return np.broadcast_to(k.reshape((len(k), *[1] * len(self.batch), -1)), (len(k), *self.batch, k.shape[-1])).copy()

    # ---- from samples

    @cached_property
    def draws(self) -> np.ndarray:
        """Samples of p."""
        target = self.target_at(self.zero, self.num_samples)
        return self.flat(self.host.numpy(self.host.sample(target, target.p0, self.seed)))

    @cached_property
    def steps(self) -> np.ndarray:
        """Steps of differences, a small part of the natural unit of each parameter: 1 over the root of its Fisher information."""
        sizes = np.array([max(abs(e * self.theta[name]).max(), 1e-3) for name, _, e in self.directions])
        x = self.draws[:400]
        units = []
        for size, e in zip(sizes, np.eye(self.size), strict=True):
            h = 1e-6 * size
            score = (self.log_prob(h * e, x) - self.log_prob(-h * e, x)) / (2 * h)
            square = np.mean(score**2, 0, where=np.isfinite(score))
            units.append(1 / np.sqrt(square.max()) if np.nanmax(square) > 1e-16 else size)
        return STEP * np.minimum(units, np.where(sizes > 1e-3, 10 * sizes, np.inf))

    @property
    def unit(self) -> np.ndarray:
        """The natural unit of each parameter."""
        return self.steps / STEP

r"""The criterion: noise times time, and how sure it is.

An Adam step divides each element of the gradient by the root of its second moment. So the variance of element i counts as
:math:`v_i / m_i`, where :math:`m_i` is the second moment of that element under the objective without advice, at the same parameters.
The noise is the mean of this over all elements. It does not depend on the units of the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flowvi.guidance.bench import Draw

FLOOR = 1e-9  # the noise of a gradient that has none but rounding errors
NEGLIGIBLE = 1e-12  # elements whose second moment is this much smaller than the largest do not count


class Scale(NamedTuple):
    """The weight of each element's variance."""

    weights: np.ndarray

    @staticmethod
    def of(batches: list[np.ndarray]) -> Scale:
        """The weights that some batches of gradients imply."""
        second = sum((g**2).sum(0) for g in batches) / sum(len(g) for g in batches)
        counts = second > NEGLIGIBLE * second.max(initial=0.0)
        return Scale(np.divide(counts, second, out=np.zeros_like(second), where=counts) / max(int(counts.sum()), 1))

    def deviations(self, gradients: np.ndarray) -> np.ndarray:
        """For each sample of a batch a number whose mean is the noise."""
        centred = gradients - gradients.mean(0)
        return (centred**2 @ self.weights) * len(gradients) / (len(gradients) - 1)


@dataclass
class Trial:
    """One objective, measured so far.

    Attributes:
        draw: Its gradients.
        scale: The weights of the elements.
        deviations: For each sample, a number whose mean is the noise.
        times: The seconds of a step in each batch.
    """

    draw: Draw
    scale: Scale
    deviations: list[np.ndarray] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Measure one batch more."""
        batch = self.draw(len(self.times))
        self.deviations.append(self.scale.deviations(batch.gradients))
        self.times.append(batch.seconds)

    @property
    def seconds(self) -> float:
        """The time of a step: the shortest over the batches, since whatever else runs on the machine only adds to it."""
        return min(self.times)

    @property
    def noise(self) -> float:
        found = float(np.concatenate(self.deviations).mean())
        return max(found, FLOOR) if math.isfinite(found) else math.inf

    @property
    def score(self) -> float:
        """Noise times time."""
        return self.noise * self.seconds

    @property
    def error(self) -> float:
        """The standard error of the logarithm of the score."""
        all_of_them = np.concatenate(self.deviations)
        relative = float(all_of_them.std(ddof=1)) / math.sqrt(len(all_of_them)) / self.noise
        return math.hypot(relative, self.spread)

    @property
    def spread(self) -> float:
        """About the standard error of the logarithm of the time of a step."""
        return float(np.median(np.log(self.times)) - math.log(self.seconds)) / math.sqrt(len(self.times))

    def excess(self, best: Trial) -> tuple[float, float]:
        """How much larger the score is than that of ``best``, as a share of the latter, and its standard error.

        The samples are paired: what both trials have in common, such as the noise of the other sites, cancels.
        """
        n = min(len(self.deviations), len(best.deviations))
        mine, other = (np.concatenate(one.deviations[:n]) * one.seconds for one in (self, best))
        difference = (mine - other) / best.score
        if not np.isfinite(difference).all():
            return math.inf, 0.0
        return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))

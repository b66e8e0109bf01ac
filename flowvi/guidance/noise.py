r"""The criteria, noise times time and (signal + noise) times time, and their standard errors.

An Adam step divides each element of the gradient by the root of its second moment. So element i has the noise :math:`v_i / m_i`, where
:math:`v_i` is its variance and :math:`m_i` its second moment under the objective without advice, at the same parameters. The noise of
an objective is the mean over all elements. It does not depend on the units of the parameters.

Less noise saves steps only until the step size limits them. The number of steps grows with signal + noise, where the signal is the mean
of :math:`g_i^2 / m_i` over all elements, and g the mean gradient (McCandlish et al. 2018, section 2.2). All right objectives have the
same signal; signal and noise of the objective without advice add up to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flowvi.guidance.bench import Draw

FLOOR = 1e-9  # the noise of a gradient with only rounding errors
NEGLIGIBLE = 1e-12  # elements whose second moment is this much smaller than the largest do not count


class Scale(NamedTuple):
    """What the noise is relative to.

    Attributes:
        weights: The weight of each element's variance.
        signal: The squared mean gradient, with the same weights.
    """

    weights: np.ndarray
    signal: float

    @staticmethod
    def of(batches: list[np.ndarray]) -> Scale:
        """The weights for the second moments of some batches of gradients."""
        n = sum(len(g) for g in batches)
        second, mean = sum((g**2).sum(0) for g in batches) / n, sum(g.sum(0) for g in batches) / n
        counts = second > NEGLIGIBLE * second.max(initial=0.0)
        weights = np.divide(counts, second, out=np.zeros_like(second), where=counts) / max(int(counts.sum()), 1)
        signal = float((n * mean**2 - second) @ weights) / (n - 1)  # without bias
        return Scale(weights, max(signal, 0.0))

    @np.errstate(invalid="ignore")  # infinite gradients
    def deviations(self, gradients: np.ndarray) -> np.ndarray:
        """A number for each sample of a batch; the mean of these numbers is the noise."""
        centred = gradients - gradients.mean(0)
        return (centred**2 @ self.weights) * len(gradients) / (len(gradients) - 1)


@dataclass
class Trial:
    """The measurements of one objective so far.

    Attributes:
        draw: Its gradients.
        scale: The weights of the elements.
        deviations: A number for each sample; the mean of these numbers is the noise.
        times: The seconds of a step in each batch.
    """

    draw: Draw
    scale: Scale
    deviations: list[np.ndarray] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Measure one more batch."""
        batch = self.draw(len(self.times))
        self.deviations.append(self.scale.deviations(batch.gradients))
        self.times.append(batch.seconds)

    @property
    def seconds(self) -> float:
        """The time of a step: the shortest over the batches, since other load on the machine only adds to it."""
        return min(self.times)

    @property
    def noise(self) -> float:
        found = float(np.concatenate(self.deviations).mean())
        return max(found, FLOOR) if math.isfinite(found) else math.inf

    def score(self, signal: float = 0.0) -> float:
        """Noise times time; with the signal, the time of a fit up to a factor."""
        return (signal + self.noise) * self.seconds

    @property
    @np.errstate(invalid="ignore")
    def error(self) -> float:
        """The standard error of the logarithm of the score."""
        all_of_them = np.concatenate(self.deviations)
        relative = float(all_of_them.std(ddof=1)) / math.sqrt(len(all_of_them)) / self.noise
        return math.hypot(relative, self.spread)

    @property
    def spread(self) -> float:
        """The approximate standard error of the logarithm of the time of a step."""
        return float(np.median(np.log(self.times)) - math.log(self.seconds)) / math.sqrt(len(self.times))

    @np.errstate(invalid="ignore")
    def excess(self, best: Trial, signal: float = 0.0) -> tuple[float, float]:
        """By how much the score exceeds that of ``best``, relative to the score of ``best``, and the standard error.

        The samples are paired: noise that both trials share, such as that of the other sites, cancels.
        The errors of the times count too.

        Args:
            best: The other trial.
            signal: What to add to the noise.
        """
        n = min(len(self.deviations), len(best.deviations))
        mine, other = ((signal + np.concatenate(one.deviations[:n])) * one.seconds for one in (self, best))
        difference = (mine - other) / best.score(signal)
        if not np.isfinite(difference).all():
            return math.inf, 0.0
        excess, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))
        return excess, math.hypot(error, (1 + excess) * math.hypot(self.spread, best.spread))

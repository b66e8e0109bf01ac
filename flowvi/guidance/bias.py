r"""A sequential test of whether two gradients have the same mean.

Both gradients are drawn with the same keys. Their differences are tested again and again as more are drawn. Test j (a *look*) has the
probability :math:`\alpha / ((j + 1)(j + 2))` of a false alarm, so all looks together have at most :math:`\alpha`. A third of it is for
the elements of the mean difference, by z-scores with Bonferroni's correction. The other two thirds are for two directions, which each
look takes from the data of earlier looks: the gradient, and the mean difference over its variance. Fresh differences must confirm each
finding, because z-scores of few and heavy-tailed numbers are larger than those of a Normal.

References:
    Lan and DeMets 1983 (alpha spending).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from flowvi.guidance.bench import Draw

CONFIRMED = 4.0  # the z-score of fresh differences, along one direction of a known sign
SKEWED = 0.3  # if the skewness of a mean is larger, its z-score is confirmed once more
POWER = 1.2816  # a bias this many standard errors above the threshold is found in nine of ten cases
ROUNDING = 1e-5  # differences of this size, relative to the root mean square of the gradient, are rounding errors
SMALLEST = 8  # the fewest batches for a decision


@dataclass(frozen=True)
class BiasTest:
    """What a sequential test found.

    Attributes:
        biased: Whether the means differ.
        z: The z-score of the confirmed difference; without one, the largest z-score over the elements.
        element: The element of the gradient in which the means differ most.
        bias: The estimated difference of the means, relative to the size of the first one.
        detectable: The smallest bias along the gradient that would have been found in nine of ten cases, relative to the gradient.
        num_samples: The number of differences.
        has_reference: Whether all numbers of the second gradient were finite.
    """

    biased: bool
    z: float
    element: int
    bias: float
    detectable: float
    num_samples: int
    has_reference: bool = True


class _Differences:
    """Differences of two gradients at the same keys.

    Attributes:
        used: The elements that were not 0 in at least one sample of the second gradient.
        num_read: How many batches were read.
    """

    def __init__(self, own: Draw, reference: Draw):
        self.own, self.reference = own, reference
        self.used: np.ndarray = np.zeros(0, bool)
        self.num_read = 0

    def read(self, count: int, time_left: Callable[[], bool] = lambda: True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next batches of the first gradient and of the difference; fewer if time runs out."""
        for i in range(count):
            if i and not time_left():
                return
            a, b = (draw(self.num_read).gradients for draw in (self.own, self.reference))
            here = (b != 0).any(0)
            self.used = self.used | here if self.num_read else here
            self.num_read += 1
            yield a, a - b


class _Moments:
    """Running means and variances of differences, and of the first gradient."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[np.ndarray] = []

    def add(self, own: np.ndarray, difference: np.ndarray) -> None:
        new = [own.sum(0), (own**2).sum(0), difference.sum(0), (difference**2).sum(0)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.n else new
        self.n += len(own)

    @property
    def own(self) -> np.ndarray:
        return self.sums[0] / self.n

    @property
    def size(self) -> np.ndarray:
        return np.sqrt(self.sums[1] / self.n)

    @property
    def mean(self) -> np.ndarray:
        return self.sums[2] / self.n

    @property
    def variance(self) -> np.ndarray:
        return np.maximum(self.sums[3] / self.n - self.mean**2, 0.0) * self.n / (self.n - 1)

    @property
    def z(self) -> np.ndarray:
        error = np.sqrt(self.variance / self.n + (ROUNDING * self.size) ** 2)
        return np.divide(self.mean, error, out=np.zeros_like(error), where=error > 0)


class _Along:
    """The z-score of differences along a direction that may change with every look.

    Attributes:
        direction: The last direction.
        deviation: The standard deviation along it.
        n: How many differences there were.
    """

    def __init__(self) -> None:
        self.direction, self.deviation, self.n, self.sum = np.zeros(0), 0.0, 0, 0.0

    def add(self, x: np.ndarray, direction: np.ndarray) -> None:
        self.direction, self.deviation = direction, float(x.std(ddof=1))
        if self.deviation > 0:
            self.sum += float(x.sum()) / self.deviation
        self.n += len(x)

    @property
    def z(self) -> float:
        return self.sum / math.sqrt(self.n) if self.n else 0.0


class MeanTest:
    """Compares the means of two gradients, look by look.

    Args:
        own: The gradient to test.
        reference: A gradient with the right mean. An element that is exactly 0 in it, such as a parameter of a baseline, is not
            compared.
        alpha: The probability of a false alarm.
        tolerance: The test ends when it would have found a bias of this size, relative to the gradient.

    Attributes:
        result: What was found so far.
        is_decided: Whether the test has ended.
    """

    def __init__(self, own: Draw, reference: Draw, alpha: float, tolerance: float):
        self.differences, self.moments = _Differences(own, reference), _Moments()
        self.along_gradient, self.along_difference = _Along(), _Along()
        self.alpha, self.tolerance = alpha, tolerance
        self.num_looks = 0
        self.result = BiasTest(False, 0.0, 0, 0.0, math.inf, 0)
        self.is_decided = False

    def look(self, time_left: Callable[[], bool] = lambda: True) -> None:
        """Look once more, at as many differences as were read before, or at fewer if time runs out; a first look needs them all."""
        moments, differences = self.moments, self.differences
        share = self.alpha / ((self.num_looks + 1) * (self.num_looks + 2)) / 3
        count = max(differences.num_read, SMALLEST)
        if not moments.n:  # the first directions come from half of the first differences
            self._read(SMALLEST // 2, [], time_left)
            count -= SMALLEST // 2
            if self.is_decided:
                return
        used = differences.used
        directions = [np.where(used, moments.own, 0.0), _steepest(moments, used)]
        along = self._read(count, directions, time_left)
        if self.is_decided or differences.num_read < SMALLEST:
            return
        for one, x, direction in zip((self.along_gradient, self.along_difference), along, directions, strict=True):
            one.add(x, direction)
        self.num_looks += 1
        used = differences.used
        z = np.where(used, moments.z, 0.0)
        element = int(np.abs(z).argmax())
        compared = max(int((used & (moments.variance > 0)).sum()), 1)
        suspects = []
        if abs(z[element]) > _threshold(share / compared):
            suspects.append(np.where(np.arange(z.size) == element, np.sign(z), 0.0))
        suspects += [one.direction for one in (self.along_gradient, self.along_difference) if abs(one.z) > _threshold(share)]
        for suspect in suspects:
            again = self._confirm(suspect)
            if not self.is_decided and abs(confirmed := _z(again)) > CONFIRMED:
                bias = float(np.linalg.norm(moments.mean[used])) / (float(np.linalg.norm(moments.own[used])) or 1.0)
                self._decide(BiasTest(True, abs(confirmed), element, bias, self.result.detectable, moments.n))
            if self.is_decided:
                return
        detectable = (_threshold(share) + POWER) * self._error(used) if z.any() else 0.0
        self.result = BiasTest(False, float(abs(z[element])), element, 0.0, detectable, moments.n)
        self.is_decided = detectable < self.tolerance

    def _read(self, count: int, directions: list[np.ndarray], time_left: Callable[[], bool] = lambda: True) -> list[np.ndarray]:
        """The next differences along some directions; only their moments are kept otherwise. Ends the test if one is not finite."""
        along: list[list[np.ndarray]] = [[] for _ in directions]
        for own, difference in self.differences.read(count, time_left):
            finite = np.isfinite(difference).all(0)
            if not finite.all():
                samples, element = self.moments.n + len(difference), int(finite.argmin())
                of_own = not np.isfinite(own[:, element]).all()
                self._decide(BiasTest(True, math.inf, element, math.inf, math.inf, samples, has_reference=of_own))
                break
            self.moments.add(own, difference)
            for x, direction in zip(along, directions, strict=True):
                x.append(difference @ direction)
        return [np.concatenate([np.zeros(0), *x]) for x in along]

    def _confirm(self, direction: np.ndarray) -> np.ndarray:
        """Fresh differences along a direction. More are drawn if a few large ones dominate the mean: its z-score is then not Normal."""
        (x,) = self._read(2 * self.differences.num_read, [direction])
        if not self.is_decided and abs(_z(x)) > CONFIRMED and _skewness(x) > SKEWED:
            (x,) = self._read(2 * self.differences.num_read, [direction])
        return x

    def _error(self, used: np.ndarray) -> float:
        """The standard error of the mean difference along the gradient, relative to the gradient without its noise."""
        own = np.where(used, self.moments.own, 0.0)
        noise = float(np.where(used, self.moments.size**2 - self.moments.own**2, 0.0).sum()) / self.moments.n
        square = float(own @ own)
        if square <= noise:
            return math.inf
        return self.along_gradient.deviation / math.sqrt(self.along_gradient.n * square * (square - noise))

    def _decide(self, result: BiasTest) -> None:
        self.result, self.is_decided = result, True


def _threshold(p: float) -> float:
    return -NormalDist().inv_cdf(p / 2)


def _z(x: np.ndarray) -> float:
    """The z-score of the mean of some numbers."""
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) / error if error > 0 else math.inf * float(np.sign(x.mean()))


def _skewness(x: np.ndarray) -> float:
    """The absolute skewness of the mean of some numbers."""
    centred = x - x.mean()
    scale = float((centred**2).mean()) ** 1.5 * math.sqrt(len(x))
    return abs(float((centred**3).mean())) / scale if scale > 0 else 0.0


def _steepest(moments: _Moments, used: np.ndarray) -> np.ndarray:
    """The mean difference over its variance; 0 for elements below the noise."""
    variance = moments.variance + (ROUNDING * moments.size) ** 2
    direction = np.divide(moments.mean, variance, out=np.zeros_like(variance), where=variance > 0)
    return np.where(used & (np.abs(moments.z) > 1), direction, 0.0)

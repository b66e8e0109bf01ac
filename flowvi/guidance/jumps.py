"""Where the cost violates the assumptions of an estimator: jumps, hidden derivatives, costs that are not periodic, plates."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flowvi.guidance.bench import Probe
from flowvi.guidance.candidates import GuideSite

POINTS = 64  # points of a grid, and of each refinement
SEEDS = 4  # the number of runs to look at
LEAST = 1e-3  # a smaller jump, relative to the change of the cost, is not reported
RELATIVE = 1e-2  # derivatives that differ by less, relative to the larger one, count as equal


class Place(NamedTuple):
    """Where and how the cost violates an assumption of an estimator.

    Attributes:
        statement: The statement of the model whose log density shows it.
        what: What is wrong, in words.
        x: The value of the site at which it happens; None if at every value.
    """

    statement: str
    what: str
    x: float | None = None

    def __str__(self) -> str:
        return f"{self.statement} {self.what}"


def reading_elements(probe: Probe) -> Place | None:
    """A statement in a plate of the site, if its elements read the site at other elements of the plate."""
    for seed in range(SEEDS):
        value, other = probe.value(seed), probe.value(seed + 1)
        for plate, dim in probe.plates[""].items():
            axis = value.ndim - probe.event_ndim + dim
            if axis < 0 or value.shape[axis] < 2:
                continue
            for element in (0, value.shape[axis] // 2, value.shape[axis] - 1):
                changed = value.copy()
                index = (slice(None),) * axis + (element,)
                changed[index] = other[index]
                for name, densities in probe.densities(seed, np.stack([value, changed])).items():
                    if plate not in (plates := probe.plates[name]) or densities.ndim - 1 < -plates[plate]:
                        continue
                    moved = ~np.isclose(densities[0], densities[1], rtol=1e-6, atol=1e-9, equal_nan=True)
                    along = moved.ndim + plates[plate]
                    if moved.shape[along] > 1 and np.delete(moved, element, axis=along).any():
                        return Place(name, f"reads '{{site}}' at other elements of the plate '{plate}'")
    return None


def where(site: GuideSite, probe: Probe) -> Place | None:
    """Where a pathwise derivative of the cost is wrong, found by moving single coordinates."""
    if site.is_discrete:
        return None
    values = [probe.value(seed) for seed in range(SEEDS)]
    for seed, value in enumerate(values):
        if (found := _seam(site, probe, seed, value) or _hidden(probe, seed, value)) is not None:
            return found
    for seed, value in enumerate(values[:2]):
        for element in range(min(value.size, 2)):
            low, high = _range(site, np.array([v.reshape(-1)[element] for v in values]), value)
            if (found := _jump(probe, seed, value, element, low, high)) is not None:
                return found
    return None


def _range(site: GuideSite, drawn: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """An interval of values that the site takes."""
    if site.family.circle:
        return -math.pi, math.pi
    spread = np.concatenate([drawn, value.reshape(-1)])
    width = float(np.ptp(spread)) or 1.0
    low, high = float(spread.min()) - width, float(spread.max()) + width
    support = site.target.support
    if support.kind == "coordinates" and not site.target.transforms:
        bounds = []
        for bound, end in ((support.lower, np.nanmin), (support.upper, np.nanmax)):
            bounds.append(float(end(np.asarray(bound, dtype=float))) if np.ndim(bound) == 0 else math.nan)
        low = max(low, bounds[0] + 1e-6 * width) if math.isfinite(bounds[0]) else low
        high = min(high, bounds[1] - 1e-6 * width) if math.isfinite(bounds[1]) else high
    return low, high


def _curves(probe: Probe, seed: int, value: np.ndarray, element: int, points: np.ndarray) -> dict[str, np.ndarray]:
    """The summed log density of each statement as one coordinate of the site goes through some points."""
    values = np.repeat(value[None], len(points), 0)
    values.reshape(len(points), -1)[:, element] = points
    return {name: costs.reshape(len(points), -1).sum(1) for name, costs in probe.densities(seed, values).items()}


def _jump(probe: Probe, seed: int, value: np.ndarray, element: int, low: float, high: float) -> Place | None:
    points = np.linspace(low, high, POINTS)
    for name, curve in _curves(probe, seed, value, element, points).items():
        if not np.isfinite(curve).all() or not np.ptp(curve):
            continue
        steps = np.abs(np.diff(curve))
        beside = (np.append(steps[1:], steps[-2]) + np.insert(steps[:-1], 0, steps[1])) / 2
        for start in np.argsort(beside - steps)[:2]:  # where the curve changes more than next to it
            left, right, size = points[start], points[start + 1], float(steps[start])
            while right - left > 1e-9 * (1 + abs(left)) and size > LEAST * float(np.ptp(curve)):
                finer = np.linspace(left, right, POINTS)
                heights = np.abs(np.diff(_curves(probe, seed, value, element, finer)[name]))
                k = int(heights.argmax())
                if heights[k] < size / 2:  # not a jump: a slope changes less over a smaller interval
                    break
                left, right, size = finer[k], finer[k + 1], float(heights[k])
            else:
                if size > LEAST * float(np.ptp(curve)):
                    x = 0.0 if abs(left) < 1e-8 else float(left)
                    return Place(name, f"jumps by {size:.3g} where '{{site}}' crosses {x:.4g}", x)
    return None


def _seam(site: GuideSite, probe: Probe, seed: int, value: np.ndarray) -> Place | None:
    """A statement whose cost differs between the two ends of the circle."""
    if not site.family.circle:
        return None
    ends = np.array([1e-6 - math.pi, math.pi - 1e-6])
    for name, (low, high) in _curves(probe, seed, value, 0, ends).items():
        if not np.isclose(low, high, rtol=1e-3, atol=1e-3):
            return Place(name, f"is not periodic in '{{site}}': between -pi and pi it changes by {high - low:.3g}", math.pi)
    return None


def _hidden(probe: Probe, seed: int, value: np.ndarray) -> Place | None:
    """A statement whose automatic derivative is not the derivative of its log density."""
    slopes = probe.slopes(seed, value)
    for element in range(min(value.size, 2)):
        at = float(value.reshape(-1)[element])
        step = 1e-3 * (1 + abs(at))
        for name, (below, here, above) in _curves(probe, seed, value, element, np.array([at - step, at, at + step])).items():
            difference = (above - below) / (2 * step)
            automatic = float(slopes[name].reshape(-1)[element])
            curvature = abs(above + below - 2 * here) / step
            if abs(difference - automatic) > RELATIVE * max(abs(difference), abs(automatic)) + curvature + 1e-4:
                what = f"has the derivative {automatic:.3g} in '{{site}}' at {at:.4g}, but changes at the rate {difference:.3g}"
                return Place(name, what, at)
    return None

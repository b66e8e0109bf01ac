"""The condition of :func:`flowvi.check_estimator` on u at the ends of the support: no mass may cross them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flowvi.checks.attached import Attached
from flowvi.checks.charts import Chart
from flowvi.checks.differences import worst
from flowvi.checks.domain import Domain
from flowvi.checks.report import Condition

NAME = "boundary flux"
NEAR = 28.0  # how much the log of the mass falls on the way to an end of the support
FACES = (1e-8, 1e-7, 1e-6)  # distances from a face of the simplex


def conditions(attached: Attached, domain: Domain) -> Iterator[Condition]:
    """Whether u moves mass through an end of a support that is not a circle."""
    chart = domain.chart
    if chart is None:
        return
    if chart.simplex:
        yield _faces(attached)
    elif domain.site.draws.shape[-1] > 1:
        if np.isfinite(chart.low).any() or np.isfinite(chart.high).any():
            yield Condition(NAME, None, "not checked: an event of several bounded coordinates")
    elif domain.rule is not None:
        yield _ends(attached, domain, chart)


def seam(attached: Attached, domain: Domain) -> tuple[Condition, bool]:
    """Whether the mass that leaves a circle at its seam enters on the other side; and whether any mass crosses the seam."""
    site, chart = attached.site, domain.chart
    assert chart is not None
    flux, _ = _flux(attached, domain, chart)
    after, before = flux[0], flux[3]
    gap, i = worst(abs(before - after))
    if gap > site.tolerance:
        found = (
            f"at the seam, parameter {site.labels[i[-1]]}: p u is {before[i]:.4g} of the mass before pi and {after[i]:.4g} after -pi; "
        )
        return Condition(NAME, False, found + "the two must be equal, or 0."), False
    crossed = bool(abs(after).max() > site.tolerance)
    return Condition(NAME, True, "crosses the seam: right for periodic costs only" if crossed else "0 at the seam"), crossed


def _ends(attached: Attached, domain: Domain, chart: Chart) -> Condition:
    """The flux on the way to both ends."""
    site = attached.site
    flux, speeds = _flux(attached, domain, chart)
    for side in (0, 1):
        f = flux[3 * side : 3 * side + 3]
        size, i = worst(np.where(_vanishes(site.tolerance, *f), -1.0, abs(f[0])))
        if size < 0:
            continue
        end, moves = (chart.low, chart.high)[side][(*i[:-1], 0)], abs(speeds[side][i]) > 0
        where = f"at the {('lower', 'upper')[side]} end x = {end:.4g}, parameter {site.labels[i[-1]]}"
        do = "this end is fixed: u must vanish there"
        if not np.isfinite(end):
            do = "u moves mass to infinity: p u must vanish there"
        elif moves:
            do = "this end moves: u must be its speed there"
        return Condition(NAME, False, f"{where}: p (u - v) is {f[0][i] / site.unit[i[-1]]:.4g}, expected 0; {do}.")
    return Condition(NAME, True, f"{abs(flux[[0, 3]]).max():.1e} of the mass")


def _flux(attached: Attached, domain: Domain, chart: Chart) -> tuple[np.ndarray, np.ndarray]:
    """The flux p (u - v) as a share of the mass, at three points near each end, the nearest first; and v, the speeds of the ends."""
    site = attached.site
    assert domain.rule is not None
    y, log_w = domain.rule
    log_mass = domain.located(site.zero, y)[1] + log_w
    seen = (log_mass > log_mass.max(0) - NEAR)[..., None]
    limits = chart.limits()
    ends = np.maximum(np.where(seen, y, np.inf).min(0), limits[0]), np.minimum(np.where(seen, y, -np.inf).max(0), limits[1])
    x = chart.to_x(np.stack([end + s * (domain.coordinates.centre - end) for end in ends for s in (0.0, 0.08, 0.16)]))
    speeds = site.along(lambda eta: _bounds(domain.chart_of(site.target_at(eta, 1))))  # type: ignore[arg-type]
    density = np.exp(site.log_prob(site.zero, x))[..., None]
    return density * (attached.field(x)[0][..., 0, :] - np.repeat(speeds, 3, axis=0)) * site.unit, speeds


def _bounds(chart: Chart) -> np.ndarray:
    bounds = np.stack([chart.low[..., 0], chart.high[..., 0]])
    return np.where(np.isfinite(bounds), bounds, 0.0)


def _vanishes(tolerance: float, f0: np.ndarray, f1: np.ndarray, f2: np.ndarray) -> np.ndarray:
    """Whether a flux goes to 0, from three points whose distances from the end have a constant ratio, the nearest first.

    If the flux falls like a power, its relative change from point to point is constant. If it has another limit, the change goes to 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = abs(f1 / f0) - 1, abs(f2 / f1) - 1
        return (abs(f0) <= tolerance) | ((near > 0.02) & (near > 0.7 * far))


def _faces(attached: Attached) -> Condition:
    """The normal velocity times p, as one coordinate of the simplex goes to 0."""
    site = attached.site
    x = site.draws[:3]
    d, largest = x.shape[-1], 0.0
    for j in range(d):
        others = x * (np.arange(d) != j)
        others = others / others.sum(-1, keepdims=True)
        near = np.concatenate([others * (1 - distance) + distance * np.eye(d)[j] for distance in FACES])
        flux = np.exp(site.log_prob(site.zero, near))[..., None] * attached.field(near)[0][..., j, :] * site.unit
        f = flux.reshape((3, *x.shape[:-1], site.size))
        size, i = worst(np.where(_vanishes(site.tolerance, *f), -1.0, abs(f[0])))
        if size >= 0:
            found = f"where coordinate {j} of x is 0, parameter {site.labels[i[-1]]}: p u is {f[0][i]:.3g}, expected 0; "
            return Condition(NAME, False, found + "u must vanish there.")
        largest = max(largest, abs(f[0]).max())
    return Condition(NAME, True, f"{largest:.1e} at the faces")

"""The support of a distribution: its coordinates, and a rule that integrates over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowvi.checks.charts import Chart, Coordinates
from flowvi.checks.rules import SIDE, integers, nodes
from flowvi.checks.site import PerturbedSite
from flowvi.rebuild import parameters
from flowvi.target import Target

NEGLIGIBLE = 1e-10  # a point with less mass does not count

Rule = tuple[np.ndarray, np.ndarray]


@dataclass(eq=False)
class Domain:
    """The support of a site, in chart coordinates y that stay fixed while its bounds move."""

    site: PerturbedSite

    @cached_property
    def chart(self) -> Chart | None:
        """The chart at the point to check."""
        return self.chart_of(self.site.target)

    def chart_of(self, target: Target) -> Chart | None:
        """Real coordinates of the support for one value of the parameters; None if it is discrete or of an unknown kind."""
        site, support, event_ndim = self.site, target.support, target.event_ndim
        if site.discrete:
            return None
        if support.kind == "_Simplex" and event_ndim == 1:
            return Chart(True, np.zeros(1), np.zeros(1))
        if support.kind != "coordinates":
            return None
        sides = (-math.pi, math.pi) if site.on_circle else (support.lower, support.upper)
        bounds = [site.numbers(b) for b in sides]
        bounds = [b.reshape((*b.shape, *[1] * event_ndim)) if b.ndim else b for b in bounds]
        low, high = (np.broadcast_to(b, (1, *site.target.shape[1:])).reshape((*site.batch, -1)) for b in bounds)
        return Chart(False, low, high)

    @cached_property
    def coordinates(self) -> Coordinates:
        assert self.chart is not None
        y = self.chart.to_y(self.site.draws)
        return Coordinates.fitted(y[np.isfinite(y).reshape(len(y), -1).all(1)])

    @cached_property
    def middle(self) -> np.ndarray:
        """A point (*batch, d) well inside the support."""
        return self.site.draws[0] if self.chart is None else self.chart.to_x(self.coordinates.centre)

    def located(self, eta: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The x at coordinates y, which follow moving bounds, and the log density of p over y."""
        chart = self.chart_of(self.site.target_at(eta, 1))
        if chart is None:
            return y, self.site.log_prob(eta, y)
        x = chart.to_x(y)
        inside = chart.inside(x)
        x = np.where(inside[..., None], x, self.middle)
        log_p = self.site.log_prob(eta, x) + chart.log_slope(y)
        return x, np.where(inside & np.isfinite(log_p), log_p, -np.inf)

    @cached_property
    def rule(self) -> Rule | None:
        """Coordinates y and log weights over y of a rule that integrates p to 1, or None if there is none."""
        rule = self._sum() if self.site.discrete else self._integral()
        if rule is None:
            return None
        y, log_w = rule
        mass = np.exp(self.located(self.site.zero, y)[1] + log_w)
        trusted = abs(mass.sum(0) - 1) < self.site.tolerance / 10
        if (half := self.half(y)) is not None:
            trusted &= abs(mass[half].sum(0) - 0.5) < self.site.tolerance
        return rule if trusted.all() else None

    @cached_property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Points x and the mass of each: those of the rule, with negligible ones moved to the middle; or the draws."""
        if self.rule is None:
            draws = self.site.draws
            return draws, np.full(draws.shape[:-1], 1 / len(draws))
        y, log_w = self.rule
        x, log_p = self.located(self.site.zero, y)
        mass = np.exp(log_p + log_w)
        return np.where((mass > NEGLIGIBLE)[..., None], x, self.middle), mass

    def half(self, y: np.ndarray) -> np.ndarray | None:
        """In two dimensions every other point, as on a chessboard; these points form a rule too."""
        return None if self.site.discrete or y.shape[-1] < 2 else np.indices((SIDE, SIDE)).sum(0).reshape(-1) % 2 == 1

    def _sum(self) -> Rule | None:
        """Every value of a discrete support that has mass."""
        site, target = self.site, self.site.target
        like = site.host.numpy(site.host.sample(site.target_at(site.zero, 1), target.p0, site.seed))
        if target.support.kind == "_OneHot":
            k = np.eye(like.shape[-1])
        elif target.support.kind == "coordinates" and target.event_ndim == 0:
            found = integers(
                site.host.numpy(target.support.lower),
                site.host.numpy(target.support.upper),
                lambda k: site.log_prob(site.zero, site.everywhere(k[:, None].astype(like.dtype))),
            )
            if found is None:
                return None
            k = found[:, None]
        else:
            return None
        y = site.everywhere(k.astype(like.dtype))
        return y, np.zeros(y.shape[:-1])

    def _integral(self) -> Rule | None:
        site, chart = self.site, self.chart
        d = site.draws.shape[-1] - (chart is not None and chart.simplex)
        if chart is None or d > 2:
            return None

        def log_density(t: np.ndarray) -> np.ndarray:
            return self.located(site.zero, self.coordinates.to_y(t))[1] + self.coordinates.log_slope(t)

        samples = self.coordinates.to_t(chart.to_y(site.draws[:400]))
        samples = np.where(np.isfinite(samples), samples, 0.0)
        kinks = self.coordinates.to_t(chart.to_y(self._kinks(chart))) if d == 1 else np.zeros((0, 1))
        t, w = nodes(log_density, samples, kinks)
        with np.errstate(divide="ignore"):
            return self.coordinates.to_y(t), np.log(w) + self.coordinates.log_slope(t)

    def _kinks(self, chart: Chart) -> np.ndarray:
        """Where the density may have kinks: at the parameters whose values lie inside the support."""
        values = [np.ravel(self.site.numbers(p.value)) for p in parameters(self.site.target.p0).values()]
        kinks = self.site.everywhere(np.unique(np.concatenate([*values, np.zeros(0)]))[:, None])
        return kinks[chart.inside(kinks).reshape(len(kinks), -1).all(1)]

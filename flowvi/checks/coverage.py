"""The conditions of :func:`flowvi.check_estimator` on the sampling density: where it is positive, its tails, and its draws."""

from __future__ import annotations

import math

import numpy as np

from flowvi.checks.attached import Attached
from flowvi.checks.charts import Chart
from flowvi.checks.costs import Costs
from flowvi.checks.differences import at, worst
from flowvi.checks.domain import NEGLIGIBLE, Domain
from flowvi.checks.means import Z
from flowvi.checks.report import Condition
from flowvi.checks.rules import FAR

TAIL = 71  # points along a ray into a tail
ZOOM = 42  # points in each step towards a zero of q


def support(attached: Attached, domain: Domain) -> Condition:
    """Whether the density of q is positive where that of p is."""
    x, mass = domain.points
    missed = (mass > NEGLIGIBLE) & ~(attached.log_q(x) > -np.inf)
    if not missed.any():
        return Condition("support of q", True, f"positive at {len(x)} points of p")
    _, i = worst(np.where(missed, mass, -1.0))
    return Condition("support of q", False, f"the density of q is 0 (or NaN) at {at(x[i])}, where p is positive; widen q.")


def second_moment(attached: Attached, domain: Domain) -> Condition:
    """Whether the integrals of (w u)^2 q and (w psi)^2 q are finite: in the tails, and where q vanishes inside."""
    name, site, chart = "second moment", domain.site, domain.chart
    if chart is None and domain.rule is None:
        return Condition(name, None, "not checked: a support of an unknown kind")
    heavy = _discrete_tail(attached, domain) if chart is None else _tails(attached, domain, chart)
    if heavy is not None:
        found = f"E_q[w^2 (u^2 + psi^2)] is infinite{heavy}: its integrand does not decay, because the tail of q is too light; widen q "
        return Condition(name, False, found + "(proposals.tempered, student_t or defensive).")
    if domain.rule is None:
        return Condition(name, True, "p^2/q decays in the tails")
    y, log_w = domain.rule
    x, log_p = domain.located(site.zero, y)
    log_weight = site.log_prob(site.zero, x) - attached.log_q(x)
    if chart is not None and y.shape[-1] == 1:
        vanishing = _zero_of_q(attached, domain, y, np.where(log_p + log_w > math.log(NEGLIGIBLE), log_weight, -np.inf))
        if vanishing is not None:
            return Condition(name, False, vanishing)
    square = np.exp(np.where(log_p > -np.inf, log_weight + log_p + log_w, -np.inf)).sum(0).max()
    return Condition(name, True, f"E_q[w^2] = {square:.3g}" if square < 1e6 else "finite, though q vanishes where the estimator does")


def _discrete_tail(attached: Attached, domain: Domain) -> str | None:
    site = domain.site
    bounds = site.target.support
    if bounds.kind != "coordinates" or np.isfinite(np.max(site.host.numpy(bounds.upper))):
        return None
    x = domain.rule[0][-2:]  # type: ignore[index]
    near, far = 2 * site.log_prob(site.zero, x) - attached.log_q(x)
    return None if (far < near).all() else f" towards {at(x[-1])}"


def _tails(attached: Attached, domain: Domain, chart: Chart) -> str | None:
    """Where the integral is infinite: the integrand has to decay along rays from the middle, in the coordinates t."""
    site = domain.site
    d = domain.coordinates.centre.shape[-1]
    units = np.concatenate([np.eye(d), np.random.default_rng(site.seed).normal(size=(6 * (d > 1), d))])
    units = units / np.linalg.norm(units, axis=-1, keepdims=True)
    r = np.linspace(1, FAR, TAIL)[:, None]
    t = np.stack([site.everywhere(r * unit) for unit in (*units, *-units)])  # (rays, TAIL, *batch, d)
    y = domain.coordinates.to_y(t)
    x, log_p = domain.located(site.zero, y.reshape((-1, *y.shape[2:])))
    slope = np.broadcast_to(chart.log_slope(y), y.shape[:-1])
    with np.errstate(invalid="ignore"):
        log_square = 2 * log_p.reshape(slope.shape) - slope - attached.log_q(x).reshape(slope.shape) + domain.coordinates.log_slope(t)
    low, high = chart.limits()
    seen = np.isfinite(log_square) & ((y > low) & (y < high)).all(-1)
    last = np.where(seen, np.arange(TAIL).reshape(-1, *[1] * len(site.batch)), 0).max(1)
    x = x.reshape((*slope.shape, -1))

    def inwards(k: int) -> np.ndarray:
        i = np.maximum(last - k, 0)[:, None]
        return _with_field(attached, domain, np.take_along_axis(x, i[..., None], 1)[:, 0], np.take_along_axis(log_square, i, 1)[:, 0])

    heavy = ~(inwards(0) < inwards(1))
    if not heavy.any():
        return None
    ray, *element, parameter = np.unravel_index(heavy.argmax(), heavy.shape)
    return f", parameter {site.labels[parameter]}, towards {at(x[(ray, last[(ray, *element)], *element)])}"


def _with_field(attached: Attached, domain: Domain, x: np.ndarray, log_square: np.ndarray) -> np.ndarray:
    """The log of p^2/q (psi^2 + (relative u)^2), (n, *batch, D), without the field where it is not finite."""
    u, psi = attached.field(x)
    reach = np.quantile(abs(domain.site.draws - domain.middle), 0.5, axis=0) + abs(x - domain.middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = 2 * np.logaddexp(np.log(abs(psi)), np.log(abs(u)).max(-2) - np.log(reach).max(-1, keepdims=True))
    return log_square[..., None] + np.where(np.isnan(size) | (size == np.inf), 0.0, size)


def _zero_of_q(attached: Attached, domain: Domain, y: np.ndarray, log_weight: np.ndarray) -> str | None:
    """What is wrong where q vanishes inside the support, found by zooming in on the largest weight."""
    site = domain.site
    order = np.argsort(y[..., 0], 0)
    y, log_weight = np.take_along_axis(y, order[..., None], 0), np.take_along_axis(log_weight, order, 0)
    first = log_weight.max(0)
    low, high = _around(y, log_weight)
    for _ in range(10):
        y = low + (high - low) * np.linspace(0, 1, ZOOM).reshape(-1, *[1] * low.ndim)
        x = domain.located(site.zero, y)[0]
        log_weight = np.nan_to_num(site.log_prob(site.zero, x) - attached.log_q(x), nan=-np.inf)
        low, high = _around(y, log_weight)
    if not (log_weight.max(0) > first + 3).any():
        return None
    unit = domain.coordinates.spread[..., 0]
    y = np.stack([(low + high) / 2 + side * h * unit for h in (1e-5, 1e-4) for side in (-1, 1)])
    x, log_p = domain.located(site.zero, y)
    u, psi = attached.field(x)
    with np.errstate(divide="ignore"):
        size = np.log(psi**2 + (u[..., 0, :] / unit) ** 2)
    log_square = (log_p + site.log_prob(site.zero, x) - attached.log_q(x))[..., None] + size
    rate, i = worst((log_square[:2] - log_square[2:]) / math.log(10), of_nan=-np.inf)
    if rate < 0.95:  # the rate of 1 over the distance, whose integral is infinite
        return None
    return (
        f"q vanishes near {at(x[i[:-1]])}, but the estimator of {site.labels[i[-1]]} does not, so its second moment is infinite; "
        "mix p into q (proposals.defensive), or check only the parameter that q is for."
    )


def _around(y: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of the point of the largest weight, for each element of the batch."""
    k = log_weight.argmax(0)[None]
    low, high = (np.take_along_axis(y, np.clip(k + s, 0, len(y) - 1)[..., None], 0)[0] for s in (-1, 1))
    return low, high


def sampler(attached: Attached, domain: Domain, costs: Costs, proposed: tuple[np.ndarray, np.ndarray]) -> Condition:
    """Weighted means of the costs over draws, compared with the means by the rule; without a rule, the mean weight."""
    site, (x, w) = domain.site, proposed
    terms = w * costs.at(x)
    if domain.rule is None:
        expected, terms = np.ones((1, *site.batch)), terms[:1]
    else:
        y, log_w = domain.rule
        at_y, log_p = domain.located(site.zero, y)
        expected = (np.exp(log_p + log_w) * costs.at(at_y)).sum(1)
    z = (terms.mean(1) - expected) / (terms.std(1) / math.sqrt(terms.shape[1]) + site.tolerance / Z)
    largest, i = worst(abs(z))
    if largest < Z:
        return Condition("sampler", True, f"z = {z[i]:.1f} over {terms.shape[1]} draws")
    what = "p" if attached.estimator.q is None else "q"
    found = (
        f"the mean of {costs.names[i[0]]} over draws of {what} is {terms.mean(1)[i]:.4g}, expected {expected[i]:.4g} by its density "
        f"(z = {z[i]:.1f}); sample and log_prob of {what} do not agree, or its weights have no finite variance."
    )
    return Condition("sampler", False, found)

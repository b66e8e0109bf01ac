"""The last conditions of :func:`flowvi.check_estimator`: the mean of psi, and the mean gradient of each test cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flowvi.checks.attached import Attached
from flowvi.checks.costs import Costs
from flowvi.checks.differences import worst
from flowvi.checks.domain import NEGLIGIBLE, Domain
from flowvi.checks.report import Condition
from flowvi.ops import Array

Z = 5.0  # the largest z-score
CHUNKS = 50  # groups of samples, whose means give the standard error

Means = tuple[np.ndarray, np.ndarray]


def conditions(attached: Attached, domain: Domain, costs: Costs, proposed: tuple[np.ndarray, np.ndarray]) -> Iterator[Condition]:
    """E[psi] = 0 (the constant cost), and the derivative of the mean of the other costs."""
    site, by_sampler = attached.site, attached.estimator.uses_sampler
    by_rule, exact = domain.rule is not None, domain.rule is not None and not by_sampler
    if exact:
        (estimate, doubt), truth = _integrated(attached, domain, costs), _truth(domain, costs)
        truth[0] = 0.0  # for a normalized density
        scale = abs(truth).max(0) + 1 / site.unit
        if (doubt / scale).max() > site.tolerance:
            by_rule = exact = False
    if not exact:
        estimates = _sampled(attached, costs, proposed)
        truths = _truth(domain, costs)[:, None] if by_rule else _reweighted(domain, costs, proposed)
        truths[0] = 0.0
        estimate, truth = estimates.mean(1), truths.mean(1)
        scale = (estimates - truths).std(1, ddof=1) / math.sqrt(CHUNKS) + site.tolerance / Z / site.unit
    error = abs(estimate - truth) / scale
    by = f"over {site.num_samples} samples" if not exact else "by summation" if site.discrete else "by quadrature"

    def condition(name: str, size: float, found: str, who: str) -> Condition:
        holds = size <= (site.tolerance if exact else Z)
        return Condition(name, holds, f"{f'{size:.1e}' if exact else f'|z| = {size:.1f}'} at {who}, {by}" if holds else found)

    if not by_sampler:
        size, i = worst(error[:1])
        who = f"parameter {site.labels[i[-1]]}"
        found = f"{who}: E_p[psi] is {estimate[i]:.6g}, expected 0 {by}; u jumps inside the support or crosses its boundary, or "
        found += f"log_prob is not normalised{'' if exact else ' or not that of the sampler'}."
        yield condition("mean of psi", size, found, who)
    size, i = worst(error[1:])
    i = (i[0] + 1, *i[1:])
    who, z = f"parameter {site.labels[i[-1]]}", "" if exact else f" (|z| = {size:.1f})"
    found = f"{who}: at the cost {costs.names[i[0]]} of the {'angle' if site.on_circle else 'standardized value'} the mean estimate is "
    found += f"{estimate[i]:.6g}, but the derivative of the mean cost is {truth[i]:.6g} {by}{z}; correct the other conditions first."
    yield condition("unbiased", size, found, who)


def _terms(costs: Costs, value: Array, score: Array | None, weights: Array) -> Array:
    """The terms w (phi(value) + score sg(phi)), whose derivatives are the estimates; the costs are the first axis."""
    ops = costs.site.host.ops
    phi = ops.stack(costs.of(value), 0)
    return weights * (phi if score is None else phi + score * ops.stop_gradient(phi))


# ---- by a rule


def _integrated(attached: Attached, domain: Domain, costs: Costs) -> Means:
    """The expectation of the estimator by the rule, (costs, *batch, D); in two dimensions, also by how much its two halves differ."""
    assert domain.rule is not None
    site, (y, log_w), (x, mass) = attached.site, domain.rule, domain.points
    weights = mass
    if attached.estimator.q is not None:
        slope = 0.0 if domain.chart is None else domain.chart.log_slope(y)
        weights = np.exp(attached.log_q(x) + attached.log_weight(x) + slope + log_w)
    w, half = site.host.array(np.where(mass > NEGLIGIBLE, weights, 0.0)), domain.half(y)
    halves = [] if half is None else [site.host.array(h.reshape((-1, *[1] * len(site.batch))) * 1.0) for h in (half, ~half)]
    live = site.shaped(x)

    def f(eta: Array) -> list[Array]:
        draw = attached.draw(eta, live, pushed=True)
        terms = _terms(costs, draw.value, draw.score, w)
        return [2 * (terms * h).sum(1) for h in halves] or [terms.sum(1)]

    first, *second = site.host.jacobian(f, site.size)()
    return ((first + second[0]) / 2, abs(first - second[0])) if second else (first, 0 * first)


def _truth(domain: Domain, costs: Costs) -> np.ndarray:
    """The derivatives of the mean costs, (costs, *batch, D), by differences of the rule."""
    assert domain.rule is not None
    y, log_w = domain.rule

    def mean(eta: np.ndarray) -> np.ndarray:
        x, log_p = domain.located(eta, y)
        return (np.exp(log_p + log_w) * costs.at(x, eta)).sum(1)

    return domain.site.along(mean)


# ---- by samples


def _sampled(attached: Attached, costs: Costs, proposed: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Means of the estimator, (costs, CHUNKS, *batch, D)."""
    site, (x, weights) = attached.site, proposed
    n = site.num_samples // CHUNKS

    def by_sampler(eta: Array, seed: Array) -> list[Array]:
        value = site.host.rsample(site.distribution(eta, n), seed)
        return [_terms(costs, value, None, site.host.array(np.ones((n, *site.batch)))).mean(1)]

    def by_draws(eta: Array, x: Array, w: Array) -> list[Array]:
        draw = attached.draw(eta, x, pushed=True)
        return [_terms(costs, draw.value, draw.score, w).mean(1)]

    def arguments(i: int) -> tuple[Any, ...]:
        if attached.estimator.uses_sampler:
            return (site.host.array(site.seed + 7 + i),)
        return site.shaped(x[i * n : (i + 1) * n]), site.host.array(weights[i * n : (i + 1) * n])

    run = site.host.jacobian(by_sampler if attached.estimator.uses_sampler else by_draws, site.size)
    return np.stack([run(*arguments(i))[0] for i in range(CHUNKS)], 1)


def _reweighted(domain: Domain, costs: Costs, proposed: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The likelihood ratio by differences, at the same draws and of the same shape."""
    site, (x, weights) = domain.site, proposed
    y = x if domain.chart is None else domain.chart.to_y(x)
    start = domain.located(site.zero, y)[1]

    def mean(eta: np.ndarray) -> np.ndarray:
        moved, log_p = domain.located(eta, y)
        terms = weights * np.exp(log_p - start) * costs.at(moved, eta)
        return terms.reshape((len(terms), CHUNKS, -1, *site.batch)).mean(2)

    return site.along(mean)

"""Every condition of :func:`flowvi.check_estimator`, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flowvi.checks import boundary, coverage, means, pointwise
from flowvi.checks.attached import Attached
from flowvi.checks.costs import Costs
from flowvi.checks.domain import Domain
from flowvi.checks.report import Condition
from flowvi.checks.site import PerturbedSite
from flowvi.estimators import Estimator, Flow, ImplicitRP


def conditions(site: PerturbedSite, estimator: Estimator) -> Iterator[Condition]:
    """Every condition that applies; conditions that others need come first."""
    ops = site.host.ops
    try:
        estimator = estimator.resolve(site.target)
        if estimator.enters != site.enters:
            site = replace(site, enters=estimator.enters)
        attached, domain = Attached(site, estimator), Domain(site)
        estimator.at_p().proposal(ops, site.target)
        _ = site.steps  # draws from p and evaluates its density
    except ValueError as error:
        yield _refusal("requirements", error)
        return
    if estimator.q is not None:
        try:
            estimator.proposal(ops, site.target_at(site.zero, 1))
        except ValueError as error:
            yield _refusal("support of q", error)
            return
    if not estimator.uses_sampler:
        try:
            attached.field(site.draws[:1])
        except ValueError as error:
            yield _refusal("requirements", error)
            return
    yield Condition("requirements", True, "accepted")
    x = pointwise.ordinary_points(domain)
    yield pointwise.log_prob(domain, x)
    if estimator.q is not None:
        covered = coverage.support(attached, domain)
        yield covered
        if not covered.holds:
            return
    costs = Costs(site)
    if not estimator.uses_sampler:
        if isinstance(estimator, Flow) and estimator.velocity.elementwise is None:
            yield pointwise.linear(attached, x)
        if isinstance(estimator, ImplicitRP) and estimator.standardization is not None:
            yield pointwise.standardization(attached, domain, x)
        finite = pointwise.finite(attached, domain)
        yield finite
        if not finite.holds:
            yield Condition("unbiased", None, "not checked: the field is not finite")
            return
        yield pointwise.elementwise(attached, x)
        yield from pointwise.psi(attached, domain, x)
        if site.on_circle and domain.rule is not None:
            closed, crossed = boundary.seam(attached, domain)
            yield closed
            costs = Costs(site, periodic_only=crossed)
        else:
            yield from boundary.conditions(attached, domain)
        if estimator.q is not None:
            yield coverage.second_moment(attached, domain)
    proposed = attached.proposed(domain.middle)
    yield coverage.sampler(attached, domain, costs, proposed)
    yield from means.conditions(attached, domain, costs, proposed)


def _refusal(name: str, error: ValueError) -> Condition:
    found = str(error).removeprefix("site 'x': ")
    return Condition(name, False, f"{found} (A parameter that is a constant may be left out of `parameters`.)")

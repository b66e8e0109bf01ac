"""``check_estimator``: does for estimators what ``gradcheck`` does for derivatives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowvi.checks.conditions import conditions
from flowvi.checks.means import CHUNKS
from flowvi.checks.parameters import as_function, require_same
from flowvi.checks.report import Condition, EstimatorError, EstimatorReport
from flowvi.checks.site import PerturbedSite
from flowvi.estimators import Estimator
from flowvi.host import as_found, host_of

__all__ = ["Condition", "EstimatorError", "EstimatorReport", "check_estimator"]


def check_estimator(
    distribution: Any,
    estimator: Estimator,
    parameters: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-4,
    num_samples: int = 20_000,
    seed: int = 0,
    raise_exception: bool = True,
) -> EstimatorReport:
    r"""Check that :math:`E_q\{w\,[u\cdot\nabla\phi + \psi\,\phi]\} = \nabla_\theta E_p[\phi]`, and its conditions on u, psi and q.

    u is the velocity of the estimator's own draw and psi the derivative of its own score, so the check tests the code that runs. Every
    derivative is compared with finite differences of the host's ``log_prob``, which a ``stop_gradient`` or a wrong gradient rule does
    not affect. These are the conditions, by the names in the report:

    * ``requirements``: the estimator does not refuse the distribution (shapes, families, a support that moves).
    * ``support of q``: q is positive wherever p is. ``second moment``: E_q[(w u)^2] and E_q[(w psi)^2] are finite, in the tails and
      where q vanishes. ``sampler``: the draws follow the density.
    * ``linear in dtheta``: a general velocity is linear, with velocity(x, p, 0) = 0. ``elementwise``: no element of a batch reads
        another.
    * ``standardization``: S depends on x and is invertible. ``finite``: neither NaN nor infinite where p has mass.
    * ``log_prob``: its automatic derivatives in the parameters and in x are right.
    * ``divergence``: psi = div u + u . grad log p + d_theta log p. ``pathwise``: psi is 0 if it is declared 0. ``score``: psi is right
      if u = 0.
    * ``tangent``: a velocity stays on the simplex. ``boundary flux``: p (u - v) vanishes at the ends of the support, which move with
      speed v, and at infinity. On a circle, the mass that leaves at the seam (the angle pi) comes in again.
    * ``mean of psi``: E_p[psi] = 0, and ``unbiased``: the equation above, for three smooth bounded or slowly growing costs.

    Means are computed by quadrature for events of one and two dimensions, by sums over a discrete support, and otherwise (and for
    ``RP()``, whose draws are the host's own) as sample means with z-scores (\|z\| < 5).

    **What it cannot see**: jumps of *your* cost in x, which ``RP``, ``ImplicitRP`` and ``Flow`` do not allow; costs unlike the test
    costs, such as one that grows faster than the tails of p fall; how large a finite variance is (see ``gradient_report``); dependence
    between sites; an error at other parameters. On a circle, costs that are not periodic are tried only if u is 0 at the seam.

    **Requirements**: a distribution with ``expand`` that can be built again from its parameters; otherwise give a function. Everything
    runs in double precision and on the CPU, so networks in your functions must be on the CPU too.

    Args:
        distribution: A distribution of either host with the parameters at which to check, or a function of parameters that returns one.
            Batches are checked element by element.
        estimator: The estimator, such as ``Flow(velocity)``.
        parameters: The names of the parameters to check, such as ``("loc",)``; by default all, including the bounds of a support. A
            parameter of a part has a longer name, such as ``"component_distribution.loc"``. For a function: its arguments by name.
        tolerance: The largest discrepancy, relative to the size of the terms.
        num_samples: The number of samples for sample means.
        seed: The seed of all draws.
        raise_exception: Whether to raise an error if a condition fails, as ``torch.autograd.gradcheck`` does.

    Returns:
        The report, which prints as a table.

    Raises:
        flowvi.checks.EstimatorError: An ``AssertionError`` that lists all failed conditions: where, by how much, and what to do.
        ValueError: An estimator that compares the cost at several values of its site, such as ``Enumerate()``, or one that is biased.
        TypeError: ``distribution`` does not belong to a host whose adapter (``flowvi.numpyro`` or ``flowvi.pyro``) has been imported,
            or cannot be built again; ``estimator`` is not an estimator; a parameter is unknown.

    Example:
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> half = flowvi.Flow(loc=lambda x, p: 0.5)
        >>> report = flowvi.check_estimator(dist.Normal(0.3, 1.2), half)
        >>> report.failed
        ()
        >>> wrong = flowvi.Flow(lambda x, p, dtheta: 0.5 * dtheta.loc, divergence="pathwise")
        >>> [c.name for c in flowvi.check_estimator(dist.Normal(0.3, 1.2), wrong, ["loc"], raise_exception=False).failed]
        ['pathwise', 'unbiased']

    References:
        Parmas and Sugiyama 2021, eq. 19, with the boundary term of its appendix.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"check_estimator: expected an estimator such as flowvi.LR(), found {estimator!r}.")
    if estimator.compares or estimator.biased:
        does = "compares the cost at several values" if estimator.compares else "is biased by design"
        raise ValueError(
            f"check_estimator: expected a velocity or a score to check, found {estimator}, which {does}; "
            "gradient_report shows the mean and the variance of its gradient in a program."
        )
    with as_found(distribution, estimator):
        build, start = as_function(distribution, parameters)
        p = build({name: parameter.value for name, parameter in start.items()})
        host = host_of(p)
        with host.precise():
            if hasattr(distribution, "log_prob"):
                require_same(host, distribution, p)
            site = PerturbedSite(
                host=host,
                build=build,
                start=start,
                enters=estimator.enters,
                tolerance=tolerance,
                num_samples=CHUNKS * math.ceil(num_samples / CHUNKS),
                seed=seed,
            )
            names = dict.fromkeys(label.split("[")[0] for label in site.labels)
            report = EstimatorReport(f"{estimator!r} at {site.family}({', '.join(names)})", tuple(conditions(site, estimator)))
    if raise_exception and report.failed:
        raise EstimatorError(report)
    return report

"""Wider versions of p."""

from __future__ import annotations

from typing import Any

from flowvi.family import family_of, names
from flowvi.host import host_of
from flowvi.proposals.proposal import Proposal, named, refuse
from flowvi.rebuild import rebuild


def tempered(tau: float) -> Proposal:
    r"""An overdispersed q of the same exponential family: its natural parameters are those of p divided by ``tau``.

    For a Normal the variance is tau times that of p; a Gamma gets concentration (a - 1) / tau + 1 and rate b / tau.

    **Requirements**: an exponential family (Normal, LogNormal, HalfNormal, MultivariateNormal, Laplace with a fixed loc, Exponential,
    Gamma, Beta, Dirichlet, VonMises, Poisson, Bernoulli and Categorical). For tau >= 1 (for a Normal, tau > 1/2) the variance is finite
    for every parameter and every cost for which it is finite at q = p. The weight of D independent Normal sites multiplies the second
    moment by (tau / sqrt(2 tau - 1))^D.

    Args:
        tau: The temperature; 1 is p itself. The best value for the location of a Normal and a bounded cost is near 2.

    Returns:
        The function q.

    Raises:
        ValueError: At the first run, for another family.

    Example:
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import proposals
        >>> round(float(proposals.tempered(2.0)(dist.Normal(0.0, 3.0)).variance), 3)
        18.0

    References:
        Ruiz, Titsias and Blei 2016 (overdispersed black-box variational inference).
    """

    def q(p: Any) -> Any:
        known = family_of(p)
        if known.tempered is None:
            refuse("tempered", names(lambda family: family.tempered), p)
        return rebuild(p, known.tempered(p, tau))

    return named(f"tempered({tau})", q)


def student_t(df: float) -> Proposal:
    r"""A Student's t with the location and scale of p: q = t_df((x - loc) / scale) / scale.

    **Requirements**: a Normal, Laplace, Logistic, Cauchy, StudentT or MultivariateNormal p. If p has lighter tails than q (Normal,
    Laplace, Logistic), the weights are bounded, and the variance is finite for every parameter and every cost of polynomial growth.

    Args:
        df: The degrees of freedom.

    Returns:
        The function q.

    Raises:
        ValueError: At the first run, for any other family.

    Example:
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import proposals
        >>> round(float(proposals.student_t(5.0)(dist.Normal(0.0, 3.0)).variance), 3)
        15.0

    References:
        Parmas and Sugiyama 2021, section 3, on the choice of q.
    """

    def q(p: Any) -> Any:
        host = host_of(p)
        if hasattr(p, "scale_tril"):
            return host.multivariate_student_t(df, p.loc, p.scale_tril)
        if not family_of(p).symmetric:
            refuse("student_t", [*names(lambda family: family.symmetric), "MultivariateNormal"], p)
        return host.student_t(df, p.loc, p.scale)

    return named(f"student_t({df})", q)

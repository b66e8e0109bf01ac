"""Fields of a MultivariateNormal."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from flowvi.family import families_with
from flowvi.fields.field import Field, _total
from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents

Null = Callable[[Any, Tangents], Array]


def multivariate_normal(null: Null | None = None) -> Field:
    r"""The field u = dloc + dL L^-1 y with y = x - loc and L the Cholesky factor of the covariance, plus A Sigma^-1 y; psi = 0.

    For any antisymmetric A, A Sigma^-1 y does not change the density, so A only changes the variance.

    **Requirements**: a cost without jumps, and x p phi -> 0 at infinity. Any parameterisation of the host: scale_tril, covariance or
    precision.

    Args:
        null: ``null(p, dtheta)``, a matrix over the event (linear in dtheta), whose antisymmetric part is A.

    Returns:
        The field of a MultivariateNormal; without ``null``, the same as that of the hosts' samplers.

    Example:
        E[x . x] is the sum of the variances, here 2 (1 + t)^2:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def move(t):
        ...     return dist.MultivariateNormal(jnp.zeros(2), scale_tril=(1 + t) * jnp.eye(2))
        >>> samples = plot.gradient_samples(move(0.0), Flow(fields.multivariate_normal()), move, lambda x: (x**2).sum(-1))
        >>> bool(abs(samples.mean() - 4.0) < 0.1)
        True

    References:
        Jankowiak and Obermeyer 2018, section 4.3; Jankowiak and Karaletsos 2019, for the null field.
    """

    def linear(ops: Ops, p: Any, dtril: Array, eps: Array) -> Array:
        return _times(dtril, eps)

    return _multivariate_normal("multivariate_normal", families_with(multivariate_normal), linear, null)


def multivariate_normal_transport(null: Null | None = None) -> Field:
    r"""u_loc = 1 and u = M y with M symmetric and M Sigma + Sigma M = dSigma, the optimal transport field; psi = 0.

    A ``null`` adds A Sigma^-1 y as in :func:`multivariate_normal`. Of all pathwise fields, this one has the least E|u|^2, and often but
    not always the least variance.

    **Requirements**: a cost without jumps, and x p phi -> 0 at infinity. It needs the eigenvalues of the covariance, O(D^3).

    Args:
        null: ``null(p, dtheta)``, a matrix over the event (linear in dtheta), whose antisymmetric part is A.

    Returns:
        The field of a MultivariateNormal.

    Example:
        E[x . x] is the sum of the variances, here 2 (1 + t)^2:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def move(t):
        ...     return dist.MultivariateNormal(jnp.zeros(2), scale_tril=(1 + t) * jnp.eye(2))
        >>> samples = plot.gradient_samples(move(0.0), Flow(fields.multivariate_normal_transport()), move, lambda x: (x**2).sum(-1))
        >>> bool(abs(samples.mean() - 4.0) < 0.1)
        True

    References:
        Jankowiak and Obermeyer 2018, section 4.3.
    """

    def linear(ops: Ops, p: Any, dtril: Array, eps: Array) -> Array:
        half = dtril @ p.scale_tril.mT
        d, v = ops.eigh(p.scale_tril @ p.scale_tril.mT)
        m = v @ ((v.mT @ (half + half.mT) @ v) / (d[..., None, :] + d[..., :, None])) @ v.mT
        return _times(m, _times(p.scale_tril, eps))

    return _multivariate_normal("multivariate_normal_transport", families_with(multivariate_normal_transport), linear, null)


def _multivariate_normal(
    name: str, families: tuple[str, ...], linear: Callable[[Ops, Any, Array, Array], Array], null: Null | None
) -> Field:
    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, eps = dtheta.ops, dtheta.ops.solve_lower(p.scale_tril, x - p.loc)
        dloc, dtril = (dtheta.of(attrgetter(part)) for part in ("loc", "scale_tril"))
        terms = [] if dloc is None else [dloc]
        terms += [] if dtril is None else [linear(ops, p, dtril, eps)]
        if null is not None:
            a = null(p, dtheta)
            terms.append(_times((a - a.mT) / 2, ops.solve_upper(p.scale_tril.mT, eps)))
        return _total(terms) if terms else ops.asarray(0.0, x)

    argument = "" if null is None else f"null={getattr(null, '__name__', null)}"
    return Field(velocity, "pathwise", families=families, name=f"fields.{name}({argument})")


def _times(a: Array, x: Array) -> Array:
    return (a @ x[..., None])[..., 0]

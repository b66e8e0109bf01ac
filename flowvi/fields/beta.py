"""Fields of a Beta, and of the families whose coordinates are Betas: Dirichlet, StudentT."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from flowvi.family import families_with
from flowvi.fields.field import Elementwise, Field, _closed, _pathwise
from flowvi.fields.half_line import integral, width_of
from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents


def _beta_implicit(ops: Ops, a: Array, b: Array, x: Array, one_minus_x: Array) -> Array:
    """-(dF/da) / (p x (1 - x)) of a Beta(a, b) at x, from the nearer end, in log x or log(1 - x)."""
    a, b = ops.broadcast_to(a, x.shape), ops.broadcast_to(b, x.shape)
    below = x * b < one_minus_x * a
    near, far = ops.where(below, a, b), ops.where(below, b, a)
    odds = ops.where(below, x, one_minus_x) / ops.where(below, one_minus_x, x)
    bend = ops.where(far > 1, far - 1, 0 * far) * odds
    near_, far_, odds_, below_ = near[..., None], far[..., None], odds[..., None], below[..., None]
    log_x = ops.log(ops.where(x > 0, x, a))[..., None]  # any value will do at x = 0, where the field is 0
    mean_log = (ops.digamma(a) - ops.digamma(a + b))[..., None]

    def integrand(r: Array) -> Array:
        tail = ops.log1p(-odds_ * ops.expm1(-r))
        return (log_x + ops.where(below_, -r, tail) - mean_log) * ops.exp(-near_ * r + (far_ - 1) * tail)

    return ops.where(below, -1 / one_minus_x, 1 / x) * integral(ops, integrand, width_of(ops, near - bend, bend * (1 + odds)))


def beta_implicit() -> Field:
    r"""The field u = -(dF / d theta) / p for concentration1 and concentration0; psi = 0.

    The derivative of the cdf is computed by quadrature as in :func:`gamma_implicit`.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Beta.

    Example:
        E[x] is a / (a + b), with the derivative b / (a + b)^2 in a:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Beta(2.0, 1.0), Flow(fields.beta_implicit()), "concentration1", lambda x: x)
        >>> bool(abs(samples.mean() - 1 / 9) < 0.005)
        True

    References:
        Figurnov, Mohamed and Mnih 2018; Jankowiak and Obermeyer 2018.
    """

    def u_1(ops: Ops, x: Array, p: Any) -> Array:
        return x * (1 - x) * _beta_implicit(ops, p.concentration1, p.concentration0, x, 1 - x)

    def u_0(ops: Ops, x: Array, p: Any) -> Array:
        return -x * (1 - x) * _beta_implicit(ops, p.concentration0, p.concentration1, 1 - x, x)

    return _pathwise("beta_implicit", families_with(beta_implicit), concentration1=u_1, concentration0=u_0)


def beta_g_rep() -> Field:
    r"""u_a = x (1 - x) [psi_1(a) + c (logit x - m)], m = psi_0(a) - psi_0(b), c = psi_2(a) / (2 psi_1(a) + 2 psi_1(b)); likewise u_b.

    Here a = concentration1 and b = concentration0. The field keeps logit x, standardized by its mean and standard deviation, fixed
    (generalised reparameterization). psi is not 0; the divergence of u_a is (1 - 2x) [...] + c.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Beta.

    Example:
        E[x] is a / (a + b), with the derivative b / (a + b)^2 in a:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Beta(2.0, 1.0), Flow(fields.beta_g_rep()), "concentration1", lambda x: x)
        >>> bool(abs(samples.mean() - 1 / 9) < 0.005)
        True

    References:
        Ruiz, Titsias and Blei 2016 (the generalized reparameterization gradient), section 3.3.
    """

    def pair(sign: int, name: str) -> tuple[Elementwise, Elementwise]:
        def stretch(ops: Ops, x: Array, p: Any) -> tuple[Array, Array]:
            a, b = p.concentration1, p.concentration0
            own = getattr(p, name)
            c = ops.polygamma(2, own) / (2 * (ops.polygamma(1, a) + ops.polygamma(1, b)))
            logit = ops.log(x) - ops.log1p(-x)
            return sign * ops.polygamma(1, own) + c * (logit - ops.digamma(a) + ops.digamma(b)), c

        def u(ops: Ops, x: Array, p: Any) -> Array:
            return x * (1 - x) * stretch(ops, x, p)[0]

        def divergence(ops: Ops, x: Array, p: Any) -> Array:
            bracket, c = stretch(ops, x, p)
            return (1 - 2 * x) * bracket + c

        return u, divergence

    return _closed(
        "beta_g_rep", families_with(beta_g_rep), concentration1=pair(1, "concentration1"), concentration0=pair(-1, "concentration0")
    )


def dirichlet() -> Field:
    r"""u_j = v_j (e_j - x) / (1 - x_j) for concentration j, with v_j the Beta(a_j, sum a - a_j) field at x_j; psi = 0.

    When one concentration changes, its coordinate moves like a Beta, and the others keep their proportions. So u is tangent to the
    simplex.

    **Requirements**: a cost without jumps.

    Returns:
        The field of a Dirichlet.

    Example:
        E[x_0] is a_0 / sum(a); at a = (2, 1, 1) its derivative in a_0 is 1 / 8:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def move(t):
        ...     return dist.Dirichlet(jnp.array([2.0, 1.0, 1.0]) + t * jnp.array([1.0, 0.0, 0.0]))
        >>> samples = plot.gradient_samples(move(0.0), Flow(fields.dirichlet()), move, lambda x: x[..., 0])
        >>> bool(abs(samples.mean() - 0.125) < 0.005)
        True

    References:
        Jankowiak and Obermeyer 2018, section 4.2.
    """

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, d = dtheta.ops, dtheta.of(attrgetter("concentration"))
        if d is None:
            return ops.asarray(0.0, x)
        rest = p.concentration.sum(-1)[..., None] - p.concentration
        pull = d * x * _beta_implicit(ops, p.concentration, rest, x, x.sum(-1)[..., None] - x)
        return pull - x * pull.sum(-1)[..., None]

    return Field(velocity, "pathwise", families=families_with(dirichlet), name="fields.dirichlet()")


def student_t() -> Field:
    r"""u_loc = 1, u_scale = (x - loc) / scale and u_df = -(dF / d df) / p, odd about loc; psi = 0.

    The cdf is that of a Beta(1/2, df/2) at t^2 / (df + t^2). Its derivative is computed by quadrature as in :func:`gamma_implicit`.

    **Requirements**: phi = o(x^df) at infinity; a cost without jumps.

    Returns:
        The field of a StudentT.

    Example:
        E[x^2] is df / (df - 2), with the derivative -2 / (df - 2)^2:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.StudentT(12.0, 0.0, 1.0), Flow(fields.student_t()), "df", lambda x: x**2)
        >>> bool(abs(samples.mean() + 0.02) < 0.004)
        True

    References:
        Figurnov, Mohamed and Mnih 2018.
    """

    def u_df(ops: Ops, x: Array, p: Any) -> Array:
        t2 = ((x - p.loc) / p.scale) ** 2
        share = t2 / (p.df + t2)
        half = ops.broadcast_to(ops.asarray(0.5, x), x.shape)
        return (x - p.loc) * (0.5 / p.df - 0.25 * _beta_implicit(ops, p.df / 2, half, p.df / (p.df + t2), share))

    return _pathwise(
        "student_t", families_with(student_t), loc=lambda ops, x, p: 1.0, scale=lambda ops, x, p: (x - p.loc) / p.scale, df=u_df
    )

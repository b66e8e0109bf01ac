"""Implicit reparameterization: the velocity that a standardization implies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from flowvi.estimators.estimator import Draw, Estimator, refuse_discrete, refuse_moving_support
from flowvi.jumps import Jumps, JumpsField
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class ImplicitRP(Estimator):
    r"""Implicit reparameterization: :math:`u = -(\partial S/\partial x)^{-1}\,\partial_\theta S(x;\theta)`, from a standardization S.

    If the law of S(x) does not depend on the parameters, as for a cdf, psi = 0. For any other invertible S set ``exact=False``: psi is
    then the derivative of log p(x; theta) - log |det dS/dx| along the flow (the generalised reparameterization).

    **Requirements**: S differentiable in x and in the parameters, and invertible in x; a cost without jumps in x. For a scalar family S
    is elementwise. For an event, S returns a vector of the same size, and a dense linear system is solved with its Jacobian.

    Args:
        standardization: ``S(x, p) -> eps`` with x of shape batch_shape + event_shape (detached) and p with *live* parameters. The
            default is the distribution's own cdf.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        exact: Whether the law of S(x) is the same for all parameters.
        jumps: Where the cost jumps as x crosses a number t: numbers, arrays that broadcast to x, or functions of p (with live
            parameters). Each takes two more evaluations of the program, and adds the surface term p(t) (u(t) - dt/dtheta) [phi].

    Raises:
        ValueError: At the first run, naming the site: a discrete site; no cdf, or one without a derivative in a parameter; an S that
            returns another shape or does not depend on x; with ``exact=False`` a support that moves.

    Example:
        The gradient of E[3 x] under a Logistic, in its scale, is 3 eps, with eps the standardized sample. Its standard deviation is 3
        pi / sqrt(3) = 5.44.

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import ImplicitRP, plot
        >>> def standardize(x, p):
        ...     return (x - p.loc) / p.scale
        >>> samples = plot.gradient_samples(dist.Logistic(0.5, 2.0), ImplicitRP(standardize), "scale", lambda x: 3.0 * x)
        >>> bool(abs(samples.std() - 5.44) < 0.2)
        True

    References:
        Figurnov, Mohamed and Mnih 2018; Ruiz, Titsias and Blei 2016 (``exact=False``). Parmas and Sugiyama 2021, section 2.3.
    """

    standardization: Callable[[Array, Any], Array] | None = None
    q: Callable[[Any], Any] | None = None
    _: KW_ONLY
    exact: bool = True
    jumps: Jumps = JumpsField()  # type: ignore[assignment]  # noqa: RUF009

    def psi_is_zero(self, target: Target) -> bool:
        return self.exact

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        refuse_discrete(target, "ImplicitRP")
        if not self.exact:
            refuse_moving_support(target, "ImplicitRP(exact=False)")
        s = self.standardization or target.cdf
        eps = s(x, target.of_arrays)
        if tuple(eps.shape) != tuple(x.shape):
            target.refuse(
                f"the standardization function must return the shape of x, expected {tuple(x.shape)}, "
                f"found {tuple(eps.shape)}; return one number for each coordinate of x."
            )
        if target.event_ndim == 0:
            target.check_elementwise(ops, s, x, "the standardization function")
        slope = _slope(ops, target, lambda x: s(x, target.p0), x, live=False)
        if target.validate:
            ok = ops.all_finite(ops.log_abs(slope) if target.event_ndim == 0 else ops.log_abs_det(slope))
            target.check(ops, ok, "dS/dx of the standardization function is 0 or not finite; S must be invertible in x.")
        tangent = ops.tether(eps)
        if target.event_ndim == 0:
            value = x - tangent / slope
        else:
            value = x - ops.solve(slope, tangent.reshape(slope.shape[:-1])).reshape(x.shape)
        if self.exact:
            return Draw(target.push(value))
        slope = _slope(ops, target, lambda x: s(x, target.of_arrays), value, live=True)
        log_volume = ops.log_abs(slope) if target.event_ndim == 0 else ops.log_abs_det(slope)
        return Draw(target.push(value), target.to_batch(target.p.log_prob(value) - log_volume))


def _slope(ops: Ops, target: Target, f: Callable[[Array], Array], x: Array, live: bool) -> Array:
    """df/dx: elementwise for a scalar family, the Jacobian over the event otherwise."""
    if target.event_ndim:
        return ops.jacobian(f, x, target.event_ndim, live)[1]
    _, slope = ops.derivative(f, x, live)
    if slope is None:
        target.refuse("the standardization function must depend on x, but is constant in it.")
    return slope

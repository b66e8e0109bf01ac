"""Control variates that are learned while SVI runs: terms of value 0 whose derivative has mean 0."""

from __future__ import annotations

import math

from flowvi.ops import Array, Ops, times
from flowvi.target import Learned, Target


class QuadraticModel:
    r"""A quadratic model f of the cost at a Gaussian site, whose mean is known, so that grad (E[f] - f(x)) has mean 0.

    With z = (x - loc) / s, where s is the standard deviation of each coordinate, f = b . z + z . B z / 2. In units of s the sample
    x = loc + L eps moves by dloc + dM eps, with M = L / s, and

        grad (E[f] - f(x)) = <B M, dM> - (b + B z) . dM eps - B z . dloc.

    At a mean-field site M is the unit matrix and dM diagonal. The mean is 0 for every matrix B (b + B z then models the gradient of the
    cost), so that none is made symmetric. b and B are learned by descent on the second moment of the gradient in dloc and dM, which is
    quadratic in them.

    Args:
        ops: The operations of the backend.
        target: A Normal, whose coordinates are those of the site's event, or a MultivariateNormal.
        diagonal: Whether B is diagonal.
    """

    def __init__(self, ops: Ops, target: Target, diagonal: bool):
        if target.family not in ("Normal", "MultivariateNormal"):
            target.refuse(
                "RP's control variate needs a distribution under which the mean of a quadratic cost is known, expected Normal or "
                f"MultivariateNormal, found {target.family}; use RP() without it."
            )
        self.ops, self.target, self.diagonal = ops, target, diagonal
        self.full_rank = target.family == "MultivariateNormal"
        batch_ndim = len(target.batch_shape) if self.full_rank else target.batch_ndim
        self.shape = (*target.shape[:batch_ndim], math.prod(target.shape[batch_ndim:]))

    def learns(self) -> dict[str, Learned]:
        """The coefficients, which are 0 at first: a row for each coordinate, b before B."""
        target, size = self.target, self.shape[-1]
        own = (size, 2 if self.diagonal else 1 + size)

        def initial() -> Array:
            batch = target.element_shape if self.full_rank else target.site_shape
            zero = self.ops.stop_gradient(1.0 * self.ops.tether(target.p.scale_tril if self.full_rank else target.p.scale)).sum()
            return self.ops.broadcast_to(zero, (*batch, *own))

        of_event = target.element_shape[len(target.element_shape) - target.extra_ndim :] if self.full_rank else ()
        return {"control_variate": Learned(initial, (*of_event, *own))}

    def attach(self, x: Array) -> tuple[Array, Array]:
        """The value, with the derivative of the host's sampler, and the control variate over the batch shape of the site."""
        ops, target = self.ops, self.target
        assert target.learned is not None
        *batch, size = self.shape
        coefficients = target.learned["control_variate"]
        factor = self._in_shape(target.p.scale_tril, (*batch, size, size)) if self.full_rank else self._flat(target.p.scale, x)
        inputs = self._flat(target.p.loc, x), factor, self._in_shape(coefficients, (*batch, *coefficients.shape[-2:]))
        value = _reshaped(x, self.shape)
        fixed = (value,) if self._own_weight is not None else (value, self._flat(target.own_density_at(ops, x), x))
        value, control = ops.with_pullback((value, 0 * value[..., 0]), inputs, fixed, self._pullback)
        return _reshaped(value, x.shape), target.to_batch(control) if self.full_rank else control

    @property
    def _own_weight(self) -> float | None:
        """By how much the site's own log density counts, where that is one number."""
        own_density = self.target.own_density
        return own_density if isinstance(own_density, (int, float)) else None

    def _pullback(self, cotangents: tuple[Array, ...], inputs: tuple[Array, ...], fixed: tuple[Array, ...]) -> tuple[Array, ...]:
        """The derivatives in loc and the factor; for the coefficients, that of the squared gradient in dloc and dM, added up.

        With c the cotangent of the control variate (``unit``), the gradient through the sample and by the model is

            g_loc = s v - c B z,    g_M = (s v - c (b + B z)) eps^T + c B M,

        and g is that with the gradient of the site's own log density. h = -2 c g is then the derivative of the sum of g^2 in what c
        multiplies: by b + B z it is h_M eps, by B z alone h_loc more, by B M it is -h_M.
        """
        (through, unit), (loc, factor, coefficients), (x, *own_density) = cotangents, inputs, fixed
        unit = unit[..., None]
        own = times(unit, self._own_weight) if self._own_weight is not None else unit * own_density[0]
        return (self._of_full_rank if self.full_rank else self._of_mean_field)(through, unit, own, loc, factor, coefficients, x)

    def _of_mean_field(
        self, through: Array, unit: Array, own: Array, loc: Array, s: Array, coefficients: Array, x: Array
    ) -> tuple[Array, ...]:
        z = (x - loc) / s
        b, bend, curvature = self._model(coefficients, z)
        of_loc = s * through - unit * bend
        of_m = (of_loc - unit * b) * z + unit * (curvature if self.diagonal else self.ops.diagonal(curvature))
        twice, score = unit + unit, own * z
        h_loc = twice * (score - of_loc)
        h_m = twice * (score * z - of_m - own)
        of_slope = h_m * z
        return of_loc / s, of_m / s, self._of_coefficients(of_slope, h_loc + of_slope, z, h_m)

    def _of_full_rank(
        self, through: Array, unit: Array, own: Array, loc: Array, factor: Array, coefficients: Array, x: Array
    ) -> tuple[Array, ...]:
        ops = self.ops
        s = (factor**2).sum(-1) ** 0.5
        eps, z, m = ops.solve_lower(factor, x - loc), (x - loc) / s, factor / s[..., None]
        b, bend, curvature = self._model(coefficients, z)
        of_loc = s * through - unit * bend
        bend_m = curvature[..., None] * m if self.diagonal else curvature @ m
        of_m = (of_loc - unit * b)[..., None] * eps[..., None, :] + unit[..., None] * bend_m
        twice, score = unit + unit, own * ops.solve(m.swapaxes(-2, -1), eps)
        on_diagonal = ops.where(ops.eye(m.shape[-1], m), m, 1 + 0 * m)
        inverse = ops.where(ops.eye(m.shape[-1], m), 1 / on_diagonal, 0 * m)
        h_loc = twice * (score - of_loc)
        h_m = twice[..., None] * ops.tril(score[..., None] * eps[..., None, :] - of_m - own[..., None] * inverse)
        of_slope = (h_m * eps[..., None, :]).sum(-1)
        of_curvature = (h_m * m).sum(-1) if self.diagonal else h_m @ m.swapaxes(-2, -1)
        return of_loc / s, of_m / s[..., None], self._of_coefficients(of_slope, h_loc + of_slope, z, of_curvature)

    def _model(self, coefficients: Array, z: Array) -> tuple[Array, Array, Array]:
        """The vectors b and B z, and B (its diagonal where that is all of it)."""
        b, curvature = coefficients[..., 0], coefficients[..., 1:]
        if self.diagonal:
            curvature = curvature[..., 0]
            return b, curvature * z, curvature
        return b, (curvature @ z[..., None])[..., 0], curvature

    def _of_coefficients(self, of_b: Array, of_bend: Array, z: Array, of_curvature: Array) -> Array:
        """The derivative in all coefficients from those in b and in B z, and minus that in B (or its diagonal) by itself."""
        ops = self.ops
        if self.diagonal:
            return ops.stack([of_b, of_bend * z - of_curvature], -1)
        if not self.full_rank:
            of_curvature = ops.diagonal_matrix(of_curvature)
        return ops.concatenate([of_b[..., None], of_bend[..., None] * z[..., None, :] - of_curvature], -1)

    def _flat(self, a: Array, x: Array) -> Array:
        """An array of the shape of x with its coordinates in one dim."""
        return _reshaped(self._in_shape(self.ops.asarray(a, x), x.shape), self.shape)

    def _in_shape(self, a: Array, shape: tuple[int, ...]) -> Array:
        return a if a.shape == shape else self.ops.broadcast_to(a, shape)


def _reshaped(a: Array, shape: tuple[int, ...]) -> Array:
    return a if a.shape == shape else a.reshape(shape)

"""Control variates that are learned while SVI runs: terms of value 0 whose derivative has mean 0."""

from __future__ import annotations

import math

from flowvi.ops import Array, Ops
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
        batch, extra = (target.element_shape, target.extra_ndim) if self.full_rank else (target.site_shape, 0)
        zero = self.ops.stop_gradient(1.0 * self.ops.tether(target.p.scale_tril if self.full_rank else target.p.scale)).sum()
        coefficients = self.ops.broadcast_to(zero, (*batch, size, 2 if self.diagonal else 1 + size))
        return {"control_variate": Learned(coefficients, extra + 2)}

    def attach(self, x: Array) -> tuple[Array, Array]:
        """The value, with the derivative of the host's sampler, and the control variate over the batch shape of the site."""
        ops, target = self.ops, self.target
        coefficients = target.read(self.learns)["control_variate"]
        loc = self._flat(target.p.loc)
        residual = self._flat(x) - ops.stop_gradient(loc)
        if self.full_rank:
            factor = target.p.scale_tril
            fixed_factor = ops.stop_gradient(factor)
            s = (fixed_factor**2).sum(-1) ** 0.5
            eps, z = ops.solve_lower(fixed_factor, residual), residual / s
            m, dm = fixed_factor / s[..., None], ops.tether(factor) / s[..., None]
            stretched = (dm @ eps[..., None])[..., 0]
        else:
            scale = self._flat(target.p.scale)
            s = ops.stop_gradient(scale)
            eps = z = residual / s
            m, dm = s / s, ops.tether(scale) / s
            stretched = dm * eps
        dloc = ops.tether(loc) / s
        slope, bend, bend_m = self._model(ops.stop_gradient(coefficients), z, m)
        of_m = (bend_m - self._outer(slope, eps)) * dm
        control = of_m.sum((-2, -1) if self.full_rank else -1) - (bend * dloc).sum(-1)
        fixed = z, eps, m, self._flat(target.own_density_at(ops, x))
        outputs = dloc + stretched, control
        step, control = target.learn(ops, outputs, {"control_variate": coefficients}, fixed, self._second_moment)
        return x + (s * step).reshape(x.shape), target.to_batch(control) if self.full_rank else control

    def _second_moment(self, cotangents: tuple[Array, ...], learned: dict[str, Array], fixed: tuple[Array, ...]) -> Array:
        """The squared gradient in dloc and dM, added up: through the sample, by the model, and of the site's own log density."""
        (through, unit), (z, eps, m, own_density) = cotangents, fixed
        ops, unit = self.ops, unit[..., None]
        slope, bend, bend_m = self._model(learned["control_variate"], z, m)
        score = ops.solve(m.swapaxes(-2, -1), eps) if self.full_rank else eps
        of_loc = through - unit * (bend + own_density * score)
        of_m = self._outer(through - unit * (slope + own_density * score), eps)
        if self.full_rank:
            unit, own_density = unit[..., None], own_density[..., None]
            on_diagonal = ops.where(ops.eye(m.shape[-1], m), m, 1 + 0 * m)
            inverse = ops.where(ops.eye(m.shape[-1], m), 1 / on_diagonal, 0 * m)
            of_m = ops.tril(of_m + unit * (bend_m + own_density * inverse))
        else:
            of_m = of_m + unit * (bend_m + own_density)
        return (of_loc**2).sum() + (of_m**2).sum()

    def _model(self, coefficients: Array, z: Array, m: Array) -> tuple[Array, Array, Array]:
        """The vectors b + B z and B z, and B M (its diagonal at a mean-field site)."""
        b, curvature = coefficients[..., 0], coefficients[..., 1:]
        if self.diagonal:
            bend, bend_m = curvature[..., 0] * z, curvature * m if self.full_rank else curvature[..., 0]
        else:
            bend = (curvature @ z[..., None])[..., 0]
            bend_m = curvature @ m if self.full_rank else self._diagonal(curvature)
        return b + bend, bend, bend_m

    def _diagonal(self, a: Array) -> Array:
        """A slice, whose derivative costs less in JAX than that of a gather."""
        size = a.shape[-1]
        return a.reshape((*a.shape[:-2], size * size))[..., :: size + 1]

    def _outer(self, a: Array, eps: Array) -> Array:
        return a[..., None] * eps[..., None, :] if self.full_rank else a * eps

    def _flat(self, a: Array) -> Array:
        """An array of the shape of x with its coordinates in one dim."""
        return self.ops.broadcast_to(a, self.target.shape).reshape(self.shape)

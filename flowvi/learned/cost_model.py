"""Control variates that are learned while SVI runs: terms with value 0 whose derivative has mean 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Literal, NamedTuple

from flowvi.learned.amortised import Amortised, Features
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops, times
from flowvi.target import Target

Kind = Literal["diagonal", "quadratic", "cubic"]
DIRECTIONS = 4  # of a cubic model, unless there are fewer coordinates


class CostModel:
    r"""A model of the cost at a Gaussian site, whose mean is known, so that grad (E[f] - f(x)) has mean 0.

    With z = (x - loc) / s, where s is the standard deviation of each coordinate, the gradient of f in z is b + h,

        h = B z + W q,    q_r = (v_r . z)^2 - E[(v_r . z)^2],

    which for a symmetric B and without W (only the cubic model has it) is that of f = b . z + z . B z / 2. In units of s the
    sample x = loc + L eps moves by dloc + dM eps, with M = L / s, and

        grad (E[f] - f(x)) = <B M, dM> - (b + h) . dM eps - h . dloc.

    At a mean-field site M is the unit matrix and dM is diagonal. The mean is 0 for all b, B, W and v, so B and W need not be symmetric.
    They minimize the second moment of the gradient in dloc and dM, which is quadratic in b, B and W.

    Args:
        ops: The operations of the backend.
        target: A Normal, whose coordinates are those of the site's event, or a MultivariateNormal.
        kind: ``"diagonal"``: B is diagonal. ``"quadratic"``: B is full. ``"cubic"``: there are also W and up to four directions v.
        shared: Whether the elements of the site's plates have the same coefficients.
        features: The features of an element; its coefficients are an affine function of them.
        num_context: The number of *context* numbers y of an element. These are functions of the noise of other sites with mean 0,
            independent of the element's parameters and of z. h then has a term C y, which does not change the mean. C is learned like
            B.
    """

    def __init__(
        self, ops: Ops, target: Target, kind: Kind, shared: bool = False, features: Features | None = None, num_context: int = 0
    ):
        if target.family not in ("Normal", "MultivariateNormal"):
            target.refuse(
                "RP's control variate needs a distribution under which the mean of a polynomial cost is known, expected Normal or "
                f"MultivariateNormal, found {target.family}; use RP() without it."
            )
        self.ops, self.target, self.diagonal, self.num_context = ops, target, kind == "diagonal", num_context
        self.amortised = None if features is None else Amortised.at(ops, target, features, target.batch_shape[: target.batch_ndim])
        self.shared = shared or features is not None
        self.full_rank = target.family == "MultivariateNormal"
        batch_ndim = len(target.batch_shape) if self.full_rank else target.batch_ndim
        self.shape = (*target.shape[:batch_ndim], math.prod(target.shape[batch_ndim:]))
        self.directions = min(DIRECTIONS, self.shape[-1]) if kind == "cubic" else 0
        own_density = target.own_density
        self.own_weight = own_density if isinstance(own_density, (int, float)) else None  # of the site's log density, if it is a number

    def learns(self) -> dict[str, Learned]:
        """The coefficients, a row for each coordinate: b, B, W, v and C. Initially 0, except for the directions v: cosine waves."""
        ops, size = self.ops, self.shape[-1]
        zeros = 2 if self.diagonal else 1 + size + self.directions

        def initial() -> Array:
            of_context = [self._zeros(size, self.num_context)] if self.num_context else []
            waves = [self._waves(size, self.directions) * (2 / size) ** 0.5] if self.directions else []
            return ops.concatenate([self._zeros(size, zeros), *waves, *of_context], -1)

        coefficients = self._learned(initial, size, zeros + self.directions + self.num_context)
        return {"control_variate": coefficients if self.amortised is None else self.amortised.learned(ops, coefficients)}

    def _learned(self, initial: Callable[[], Array], rows: int, columns: int) -> Learned:
        return Learned(initial, (*(self.target.extra_shape if self.full_rank else ()), rows, columns))

    def _zeros(self, rows: int, columns: int) -> Array:
        """Zeros for each element."""
        ops, target = self.ops, self.target
        zero = ops.stop_gradient(1.0 * ops.tether(target.p.scale_tril if self.full_rank else target.p.scale)).sum()
        batch = (*(() if self.shared else target.site_shape), *(target.extra_shape if self.full_rank else ()))
        return ops.broadcast_to(zero, (*batch, rows, columns))

    def _waves(self, rows: int, columns: int) -> Array:
        """Cosine waves for each element, of height 1, each over the rows of a column."""
        waves = [[math.cos(math.pi * r * (i + 0.5) / rows) for r in range(columns)] for i in range(rows)]
        zeros = self._zeros(rows, columns)
        return self.ops.broadcast_to(self.ops.asarray(waves, zeros), zeros.shape)

    def attach(self, x: Array) -> tuple[Array, Array, Array]:
        """The value with the derivative of the host's sampler, the control variate over the batch shape of the site, and zeros.

        The zeros have ``num_context`` columns. Their product with the context y is the rest of the control variate.
        """
        ops, target = self.ops, self.target
        *batch, size = self.shape
        factor = self._in_shape(target.p.scale_tril, (*batch, size, size)) if self.full_rank else self._flat(target.p.scale, x)
        inputs = self._flat(target.p.loc, x), factor, *(self._in_shape(a, (*batch, *a.shape[-2:])) for a in self._rows())
        value = _reshaped(x, self.shape)
        fixed = (value,) if self.own_weight is not None else (value, self._flat(target.own_density_at(ops, x), x))
        zero = 0 * value[..., 0]
        context = [ops.broadcast_to(zero[..., None], (*batch, self.num_context))] if self.num_context else []
        try:
            value, control, *context = ops.with_pullback((value, zero, *context), inputs, fixed, self._without_site()._pullback)
        except TypeError as error:
            target.refuse_forward_mode(error)
        return _reshaped(value, x.shape), target.to_batch(control) if self.full_rank else control, context[0] if context else control

    def _rows(self) -> tuple[Array, ...]:
        """What is learned, with the batch shape of the elements on the left or one that broadcasts to it."""
        assert self.target.learned is not None
        coefficients = self.target.learned["control_variate"]
        return (coefficients if self.amortised is None else self.amortised.coefficients(coefficients),)

    def base(self, x: Array) -> Array:
        """The noise that gives a sample, with its coordinates in one dim: independent standard Normals, without derivatives."""
        ops, p = self.ops, self.target.p0
        offset = _reshaped(x - p.loc, self.shape)
        return ops.stop_gradient(ops.solve_lower(p.scale_tril, offset) if self.full_rank else offset / self._flat(p.scale, x))

    def _without_site(self) -> CostModel:
        """The model without the arrays of its site: JAX keeps the function of a backward pass longer than these may live."""
        model = copy(self)
        del model.target, model.amortised
        return model

    def _pullback(self, cotangents: tuple[Array, ...], inputs: tuple[Array, ...], fixed: tuple[Array, ...]) -> tuple[Array, ...]:
        """The derivatives in loc and the factor; for the coefficients, the derivative of the summed squared gradient in dloc and dM.

        With c the cotangent of the control variate (``unit``), the gradient through the sample and by the model is

            g_loc = s v - c h,    g_M = (s v - c (b + h)) eps^T + c B M,

        and g is its sum with the gradient of the site's own log density. With k = -2 c g, the derivative of the sum of g^2 is k_M eps
        in b + h, a further k_loc in h, and -k_M in B M. The cotangent of the zeros is c y.
        """
        (through, unit, *context), (loc, factor, *coefficients), (x, *own_density) = cotangents, inputs, fixed
        unit = unit[..., None]
        own = times(unit, self.own_weight) if self.own_weight is not None else unit * own_density[0]
        return (self._of_full_rank if self.full_rank else self._of_mean_field)(
            through, unit, own, loc, factor, coefficients, x, *context
        )

    def _of_mean_field(
        self,
        through: Array,
        unit: Array,
        own: Array,
        loc: Array,
        s: Array,
        coefficients: list[Array],
        x: Array,
        context: Array | None = None,
    ) -> tuple[Array, ...]:
        z = (x - loc) / s
        model = self._model(coefficients, z, None)
        of_loc = self._less_context(s * through - unit * model.bend, model, context)
        of_m = (of_loc - unit * model.b) * z + unit * self._diagonal(model)
        score = own * z
        g_m = score * z - of_m - own
        of_slope = g_m * z
        of_bend = score - of_loc + of_slope
        return of_loc / s, of_m / s, *self._of_coefficients(model, unit + unit, of_slope, of_bend, z, g_m, None, context)

    def _of_full_rank(
        self,
        through: Array,
        unit: Array,
        own: Array,
        loc: Array,
        factor: Array,
        coefficients: list[Array],
        x: Array,
        context: Array | None = None,
    ) -> tuple[Array, ...]:
        ops = self.ops
        s = (factor**2).sum(-1) ** 0.5
        eps, z, m = ops.solve_lower(factor, x - loc), (x - loc) / s, factor / s[..., None]
        model = self._model(coefficients, z, m)
        of_loc = self._less_context(s * through - unit * model.bend, model, context)
        of_m = (of_loc - unit * model.b)[..., None] * eps[..., None, :] + unit[..., None] * self._times(model, m)
        score = own * ops.solve_upper(m.swapaxes(-2, -1), eps)
        unit_matrix = ops.broadcast_to(ops.eye(m.shape[-1], m), m.shape)
        inverse = ops.where(unit_matrix, 1 / ops.where(unit_matrix, m, 1 + 0 * m), 0 * m)
        g_m = ops.tril(score[..., None] * eps[..., None, :] - of_m - own[..., None] * inverse)
        of_slope = (g_m * eps[..., None, :]).sum(-1)
        of_bend = score - of_loc + of_slope
        return of_loc / s, of_m / s[..., None], *self._of_coefficients(model, unit + unit, of_slope, of_bend, z, g_m, m, context)

    def _diagonal(self, model: Model) -> Array:
        """The diagonal of B."""
        return model.curvature if self.diagonal else self.ops.diagonal(model.curvature)

    def _times(self, model: Model, m: Array) -> Array:
        """B M."""
        return model.curvature[..., None] * m if self.diagonal else model.curvature @ m

    def _less_context(self, of_loc: Array, model: Model, context: Array | None) -> Array:
        return of_loc if context is None else of_loc - product(model.context, context)

    def _model(self, rows: list[Array], z: Array, m: Array | None) -> Model:
        """The model at z, whose covariance is M M^T, or the unit matrix."""
        (coefficients,) = rows
        if self.num_context:
            model = self._of_own(coefficients[..., : -self.num_context], z, m)
            return model._replace(context=coefficients[..., -self.num_context :])
        return self._of_own(coefficients, z, m)

    def _of_own(self, coefficients: Array, z: Array, m: Array | None) -> Model:
        """The model without C y."""
        b, rest = coefficients[..., 0], coefficients[..., 1:]
        if self.diagonal:
            return Model(b, rest[..., 0], rest[..., 0] * z)
        if not self.directions:
            return Model(b, rest, product(rest, z))
        v, slope = rest[..., -self.directions :], rest[..., : -self.directions]
        spread = v if m is None else m @ (m.swapaxes(-2, -1) @ v)
        excess = outer(z, product_from_the_left(z, v)) - spread
        squares = (v * excess).sum(-2)
        bend = product(slope, self.ops.concatenate([z, squares], -1))
        return Model(b, slope[..., : -self.directions], bend, _Cubic(slope[..., -self.directions :], squares, excess))

    def _of_coefficients(
        self,
        model: Model,
        twice: Array,
        of_b: Array,
        of_bend: Array,
        z: Array,
        g_m: Array,
        m: Array | None,
        context: Array | None,
    ) -> tuple[Array, ...]:
        """The derivative in what is learned, from those in b and in h, and minus that in B M (or the diagonal of B) alone.

        The three still lack the factor 2 c, which is ``twice``; for C the factor is 2, since ``context`` is c y.
        """
        ops = self.ops
        of_context = [] if context is None else [outer(of_bend + of_bend, context)]  # which has the factor c
        of_b, of_bend = twice * of_b, twice * of_bend
        if self.diagonal:
            of_diagonal = g_m if m is None else (g_m * m).sum(-1)
            return (ops.stack([of_b, of_bend * z - twice * of_diagonal], -1),)
        of_curvature = ops.diagonal_matrix(twice * g_m) if m is None else twice[..., None] * (g_m @ m.swapaxes(-2, -1))
        parts = [of_b[..., None], outer(of_bend, z) - of_curvature]
        if (cubic := model.cubic) is not None:
            of_squares = product_from_the_left(of_bend, cubic.weights)
            parts += [outer(of_bend, cubic.squares), (of_squares + of_squares)[..., None, :] * cubic.excess]
        return (ops.concatenate([*parts, *of_context], -1),)

    def _flat(self, a: Array, x: Array) -> Array:
        """An array of the shape of x with its coordinates in one dim."""
        return _reshaped(self._in_shape(self.ops.asarray(a, x), x.shape), self.shape)

    def _in_shape(self, a: Array, shape: tuple[int, ...]) -> Array:
        return a if a.shape == shape else self.ops.broadcast_to(a, shape)


class _Cubic(NamedTuple):
    """W, q, and (z z^T - E[z z^T]) v; the product of the last with v_r is q_r, and twice it is the derivative of q_r in v_r."""

    weights: Array
    squares: Array
    excess: Array


class Model(NamedTuple):
    """b, B (or its diagonal), h without C y, and C."""

    b: Array
    curvature: Array
    bend: Array
    cubic: _Cubic | None = None
    context: Array | None = None


def outer(a: Array, b: Array) -> Array:
    return a[..., None] * b[..., None, :]


def product(matrix: Array, vector: Array) -> Array:
    return matrix @ vector if vector.ndim == 1 else (matrix @ vector[..., None])[..., 0]


def product_from_the_left(vector: Array, matrix: Array) -> Array:
    return vector @ matrix if vector.ndim == 1 else (vector[..., None, :] @ matrix)[..., 0, :]


def _reshaped(a: Array, shape: tuple[int, ...]) -> Array:
    return a if a.shape == shape else a.reshape(shape)

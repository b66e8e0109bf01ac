"""A model of the cost whose matrix is diagonal plus low rank, for sites with many coordinates."""

from __future__ import annotations

from typing import NamedTuple

from flowvi.learned.cost_model import CostModel, Model, outer, product, product_from_the_left
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.target import Target

RANK = 8  # more columns take out more of the noise, in more time


def rank_of(size: int) -> int:
    """The rank for so many coordinates of an element."""
    return min(RANK, size)


class LowRankModel(CostModel):
    r"""A model of the cost with B = D + U V^T and C = U V_y^T, where D is diagonal.

    U, V and V_y have as many columns as the rank. The gradient of the model in z is b + h, with h = D z + U t and
    t = V^T z + V_y^T y.

    Args:
        ops: The operations of the backend.
        target: A Normal, whose coordinates are those of the site's event, or a MultivariateNormal.
        num_context: The number of context numbers y of an element.
    """

    def __init__(self, ops: Ops, target: Target, num_context: int):
        super().__init__(ops, target, "quadratic", num_context=num_context)
        self.rank = rank_of(self.shape[-1])

    def learns(self) -> dict[str, Learned]:
        """b, D and U, a row for each coordinate, initially 0, and V with V_y, initially cosine waves."""
        size, rank = self.shape[-1], self.rank
        rows = size + self.num_context
        return {
            "control_variate": self._learned(lambda: self._zeros(size, 2 + rank), size, 2 + rank),
            "directions": self._learned(lambda: (2 / rows) ** 0.5 * self._waves(rows, rank), rows, rank),
        }

    def _rows(self) -> tuple[Array, ...]:
        assert self.target.learned is not None
        return self.target.learned["control_variate"], self.target.learned["directions"]

    def _model(self, rows: list[Array], z: Array, m: Array | None) -> Model:
        coefficients, directions = rows
        size = self.shape[-1]
        b, d, u = coefficients[..., 0], coefficients[..., 1], coefficients[..., 2:]
        b_matrix = _LowRank(d, u, directions[..., :size, :])
        t = product_from_the_left(z, b_matrix.v)
        return Model(b, b_matrix, d * z + product(u, t), context=directions[..., size:, :])

    def _less_context(self, of_loc: Array, model: Model, context: Array | None) -> Array:
        return of_loc if context is None else of_loc - product(model.curvature.u, product_from_the_left(context, model.context))

    def _diagonal(self, model: Model) -> Array:
        d, u, v = model.curvature
        return d + (u * v).sum(-1)

    def _times(self, model: Model, m: Array) -> Array:
        d, u, v = model.curvature
        return d[..., None] * m + u @ (v.swapaxes(-2, -1) @ m)

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
        ops = self.ops
        _, u, v = model.curvature
        of_context, of_b, of_bend = of_bend + of_bend, twice * of_b, twice * of_bend
        of_u, of_v = outer(of_bend, product_from_the_left(z, v)), outer(z, product_from_the_left(of_bend, u))
        if m is None:
            of_diagonal = twice * g_m
            of_u, of_v = of_u - of_diagonal[..., None] * v, of_v - of_diagonal[..., None] * u
        else:
            g_m = twice[..., None] * g_m
            of_diagonal = (g_m * m).sum(-1)
            of_u = of_u - g_m @ (m.swapaxes(-2, -1) @ v)
            of_v = of_v - m @ (g_m.swapaxes(-2, -1) @ u)
        if context is not None:
            of_u = of_u + outer(of_context, product_from_the_left(context, model.context))
            of_v = ops.concatenate([of_v, outer(context, product_from_the_left(of_context, u))], -2)
        of_d = of_bend * z - of_diagonal
        return ops.concatenate([of_b[..., None], of_d[..., None], of_u], -1), of_v


class _LowRank(NamedTuple):
    """D, U and V."""

    d: Array
    u: Array
    v: Array

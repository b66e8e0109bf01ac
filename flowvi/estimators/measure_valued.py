"""Weak derivatives: the cost at draws from the two parts of the derivative of a distribution."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.alternatives import Alternatives, Comparison, Lanes, require_lanes
from flowvi.estimators.enumerate import Enumerate
from flowvi.estimators.estimator import Draw, Estimator
from flowvi.family import family_of, names
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class MeasureValued(Estimator):
    r"""Weak derivatives: :math:`E_i = c_i\,(\phi(y^+) - \phi(y^-))` where :math:`\partial p / \partial \theta_i = c_i\,(p^+ - p^-)`.

    The derivative of p in each parameter is c times a difference of two densities, from which :math:`y^+` and :math:`y^-` are drawn. u
    = 0 and there is no score; the cost may jump. The two draws are coupled with each other and with x. x is one of the two if possible,
    so most parameters take one more evaluation of the program. The ``loc`` of a Normal takes two:

    ============================ ====================================================================
    Poisson, ``rate``            x + 1
    Normal, ``loc``              loc + r and loc - r, with r Rayleigh
    Normal, ``scale``            double-sided Maxwell, on the side of x
    Laplace, ``loc``, ``scale``  2 loc - x; x moved outwards by an Exponential
    Exponential, Gamma, ``rate`` x + an Exponential
    Weibull, ``scale``           the same for x to the power of the concentration
    Bernoulli, Categorical       all values: the exact sum, as :class:`~flowvi.Enumerate`
    ============================ ====================================================================

    The other draws use the same random numbers. The elements of a plate share one run if everything that depends on them stays within
    the plate.

    **Requirements**: one of these families. Every parameter that is not in the table, such as a concentration, must be a constant. Not
    inside ``scan`` or ``cond``.

    Args:
        lanes: ``"all"`` gives every element that cannot share a run its own runs. ``"random"`` draws one of these runs, with a
            probability in proportion to its weight; this is unbiased and takes one more evaluation.

    Raises:
        TypeError: ``lanes`` is neither ``"all"`` nor ``"random"``.
        ValueError: At the first run, naming the site: another family, or a parameter that is not in the table and not a constant.

    Example:
        The gradient of E[x > 1.5] under a Normal, in its loc, is a constant if one of loc + r and loc - r is beyond the jump, else 0.

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import MeasureValued
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        ...     numpyro.factor("cost", 1.0 * (x > 1.5))
        >>> def guide():
        ...     numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1.0).mask(False))
        >>> elbo = TraceFlow_ELBO(default=MeasureValued())
        >>> gradient = jax.grad(lambda loc, key: -elbo.loss(key, {"loc": loc}, model, guide))
        >>> sorted({round(float(gradient(0.0, jax.random.key(seed))), 4) for seed in range(20)})
        [0.0, 0.3989]

    References:
        Pflug 1989; Heidergott, Vázquez-Abad and Volk-Makarewicz 2008; Mohamed et al. 2019, section 6.
    """

    lanes: Lanes = "all"
    enters = False
    compares = True

    def __post_init__(self) -> None:
        require_lanes(self.lanes, "MeasureValued")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        known = family_of(target.p)
        if isinstance(known.weak_derivatives, str):
            return Enumerate(self.lanes).attach(ops, target, x)
        if not known.weak_derivatives:
            known_ones = ", ".join(names(lambda family: family.weak_derivatives))
            target.refuse(f"MeasureValued knows the weak derivatives of {known_ones}; found {target.family}; use LR().")
        derivatives = known.weak_derivatives
        live = target.live(*known.parameters)
        if unknown := [name for name in live if name not in derivatives]:
            target.refuse(
                f"MeasureValued knows no weak derivative of {target.family} in its {unknown[0]}, which needs one; use RP() or LR(), "
                f"or make the {unknown[0]} a constant."
            )
        if not live:
            return Draw(x)

        def make(uniforms: Array) -> Alternatives:
            of_parameter = dict(zip(derivatives, uniforms, strict=True))  # for all parameters, live or not
            weighted = [one for name in live for one in derivatives[name].weighted(ops, target.p, x, of_parameter[name])]
            values, weights = (ops.stack([ops.broadcast_to(a, x.shape) for a in arrays], 0) for arrays in zip(*weighted, strict=True))
            return Alternatives(values, weights)

        num_values = sum(derivatives[name].num_values for name in live)
        return Draw(x, comparison=Comparison(make, x, target.event_ndim, target.batch_ndim, num_values, len(derivatives), self.lanes))

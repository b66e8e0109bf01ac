"""The exact sum over the values of a finite support."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.alternatives import Alternatives, Comparison, Lanes, require_lanes
from flowvi.estimators.estimator import Draw, Estimator
from flowvi.family import family_of
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class Enumerate(Estimator):
    r"""The exact sum over the values of a finite support, without noise from the site itself.

    It is :math:`E = \sum_m \nabla_\theta\,p(m;\theta)\,(\phi(m) - \phi(x))`, with the cost :math:`\phi` at each value m and at the
    draw x. u = 0 and there is no score: the cost is evaluated at all values m of the site. The other draws use the same random
    numbers, so only the noise of other sites remains.

    All elements of a plate share one run if everything that depends on them stays within the plate: a thousand local Bernoullis take
    one more evaluation of the program. Otherwise each element needs its own runs. ``describe`` shows how many evaluations a step takes.

    **Requirements**: a distribution with a finite ``enumerate_support``, whose support does not move. Not inside ``scan`` or ``cond``.

    Args:
        lanes: What to do with elements that cannot share a run. ``"all"`` makes all their runs. ``"random"`` draws one of these runs,
            with a probability in proportion to the weight of its value: it is unbiased, and takes one more evaluation in total.

    Raises:
        TypeError: ``lanes`` is neither ``"all"`` nor ``"random"``.
        ValueError: At the first run, naming the site: a support that is infinite, or not the same for all elements of a batch.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import Enumerate
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     k = numpyro.sample("k", dist.Bernoulli(0.5))
        ...     numpyro.sample("y", dist.Normal(3.0 * k, 1.0), obs=2.0)
        >>> def guide():
        ...     numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("l", 0.4)))
        >>> gradient = jax.grad(lambda l, key: TraceFlow_ELBO(default=Enumerate()).loss(key, {"l": l}, model, guide))
        >>> [round(float(gradient(0.4, jax.random.key(seed))), 4) for seed in range(3)]  # without noise
        [-0.2643, -0.2643, -0.2643]

    References:
        Titsias and Lázaro-Gredilla 2015 (local expectation gradients). Parmas and Sugiyama 2021, eq. 19 with u = 0.
    """

    lanes: Lanes = "all"
    enters = False
    compares = True

    def __post_init__(self) -> None:
        require_lanes(self.lanes, "Enumerate")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        support = target.enumerated_support()
        size = support.shape[0]
        if size == 1:  # nothing to compare with
            return Draw(x)

        def make(uniforms: Array) -> Alternatives:
            values = support.reshape((size, *(1,) * len(target.batch_shape), *target.event_shape))
            equal = values == x[None]
            here = equal.all(tuple(range(equal.ndim - target.event_ndim, equal.ndim))) if target.event_ndim else equal
            twice = ops.concatenate([here, here], 0)
            others = ops.stack([twice[size - j : 2 * size - j] for j in range(1, size)], 0)  # (size - 1, size, *batch)
            masses = masses_over(ops, target, values)
            weights = ops.where(others, masses[None], 0 * masses[None]).sum(1)
            over_event = others.reshape((*others.shape, *(1,) * target.event_ndim))
            return Alternatives(ops.where(over_event, values[None], 0 * values[None]).sum(1), weights)

        comparison = Comparison(make, x, target.event_ndim, target.batch_ndim, size - 1, lanes=self.lanes)
        return Draw(x, comparison=comparison)


def masses_over(ops: Ops, target: Target, values: Array) -> Array:
    """The probability of each value, with its derivative; the values are the leftmost axis."""
    masses = family_of(target.p).masses
    masses_of = ops.exp(target.p.log_prob(values)) if masses is None else masses(ops, target.p, values)
    shape = (values.shape[0], *target.batch_shape)
    return ops.broadcast_to(masses_of.reshape((values.shape[0], *(1,) * (len(shape) - masses_of.ndim), *masses_of.shape[1:])), shape)

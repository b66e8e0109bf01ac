"""Antithetic runs for all elements of a discrete site."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.alternatives import Alternatives, Comparison
from flowvi.estimators.enumerate import masses_over
from flowvi.estimators.estimator import Draw, Estimator
from flowvi.family import family_of
from flowvi.ops import Array, Ops, total
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class DisARM(Estimator):
    r"""The antithetic estimator: compares the cost at the draw with the cost at an opposite value, which all elements share.

    For Bernoullis the estimate is :math:`E_i = \tfrac12 (b'_i - b_i)\,m_i\,(\phi(b') - \phi(b))\,\nabla_\theta l_i`, with the cost
    :math:`\phi`. l are the logits, p the probabilities and :math:`m = \max(p, 1-p)`. For a uniform number v, the draw is b = [v <
    p] and its opposite is b' = [1 - v < p]. u = 0 and there is no score. All elements of the site share one more evaluation of the
    program, which uses the same random numbers for the other draws. The factor of each element multiplies the whole difference of
    the costs. In a plate it multiplies the difference of the element's own costs, if everything that depends on the element stays
    within the plate.

    With ``num_values`` of n this is ARMS: each element has n values, any two of which have the same correlation rho < 0, and
    :math:`E_i = \tfrac{1}{(n-1)(1-\rho_i)} \sum_m (b^m_i - \bar b_i)\,\phi(b^m)\,\nabla_\theta l_i`. It takes n - 1 more evaluations.

    For another finite support, such as that of a Categorical, the Metropolis rule makes the draw x and its opposite y differ as often
    as possible: y is drawn from the values other than x, and accepted with probability (1 - p(x)) / (1 - p(y)), else y = x.
    :math:`E_i = \tfrac12 (1 - \min(p(x_i), p(y_i)))\,(\phi(y) - \phi(x))\,\nabla_\theta (\log p(y_i) - \log p(x_i))`. n values are
    drawn as such pairs. E is then the mean over any two of the n values; the factor 1 - min(...) is 1 if the two were not drawn as a
    pair.

    **Requirements**: a distribution with a finite ``enumerate_support``, whose support does not move. Not inside ``scan`` or ``cond``.

    Args:
        num_values: How many values of the site are compared, including the draw.

    Raises:
        TypeError: ``num_values`` is not an integer above 1.
        ValueError: At the first run, naming the site: a support that is infinite, or not the same for all elements of a batch.

    Example:
        At probabilities of 1/2 all four Bernoullis flip. If n of them were 1, the cost differs by 16 - 8 n, and each gets a quarter of
        this, up to the sign.

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowvi import DisARM
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     b = numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(4)).to_event(1).mask(False))
        ...     numpyro.factor("cost", b.sum() ** 2)
        >>> def guide():
        ...     numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("l", jnp.zeros(4))).to_event(1).mask(False))
        >>> elbo = TraceFlow_ELBO(default=DisARM())
        >>> gradient = jax.grad(lambda l, key: -elbo.loss(key, {"l": l}, model, guide))
        >>> sorted({abs(gradient(jnp.zeros(4), jax.random.key(seed))).tolist()[0] for seed in range(40)})
        [0.0, 2.0, 4.0]

    References:
        Dong, Mnih and Tucker 2020; Yin, Ho, Yan, Qian and Zhou 2020 (U2G). Dimitriev and Zhou 2021 (ARMS). Dong, Mnih and Tucker 2021
        (couplings of categories with weights p(x) p(y) / p(x, y)). Liu 1996 (the rule by which y is drawn).
    """

    num_values: int = 2
    enters = False
    compares = True

    def __post_init__(self) -> None:
        if not isinstance(self.num_values, int) or self.num_values < 2:
            raise TypeError(f"DisARM: expected num_values of 2 or more, found {self.num_values!r}.")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        return self._of_bits(ops, target, x) if family_of(target.p).binary else self._of_values(ops, target, x)

    def _of_bits(self, ops: Ops, target: Target, x: Array) -> Draw:
        p = target.p
        probs = ops.broadcast_to(ops.stop_gradient(p.probs), x.shape)
        others = self.num_values - 1

        def make(uniforms: Array) -> Alternatives:
            """The n numbers d are uniform on the simplex. Those with (1 - d)^others < r stand for the rarer value, of probability r."""
            rare = ops.where(probs > 0.5, 1 - probs, probs)
            is_rare = (x == 1) == (probs <= 0.5)
            u = ops.where(probs > 0.5, 1 - uniforms[0], uniforms[0])
            first = ops.where(is_rare, u * rare, rare + u * (1 - rare)) ** (1 / others)  # 1 - d of the draw
            parts = 1e-30 - ops.log1p(-uniforms[1:])
            rest = 1 - first[None] * parts / parts.sum(0, keepdims=True)
            level = rare ** (1 / others)
            both = ops.where(level > 0.5, 2 * level - 1, 0 * level) ** others  # the probability that two have the rarer value
            spread = rare * (1 - rare)
            correlation = ops.where(spread > 0, (both - rare**2) / ops.where(spread > 0, spread, 0 * spread + 1), 0 * spread)
            values = ops.where((rest < level[None]) == (probs <= 0.5)[None], (1 + 0 * x)[None], (0 * x)[None])
            mean = (x + values.sum(0)) / (others + 1)
            moving = ops.broadcast_to(1 + ops.tether(p.logits), x.shape)  # the 1 keeps a cost that is not finite
            return Alternatives(values, (values - mean[None]) / (others * (1 - correlation))[None] * moving[None])

        return Draw(x, comparison=Comparison(make, x, target.event_ndim, target.batch_ndim, others, others + 1, joint=True))

    def _of_values(self, ops: Ops, target: Target, x: Array) -> Draw:
        support, n = target.enumerated_support(), self.num_values

        def make(uniforms: Array) -> Alternatives:
            numbers = uniforms.reshape((n - 1, 2, *x.shape))
            for _ in range(target.event_ndim):
                numbers = numbers[..., 0]
            values = support.reshape((support.shape[0], *(1,) * len(target.batch_shape), *target.event_shape))
            equal = values == x[None]
            live = masses_over(ops, target, values)
            masses = ops.stop_gradient(live)
            # the n values, as unit vectors along the first axis
            each = [equal.all(tuple(range(equal.ndim - target.event_ndim, equal.ndim))) if target.event_ndim else equal]
            for i, (u, v) in enumerate(numbers):
                each.append(_chosen(ops, masses, u) if i % 2 else _opposite(ops, masses, each[-1], u, v))
            probs = [_at(ops, here, masses) for here in each]
            logs = [ops.log(_at(ops, here, live)) for here in each]
            weights = []
            for i in range(1, n):
                others = [
                    (1 - ops.where(probs[i] < probs[j], probs[i], probs[j]) if j // 2 == i // 2 else 1) * (logs[i] - logs[j])
                    for j in range(n)
                    if j != i
                ]
                weights.append(1 + ops.tether(total(others) / (n * (n - 1))))  # the 1 keeps a cost that is not finite
            shape = (*masses.shape, *(1,) * target.event_ndim)
            chosen = [ops.where(here.reshape(shape), values, 0 * values).sum(0) for here in each[1:]]
            return Alternatives(ops.stack(chosen, 0), ops.stack(weights, 0))

        return Draw(x, comparison=Comparison(make, x, target.event_ndim, target.batch_ndim, n - 1, 2 * (n - 1), joint=True))


def _chosen(ops: Ops, masses: Array, u: Array) -> Array:
    """Draw one of the values, from uniform numbers u: unit vectors along the first axis. The masses need not add up to 1."""
    up_to = masses.cumsum(0)
    reached = (up_to > u[None] * up_to[-1:]) | (up_to >= up_to[-1:])
    before = ops.concatenate([reached[:1] & ~reached[:1], reached[:-1]], 0)
    return reached & ~before


def _opposite(ops: Ops, masses: Array, here: Array, u: Array, v: Array) -> Array:
    """A value with the same law that is seldom equal to ``here``."""
    proposed = _chosen(ops, ops.where(here, 0 * masses, masses), u)
    accepted = v * (1 - _at(ops, proposed, masses)) < 1 - _at(ops, here, masses)
    return ops.where(accepted[None], proposed, here)


def _at(ops: Ops, here: Array, masses: Array) -> Array:
    return ops.where(here, masses, 0 * masses).sum(0)

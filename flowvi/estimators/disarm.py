"""Antithetic runs for all elements of a Bernoulli."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.alternatives import Alternatives, Comparison
from flowvi.estimators.estimator import Draw, Estimator
from flowvi.family import family_of, names
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class DisARM(Estimator):
    r"""The antithetic estimator for Bernoullis: :math:`E_i = \tfrac12 (b'_i - b_i)\,m_i\,(\phi(b') - \phi(b))\,\nabla_\theta l_i`.

    l are the logits, p the probabilities and :math:`m = \max(p, 1-p)`. For a uniform number v, the draw is b = [v < p] and its
    opposite is b' = [1 - v < p]. u = 0 and there is no score. All elements of the site share one more evaluation of the program, in
    which the rest is drawn with the same random numbers. Each element multiplies the whole difference of the costs, or the difference
    of its own costs in a plate where everything that depends on it stays within the plate.

    With ``num_values`` of n it is ARMS: n values of each element, every two of which have the same correlation rho < 0, with
    :math:`E_i = \tfrac{1}{(n-1)(1-\rho_i)} \sum_m (b^m_i - \bar b_i)\,\phi(b^m)\,\nabla_\theta l_i`, from n - 1 more evaluations.

    **Requirements**: a Bernoulli. Not inside ``scan`` or ``cond``.

    Args:
        num_values: How many values of the site are compared, the draw among them.

    Raises:
        TypeError: ``num_values`` is no integer above 1.
        ValueError: At the first run, naming the site: a distribution that is no Bernoulli.

    Example:
        At probabilities of 1/2 all four Bernoullis are turned over. Each has a quarter of the difference 16 - 8 n of the cost, up to
        the sign, where n of them were 1.

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
        Dong, Mnih and Tucker 2020; Yin, Ho, Yan, Qian and Zhou 2020 (U2G). Dimitriev and Zhou 2021 (ARMS).
    """

    num_values: int = 2
    q = None
    enters = False
    compares = True

    def __post_init__(self):
        if not isinstance(self.num_values, int) or self.num_values < 2:
            raise TypeError(f"DisARM: expected num_values of 2 or more, found {self.num_values!r}.")

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        p = target.p
        if not family_of(p).binary:
            binary = ", ".join(names(lambda family: family.binary))
            target.refuse(f"DisARM needs a Bernoulli, expected one of {binary}, found {target.family}; use LR() or MeasureValued().")
        probs = ops.stop_gradient(p.probs)
        others = self.num_values - 1

        def make(uniforms: Array) -> Alternatives:
            """Of n numbers that are uniform on the simplex, d, the rarer value has those with (1 - d)^others < its probability r."""
            rare = ops.where(probs > 0.5, 1 - probs, probs)
            is_rare = (x == 1) == (probs <= 0.5)
            u = ops.where(probs > 0.5, 1 - uniforms[0], uniforms[0])
            first = ops.where(is_rare, u * rare, rare + u * (1 - rare)) ** (1 / others)  # 1 - d of the draw
            parts = 1e-30 - ops.log1p(-uniforms[1:])
            rest = 1 - first * parts / parts.sum(0)
            level = rare ** (1 / others)
            both = ops.where(level > 0.5, 2 * level - 1, 0 * level) ** others  # the probability that two have the rarer value
            spread = rare * (1 - rare)
            correlation = ops.where(spread > 0, (both - rare**2) / ops.where(spread > 0, spread, 0 * spread + 1), 0 * spread)
            values = ops.where((rest < level) == (probs <= 0.5), 1 + 0 * x, 0 * x)
            mean = (x + values.sum(0)) / (others + 1)
            weights = (values - mean) / (others * (1 - correlation)) * p.logits
            return Alternatives(values, ops.broadcast_to(weights, values.shape))

        return Draw(x, comparison=Comparison(make, x, target.event_ndim, target.batch_ndim, others, others + 1, joint=True))

"""One antithetic run for all elements of a Bernoulli."""

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

    l are the logits, p the probabilities and :math:`m = \max(p, 1-p)`. The draw is b = [v < p] for a uniform number v, and b' is
    [1 - v < p], that of the opposite one. u = 0 and there is no score. All elements of the site share one more evaluation of the
    program, and each multiplies the whole difference; the elements of a plate multiply their own, where all that depends on them stays
    within the plate. The rest of the program is drawn with the same random numbers.

    **Requirements**: a Bernoulli. Not inside ``scan`` or ``cond``.

    Raises:
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
        Dong, Mnih and Tucker 2020; Yin, Ho, Yan, Qian and Zhou 2020 (U2G).
    """

    q = None
    enters = False
    compares = True

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        p = target.p
        if not family_of(p).binary:
            binary = ", ".join(names(lambda family: family.binary))
            target.refuse(f"DisARM needs a Bernoulli, expected one of {binary}, found {target.family}; use LR() or MeasureValued().")
        probs = ops.stop_gradient(p.probs)

        def make(uniforms: Array) -> Alternatives:
            v = ops.where(x == 1, uniforms[0] * probs, probs + uniforms[0] * (1 - probs))
            antithetic = ops.where(v > 1 - probs, 1 + 0 * x, 0 * x)
            size = ops.where(probs > 0.5, probs, 1 - probs)
            weight = 0.5 * (antithetic - x) * size * p.logits
            return Alternatives(antithetic[None], ops.broadcast_to(weight, x.shape)[None])

        return Draw(x, comparison=Comparison(make, x, target.event_ndim, target.batch_ndim, 1, 1, joint=True))

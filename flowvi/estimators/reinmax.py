"""The second-order straight-through estimator, which is biased."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.estimators.relaxed import Relaxed
from flowvi.ops import Array, Ops
from flowvi.relaxations import Relaxation
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class ReinMax(Relaxed):
    r"""**Biased.** Second-order straight through: :math:`E = \nabla\phi(x)\cdot(2 J(\tfrac{\pi + x}{2}) - \tfrac12 J(\pi))\,dl`.

    :math:`\pi` is the mean of x, l are the logits, and :math:`J(q) = \mathrm{diag}(q) - q q^\top`, for a Bernoulli q (1 - q). The value
    stays discrete. There is no score. The trapezoidal rule replaces the difference of the cost between two values; this is right if the
    cost is quadratic in each x. ``describe`` and ``gradient_report`` mark it as biased.

    **Requirements**: those of :class:`StraightThrough`.

    Raises:
        ValueError: At the first run, naming the site: another family, or a Categorical, whose value is an index.

    Example:
        The gradients of E[b^2] and of E[b^4] in a logit of 0 are 1/4. For E[b^4] ReinMax has a mean of 1/2:

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import ReinMax
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def gradients(power):
        ...     def model():
        ...         b = numpyro.sample("b", dist.Bernoulli(0.5).mask(False))
        ...         numpyro.factor("cost", b**power)
        ...     def guide():
        ...         numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logit", 0.0)).mask(False))
        ...     loss = TraceFlow_ELBO(default=ReinMax()).loss
        ...     gradient = jax.grad(lambda logit, key: -loss(key, {"logit": logit}, model, guide))
        ...     return sorted(set(jax.vmap(gradient, (None, 0))(0.0, jax.random.split(jax.random.key(0), 20)).tolist()))
        >>> gradients(2), gradients(4)  # each half of the time, so the means are 1/4 and 1/2
        ([0.0, 0.5], [0.0, 1.0])

    References:
        Liu, Dong, Liu, Yu and Gao 2023.
    """

    def velocity(self, ops: Ops, target: Target, relaxation: Relaxation, hard: Array, eta: Array, deta: Array) -> Array:
        probs = relaxation.soft(ops, eta)
        return 2 * relaxation.moved(0.5 * (probs + hard), deta) - 0.5 * relaxation.moved(probs, deta)

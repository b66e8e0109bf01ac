"""The straight-through estimator, which is biased."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.estimators.relaxed import Relaxed
from flowvi.ops import Array, Ops
from flowvi.relaxations import Relaxation
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class StraightThrough(Relaxed):
    r"""**Biased.** Straight through: :math:`E = \nabla\phi(x)\cdot\nabla_\theta\,\pi(\theta)`, where :math:`\pi` is the mean of x.

    The value stays discrete, with the derivative of its mean: dx = p (1 - p) dl for a Bernoulli with the logit l. There is no score. It
    is right if the cost is linear in x. Otherwise it is the gradient for a linear model of the cost at x. ``describe`` and
    ``gradient_report`` mark it as biased.

    **Requirements**: a Bernoulli or a OneHotCategorical, and a cost with a derivative in x between the values. An index, a comparison
    or ``k.long()`` has none. In NumPyro the value becomes a float.

    Raises:
        ValueError: At the first run, naming the site: another family, or a Categorical, whose value is an index.

    Example:
        The gradient of E[b^2] in a logit of 0 is 1/4. The derivative of b^2 at b = 1 is 2, and at b = 0 it is 0:

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import StraightThrough
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     b = numpyro.sample("b", dist.Bernoulli(0.5).mask(False))
        ...     numpyro.factor("cost", b**2)
        >>> def guide():
        ...     numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logit", 0.0)).mask(False))
        >>> elbo = TraceFlow_ELBO(default=StraightThrough())
        >>> print(elbo.describe(model, guide))
        site  estimator                   given by  distribution     parameters  plates
        b     StraightThrough() (biased)  default   BernoulliLogits  logits
        >>> gradient = jax.grad(lambda logit, key: -elbo.loss(key, {"logit": logit}, model, guide))
        >>> sorted(set(jax.vmap(gradient, (None, 0))(0.0, jax.random.split(jax.random.key(0), 20)).tolist()))
        [0.0, 0.5]

    References:
        Bengio, Léonard and Courville 2013.
    """

    def velocity(self, ops: Ops, target: Target, relaxation: Relaxation, hard: Array, eta: Array, deta: Array) -> Array:
        return relaxation.moved(relaxation.soft(ops, eta), deta)

"""The straight-through Gumbel-softmax estimator, which is biased."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowvi.estimators.relaxed import Relaxed
from flowvi.ops import Array, Ops
from flowvi.relaxations import Relaxation
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class GumbelSoftmax(Relaxed):
    r"""**Biased.** Straight-through Gumbel-softmax: :math:`E = \nabla\phi(x)\cdot\nabla_\theta\,\sigma(z/\lambda)`, with x = H(z).

    z are the logits plus Gumbel noise (for a Bernoulli: Logistic noise), drawn given x, and :math:`\sigma` is a softmax or a sigmoid.
    The value stays x, so the loss and all densities are those of the discrete program. Only its derivative is that of
    :math:`\sigma(z/\lambda)`. There is no score. A low temperature has more variance. ``describe`` and ``gradient_report`` mark it as
    biased.

    If the program should see the relaxed value itself, use the host's ``RelaxedBernoulli`` or ``RelaxedOneHotCategorical`` with
    :class:`RP`.

    **Requirements**: those of :class:`StraightThrough`.

    Args:
        temperature: :math:`\lambda`, a positive number.

    Raises:
        ValueError: A temperature that is not positive. At the first run, naming the site: another family, or a Categorical, whose value
            is an index.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from flowvi import GumbelSoftmax
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def program():
        ...     numpyro.sample("b", dist.Bernoulli(0.3))
        >>> print(TraceFlow_ELBO(default=GumbelSoftmax(0.5)).describe(program, program))
        site  estimator                                given by  distribution    parameters  plates
        b     GumbelSoftmax(temperature=0.5) (biased)  default   BernoulliProbs  probs

    References:
        Jang, Gu and Poole 2017, section 2.2; Maddison, Mnih and Teh 2017.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"GumbelSoftmax: expected a positive temperature, found {self.temperature}.")

    def velocity(self, ops: Ops, target: Target, relaxation: Relaxation, hard: Array, eta: Array, deta: Array) -> Array:
        z, _ = relaxation.given(ops, eta, hard, target.uniforms(tuple(eta.shape), eta))
        return relaxation.moved(relaxation.soft(ops, z / self.temperature), deta / self.temperature)

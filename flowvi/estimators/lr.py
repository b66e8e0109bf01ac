"""The likelihood ratio estimator: no velocity, only a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from flowvi.baselines import Baseline, BaselineField
from flowvi.estimators.estimator import Draw, Estimator, refuse_moving_support
from flowvi.jumps import Jumps, JumpsField
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class LR(Estimator):
    r"""The likelihood ratio (score function, REINFORCE): the cost of the drawn value times the derivative of its log density.

    The estimate is :math:`E = w\,\phi(x)\,\nabla_\theta \log p(x;\theta)`, with the cost :math:`\phi`, the part of the loss that
    depends on x, and the weight w = p/q. u = 0 and psi is the score. It acts on the site's value, after all transforms.

    **Requirements**: ``log_prob`` differentiable in the parameters, and a support that does not move with them. The cost may be
    discontinuous or a black box, as long as its jumps do not move with the parameters.

    Args:
        baseline: Subtracted from the costs, instead of the objective's leave-one-out mean over particles. A :class:`~flowvi.Baseline`
            is trained. ``"plate"`` is the mean cost of the other elements of the site's plates; it needs no second particle.
            ``"optimal"`` is the baseline of least variance for each parameter, E[psi^2 phi] / E[psi^2], estimated from the other
            particles; a vector that belongs to one event, such as logits, counts as one parameter. With few particles this estimate is
            noisy, and the leave-one-out mean may be better.
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        jumps: Where the cost jumps as x crosses a number t that moves with a parameter; see :class:`RP`. A fixed jump need not be
            given.

    Raises:
        TypeError: ``baseline`` is neither a :class:`~flowvi.Baseline` nor one of the names.
        ValueError: At the first run, naming the site: a support that moves with a parameter; ``"plate"`` without a plate; ``"optimal"``
            with a single particle, or for a family whose parameters it does not know.

    Example:
        The gradient of E[3 x] under a Bernoulli, in its probability: 3 / 0.4 where x is 1, and 0 where it is 0.

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import LR, plot
        >>> samples = plot.gradient_samples(dist.Bernoulli(probs=0.4), LR(), "probs", lambda x: 3.0 * x)
        >>> sorted(set(samples.round(4).tolist()))
        [0.0, 7.5]

    References:
        Williams 1992; Ranganath, Gerrish and Blei 2014; Weaver and Tao 2001 (``"optimal"``). Parmas and Sugiyama 2021, eq. 19 with
        u = 0.
    """

    baseline: Baseline | Literal["plate", "optimal"] | None = BaselineField(optimal=True)  # type: ignore[assignment]  # noqa: RUF009
    q: Callable[[Any], Any] | None = None
    _: KW_ONLY
    jumps: Jumps = JumpsField()  # type: ignore[assignment]  # noqa: RUF009
    enters = False

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        refuse_moving_support(target, "LR")
        target.require_inverse("LR, which reads the density at the drawn value,")
        log_prob = target.to_batch(target.p.log_prob(x))
        return Draw(target.push(x), log_prob, log_prob=log_prob)

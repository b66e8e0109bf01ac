"""The Rényi and importance-weighted bounds in Pyro, with one estimator per site."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pyro.infer import RenyiELBO
from pyro.poutine.util import prune_subsample_sites
from pyro.util import warn_if_nan

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment, Describes, Description, Estimators
from flowvi.estimators import Auto, Estimator
from flowvi.objectives import BoundParticle, Gradient, LeaveOneOut, bound_of, renyi_bound, require_bound_options
from flowvi.ops import times
from flowvi.particles import require_num_particles
from flowvi.pyro.baselines import annotated_baselines
from flowvi.pyro.handlers import share_subsamples
from flowvi.pyro.host import HOST, as_found
from flowvi.pyro.run import PyroProgram, programs
from flowvi.refusals import refusal
from flowvi.run import Run, run
from flowvi.sites import GuideSites


class TraceFlow_RenyiELBO(Describes, RenyiELBO):
    r"""The Rényi or importance-weighted bound with one gradient estimator per latent site; the ``loss`` of :class:`pyro.infer.SVI`.

    Its value is :math:`-\tfrac{1}{1-\alpha} \log \tfrac1K \sum_k e^{(1-\alpha) r_k}`, with r the log ratio of the densities of model
    and guide, once for each element of the plates that all statements share. Its derivative goes through every r. In addition, the
    score of each particle's site multiplies the bound minus the bound without the particle (VIMCO).

    **Requirements**: those of the estimators, and q = p at every site. A plate must not be subsampled if some statement is outside the
    plate. First order only.

    Args:
        alpha: The order; 0 is the importance-weighted bound. 1 would be the ELBO and is refused.
        num_particles: The number K of samples of the guide.
        max_plate_nesting: As in Pyro; guessed by default if particles are vectorized.
        max_iarange_nesting: As in Pyro (deprecated there).
        vectorize_particles: Whether the particles are a plate (True) or a loop.
        strict_enumeration_warning: As in Pyro; without effect here.
        estimators: A mapping from names of random sites (or of the model sites they are for) to estimators, or a function of the site's
            message that returns an estimator or None. It overrides every annotation.
        default: The estimator of a site for which none is given.
        baseline: ``"loo"`` subtracts the bound without the particle at every score; None subtracts nothing.
        gradient: ``"plain"``, or ``"dreg"``: doubly reparameterized, for guides whose sites have no score. With :math:`\bar w` the
            normalised weights, the derivative through the samples is weighted by :math:`\alpha \bar w + (1-\alpha) \bar w^2`, and the
            direct derivative in the parameters by :math:`\bar w`. It takes another run of guide and model.

    Raises:
        TypeError: Something that is not an estimator is given as one.
        ValueError: ``alpha`` is 1. At the first run, naming the site: a proposal; an estimator's own baseline; an estimator that
            compares values, has a control variate or is biased; under ``"dreg"`` a site with a score or a moving support.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi.pyro import TraceFlow_RenyiELBO
        >>> def model():
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     pyro.sample("y", dist.Normal(2.0 * k, 1.0), obs=torch.tensor(1.5))
        >>> def guide():
        ...     pyro.sample("k", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceFlow_RenyiELBO(num_particles=5))
        >>> losses = [svi.step() for _ in range(200)]
        >>> bool(pyro.param("l") > 0.5)
        True
        >>> pyro.clear_param_store()

    References:
        Burda, Grosse and Salakhutdinov 2016; Li and Turner 2016. Mnih and Rezende 2016 (VIMCO). Tucker, Lawson, Gu and Maddison 2019
        (``"dreg"``). Parmas and Sugiyama 2021, eq. 19 for u and psi.
    """

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 2,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        *,
        estimators: Estimators = None,
        default: Estimator = Auto(),  # noqa: B008
        baseline: LeaveOneOut = "loo",
        gradient: Gradient = "plain",
    ):
        require_bound_options(alpha, baseline, gradient)
        num_particles = require_num_particles(num_particles)
        super().__init__(alpha, num_particles, max_plate_nesting, max_iarange_nesting, vectorize_particles, strict_enumeration_warning)
        self.baseline: LeaveOneOut = baseline
        self.gradient: Gradient = gradient
        self._assignment = Assignment(estimators, default)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a float, without a derivative.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            Minus the estimate of the bound.
        """
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a float; its derivative is added to the ``.grad`` of the parameters.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            Minus the estimate of the bound.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss as a scalar tensor: its value is minus the estimate of the bound, its derivative the estimator.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A scalar tensor.
        """
        loss = self._surrogate(model, guide, args, kwargs)
        warn_if_nan(loss, "loss")
        return loss

    def _surrogate(self, model, guide, args, kwargs) -> torch.Tensor:
        """The loss as a scalar tensor; Python does not look at its value."""
        stacked = self.num_particles > 1 and self.vectorize_particles
        with nullcontext() if stacked else share_subsamples():
            particles, scales = zip(*map(self._reduce, programs(self, model, guide, args, kwargs)), strict=True)
        particle = particles[0] if stacked else BoundParticle(*map(_stack, zip(*particles, strict=True)))
        return times(-renyi_bound(ops, particle, self.alpha, self.baseline).sum(), scales[0])

    def _describe(self, model, guide, args, kwargs):
        with as_found(model, guide, args, kwargs, self):
            run = self._run(PyroProgram(model, guide, args, kwargs, self))
            return Description(run.sites.random.values(), marginalised=run.marginalised)

    def _try_loss(self, model, guide, args, kwargs) -> None:
        with as_found(model, guide, args, kwargs, self), torch.enable_grad():
            self._surrogate(model, guide, args, kwargs)

    def _get_trace(self, model, guide, args, kwargs):
        program = PyroProgram(model, guide, args, kwargs, self)
        self._run(program)
        return tuple(map(prune_subsample_sites, program.traces))

    def _run(self, program: PyroProgram) -> Run:
        return run(program, GuideSites(self._assignment))

    def _reduce(self, program: PyroProgram) -> tuple[BoundParticle, float]:
        run = self._run(program)
        for name in annotated_baselines(program.traces[1], run.sites.random):
            raise refusal(
                name,
                "expected no infer['baseline'] under a Rényi bound, which has its own baseline, the bound without the particle; "
                "remove it, or use TraceFlow_ELBO.",
            )
        return bound_of(HOST, run, self.gradient)


def _stack(field: tuple) -> torch.Tensor | None:
    return None if field[0] is None else torch.stack(field)

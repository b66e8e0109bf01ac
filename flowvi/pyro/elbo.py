"""The evidence lower bound in Pyro, with one estimator per site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from pyro.util import warn_if_nan

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment, Describes, Estimators
from flowvi.baselines import ParticleMean
from flowvi.entropy import apply_entropy
from flowvi.estimators import Auto, Estimator
from flowvi.learned.coupling import JointKind
from flowvi.objectives import (
    LeaveOneOut,
    Particle,
    described,
    elbo_of,
    estimate,
    particle_baseline,
    require_options,
    stack_particles,
)
from flowvi.ops import times
from flowvi.particles import Particles, require_fixed, require_num_particles, require_particles
from flowvi.pyro.baselines import annotated_baselines
from flowvi.pyro.generators import forked_generators, seed_generators
from flowvi.pyro.host import HOST, as_found
from flowvi.pyro.module import LearningModule, unconstrained
from flowvi.pyro.run import PyroProgram, programs
from flowvi.run import Run, run
from flowvi.sites import Entropy, GuideSites
from flowvi.tape import Dependencies, Rule, follows_tensors


class TraceFlow_ELBO(Describes, Trace_ELBO):
    r"""The ELBO with one gradient estimator per latent site; the ``loss`` of :class:`pyro.infer.SVI`.

    Its value is the host's :math:`-\sum_j W_j f_j` (all weights are 1 if every q = p). Its derivative is
    :math:`\sum_s w\,[u\cdot\nabla\phi + \psi\,\phi]` with the u and psi of each site's estimator.

    **Requirements**: those of the estimators at their distributions. First order only: a second derivative raises an error, unless all
    sites are pathwise by the host's own sampler.

    Args:
        num_particles: The number of samples of the guide.
        max_plate_nesting: As in Pyro; guessed by default if particles are vectorized.
        max_iarange_nesting: As in Pyro (deprecated there).
        vectorize_particles: Whether the particles are a plate (True) or a loop.
        strict_enumeration_warning: As in Pyro; without effect here.
        ignore_jit_warnings: As in Pyro; without effect here.
        jit_options: As in Pyro; without effect here.
        retain_graph: Passed to ``backward``.
        tail_adaptive_beta: As in Pyro; without effect here.
        estimators: A mapping from names of random sites (or of the model sites they are for) to estimators, or a function of the site's
            message that returns an estimator or None. It overrides every annotation.
        default: The estimator of a site for which none is given.
        entropy: How the guide's -log density is differentiated. ``"full"`` takes the total derivative. ``"stl"`` (sticking the landing)
            differentiates only through the values, by another run of the guide; it is refused if the support moves with a parameter.
            ``"analytic"`` uses the closed-form divergence of guide and model at each site where the host has one.
        baseline: ``"loo"`` subtracts from the cost of each score the mean cost of the other particles; None subtracts nothing. An
            estimator's own ``baseline`` replaces it at its site.
        dependencies: Which costs a score or a weight multiplies. ``"plates"``: those that come after its site in program order and
            share its plate element. ``"graph"``: those that depend on its site. To find them, every torch function of the run is
            followed, which takes time at every step. What runs after Python has looked at a draw (``if k > 0``, ``k.item()``) counts as
            dependent on the draw. A draw is not followed through TorchScript, ``torch.nn.Parameter(x)``, ``set_``, or code outside
            torch (numpy, pickles).
        particles: ``"stratified"`` draws the particles of ``RP`` sites together, by a Latin hypercube: at each element there are as
            many strata of equal probability as particles, and each particle is in its own. ``"antithetic"`` draws the particles in
            mirrored pairs. Other sites are drawn independently; ``describe`` shows them. ``"fixed"`` draws the same numbers at every
            step (sample average approximation). The loss is then a function of the parameters that deterministic optimizers such as
            L-BFGS can minimize. All sites need RP and a sampler that is smooth in its parameters.
        seed: The seed of ``particles="fixed"``.
        control_variate: A control variate for the whole guide. ``"quadratic"`` and ``"cubic"`` are models of the cost over all Normal
            and MultivariateNormal sites with ``RP()``, learned while SVI runs as in ``RP(control_variate=...)``. A site in a plate is
            coupled with the sites outside the plate and with those of its own element. ``describe`` shows which sites are covered. A
            site is not coupled with one from which it is computed; the first run shows which these are. While Pyro's validation is on,
            every run is checked for it, which takes time. The coefficients are parameters of the program.

    Raises:
        TypeError: Something that is not an estimator is given as one.
        ValueError: At the first run, naming the site; see the estimators.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi import LR, RP
        >>> from flowvi.pyro import TraceFlow_ELBO
        >>> def model():
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     pyro.sample("y", dist.Normal(w + k, 1.0), obs=torch.tensor(1.5))
        >>> def guide():
        ...     pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
        ...     pyro.sample("k", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> print(TraceFlow_ELBO(estimators={"w": RP()}).describe(model, guide))
        site  estimator  given by         distribution  parameters     plates
        w     RP()       estimators['w']  Normal        loc, scale
        k     LR()       default          Bernoulli     probs, logits
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19; Schulman, Heess, Weber and Abbeel 2015. Roeder, Wu and Duvenaud 2017 (``"stl"``).
        McKay, Beckman and Conover 1979; Owen 1997 (Latin hypercubes). Kleywegt, Shapiro and Homem-de-Mello 2002 (fixed draws). Geffner
        and Domke 2020 (quadratic control variates).
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        estimators: Estimators = None,
        default: Estimator = Auto(),  # noqa: B008
        entropy: Entropy = "full",
        baseline: LeaveOneOut = "loo",
        dependencies: Dependencies = "plates",
        particles: Particles = "independent",
        seed: int = 0,
        control_variate: JointKind | None = None,
    ):
        require_options(entropy, baseline, dependencies, control_variate, particles)
        num_particles = require_num_particles(num_particles)
        require_particles(particles, num_particles, vectorize_particles, entropy)
        super().__init__(
            num_particles,
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
            ignore_jit_warnings,
            jit_options,
            retain_graph,
            tail_adaptive_beta,
        )
        self.particles: Particles = particles
        self.seed: int = seed
        self.entropy: Entropy = entropy
        self.baseline: ParticleMean | None = particle_baseline(baseline)
        self.dependencies: Rule = dependencies
        self.assignment: Assignment = Assignment(estimators, default, control_variate)

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> LearningModule:
        """Model, guide and loss as one torch module, whose parameters include what the estimators learn.

        Args:
            model: The model, a module.
            guide: The guide, a module.

        Returns:
            The module; its parameters ``learned.<site>:<name>`` exist after the first call.
        """
        return LearningModule(model, guide, self)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a float, without a derivative.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            Minus the estimate of the ELBO.
        """
        with torch.no_grad():
            total = sum((float(loss) for loss in self._losses(model, guide, args, kwargs)), start=0.0)
        warn_if_nan(total, "loss")  # type: ignore[call-overload]
        return total

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss as a scalar tensor: its value is minus the estimate of the ELBO, its derivative the estimator.

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

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a float; its derivative is added to the ``.grad`` of the parameters.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            Minus the estimate of the ELBO.
        """
        total = 0.0
        for loss in self._losses(model, guide, args, kwargs):
            total += float(loss.detach())
            if loss.requires_grad:
                loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(total, "loss")  # type: ignore[call-overload]
        return total

    def _surrogate(self, model, guide, args, kwargs) -> torch.Tensor:
        """The loss as a scalar tensor; Python does not look at its value."""
        return torch.stack(list(self._losses(model, guide, args, kwargs))).sum()

    def _losses(self, model, guide, args, kwargs) -> Iterator[torch.Tensor]:
        """Scalars that add up to the loss. Each can be differentiated separately, and then its graph can be freed."""
        return (self._fixed_losses if self.particles == "fixed" else self._drawn_losses)(model, guide, args, kwargs)

    def _fixed_losses(self, model, guide, args, kwargs) -> Iterator[torch.Tensor]:
        """The losses at the same random numbers, whatever the state of torch's generators."""
        is_new = getattr(guide, "prototype_trace", guide) is None  # an autoguide that draws while it makes its parameters
        if is_new or not self.assignment.has_read_annotations:
            with forked_generators():
                self._first_run(model, guide, args, kwargs)
        if self.vectorize_particles and self.max_plate_nesting == float("inf"):
            with forked_generators():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
        with forked_generators():
            known = set(pyro.get_param_store())
            for is_again in (False, True):
                seed_generators(self.seed)
                losses = self._drawn_losses(model, guide, args, kwargs)
                first = next(losses)
                if is_again or known == set(pyro.get_param_store()):
                    break  # no parameter has drawn its initial value
            yield first
            yield from losses

    def _drawn_losses(self, model, guide, args, kwargs) -> Iterator[torch.Tensor]:
        looped = []
        follows = follows_tensors(self.dependencies)
        for program in programs(self, model, guide, args, kwargs, follows_tensors=follows, particles=self.particles):
            run = self._run(program)
            if self.particles == "fixed":
                require_fixed(run)
            annotated = annotated_baselines(program.traces[1], run.draws)
            particle = elbo_of(HOST, run, self.dependencies, baselines=annotated)
            if self.vectorize_particles:
                yield self._loss(particle, self.num_particles)
            elif self.num_particles > 1 and self.baseline is not None and particle.scores:
                looped.append(particle)
            else:
                yield times(self._loss(particle, 1), 1 / self.num_particles)
        if looped:
            yield self._loss(stack_particles(ops, looped), self.num_particles)

    def _loss(self, particles: Particle, num_particles: int) -> torch.Tensor:
        return -torch.as_tensor(estimate(ops, particles, num_particles, self.baseline))

    def _get_trace(self, model, guide, args, kwargs):
        program = PyroProgram(model, guide, args, kwargs, self)
        self._run(program)
        return tuple(map(prune_subsample_sites, program.traces))

    def _describe(self, model, guide, args, kwargs):
        with as_found(model, guide, args, kwargs, self):
            return described(self._first_run(model, guide, args, kwargs), self.dependencies)

    def _first_run(self, model, guide, args, kwargs) -> Run:
        follows = follows_tensors(self.dependencies)
        return self._run(PyroProgram(model, guide, args, kwargs, self, follows, self.particles))

    def _try_loss(self, model, guide, args, kwargs) -> None:
        with as_found(model, guide, args, kwargs, self), torch.enable_grad(), poutine.trace(param_only=True) as used:
            for loss in self._losses(model, guide, args, kwargs):
                nodes: dict[str, Any] = used.trace.nodes
                leaves = [leaf for node in nodes.values() if (leaf := unconstrained(node["value"])).requires_grad]
                if leaves and loss.requires_grad:
                    torch.autograd.grad(loss, leaves, allow_unused=True)  # as in a step, which also frees the graph

    def _run(self, program: PyroProgram) -> Run:
        return apply_entropy(HOST, run(program, GuideSites(self.assignment, self.entropy)), self.entropy)

"""The evidence lower bound in NumPyro, with one estimator per site."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from numpyro.infer import Trace_ELBO

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment, Describes, Description, Estimators
from flowvi.entropy import apply_entropy
from flowvi.estimators import Auto, Estimator
from flowvi.learned.coupling import JointKind
from flowvi.numpyro.host import HOST, as_found
from flowvi.numpyro.particles import Together
from flowvi.numpyro.run import NumPyroProgram, of_first_particle, require_known, run_program, trace_loss
from flowvi.numpyro.threefry import split, typed_like
from flowvi.objectives import LeaveOneOut, Particle, described, elbo_of, estimate, particle_baseline, require_options
from flowvi.particles import Particles, are_together, require_fixed, require_num_particles, require_particles
from flowvi.run import Run
from flowvi.sites import Entropy
from flowvi.tape import Dependencies


class TraceFlow_ELBO(Describes, Trace_ELBO):
    r"""The ELBO with one gradient estimator per latent site; the ``loss`` of :class:`numpyro.infer.SVI`.

    Its value is the host's :math:`-\sum_j W_j f_j` (all weights are 1 if every q = p). Its derivative is
    :math:`\sum_s w\,[u\cdot\nabla\phi + \psi\,\phi]` with the u and psi of each site's estimator.

    **Requirements**: those of the estimators at their distributions. First order only: a second derivative raises an error, unless all
    sites are pathwise by the host's own sampler.

    Args:
        num_particles: The number of samples of the guide. Mutable state, such as that of a BatchNorm, is taken from the first one.
        vectorize_particles: True for ``jax.vmap``, False for ``jax.lax.map``, or a function ``(fn, keys) -> stacked``.
        multi_sample_guide: Whether the guide's values have a leading dim of samples, over which the model is mapped.
        sum_sites: Whether to sum over statements, or to return a dict by statement (for ``evaluate``).
        estimators: A mapping from names of random sites (or of the model sites they are for) to estimators, or a function of the site's
            message that returns an estimator or None. It overrides every annotation.
        default: The estimator of a site for which none is given.
        entropy: How the guide's -log density is differentiated. ``"full"`` takes the total derivative. ``"stl"`` (sticking the landing)
            differentiates only through the values, by another run of the guide; it is refused if the support moves with a parameter.
            ``"analytic"`` uses the closed-form divergence of guide and model at each site where the host has one.
        baseline: ``"loo"`` subtracts from the cost of each score the mean cost of the other particles; None subtracts nothing. An
            estimator's own ``baseline`` replaces it at its site.
        dependencies: Which costs a score or a weight multiplies. ``"graph"``: those that depend on its site and share its plate
            element. They are read off the jaxpr of one more, abstract run, if some site has a score or a weight. ``"plates"``: those
            that come after its site in program order and share its plate element; this needs no such run.
        particles: ``"stratified"`` draws the particles of ``RP`` sites together, by a Latin hypercube: at each element there are as
            many strata of equal probability as particles, and each particle is in its own. ``"antithetic"`` draws the particles in
            mirrored pairs. Other sites are drawn independently; ``describe`` shows them. ``"fixed"`` draws the same numbers at every
            step (sample average approximation). The loss is then a function of the parameters that deterministic optimizers such as
            L-BFGS can minimize. All sites need RP and a sampler that is smooth in its parameters.
        seed: The seed of ``particles="fixed"``.
        control_variate: A control variate for the whole guide. ``"quadratic"`` and ``"cubic"`` are models of the cost over all Normal
            and MultivariateNormal sites with ``RP()``, learned while SVI runs as in ``RP(control_variate=...)``. A site in a plate is
            coupled with the sites outside the plate and with those of its own element. ``describe`` shows which sites are covered. A
            site is not coupled with one from which it is computed; the first run shows which these are. In NumPyro, pass
            ``adaptive(guide, elbo)`` to ``SVI``.

    Raises:
        TypeError: Something that is not an estimator is given as one.
        ValueError: At the first run, naming the site; see the estimators.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from flowvi import LR, RP
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        ...     k = numpyro.sample("k", dist.Bernoulli(0.5))
        ...     numpyro.sample("y", dist.Normal(w + k, 1.0), obs=1.5)
        >>> def guide():
        ...     numpyro.sample("w", dist.Normal(numpyro.param("m", 0.1), 1.0))
        ...     numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("l", 0.0)))
        >>> print(TraceFlow_ELBO(estimators={"w": RP()}).describe(model, guide))
        site  estimator    given by         distribution     parameters  plates
        w     RP()         estimators['w']  Normal           loc, scale
        k     Enumerate()  default          BernoulliLogits  logits
        2 evaluations of the program per particle

    References:
        Parmas and Sugiyama 2021, eq. 19; Schulman, Heess, Weber and Abbeel 2015. Roeder, Wu and Duvenaud 2017 (``"stl"``).
        McKay, Beckman and Conover 1979; Owen 1997 (Latin hypercubes). Kleywegt, Shapiro and Homem-de-Mello 2002 (fixed draws). Geffner
        and Domke 2020 (quadratic control variates).
    """

    can_infer_discrete = True

    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: Any = True,
        multi_sample_guide: bool = False,
        sum_sites: bool = True,
        *,
        estimators: Estimators = None,
        default: Estimator = Auto(),  # noqa: B008
        entropy: Entropy = "full",
        baseline: LeaveOneOut = "loo",
        dependencies: Dependencies = "graph",
        particles: Particles = "independent",
        seed: int = 0,
        control_variate: JointKind | None = None,
    ):
        require_options(entropy, baseline, dependencies, control_variate, particles)
        num_particles = require_num_particles(num_particles)
        require_particles(particles, num_particles, vectorize_particles, entropy)
        super().__init__(num_particles, vectorize_particles, multi_sample_guide, sum_sites)
        if control_variate is not None and multi_sample_guide:
            raise ValueError(
                f"control_variate: expected None with multi_sample_guide=True, found {control_variate!r}; use num_particles instead."
            )
        self.particles: Particles = particles
        self.seed = seed
        self.entropy: Entropy = entropy
        self.baseline = particle_baseline(baseline)
        self.dependencies: Dependencies = dependencies
        self.assignment = Assignment(estimators, default, control_variate)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        if self.particles == "fixed":
            rng_key = typed_like(random.key(self.seed, impl=random.key_impl(rng_key)), rng_key)

        def particle(key, together=None):
            return self._particle(NumPyroProgram(key, param_map, model, guide, args, kwargs, self.multi_sample_guide, together))

        if self.num_particles == 1:
            particles, mutable_state = particle(rng_key)
        elif not are_together(self.particles):
            particles, mutable_state = self.vectorize_particles_fn(particle, split(rng_key, self.num_particles))
        else:
            shared, rng_key = split(rng_key)
            particles, mutable_state = jax.vmap(lambda key, i: particle(key, self._together(i, shared)))(
                split(rng_key, self.num_particles), jnp.arange(self.num_particles)
            )
        if self.num_particles > 1:
            mutable_state = of_first_particle(mutable_state)
        elbo = estimate(ops, particles, self.num_particles, self.baseline)
        return {"loss": jax.tree.map(jnp.negative, elbo), "mutable_state": mutable_state}

    def _particle(self, program: NumPyroProgram) -> tuple[Particle, Any]:
        run = self._run(program)
        if self.particles == "fixed":
            require_fixed(run)
        return elbo_of(HOST, run, self.dependencies, by_statement=not self.sum_sites), run.mutable_state or None

    def _try_loss(self, model, guide, args, kwargs) -> None:
        with as_found(model, guide, args, kwargs):
            trace_loss(self, model, guide, args, kwargs)

    def _describe(self, model, guide, args, kwargs) -> Description:
        together = self._together(0, random.key(1)) if are_together(self.particles) else None
        program = NumPyroProgram(random.key(0), {}, model, guide, args, kwargs, self.multi_sample_guide, together)
        with as_found(model, guide, args, kwargs):
            found = [described(self._run_any(program), self.dependencies)]
            if found[0].evaluations > 1 or any(site.estimator.compares for site in found[0]):

                def count(params):  # a parameter counts as live only if it is traced
                    found.append(described(self._run_any(replace(program, param_map=params)), self.dependencies))

                jax.eval_shape(count, program.initial_parameters())
        return found[-1]

    def _together(self, number: jax.Array | int, key: jax.Array) -> Together:
        return Together(self.particles, number, self.num_particles, key)

    def _run(self, program: NumPyroProgram) -> Run:
        run = self._run_any(program)
        require_known(run.sites, program.param_map)
        return run

    def _run_any(self, program: NumPyroProgram) -> Run:
        """A run of a program whose parameters need not include those that estimators learn."""
        return apply_entropy(HOST, run_program(program, self.assignment, self.entropy), self.entropy)

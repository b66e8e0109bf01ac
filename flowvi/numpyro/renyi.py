"""The Rényi and importance-weighted bounds in NumPyro, with one estimator per site."""

from __future__ import annotations

from typing import Any

from jax import random
from numpyro.infer import RenyiELBO

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment, Describes, Description, Estimators
from flowvi.estimators import Auto, Estimator
from flowvi.numpyro.handlers import seeded
from flowvi.numpyro.host import HOST, as_found
from flowvi.numpyro.run import NumPyroProgram, of_first_particle, run_program, trace_loss
from flowvi.numpyro.threefry import split
from flowvi.objectives import Gradient, LeaveOneOut, bound_of, renyi_bound, require_bound_options
from flowvi.particles import require_num_particles


class TraceFlow_RenyiELBO(Describes, RenyiELBO):
    r"""The Rényi or importance-weighted bound with one gradient estimator per latent site; the ``loss`` of :class:`numpyro.infer.SVI`.

    Its value is :math:`-\tfrac{1}{1-\alpha} \log \tfrac1K \sum_k e^{(1-\alpha) r_k}`, with r the log ratio of the densities of model
    and guide, once for each element of the plates that all statements share. Its derivative goes through every r. In addition, the
    score of each particle's site multiplies the bound minus the bound without the particle (VIMCO).

    **Requirements**: those of the estimators, and q = p at every site. A plate must not be subsampled if some statement is outside the
    plate. First order only.

    Args:
        alpha: The order; 0 is the importance-weighted bound. 1 would be the ELBO and is refused.
        num_particles: The number K of samples of the guide. Mutable state is taken from the first one.
        estimators: A mapping from names of random sites (or of the model sites they are for) to estimators, or a function of the site's
            message that returns an estimator or None. It overrides every annotation.
        default: The estimator of a site for which none is given.
        vectorize_particles: True for ``jax.vmap``, False for ``jax.lax.map``, or a function ``(fn, keys) -> stacked``.
        baseline: ``"loo"`` subtracts the bound without the particle at every score; None subtracts nothing.
        gradient: ``"plain"``, or ``"dreg"``: doubly reparameterized, for guides whose sites have no score. With :math:`\bar w` the
            normalised weights, the derivative through the samples is weighted by :math:`\alpha \bar w + (1-\alpha) \bar w^2`, and the
            direct derivative in the parameters by :math:`\bar w`. It takes another run of guide and model.

    Raises:
        TypeError: Something that is not an estimator is given as one.
        ValueError: ``alpha`` is 1. At the first run, naming the site: a proposal; an estimator's own baseline; an estimator that
            compares values, has a control variate or is biased; under ``"dreg"`` a site with a score or a moving support.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi.numpyro import TraceFlow_RenyiELBO
        >>> def model():
        ...     k = numpyro.sample("k", dist.Bernoulli(0.5))
        ...     numpyro.sample("y", dist.Normal(2.0 * k, 1.0), obs=1.5)
        >>> def guide():
        ...     numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("l", 0.0)))
        >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.03), TraceFlow_RenyiELBO(num_particles=5))
        >>> bool(svi.run(jax.random.key(0), 500, progress_bar=False).params["l"] > 0.5)
        True

    References:
        Burda, Grosse and Salakhutdinov 2016; Li and Turner 2016. Mnih and Rezende 2016 (VIMCO). Tucker, Lawson, Gu and Maddison 2019
        (``"dreg"``). Parmas and Sugiyama 2021, eq. 19 for u and psi.
    """

    can_infer_discrete = True

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 2,
        *,
        estimators: Estimators = None,
        default: Estimator = Auto(),  # noqa: B008
        vectorize_particles: Any = True,
        baseline: LeaveOneOut = "loo",
        gradient: Gradient = "plain",
    ):
        require_bound_options(alpha, baseline, gradient)
        num_particles = require_num_particles(num_particles)
        super().__init__(alpha, num_particles)
        self.vectorize_particles_fn = self._assign_vectorize_particles_fn(vectorize_particles)
        self.baseline: LeaveOneOut = baseline
        self.gradient: Gradient = gradient
        self._assignment = Assignment(estimators, default)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)["loss"]

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        plate_key, rng_key = split(rng_key)  # one subsample for all particles
        model, guide = (seeded(f, plate_key, hide_types=["sample", "prng_key", "control_flow"]) for f in (model, guide))

        def particle(key):
            program = NumPyroProgram(key, param_map, model, guide, args, kwargs)
            run = run_program(program, self._assignment)
            return *bound_of(HOST, run, self.gradient), run.mutable_state or None

        particles, scale, mutable_state = self.vectorize_particles_fn(particle, split(rng_key, self.num_particles))
        loss = -renyi_bound(ops, particles, self.alpha, self.baseline).sum() * scale[0]
        return {"loss": loss, "mutable_state": of_first_particle(mutable_state)}

    def _try_loss(self, model, guide, args, kwargs) -> None:
        with as_found(model, guide, args, kwargs):
            trace_loss(self, model, guide, args, kwargs)

    def _describe(self, model, guide, args, kwargs):
        with as_found(model, guide, args, kwargs):
            run = run_program(NumPyroProgram(random.key(0), {}, model, guide, args, kwargs), self._assignment)
        return Description(run.sites.random.values(), marginalised=run.marginalised)

"""The evidence lower bound in NumPyro, every site by its own estimator."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jax.lax import stop_gradient
from numpyro.handlers import replay, seed, substitute
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import compute_log_probs
from numpyro.util import _validate_model, check_model_guide_match

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment, Description, Estimators
from flowvi.estimators import Auto, Estimator
from flowvi.numpyro.distributions import NumPyroTarget
from flowvi.numpyro.handlers import attach_estimators, read_annotations
from flowvi.objectives import ALL, Entropy, LeaveOneOut, Particle, elbo_particle, estimate, require_options
from flowvi.tape import Frame, Site, Statement, Tape, Term, program_order


class TraceFlow_ELBO(Trace_ELBO):
    r"""The ELBO with one gradient estimator per latent site; the ``loss`` of :class:`numpyro.infer.SVI`.

    Its value is the host's :math:`-\sum_j W_j f_j` (all weights 1 where every q = p), its derivative
    :math:`\sum_s w\,[u\cdot\nabla\phi + \psi\,\phi]` with the u and psi of each site's estimator.

    **Requirements**: those of the estimators at their distributions. First order only: the surrogate has no second derivative.

    Args:
        num_particles: The number of samples of the guide.
        vectorize_particles: True for ``jax.vmap``, False for ``jax.lax.map``, or a function ``(fn, keys) -> stacked``.
        multi_sample_guide: Whether the guide's values have a leading dim of samples over which the model is mapped.
        sum_sites: Whether to sum over statements or to return a dict by statement (for ``evaluate``).
        estimators: A mapping from names of random sites (or of the model sites they stand for) to estimators, or a function
            of the site's message that returns an estimator or None. It is stronger than every annotation.
        default: The estimator of a site for which none is said.
        entropy: ``"full"`` differentiates the guide's -log density totally; ``"stl"`` (sticking the landing) through the values
            only, by one more run of the guide at the same values. It is refused where the support moves with a parameter.
        baseline: ``"loo"`` subtracts from the cost of each score its mean over the other particles; None does not. An
            estimator's own ``baseline`` replaces it at its site.
        dependencies: ``"plates"``: a score or a weight multiplies the costs that share its plate element and come after it in
            program order.

    Raises:
        TypeError: Where something else than an estimator is given for one.
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
        site  estimator  said in          distribution     parameters  plates
        w     RP()       estimators['w']  Normal           loc, scale
        k     LR()       default          BernoulliLogits  logits

    References:
        Parmas and Sugiyama 2021, eq. 19; Schulman, Heess, Weber and Abbeel 2015. Roeder, Wu and Duvenaud 2017 (``"stl"``).
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
        dependencies: str = "plates",
    ):
        super().__init__(num_particles, vectorize_particles, multi_sample_guide, sum_sites)
        require_options(entropy, baseline, dependencies)
        self.entropy: Entropy = entropy
        self.baseline: LeaveOneOut = baseline
        self._assignment = Assignment(estimators, default)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        def particle(key):
            return self._particle(key, param_map, model, guide, args, kwargs)

        if self.num_particles == 1:
            particles, mutable_state = particle(rng_key)
        else:
            keys = random.split(rng_key, self.num_particles)
            particles, mutable_state = self.vectorize_particles_fn(particle, keys)
        terms = estimate(ops, particles, self.num_particles, self.baseline)
        elbo = sum(terms.values(), start=jnp.array(0.0)) if self.sum_sites else terms
        return {"loss": jax.tree.map(jnp.negative, elbo), "mutable_state": mutable_state}

    def describe(self, model, guide, *args, **kwargs) -> Description:
        """Each random site: its estimator, where that was said, its distribution's parameters, its plates.

        Runs guide and model once at their initial parameters.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A tuple of records that prints as a table.
        """
        run = self._run(random.key(0), {}, model, guide, args, kwargs)
        return Description(run.attached.random.values())

    def _particle(self, rng_key, param_map, model, guide, args, kwargs) -> tuple[Particle, dict | None]:
        run = self._run(rng_key, param_map, model, guide, args, kwargs)
        particle = elbo_particle(ops, run.tape(), not self.sum_sites) if run.attached.draws else Particle(run.costs(self.sum_sites), {})
        if not run.mutable_state or self.num_particles == 1:
            return particle, run.mutable_state or None
        warnings.warn("mutable state is currently ignored when num_particles > 1.", stacklevel=2)
        return particle, None

    def _run(self, rng_key, param_map, model, guide, args, kwargs) -> _Run:
        """Run guide and model, again where the model turns out to annotate sites for which the guide did not know it."""

        def run(assignment):
            return _Run(rng_key, param_map, model, guide, args, kwargs, assignment, self.multi_sample_guide, self.entropy)

        self._assignment.forget(lambda value: isinstance(value, jax.core.Tracer))  # of a trace that is over
        try:
            result = run(self._assignment)
        except ValueError:  # perhaps for want of an annotation: read them in a run where every site is plain
            plain = run(None)
            if not self._assignment.learn(plain.annotations):
                raise
            result = run(self._assignment)
        if self._assignment.learn(result.annotations):
            result = run(self._assignment)
        self._assignment.verify({name: name for name in result.attached.random}, result.attached.fixed)
        return result


class _Run:
    """One run of guide and model: their traces, log densities and draws."""

    def __init__(self, rng_key, param_map, model, guide, args, kwargs, assignment, multi_sample, entropy):
        model_seed, guide_seed = random.split(rng_key)
        seeded = seed(guide, guide_seed)
        self.attached = attach_estimators(seeded, assignment) if assignment is not None else seeded
        self.guide_log_probs, self.guide_trace = compute_log_probs(self.attached, args, kwargs, param_map, sum_log_prob=False)
        if entropy == "stl" and assignment is not None:
            self._stick_the_landing(seed(guide, guide_seed), args, kwargs, param_map)
        self.mutable_state = _values(self.guide_trace, "mutable")
        params = {**param_map, **self.mutable_state}
        reader = read_annotations(model)
        if multi_sample:
            self.model_log_probs, self.model_trace = self._map_model(reader, model_seed, params, args, kwargs)
        else:
            replayed = replay(seed(reader, model_seed), self.guide_trace)
            self.model_log_probs, self.model_trace = compute_log_probs(replayed, args, kwargs, params, sum_log_prob=False)
            check_model_guide_match(self.model_trace, self.guide_trace)
            _validate_model(self.model_trace, plate_warning="loose")
            self.mutable_state |= _values(self.model_trace, "mutable")
        self.annotations = reader.annotations

    def _stick_the_landing(self, guide, args, kwargs, param_map):
        """Take out of the guide's densities what their parameters contribute at values, and parents, that stay where they are."""
        for name in self.attached.random:
            NumPyroTarget(name, self.guide_trace[name]["fn"], enters=False).require_still_support()
        values = {name: stop_gradient(self.guide_trace[name]["value"]) for name in self.attached.random}
        log_probs, _ = compute_log_probs(substitute(guide, data=values), args, kwargs, param_map, sum_log_prob=False)
        for name in values:
            self.guide_log_probs[name] = self.guide_log_probs[name] - ops.tether(log_probs[name])

    def _map_model(self, model, rng_key, params, args, kwargs):
        """Log densities of the model at each sample of a multi-sample guide, along a leading dim."""
        traces = []
        plates = _values(self.guide_trace, "plate")
        latents = {
            name: site["value"]
            for name, site in self.guide_trace.items()
            if (site["type"] == "sample" and site["value"].size > 0) or site["type"] == "deterministic"
        }
        samples = [site["value"].shape[0] for site in self.guide_trace.values() if site["type"] == "sample"]
        if not samples:
            raise ValueError("guide is missing `sample` sites.")

        def log_probs(key, latents):
            with seed(rng_seed=key), substitute(data={**latents, **plates}):
                log_probs, trace = compute_log_probs(model, args, kwargs, params, sum_log_prob=False)
            _validate_model(trace, plate_warning="loose")
            traces.append(trace)
            return log_probs

        return jax.vmap(log_probs)(random.split(rng_key, samples[0]), latents), traces[0]

    def costs(self, sum_sites: bool) -> dict[str, jax.Array]:
        """The costs where nothing is attached to any site: those of the host's own ELBO, in the host's own arithmetic."""
        zero = jnp.array(0.0)
        costs = {
            name: self.model_log_probs.get(name, zero).sum() - self.guide_log_probs.get(name, zero).sum()
            for name in {**self.model_log_probs, **self.guide_log_probs}
        }
        return {ALL: sum(costs.values(), start=zero)} if sum_sites else costs

    def tape(self) -> Tape:
        draws = self.attached.draws
        of_guide, of_model = program_order(_statements(self.guide_trace), _statements(self.model_trace), frozenset(draws))
        terms = [
            Term(name, _frames(trace[name]), sign * log_prob, ancestors[name])
            for sign, log_probs, trace, ancestors in (
                (1, self.model_log_probs, self.model_trace, of_model),
                (-1, self.guide_log_probs, self.guide_trace, of_guide),
            )
            for name, log_prob in log_probs.items()
        ]
        sites = [Site(name, _frames(self.guide_trace[name]), draw, of_guide[name]) for name, draw in draws.items()]
        return Tape(terms, sites)


def _values(trace, kind: str) -> dict:
    return {name: site["value"] for name, site in trace.items() if site["type"] == kind}


def _statements(trace) -> tuple[Statement, ...]:
    """The sample statements; those that came out of scan or cond together may depend on each other."""
    return tuple(
        Statement(name, "control flow" if site.get("_control_flow_done") else None)
        for name, site in trace.items()
        if site["type"] == "sample"
    )


def _frames(site) -> frozenset[Frame]:
    return frozenset(Frame(*frame) for frame in site["cond_indep_stack"])

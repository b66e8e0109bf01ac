"""The evidence lower bound in Pyro, every site by its own estimator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape, warn_if_nan

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment, Description, Estimators
from flowvi.estimators import Auto, Estimator
from flowvi.objectives import Credit, Entropy, LeaveOneOut, Particle, elbo_particle, estimate, require_options
from flowvi.pyro.baselines import annotated_baseline
from flowvi.pyro.distributions import PyroTarget
from flowvi.pyro.handlers import attach_estimators, replay_and_read
from flowvi.tape import Frame, Site, Statement, Tape, Term, program_order


class TraceFlow_ELBO(Trace_ELBO):
    r"""The ELBO with one gradient estimator per latent site; the ``loss`` of :class:`pyro.infer.SVI`.

    Its value is the host's :math:`-\sum_j W_j f_j` (all weights 1 where every q = p), its derivative
    :math:`\sum_s w\,[u\cdot\nabla\phi + \psi\,\phi]` with the u and psi of each site's estimator.

    **Requirements**: those of the estimators at their distributions. First order only: the surrogate has no second derivative.

    Args:
        num_particles: The number of samples of the guide.
        max_plate_nesting: As in Pyro; guessed by default where particles are vectorized.
        max_iarange_nesting: As in Pyro (deprecated there).
        vectorize_particles: Whether the particles are a plate or a loop.
        strict_enumeration_warning: As in Pyro; without effect here.
        ignore_jit_warnings: As in Pyro; without effect here.
        jit_options: As in Pyro; without effect here.
        retain_graph: Passed to ``backward``.
        tail_adaptive_beta: As in Pyro; without effect here.
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
        site  estimator  said in          distribution  parameters     plates
        w     RP()       estimators['w']  Normal        loc, scale
        k     LR()       default          Bernoulli     probs, logits
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19; Schulman, Heess, Weber and Abbeel 2015. Roeder, Wu and Duvenaud 2017 (``"stl"``).
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        estimators: Estimators = None,
        default: Estimator = Auto(),  # noqa: B008
        entropy: Entropy = "full",
        baseline: LeaveOneOut = "loo",
        dependencies: str = "plates",
    ):
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
        require_options(entropy, baseline, dependencies)
        self.entropy: Entropy = entropy
        self.baseline: LeaveOneOut = baseline
        self._assignment = Assignment(estimators, default)

    def loss(self, model, guide, *args, **kwargs) -> float:
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

    def differentiable_loss(self, model, guide, *args, **kwargs) -> torch.Tensor:
        """The loss as a scalar tensor: its value is minus the estimate of the ELBO, its derivative the estimator.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A scalar tensor.
        """
        loss = torch.stack(list(self._losses(model, guide, args, kwargs))).sum()
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
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

    def describe(self, model, guide, *args, **kwargs) -> Description:
        """Each random site: its estimator, where that was said, its distribution's parameters, its plates.

        Runs guide and model once; the state of torch's generator is put back.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A tuple of records that prints as a table.
        """
        with torch.random.fork_rng(devices=[]):
            return Description(self._run(model, guide, args, kwargs)[1].random.values())

    def _losses(self, model, guide, args, kwargs) -> Iterator[torch.Tensor]:
        """Scalars that add up to the loss. Each can be differentiated by itself, so that its graph can be freed."""
        looped = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if not any("draw" in site for site in guide_trace.nodes.values()):  # nothing attached: the host's own ELBO
                yield torch.as_tensor(guide_trace.log_prob_sum() - model_trace.log_prob_sum()) / self.num_particles
                continue
            particle = _with_annotated_baselines(elbo_particle(ops, _tape(model_trace, guide_trace)), guide_trace)
            if self.vectorize_particles:
                yield _loss(estimate(ops, particle, self.num_particles, self.baseline))
            elif self.num_particles > 1 and self.baseline is not None and particle.credits:
                looped.append(particle)
            else:
                yield _loss(estimate(ops, particle, 1, self.baseline)) / self.num_particles
        if looped:
            yield _loss(estimate(ops, _stack(looped), self.num_particles, self.baseline))

    def _get_trace(self, model, guide, args, kwargs):
        return self._run(model, guide, args, kwargs)[0]

    def _run(self, model, guide, args, kwargs):
        """Traces of guide and model, again where the model turns out to annotate sites for which the guide did not know it."""

        def attach_and_run():
            attached = attach_estimators(self._assignment)
            return (*_traces(model, guide, args, kwargs, attached), attached)

        try:
            traces, annotations, attached = attach_and_run()
        except ValueError:  # perhaps for want of an annotation: read them in a run where every site is plain
            _, annotations = _traces(model, guide, args, kwargs, nullcontext())
            if not self._assignment.learn(annotations):
                raise
            traces, annotations, attached = attach_and_run()
        if self._assignment.learn(annotations):
            traces, annotations, attached = attach_and_run()
        self._assignment.verify(attached.aliases, attached.fixed)
        raw_guide_trace = traces[1]
        traces = self._with_log_probs(*traces)
        if self.entropy == "stl":
            _stick_the_landing(guide, raw_guide_trace, attached.random, args, kwargs)
        for name, draw in attached.draws.items():
            traces[1].nodes[name]["draw"] = draw
        return traces, attached

    def _with_log_probs(self, model_trace, guide_trace):
        """The two traces with their log densities, checked as Pyro checks them."""
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            check_if_enumerated(guide_trace)
        traces = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        for site in traces[1].nodes.values():
            if "unscaled_log_prob" in site:
                site["log_prob"] = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
                site["log_prob_sum"] = site["log_prob"].sum()
        for trace in traces:
            trace.compute_log_prob()
            if is_validation_enabled():
                for site in _sample_sites(trace).values():
                    check_site_shape(site, self.max_plate_nesting)
        return traces


def _traces(model, guide, args, kwargs, attached):
    """Run the guide, under ``attached``, and the model replayed against it: their traces, and what the model annotates."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, poutine.messenger.Messenger):  # a GuideMessenger runs both itself
        with attached:
            guide(*args, **kwargs)
        return messenger.get_traces(), {}  # type: ignore[attr-defined]
    with attached:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replay = replay_and_read(guide_trace)
    return (poutine.trace(replay(model)).get_trace(*args, **kwargs), guide_trace), replay.annotations


def _stick_the_landing(guide, guide_trace, random, args, kwargs):
    """Take out of the guide's densities what their parameters contribute at values, and parents, that stay where they are."""
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        raise ValueError("entropy='stl' runs the guide again by itself, which a GuideMessenger cannot do; use entropy='full'.")
    still = poutine.Trace()
    for name, site in guide_trace.nodes.items():
        if name in random:
            PyroTarget(name, site["fn"], enters=False).require_still_support()
            still.add_node(name, **{**site, "value": site["value"].detach()})
        elif site["type"] == "sample" and site_is_subsample(site):
            still.add_node(name, **site)
    again = poutine.trace(poutine.replay(guide, trace=still)).get_trace(*args, **kwargs)
    again.compute_log_prob(lambda name, site: name in random)
    for name in random:
        site = guide_trace.nodes[name]
        site["log_prob"] = site["log_prob"] - ops.tether(again.nodes[name]["log_prob"])
        site["log_prob_sum"] = site["log_prob"].sum()


def _loss(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return -sum(terms.values())  # type: ignore[return-value]


def _tape(model_trace, guide_trace) -> Tape:
    draws = {name: site["draw"] for name, site in guide_trace.nodes.items() if "draw" in site}
    model, guide = _sample_sites(model_trace), _sample_sites(guide_trace)
    of_guide, of_model = program_order(tuple(map(Statement, guide)), tuple(map(Statement, model)), frozenset(draws))
    terms = [
        Term(name, _frames(site), site["log_prob"] if sign > 0 else -site["log_prob"], ancestors[name])
        for sign, sites, ancestors in ((1, model, of_model), (-1, guide, of_guide))
        for name, site in sites.items()
    ]
    sites = [Site(name, _frames(guide[name]), draw, of_guide[name]) for name, draw in draws.items()]
    return Tape(terms, sites)


def _with_annotated_baselines(particle: Particle, guide_trace) -> Particle:
    """The particle with the baselines that the guide says in Pyro's own way."""
    credits = dict(particle.credits)
    for name, credit in particle.credits.items():
        if options := guide_trace.nodes[name]["infer"].get("baseline"):
            credits[name] = credit._replace(baseline=annotated_baseline(name, options, credit.cost))
    return particle._replace(credits=credits)


def _sample_sites(trace) -> dict:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _frames(site) -> frozenset[Frame]:
    return frozenset(Frame(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized)


def _stack(particles: list[Particle]) -> Particle:
    """Particles of a loop as one, along a new first axis; a site is stacked over the particles that ran it."""
    names = dict.fromkeys(name for particle in particles for name in particle.costs)
    costs = {name: sum(particle.costs.get(name, 0.0) for particle in particles) for name in names}
    credits = {}
    for name in dict.fromkeys(name for particle in particles for name in particle.credits):
        fields = zip(*(particle.credits[name] for particle in particles if name in particle.credits), strict=True)
        credits[name] = Credit(*(None if field[0] is None else torch.stack(field) for field in fields))
    return Particle(costs, credits)

"""One run of guide and model in Pyro: their traces, log densities and draws, as the tape of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch.distributions.kl import kl_divergence

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment
from flowvi.objectives import Dependencies, Entropy, require_one_order
from flowvi.ops import total
from flowvi.pyro.distributions import PyroTarget, is_masked
from flowvi.pyro.handlers import attach_estimators, replay_and_read
from flowvi.pyro.provenance import mark_statements, provenance, track_provenance
from flowvi.tape import Ancestors, Frame, Route, Site, Tape, Term, control_terms, meet, program_order, weighty


def runs(elbo: ELBO, run: Callable[..., Run], model, guide, args, kwargs) -> Iterator[Run]:
    """The runs of an objective's particles: a loop of them, or one in which they are a plate."""
    if not elbo.vectorize_particles:
        for _ in range(elbo.num_particles):
            yield run(model, guide, args, kwargs)
        return
    if elbo.max_plate_nesting == float("inf"):
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)
    yield run(elbo._vectorized_num_particles(model), elbo._vectorized_num_particles(guide), args, kwargs)


def run_program(
    assignment: Assignment, max_plate_nesting: Any, dependencies: Dependencies, entropy: Entropy, model, guide, args, kwargs
) -> Run:
    """Run guide and model, again where the model turns out to annotate sites for which the guide did not know it."""
    if dependencies == "graph":
        with track_provenance() as tracker, mark_statements(tracker):
            result = _run_program(assignment, max_plate_nesting, entropy, model, guide, args, kwargs)
            result.read_provenance()
            return result
    return _run_program(assignment, max_plate_nesting, entropy, model, guide, args, kwargs)


def _run_program(assignment: Assignment, max_plate_nesting: Any, entropy: Entropy, model, guide, args, kwargs) -> Run:
    def attach_and_run():
        attached = attach_estimators(assignment, entropy)
        return (*_traces(model, guide, args, kwargs, attached), attached)

    try:
        traces, annotations, attached = attach_and_run()
    except ValueError:  # perhaps for want of an annotation: read them in a run where every site is plain
        _, annotations = _traces(model, guide, args, kwargs, nullcontext())
        if not assignment.learn(annotations):
            raise
        traces, annotations, attached = attach_and_run()
    if assignment.learn(annotations):
        traces, annotations, attached = attach_and_run()
    assignment.verify(attached.aliases, attached.fixed)
    return Run(traces[0], traces[1], attached, max_plate_nesting, (model, guide, args, kwargs))


class Run:
    """One run of guide and model: their traces with log densities, checked as Pyro checks them, and the draws.

    Attributes:
        model_trace: The model's trace.
        guide_trace: The guide's trace.
        attached: What each random site was served by.
        draws: The draws of the guide's sites to which something is attached.
    """

    def __init__(self, model_trace, guide_trace, attached: attach_estimators, max_plate_nesting: Any, program: tuple):
        self.attached, self._program, self._unpruned = attached, program, guide_trace
        self._provenance: tuple | None = None
        self._closed_forms: set[str] = set()
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
            check_if_enumerated(guide_trace)
        self.model_trace, self.guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        # a GuideMessenger runs the model too, whose factors are none of the guide's
        self.draws = {name: draw for name, draw in attached.draws.items() if name in self.guide_trace.nodes}
        for site in self.guide_trace.nodes.values():
            if "unscaled_log_prob" in site:
                site["log_prob"] = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
        for trace in (self.model_trace, self.guide_trace):
            trace.compute_log_prob()
            if is_validation_enabled():
                for site in _sample_sites(trace).values():
                    check_site_shape(site, max_plate_nesting)

    def use_closed_forms(self):
        """Replace, at each site for which Pyro knows it, the two log densities by minus their divergence in closed form.

        Raises:
            ValueError: Where model and guide have latent sites in different orders, so that the divergence may depend on what is drawn
                from the site.
        """
        require_one_order(_latent(self.guide_trace), _latent(self.model_trace))
        for name in self.attached.random:
            guide_site: Any = self.guide_trace.nodes[name]
            model_site: Any = self.model_trace.nodes.get(name)
            if model_site is None or not _same_weights(guide_site, model_site):
                continue
            try:
                divergence = kl_divergence(guide_site["fn"], model_site["fn"])
            except NotImplementedError:
                continue
            self._closed_forms.add(name)
            divergence = torch.as_tensor(divergence).expand(guide_site["fn"].batch_shape)
            model_site["log_prob"] = -scale_and_mask(divergence, guide_site["scale"], guide_site["mask"])
            model_site["log_prob_sum"] = model_site["log_prob"].sum()
            guide_site["log_prob"] = guide_site["log_prob_sum"] = torch.zeros(())
            if self._provenance is not None:
                of_guide, of_model, _ = self._provenance
                parents = provenance(guide_site["fn"]) | provenance(model_site["fn"])
                of_model[name], of_guide[name] = parents | guide_site["branched"] | model_site["branched"], frozenset()

    def require_still_supports(self, what: str):
        """Refuse ``what``, which drops the guide's scores, where the support of a random site moves, or the guide cannot run again."""
        if isinstance(poutine.unwrap(self._program[1]), poutine.messenger.Messenger):
            raise ValueError(f"{what} runs the guide again by itself, which a GuideMessenger cannot do; go without it.")
        for name in self.attached.random:
            PyroTarget(name, self.guide_trace.nodes[name]["fn"], enters=False).require_fixed_support(what)

    def stick_the_landing(self):
        """Take out of the guide's densities what their parameters contribute at values, and parents, that stay where they are."""
        random = self.attached.random
        again = self.still_guide
        again.compute_log_prob(lambda name, site: name in random)
        for name in random:
            site = self.guide_trace.nodes[name]
            site["log_prob"] = site["log_prob"] - ops.tether(again.nodes[name]["log_prob"])
            site["log_prob_sum"] = site["log_prob"].sum()

    def still_terms(self) -> list[Term]:
        """The costs at values that stay where they are, less the densities of the random sites: what parameters do by themselves."""
        model, _, args, kwargs = self._program
        guide_trace = self.still_guide
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        fixed = guide_trace.copy()
        for name in self.attached.random:
            fixed.remove_node(name)
        for trace in (model_trace, fixed):
            trace.compute_log_prob()
        return _terms(1, model_trace) + _terms(-1, fixed)

    @cached_property
    def still_guide(self):
        """The trace of one more run of the guide, at the detached values of its random sites."""
        _, guide, args, kwargs = self._program
        still = poutine.Trace()
        for name, site in self._unpruned.nodes.items():
            if name in self.attached.random:
                still.add_node(name, **{**site, "value": site["value"].detach()})
            elif site["type"] == "sample" and site_is_subsample(site):
                still.add_node(name, **site)
        return poutine.trace(poutine.replay(guide, trace=still)).get_trace(*args, **kwargs)

    def tape(self) -> Tape:
        """The run's records."""
        guide, model, draws = _sample_sites(self.guide_trace), _sample_sites(self.model_trace), weighty(self.draws)
        drawn = frozenset(draws).union(name for name, site in guide.items() if not site["is_observed"])
        of_guide, of_model = program_order(tuple(guide), tuple(model), drawn)
        of_site = of_guide
        for name in self._closed_forms:  # its expectation over the site itself is taken
            of_model = {**of_model, name: (of_model[name] | of_guide[name]) - {name}}
        if self._provenance is not None:
            of_guide, of_model, of_site = ({name: names & drawn for name, names in of.items()} for of in self._provenance)
        if factors := frozenset(name for name in draws if guide[name]["is_observed"]):
            # each stands for what the guide has drawn without a statement, on which anything may depend
            of_site, of_guide, of_model = ({name: of[name] | factors for name in of} for of in (of_site, of_guide, of_model))
        routes = _routes({name: site for name, site in guide.items() if name in drawn}, of_site)
        met = partial(meet, draws=routes, scored=frozenset(draws))
        site_ancestors, model_ancestors, guide_ancestors = map(met, (routes, _routes(model, of_model), _routes(guide, of_guide)))
        sites = [Site(name, _frames(guide[name]), draw, site_ancestors[name]) for name, draw in draws.items()]
        return Tape(self.terms(model_ancestors, guide_ancestors), sites)

    def read_provenance(self):
        """Keep what a run under :class:`track_provenance` says: ancestors of the guide's costs, the model's, and the draws."""
        model, guide = _sample_sites(self.model_trace), _sample_sites(self.guide_trace)
        of_model, of_guide = (
            {name: provenance((site["log_prob"], site["value"])) | site["branched"] for name, site in sites.items()}
            for sites in (model, guide)
        )
        self._provenance = of_guide, of_model, {name: names | {name} for name, names in of_guide.items()}

    def log_ratio(self) -> torch.Tensor:
        """The log density of the model less that of the guide, and the control variates, summed over all sites."""
        model, guide = _sample_sites(self.model_trace).values(), _sample_sites(self.guide_trace).values()
        of_model = [site["log_prob_sum"] for site in model]
        of_guide = [site["log_prob"].sum() for site in guide]
        of_model += [draw.control.sum() for draw in self.draws.values() if draw.control is not None]
        return torch.as_tensor((total(of_model) if of_model else 0.0) - (total(of_guide) if of_guide else 0.0))

    def terms(self, of_model: Ancestors = None, of_guide: Ancestors = None) -> list[Term]:
        """The costs, with the ancestors of each."""
        return _terms(1, self.model_trace, of_model) + _terms(-1, self.guide_trace, of_guide) + control_terms(self.draws)

    def subsampled(self) -> dict[str, float]:
        """The plates that are subsampled, each with its size over that of the subsample."""
        frames = [f for site in _sample_sites(self.model_trace).values() for f in site["cond_indep_stack"]]
        return {f.name: f.full_size / f.size for f in frames if f.full_size is not None and f.full_size > f.size}


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


def _terms(sign: Literal[1, -1], trace, ancestors: Ancestors = None) -> list[Term]:
    of = ancestors or {}
    return [Term(name, _frames(site), sign, site["log_prob"], of.get(name, frozenset())) for name, site in _sample_sites(trace).items()]


def _routes(sites: dict, ancestors: dict[str, frozenset[str]]) -> tuple[Route, ...]:
    return tuple(Route(name, _frames(site), ancestors[name]) for name, site in sites.items())


def _sample_sites(trace) -> dict:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _latent(trace) -> list[str]:
    return [name for name, site in _sample_sites(trace).items() if not site["is_observed"]]


def _same_weights(guide_site, model_site) -> bool:
    """Whether the two log densities are known to count alike; a divergence in closed form has one scale and one mask."""
    one, other = guide_site["scale"], model_site["scale"]
    same = one is other or (isinstance(one, int | float) and isinstance(other, int | float) and one == other)
    unmasked = not is_masked(guide_site["fn"]) and not is_masked(model_site["fn"])
    return same and unmasked and guide_site["mask"] is model_site["mask"]


def _frames(site) -> frozenset[Frame]:
    if "frames" not in site:
        site["frames"] = _plates(tuple(map(tuple, site["cond_indep_stack"])))
    return site["frames"]


@lru_cache(maxsize=1024)  # the same at every step of most programs
def _plates(stack: tuple[tuple, ...]) -> frozenset[Frame]:
    return frozenset(Frame(name, dim, size) for name, dim, size, *_ in stack if dim is not None)

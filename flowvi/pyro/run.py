"""Running a Pyro program: from guide and model to the records of :mod:`flowvi.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment
from flowvi.dependence import Frame, Graph
from flowvi.estimators import Estimator
from flowvi.marginal import with_marginals
from flowvi.particles import Particles, are_together
from flowvi.pyro.distributions import PyroTarget, unwrap
from flowvi.pyro.generators import forked_generators, generator_states, restore_generators, uniforms
from flowvi.pyro.handlers import attach_estimators, attach_together, hold_values, replay_and_read
from flowvi.pyro.marginal import contraction, factors_of, marginalised_sites
from flowvi.pyro.provenance import following, mark_statements, provenance, track_provenance
from flowvi.refusals import refusal
from flowvi.run import Replacement, Run, Statement
from flowvi.sites import GuideSites, weight_of_density


@dataclass
class PyroProgram:
    """See :class:`flowvi.run.Program`.

    Attributes:
        model: The model.
        guide: The guide.
        args: Passed to both.
        kwargs: Passed to both.
        elbo: The objective, for its ``max_plate_nesting``.
        follows_tensors: Whether to record, while the program runs, from which draws each tensor is computed.
        particles: How particles that are a plate are drawn.
        traces: The traces of the first run, of the model and of the guide.
        start: The states of torch's generators at the start of that run; empty if the program need not run again.
        branches: Whether Python has read a draw in that run; True if tensors are not followed.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    elbo: ELBO
    follows_tensors: bool = False
    particles: Particles = "independent"
    traces: tuple[Any, Any] = field(default=(), repr=False)  # type: ignore[assignment]
    start: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    branches: bool = True
    _graph: Graph | None = field(default=None, repr=False)
    _ancestors: dict[str, frozenset[str]] | None = field(default=None, repr=False)

    def run(self, sites: GuideSites, values: Mapping[str, Any] | None = None, *, with_model: bool = True) -> Run:
        if values is not None:
            return self._run(sites, hold_values({**_subsamples(self.traces), **values}), with_model)
        assignment = sites.assignment
        self._begin(assignment)
        run = self._followed(sites) if self.follows_tensors else self._run(sites)
        compares = any(d.comparison is not None or (d.instead is not None and not self.branches) for d in run.draws.values())
        if compares or assignment.compares is None:
            assignment.compares = compares
        return self.run(sites.fresh()) if compares and not self.start else run

    def _followed(self, sites: GuideSites) -> Run:
        """A run in which the graph is recorded."""
        with track_provenance() as tracker, mark_statements(tracker):
            run = self._run(sites)
            self._graph = _graph(*self.traces)
            self.branches = bool(tracker.branched)
        return run

    def annotations(self) -> dict[str, Estimator]:
        return self._traces(nullcontext(), nullcontext())[2]

    @property
    def takes_gradients(self) -> bool:
        return torch.is_grad_enabled()

    def uniforms(self, run: Run, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return uniforms(self.start, name, shape, run.guide[name].value)

    def variants(
        self, run: Run, replacements: Mapping[str, Replacement], num_runs: int, reduce: Callable[[Run], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        follows = self.follows_tensors and self.branches  # else the graph of the first run holds in the others
        known = {**_subsamples(self.traces[1:]), **{name: run.guide[name].value for name in run.sites.random}}
        for name in run.sites.random:
            PyroTarget(name, run.guide[name].fn, True).require_inverse("the density of another run, which another estimator compares,")

        def one(i: int) -> dict[str, torch.Tensor]:
            changed = {name: r for name, r in replacements.items() if r.covers(i)}
            downstream = frozenset().union(*(r.downstream for r in changed.values()))
            sites = run.sites.fresh()
            sites.replaced = {name: r.values[i - r.first] for name, r in changed.items()}
            sites.held = {name: (value, run.draws.get(name)) for name, value in known.items() if name not in downstream}
            return reduce(replace(self, follows_tensors=follows).run(sites))

        reduced = []
        with forked_generators():
            for i in range(num_runs):
                try:
                    with torch.no_grad():
                        reduced.append(one(i))
                except RuntimeError as error:
                    if "does not require grad" not in str(error):
                        raise
                    reduced.append(one(i))  # the program takes a derivative itself
        return {name: torch.stack([of_one[name] for of_one in reduced]).detach() for name in reduced[0]}

    def graph(self, run: Run, scored: frozenset[str]) -> Graph:
        assert self._graph is not None
        if not self.follows_tensors:  # a run with another value of a site, for which the graph of the first run has to do
            for statements, known in zip((run.guide, run.model), self._graph, strict=False):
                if new := [name for name in statements if name not in known]:
                    raise refusal(
                        new[0],
                        "expected the statements of the first run in one with another value of a site, as Python looks at no draw; "
                        "found a new one. Let a draw decide what the program runs, or use LR().",
                    )
        return self._graph

    def ancestors(self, sites: GuideSites) -> Mapping[str, frozenset[str]]:
        with forked_generators():
            followed = replace(self)
            if self.start:
                restore_generators(self.start)
            followed._followed(sites)
        assert followed._graph is not None
        return followed._graph.draws

    def ancestors_again(self, sites: GuideSites) -> Mapping[str, frozenset[str]] | None:
        return self._graph.draws if self.follows_tensors and self._graph is not None else self._ancestors

    def _begin(self, assignment: Assignment) -> None:
        """Let a second run repeat the draws of the first one, unless Pyro has to guess ``max_plate_nesting`` first, which draws too."""
        if self.start:
            restore_generators(self.start)
        if assignment.marginalises and not self._is_messenger and self.elbo.max_plate_nesting == float("inf"):
            self.elbo._guess_max_plate_nesting(self.model, self.guide, self.args, self.kwargs)
            self.start = ()
        if not self.start and (assignment.compares is not False or assignment.may_change):  # the copy takes time
            self.start = generator_states()

    def _run(self, sites: GuideSites, held: hold_values | None = None, with_model: bool = True) -> Run:
        attached: Any = attach_together(sites, self.particles) if are_together(self.particles) else attach_estimators(sites)
        enumerates = sites.assignment.marginalises and not self._is_messenger
        validate = is_validation_enabled()
        follows = validate and sites.assignment.couplings is not None and not self.follows_tensors
        if not sites.assignment.has_read_annotations:
            attached = with_derivatives(attached)
        model, guide, annotations = self._traces(
            following(attached) if follows else attached, held or nullcontext(), with_model, enumerates
        )
        if held is None:
            self.traces = model, guide
        if follows:
            self._ancestors = {name: provenance(site["value"]) | site["branched"] for name, site in _sites(guide).items()}
        of_model, of_guide = _sites(model), _sites(guide)
        if validate and with_model and (enumerates or not _asks_to_sum_out(of_model, of_guide)):
            check_model_guide_match(model, guide, self.elbo.max_plate_nesting)
        # a GuideMessenger also runs the model; the model's factors do not belong to the guide
        sites.draws = {name: draw for name, draw in sites.draws.items() if name in guide.nodes}
        for name, log_prob in sites.log_probs.items():
            if name in guide.nodes:
                site = guide.nodes[name]
                site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
        for trace, statements in ((model, of_model), (guide, of_guide)):
            trace.compute_log_prob(lambda name, _, statements=statements: name in statements)
            if validate:
                for site in statements.values():
                    check_site_shape(site, self.elbo.max_plate_nesting)
        for name in sites.biased:
            _add_path(name, of_model)
            _add_path(name, of_guide)
        subsampled: dict[str, float] = {}
        statements = _statements(of_model, subsampled)
        marginalised = marginalised_sites(of_model, of_guide) if enumerates else ()
        if marginalised:
            factors = factors_of(model, of_model, marginalised)
            _require_paths(sites, of_model, [factor.name for factor in factors])
            statements = with_marginals(ops, statements, marginalised, factors, contraction(model))
        return Run(self, _statements(of_guide), statements, sites, annotations, subsampled, marginalised=marginalised)

    @property
    def _is_messenger(self) -> bool:
        return isinstance(poutine.unwrap(self.guide), Messenger)

    def _traces(
        self, attached: AbstractContextManager, held: AbstractContextManager, with_model: bool = True, enumerates: bool = False
    ):
        """Run the guide, and the model replayed against it. Returns their traces, and the annotations of the model.

        Args:
            attached: The handler around the guide.
            held: The handler around both, which acts first.
            with_model: Whether to run the model.
            enumerates: Whether to enumerate the sites that the model asks Pyro to sum out.
        """
        messenger = poutine.unwrap(self.guide)
        if isinstance(messenger, Messenger):  # a GuideMessenger runs both itself
            with attached, held:
                self.guide(*self.args, **self.kwargs)
            model, guide = messenger.get_traces()  # type: ignore[attr-defined]
            nodes = messenger.trace.nodes  # type: ignore[attr-defined]
            for name in _subsamples([messenger.trace]):  # type: ignore[attr-defined]
                model.nodes[name] = guide.nodes[name] = nodes[name]  # get_traces leaves them out
            return model if with_model else poutine.Trace(), guide, {}
        with attached, held:
            guide = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
        if not with_model:
            return poutine.Trace(), guide, {}
        replay = replay_and_read(guide)
        program = EnumMessenger(-1 - self.elbo.max_plate_nesting)(self.model) if enumerates else self.model
        with held:
            model = poutine.trace(replay(program)).get_trace(*self.args, **self.kwargs)
        return model, guide, replay.annotations


def programs(
    elbo: ELBO, model, guide, args, kwargs, *, follows_tensors: bool = False, particles: Particles = "independent"
) -> Iterator[PyroProgram]:
    """The programs of an objective: one for each particle, or one in which the particles are a plate."""
    if not elbo.vectorize_particles:
        for _ in range(elbo.num_particles):
            yield PyroProgram(model, guide, args, kwargs, elbo, follows_tensors)
        return
    if elbo.max_plate_nesting == float("inf"):
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)
    model, guide = (elbo._vectorized_num_particles(program) for program in (model, guide))
    yield PyroProgram(model, guide, args, kwargs, elbo, follows_tensors, particles)


@contextmanager
def with_derivatives(inner: AbstractContextManager) -> Iterator[None]:
    """Record derivatives in the first run of a guide, by which sites find which parameters have a row for each of their elements."""
    with torch.enable_grad(), inner:
        yield


def _asks_to_sum_out(model: dict[str, Any], guide: dict[str, Any]) -> bool:
    return any(site["infer"].get("enumerate") and not site["is_observed"] and name not in guide for name, site in model.items())


def _add_path(name: str, sites: dict[str, Any]) -> None:
    """Make the log density of a one-hot value differentiable in the value: Pyro reads it as an index, which has no derivative."""
    site = sites.get(name)
    if site is None or not isinstance((p := unwrap(site["fn"])), torch.distributions.OneHotCategorical):
        return
    target, x = PyroTarget(name, site["fn"], False), site["value"]
    weight = target.with_learned({}, {}, weight_of_density(site)).own_density_at(ops, x)
    site["log_prob"] = site["log_prob"] + target.to_batch((weight * ops.tether(x) * p.logits.detach()).sum(-1))
    site.pop("log_prob_sum", None)


def _require_paths(sites: GuideSites, model: dict[str, Any], summed: Iterable[str]) -> None:
    """Refuse to sum out a density that needs :func:`_add_path`."""
    for name in summed:
        one_hot = isinstance(unwrap(model[name]["fn"]), torch.distributions.OneHotCategorical)
        if name in sites.draws and sites.random[name].estimator.biased and one_hot:
            raise refusal(
                name,
                f"expected no {sites.random[name].estimator} at a one-hot value whose density in the model depends on a "
                "site that is summed out; use LR() or Enumerate().",
            )


def _subsamples(traces: Iterable[Any]) -> dict[str, Any]:
    """The subsamples that were drawn."""
    return {
        name: site["value"]
        for trace in traces
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
    }


def _sites(trace) -> dict[str, Any]:
    """The sample and factor statements of a trace."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def _statements(sites: dict[str, Any], subsampled: dict[str, float] | None = None) -> dict[str, Statement]:
    """The records of the statements of a guide, or of a model, whose subsampled plates are added to ``subsampled``.

    The sums of the guide's log densities are left out, as in Pyro's own ELBO: Pyro validates their derivatives with hooks, which must
    not run.
    """
    found = {}
    for name, site in sites.items():
        frames, ratios, steps = _plates(tuple(map(tuple, site["cond_indep_stack"])))
        if ratios and subsampled is not None:
            subsampled.update(ratios)
        found[name] = Statement(
            name,
            frames,
            site["log_prob"],
            site["fn"],
            site["value"],
            site["is_observed"],
            site["scale"],
            site["mask"],
            infer=site["infer"],
            total=None if subsampled is None else site.get("log_prob_sum"),
            steps=steps,
        )
    return found


@lru_cache(maxsize=1024)  # the same at every step of most programs
def _plates(stack: tuple[tuple, ...]) -> tuple[frozenset[Frame], dict[str, float], frozenset[tuple[str, int]]]:
    """The plates of a statement that are dims; for subsampled plates, the size over that of the subsample; and the iterations."""
    frames = frozenset(Frame(name, dim, size) for name, dim, size, *_ in stack if dim is not None)
    ratios = {name: full / size for name, _, size, _, full in stack if full is not None and full > size}
    return frames, ratios, frozenset((name, counter) for name, dim, _, counter, _ in stack if dim is None)


def _graph(model, guide) -> Graph:
    """The graph, from the tags of a run under :class:`track_provenance`."""
    of_model, of_guide = (
        {name: provenance((site["log_prob"], site["value"])) | site["branched"] for name, site in _sites(trace).items()}
        for trace in (model, guide)
    )
    return Graph(of_guide, of_model, {name: names | {name} for name, names in of_guide.items()})

"""One run of guide and model in NumPyro: their traces, log densities and draws, as the tape of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jax.lax import stop_gradient
from numpyro.distributions import kl_divergence
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, seed, substitute
from numpyro.infer.util import compute_log_probs
from numpyro.ops.provenance import eval_provenance
from numpyro.util import _validate_model, check_model_guide_match

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment
from flowvi.numpyro.distributions import NumPyroTarget, masks
from flowvi.numpyro.handlers import attach_estimators, mark_draws, read_annotations
from flowvi.objectives import Dependencies, Entropy, require_one_order
from flowvi.tape import Ancestors, Frame, Route, Site, Tape, Term, control_terms, meet, program_order, weighty


class Program(NamedTuple):
    """What an objective is asked to run."""

    rng_key: jax.Array
    param_map: dict[str, jax.Array]
    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]


def run_program(program: Program, assignment: Assignment, multi_sample: bool = False, entropy: Entropy = "full") -> Run:
    """Run guide and model, again where the model turns out to annotate sites for which the guide did not know it."""
    assignment.forget(lambda value: isinstance(value, jax.core.Tracer))  # of a trace that is over
    try:
        result = Run(program, assignment, multi_sample, entropy)
    except ValueError:  # perhaps for want of an annotation: read them in a run where every site is plain
        plain = Run(program, None, multi_sample, entropy)
        if not assignment.learn(plain.annotations):
            raise
        result = Run(program, assignment, multi_sample, entropy)
    if assignment.learn(result.annotations):
        result = Run(program, assignment, multi_sample, entropy)
    assignment.verify({name: name for name in result.attached.random}, result.attached.fixed)
    return result


def require_known(attached: attach_estimators, param_map: Mapping[str, Any]) -> None:
    """Refuse to go on where an optimizer has parameters, but not those that an estimator learns."""
    if param_map and (unknown := [name for name in attached.learned if name not in param_map]):
        site = attached.learned[unknown[0]]
        raise ValueError(
            f"site '{site}': {attached.random[site].estimator} learns the parameter '{unknown[0]}', but SVI does not know it; pass SVI "
            "the guide flowvi.numpyro.adaptive(guide, elbo), and say the estimator in the objective or in the guide."
        )


class Run:
    """One run of guide and model: their traces, log densities and draws."""

    def __init__(self, program: Program, assignment: Assignment | None, multi_sample: bool, entropy: Entropy):
        self.program, self._multi_sample = program, multi_sample
        self._closed_forms: list[str] = []
        self._model_seed, self._guide_seed = random.split(program.rng_key)
        _, param_map, model, guide, args, kwargs = program
        seeded = seed(guide, self._guide_seed)
        self.attached = attach_estimators(seeded, assignment, entropy) if assignment is not None else seeded
        self.guide_log_probs, self.guide_trace = compute_log_probs(self.attached, args, kwargs, param_map, sum_log_prob=False)
        if assignment is not None:  # so that one derivative is taken of what NumPyro has computed again
            for name, log_prob in self.attached.log_probs.items():
                self.guide_log_probs[name] = scale_and_mask(log_prob, scale=self.guide_trace[name]["scale"])
        self.mutable_state = _values(self.guide_trace, "mutable")
        reader = read_annotations(model)
        if multi_sample:
            self.model_log_probs, self.model_trace = self._map_model(reader)
        else:
            self.model_log_probs, self.model_trace = self._replay_model(reader, self.guide_trace)
            check_model_guide_match(self.model_trace, self.guide_trace)
            _validate_model(self.model_trace, plate_warning="loose")
            self.mutable_state |= _values(self.model_trace, "mutable")
        self.annotations = reader.annotations

    def use_closed_forms(self):
        """Replace, at each site for which NumPyro knows it, the two log densities by minus their divergence in closed form.

        Raises:
            ValueError: Where model and guide have latent sites in different orders, so that the divergence may depend on what is drawn
                from the site.
        """
        require_one_order(_latent(self.guide_trace), _latent(self.model_trace))
        for name in self.attached.random:
            guide_site, model_site = self.guide_trace[name], self.model_trace.get(name)
            if model_site is None or guide_site.get("_control_flow_done") or not _same_weights(guide_site, model_site):
                continue
            try:
                self.model_log_probs[name] = _closed_form(guide_site, model_site)
            except NotImplementedError:
                continue
            del self.guide_log_probs[name]
            self._closed_forms.append(name)

    def require_still_supports(self, what: str):
        """Refuse ``what``, which drops the guide's scores, where the support of a random site moves."""
        for name in self.attached.random:
            NumPyroTarget(name, self.guide_trace[name]["fn"], enters=False).require_still_support(what)

    def stick_the_landing(self):
        """Take out of the guide's densities what their parameters contribute at values, and parents, that stay where they are."""
        log_probs, _ = self.still_guide
        for name in self.attached.random:
            self.guide_log_probs[name] = self.guide_log_probs[name] - ops.tether(log_probs[name])

    def still_terms(self) -> list[Term]:
        """The costs at values that stay where they are, less the densities of the random sites: what parameters do by themselves."""
        guide_log_probs, guide_trace = self.still_guide
        model_log_probs, model_trace = self._replay_model(self.program.model, guide_trace)
        fixed = {name: log_prob for name, log_prob in guide_log_probs.items() if name not in self.attached.random}
        return _terms(1, model_log_probs, model_trace) + _terms(-1, fixed, guide_trace)

    @cached_property
    def still_guide(self):
        """Log densities and trace of one more run of the guide, at the detached values of its random sites."""
        values = {name: stop_gradient(self.guide_trace[name]["value"]) for name in self.attached.random}
        _, param_map, _, guide, args, kwargs = self.program
        return compute_log_probs(substitute(seed(guide, self._guide_seed), data=values), args, kwargs, param_map, sum_log_prob=False)

    def _replay_model(self, model, guide_trace):
        params = {**self.program.param_map, **_values(guide_trace, "mutable")}
        replayed = replay(seed(model, self._model_seed), guide_trace)
        return compute_log_probs(replayed, self.program.args, self.program.kwargs, params, sum_log_prob=False)

    def _map_model(self, model):
        """Log densities of the model at each sample of a multi-sample guide, along a leading dim."""
        traces = []
        params = {**self.program.param_map, **self.mutable_state}
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
                log_probs, trace = compute_log_probs(model, self.program.args, self.program.kwargs, params, sum_log_prob=False)
            _validate_model(trace, plate_warning="loose")
            traces.append(trace)
            return log_probs

        return jax.vmap(log_probs)(random.split(self._model_seed, samples[0]), latents), traces[0]

    def costs(self, sum_sites: bool) -> jax.Array | dict[str, jax.Array]:
        """The costs where nothing is attached to any site: those of the host's own ELBO, in the host's own arithmetic."""
        zero = jnp.array(0.0)
        costs = {
            name: self.model_log_probs.get(name, zero).sum() - self.guide_log_probs.get(name, zero).sum()
            for name in {**self.model_log_probs, **self.guide_log_probs}
        }
        return sum(costs.values(), start=zero) if sum_sites else costs

    def tape(self, dependencies: Dependencies) -> Tape:
        """The run's records."""
        trace, draws = self.guide_trace, weighty(self.attached.draws)
        drawn = _latent(trace)
        (guide, guide_scans), (model, model_scans) = _statements(trace), _statements(self.model_trace)
        of_guide, of_model = program_order(guide, model, frozenset(drawn), guide_scans, model_scans)
        of_site = {name: of_guide[name] for name in drawn}
        for name in self._closed_forms:  # its expectation over the site itself is taken
            of_model = {**of_model, name: (of_model[name] | of_guide[name]) - {name}}
        if dependencies == "graph" and draws and not self._multi_sample:
            of_guide, of_model, of_site = self._graph(frozenset(draws), drawn, of_guide, of_model)
        routes = _routes(trace, drawn, of_site)
        met = partial(meet, draws=routes, scored=frozenset(draws))
        site_ancestors = met(routes)
        model_ancestors = met(_routes(self.model_trace, self.model_log_probs, of_model))
        guide_ancestors = met(_routes(trace, self.guide_log_probs, of_guide))
        sites = [Site(name, frames, draws[name], site_ancestors[name]) for name, frames, _ in routes if name in draws]
        return Tape(self.terms(model_ancestors, guide_ancestors), sites)

    def _graph(self, scored: frozenset[str], drawn: list[str], *ordered):
        """Ancestors of the guide's costs, the model's costs and the draws: which draws a jaxpr of one more run leads from.

        A draw inside scan or cond cannot be marked there, so that for these the order of statements counts.
        """
        _, param_map, model, guide, args, kwargs = self.program

        def log_probs(**marks):
            marked = mark_draws(seed(guide, self._guide_seed), marks, scored)
            of_guide, trace = compute_log_probs(marked, args, kwargs, param_map, sum_log_prob=False)
            of_model, model_trace = self._replay_model(model, trace)
            of_model |= {name: _closed_form(trace[name], model_trace[name]) for name in self._closed_forms}
            return of_guide, of_model, {name: trace[name]["value"] for name in marks}

        of_guide, of_model, of_site = eval_provenance(log_probs, **dict.fromkeys(drawn, jnp.zeros(())))
        inside = {name for name in drawn if self.guide_trace[name].get("_control_flow_done")}
        for graph, order in zip((of_guide, of_model, of_site), (*ordered, ordered[0]), strict=True):
            for name in graph:
                reached = order[name] & inside
                graph[name] = graph[name].union(reached, *(of_site[site] for site in reached))
        return of_guide, of_model, of_site

    def terms(self, of_model: Ancestors = None, of_guide: Ancestors = None) -> list[Term]:
        """The costs, with the ancestors of each."""
        return [
            *_terms(1, self.model_log_probs, self.model_trace, of_model),
            *_terms(-1, self.guide_log_probs, self.guide_trace, of_guide),
            *control_terms(self.attached.draws),
        ]

    def subsampled(self) -> dict[str, float]:
        """The plates that are subsampled, each with its size over that of the subsample."""
        plates = {name: site["args"] for name, site in self.model_trace.items() if site["type"] == "plate"}
        return {name: size / subsample for name, (size, subsample) in plates.items() if subsample and size > subsample}


def _terms(sign: Literal[1, -1], log_probs: dict[str, jax.Array], trace, ancestors: Ancestors = None) -> list[Term]:
    of = ancestors or {}
    return [Term(name, _frames(trace[name]), sign, log_prob, of.get(name, frozenset())) for name, log_prob in log_probs.items()]


def _routes(trace, names: Iterable[str], ancestors: dict[str, frozenset[str]]) -> tuple[Route, ...]:
    return tuple(Route(name, _frames(trace[name]), ancestors[name]) for name in names)


def _latent(trace) -> list[str]:
    return [name for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]


def _same_weights(guide_site, model_site) -> bool:
    """Whether the two log densities are known to count alike; a divergence in closed form has one scale and one mask."""
    one, other = (1.0 if site["scale"] is None else site["scale"] for site in (guide_site, model_site))
    same = one is other or (isinstance(one, int | float) and isinstance(other, int | float) and one == other)
    return same and list(map(id, masks(guide_site["fn"]))) == list(map(id, masks(model_site["fn"])))


def _closed_form(guide_site, model_site) -> jax.Array:
    return -scale_and_mask(kl_divergence(guide_site["fn"], model_site["fn"]), scale=guide_site["scale"])


def _values(trace, kind: str) -> dict:
    return {name: site["value"] for name, site in trace.items() if site["type"] == kind}


def _statements(trace) -> tuple[tuple[str, ...], frozenset[str]]:
    """The sample statements, and those of them that came out of scan or cond, where they may depend on each other."""
    statements = {name: site for name, site in trace.items() if site["type"] == "sample"}
    return tuple(statements), frozenset(name for name, site in statements.items() if site.get("_control_flow_done"))


def _frames(site) -> frozenset[Frame]:
    return frozenset(Frame(*frame) for frame in site["cond_indep_stack"])

"""Running a NumPyro program: from guide and model to the records of :mod:`flowvi.run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, seed, substitute
from numpyro.infer.util import compute_log_probs
from numpyro.ops.provenance import eval_provenance
from numpyro.util import _validate_model, check_model_guide_match

from flowvi.assignment import Assignment
from flowvi.dependence import Frame, Graph
from flowvi.estimators import Estimator
from flowvi.numpyro.handlers import attach_estimators, mark_draws, read_annotations
from flowvi.run import Run, Statement, run
from flowvi.sites import Entropy, GuideSites


@dataclass(frozen=True)
class NumPyroProgram:
    """See :class:`flowvi.run.Program`; the random key makes every run draw the same numbers."""

    rng_key: jax.Array
    param_map: dict[str, jax.Array]
    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    multi_sample: bool = False

    def run(self, sites: GuideSites, values: Mapping[str, Any] | None = None, *, with_model: bool = True) -> Run:
        guide = self._seeded_guide()
        if values:
            guide = substitute(guide, data=dict(values))
        log_probs, trace = self._log_probs(attach_estimators(guide, sites), self.param_map)
        for name, log_prob in sites.log_probs.items():  # so that one derivative is taken of what NumPyro has computed again
            log_probs[name] = scale_and_mask(log_prob, scale=trace[name]["scale"])
        statements, mutable_state = _statements(trace, log_probs), _values(trace, "mutable")
        if not with_model:
            return Run(self, statements, {}, sites)
        model = read_annotations(self.model)
        if self.multi_sample:
            model_log_probs, model_trace = self._map_model(model, trace, mutable_state)
        else:
            model_log_probs, model_trace = self._replay_model(model, trace)
            check_model_guide_match(model_trace, trace)
            _validate_model(model_trace, plate_warning="loose")
            mutable_state |= _values(model_trace, "mutable")
        plates = {name: site["args"] for name, site in model_trace.items() if site["type"] == "plate"}
        subsampled = {name: size / subsample for name, (size, subsample) in plates.items() if subsample and size > subsample}
        of_model = _statements(model_trace, model_log_probs)
        return Run(self, statements, of_model, sites, model.annotations, subsampled, mutable_state, many_samples=self.multi_sample)

    def annotations(self) -> dict[str, Estimator]:
        _, trace = self._log_probs(self._seeded_guide(), self.param_map)
        model = read_annotations(self.model)
        self._replay_model(model, trace)
        return model.annotations

    def graph(self, run: Run, scored: frozenset[str]) -> Graph:
        """Which draws a jaxpr of one more run leads from."""
        drawn = [name for name, statement in run.guide.items() if not statement.observed]

        def log_probs(**marks):
            of_guide, trace = self._log_probs(mark_draws(self._seeded_guide(), marks, scored), self.param_map)
            of_model, _ = self._replay_model(self.model, trace)
            return of_guide, of_model, {name: trace[name]["value"] for name in marks}

        return Graph(*eval_provenance(log_probs, **dict.fromkeys(drawn, jnp.zeros(()))))

    def _seeded_guide(self):
        return seed(self.guide, random.split(self.rng_key)[1])

    def _log_probs(self, program, params):
        return compute_log_probs(program, self.args, self.kwargs, params, sum_log_prob=False)

    def _replay_model(self, model, guide_trace):
        replayed = replay(seed(model, random.split(self.rng_key)[0]), guide_trace)
        return self._log_probs(replayed, {**self.param_map, **_values(guide_trace, "mutable")})

    def _map_model(self, model, guide_trace, mutable_state):
        """Log densities of the model at each sample of a multi-sample guide, along a leading dim."""
        traces = []
        plates = _values(guide_trace, "plate")
        latents = {
            name: site["value"]
            for name, site in guide_trace.items()
            if (site["type"] == "sample" and site["value"].size > 0) or site["type"] == "deterministic"
        }
        samples = [site["value"].shape[0] for site in guide_trace.values() if site["type"] == "sample"]
        if not samples:
            raise ValueError("guide is missing `sample` sites.")

        def log_probs(key, latents):
            with seed(rng_seed=key), substitute(data={**latents, **plates}):
                log_probs, trace = self._log_probs(model, {**self.param_map, **mutable_state})
            _validate_model(trace, plate_warning="loose")
            traces.append(trace)
            return log_probs

        return jax.vmap(log_probs)(random.split(random.split(self.rng_key)[0], samples[0]), latents), traces[0]


def run_program(program: NumPyroProgram, assignment: Assignment, entropy: Entropy = "full") -> Run:
    """Run a program, its sites with the estimators of an assignment."""
    assignment.forget(lambda value: isinstance(value, jax.core.Tracer))  # of a trace that is over
    return run(program, GuideSites(assignment, entropy))


def _statements(trace, log_probs: dict[str, jax.Array]) -> dict[str, Statement]:
    return {
        name: Statement(
            name,
            frozenset(Frame(*frame) for frame in site["cond_indep_stack"]),
            log_probs[name],
            site["fn"],
            site["value"],
            site["is_observed"],
            site["scale"],
            in_control_flow=bool(site.get("_control_flow_done")),
        )
        for name, site in trace.items()
        if site["type"] == "sample"
    }


def _values(trace, kind: str) -> dict:
    return {name: site["value"] for name, site in trace.items() if site["type"] == kind}


def require_known(sites: GuideSites, param_map: Mapping[str, Any]) -> None:
    """Refuse to go on where an optimizer has parameters, but not those that an estimator learns."""
    if param_map and (unknown := [name for name in sites.learned if name not in param_map]):
        site = sites.learned[unknown[0]]
        raise ValueError(
            f"site '{site}': {sites.random[site].estimator} learns the parameter '{unknown[0]}', but SVI does not know it; pass SVI "
            "the guide flowvi.numpyro.adaptive(guide, elbo), and give the estimator in the objective or in the guide."
        )

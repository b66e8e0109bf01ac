"""Running a NumPyro program: from guide and model to the records of :mod:`flowvi.run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.lax import stop_gradient
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import compute_log_probs
from numpyro.ops.provenance import eval_provenance
from numpyro.util import _validate_model, check_model_guide_match

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment
from flowvi.dependence import Frame, Graph
from flowvi.estimators import Estimator
from flowvi.marginal import require_number, with_marginals
from flowvi.numpyro.distributions import NumPyroTarget, attaching
from flowvi.numpyro.handlers import attach_estimators, hidden, mark_draws, mark_every_draw, own_keys, read_annotations, seeded
from flowvi.numpyro.influence import Axes, by_element, influenced
from flowvi.numpyro.marginal import (
    contract,
    enumerated_trace,
    factors_of,
    funsor_with_jax,
    is_enumerated,
    log_density_of,
    require_funsor,
    unshifted,
)
from flowvi.numpyro.particles import Together
from flowvi.numpyro.scans import hold, is_reversed, is_without_history, mark_scans, replay_guide
from flowvi.numpyro.threefry import split, unrolled
from flowvi.refusals import LEARNED, SUMMED_OUT, refusal
from flowvi.run import Replacement, Run, Statement, require_summable, run, sites_to_sum_out
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
    together: Together | None = None
    _moving: dict[bool, dict[tuple[str, bool], list[bool]]] = field(default_factory=dict, init=False, repr=False)
    _own_rows: dict[str, Axes] = field(default_factory=dict, init=False, repr=False)

    def run(self, sites: GuideSites, values: Mapping[str, Any] | None = None, *, with_model: bool = True) -> Run:
        guide = self._seeded_guide()
        if values:
            guide = hold(guide, values, reverse=values)
        guide = attach_estimators(guide, sites, self.moving_leaves, self.own_rows, self.together)
        log_probs, guide_trace = self._log_probs(guide, self.param_map)
        _require_names(sites, guide_trace)
        for name, log_prob in sites.log_probs.items():  # NumPyro has computed them too; one derivative is enough
            log_probs[name] = scale_and_mask(log_prob, scale=guide_trace[name]["scale"])
        statements, mutable_state = _statements(guide_trace, log_probs), _values(guide_trace, "mutable")
        if not with_model:
            return Run(self, statements, {}, sites)
        model = read_annotations(self.model)
        if self.multi_sample:
            model_log_probs, model_trace = self._map_model(model, guide_trace, mutable_state)
        else:
            model_log_probs, model_trace = self._replay_model(model, guide_trace)
            if sites.entropy == "analytic":
                _require_one_order(model_trace, guide_trace)
            check_model_guide_match(model_trace, guide_trace)
            _validate_model(model_trace, plate_warning="loose")
            mutable_state |= _values(model_trace, "mutable")
        plates = {name: site["args"] for name, site in model_trace.items() if site["type"] == "plate"}
        subsampled = {name: size / subsample for name, (size, subsample) in plates.items() if subsample and size > subsample}
        of_model, marginalised = _statements(model_trace, model_log_probs), tuple[str, ...]()
        if sites.assignment.marginalises and (names := sites_to_sum_out(statements, of_model)):
            require_summable(of_model, names)
            _require_history(names, model_trace)
            _require_replayed(model_trace, guide_trace)
            self._require_marginals(names[0], mutable_state)
            nesting = max(jnp.ndim(log_prob) for log_prob in (*log_probs.values(), *model_log_probs.values()))
            with funsor_with_jax():
                of_model, marginalised = self._marginalised(guide_trace, nesting)
        return Run(
            self,
            statements,
            of_model,
            sites,
            model.annotations,
            subsampled,
            mutable_state,
            marginalised=marginalised,
            many_samples=self.multi_sample,
        )

    def _marginalised(self, guide_trace, max_plate_nesting: int) -> tuple[dict[str, Statement], tuple[str, ...]]:
        """The statements of the model, and the sites that NumPyro has summed out."""
        guided = {
            name: {**site, "infer": {**site["infer"], "enumerate": None}} for name, site in guide_trace.items() if "infer" in site
        }
        key = split(self.rng_key)[0]
        replayed = own_keys(replay_guide(seed(self.model, unrolled(key)), {**guide_trace, **guided}), key)
        found = enumerated_trace(replayed, self.args, self.kwargs, self.param_map, max_plate_nesting)
        for name, site in found.items():
            _require_no_scope(name)
            _require_indices(name, site)
            if site["scale"] is not None and jnp.ndim(site["scale"]) > max_plate_nesting:  # it depends on an enumerated site
                require_number(unshifted(name), site["scale"])
        names = sorted((name for name, site in found.items() if is_enumerated(site)), key=lambda name: name != unshifted(name))
        unscaled = {name: log_density_of(site) for name, site in found.items()}
        scaled = {name: scale_and_mask(log_prob, scale=found[name]["scale"]) for name, log_prob in unscaled.items()}
        statements = with_marginals(ops, _statements(found, scaled), names, factors_of(found, names, unscaled), contract)
        first_steps = {name: statements[name]._replace(infer={}) for name in found if name != unshifted(name)}
        return statements | first_steps, tuple(dict.fromkeys(map(unshifted, names)))

    def _require_marginals(self, site: str, mutable_state) -> None:
        """Refuse to sum out a site of a program for which this is not possible."""
        require_funsor(site)
        for found, what in ((mutable_state, "mutable state"), (self.multi_sample, "multi_sample_guide=True")):
            if found:
                raise refusal(site, f"expected no {what} if a site of the model is summed out; draw the site in the guide.", SUMMED_OUT)

    def annotations(self) -> dict[str, Estimator]:
        _, guide_trace = self._log_probs(self._seeded_guide(), self.param_map)
        model = read_annotations(self.model)
        self._replay_model(model, guide_trace)
        return model.annotations

    takes_gradients = True
    branches = False  # a tracer decides nothing

    def uniforms(self, run: Run, name: str, shape: tuple[int, ...]) -> jax.Array:
        return random.uniform(random.fold_in(unrolled(self.rng_key), crc32(name.encode())), shape)

    def variants(
        self, run: Run, replacements: Mapping[str, Replacement], num_runs: int, reduce: Callable[[Run], dict[str, jax.Array]]
    ) -> dict[str, jax.Array]:
        detached = replace(self, param_map=stop_gradient(self.param_map))

        def one(values, active):
            sites = run.sites.fresh()
            sites.replaced = {
                name: (value, None if replacement.values.shape[0] == num_runs else active[name])
                for (name, replacement), value in zip(replacements.items(), values, strict=True)
            }
            return reduce(detached.run(sites))

        values = [_in_all_runs(replacement) for replacement in replacements.values()]
        active = {name: jnp.array([r.covers(i) for i in range(num_runs)]) for name, r in replacements.items()}
        return jax.vmap(one)(values, active)

    def graph(self, run: Run, scored: frozenset[str]) -> Graph:
        """See :meth:`flowvi.run.Program.graph`; the graph is read off the jaxpr of another run."""
        drawn = [name for name, statement in run.guide.items() if not statement.observed]

        def log_probs(**marks):
            of_guide, guide_trace = self._log_probs(mark_draws(self._seeded_guide(), marks, scored), self.param_map)
            of_model, _ = self._replay_model(self.model, guide_trace)
            of_model |= {name: of_model[unshifted(name)] for name in run.model if name != unshifted(name)}
            return of_guide, of_model, {name: guide_trace[name]["value"] for name in marks}

        return Graph(*eval_provenance(log_probs, **dict.fromkeys(drawn, jnp.zeros(()))))

    def ancestors(self, sites: GuideSites) -> dict[str, frozenset[str]]:
        run = self.run(sites, with_model=False)
        drawn = [name for name, statement in run.guide.items() if not statement.observed]

        def values(**marks):
            _, guide_trace = self._log_probs(mark_draws(self._seeded_guide(), marks, frozenset()), self.param_map)
            return {name: guide_trace[name]["value"] for name in marks}

        return eval_provenance(values, **dict.fromkeys(drawn, jnp.zeros(())))

    def ancestors_again(self, sites: GuideSites) -> dict[str, frozenset[str]]:
        return self.ancestors(sites.fresh())

    def initial_parameters(self) -> dict[str, jax.Array]:
        """The values of the parameters; the initial ones of those that have no value."""
        _, guide_trace = self._log_probs(self._seeded_guide(), self.param_map)
        _, model_trace = self._replay_model(self.model, guide_trace)
        return _values(guide_trace, "param") | _values(model_trace, "param")

    def moving_leaves(self, name: str, enters: bool, arguments: bool) -> list[bool] | None:
        """For each array of the family of a site, whether a parameter or a draw of the guide influences it.

        Args:
            name: The name of the site.
            enters: Whether its transforms are left out.
            arguments: Whether arguments count as parameters, in which a derivative may be taken. They always do if the program has no
                parameters.

        Returns:
            An answer for each leaf of the family; None for a site that is not in another run of the guide.
        """
        if arguments not in self._moving:
            self._moving[arguments] = self._all_moving_leaves(arguments)
        return self._moving[arguments].get((name, enters)) or None

    def _all_moving_leaves(self, arguments: bool) -> dict[tuple[str, bool], list[bool]]:
        """The answers of :meth:`moving_leaves` for all sites, from one run of the guide."""
        sizes: dict[tuple[str, bool], int] = {}

        def leaves(mark: jax.Array, movers: Any, fixed: Any) -> list[jax.Array]:
            (params, moving_data), (key, fixed_data) = movers, fixed
            args, kwargs = fixed_data if moving_data is None else moving_data
            with hidden(), attaching(None):
                marked = mark_every_draw(replace(self, rng_key=key)._seeded_guide(), mark, params)
                sites = trace(substitute(marked, data=params)).get_trace(*args, **kwargs)
            found = []
            for site in sites.values():
                if site["type"] == "sample" and not site["is_observed"]:
                    for enters in (False, True):
                        of_family = jax.tree.leaves(NumPyroTarget(site["name"], site["fn"], enters).p)
                        sizes[site["name"], enters] = len(of_family)
                        found += of_family
            return found

        data = self.args, self.kwargs
        is_data = bool(self.param_map) and not arguments
        movers, fixed = (self.param_map, None if is_data else data), (self.rng_key, data if is_data else None)
        moves = iter(influenced(leaves, movers, fixed))
        return {site: list(islice(moves, size)) for site, size in sizes.items()}

    def own_rows(self, name: str) -> Axes:
        """The plates of a site, by dim and size, for whose elements a parameter has a row each, on which it depends there alone."""
        if not self._own_rows:
            self._own_rows.update(self._all_own_rows())
        return self._own_rows.get(name, frozenset())

    def _all_own_rows(self) -> dict[str, Axes]:
        """The answers of :meth:`own_rows` for all sites, from two runs of the guide."""

        def sites(params):
            with hidden(), attaching(None):
                return trace(substitute(self._seeded_guide(), data=params)).get_trace(*self.args, **self.kwargs)

        shifts: list[tuple[str, int]] = []  # for each array its site, and what leads from an axis of it to a dim of the site

        def leaves(params):
            found = []
            for site in sites(self.param_map | known | params).values():
                if site["type"] == "sample" and not site["is_observed"]:
                    target = NumPyroTarget(site["name"], site["fn"], True)
                    for leaf in jax.tree.leaves(target.p):
                        found.append(leaf)
                        shifts.append((site["name"], max(0, jnp.ndim(leaf) - len(target.p.batch_shape)) + target.extra_ndim))
            return found

        known = _values(sites(self.param_map), "param")
        params = {name: value for name, value in known.items() if hasattr(value, "shape")}
        rows: dict[str, Axes] = {}
        for axes, (name, shift) in zip(by_element(leaves, params), shifts, strict=True):
            rows[name] = rows.get(name, frozenset()).union((axis + shift, size) for axis, size in axes)
        return rows

    def _seeded_guide(self):
        return mark_scans(seeded(self.guide, split(self.rng_key)[1]))

    def _log_probs(self, program, params):
        params = jax.tree.map(lambda leaf: leaf, params)  # NumPyro before 0.21 changes mutable state in place
        return compute_log_probs(program, self.args, self.kwargs, params, sum_log_prob=False)

    def _replay_model(self, model, guide_trace):
        key = split(self.rng_key)[0]
        replayed = replay_guide(seed(model, unrolled(key)), guide_trace)
        replayed = own_keys(replayed, key)  # last, so that it acts only where the model draws
        return self._log_probs(replayed, {**self.param_map, **_values(guide_trace, "mutable")})

    def _map_model(self, model, guide_trace, mutable_state):
        """Log densities of the model at each sample of a multi-sample guide; the samples are a leading dim."""
        traces = []
        plates = _values(guide_trace, "plate")
        latents = {
            name: site["value"]
            for name, site in guide_trace.items()
            if (site["type"] == "sample" and site["value"].size > 0) or site["type"] == "deterministic"
        }
        reverse = {name for name, site in guide_trace.items() if is_reversed(site)}
        samples = [site["value"].shape[0] for site in guide_trace.values() if site["type"] == "sample"]
        if not samples:
            raise ValueError(
                "multi_sample_guide=True: expected a guide with sample statements, whose values have a leading dim of samples, found "
                "none; add one, or remove multi_sample_guide."
            )

        def log_probs(key, latents):
            with own_keys(None, key), seed(rng_seed=unrolled(key)), hold(data={**latents, **plates}, reverse=reverse):
                log_probs, model_trace = self._log_probs(model, {**self.param_map, **mutable_state})
            _validate_model(model_trace, plate_warning="loose")
            traces.append(model_trace)
            return log_probs

        return jax.vmap(log_probs)(split(split(self.rng_key)[0], samples[0]), latents), traces[0]


def run_program(program: NumPyroProgram, assignment: Assignment, entropy: Entropy = "full") -> Run:
    """Run a program with the estimators of an assignment."""
    assignment.forget(lambda value: isinstance(value, jax.core.Tracer))  # a tracer of an earlier trace
    return run(program, GuideSites(assignment, entropy))


def of_first_particle(mutable_state: Any) -> Any:
    """The mutable state of the first particle, from the stacked states of all particles."""
    return jax.tree.map(lambda a: a[0], mutable_state)


def _require_one_order(model_trace: Mapping[str, Any], guide_trace: Mapping[str, Any]) -> None:
    """Refuse to pair the steps of model and guide for a closed form if only the model's scan is reverse."""
    if drawn := [
        name for name, site in model_trace.items() if is_reversed(site) and name in guide_trace and not is_reversed(guide_trace[name])
    ]:
        raise refusal(
            drawn[0],
            "entropy='analytic' compares the distributions of guide and model step by step, but the model draws the site inside "
            "scan(..., reverse=True) and the guide does not; use entropy='full', or scan xs[::-1] forward in the model.",
        )


def _require_history(names: list[str], model_trace: Mapping[str, Any]) -> None:
    """Refuse to sum out a site where NumPyro enumerates nothing."""
    for name in names:
        if is_without_history(model_trace[name]):
            raise refusal(
                name,
                "expected scan(..., history=1) or more around a site that is summed out, found history=0, with which NumPyro "
                "enumerates nothing; or draw the site in the guide.",
            )


def _require_replayed(model_trace: Mapping[str, Any], guide_trace: Mapping[str, Any]) -> None:
    """Refuse values of the guide inside ``scan``, which NumPyro ignores when it enumerates."""
    inside = (site for site in model_trace.values() if site["type"] == "sample" and site.get("_control_flow_done"))
    drawn = [s["name"] for s in inside if not s["is_observed"] and s["name"] in guide_trace and not is_without_history(s)]
    if drawn:
        raise refusal(
            drawn[0],
            "expected no site of the guide inside a scan if a site of the model is summed out, because NumPyro ignores the "
            "guide's value there; draw the site outside the scan, write the chain as a loop with markov, or give the scan history=0 "
            "if nothing is summed out inside.",
            SUMMED_OUT,
        )


def _require_no_scope(name: str) -> None:
    """Refuse a ``scope`` around an enumerated scan: it changes the names by which NumPyro knows the first steps."""
    if "_PREV_" in unshifted(name):
        raise refusal(
            name.replace("_PREV_", ""),
            "expected no scope around a scan with a site that is summed out, because NumPyro then does not recognise its first steps; "
            "put the scope into the step, or write the chain as a loop with markov.",
            SUMMED_OUT,
        )


def _require_indices(name: str, site: Mapping[str, Any]) -> None:
    """Refuse a support other than 0, 1, 2, ... inside ``scan``, where NumPyro enumerates the indices of the values."""
    in_scan = site.get("_control_flow_done") or name != unshifted(name)
    lower = getattr(site["fn"].support, "lower_bound", 0)
    if in_scan and is_enumerated(site) and (isinstance(lower, jax.core.Tracer) or np.any(np.asarray(lower) != 0)):
        raise refusal(
            unshifted(name),
            f"expected a support 0, 1, 2, ... inside a scan with a site that is summed out, found the support of "
            f"{type(site['fn']).__name__}, which begins elsewhere; NumPyro enumerates the indices of the values. Use a Categorical.",
            SUMMED_OUT,
        )


def _require_names(sites: GuideSites, guide_trace: Mapping[str, Any]) -> None:
    """Refuse a handler around the objective that renames sites, after their estimators have acted."""
    if renamed := [name for name in sites.random if name not in guide_trace]:
        found = ", ".join(f"'{name}'" for name in guide_trace)
        raise refusal(
            renamed[0],
            f"expected this site in the trace of the guide, found {found}; a handler around the objective, such as "
            "scope, has renamed it; put the handler around the guide and the model.",
        )


def _in_all_runs(replacement: Replacement) -> jax.Array:
    """The values of a site, with a row for each run. Rows of runs in which the site is not replaced do not matter."""
    values, first, num_runs, _ = replacement
    rest = num_runs - first - values.shape[0]
    return jnp.pad(values, [(first, rest), *[(0, 0)] * (values.ndim - 1)], mode="edge")


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
            intermediates=site["intermediates"],
            infer=site["infer"],
        )
        for name, site in trace.items()
        if site["type"] == "sample"
    }


def _values(trace, kind: str) -> dict:
    return {name: site["value"] for name, site in trace.items() if site["type"] == kind}


def require_known(sites: GuideSites, param_map: Mapping[str, Any]) -> None:
    """Refuse a program if the optimizer has parameters, but not those that an estimator learns."""
    if param_map and (unknown := [name for name in sites.learned if name not in param_map]):
        site = sites.learned[unknown[0]]
        raise refusal(
            site,
            f"{sites.random[site].estimator} learns the parameter '{unknown[0]}', but SVI does not know it; pass "
            "flowvi.numpyro.adaptive(guide, elbo) to SVI as the guide, and give the estimator in the objective or in the guide; "
            "or adaptive(guide, elbo, model), if the model annotates estimators.",
            LEARNED,
        )

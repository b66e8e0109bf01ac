"""One run of guide and model as plain records, and running it again with some sites at given values.

An adapter runs a program of its host and records what happens; the core works on these records.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from flowvi.assignment import Assignment, MissingAnnotationError
from flowvi.dependence import Frame, Graph
from flowvi.estimators import Draw, Estimator
from flowvi.learned.coupling import couple, require_independent
from flowvi.ops import Array
from flowvi.refusals import SUMMED_OUT, refusal
from flowvi.sites import GuideSites


class Statement(NamedTuple):
    """One sample or factor statement of a run.

    Attributes:
        name: Its name.
        frames: Its plates.
        log_density: Its log density, scaled and masked, of any batch shape; None if it is part of another statement's.
        fn: The host's distribution.
        value: Its value.
        observed: Whether its value was given: observations and factors.
        scale: The factor of the log density in the host; None for 1.
        mask: The host's mask of the log density, besides the masks of the distribution itself; None for no mask.
        in_control_flow: Whether it is inside a scan or cond, where statements may depend on each other in any order.
        infer: How the program marks it, such as ``{"enumerate": "parallel"}``.
        parts: If some sites have been summed out: the names of the statements whose common log density this is.
        total: The sum of its log density, if the host has computed it.
        intermediates: What the host keeps of its sampler's forward pass.
        steps: The iterations of sequential plates around it, each as the plate's name and the number of the iteration.
    """

    name: str
    frames: frozenset[Frame]
    log_density: Array | None
    fn: Any
    value: Any
    observed: bool
    scale: Any = None
    mask: Any = None
    in_control_flow: bool = False
    infer: Mapping[str, Any] = MappingProxyType({})
    parts: tuple[str, ...] = ()
    total: Array | None = None
    intermediates: Any = None
    steps: frozenset[tuple[str, int]] = frozenset()

    def with_log_density(self, log_density: Array | None) -> Statement:
        """The same statement with another log density."""
        return self._replace(log_density=log_density, total=None)


class Replacement(NamedTuple):
    """Values that a site gets in some of many runs.

    Attributes:
        values: Of the shape of the site's value, with the runs on the left.
        first: The number of the first of these runs.
        num_runs: The total number of runs.
        downstream: The sites of the guide whose values depend on this site, including itself.
    """

    values: Array
    first: int
    num_runs: int
    downstream: frozenset[str]

    def covers(self, i: int) -> bool:
        return self.first <= i < self.first + self.values.shape[0]


class Held(NamedTuple):
    """The value that a site of the guide keeps when the program runs again.

    Attributes:
        value: The value.
        base: Its base sample, if the host cannot compute it from the value (see :mod:`flowvi.flows`).
    """

    value: Array
    base: Array | None = None


class Program(Protocol):
    """A model and a guide with their arguments, which an adapter can run."""

    def run(self, sites: GuideSites, values: Mapping[str, Array] | None = None, *, with_model: bool = True) -> Run:
        """Run the guide, then the model with the guide's values.

        Args:
            sites: Chooses the estimators and collects what they attach.
            values: Values for some sites of the guide, by name. Everything else is drawn with the random numbers of the first run.
            with_model: Whether to run the model.
        """
        ...

    def annotations(self) -> dict[str, Estimator]:
        """The estimators annotated in the model, from a plain run of the host without estimators."""
        ...

    @property
    def takes_gradients(self) -> bool:
        """Whether a derivative may be taken of this run."""
        ...

    @property
    def branches(self) -> bool:
        """Whether draws may decide which statements the program runs."""
        ...

    def uniforms(self, run: Run, name: str, shape: tuple[int, ...]) -> Array:
        """Uniform numbers between 0 and 1 for a site, independent of the program's draws, which they do not change."""
        ...

    def variants(
        self, run: Run, replacements: Mapping[str, Replacement], num_runs: int, reduce: Callable[[Run], dict[str, Array]]
    ) -> dict[str, Array]:
        """``reduce`` of each of ``num_runs`` runs, with the runs on the left of its arrays.

        The draws at the sites of ``replacements`` are replaced. Sites downstream of them are drawn again with the random numbers of the
        first ``run``; all others keep their values. No derivative is taken.
        """
        ...

    def graph(self, run: Run, scored: frozenset[str]) -> Graph:
        """The sites of the guide from which each statement of a ``run`` was computed; only ``scored`` ones matter."""
        ...

    def ancestors(self, sites: GuideSites) -> Mapping[str, frozenset[str]]:
        """For each draw of the guide, the draws from which it was computed, including itself; ``sites`` are for another run."""
        ...

    def ancestors_again(self, sites: GuideSites) -> Mapping[str, frozenset[str]] | None:
        """The same for the run that has filled ``sites``, after an earlier run has found ancestors; None: do not check."""
        ...


@dataclass(frozen=True)
class Run:
    """One run of guide and model.

    Attributes:
        program: The program.
        guide: The statements of the guide by name, in program order.
        model: The statements of the model.
        sites: The random sites of the guide, and what their estimators attached.
        annotations: The estimators annotated in the model.
        subsampled: The subsampled plates, each with its size over that of the subsample.
        mutable_state: What the host keeps between steps besides parameters.
        closed_forms: Sites whose two log densities have been replaced by minus their divergence in closed form.
        held_entropy: Whether the derivative of the guide's log density at fixed values has been subtracted (sticking the landing).
        marginalised: The sites of the model that the host has summed out.
        many_samples: Whether the guide's values have a leading dim of samples over which the model was mapped.
    """

    program: Program
    guide: dict[str, Statement]
    model: dict[str, Statement]
    sites: GuideSites
    annotations: dict[str, Estimator] = field(default_factory=dict)
    subsampled: Mapping[str, float] = field(default_factory=dict)
    mutable_state: Mapping[str, Any] = field(default_factory=dict)
    closed_forms: frozenset[str] = frozenset()
    held_entropy: bool = False
    marginalised: tuple[str, ...] = ()
    many_samples: bool = False

    @property
    def draws(self) -> dict[str, Draw]:
        """The draws of the guide's sites to which something is attached."""
        return self.sites.draws

    @property
    def is_pathwise(self) -> bool:
        """Whether every derivative is that of the host's own samplers; then all orders are right."""
        return not self.draws and not self.held_entropy

    def again(self, held: Mapping[str, Held], *, with_model: bool = True) -> Run:
        """Run guide and model once more, with the same random numbers and with some sites of the guide at given values.

        Args:
            held: The sites by name, each with its value. Draws before them stay as they are; draws that depend on them are made again
                with the random numbers of the first run.
            with_model: Whether the model runs too.
        """
        sites = self.sites.fresh()
        sites.bases = {name: of_site.base for name, of_site in held.items() if of_site.base is not None}
        return self.program.run(sites, {name: of_site.value for name, of_site in held.items()}, with_model=with_model)


def run(program: Program, sites: GuideSites) -> Run:
    """Run a program, and run it again if the model annotates estimators that the guide did not know.

    Args:
        program: The model and the guide.
        sites: Chooses the estimators and collects what they attach.
    """
    assignment: Assignment = sites.assignment
    try:
        result = program.run(sites)
    except MissingAnnotationError as missing:
        if not assignment.remember(program.annotations()):
            raise missing.refusal from None
        result = program.run(sites.fresh())
    if assignment.remember(result.annotations):
        result = program.run(sites.fresh())
    if not assignment.marginalises and (names := sites_to_sum_out(result.guide, result.model)):
        require_summable(result.model, names)
        assignment.marginalises = True
        result = program.run(sites.fresh())
    if couple_sites(program, result.sites):
        result = program.run(sites.fresh())
    observed = {name for name, statement in result.model.items() if statement.observed}
    assignment.verify(result.annotations, result.sites.aliases, result.sites.fixed, observed)
    if assignment.marginalises:
        names = sites_to_sum_out(result.guide, result.model)
        require_summable(result.model, [name for name in names if name not in result.marginalised])
    return result


def couple_sites(program: Program, sites: GuideSites) -> bool:
    """Choose the sites of a control variate for the whole guide, from those of a run; True if they have changed.

    The draws from which a site was computed are found whenever a site, its shape or its plates are new. In other runs they must be the
    same.
    """
    assignment = sites.assignment
    if assignment.control_variate is None:
        return False
    if assignment.couplings and assignment.couplings.blocks == sites.blocks:
        if (ancestors := program.ancestors_again(sites)) is not None:
            require_independent(assignment.couplings, ancestors)
        return False
    assignment.couplings = None
    assignment.couplings = couple(sites.blocks, program.ancestors(sites.fresh()), assignment.control_variate)
    return True


def sites_to_sum_out(guide: Container[str], model: Mapping[str, Statement]) -> list[str]:
    """The sites of the model that it asks the host to sum out: those that are neither observed nor drawn in the guide."""
    return [name for name, s in model.items() if s.infer.get("enumerate") and not s.observed and name not in guide]


def require_summable(model: Mapping[str, Statement], names: Iterable[str]) -> None:
    """Refuse to sum out a site that the host would draw from its prior instead."""
    for name in names:
        fn, infer = model[name].fn, model[name].infer
        found = f"{type(fn).__name__} with infer={ {key: infer[key] for key in ('enumerate', 'num_samples') if infer.get(key)} }"
        if infer["enumerate"] == "parallel" and infer.get("num_samples") is None:
            if not getattr(fn, "has_enumerate_support", False):
                found = f"{type(fn).__name__}, which has none"
            else:
                try:
                    fn.enumerate_support(expand=False)
                except (NotImplementedError, ValueError) as error:
                    found = f"{type(fn).__name__} ({error})"
                else:
                    continue
        raise refusal(
            name,
            f"to be summed out, a site of the model needs a finite support that the host enumerates, "
            f"infer={{'enumerate': 'parallel'}} and no infer['num_samples'], found {found}; or draw the site in the guide.",
            SUMMED_OUT,
        )

"""Which estimator each random site gets: the five places where one can be given, and their precedence."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from copy import copy
from typing import Any, NamedTuple, Self

from flowvi.baselines import Baseline
from flowvi.closures import closed_over, identity
from flowvi.estimators import Enumerate, Estimator
from flowvi.fields.field import name_of
from flowvi.learned.coupling import Couplings, JointKind

Estimators = Mapping[str, Estimator] | Callable[[Any], Estimator | None] | None

ENUMERATED = "infer['enumerate']"  # the source of the estimator at a site that the guide marks for enumeration


class Choice(NamedTuple):
    """An estimator and where it was given."""

    estimator: Estimator
    source: str


class Settled(NamedTuple):
    """A *settled* site: nothing has to be decided there again, as long as its distribution is of the same family.

    Attributes:
        families: The classes of the site's distribution and of those inside it, outermost first.
        alias: The name of the corresponding model site.
        description: Its description.
    """

    families: tuple[type, ...]
    alias: str
    description: SiteDescription


class MissingAnnotationError(Exception):
    """The default estimator was refused at a site before the model was read, which may name another estimator.

    Attributes:
        refusal: The error of the default estimator.
    """

    def __init__(self, refusal: ValueError):
        self.refusal = refusal
        super().__init__(str(refusal))


class Assignment:
    """Chooses the estimator of each random site, from the first of five places that gives one.

    1. the objective's ``estimators``: by name, or a function of the site; 2. ``infer={"estimator": ...}`` at the guide's statement, or
    ``infer={"enumerate": ...}``, for ``Enumerate()``; 3. the wrapper ``Estimated``; 4. ``infer={"estimator": ...}`` at the model's
    statement; 5. the objective's ``default``.

    A name is that of a random site of the guide, or of the corresponding model site.

    Attributes:
        annotations: The estimators annotated in the model at its last run, by name. The guide runs before the model, so these
            come from the previous run; ``remember`` returns whether they have changed since.
        has_read_annotations: Whether a run of the model has been read.
        settled: The sites that have plain ``RP`` by default. The host draws there, and a later run need not decide anything.
        seen: Names of the sites that had an estimator in an earlier run.
        compares: Whether some site has compared the cost at several values, so that the program ran several times; None before the
            first run.
        own_rows: Whether a parameter of the guide has a row for each element of a plate of a site, by the names of site and plate, as
            the first run of Pyro decides.
        may_change: Whether annotations, or the sites of a control variate for the whole guide, may differ from those of the last run. A
            run that finds a difference is repeated with the same random numbers; with others it might take another branch, which would
            be a bias.
        marginalises: Whether the model of an earlier run had a site that the host has to sum out.
        control_variate: The kind of the control variate for the whole guide; None for none.
        couplings: The sites that it covered in an earlier run, and what each of them sees.
    """

    def __init__(self, estimators: Estimators, default: Estimator, control_variate: JointKind | None = None):
        if isinstance(estimators, Mapping):
            for name, estimator in estimators.items():
                require_estimator(estimator, f"estimators[{name!r}]")
        elif estimators is not None and not callable(estimators):
            raise TypeError(f"estimators: expected a mapping from site names or a function of the site, found {estimators!r}.")
        require_estimator(default, "default")
        self.estimators: Estimators = dict(estimators) if isinstance(estimators, Mapping) else estimators
        self.default: Estimator = default
        self.settled: dict[str, Settled] = {}
        self.annotations: dict[str, Estimator] = {}
        self.has_read_annotations: bool = False
        self.seen: set[str] = set()
        self.compares: bool | None = None
        self.own_rows: dict[tuple[str, str], bool] = {}
        self.may_change: bool = control_variate is not None
        self.marginalises: bool = False
        self.control_variate: JointKind | None = control_variate
        self.couplings: Couplings | None = None

    def __copy__(self) -> Assignment:
        """One that knows what this one has learned from earlier runs, and learns from later runs on its own."""
        copied = object.__new__(Assignment)
        vars(copied).update({name: copy(value) if isinstance(value, dict | set) else value for name, value in vars(self).items()})
        return copied

    def choose(self, site: Any, alias: str, wrapped: Estimator | None) -> Choice:
        """The estimator of a random site of the guide.

        Args:
            site: The host's message, a dict with ``"name"`` and ``"infer"``.
            alias: The name of the corresponding model site (usually its own name).
            wrapped: The estimator of an ``Estimated`` wrapper, if there is one.
        """
        name = site["name"]
        if isinstance(self.estimators, Mapping):
            keys = [key for key in dict.fromkeys((name, alias)) if key in self.estimators]
            if len(keys) > 1:
                raise ValueError(f"site '{name}': the keys {keys} of estimators both name this site; keep one of them.")
            if keys:
                return Choice(self.estimators[keys[0]], f"estimators[{keys[0]!r}]")
        elif self.estimators is not None and (estimator := self.estimators(site)) is not None:
            return Choice(require_estimator(estimator, f"site '{name}': estimators(site)"), "estimators(site)")
        if "estimator" in site["infer"]:
            return Choice(require_estimator(site["infer"]["estimator"], f"site '{name}': infer['estimator']"), "guide")
        if site["infer"].get("enumerate"):
            return Choice(_exact_sum(site), ENUMERATED)
        if wrapped is not None:
            return Choice(wrapped, "Estimated")
        if alias in self.annotations:
            return Choice(_require_upstream_inputs(self.annotations[alias], name), "model")
        return Choice(self.default, "default")

    def coupled(self, name: str, estimator: Estimator) -> Estimator:
        """The estimator of a site, with its part of the control variate for the whole guide."""
        return estimator if self.couplings is None else self.couplings.estimators.get(name, estimator)

    def remember(self, annotations: dict[str, Estimator]) -> bool:
        """Store the annotations of a run of the model; True if they have changed, and guide and model have to run again."""
        before, self.annotations, self.has_read_annotations = self.annotations, annotations, True
        if not annotations and not before:
            return False
        changed = {k: identity(v) for k, v in annotations.items()} != {k: identity(v) for k, v in before.items()}
        self.may_change = True
        if changed:
            self.settled.clear()
        return changed

    def forget(self, is_stale: Callable[[Any], bool]) -> None:
        """Drop the annotations of the last run whose functions close over a value that ``is_stale``."""
        kept = {name: e for name, e in self.annotations.items() if not any(map(is_stale, closed_over(e, set())))}
        self.has_read_annotations = self.has_read_annotations and len(kept) == len(self.annotations)
        self.annotations = kept

    def verify(
        self,
        annotations: Mapping[str, Estimator],
        random: Mapping[str, str],
        fixed: Mapping[str, str],
        observed: Container[str] = (),
    ) -> None:
        """Refuse names that belong to no random site.

        A site that is observed in this run, as in a batch with labels, may be random in the next.

        Args:
            annotations: The estimators annotated in the model in this run.
            random: Random sites of the guide, each with its alias.
            fixed: The statements of the guide that are not random choices, each with what it is, such as "observed".
            observed: Names of the model's statements that are observed.
        """
        named = [*annotations, *(self.estimators if isinstance(self.estimators, Mapping) else ())]
        for name in named:
            if name in self.seen or name in random or name in random.values() or name in observed or fixed.get(name) == "observed":
                continue
            where = "infer['estimator'] in the model" if name in annotations else "estimators"
            sites = ", ".join(f"'{site}'" for site in random) or "none"
            if name in fixed:
                raise ValueError(
                    f"site '{name}': {where} names a site that is not a random choice of the guide (it is {fixed[name]}). "
                    f"The random sites are: {sites}; give the estimator to the site from which '{name}' is computed."
                )
            raise ValueError(
                f"site '{name}': {where} names no site of the guide; the random sites are: {sites}. "
                "For a site that only some branches of the guide draw, give a function: estimators=lambda site: ..."
            )


def _exact_sum(site: Any) -> Enumerate:
    """The estimator that ``infer={"enumerate": ...}`` means."""
    if site["infer"].get("num_samples") is not None:
        raise ValueError(
            f"site '{site['name']}': expected infer['enumerate'] without infer['num_samples'], which samples locally, as TraceTMC_ELBO "
            "does; remove it to sum over all values, or give the site an estimator by infer['estimator'] or in the objective."
        )
    return Enumerate()


def require_random(site: Any, wrapped: Estimator | None, what: str) -> None:
    """Refuse an estimator at a statement that is not a random choice."""
    if wrapped is not None or "estimator" in site["infer"]:
        raise ValueError(f"site '{site['name']}': an estimator needs a random choice, but this site is {what}; remove the estimator.")


def require_estimator(estimator: Any, where: str) -> Estimator:
    if not isinstance(estimator, Estimator):
        hint = "; did you mean to call it?" if isinstance(estimator, type) else ""
        raise TypeError(f"{where}: expected an estimator such as flowvi.LR(), found {estimator!r}{hint}")
    return estimator


def _require_upstream_inputs(estimator: Estimator, name: str) -> Estimator:
    baseline = isinstance(estimator.baseline, Baseline) and estimator.baseline.inputs
    if baseline or estimator.inputs:
        raise ValueError(
            f"site '{name}': a {'baseline' if baseline else 'surrogate'} with inputs cannot be given in the model, where they may lie "
            "downstream of the site; give it at the site's statement in the guide."
        )
    return estimator


class SiteDescription(NamedTuple):
    """One random site.

    Attributes:
        name: Its name.
        estimator: Its estimator.
        source: Where the estimator was given.
        distribution: Its family.
        parameters: The parameters of its distribution.
        plates: Its plates.
        closed_form: Whether its divergence has a closed form; None unless ``entropy="analytic"``.
        together: Whether its particles are drawn together.
        covered: Whether the control variate for the whole guide covers it; None if the objective has none.
    """

    name: str
    estimator: Estimator
    source: str
    distribution: str
    parameters: tuple[str, ...]
    plates: tuple[str, ...]
    closed_form: bool | None = None
    together: bool = False
    covered: bool | None = None


class Description(tuple[SiteDescription, ...]):
    """The random sites of a guide, each with its estimator; prints as a table.

    Attributes:
        evaluations: How often a step runs guide and model for each particle.
        marginalised: The sites of the model that the host sums out.
    """

    evaluations: int
    marginalised: tuple[str, ...]

    def __new__(cls, sites: Iterable[SiteDescription], evaluations: int = 1, marginalised: tuple[str, ...] = ()) -> Description:
        description = super().__new__(cls, sites)
        description.evaluations = evaluations
        description.marginalised = marginalised
        return description

    @property
    def together(self) -> tuple[str, ...]:
        """The sites at which the particles are drawn together."""
        return tuple(d.name for d in self if d.together)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"Description({super().__repr__()}, evaluations={self.evaluations}, marginalised={self.marginalised})"

    def __str__(self) -> str:
        """The table."""
        rows = [("site", "estimator", "given by", "distribution", "parameters", "plates")]
        rows += [(d.name, d.estimator.label, d.source, d.distribution, ", ".join(d.parameters), ", ".join(d.plates)) for d in self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if any(d.closed_form is not None for d in self):
            closed, sampled = (", ".join(d.name for d in self if d.closed_form is is_closed) for is_closed in (True, False))
            lines.append(f"divergence in closed form: {closed or 'none'}; sampled: {sampled or 'none'}")
        if self.evaluations > 1:
            lines.append(f"{self.evaluations} evaluations of the program per particle")
        if self.marginalised:
            lines.append(summed_out(self.marginalised))
        if any(d.covered is not None for d in self):
            covered, others = (", ".join(d.name for d in self if d.covered is is_covered) for is_covered in (True, False))
            lines.append(f"control variate over: {covered or 'none'}; without: {others or 'none'}")
        if self.together:
            apart = [d.name for d in self if not d.together]
            lines.append(f"particles drawn together: {', '.join(self.together)}; independently: {', '.join(apart) or 'none'}")
        return "\n".join(lines)


def summed_out(names: tuple[str, ...]) -> str:
    """The line of a table that names the marginalised sites."""
    return f"summed out by the host: {', '.join(names)}"


class Describes:
    """An objective that can describe the estimator of each site, and that prints as the call that makes it."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        objective = super().__new__(cls)
        objective._given = args, kwargs
        return objective

    def __copy__(self):
        """A copy whose runs do not change the steps of this one."""
        copied = object.__new__(type(self))
        vars(copied).update({name: copy(value) if isinstance(value, Assignment) else value for name, value in vars(self).items()})
        return copied

    def __repr__(self) -> str:
        """The call with its arguments, functions by name."""
        args, kwargs = self._given
        given = [*map(name_of, args), *(f"{name}={name_of(value)}" for name, value in kwargs.items())]
        return f"{type(self).__name__}({', '.join(given)})"

    def describe(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Description:
        """A table of the random sites: the estimator, where it was given, the distribution's parameters and the plates.

        Lines below the table show, if they apply: the number of evaluations of the program, the sites that the host sums out, the sites
        whose particles are drawn together, the sites that a control variate for the whole guide covers, and under
        ``entropy="analytic"`` the sites whose divergence has a closed form.

        It runs guide and model, and then the loss once, so that it raises the errors that the fit would raise. It leaves what
        the program holds as it was: autoguides, modules with their buffers, random generators, and in Pyro the parameter store. In
        NumPyro guide and model have their initial parameters, and the loss is only traced.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A tuple of records that prints as a table.

        Raises:
            ValueError: Whatever the loss raises at the first step of a fit.
        """
        return self._described(model, guide, args, kwargs)

    def _described(self, *program: Any) -> Description:
        """The table of a program, after its loss has run; a copy runs them, so that the steps of this objective stay as they are."""
        objective = copy(self)
        description = objective._describe(*program)
        objective._try_loss(*program)
        return description

    def _describe(self, model, guide, args, kwargs) -> Description:
        raise NotImplementedError

    def _try_loss(self, model, guide, args, kwargs) -> None:
        """Run the loss as a fit would, only for its errors."""
        raise NotImplementedError

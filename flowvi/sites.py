"""When the guide reaches a site, an estimator is chosen, and it attaches derivatives to the draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from flowvi.assignment import (
    ENUMERATED,
    Assignment,
    Choice,
    MissingAnnotationError,
    Settled,
    SiteDescription,
    require_estimator,
    require_random,
)
from flowvi.estimators import RP, Draw, Estimator
from flowvi.host import Host
from flowvi.learned.coupling import Block, block_of
from flowvi.ops import Array
from flowvi.target import Target

Entropy = Literal["full", "stl", "analytic"]


class Visit(NamedTuple):
    """A random site that the guide has reached.

    Attributes:
        target: Its distribution as the estimator sees it.
        estimator: The estimator to use, resolved.
        choice: The estimator as it was given, and where it was given.
        wrapped: The estimator of an ``Estimated`` wrapper around the distribution, if there is one.
    """

    target: Target
    estimator: Estimator
    choice: Choice
    wrapped: Estimator | None


class GuideSites:
    """The random sites of a guide, filled in as its run reaches them.

    Attributes:
        assignment: Chooses the estimators.
        entropy: How the objective differentiates the guide's own log density.
        random: The random sites in program order, each with its description.
        aliases: For each random site, the corresponding model site.
        draws: The draws of the sites to which something is attached.
        fixed: The statements that are not random choices, each with what it is, such as "observed".
        learned: Names of the parameters that estimators learn, each with its site.
        replaced: Values that sites get instead of a draw.
        held: Sites that keep the value of another run, each with this value and with what was attached to it.
        bases: The base samples of sites at given values, if the host cannot compute them from the values.
        log_probs: Unscaled log densities that the estimators have computed; the host does not compute them again.
        together: The sites at which the particles are drawn together.
        blocks: The sites that a control variate for the whole guide can cover.
    """

    def __init__(self, assignment: Assignment, entropy: Entropy = "full"):
        self.assignment = assignment
        self.entropy: Entropy = entropy
        self.random: dict[str, SiteDescription] = {}
        self.aliases: dict[str, str] = {}
        self.draws: dict[str, Draw] = {}
        self.fixed: dict[str, str] = {}
        self.learned: dict[str, str] = {}
        self.replaced: dict[str, Any] = {}
        self.held: dict[str, tuple[Any, Draw | None]] = {}
        self.bases: dict[str, Array] = {}
        self.log_probs: dict[str, Array] = {}
        self.together: list[str] = []
        self.blocks: dict[str, Block] = {}

    def fresh(self) -> GuideSites:
        """The same choices, for another run."""
        return GuideSites(self.assignment, self.entropy)

    @property
    def biased(self) -> list[str]:
        """The random sites with a biased estimator that has attached something."""
        return [name for name in self.draws if name in self.random and self.random[name].estimator.biased]

    def visit(
        self, host: Host, msg: Any, alias: str, target_of: Callable[[Any, bool], Target], draw: Callable[[Any, Visit], Draw | None]
    ) -> str | None:
        """Choose the estimator of a site and let it act.

        Args:
            host: The host library.
            msg: The host's message of the statement.
            alias: The name of the corresponding model site.
            target_of: ``target_of(msg, enters)`` makes the target of the site.
            draw: ``draw(msg, visit)`` draws at the site; returns what was attached, or None if nothing was.

        Returns:
            What the statement is, if it is not a random choice.

        Raises:
            MissingAnnotationError: The default estimator refuses the site, and the model may name another one.
        """
        name, wrapped = msg["name"], find_estimated(host, msg["fn"])
        if what := not_random(host, msg):
            require_random(msg, wrapped, what)
            self.fixed[name] = what
            return what
        choice = self.assignment.choose(msg, alias, wrapped)
        try:
            target = target_of(msg, True)
            estimator = choice.estimator.resolve(target)
            if target.transforms and not estimator.enters:
                target = target_of(msg, False)
            if self.assignment.control_variate is not None:
                estimator = self._coupled(msg, target, estimator)
            drawn = draw(msg, Visit(target, estimator, choice, wrapped))
        except ValueError as refusal:
            if choice.source == "default" and not self.assignment.has_read_annotations:
                raise MissingAnnotationError(refusal) from refusal
            if choice.source == ENUMERATED:
                way = "Remove it, or give the site another estimator by infer['estimator'] or in the objective."
                raise ValueError(f"{refusal} The site has {choice.estimator} because of {ENUMERATED}. {way}") from refusal
            raise
        if drawn is not None:
            self.draws[name] = drawn
        plates = tuple([frame.name for frame in msg["cond_indep_stack"]])  # a list is faster here than a generator
        self.random[name] = SiteDescription(
            name,
            estimator,
            choice.source,
            target.family,
            target.parameters,
            plates,
            together=name in self.together,
            covered=None if self.assignment.control_variate is None else name in self.blocks,
        )
        self.aliases[name] = alias
        return None

    def _coupled(self, msg: Any, target: Target, estimator: Estimator) -> Estimator:
        """The estimator with its part of the control variate for the whole guide."""
        given = msg["value"] is not None or msg.get("_control_flow_done")
        if given or (block := block_of(estimator, target, msg["cond_indep_stack"])) is None:
            return estimator
        self.blocks[msg["name"]] = block
        return self.assignment.coupled(msg["name"], estimator)

    def settle(self, msg: Any) -> None:
        """Record a random site as settled, if its estimator is plain ``RP`` by default: a later run need not decide anything there.

        Without elements a site has ``RP()`` also where ``RP(control_variate=...)`` was given.
        """
        name, assignment, fn = msg["name"], self.assignment, msg["fn"]
        description = self.random[name]
        if (
            description.source != "default" or callable(assignment.estimators) or 0 in fn.shape()
        ):  # RP() at no elements stands for others
            return
        if description.estimator == RP() and name not in self.draws and name not in self.blocks:
            families = tuple(type(inside) for inside in _inside(fn))
            assignment.settled[name] = Settled(families, self.aliases[name], description)


def not_random(host: Host, msg: Any) -> str | None:
    """What a statement is, if it is not a random choice; None if it is one."""
    kind = type(host.unwrap(msg["fn"])).__name__
    if kind == "Unit":
        return "a factor"
    if msg["is_observed"]:
        return "observed"
    return "a Delta" if kind == "Delta" else None


def annotation(host: Host, msg: Any) -> Estimator:
    """The estimator with which a statement of the model is annotated, ``infer={"estimator": ...}``."""
    if what := not_random(host, msg):
        require_random(msg, None, what)
    return require_estimator(msg["infer"]["estimator"], f"site '{msg['name']}': infer['estimator']")


def find_estimated(host: Host, fn: Any) -> Estimator | None:
    """The estimator of the outermost ``Estimated`` wrapper around the site's family."""
    inside = None  # the outermost distribution that is not a wrapper, such as a transformed one
    while hasattr(fn, "base_dist"):
        if isinstance(fn, host.estimated):
            if inside is not None:
                family = type(inside).__name__
                raise ValueError(
                    f"Estimated must wrap the whole {family}, found it around the base distribution; "
                    f"write Estimated({family}(...), estimator)."
                )
            return fn.estimator  # type: ignore[attr-defined]
        if inside is None and not isinstance(fn, host.wrappers):
            inside = fn
        fn = fn.base_dist
    return None


def _inside(fn: Any) -> Iterator[Any]:
    """A distribution and those inside it, outermost first."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def masks(fn: Any) -> Iterator[Any]:
    """The masks of the wrappers around a family, outermost first."""
    for inside in _inside(fn):
        if type(inside).__name__ == "MaskedDistribution":
            yield inside._mask


def is_masked(fn: Any) -> bool:
    """Whether the log density of ``fn`` is masked."""
    return any(True for _ in masks(fn))


def weight_of_density(msg: Any) -> Any:
    """The factor of a statement's log density in an objective: its scale times its masks."""
    weight = 1.0 if msg["scale"] is None else msg["scale"]
    for mask in (msg.get("mask"), *masks(msg["fn"])):
        if mask is not None:
            weight = weight * mask
    return weight

"""What guidance needs from an adapter: gradients of an objective, their time, and costs at given values of a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowvi.assignment import Estimators
from flowvi.estimators import Estimator
from flowvi.guidance.candidates import GuideSite
from flowvi.objectives import LeaveOneOut
from flowvi.particles import Particles
from flowvi.run import Run, Statement
from flowvi.sites import Entropy
from flowvi.tape import Joint

ELEMENTS = 1_000_000  # the largest number of elements in one batch of gradients
ALIKE = 1e-9  # log densities that differ by less, relative to the largest one, count as equal; in single precision, 100 times eps


class Setting(NamedTuple):
    """An objective.

    Attributes:
        chosen: The sites whose estimator differs from the one without advice, each with its estimator.
        entropy: How the guide's own log density is differentiated.
        num_particles: The number of particles.
        baseline: Whether the mean over the other particles is subtracted from the costs of a score.
        joint: The sites whose scores multiply every cost.
        particles: How the particles are drawn.
        vectorized: Whether the particles are a plate; in NumPyro they always are.
        of_host: Whether it is the host's own objective, whose only option is the number of particles.
    """

    chosen: tuple[tuple[str, Estimator], ...] = ()
    entropy: Entropy = "full"
    num_particles: int = 1
    baseline: LeaveOneOut = "loo"
    joint: frozenset[str] = frozenset()
    particles: Particles = "independent"
    vectorized: bool = False
    of_host: bool = False

    def at(self, estimators: Mapping[str, Estimator]) -> Setting:
        """The same setting with other estimators at some sites."""
        return self._replace(chosen=tuple(sorted((dict(self.chosen) | dict(estimators)).items(), key=lambda item: item[0])))

    def without(self, names: frozenset[str]) -> Setting:
        """The same setting, in which some sites keep the estimator that they have without advice."""
        return self._replace(chosen=tuple(item for item in self.chosen if item[0] not in names))


class Batch(NamedTuple):
    """Gradients at consecutive random keys.

    Attributes:
        gradients: With the samples along the first axis, and all elements of all parameters along the second.
        seconds: The time of one of them.
    """

    gradients: np.ndarray
    seconds: float


Draw = Callable[[int], Batch]  # from the number of a batch, which determines its random keys


class Probe(Protocol):
    """The log densities of a run as functions of the value of one site, at fixed values of the guide's other sites.

    Statements have the labels of :func:`statements`; the site's own label in ``plates`` is ``""``.

    Attributes:
        plates: For each statement, its plates by name, each with its (negative) dim.
        event_ndim: The number of event dims of the site's value.
    """

    @property
    def plates(self) -> Mapping[str, Mapping[str, int]]: ...
    @property
    def event_ndim(self) -> int: ...

    def value(self, seed: int) -> np.ndarray:
        """The value of the site in the run of a seed."""
        ...

    def densities(self, seed: int, values: np.ndarray) -> dict[str, np.ndarray]:
        """Each statement's log density in the run of a seed, with the value of the site replaced by each of ``values`` (first axis)."""
        ...

    def slopes(self, seed: int, value: np.ndarray) -> dict[str, np.ndarray]:
        """The automatic derivative of the sum of each statement's log density in the value of the site, at ``value``."""
        ...


def statements(run: Run) -> dict[str, Statement]:
    """The statements of a run that have a log density, those of the model first, each under a label for messages."""
    both = ((run.model, "statement '{}'"), (run.guide, "the guide's statement '{}'"))
    return {label.format(name): s for of, label in both for name, s in of.items() if s.log_density is not None}


def plates(run: Run, site: str) -> dict[str, dict[str, int]]:
    """The plates of each statement, and of a site under the label ``""``."""
    labelled = {**statements(run), "": run.guide[site]}
    return {label: {frame.name: frame.dim for frame in s.frames} for label, s in labelled.items()}


def are_apart(alone: Sequence[Mapping[str, np.ndarray]], together: Mapping[str, np.ndarray], num_dims: int) -> bool:
    """Whether each particle of a plate has the log densities that it has alone, up to rounding errors.

    Args:
        alone: The log density of each statement in a run of one particle, for each particle.
        together: The log densities in a run of all these particles, at the same values.
        num_dims: The number of plate dims of this run; the first one has the particles.
    """
    if any(one.keys() != together.keys() for one in alone):
        return False
    for name, density in together.items():
        rows = [one[name].reshape((1,) * (num_dims - 1 - one[name].ndim) + one[name].shape) for one in alone]
        if density.shape != (len(rows), *rows[0].shape):
            return False
        largest = np.abs(density, where=np.isfinite(density), out=np.zeros_like(density)).max(initial=0.0)
        tolerance = max(ALIKE, 100 * np.finfo(density.dtype).eps) * largest
        if not np.allclose(density, np.stack(rows), rtol=0.0, atol=tolerance, equal_nan=True):
            return False
    return True


class Bench(Protocol):
    """A model and a guide at given parameters.

    Attributes:
        sites: The random sites of the guide, in program order.
        parameters: The parameters in the order of a gradient's elements, each with how many it has.
        marginalises: Whether the host sums out sites of the model.
        drawn: The ways to draw several particles that the program supports, each with whether they are a plate.
    """

    @property
    def sites(self) -> Mapping[str, GuideSite]: ...
    @property
    def parameters(self) -> Mapping[str, int]: ...
    @property
    def marginalises(self) -> bool: ...
    @property
    def drawn(self) -> tuple[tuple[Particles, bool], ...]: ...

    def gradients(self, setting: Setting) -> Draw:
        """The gradients of an objective. A batch of a given number has the same keys in every setting.

        Raises:
            ValueError: An estimator refuses its site.
        """
        ...

    def probe(self, site: str) -> Probe:
        """The costs as functions of a site."""
        ...

    def hints(self, setting: Setting, seconds: float) -> tuple[str, ...]:
        """What else would make the steps of a setting faster; a step now takes so many seconds."""
        ...


class Clock(Protocol):
    """How much time is left."""

    def left(self) -> float:
        """The seconds that are left."""
        ...

    def show(self, what: str) -> None:
        """Show what is being done."""
        ...


def parameter_at(bench: Bench, element: int) -> str:
    """The name of the parameter to which an element of the gradient belongs."""
    for name, size in bench.parameters.items():
        if element < size:
            return name
        element -= size
    raise IndexError(element)


def batch_size(num_elements: int, largest: int) -> int:
    """The number of gradients in a batch: fewer if they have many elements, and at least two."""
    return max(2, min(largest, ELEMENTS // max(num_elements, 1)))


def objective(
    bench: Bench,
    setting: Setting,
    own: Callable[..., Any],
    of_host: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    estimators: Estimators,
    default: Estimator,
) -> Any:
    """The objective of a setting.

    Args:
        bench: The program.
        setting: The setting.
        own: The adapter's ``TraceFlow_ELBO``.
        of_host: The host's objectives: for programs whose sites are all pathwise, for other programs, and for programs with sites to
            sum out.
        estimators: The estimators that are given without advice.
        default: The estimator of a site for which none is given.
    """
    if setting.of_host:
        pathwise = all(site.is_pathwise_in_host for site in bench.sites.values())
        return of_host[2 if bench.marginalises else 0 if pathwise else 1](setting.num_particles)
    elbo = own(
        setting.num_particles,
        estimators=_over(estimators, dict(setting.chosen)),
        default=default,
        entropy=setting.entropy,
        baseline=setting.baseline,
        particles=setting.particles,
        **({"vectorize_particles": True} if setting.vectorized else {}),
    )
    if setting.joint:
        elbo.dependencies = Joint(elbo.dependencies, setting.joint)
    return elbo


def _over(given: Estimators, chosen: dict[str, Estimator]) -> Estimators:
    """The estimators that are ``chosen``; at all other sites those that are given."""
    if given is None or isinstance(given, Mapping):
        return {**(given or {}), **chosen}
    return lambda site: chosen.get(site["name"]) or given(site)

"""Whether an estimator is right for a distribution: the gradcheck of velocity fields, standardizations and sampling densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from flowvi.estimators import Estimator


@dataclass(frozen=True)
class Condition:
    """One condition of an unbiased estimator.

    Attributes:
        name: What it is called.
        holds: Whether it holds; None where it was not checked.
        found: The largest discrepancy and where it is, or why it was not checked.
    """

    name: str
    holds: bool | None
    found: str


@dataclass(frozen=True)
class EstimatorReport:
    """What :func:`flowvi.check_estimator` found; prints as a table.

    Attributes:
        title: The estimator and the distribution.
        conditions: Every condition, in the order in which they were checked.
    """

    title: str
    conditions: tuple[Condition, ...]

    @property
    def failed(self) -> tuple[Condition, ...]:
        """The conditions that do not hold."""
        return tuple(c for c in self.conditions if c.holds is False)

    def __str__(self) -> str:
        """The table as plain text."""
        width = max(len(c.name) for c in self.conditions)
        said = {True: "holds", False: "FAILS", None: "-"}
        return "\n".join([self.title, *(f"{c.name.ljust(width)}  {said[c.holds]:5}  {c.found}" for c in self.conditions)])


class EstimatorError(AssertionError):
    """Conditions of an estimator that do not hold.

    Attributes:
        report: The whole :class:`EstimatorReport`.
    """

    def __init__(self, report: EstimatorReport):
        self.report = report
        lines = (f"- {c.name}: {c.found}" for c in report.failed)
        super().__init__("\n".join([f"{report.title}: {len(report.failed)} of {len(report.conditions)} conditions fail.", *lines]))


def check_estimator(
    distribution: Any,
    estimator: Estimator,
    parameters: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-4,
    num_samples: int = 20_000,
    seed: int = 0,
    raise_exception: bool = True,
) -> EstimatorReport:
    r"""Check that :math:`E_q\{w\,[u\cdot\nabla\phi + \psi\,\phi]\} = \nabla_\theta E_p[\phi]`, and what it rests on in u, psi and q.

    u is the velocity of the estimator's own draw and psi the derivative of its own score, so that what is checked is what runs. Every
    derivative is compared with finite differences of the host's ``log_prob``, which see what automatic derivatives are
    told not to. The conditions, by the names under which they are reported:

    * ``requirements``: what the estimator refuses at its first run (shapes, families, a support that moves).
    * ``support of q``: q is positive wherever p is. ``second moment``: E_q[(w u)^2] and E_q[(w psi)^2] are finite, in the tails and
      where q vanishes. ``sampler``: the draws follow the density.
    * ``linear in dtheta``: of a general velocity, and velocity(x, p, 0) = 0. ``elementwise``: no element of a batch reads another one.
    * ``standardization``: S depends on x and is invertible. ``finite``: neither NaN nor infinite where p has mass.
    * ``log_prob``: its automatic derivatives in the parameters and in x.
    * ``divergence``: psi = div u + u . grad log p + d_theta log p. ``pathwise``: where it is declared 0, it is. ``score``: where u = 0.
    * ``tangent``: a velocity stays on the simplex. ``boundary flux``: p (u - v) vanishes at the ends of the support, of speed v, and at
      infinity; on a circle, what leaves through the seam comes in again.
    * ``mean of psi``: E_p[psi] = 0, and ``unbiased``: the equation above, for three smooth bounded or slowly growing costs.

    Means are integrals by quadrature for events of one and two dimensions, sums over a discrete support, and sample means with z-scores
    (\|z\| < 5) elsewhere and for ``RP()``, whose draws are the host's own.

    **What it cannot see**: jumps of *your* cost in x, which ``RP``, ``ImplicitRP`` and ``Flow`` do not allow; costs outside its
    battery, such as one that grows faster than the tails of p fall; how large a finite variance is (see ``gradient_report``);
    dependence between sites; an error at parameters other than these. On a circle, costs that are not periodic are tried only where
    u is 0 at the seam.

    **Requirements**: a distribution with ``expand`` that can be built again from its parameters; otherwise give a function. All runs
    in double precision and on the CPU, so that networks in user functions must be there too.

    Args:
        distribution: A distribution of either host with the parameters at which to check, or a function of parameters that returns one.
            Batches are checked element by element.
        estimator: The estimator, such as ``Flow(velocity)``.
        parameters: Which parameters carry a derivative: names, such as ``("loc",)``; by default all, the bounds of a support included.
            Those of a part have a longer name, such as ``"component_distribution.loc"``. With a function: its arguments by name.
        tolerance: The largest discrepancy, relative to the size of the terms.
        num_samples: How many samples where a mean is not an integral or a sum.
        seed: Of all draws.
        raise_exception: Whether to raise where a condition fails, as ``torch.autograd.gradcheck`` does.

    Returns:
        The report, which prints as a table.

    Raises:
        flowvi.checks.EstimatorError: An ``AssertionError`` that names all conditions that fail, where, by how much, and what to do.
        TypeError: No distribution, no estimator, an unknown parameter, or a distribution that cannot be built again.

    Example:
        >>> import numpyro.distributions as dist
        >>> import flowvi
        >>> half = flowvi.Flow(loc=lambda x, p: 0.5)
        >>> report = flowvi.check_estimator(dist.Normal(0.3, 1.2), half)
        >>> report.failed
        ()
        >>> wrong = flowvi.Flow(lambda x, p, dtheta: 0.5 * dtheta.loc, divergence="pathwise")
        >>> [c.name for c in flowvi.check_estimator(dist.Normal(0.3, 1.2), wrong, ["loc"], raise_exception=False).failed]
        ['pathwise', 'unbiased']

    References:
        Parmas and Sugiyama 2021, eq. 19, with the boundary term of its appendix.
    """
    from flowvi.checks.case import Case  # NumPy comes with the host
    from flowvi.checks.conditions import conditions

    if not isinstance(estimator, Estimator):
        raise TypeError(f"check_estimator: expected an estimator such as flowvi.LR(), found {estimator!r}.")
    build, theta = _parameters(distribution, parameters)
    host = _host(build(theta))
    with host.precise():
        case = Case(host, build, theta, estimator, tolerance, num_samples, seed)
        if hasattr(distribution, "log_prob"):
            case.require_same(distribution)
        names = dict.fromkeys(label.split("[")[0] for label in case.labels)
        title = f"{estimator!r} at {case.family}({', '.join(names)})"
        report = EstimatorReport(title, tuple(conditions(case)))
    if raise_exception and report.failed:
        raise EstimatorError(report)
    return report


def _host(p: Any) -> Any:
    """The adapter's module for the host of a distribution, which has imported that host already."""
    bases = {c.__module__.split(".")[0] for c in type(p).__mro__}
    if not bases & {"torch", "numpyro"}:
        raise TypeError(
            f"check_estimator: expected a distribution of Pyro or NumPyro, or a function that returns one; found {type(p).__name__}."
        )
    return import_module("flowvi.pyro.checks" if "torch" in bases else "flowvi.numpyro.checks")


# ---- from a distribution to a function of its parameters

Build = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Parameter:
    """A value at which to check, and the constraint that it fulfils."""

    value: Any
    constraint: Any = None


def _parameters(distribution: Any, parameters: Sequence[str] | Mapping[str, Any] | None) -> tuple[Build, dict[str, Parameter]]:
    """How to build the distribution from parameters that carry a derivative, and their values."""
    if not hasattr(distribution, "log_prob"):
        if not callable(distribution) or not isinstance(parameters, Mapping) or not parameters:
            raise TypeError(
                "check_estimator: expected a distribution, or a function with its arguments by name, such as "
                f"check_estimator(f, estimator, {{'loc': 0.3}}); found {distribution!r} with {parameters!r}."
            )
        theta = {name: Parameter(value) for name, value in parameters.items()}
        return lambda given: distribution(**{name: getattr(p, "value", p) for name, p in given.items()}), theta
    found = dict(named("", distribution))
    names = list(found) if parameters is None else [parameters] if isinstance(parameters, str) else list(parameters)
    if unknown := [name for name in names if name not in found]:
        raise TypeError(
            f"check_estimator: {type(distribution).__name__} has no parameter {unknown}; its parameters are: {', '.join(found)}."
        )
    if not names:
        raise TypeError(f"check_estimator: {type(distribution).__name__} has no parameter to check; give a function and its arguments.")

    def build(given: Mapping[str, Any]) -> Any:
        return _rebuilt("", distribution, {name: getattr(p, "value", p) for name, p in {**found, **given}.items()})

    return build, {name: found[name] for name in names}


def _parts(p: Any) -> dict[str, Any]:
    """The arguments from which a distribution can be built again: its parameters and the distributions inside it."""
    if _is_wrapper(p):
        return {"base_dist": p.base_dist}
    accepted = {
        name: a for name, a in signature(type(p).__init__).parameters.items() if name not in ("self", "validate_args", "support")
    }
    ways = [name for name, a in accepted.items() if a.default is None]  # such as probs and logits, of which one is given
    given = next((name for name in (*vars(p), *ways) if name in ways), None)
    arguments = [name for name in accepted if name not in ways or name == given]
    return {name: getattr(p, name) for name in arguments if hasattr(p, name)}


def _is_wrapper(p: Any) -> bool:
    """Independent, expanded, masked, transformed: what has no parameters of its own here."""
    return not p.arg_constraints and "base_dist" in vars(p)


def _inside(prefix: str, name: str) -> str:
    return prefix if name == "base_dist" else f"{prefix}{name}."


def named(prefix: str, p: Any):
    """Each parameter by its full name."""
    for name, part in _parts(p).items():
        if hasattr(part, "log_prob"):
            yield from named(_inside(prefix, name), part)
        elif isinstance(part, list | tuple):
            for i, item in enumerate(part):
                if hasattr(item, "log_prob"):
                    yield from named(f"{prefix}{name}[{i}].", item)
        elif name in p.arg_constraints and not _is_discrete(p.arg_constraints[name]):
            yield prefix + name, Parameter(part, p.arg_constraints[name])


def _is_discrete(constraint: Any) -> bool:
    try:
        return constraint.is_discrete
    except NotImplementedError:  # of a constraint that depends on the other parameters
        return False


def _rebuilt(prefix: str, p: Any, values: Mapping[str, Any]) -> Any:
    """A distribution like ``p`` with other parameters."""

    def rebuilt(name: str, part: Any) -> Any:
        if hasattr(part, "log_prob"):
            return _rebuilt(_inside(prefix, name), part, values)
        if isinstance(part, list | tuple):
            return type(part)(
                _rebuilt(f"{prefix}{name}[{i}].", item, values) if hasattr(item, "log_prob") else item for i, item in enumerate(part)
            )
        return values.get(prefix + name, part)

    arguments = {name: rebuilt(name, part) for name, part in _parts(p).items()}
    if _is_wrapper(p):
        new = copy(p)
        new.__dict__.update(arguments)
        return new
    try:
        return type(p)(**arguments)
    except TypeError as error:
        raise TypeError(
            f"check_estimator: {type(p).__name__} cannot be built again from {', '.join(arguments)} ({error}); give a function of its "
            "parameters: check_estimator(lambda loc: ..., estimator, {'loc': 0.3})."
        ) from error

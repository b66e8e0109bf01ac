"""What the core asks of an adapter beyond array functions, and the register of the adapters that have been imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flowvi.ops import Ops


class Host(Protocol):
    """One of the host libraries, Pyro or NumPyro, as the core sees it.

    Attributes:
        name: ``"numpyro"`` or ``"pyro"``.
        ops: The operations of its arrays.
        distribution: The class from which all of its distributions derive.
        target: Makes the :class:`flowvi.target.Target` of a site: ``target(name, distribution, enters)``.
        estimated: Its wrapper ``Estimated``.
        wrappers: The classes that wrap a family without changing it, ``estimated`` among them.
        proposal: Makes a distribution of a :class:`flowvi.proposals.Density`: ``proposal(density, *parts)``.
        student_t: Its Student's t: ``student_t(df, loc, scale)``.
        multivariate_student_t: Its multivariate Student's t: ``multivariate_student_t(df, loc, scale_tril)``.
    """

    @property
    def name(self) -> str: ...
    @property
    def ops(self) -> Ops: ...
    @property
    def distribution(self) -> type: ...
    @property
    def target(self) -> Callable[[str, Any, bool], Any]: ...
    @property
    def estimated(self) -> type: ...
    @property
    def wrappers(self) -> tuple[type, ...]: ...
    def unwrap(self, fn: Any, /) -> Any:
        """The named family inside independent, expanded, masked and estimated distributions."""
        ...

    def divergence(self, guide: Any, model: Any, /) -> Any:
        """The divergence of two statements in closed form, scaled and masked as the first; None where the host knows none."""
        ...

    @property
    def proposal(self) -> Callable[..., Any]: ...
    @property
    def student_t(self) -> Callable[..., Any]: ...
    @property
    def multivariate_student_t(self) -> Callable[..., Any]: ...


_HOSTS: list[Host] = []


def register(host: Host) -> None:
    """Make an adapter known to the core; each adapter does so when it is imported."""
    _HOSTS.append(host)


def host_of(distribution: Any) -> Host:
    """The host library of a distribution.

    Raises:
        TypeError: It is no distribution of a library whose adapter has been imported.
    """
    for host in _HOSTS:
        if isinstance(distribution, host.distribution):
            return host
    imported = ", ".join(host.name for host in _HOSTS) or "none"
    raise TypeError(
        f"expected a distribution of Pyro or NumPyro, found {type(distribution).__name__} (adapters imported so far: {imported}); "
        "import flowvi.pyro or flowvi.numpyro first."
    )

"""What the core needs from an adapter beyond array functions, and the registry of the adapters that have been imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from flowvi.ops import Array, Ops

if TYPE_CHECKING:
    import numpy as np


class Host(Protocol):
    """One of the host libraries, Pyro or NumPyro, as the core sees it.

    The core builds objects with the properties. The methods are for tools that work with one distribution outside of a program
    (:mod:`flowvi.checks`, :mod:`flowvi.plot`): they convert numbers to and from NumPy, draw with a seed, and differentiate.

    Attributes:
        name: ``"numpyro"`` or ``"pyro"``.
        ops: The operations of its arrays.
        distribution: The base class of its distributions.
        target: Makes the :class:`flowvi.target.Target` of a site: ``target(name, distribution, enters)``.
        estimated: Its wrapper ``Estimated``.
        wrappers: The classes that wrap a family without changing it, ``estimated`` among them.
        proposal: Makes a distribution from a :class:`flowvi.proposals.Density`: ``proposal(density, *parts)``.
        student_t: Its Student's t: ``student_t(df, loc, scale)``.
        multivariate_student_t: Its multivariate Student's t: ``multivariate_student_t(df, loc, scale_tril)``.
        compiles: Whether it compiles a function once for each shape of its arguments, which makes many shapes slow.
    """

    @property
    def name(self) -> str: ...
    @property
    def ops(self) -> Ops: ...
    @property
    def distribution(self) -> type: ...
    @property
    def target(self) -> Callable[..., Any]: ...
    @property
    def estimated(self) -> type: ...
    @property
    def wrappers(self) -> tuple[type, ...]: ...
    def divergence(self, guide: Any, model: Any, /) -> Any:
        """The divergence of two statements in closed form, scaled and masked like the first; None if the host knows none."""
        ...

    def base_sample(self, statement: Any, /) -> Array | None:
        """The detached base sample of a transformed statement whose transform the host cannot invert; None for any other."""
        ...

    @property
    def proposal(self) -> Callable[..., Any]: ...
    @property
    def student_t(self) -> Callable[..., Any]: ...
    @property
    def multivariate_student_t(self) -> Callable[..., Any]: ...
    @property
    def compiles(self) -> bool: ...

    def unwrap(self, p: Any, /) -> Any:
        """The distribution inside independent, expanded, masked and ``Estimated`` wrappers, with its own batch shape."""
        ...

    def devices(self) -> list[str]:
        """The names of the available devices."""
        ...

    def array(self, x: Any, /) -> Array:
        """Numbers as an array, floats in the default precision; an array keeps its derivatives."""
        ...

    def numpy(self, x: Any, /) -> np.ndarray:
        """An array, or anything that NumPy accepts, as a NumPy array."""
        ...

    def precise(self) -> AbstractContextManager[None]:
        """Double precision, and the host's own validation off."""
        ...

    def as_found(self, *programs: Any) -> AbstractContextManager[None]:
        """A context that leaves what programs hold, and the host's random state, as they were."""
        ...

    def sample(self, target: Any, q: Any, seed: int, /) -> Array:
        """Detached draws of x, of the shape of ``target``, from ``q`` expanded to it; the host's random state does not change."""
        ...

    def rsample(self, p: Any, seed: Any, /) -> Array:
        """A draw by the host's own sampler, of batch and event shape, with its derivative; the random state does not change.

        ``seed`` is an integer or an array with one integer.
        """
        ...

    def values(self, f: Callable[..., list[Array]], size: int, /) -> Callable[..., list[np.ndarray]]:
        """The arrays ``f(eta, *arrays)`` at eta = 0, of shape (size,) and live, as a function of the arrays."""
        ...

    def jacobian(self, f: Callable[..., list[Array]], size: int, /) -> Callable[..., list[np.ndarray]]:
        """The derivatives of the arrays ``f(eta, *arrays)`` in eta at 0 (last axis), as a function of the arrays."""
        ...

    def derivative(self, f: Callable[[Array], tuple[Array, ...]], t: float, /) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The arrays ``f(t)`` of a number t, and their derivatives in t.

        Nothing is compiled, so ``f`` can see which of its numbers do not depend on t.
        """
        ...


_HOSTS: list[Host] = []


def register(host: Host) -> None:
    """Make an adapter known to the core; each adapter calls this when it is imported."""
    _HOSTS.append(host)


@contextmanager
def as_found(*programs: Any) -> Iterator[None]:
    """The context ``as_found`` of all adapters that have been imported."""
    with ExitStack() as stack:
        for host in _HOSTS:
            stack.enter_context(host.as_found(*programs))
        yield


def host_of(distribution: Any) -> Host:
    """The host library of a distribution.

    Raises:
        TypeError: It does not belong to a library whose adapter has been imported.
    """
    for host in _HOSTS:
        if isinstance(distribution, host.distribution):
            return host
    imported = ", ".join(host.name for host in _HOSTS) or "none"
    raise TypeError(
        f"expected a distribution of Pyro or NumPyro, found {type(distribution).__name__} (adapters imported so far: {imported}); "
        "import flowvi.pyro or flowvi.numpyro first."
    )
